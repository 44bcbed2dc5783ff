//! Four-bit keys and values in integers, for AVX2: turned into f32 one by one, as the other kernels do, they would cost
//! more instructions than all products.
//!
//! Queries, and the softmax's weights times the values' scales, become 16-bit integers relative to the largest of them
//! (so that they are off by at most 1/65534 of it), numbers of four bits too, and products of two pairs are summed as 32
//! bits. That a stored number is 8 too large is taken back once for all rows or elements.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::kernels::{BLOCK, RowPtr};

/// Elements that share a scale.
const QK: usize = 32;
/// A block's scale and its numbers.
const QK_BYTES: usize = 18;

/// Elements of a query as [`pack`] makes it: its blocks, then what sums are to be multiplied with.
pub(super) fn packed_len(size: usize) -> usize {
    (size / QK + 1) * (size_of::<Block>() / size_of::<f32>())
}

/// The largest size of 16-bit numbers.
const LARGEST: f32 = 32767.0;

/// A block of a query.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Block {
    /// Elements 0 2, 1 3, 4 6, 5 7 and so on, two in one number: as they lie beside each other in a row's bytes.
    pairs: [i32; QK / 2],
    /// −8 times their sum.
    start: i32,
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
/// The features are there; `to` has room for [`packed_len`] and is aligned to 32 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn pack(query: *const f32, size: usize, to: *mut f32) {
    let mut largest = _mm256_setzero_ps();
    for i in (0..size).step_by(8) {
        // SAFETY: as the caller says; so below.
        largest = larger_size(largest, unsafe { _mm256_loadu_ps(query.add(i)) });
    }
    let largest = max_of_lanes(largest);
    let factor = _mm256_set1_ps(factor_of(largest));
    let blocks = to.cast::<Block>();
    for b in 0..size / QK {
        let mut halves = [_mm256_setzero_si256(); 2];
        let mut sums = _mm256_setzero_si256();
        for h in 0..2 {
            // SAFETY: see above.
            let (low, high) = unsafe {
                let from = query.add(b * QK + h * 16);
                (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)))
            };
            let (numbers, sum) = to_i16(low, high, factor);
            // 0 1 2 3 → 0 2 1 3 in all fours.
            halves[h] = _mm256_shufflehi_epi16::<0b11_01_10_00>(_mm256_shufflelo_epi16::<0b11_01_10_00>(numbers));
            sums = _mm256_add_epi32(sums, sum);
        }
        // SAFETY: there is room for the block, whose pairs are 64 bytes.
        unsafe {
            let block = blocks.add(b);
            _mm256_store_si256((&raw mut (*block).pairs).cast(), halves[0]);
            _mm256_store_si256((&raw mut (*block).pairs).cast::<__m256i>().add(1), halves[1]);
            (&raw mut (*block).start).write(-8 * sum_of_lanes(sums));
        }
    }
    // SAFETY: one more block's room is behind them.
    unsafe { blocks.add(size / QK).cast::<f32>().write(largest / LARGEST) }
}

/// `scores[g × BLOCK + r] = queries[g] · keys[r]`, as `kernels::scores_of`, with packed queries that lie behind each other.
/// Eight rows are taken at a time: lanes are rows.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn scores_of<const G: usize>(packed: *const f32, keys: RowPtr, size: usize, scores: *mut f32) {
    let n_blocks = size / QK;
    // SAFETY: packed queries, which end with a factor.
    let query = |g: usize| unsafe { packed.add(g * packed_len(size)).cast::<Block>() };
    let low = _mm256_set1_epi16(15);
    for first in (0..keys.n).step_by(8) {
        let mut rows = [keys.data; 8];
        for r in 0..8 {
            // Behind the last row it is taken again.
            // SAFETY: the row exists.
            rows[r] = unsafe { keys.at((first + r).min(keys.n - 1)) };
            keys.prefetch(rows[r]);
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
            let mut dots = [_mm256_setzero_si256(); G];
            for g in 0..G {
                // SAFETY: the query has this block.
                dots[g] = _mm256_set1_epi32(unsafe { (*query(g).add(b)).start });
            }
            for j in 0..4 {
                // Of bytes 0 and 2, 1 and 3: their lower halves are elements of the block's first half.
                let numbers = [
                    _mm256_and_si256(groups[j], low),
                    _mm256_and_si256(_mm256_srli_epi16::<8>(groups[j]), low),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(groups[j]), low),
                    _mm256_srli_epi16::<12>(groups[j]),
                ];
                let at = [2 * j, 2 * j + 1, QK / 4 + 2 * j, QK / 4 + 2 * j + 1];
                for g in 0..G {
                    for i in 0..4 {
                        // SAFETY: as above.
                        let pair = unsafe { (*query(g).add(b)).pairs[at[i]] };
                        let products = _mm256_madd_epi16(numbers[i], _mm256_set1_epi32(pair));
                        dots[g] = _mm256_add_epi32(dots[g], products);
                    }
                }
            }
            for g in 0..G {
                sums[g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[g]), scales, sums[g]);
            }
        }
        for g in 0..G {
            // SAFETY: the factor is behind the query's blocks; there is room for G × BLOCK, a multiple of eight.
            unsafe {
                let back = _mm256_set1_ps(query(g).add(n_blocks).cast::<f32>().read());
                _mm256_storeu_ps(scores.add(g * BLOCK + first), _mm256_mul_ps(sums[g], back));
            }
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

    let low = _mm256_set1_epi16(15);
    let eights = values.n.div_ceil(8);
    let mut scaled = [Weights([0; BLOCK]); G];
    for b in 0..size / QK {
        let data = values.data.wrapping_add(b * QK_BYTES);
        let mut scales = [_mm256_setzero_ps(); BLOCK / 8];
        for i in 0..eights {
            let mut rows = [data; 8];
            for r in 0..8 {
                rows[r] = data.wrapping_add((8 * i + r).min(values.n - 1) * values.bytes);
            }
            // SAFETY: the rows exist.
            scales[i] = unsafe { scales_of(&rows) };
        }
        let (mut back, mut start) = ([0.0; G], [0; G]);
        for g in 0..G {
            let mut products = [_mm256_setzero_ps(); BLOCK / 8];
            let mut largest = _mm256_setzero_ps();
            for i in 0..eights {
                // SAFETY: there are G × BLOCK weights.
                let weight = unsafe { _mm256_loadu_ps(weights.add(g * BLOCK + 8 * i)) };
                products[i] = _mm256_mul_ps(scales[i], weight);
                largest = larger_size(largest, products[i]);
            }
            let largest = max_of_lanes(largest);
            let factor = _mm256_set1_ps(factor_of(largest));
            let mut sums = _mm256_setzero_si256();
            for i in 0..BLOCK / 16 {
                let (numbers, sum) = to_i16(products[2 * i], products[2 * i + 1], factor);
                sums = _mm256_add_epi32(sums, sum);
                // SAFETY: 16 of BLOCK numbers.
                unsafe { _mm256_store_si256(scaled[g].0.as_mut_ptr().cast::<__m256i>().add(i), numbers) };
            }
            back[g] = largest / LARGEST;
            start[g] = -8 * sum_of_lanes(sums);
        }
        // Half of the block's bytes at a time, so that all sums are in registers.
        for half in 0..2 {
            let mut sums = [[_mm256_setzero_si256(); 2]; G];
            for g in 0..G {
                sums[g] = [_mm256_set1_epi32(start[g]); 2];
            }
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
                let bytes = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(bytes[0], bytes[1]));
                let numbers = [_mm256_and_si256(bytes, low), _mm256_srli_epi16::<4>(bytes)];
                for g in 0..G {
                    let weight = _mm256_set1_epi32(pairs[g]);
                    for c in 0..2 {
                        sums[g][c] = _mm256_add_epi32(sums[g][c], _mm256_madd_epi16(numbers[c], weight));
                    }
                }
            }
            for g in 0..G {
                let (back, factor) = (_mm256_set1_ps(back[g]), _mm256_set1_ps(factors[g]));
                for c in 0..2 {
                    // SAFETY: out has G × `size` elements.
                    unsafe {
                        let out = out.add(g * out_stride + b * QK + 8 * half + 16 * c);
                        let before = _mm256_mul_ps(_mm256_loadu_ps(out), factor);
                        _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[g][c]), back, before));
                    }
                }
            }
        }
    }
}
