//! q4_K: 256 elements in groups of 32, whose scales and minima have six bits and are multiples of the block's.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q4_K;

/// Eight scales and eight minima of six bits, in twelve bytes.
///
/// # Safety
/// Good for 12 bytes; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn six_bits(from: *const u8) -> (__m256, __m256) {
    // SAFETY: as the caller says.
    let [a, b, c] = unsafe { from.cast::<[u32; 3]>().read_unaligned() };
    // Four bytes each: the first four scales, the first four minima, and the last of both, whose upper bits are with
    // the first's.
    let low = |x: u32| u64::from(x & 0x3f3f_3f3f);
    let high = |four: u32, two: u32| u64::from(four & 0x0f0f_0f0f | two >> 2 & 0x3030_3030) << 32;
    let floats = |bytes: u64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)));
    (floats(low(a) | high(c, a)), floats(low(b) | high(c >> 4, b)))
}

/// The scales and minima that a block of q4_K or q5_K begins with: two in f16 and twelve bytes.
///
/// # Safety
/// Good for 16 bytes; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn six_bit_scales(block: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let (both, (scales, minima)) = unsafe { (block.cast::<i32>().read_unaligned(), six_bits(block.add(4))) };
    let factors = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
    let minus = _mm_xor_ps(_mm_movehdup_ps(factors), _mm_set1_ps(-0.0));
    Scales::of_eight(
        _mm256_mul_ps(scales, _mm256_broadcastss_ps(factors)),
        _mm256_mul_ps(minima, _mm256_broadcastss_ps(minus)),
    )
}

impl Layout for Q4_K {
    const STEP: usize = 256;
    const BITS: u32 = 4;
    const HAS_MIN: bool = true;
}

impl Format for Q4_K {
    const BYTES: usize = 144;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: after 16 bytes 32 bytes for each two parts, the second in the upper halves.
        let bytes = unsafe { _mm256_loadu_si256(step.add(16 + part / 2 * 32).cast()) };
        let shifted = if part.is_multiple_of(2) { bytes } else { _mm256_srli_epi16::<4>(bytes) };
        _mm256_and_si256(shifted, _mm256_set1_epi8(15))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        // SAFETY: as above.
        let both = unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(step.add(16 + pair * 32).cast())) };
        let shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
        _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { six_bit_scales(step) }
    }
}
