//! q4_K as ggml repacks it for x86-64: eight rows together, a block of 256 elements of each after the other.
//!
//! A block is eight scales, eight minima, both in f16; then for each of eight groups of 32 elements twelve bytes, in which
//! the rows' scales and minima lie as a block's groups' do in q4_K; then 16 times eight bytes of each row. Those of a pair
//! of groups are four times eight bytes: in their lower halves is the first group, in the upper ones the second.

use std::arch::x86_64::*;

use super::{format::Layout, q4_k::six_bits};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q4_Kx8;

impl Layout for Q4_Kx8 {
    const STEP: usize = 256;
    const BITS: u32 = 4;
    const HAS_MIN: bool = true;
}

/// Rows that lie together.
pub(in super::super) const ROWS: usize = 8;
/// Bytes of a block of eight rows.
pub(in super::super) const BYTES: usize = ROWS * 144;
/// Where the rows' numbers begin in it.
pub(in super::super) const NUMBERS: usize = 128;

/// How far ahead of what is multiplied memory is asked for.
pub(in super::super) const AHEAD: usize = 4096;

/// The rows' scales and minima of group `group` of a block.
///
/// # Safety
/// The block exists; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn scales_of_rows(block: *const u8, group: usize) -> (__m256, __m256) {
    // SAFETY: as above.
    let (scales, minima, six) = unsafe {
        let (scales, minima) = (_mm_loadu_si128(block.cast()), _mm_loadu_si128(block.add(16).cast()));
        (_mm256_cvtph_ps(scales), _mm256_cvtph_ps(minima), six_bits(block.add(32 + 12 * group)))
    };
    let minus = _mm256_xor_ps(minima, _mm256_set1_ps(-0.0));
    (_mm256_mul_ps(six.0, scales), _mm256_mul_ps(six.1, minus))
}
