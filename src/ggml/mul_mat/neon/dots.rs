//! Sums of products of 8-bit numbers, by what the processor has for them.
//!
//! Standard Rust has no intrinsics yet for the two newer instructions: they are inline assembly, which says itself what it
//! needs.

use std::{
    arch::{aarch64::*, asm},
    ops::Range,
};

/// Instructions that there are kernels for.
///
/// # Safety
/// The processor has them, wherever a method is called.
pub trait Dots {
    /// Adds to each lane the four products of its bytes.
    unsafe fn dot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;

    /// Arranges 32 numbers of each of eight rows as [`Dots::dots`] wants them.
    unsafe fn arrange(rows: [[int8x16_t; 2]; 8]) -> [int8x16_t; 16];

    /// The products of arranged rows and `N` vectors, at most four, of some halves of 32 numbers each; lanes are rows.
    ///
    /// # Safety
    /// Vectors have 32 numbers.
    unsafe fn dots<const N: usize>(
        numbers: &[[i8; 16]; 16],
        vectors: [*const i8; N],
        halves: Range<usize>,
    ) -> [[int32x4_t; 2]; N];
}

/// What all 64-bit Arm processors have.
pub struct Neon;

/// FEAT_DotProd: 16 products in four sums.
pub struct DotProd;

/// FEAT_I8MM: 32 products in four sums, of two rows and two vectors.
pub struct I8mm;

/// Four numbers of each row together: for each four, those of the first four rows, then those of the others.
#[inline]
#[target_feature(enable = "neon")]
fn arrange_fours(rows: [[int8x16_t; 2]; 8]) -> [int8x16_t; 16] {
    let mut arranged = [vdupq_n_s8(0); 16];
    for half in 0..2 {
        for h in 0..2 {
            let row = |r: usize| vreinterpretq_s32_s8(rows[4 * h + r][half]);
            let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
            let wide = |x| vreinterpretq_s64_s32(x);
            let even = [wide(vtrn1q_s32(a, b)), wide(vtrn1q_s32(c, d))];
            let odd = [wide(vtrn2q_s32(a, b)), wide(vtrn2q_s32(c, d))];
            let fours = [
                vzip1q_s64(even[0], even[1]),
                vzip1q_s64(odd[0], odd[1]),
                vzip2q_s64(even[0], even[1]),
                vzip2q_s64(odd[0], odd[1]),
            ];
            for (i, four) in fours.into_iter().enumerate() {
                arranged[2 * (4 * half + i) + h] = vreinterpretq_s8_s64(four);
            }
        }
    }
    arranged
}

/// As [`Dots::dots`], for numbers from [`arrange_fours`], with `dot` of a row's fours and the same four of a vector.
///
/// # Safety
/// As there.
macro_rules! dots_of_fours {
    ($dot:ident, $numbers:ident, $vectors:ident, $halves:ident, $n:ident) => {{
        let mut sums = [[vdupq_n_s32(0); 2]; $n];
        for half in $halves {
            let mut x = [vdupq_n_s8(0); $n];
            for i in 0..$n {
                x[i] = vld1q_s8($vectors[i].add(16 * half));
            }
            dots_of_fours!(@lane 0, $dot, $numbers, half, sums, x, $n);
            dots_of_fours!(@lane 1, $dot, $numbers, half, sums, x, $n);
            dots_of_fours!(@lane 2, $dot, $numbers, half, sums, x, $n);
            dots_of_fours!(@lane 3, $dot, $numbers, half, sums, x, $n);
        }
        sums
    }};
    (@lane $lane:literal, $dot:ident, $numbers:ident, $half:ident, $sums:ident, $x:ident, $n:ident) => {
        for h in 0..2 {
            let four = vld1q_s8($numbers[2 * (4 * $half + $lane) + h].as_ptr());
            for i in 0..$n {
                $sums[i][h] = $dot::<$lane>($sums[i][h], four, $x[i]);
            }
        }
    };
}

/// As [`Dots::dot`].
#[inline]
#[target_feature(enable = "neon")]
fn dot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // Two products are 2 × 128 × 127 at most and fit into 16 bits.
    let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(a, b)))
}

/// As [`Dots::dot`], with four bytes of `b`.
#[inline]
#[target_feature(enable = "neon")]
fn dot_of_lane<const LANE: i32>(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    dot(sum, a, vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(b))))
}

impl Dots for Neon {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        dot(sum, a, b)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn arrange(rows: [[int8x16_t; 2]; 8]) -> [int8x16_t; 16] {
        arrange_fours(rows)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dots<const N: usize>(
        numbers: &[[i8; 16]; 16],
        vectors: [*const i8; N],
        halves: Range<usize>,
    ) -> [[int32x4_t; 2]; N] {
        // SAFETY: as the caller says.
        unsafe { dots_of_fours!(dot_of_lane, numbers, vectors, halves, N) }
    }
}

/// As [`Dots::dot`].
///
/// # Safety
/// The processor has FEAT_DotProd.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as the caller says; registers only.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// As [`Dots::dot`], with four bytes of `b`.
///
/// # Safety
/// As [`sdot`].
#[inline(always)]
unsafe fn sdot_of_lane<const LANE: i32>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as the caller says; registers only.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) sum,
            in(vreg) a,
            in(vreg) b,
            const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

impl Dots for DotProd {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: as the caller says.
        unsafe { sdot(sum, a, b) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn arrange(rows: [[int8x16_t; 2]; 8]) -> [int8x16_t; 16] {
        arrange_fours(rows)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dots<const N: usize>(
        numbers: &[[i8; 16]; 16],
        vectors: [*const i8; N],
        halves: Range<usize>,
    ) -> [[int32x4_t; 2]; N] {
        // SAFETY: as the caller says.
        unsafe { dots_of_fours!(sdot_of_lane, numbers, vectors, halves, N) }
    }
}

/// Adds the products of two vectors of eight bytes, the halves of `a`, and two rows, those of `b`: of the first vector and
/// each row, then of the second.
///
/// # Safety
/// The processor has FEAT_I8MM.
#[inline(always)]
unsafe fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as the caller says; registers only.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// The lower halves of both, and the upper ones.
#[inline]
#[target_feature(enable = "neon")]
fn zip_halves(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let [a, b] = [vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)];
    [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))]
}

/// Every such processor has FEAT_DotProd, too.
impl Dots for I8mm {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: as the caller says.
        unsafe { sdot(sum, a, b) }
    }

    /// For each eight numbers those of two rows together, pair by pair.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn arrange(rows: [[int8x16_t; 2]; 8]) -> [int8x16_t; 16] {
        let mut arranged = [vdupq_n_s8(0); 16];
        for half in 0..2 {
            for pair in 0..4 {
                let eights = zip_halves(rows[2 * pair][half], rows[2 * pair + 1][half]);
                for (i, eight) in eights.into_iter().enumerate() {
                    arranged[4 * (2 * half + i) + pair] = eight;
                }
            }
        }
        arranged
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dots<const N: usize>(
        numbers: &[[i8; 16]; 16],
        vectors: [*const i8; N],
        halves: Range<usize>,
    ) -> [[int32x4_t; 2]; N] {
        const { assert!(N <= 4) };
        // Of two vectors each (the last with itself where it is alone), by pair of rows.
        let mut twos = [[vdupq_n_s32(0); 4]; 2];
        for half in halves {
            for two in 0..N.div_ceil(2) {
                // SAFETY: as the caller says.
                let eights = unsafe {
                    let [a, b] = [vectors[2 * two], vectors[(2 * two + 1).min(N - 1)]];
                    zip_halves(vld1q_s8(a.add(16 * half)), vld1q_s8(b.add(16 * half)))
                };
                for (i, eight) in eights.into_iter().enumerate() {
                    for pair in 0..4 {
                        // SAFETY: 16 bytes; the processor has the feature, says the caller.
                        twos[two][pair] = unsafe {
                            let rows = vld1q_s8(numbers[4 * (2 * half + i) + pair].as_ptr());
                            smmla(twos[two][pair], eight, rows)
                        };
                    }
                }
            }
        }
        let mut sums = [[vdupq_n_s32(0); 2]; N];
        for i in 0..N {
            for h in 0..2 {
                let [a, b] = [twos[i / 2][2 * h], twos[i / 2][2 * h + 1]].map(|sums| vreinterpretq_s64_s32(sums));
                let of_vector = if i % 2 == 0 { vzip1q_s64(a, b) } else { vzip2q_s64(a, b) };
                sums[i][h] = vreinterpretq_s32_s64(of_vector);
            }
        }
        sums
    }
}
