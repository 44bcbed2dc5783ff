//! Blocks of 32 elements with a scale in f16, and for some a minimum: q4_0, q4_1, q5_0, q5_1, q8_0. A step is two blocks.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales, half_bytes, two_halves, two_words};

pub struct Q4_0;
pub struct Q4_1;
pub struct Q5_0;
pub struct Q5_1;
pub struct Q8_0;

/// The scales of two blocks, each of which begins with its own.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn two_scales(first: *const u8, second: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let halves = _mm_cvtsi32_si128(unsafe { two_halves(first, second) } as i32);
    Scales { scales: [_mm256_zextps128_ps256(_mm_cvtph_ps(halves)), _mm256_setzero_ps()], minima: _mm256_setzero_ps() }
}

/// The scales and minima of two blocks, which begin with them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn two_scales_and_minima(first: *const u8, second: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let all = _mm_cvtph_ps(_mm_cvtsi64_si128(unsafe { two_words(first, second) } as i64));
    let zero = _mm_setzero_ps();
    let scales = _mm_shuffle_ps::<0b00_00_10_00>(all, zero);
    let minima = _mm_shuffle_ps::<0b00_00_11_01>(all, zero);
    Scales { scales: [_mm256_zextps128_ps256(scales), _mm256_setzero_ps()], minima: _mm256_zextps128_ps256(minima) }
}

/// As [`half_bytes`] for two blocks: their numbers one after the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
unsafe fn half_bytes_of_two(first: *const u8, second: *const u8) -> __m512i {
    // SAFETY: both are good for 16 bytes.
    let (first, second) = unsafe { (_mm_loadu_si128(first.cast()), _mm_loadu_si128(second.cast())) };
    let both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(first), 0xff00, second);
    let shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15))
}

/// 16 in those bytes whose bit is set.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth_bits(bits: u32) -> __m256i {
    let bytes = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit_of_byte = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), bytes), bit_of_byte);
    _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit_of_byte), _mm256_set1_epi8(16))
}

/// Adds 16 to those bytes of two blocks whose bit is set in the words at `first` and `second`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
unsafe fn add_fifth_bits(numbers: __m512i, first: *const u8, second: *const u8) -> __m512i {
    // SAFETY: as the caller says.
    let set = unsafe { two_words(first, second) };
    _mm512_or_si512(numbers, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(16)))
}

impl Layout for Q4_0 {
    const STEP: usize = 64;
    const BITS: u32 = 4;
    const OFFSET: i32 = 8;
}

impl Format for Q4_0 {
    const BYTES: usize = 2 * 18;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its scale and 16 bytes.
        unsafe { half_bytes(step.add(18 * part + 2)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { half_bytes_of_two(step.add(2), step.add(20)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(18)) }
    }
}

impl Layout for Q4_1 {
    const STEP: usize = 64;
    const BITS: u32 = 4;
    const HAS_MIN: bool = true;
}

impl Format for Q4_1 {
    const BYTES: usize = 2 * 20;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its scale, its minimum and 16 bytes.
        unsafe { half_bytes(step.add(20 * part + 4)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { half_bytes_of_two(step.add(4), step.add(24)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales_and_minima(step, step.add(20)) }
    }
}

impl Layout for Q5_0 {
    const STEP: usize = 64;
    const BITS: u32 = 5;
    const OFFSET: i32 = 16;
}

impl Format for Q5_0 {
    const BYTES: usize = 2 * 22;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its scale, a word of fifth bits, and 16 bytes.
        unsafe {
            let block = step.add(22 * part);
            _mm256_or_si256(half_bytes(block.add(6)), fifth_bits(block.add(2).cast::<u32>().read_unaligned()))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { add_fifth_bits(half_bytes_of_two(step.add(6), step.add(28)), step.add(2), step.add(24)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(22)) }
    }
}

impl Layout for Q5_1 {
    const STEP: usize = 64;
    const BITS: u32 = 5;
    const HAS_MIN: bool = true;
}

impl Format for Q5_1 {
    const BYTES: usize = 2 * 24;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its scale, its minimum, a word of fifth bits, and 16 bytes.
        unsafe {
            let block = step.add(24 * part);
            _mm256_or_si256(half_bytes(block.add(8)), fifth_bits(block.add(4).cast::<u32>().read_unaligned()))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { add_fifth_bits(half_bytes_of_two(step.add(8), step.add(32)), step.add(4), step.add(28)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales_and_minima(step, step.add(24)) }
    }
}

/// Stored with a sign; the offset takes it away.
impl Layout for Q8_0 {
    const STEP: usize = 64;
    const BITS: u32 = 8;
    const OFFSET: i32 = 128;
}

impl Format for Q8_0 {
    const BYTES: usize = 2 * 34;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: a block is its scale and 32 bytes.
        let numbers = unsafe { _mm256_loadu_si256(step.add(34 * part + 2).cast()) };
        _mm256_xor_si256(numbers, _mm256_set1_epi8(i8::MIN))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        let (first, second) =
            unsafe { (_mm256_loadu_si256(step.add(2).cast()), _mm256_loadu_si256(step.add(36).cast())) };
        let both = _mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(first), 0xf0, second);
        _mm512_xor_si512(both, _mm512_set1_epi8(i8::MIN))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { two_scales(step, step.add(34)) }
    }
}
