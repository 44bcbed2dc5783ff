//! iq4_nl: blocks of 32 elements with a scale in f16, whose numbers stand for those of a table. A step is two blocks.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales, half_bytes, half_bytes_of_two, look_up, look_up_64, two_scales};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct IQ4_NL;

/// What numbers stand for, plus 128: finer near zero, where most weights are.
pub(super) const TABLE: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

impl Layout for IQ4_NL {
    const STEP: usize = 64;
    const BITS: u32 = 8;
    const OFFSET: i32 = 128;
}

impl Format for IQ4_NL {
    const BYTES: usize = 2 * 18;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its scale and 16 bytes.
        look_up(&TABLE, unsafe { half_bytes(step.add(18 * part + 2)) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        look_up_64(&TABLE, unsafe { half_bytes_of_two(step.add(2), step.add(20)) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(18)) }
    }
}
