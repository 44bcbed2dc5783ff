//! q2_K: 256 elements in groups of 16, whose scales and minima have four bits and are multiples of the block's.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q2_K;

impl Layout for Q2_K {
    const STEP: usize = 256;
    const GROUP: usize = 16;
    const BITS: u32 = 2;
    const HAS_MIN: bool = true;
}

/// The two bits of part `part` in each byte, of 32 for each half of a block.
///
/// # Safety
/// Good for 64 bytes; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn two_bits(from: *const u8, part: usize) -> __m256i {
    // SAFETY: as the caller says.
    let bytes = unsafe { _mm256_loadu_si256(from.add(part / 4 * 32).cast()) };
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(2 * (part % 4) as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(3))
}

/// As [`two_bits`], for the parts `2 × pair` and the next.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
pub(super) unsafe fn two_bits_of_pair(from: *const u8, pair: usize) -> __m512i {
    // SAFETY: as the caller says.
    let bytes = unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(from.add(pair / 2 * 32).cast())) };
    let a = 4 * (pair % 2) as i64;
    let shifts = _mm512_set_epi64(a + 2, a + 2, a + 2, a + 2, a, a, a, a);
    _mm512_and_si512(_mm512_srlv_epi64(bytes, shifts), _mm512_set1_epi8(3))
}

impl Format for Q2_K {
    const BYTES: usize = 84;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: numbers are behind the groups' 16 bytes.
        unsafe { two_bits(step.add(16), part) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { two_bits_of_pair(step.add(16), pair) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: a block begins with a byte for each group, the minimum in its upper half; the last four are the block's
        // scale and minimum in f16.
        let (groups, block) = unsafe { (_mm_loadu_si128(step.cast()), _mm_cvtph_ps(_mm_loadu_si32(step.add(80)))) };
        let fifteen = _mm_set1_epi8(15);
        let floats = |bytes: __m128i, factor: __m256| {
            let [low, high] = [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))];
            [_mm256_mul_ps(_mm256_cvtepi32_ps(low), factor), _mm256_mul_ps(_mm256_cvtepi32_ps(high), factor)]
        };
        let minus = _mm_xor_ps(_mm_movehdup_ps(block), _mm_set1_ps(-0.0));
        let minima = _mm_and_si128(_mm_srli_epi16::<4>(groups), fifteen);
        Scales {
            scales: floats(_mm_and_si128(groups, fifteen), _mm256_broadcastss_ps(block)),
            minima: floats(minima, _mm256_broadcastss_ps(minus)),
        }
    }
}
