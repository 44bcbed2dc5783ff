//! The vector operations that the kernels are written with, and the portable vectors.

/// A vector of f32 lanes.
///
/// # Safety
/// Every method needs the processor features of its implementation; pointers need not be aligned, but must be good
/// for as many elements as the method says.
pub(in crate::ggml) trait Simd: Copy {
    const LANES: usize;
    /// Heads whose queries are multiplied with a key at once: what the registers hold.
    const MAX_GROUP: usize;

    unsafe fn splat(x: f32) -> Self;
    /// `LANES` elements.
    unsafe fn load(from: *const f32) -> Self;
    /// `LANES` elements.
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `other` where `self` is not a number.
    unsafe fn max(self, other: Self) -> Self;
    /// `self × factor + summand`
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self;
    /// The nearest whole number.
    unsafe fn round(self) -> Self;
    /// `self × 2^power` for whole powers of at most 127; 0 for all of −127 and below.
    unsafe fn times_two_to(self, power: Self) -> Self;
    unsafe fn h_max(self) -> f32;
    unsafe fn h_sum(self) -> f32;
    /// The four sums of the lanes.
    unsafe fn sum_each(four: [Self; 4], to: *mut f32);

    /// `LANES` halves.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// `LANES` brain floats.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// `LANES` bytes.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Elements `first..first + LANES` of a block of 32 four-bit numbers: its scale, an f16, then 16 bytes, whose low
    /// halves are the first 16 elements. An element is its number less 8, times the scale.
    unsafe fn load_q4(block: *const u8, first: usize) -> Self;
    /// One half in all lanes.
    unsafe fn splat_f16(from: *const u16) -> Self;
    /// Codes `first..first + LANES` of 32 of four bits: 16 bytes, whose low halves are the first 16.
    unsafe fn load_nibbles(block: *const u8, first: usize) -> Self;
    /// Likewise of two bits: 8 bytes, whose lowest bits are the first 8 codes.
    unsafe fn load_twos(block: *const u8, first: usize) -> Self;
    /// Bits `first..first + LANES` of 32, each as 0 or 4.
    unsafe fn load_fours(block: *const u8, first: usize) -> Self;
}

/// `2^x` for `x ≤ 0`, and 0 where x is below −126.5. The relative error is below 1e-7.
#[inline(always)]
pub(super) unsafe fn exp2<V: Simd>(x: V) -> V {
    // Fitted to 2^x on [−1/2, 1/2] for the least relative error, which is 2e-9 before rounding.
    const C: [f32; 6] = [6.931_472e-1, 2.402_264_8e-1, 5.550_332_5e-2, 9.618_437e-3, 1.339_887_5e-3, 1.535_336e-4];
    // SAFETY: the caller has the features.
    unsafe {
        let x = x.max(V::splat(-127.0));
        let whole = x.round();
        let part = x.sub(whole);
        let mut sum = V::splat(C[5]);
        sum = sum.mul_add(part, V::splat(C[4]));
        sum = sum.mul_add(part, V::splat(C[3]));
        sum = sum.mul_add(part, V::splat(C[2]));
        sum = sum.mul_add(part, V::splat(C[1]));
        sum = sum.mul_add(part, V::splat(C[0]));
        sum = sum.mul_add(part, V::splat(1.0));
        sum.times_two_to(whole)
    }
}

/// `tanh(x)`, by way of `2^(−2|x| log2 e)`.
#[inline(always)]
pub(super) unsafe fn tanh<V: Simd>(x: V) -> V {
    // SAFETY: the caller has the features.
    unsafe {
        let zero = V::splat(0.0);
        let size = x.max(zero.sub(x));
        let e = exp2(size.mul(V::splat(-2.0 * std::f32::consts::LOG2_E)));
        let one = V::splat(1.0);
        let positive = one.sub(e).div(one.add(e));
        // x / |x| is the sign; near 0 the quotient of both keeps it finite.
        positive.mul(x.div(size.max(V::splat(f32::MIN_POSITIVE))))
    }
}

/// A half as f32.
#[inline(always)]
pub(in crate::ggml) fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let rest = u32::from(half & 0x7fff);
    let bits = match rest {
        // Infinity and NaN.
        0x7c00.. => 0x7f80_0000 | rest << 13,
        0x0400.. => (rest << 13) + ((127 - 15) << 23),
        // Zero and subnormal halves are whole multiples of 2^-24.
        _ => (rest as f32 * (1.0 / 16_777_216.0)).to_bits(),
    };
    f32::from_bits(sign | bits)
}

/// Eight lanes that the compiler turns into whatever vectors the target has at least (SSE2, NEON).
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
        Portable(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

// SAFETY in all blocks: the pointers are good for as many elements as the trait says.
impl Simd for Portable {
    const LANES: usize = 8;
    const MAX_GROUP: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for 8 elements.
        Portable(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for 8 elements.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
        // Fused where that is one instruction of the target's baseline; elsewhere it would be a library call.
        let one = |a: f32, b: f32, c: f32| if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c };
        Portable(std::array::from_fn(|i| one(self.0[i], factor.0[i], summand.0[i])))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding 1.5 × 2^23 leaves no bits for a fraction; arguments are between −127 and 0.
        const MAGIC: f32 = 12_582_912.0;
        Portable(self.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    unsafe fn times_two_to(self, power: Self) -> Self {
        self.zip(power, |x, power| x * f32::from_bits(((power as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn h_max(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn h_sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (b + f)) + ((c + g) + (d + h))
    }
    #[inline(always)]
    unsafe fn sum_each(four: [Self; 4], to: *mut f32) {
        // SAFETY: good for 4 elements.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(four.map(|v| v.h_sum())) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: good for 8 elements.
        Portable(unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(f16_to_f32))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: good for 8 elements.
        let bits = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        Portable(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: good for 8 elements.
        Portable(unsafe { from.cast::<[i8; 8]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_q4(block: *const u8, first: usize) -> Self {
        // SAFETY: a half, and eight bytes within the block's 16.
        let (scale, bytes) = unsafe {
            let scale = f16_to_f32(block.cast::<u16>().read_unaligned());
            (scale, block.add(2 + first % 16).cast::<[u8; 8]>().read_unaligned())
        };
        let shift = if first < 16 { 0 } else { 4 };
        Portable(bytes.map(|byte| f32::from((byte >> shift & 15) as i8 - 8) * scale))
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        // SAFETY: good for one element.
        Portable([f16_to_f32(unsafe { from.read_unaligned() }); 8])
    }
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, first: usize) -> Self {
        // SAFETY: eight bytes within the block's 16.
        let bytes = unsafe { block.add(first % 16).cast::<[u8; 8]>().read_unaligned() };
        let shift = if first < 16 { 0 } else { 4 };
        Portable(bytes.map(|byte| f32::from(byte >> shift & 15)))
    }
    #[inline(always)]
    unsafe fn load_twos(block: *const u8, first: usize) -> Self {
        // SAFETY: the block's eight bytes.
        let bytes = unsafe { block.cast::<[u8; 8]>().read_unaligned() };
        Portable(bytes.map(|byte| f32::from(byte >> (first / 8 * 2) & 3)))
    }
    #[inline(always)]
    unsafe fn load_fours(block: *const u8, first: usize) -> Self {
        // SAFETY: a byte within the block's four.
        let bits = unsafe { block.add(first / 8).read() };
        Portable(std::array::from_fn(|i| f32::from((bits >> i & 1) << 2)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_converted() {
        let cases = [
            (0x0000, 0.0),
            (0x8000, -0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x83ff, -6.097_555e-5),
            (0x0400, 6.103_515_6e-5),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ];
        for (half, expected) in cases {
            assert_eq!(f16_to_f32(half).to_bits(), f32::to_bits(expected), "{half:#x}");
        }
        assert!(f16_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn powers_of_two() {
        for i in 0..20_000 {
            let x = -140.0 * i as f32 / 20_000.0;
            // SAFETY: portable vectors need no features.
            let got = unsafe { exp2(Portable::splat(x)) }.0[0];
            let expected = f64::from(x).exp2();
            if x < -126.5 {
                assert_eq!(got, 0.0, "2^{x}");
            } else if x > -125.9 {
                assert!((f64::from(got) / expected - 1.0).abs() < 1.2e-7, "2^{x}: {got}, not {expected}");
            }
        }
        // SAFETY: as above.
        unsafe {
            assert_eq!(exp2(Portable::splat(0.0)).0[0], 1.0);
            assert_eq!(exp2(Portable::splat(f32::NEG_INFINITY)).0[0], 0.0);
        }
    }

    #[test]
    fn hyperbolic_tangents() {
        for i in -4000..4000 {
            let x = i as f32 / 400.0;
            // SAFETY: as above.
            let got = unsafe { tanh(Portable::splat(x)) }.0[0];
            assert!((f64::from(got) - f64::from(x).tanh()).abs() < 2e-7, "tanh {x}: {got}");
        }
    }
}
