//! mxfp4: blocks of 32 elements of four bits, floats with two bits of exponent and one of mantissa, with a power of two as
//! their scale. A step is two blocks.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales, half_bytes, half_bytes_of_two, look_up, look_up_64};

pub struct Mxfp4;

/// Twice what numbers stand for, plus 12.
const TABLE: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

impl Layout for Mxfp4 {
    const STEP: usize = 64;
    const BITS: u32 = 5;
    const OFFSET: i32 = 12;
}

/// Halves of powers of two, of which the exponents have a bias of 127.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half_powers(exponents: __m256i) -> __m256 {
    let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(exponents, _mm256_set1_epi32(1)));
    // The smallest two are below what floats have an exponent for.
    let subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(1 << 21), exponents);
    let is_normal = _mm256_cmpgt_epi32(exponents, _mm256_set1_epi32(1));
    _mm256_castsi256_ps(_mm256_blendv_epi8(subnormal, normal, is_normal))
}

impl Format for Mxfp4 {
    const BYTES: usize = 2 * 17;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its exponent and 16 bytes.
        look_up(&TABLE, unsafe { half_bytes(step.add(17 * part + 1)) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        look_up_64(&TABLE, unsafe { half_bytes_of_two(step.add(1), step.add(18)) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        let exponents = unsafe { _mm256_setr_epi32(i32::from(*step), i32::from(*step.add(17)), 0, 0, 0, 0, 0, 0) };
        let both = _mm256_blend_ps::<0b11>(_mm256_setzero_ps(), half_powers(exponents));
        Scales::of_eight(both, _mm256_setzero_ps())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales_of_four_rows(steps: [*const u8; 4]) -> [__m256; 2] {
        // SAFETY: as above.
        let both = |step: *const u8| unsafe { u64::from(*step) | u64::from(*step.add(17)) << 8 };
        let all = both(steps[0]) | both(steps[1]) << 16 | both(steps[2]) << 32 | both(steps[3]) << 48;
        [half_powers(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(all as i64))), _mm256_setzero_ps()]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn scales_of_four_rows_512(steps: [*const u8; 4]) -> __m512 {
        // SAFETY: as above.
        _mm512_zextps256_ps512(unsafe { Self::scales_of_four_rows(steps) }[0])
    }
}
