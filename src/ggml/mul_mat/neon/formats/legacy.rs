//! Blocks of 32 elements with a scale in f16, and for some a minimum: q4_0, q4_1, q5_0, q5_1, q8_0. A step is two blocks.

use std::arch::aarch64::*;

use super::format::{Format, Layout, Scales, bytes, floats_of_halves, half_bytes, less, or};

pub struct Q4_0;
pub struct Q4_1;
pub struct Q5_0;
pub struct Q5_1;
pub struct Q8_0;

/// The scales of two blocks, each of which begins with its own.
///
/// # Safety
/// Both are good for two bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn two_scales(first: *const u8, second: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let (first, second) = unsafe { (first.cast::<u16>().read_unaligned(), second.cast::<u16>().read_unaligned()) };
    let mut scales = [vdupq_n_f32(0.0); 4];
    scales[0] = floats_of_halves(vcreate_u16(u64::from(first) | u64::from(second) << 16));
    Scales::new(scales)
}

/// The scales and minima of two blocks, which begin with them.
///
/// # Safety
/// Both are good for four bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn two_scales_and_minima(first: *const u8, second: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let (first, second) = unsafe { (first.cast::<u32>().read_unaligned(), second.cast::<u32>().read_unaligned()) };
    let all = floats_of_halves(vcreate_u16(u64::from(first) | u64::from(second) << 32));
    let zero = vdupq_n_f32(0.0);
    let mut both = Scales { scales: [zero; 4], minima: [zero; 4] };
    both.scales[0] = vuzp1q_f32(all, zero);
    both.minima[0] = vuzp2q_f32(all, zero);
    both
}

/// 16 in those bytes whose bit is set in the word at `from`.
///
/// # Safety
/// Good for four bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn fifth_bits(from: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: as the caller says.
    let bits = vreinterpretq_u8_u32(vdupq_n_u32(unsafe { from.cast::<u32>().read_unaligned() }));
    let bit_of_byte = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    let of = |first: u8| {
        let spread = vqtbl1q_u8(bits, vcombine_u8(vdup_n_u8(first), vdup_n_u8(first + 1)));
        vandq_u8(vtstq_u8(spread, bit_of_byte), vdupq_n_u8(16))
    };
    [of(0), of(2)]
}

impl Layout for Q4_0 {
    const STEP: usize = 64;
}

impl Format for Q4_0 {
    const BYTES: usize = 2 * 18;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its scale and 16 bytes.
        less(unsafe { half_bytes(step.add(18 * part + 2)) }, 8)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(18)) }
    }
}

impl Layout for Q4_1 {
    const STEP: usize = 64;
    const HAS_MIN: bool = true;
}

impl Format for Q4_1 {
    const BYTES: usize = 2 * 20;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its scale, its minimum and 16 bytes.
        less(unsafe { half_bytes(step.add(20 * part + 4)) }, 0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales_and_minima(step, step.add(20)) }
    }
}

impl Layout for Q5_0 {
    const STEP: usize = 64;
}

impl Format for Q5_0 {
    const BYTES: usize = 2 * 22;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its scale, a word of fifth bits, and 16 bytes.
        let both = unsafe { [half_bytes(step.add(22 * part + 6)), fifth_bits(step.add(22 * part + 2))] };
        less(or(both), 16)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(22)) }
    }
}

impl Layout for Q5_1 {
    const STEP: usize = 64;
    const HAS_MIN: bool = true;
}

impl Format for Q5_1 {
    const BYTES: usize = 2 * 24;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its scale, its minimum, a word of fifth bits, and 16 bytes.
        let both = unsafe { [half_bytes(step.add(24 * part + 8)), fifth_bits(step.add(24 * part + 4))] };
        less(or(both), 0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales_and_minima(step, step.add(24)) }
    }
}

impl Layout for Q8_0 {
    const STEP: usize = 64;
}

impl Format for Q8_0 {
    const BYTES: usize = 2 * 34;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its scale and 32 bytes.
        less(unsafe { [bytes(step.add(34 * part + 2)), bytes(step.add(34 * part + 18))] }, 0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(34)) }
    }
}
