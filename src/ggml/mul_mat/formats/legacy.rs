//! Blocks of 32 elements with a scale in f16, and for some a minimum: q4_0, q4_1, q5_0, q5_1, q8_0. A step is two blocks.
//!
//! A block is its scale, its minimum, a word of fifth bits, and numbers, of which four bits each lie in 16 bytes.

use std::arch::x86_64::*;

use super::format::{Format, Layout, Scales, half_bytes, half_bytes_of_two, two_scales, two_words};

/// Numbers of so many bits, with a minimum or centred around zero.
pub struct Legacy<const BITS: u32, const HAS_MIN: bool>;

pub type Q4_0 = Legacy<4, false>;
pub type Q4_1 = Legacy<4, true>;
pub type Q5_0 = Legacy<5, false>;
pub type Q5_1 = Legacy<5, true>;
/// Stored with a sign; the offset takes it away.
pub type Q8_0 = Legacy<8, false>;

impl<const BITS: u32, const HAS_MIN: bool> Layout for Legacy<BITS, HAS_MIN> {
    const STEP: usize = 64;
    const BITS: u32 = BITS;
    const OFFSET: i32 = if HAS_MIN { 0 } else { 1 << (BITS - 1) };
    const HAS_MIN: bool = HAS_MIN;
}

impl<const BITS: u32, const HAS_MIN: bool> Legacy<BITS, HAS_MIN> {
    /// Where fifth bits are in a block, where there are any.
    const FIFTH: usize = if HAS_MIN { 4 } else { 2 };
    /// Where numbers are in a block.
    const NUMBERS: usize = Self::FIFTH + if BITS == 5 { 4 } else { 0 };
    const BLOCK_BYTES: usize = Self::NUMBERS + if BITS == 8 { 32 } else { 16 };
}

impl<const BITS: u32, const HAS_MIN: bool> Format for Legacy<BITS, HAS_MIN> {
    const BYTES: usize = 2 * Self::BLOCK_BYTES;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i {
        // SAFETY: see the top for what a block is.
        unsafe {
            let block = step.add(Self::BLOCK_BYTES * part);
            let numbers = block.add(Self::NUMBERS);
            match BITS {
                8 => _mm256_xor_si256(_mm256_loadu_si256(numbers.cast()), _mm256_set1_epi8(i8::MIN)),
                5 => {
                    let set = fifth_bits(block.add(Self::FIFTH).cast::<u32>().read_unaligned());
                    _mm256_or_si256(half_bytes(numbers), set)
                }
                _ => half_bytes(numbers),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, _: usize) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let second = step.add(Self::BLOCK_BYTES);
            let (numbers, of_second) = (step.add(Self::NUMBERS), second.add(Self::NUMBERS));
            match BITS {
                8 => {
                    let (first, second) = (_mm256_loadu_si256(numbers.cast()), _mm256_loadu_si256(of_second.cast()));
                    let both = _mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(first), 0xf0, second);
                    _mm512_xor_si512(both, _mm512_set1_epi8(i8::MIN))
                }
                5 => {
                    let set = two_words(step.add(Self::FIFTH), second.add(Self::FIFTH));
                    let sixteen = _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(16));
                    _mm512_or_si512(half_bytes_of_two(numbers, of_second), sixteen)
                }
                _ => half_bytes_of_two(numbers, of_second),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe {
            let second = step.add(Self::BLOCK_BYTES);
            if HAS_MIN { two_scales_and_minima(step, second) } else { two_scales(step, second) }
        }
    }
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
    Scales::of_eight(_mm256_zextps128_ps256(scales), _mm256_zextps128_ps256(minima))
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
