//! q5_K: as q4_K, with the fifth bits apart.

use std::arch::x86_64::*;

use super::{
    format::{Format, Layout, Scales},
    q4_k::six_bit_scales,
};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q5_K;

impl Layout for Q5_K {
    const STEP: usize = 256;
    const BITS: u32 = 5;
    const HAS_MIN: bool = true;
}

impl Format for Q5_K {
    const BYTES: usize = 176;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: after 16 bytes 32 bytes of fifth bits, of which each part has one in each byte, then 32 bytes for each
        // two parts, the second in the upper halves.
        let (fifth, bytes) = unsafe {
            let bytes = step.add(48 + part / 2 * 32);
            (_mm256_loadu_si256(step.add(16).cast()), _mm256_loadu_si256(bytes.cast()))
        };
        let shifted = if part.is_multiple_of(2) { bytes } else { _mm256_srli_epi16::<4>(bytes) };
        let bit = _mm256_set1_epi8((1u8 << part) as i8);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(fifth, bit), bit);
        let sixteen = _mm256_and_si256(set, _mm256_set1_epi8(16));
        _mm256_or_si256(_mm256_and_si256(shifted, _mm256_set1_epi8(15)), sixteen)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        // SAFETY: as above.
        let (fifth, both) = unsafe {
            let both = step.add(48 + pair * 32);
            (_mm256_loadu_si256(step.add(16).cast()), _mm256_loadu_si256(both.cast()))
        };
        let (fifth, both) = (_mm512_broadcast_i64x4(fifth), _mm512_broadcast_i64x4(both));
        let shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
        let numbers = _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15));
        let low = _mm512_set1_epi8((1u8 << (2 * pair)) as i8);
        let bits = _mm512_mask_add_epi8(low, 0xffff_ffff_0000_0000, low, low);
        let set = _mm512_test_epi8_mask(fifth, bits);
        _mm512_or_si512(numbers, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(16)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { six_bit_scales(step) }
    }
}
