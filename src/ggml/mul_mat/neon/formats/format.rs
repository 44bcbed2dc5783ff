//! What a type of weights is to kernels, and what some types have in common.

use std::arch::{aarch64::*, asm};

use super::super::super::input::{BLOCK, Scheme};

/// What kernels must know of a type whose weights they have unpacked.
pub trait Layout {
    /// Elements of a step: 64, where blocks are 32 elements, or 256.
    const STEP: usize;
    /// Elements that share a scale: 32, or 16.
    const GROUP: usize = 32;
    /// Whether groups have a minimum beside the scale.
    const HAS_MIN: bool = false;
    /// Groups of a step.
    const GROUPS: usize = Self::STEP / Self::GROUP;
    /// How the input is quantised.
    const SCHEME: Scheme = Scheme::quantized(BLOCK / Self::GROUP, 0);
}

/// A type of weights that are stored row by row.
pub trait Format: Layout {
    /// Bytes of a step.
    const BYTES: usize;

    /// The 32 numbers of part `part` of a step, in their order.
    ///
    /// # Safety
    /// The step exists and has the part.
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2];

    /// The scales and minima of a step's groups.
    ///
    /// # Safety
    /// The step exists.
    unsafe fn scales(step: *const u8) -> Scales;
}

/// Scales of a step's groups in their order, zeros behind them; minima likewise.
#[derive(Clone, Copy)]
pub struct Scales {
    pub scales: [float32x4_t; 4],
    pub minima: [float32x4_t; 4],
}

impl Scales {
    /// Of a type without minima.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn new(scales: [float32x4_t; 4]) -> Scales {
        Scales { scales, minima: [vdupq_n_f32(0.0); 4] }
    }
}

/// Four halves as f32. Standard Rust has no intrinsic for it yet.
#[inline(always)]
pub(super) fn floats_of_halves(halves: uint16x4_t) -> float32x4_t {
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

/// A half as f32.
///
/// # Safety
/// Good for two bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn float_of_half(from: *const u8) -> f32 {
    // SAFETY: as the caller says.
    let half = unsafe { from.cast::<u16>().read_unaligned() };
    vgetq_lane_f32::<0>(floats_of_halves(vcreate_u16(u64::from(half))))
}

/// 16 bytes.
///
/// # Safety
/// Good for them.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn bytes(from: *const u8) -> uint8x16_t {
    // SAFETY: as the caller says.
    unsafe { vld1q_u8(from) }
}

/// 16 bytes → 32 numbers of half a byte: the lower halves, then the upper ones.
///
/// # Safety
/// Good for 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn half_bytes(from: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: as the caller says.
    let both = unsafe { bytes(from) };
    [vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8::<4>(both)]
}

/// Numbers without a sign less what they are larger by than what they stand for.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn less(numbers: [uint8x16_t; 2], offset: i8) -> [int8x16_t; 2] {
    let less = |numbers| vsubq_s8(vreinterpretq_s8_u8(numbers), vdupq_n_s8(offset));
    [less(numbers[0]), less(numbers[1])]
}

/// `both[0] | both[1]`, for each of two.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn or(both: [[uint8x16_t; 2]; 2]) -> [uint8x16_t; 2] {
    [vorrq_u8(both[0][0], both[1][0]), vorrq_u8(both[0][1], both[1][1])]
}

/// Eight bytes as f32.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn floats_of_bytes(bytes: uint8x8_t) -> [float32x4_t; 2] {
    let wide = vmovl_u8(bytes);
    [vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))]
}

/// Eight bytes with a sign as f32.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn floats_of_signed_bytes(bytes: int8x8_t) -> [float32x4_t; 2] {
    let wide = vmovl_s8(bytes);
    [vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))]
}
