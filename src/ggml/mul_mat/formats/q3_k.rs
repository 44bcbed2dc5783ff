//! q3_K: 256 elements in groups of 16, whose scales have six bits and are multiples of the block's.

use std::arch::x86_64::*;

use super::{
    format::{Format, Layout, Scales},
    q2_k::{two_bits, two_bits_of_pair},
};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q3_K;

impl Layout for Q3_K {
    const STEP: usize = 256;
    const GROUP: usize = 16;
    const BITS: u32 = 3;
    const OFFSET: i32 = 4;
}

impl Format for Q3_K {
    const BYTES: usize = 110;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block begins with 32 bytes of third bits, of which each part has one in each byte; then come the lower
        // two.
        let (third, low) = unsafe { (_mm256_loadu_si256(step.cast()), two_bits(step.add(32), part)) };
        let bit = _mm256_set1_epi8((1u8 << part) as i8);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(third, bit), bit);
        _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        // SAFETY: as above.
        let (third, low) = unsafe { (_mm256_loadu_si256(step.cast()), two_bits_of_pair(step.add(32), pair)) };
        let bit = _mm512_set1_epi8((1u8 << (2 * pair)) as i8);
        let bits = _mm512_mask_add_epi8(bit, 0xffff_ffff_0000_0000, bit, bit);
        let set = _mm512_test_epi8_mask(_mm512_broadcast_i64x4(third), bits);
        _mm512_or_si512(low, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(4)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: the last 14 bytes are the groups' scales, plus 32, and the block's in f16.
        let (low, high, block) = unsafe {
            let (low, high) = (step.add(96).cast::<u64>(), step.add(104).cast::<u32>());
            (low.read_unaligned(), high.read_unaligned(), step.add(108).cast::<u16>().read_unaligned())
        };
        // A byte has the lower four bits of a group and, in its upper half, those of the eighth group from it; the upper
        // two bits of the first four groups, the next, … are in each of four bytes.
        let [a, b, c, d] = [0, 2, 4, 6].map(|shift| u64::from(high >> shift & 0x0303_0303) << 4);
        let first = low & 0x0f0f_0f0f_0f0f_0f0f | a | b << 32;
        let last = low >> 4 & 0x0f0f_0f0f_0f0f_0f0f | c | d << 32;
        let block = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(block))));
        let floats = |groups: u64| {
            let groups = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(groups as i64));
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(groups, _mm256_set1_epi32(32))), block)
        };
        Scales { scales: [floats(first), floats(last)], minima: [_mm256_setzero_ps(); 2] }
    }
}
