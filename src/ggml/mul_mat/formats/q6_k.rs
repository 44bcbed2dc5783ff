//! q6_K: 256 elements in groups of 16, whose scales are multiples of the block's.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q6_K;

impl Layout for Q6_K {
    const STEP: usize = 256;
    const GROUP: usize = 16;
    const BITS: u32 = 6;
    const OFFSET: i32 = 32;
}

impl Format for Q6_K {
    const BYTES: usize = 210;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        let (half, quarter) = (part / 4, part % 4);
        // SAFETY: each half of a block has 64 bytes of lower bits, in whose upper halves are the last two quarters, and
        // 32 bytes of upper bits, two for each quarter; those are behind all lower ones.
        let (low, high) = unsafe {
            let (low, high) = (step.add(half * 64 + quarter % 2 * 32), step.add(128 + half * 32));
            (_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(high.cast()))
        };
        let low = if quarter < 2 { low } else { _mm256_srli_epi16::<4>(low) };
        let high = match quarter {
            0 => _mm256_slli_epi16::<4>(high),
            1 => _mm256_slli_epi16::<2>(high),
            2 => high,
            _ => _mm256_srli_epi16::<2>(high),
        };
        let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
        _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(48)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        let (half, upper) = (pair / 2, pair % 2 == 1);
        // SAFETY: as above.
        let (low, high) = unsafe {
            let high = _mm256_loadu_si256(step.add(128 + half * 32).cast());
            (_mm512_loadu_si512(step.add(half * 64).cast()), _mm512_broadcast_i64x4(high))
        };
        let low = if upper { _mm512_srli_epi16::<4>(low) } else { low };
        let high = if upper {
            _mm512_srlv_epi64(high, _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0))
        } else {
            _mm512_sllv_epi64(high, _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4))
        };
        let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
        _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(48)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: the last 18 bytes are the groups' scales and the block's in f16.
        let (groups, block) = unsafe {
            (step.add(192).cast::<[i64; 2]>().read_unaligned(), step.add(208).cast::<u16>().read_unaligned())
        };
        let block = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(block))));
        let scales = |groups| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(groups))), block);
        Scales { scales: [scales(groups[0]), scales(groups[1])], minima: [_mm256_setzero_ps(); 2] }
    }
}
