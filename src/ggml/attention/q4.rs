//! Four-bit keys and values in integers, for AVX2: turned into f32 one by one, as the other kernels do, they would cost
//! more instructions than all products.
//!
//! Queries become 8-bit integers with a scale for each 32 of them, as llama.cpp has them for such keys too: each is off by
//! at most 1/254 of the largest of its 32, where a key of four bits is off by 1/16. The softmax's weights, many of which
//! may be small, become 16-bit integers, times the values' scales, relative to the largest of a block of rows. That a
//! stored number is 8 too large is taken back once for all rows or elements.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::kernels::{BLOCK, RowPtr};
use crate::ggml::mul_mat::quantize_block;

/// Elements that share a scale.
const QK: usize = 32;
/// A block's scale and its numbers.
const QK_BYTES: usize = 18;

/// Elements of a query as [`pack`] makes it.
pub(super) fn packed_len(size: usize) -> usize {
    size / QK * (size_of::<Block>() / size_of::<f32>())
}

/// The largest size of 16-bit numbers.
const LARGEST: f32 = 32767.0;

/// A block of a query.
#[derive(Clone, Copy)]
#[repr(C)]
struct Block {
    /// Its elements, four 8-bit numbers in one, as they meet a row's bytes.
    fours: [i32; QK / 4],
    /// −8 times the sum of the numbers.
    start: i32,
    /// What a number is to be multiplied with.
    scale: f32,
}

/// The scales of eight rows.
///
/// # Safety
/// The features are there, and the rows begin with a scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scales_of(rows: &[*const u8; 8]) -> __m256 {
    // SAFETY: as the caller says.
    let half = |row: usize| unsafe { i32::from(rows[row].cast::<u16>().read_unaligned()) };
    let mut halves = _mm_cvtsi32_si128(half(0));
    halves = _mm_insert_epi16::<1>(halves, half(1));
    halves = _mm_insert_epi16::<2>(halves, half(2));
    halves = _mm_insert_epi16::<3>(halves, half(3));
    halves = _mm_insert_epi16::<4>(halves, half(4));
    halves = _mm_insert_epi16::<5>(halves, half(5));
    halves = _mm_insert_epi16::<6>(halves, half(6));
    halves = _mm_insert_epi16::<7>(halves, half(7));
    _mm256_cvtph_ps(halves)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn larger_size(than: __m256, x: __m256) -> __m256 {
    _mm256_max_ps(than, _mm256_andnot_ps(_mm256_set1_ps(-0.0), x))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn max_of_lanes(x: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of_lanes(x: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
}

/// What f32 are multiplied with to become 16 bits, when the largest has this size.
fn factor_of(largest: f32) -> f32 {
    if largest > 0.0 { LARGEST / largest } else { 0.0 }
}

/// Pointers to eight rows from `first` on; behind the last row it is taken again.
#[inline(always)]
fn eight(rows: RowPtr, data: *const u8, first: usize) -> [*const u8; 8] {
    let first_row = data.wrapping_add(first * rows.bytes);
    let last = rows.n - 1 - first;
    let mut eight = [first_row; 8];
    if last >= 7 {
        for r in 1..8 {
            eight[r] = first_row.wrapping_add(r * rows.bytes);
        }
    } else {
        for r in 1..8 {
            eight[r] = first_row.wrapping_add(r.min(last) * rows.bytes);
        }
    }
    eight
}

/// Sixteen f32 as 16-bit numbers in their order, and eight sums of two of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn to_i16(low: __m256, high: __m256, factor: __m256) -> (__m256i, __m256i) {
    let low = _mm256_cvtps_epi32(_mm256_mul_ps(low, factor));
    let high = _mm256_cvtps_epi32(_mm256_mul_ps(high, factor));
    // Packing works on each half of a register by itself.
    (_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high)), _mm256_add_epi32(low, high))
}

/// Packs a query of `size` elements for [`scores_of`].
///
/// # Safety
/// The features are there; `to` has room for [`packed_len`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn pack(query: *const f32, size: usize, to: *mut f32) {
    for b in 0..size / QK {
        // SAFETY: the query has these elements, and there is room for the block, whose numbers are 32 bytes.
        unsafe {
            let quantized = quantize_block(query.add(b * QK));
            let block = to.cast::<Block>().add(b);
            _mm256_storeu_si256((&raw mut (*block).fours).cast(), quantized.numbers);
            (&raw mut (*block).start).write(-8 * quantized.sum);
            (&raw mut (*block).scale).write(quantized.scale);
        }
    }
}

/// `scores[g × BLOCK + r] = queries[g] · keys[r]`, as `kernels::scores_of`, with packed queries that lie behind each other.
/// Eight rows are taken at a time: lanes are rows.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn scores_of<const G: usize>(packed: *const f32, keys: RowPtr, size: usize, scores: *mut f32) {
    let n_blocks = size / QK;
    let query = |g: usize| packed.cast::<Block>().wrapping_add(g * n_blocks);
    let low = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    for first in (0..keys.n).step_by(8) {
        let mut rows = eight(keys, keys.data, first);
        for row in rows {
            keys.prefetch(row);
        }
        let mut sums = [_mm256_setzero_ps(); G];
        for b in 0..n_blocks {
            // SAFETY: the rows' pointers are at their block `b`.
            let scales = unsafe { scales_of(&rows) };
            let mut two = [_mm256_setzero_si256(); 4];
            for r in 0..4 {
                // SAFETY: a block is its scale and 16 bytes.
                let (one, other) =
                    unsafe { (_mm_loadu_si128(rows[r].add(2).cast()), _mm_loadu_si128(rows[r + 4].add(2).cast())) };
                two[r] = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(one), other);
            }
            for row in &mut rows {
                *row = row.wrapping_add(QK_BYTES);
            }
            // Eight rows of four groups of four bytes → four groups of eight rows.
            let even = [_mm256_unpacklo_epi32(two[0], two[1]), _mm256_unpacklo_epi32(two[2], two[3])];
            let odd = [_mm256_unpackhi_epi32(two[0], two[1]), _mm256_unpackhi_epi32(two[2], two[3])];
            let groups = [
                _mm256_unpacklo_epi64(even[0], even[1]),
                _mm256_unpackhi_epi64(even[0], even[1]),
                _mm256_unpacklo_epi64(odd[0], odd[1]),
                _mm256_unpackhi_epi64(odd[0], odd[1]),
            ];
            // Two products are 15 × 127 × 2 at most, so that the eight of a block fit into 16 bits.
            let mut dots = [_mm256_setzero_si256(); G];
            for j in 0..4 {
                // Lower halves of bytes are elements of the block's first half.
                let numbers =
                    [_mm256_and_si256(groups[j], low), _mm256_and_si256(_mm256_srli_epi16::<4>(groups[j]), low)];
                for g in 0..G {
                    for half in 0..2 {
                        // SAFETY: the query has this block.
                        let four = unsafe { (*query(g).add(b)).fours[4 * half + j] };
                        let products = _mm256_maddubs_epi16(numbers[half], _mm256_set1_epi32(four));
                        dots[g] = _mm256_add_epi16(dots[g], products);
                    }
                }
            }
            for g in 0..G {
                // SAFETY: as above.
                let (start, scale) = unsafe { ((*query(g).add(b)).start, (*query(g).add(b)).scale) };
                let dots = _mm256_add_epi32(_mm256_madd_epi16(dots[g], ones), _mm256_set1_epi32(start));
                let scales = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
                sums[g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scales, sums[g]);
            }
        }
        for g in 0..G {
            // SAFETY: there is room for G × BLOCK, a multiple of eight.
            unsafe { _mm256_storeu_ps(scores.add(g * BLOCK + first), sums[g]) }
        }
    }
}

/// `out[g] = factors[g] × out[g] + Σ weights[g × BLOCK + r] × values[r]`, as `kernels::add_values`. Two rows are taken at a
/// time: lanes are elements.
///
/// # Safety
/// As there; weights behind the last row, up to a multiple of eight, are zero.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn add_values<const G: usize>(
    weights: *const f32,
    values: RowPtr,
    size: usize,
    factors: &[f32; G],
    out: *mut f32,
    out_stride: usize,
) {
    #[derive(Clone, Copy)]
    #[repr(C, align(32))]
    struct Weights([i16; BLOCK]);

    let eights = values.n.div_ceil(8);
    let mut largest_weights = [0.0; G];
    for g in 0..G {
        let mut largest = _mm256_setzero_ps();
        for i in 0..eights {
            // SAFETY: there are G × BLOCK weights; those that count are behind each other.
            largest = _mm256_max_ps(largest, unsafe { _mm256_loadu_ps(weights.add(g * BLOCK + 8 * i)) });
        }
        largest_weights[g] = max_of_lanes(largest);
    }
    let mut scaled = [Weights([0; BLOCK]); G];
    for b in 0..size / QK {
        let data = values.data.wrapping_add(b * QK_BYTES);
        let mut scales = [_mm256_setzero_ps(); BLOCK / 8];
        for i in 0..eights {
            // SAFETY: the rows exist.
            scales[i] = unsafe { scales_of(&eight(values, data, 8 * i)) };
        }
        let mut largest = _mm256_setzero_ps();
        for i in 0..eights {
            largest = larger_size(largest, scales[i]);
        }
        let largest = max_of_lanes(largest);
        let (mut back, mut start) = ([0.0; G], [0; G]);
        for g in 0..G {
            // No weight times a scale is larger than the largest of each.
            let largest = largest * largest_weights[g];
            let factor = _mm256_set1_ps(factor_of(largest));
            let mut sums = _mm256_setzero_si256();
            for i in (0..eights).step_by(2) {
                let mut products = [_mm256_setzero_ps(); 2];
                for j in i..eights.min(i + 2) {
                    // SAFETY: there are G × BLOCK weights.
                    let weight = unsafe { _mm256_loadu_ps(weights.add(g * BLOCK + 8 * j)) };
                    products[j - i] = _mm256_mul_ps(scales[j], weight);
                }
                let (numbers, sum) = to_i16(products[0], products[1], factor);
                sums = _mm256_add_epi32(sums, sum);
                // SAFETY: 16 of BLOCK numbers.
                unsafe { _mm256_store_si256(scaled[g].0.as_mut_ptr().add(8 * i).cast(), numbers) };
            }
            back[g] = largest / LARGEST;
            start[g] = -8 * sum_of_lanes(sums);
        }
        // Half of the block's bytes at a time, so that all sums are in registers.
        for half in 0..2 {
            let mut sums = [[_mm256_setzero_si256(); 2]; G];
            let mut row = data.wrapping_add(2 + 8 * half);
            for r in (0..values.n).step_by(2) {
                // The weight behind the last row is zero.
                let next = if r + 1 < values.n { values.bytes } else { 0 };
                if b == 0 && half == 0 {
                    values.prefetch(row);
                    values.prefetch(row.wrapping_add(values.bytes));
                }
                // SAFETY: both rows exist, and eight bytes of their block; two of BLOCK numbers from an even one on.
                let (bytes, pairs) = unsafe {
                    let bytes = [_mm_loadl_epi64(row.cast()), _mm_loadl_epi64(row.wrapping_add(next).cast())];
                    let mut pairs = [0; G];
                    for g in 0..G {
                        pairs[g] = scaled[g].0.as_ptr().add(r).cast::<i32>().read();
                    }
                    (bytes, pairs)
                };
                row = row.wrapping_add(2 * values.bytes);
                // Whole bytes are lower half + 16 × upper half.
                let bytes = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(bytes[0], bytes[1]));
                let numbers = [bytes, _mm256_srli_epi16::<4>(bytes)];
                for g in 0..G {
                    let weight = _mm256_set1_epi32(pairs[g]);
                    for c in 0..2 {
                        sums[g][c] = _mm256_add_epi32(sums[g][c], _mm256_madd_epi16(numbers[c], weight));
                    }
                }
            }
            for g in 0..G {
                let (back, factor) = (_mm256_set1_ps(back[g]), _mm256_set1_ps(factors[g]));
                let start = _mm256_set1_epi32(start[g]);
                let lower = _mm256_sub_epi32(sums[g][0], _mm256_slli_epi32::<4>(sums[g][1]));
                let sums = [_mm256_add_epi32(lower, start), _mm256_add_epi32(sums[g][1], start)];
                for c in 0..2 {
                    // SAFETY: out has G × `size` elements.
                    unsafe {
                        let out = out.add(g * out_stride + b * QK + 8 * half + 16 * c);
                        let before = _mm256_mul_ps(_mm256_loadu_ps(out), factor);
                        _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[c]), back, before));
                    }
                }
            }
        }
    }
}
