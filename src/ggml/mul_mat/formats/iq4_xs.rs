//! iq4_xs: 256 elements in groups of 32, whose scales are multiples of the block's and whose numbers are iq4_nl's.

use std::arch::x86_64::*;

use super::{
    format::{Format, Layout, Scales, half_bytes, half_bytes_of_two, look_up, look_up_64},
    iq4_nl::TABLE,
};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct IQ4_XS;

impl Layout for IQ4_XS {
    const STEP: usize = 256;
    const BITS: u32 = 8;
    const OFFSET: i32 = 128;
}

impl Format for IQ4_XS {
    const BYTES: usize = 136;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: after eight bytes of scales 16 bytes for each part.
        look_up(&TABLE, unsafe { half_bytes(step.add(8 + 16 * part)) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        // SAFETY: as above.
        look_up_64(&TABLE, unsafe { half_bytes_of_two(step.add(8 + 32 * pair), step.add(24 + 32 * pair)) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: a block begins with its scale in f16, the groups' upper two bits, and their lower four.
        let (block, low) = unsafe { (step.cast::<u32>().read_unaligned(), step.add(4).cast::<u32>().read_unaligned()) };
        let by_four = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        let low = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(low as i32), by_four), _mm256_set1_epi32(15));
        let by_two = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
        let high = _mm256_srlv_epi32(_mm256_set1_epi32(block as i32), by_two);
        let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
        let groups = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
        let block = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(block as i32)));
        Scales::of_eight(_mm256_mul_ps(_mm256_cvtepi32_ps(groups), block), _mm256_setzero_ps())
    }
}
