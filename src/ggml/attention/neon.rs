//! NEON vectors, which every 64-bit Arm processor has.
//!
//! Standard Rust has no intrinsics yet for halves: conversions are single instructions of inline assembly.

use std::arch::{aarch64::*, asm};

use super::simd::Simd;

#[derive(Clone, Copy)]
pub(super) struct Neon(float32x4_t);

/// Four halves as f32.
#[inline(always)]
fn from_halves(halves: uint16x4_t) -> float32x4_t {
    let floats;
    // SAFETY: an instruction of every 64-bit Arm processor, which touches its registers only.
    unsafe {
        asm!(
            "fcvtl {0:v}.4s, {1:v}.4h",
            out(vreg) floats,
            in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    floats
}

/// Four bytes, in the lowest of eight.
///
/// # Safety
/// Good for 4 bytes.
#[inline(always)]
unsafe fn load_four(from: *const u8) -> uint8x8_t {
    // SAFETY: as the caller says; NEON is there.
    unsafe { vcreate_u8(u64::from(from.cast::<u32>().read_unaligned())) }
}

/// The lowest four of eight bytes as f32.
#[inline(always)]
fn from_bytes(bytes: int8x8_t) -> float32x4_t {
    // SAFETY: NEON is there.
    unsafe { vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes)))) }
}

// SAFETY in all blocks: NEON is there, and the pointers are good for as many elements as the trait says.
impl Simd for Neon {
    const LANES: usize = 4;
    const MAX_GROUP: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 4 elements.
        Neon(unsafe { vld1q_f32(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 4 elements.
        unsafe { vst1q_f32(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vaddq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vsubq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vmulq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vdivq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vmaxnmq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vfmaq_f32(summand.0, self.0, factor.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: as said at the top.
        Neon(unsafe { vrndnq_f32(self.0) })
    }
    #[inline(always)]
    unsafe fn times_two_to(self, power: Self) -> Self {
        // SAFETY: as said at the top.
        unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(power.0), vdupq_n_s32(127));
            Neon(vmulq_f32(self.0, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))))
        }
    }
    #[inline(always)]
    unsafe fn h_max(self) -> f32 {
        // SAFETY: as said at the top.
        unsafe { vmaxnmvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn h_sum(self) -> f32 {
        // SAFETY: as said at the top.
        unsafe { vaddvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn sum_each([a, b, c, d]: [Self; 4], to: *mut f32) {
        // SAFETY: 4 elements.
        unsafe { vst1q_f32(to, vpaddq_f32(vpaddq_f32(a.0, b.0), vpaddq_f32(c.0, d.0))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: 4 halves.
        Neon(from_halves(unsafe { vld1_u16(from) }))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: 4 brain floats.
        Neon(unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from))) })
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: 4 bytes.
        Neon(from_bytes(unsafe { vreinterpret_s8_u8(load_four(from.cast())) }))
    }
    #[inline(always)]
    unsafe fn load_q4(block: *const u8, first: usize) -> Self {
        // SAFETY: the scale, and 4 bytes within the block's 16.
        unsafe {
            let bytes = load_four(block.add(2 + first % 16));
            let numbers = if first < 16 { vand_u8(bytes, vdup_n_u8(15)) } else { vshr_n_u8::<4>(bytes) };
            let numbers = vsub_s8(vreinterpret_s8_u8(numbers), vdup_n_s8(8));
            Neon(from_bytes(numbers)).mul(Self::splat_f16(block.cast()))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        // SAFETY: one half.
        Neon(from_halves(unsafe { vdup_n_u16(from.read_unaligned()) }))
    }
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, first: usize) -> Self {
        // SAFETY: 4 bytes within the block's 16.
        unsafe {
            let bytes = load_four(block.add(first % 16));
            let codes = if first < 16 { vand_u8(bytes, vdup_n_u8(15)) } else { vshr_n_u8::<4>(bytes) };
            Neon(from_bytes(vreinterpret_s8_u8(codes)))
        }
    }
    #[inline(always)]
    unsafe fn load_twos(block: *const u8, first: usize) -> Self {
        // SAFETY: 4 bytes within the block's 8.
        unsafe {
            let bytes = load_four(block.add(first % 8));
            let codes = vand_u8(vshl_u8(bytes, vdup_n_s8(-((first / 8 * 2) as i8))), vdup_n_u8(3));
            Neon(from_bytes(vreinterpret_s8_u8(codes)))
        }
    }
    #[inline(always)]
    unsafe fn load_fours(block: *const u8, first: usize) -> Self {
        // SAFETY: a byte within the block's 4.
        unsafe {
            let bits = vdupq_n_u32(u32::from(block.add(first / 8).read() >> (first % 8)));
            let is_set = vtstq_u32(bits, vld1q_u32([1, 2, 4, 8].as_ptr()));
            Neon(vreinterpretq_f32_u32(vandq_u32(is_set, vreinterpretq_u32_f32(vdupq_n_f32(4.0)))))
        }
    }
}
