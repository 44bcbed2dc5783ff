//! Elements of four bits that stand for numbers of a table: iq4_nl and mxfp4, in blocks of 32 elements of which a step is two,
//! and iq4_xs, of 256 elements.

use std::arch::aarch64::*;

use super::{
    format::{Format, Layout, Scales, float_of_half, floats_of_signed_bytes, half_bytes},
    legacy::two_scales,
};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct IQ4_NL;
#[allow(non_camel_case_types, reason = "the type's name")]
pub struct IQ4_XS;
pub struct Mxfp4;

/// Finer near zero, where most weights are.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the floats of two bits of exponent and one of mantissa.
const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What 32 numbers, in 16 bytes, stand for.
///
/// # Safety
/// Good for 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn look_up(table: &[i8; 16], from: *const u8) -> [int8x16_t; 2] {
    // SAFETY: as the caller says; a table is 16 bytes.
    let ([low, high], table) = unsafe { (half_bytes(from), vld1q_s8(table.as_ptr())) };
    [vqtbl1q_s8(table, low), vqtbl1q_s8(table, high)]
}

impl Layout for IQ4_NL {
    const STEP: usize = 64;
}

impl Format for IQ4_NL {
    const BYTES: usize = 2 * 18;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its scale and 16 bytes.
        unsafe { look_up(&IQ4, step.add(18 * part + 2)) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(18)) }
    }
}

impl Layout for IQ4_XS {
    const STEP: usize = 256;
}

impl Format for IQ4_XS {
    const BYTES: usize = 136;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: after eight bytes of scales 16 bytes for each part.
        unsafe { look_up(&IQ4, step.add(8 + 16 * part)) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: a block begins with its scale in f16, the groups' upper two bits, and their lower four.
        let (block, high, low) = unsafe {
            let (high, low) = (step.add(2).cast::<u16>(), step.add(4).cast::<u32>());
            (float_of_half(step), high.read_unaligned(), low.read_unaligned())
        };
        let mut groups = [0_i8; 8];
        for (g, group) in groups.iter_mut().enumerate() {
            *group = ((low >> (4 * g) & 15) as u8 | (high >> (2 * g) << 4) as u8 & 0x30) as i8 - 32;
        }
        // SAFETY: eight bytes.
        let [a, b] = floats_of_signed_bytes(unsafe { vld1_s8(groups.as_ptr()) });
        let zero = vdupq_n_f32(0.0);
        Scales::new([vmulq_n_f32(a, block), vmulq_n_f32(b, block), zero, zero])
    }
}

impl Layout for Mxfp4 {
    const STEP: usize = 64;
}

/// Half of a power of two whose exponent has a bias of 127.
fn half_power(exponent: u8) -> f32 {
    // The smallest two are below what floats have an exponent for.
    let bits = if exponent > 1 { u32::from(exponent - 1) << 23 } else { 1 << 21 << exponent };
    f32::from_bits(bits)
}

impl Format for Mxfp4 {
    const BYTES: usize = 2 * 17;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block is its exponent and 16 bytes.
        unsafe { look_up(&MXFP4, step.add(17 * part + 1)) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        let powers = unsafe { [half_power(*step), half_power(*step.add(17)), 0.0, 0.0] };
        let zero = vdupq_n_f32(0.0);
        // SAFETY: four elements.
        Scales::new([unsafe { vld1q_f32(powers.as_ptr()) }, zero, zero, zero])
    }
}
