//! Four-bit keys and values in integers, for AVX2: turned into f32 one by one, as the other kernels do, they would cost
//! more instructions than all products.
//!
//! Queries become 8-bit integers with a scale for each 32 of them, as llama.cpp has them for such keys too: each is off by
//! at most 1/254 of the largest of its 32, where a key of four bits is off by 1/16. The softmax's weights, times the
//! values' scales, become 8-bit integers relative to the largest of a block of rows: what that adds up to is a third of
//! the values' own rounding where one row has all the weight, and less than a twentieth where many share it. So that many
//! small weights are not all rounded to nothing, rows are rounded at different heights ([`DITHER`]). That a stored number
//! is 8 too large is taken back once for all rows or elements.
#![allow(clippy::needless_range_loop)]

use std::{arch::x86_64::*, mem::MaybeUninit};

use super::block::{BLOCK, RowPtr};
use crate::ggml::mul_mat::quantize_block;

/// Elements that share a scale.
const QK: usize = 32;
/// A block's scale and its numbers.
const QK_BYTES: usize = 18;

/// Elements of a query as [`pack`] makes it.
pub(super) fn packed_len(size: usize) -> usize {
    size / QK * (size_of::<Block>() / size_of::<f32>())
}

/// A block of a query.
#[derive(Clone, Copy)]
#[repr(C)]
struct Block {
    /// Its elements, four 8-bit numbers in one, as they meet a row's bytes: once for each of eight rows.
    fours: [[i32; 8]; QK / 4],
    /// −8 times the sums of the first and of the last two numbers of all fours: two 16-bit numbers, for eight rows.
    start: [i32; 8],
    /// What a number is to be multiplied with.
    scale: [f32; 8],
}

/// A block of each of eight rows, as far apart.
#[derive(Clone, Copy)]
struct Eight {
    data: *const u8,
    bytes: usize,
}

/// Eight blocks one after the other.
type Copied = [MaybeUninit<u8>; 8 * QK_BYTES];

impl Eight {
    /// Block `block` of the rows from `first` on. Behind the last row that is taken again, in a copy.
    ///
    /// # Safety
    /// The rows exist, at least one from `first` on; the copy lives as long as what is returned is used.
    #[inline(always)]
    unsafe fn new(rows: RowPtr, block: usize, first: usize, copied: &mut Copied) -> Eight {
        let data = rows.data.wrapping_add(first * rows.bytes + block * QK_BYTES);
        if first + 8 <= rows.n {
            return Eight { data, bytes: rows.bytes };
        }
        // SAFETY: the caller's.
        unsafe { Eight::copy(data, rows.bytes, rows.n - 1 - first, copied) }
    }

    /// # Safety
    /// The rows up to `last` exist.
    #[cold]
    #[inline(never)]
    unsafe fn copy(data: *const u8, bytes: usize, last: usize, copied: &mut Copied) -> Eight {
        let to = copied.as_mut_ptr().cast::<u8>();
        for r in 0..8 {
            // SAFETY: the row exists, and there is room for eight blocks.
            unsafe { data.add(r.min(last) * bytes).copy_to_nonoverlapping(to.add(r * QK_BYTES), QK_BYTES) };
        }
        Eight { data: to, bytes: QK_BYTES }
    }

    #[inline(always)]
    fn at(self, row: usize) -> *const u8 {
        self.data.wrapping_add(row * self.bytes)
    }

    /// The blocks' scales.
    ///
    /// # Safety
    /// The features are there, and so are the blocks.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(self) -> __m256 {
        // SAFETY: a block begins with its scale.
        let half = |row: usize| unsafe { i32::from(self.at(row).cast::<u16>().read_unaligned()) };
        let (mut low, mut high) = (_mm_cvtsi32_si128(half(0)), _mm_cvtsi32_si128(half(4)));
        low = _mm_insert_epi16::<1>(low, half(1));
        high = _mm_insert_epi16::<1>(high, half(5));
        low = _mm_insert_epi16::<2>(low, half(2));
        high = _mm_insert_epi16::<2>(high, half(6));
        low = _mm_insert_epi16::<3>(low, half(3));
        high = _mm_insert_epi16::<3>(high, half(7));
        _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high))
    }

    /// The blocks' bytes of four elements each, and of the four that are 16 further: `[bytes][row]`.
    ///
    /// # Safety
    /// As [`Eight::scales`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fours(self) -> [__m256i; 4] {
        let mut two = [_mm256_setzero_si256(); 4];
        for r in 0..4 {
            // SAFETY: after the scale are 16 bytes.
            let (one, other) =
                unsafe { (_mm_loadu_si128(self.at(r).add(2).cast()), _mm_loadu_si128(self.at(r + 4).add(2).cast())) };
            two[r] = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(one), other);
        }
        let even = [_mm256_unpacklo_epi32(two[0], two[1]), _mm256_unpacklo_epi32(two[2], two[3])];
        let odd = [_mm256_unpackhi_epi32(two[0], two[1]), _mm256_unpackhi_epi32(two[2], two[3])];
        [
            _mm256_unpacklo_epi64(even[0], even[1]),
            _mm256_unpackhi_epi64(even[0], even[1]),
            _mm256_unpacklo_epi64(odd[0], odd[1]),
            _mm256_unpackhi_epi64(odd[0], odd[1]),
        ]
    }
}

/// The lower halves of bytes, and the upper ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(bytes: __m256i) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(15);
    [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)]
}

/// The largest lane of each vector.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn largest_lanes([a, b, c, d]: [__m256; 4]) -> __m128 {
    let ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let [low, high] = [_mm256_shuffle_ps::<0b01_00_01_00>(ab, cd), _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd)];
    let abcd = _mm256_max_ps(low, high);
    _mm_max_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd))
}

/// The sum of each vector's lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_of_lanes([a, b, c, d]: [__m256; 4]) -> __m128 {
    let abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd))
}

/// As [`sums_of_lanes`], of whole numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn whole_sums_of_lanes([a, b, c, d]: [__m256i; 4]) -> __m128i {
    let abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256::<1>(abcd))
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
            let mut numbers = [0_i32; QK / 4];
            _mm256_storeu_si256(numbers.as_mut_ptr().cast(), quantized.numbers);
            for (fours, four) in (*block).fours.iter_mut().zip(numbers) {
                *fours = [four; 8];
            }
            // Of two numbers each, then of all first and of all last two.
            let twos = _mm256_maddubs_epi16(_mm256_set1_epi8(1), quantized.numbers);
            let sums = _mm_add_epi16(_mm256_castsi256_si128(twos), _mm256_extracti128_si256::<1>(twos));
            let sums = _mm_add_epi16(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
            let sums = _mm_add_epi16(sums, _mm_shuffle_epi32::<0b10_11_00_01>(sums));
            (*block).start = [_mm_cvtsi128_si32(_mm_mullo_epi16(sums, _mm_set1_epi16(-8))); 8];
            (*block).scale = [quantized.scale; 8];
        }
    }
}

/// `scores[g × BLOCK + r] = queries[g] · keys[r]`, as `kernels::scores_of`, with packed queries one after the other.
/// Eight rows are taken at a time: lanes are rows.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn scores_of<const G: usize>(packed: *const f32, keys: RowPtr, size: usize, scores: *mut f32) {
    let n_blocks = size / QK;
    let ones = _mm256_set1_epi16(1);
    let mut copied = [const { MaybeUninit::uninit() }; 8 * QK_BYTES];
    for first in (0..keys.n).step_by(8) {
        keys.prefetch.issue::<8>(first);
        let mut sums = [_mm256_setzero_ps(); G];
        for b in 0..n_blocks {
            // SAFETY: the rows have the block, and each query has it.
            unsafe {
                let rows = Eight::new(keys, b, first, &mut copied);
                let query = |g: usize| packed.cast::<Block>().add(g * n_blocks + b);
                let load = |from: *const [i32; 8]| _mm256_loadu_si256(from.cast());
                let scales = rows.scales();
                // Two products are 15 × 127 × 2 at most, so that the eight of a block fit into 16 bits.
                let mut dots = [_mm256_setzero_si256(); G];
                for g in 0..G {
                    dots[g] = load(&raw const (*query(g)).start);
                }
                for (j, bytes) in rows.fours().into_iter().enumerate() {
                    // Lower halves of bytes are elements of the block's first half.
                    let numbers = halves(bytes);
                    for g in 0..G {
                        for half in 0..2 {
                            let four = load(&raw const (*query(g)).fours[4 * half + j]);
                            dots[g] = _mm256_add_epi16(dots[g], _mm256_maddubs_epi16(numbers[half], four));
                        }
                    }
                }
                for g in 0..G {
                    let scales = _mm256_mul_ps(scales, _mm256_loadu_ps((&raw const (*query(g)).scale).cast()));
                    let dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[g], ones));
                    sums[g] = _mm256_fmadd_ps(dots, scales, sums[g]);
                }
            }
        }
        for g in 0..G {
            // SAFETY: there is room for G × BLOCK, a multiple of eight.
            unsafe { _mm256_storeu_ps(scores.add(g * BLOCK + first), sums[g]) }
        }
    }
}

/// The largest size of a weight's number. Dither adds less than a half, which rounds to 126 or 127.
const LARGEST: f32 = 126.0;

/// The largest sum of their sizes: rounding adds less than one to each of [`BLOCK`], and eight times 4095 fits into 16 bits.
const LARGEST_SUM: f32 = (4095 - BLOCK) as f32;

/// What is added to rows' numbers before they are rounded, so that of many small ones some become 1, as many as the sum
/// wants. Multiples of 1/64 around 0, in steps of about the golden ratio: any few neighbouring rows have them from
/// all over the range.
static DITHER: [f32; BLOCK] = {
    let mut dither = [0.0; BLOCK];
    let mut r = 0;
    while r < BLOCK {
        dither[r] = ((r * 39 % BLOCK) as f32 + 0.5) / BLOCK as f32 - 0.5;
        r += 1;
    }
    dither
};

/// A block of rows' weights times the scales of one of their blocks.
struct Scaled<const G: usize> {
    /// Up to the rows' number, rounded up to a multiple of 32.
    products: [[MaybeUninit<__m256>; BLOCK / 8]; G],
    /// What 1 of the numbers stands for, for each of `G`.
    unit: [f32; 4],
    /// Its inverse, or 0.
    factor: [f32; 4],
}

impl<const G: usize> Scaled<G> {
    const EMPTY: Scaled<G> = Scaled {
        products: [const { [const { MaybeUninit::uninit() }; BLOCK / 8] }; G],
        unit: [0.0; 4],
        factor: [0.0; 4],
    };

    /// # Safety
    /// As [`add_values`]; the rows have the block.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn set(&mut self, weights: *const f32, values: RowPtr, block: usize) {
        let sign = _mm256_set1_ps(-0.0);
        let mut copied = [const { MaybeUninit::uninit() }; 8 * QK_BYTES];
        let eights = values.n.div_ceil(8);
        let (mut largest, mut total) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
        for i in 0..eights {
            // SAFETY: the rows exist.
            let scales = unsafe { Eight::new(values, block, 8 * i, &mut copied).scales() };
            for g in 0..G {
                // SAFETY: there are G × BLOCK weights.
                let product = _mm256_mul_ps(scales, unsafe { _mm256_loadu_ps(weights.add(g * BLOCK + 8 * i)) });
                let size = _mm256_andnot_ps(sign, product);
                largest[g] = _mm256_max_ps(largest[g], size);
                total[g] = _mm256_add_ps(total[g], size);
                self.products[g][i].write(product);
            }
        }
        for i in eights..eights.next_multiple_of(4) {
            for g in 0..G {
                self.products[g][i].write(_mm256_setzero_ps());
            }
        }
        let largest = _mm_mul_ps(largest_lanes(largest), _mm_set1_ps(1.0 / LARGEST));
        let total = _mm_mul_ps(sums_of_lanes(total), _mm_set1_ps(1.0 / LARGEST_SUM));
        let unit = _mm_max_ps(largest, total);
        let inverse = _mm_and_ps(_mm_div_ps(_mm_set1_ps(1.0), unit), _mm_cmpgt_ps(unit, _mm_setzero_ps()));
        // SAFETY: four elements each.
        unsafe {
            _mm_storeu_ps(self.unit.as_mut_ptr(), unit);
            _mm_storeu_ps(self.factor.as_mut_ptr(), inverse);
        }
    }
}

/// A block of rows' weights as whole numbers.
struct Whole<const G: usize> {
    /// Those of two rows each, twice: four 8-bit numbers in one, as they meet the rows' bytes.
    pairs: [MaybeUninit<Pairs>; G],
    /// −8 times the sum of the numbers.
    start: [i32; 4],
}

#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Pairs([i32; BLOCK / 2]);

impl<const G: usize> Whole<G> {
    /// # Safety
    /// The products were set for as many rows.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn new(scaled: &Scaled<G>, n_rows: usize) -> Whole<G> {
        let mut whole = Whole { pairs: [const { MaybeUninit::uninit() }; G], start: [0; 4] };
        let mut totals = [_mm256_setzero_si256(); 4];
        for g in 0..G {
            let factor = _mm256_set1_ps(scaled.factor[g]);
            let mut sums = _mm256_setzero_si256();
            for i in (0..n_rows.div_ceil(8)).step_by(4) {
                let mut eight = [_mm256_setzero_si256(); 4];
                for j in 0..4 {
                    // SAFETY: they were set, and there is as much dither as rows.
                    let (product, dither) = unsafe {
                        (scaled.products[g][i + j].assume_init(), _mm256_loadu_ps(DITHER.as_ptr().add(8 * (i + j))))
                    };
                    eight[j] = _mm256_cvtps_epi32(_mm256_fmadd_ps(product, factor, dither));
                }
                let numbers =
                    _mm256_packs_epi16(_mm256_packs_epi32(eight[0], eight[1]), _mm256_packs_epi32(eight[2], eight[3]));
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), numbers));
                // Packing and unpacking work on each half of a register by itself.
                let twice = [_mm256_unpacklo_epi16(numbers, numbers), _mm256_unpackhi_epi16(numbers, numbers)];
                for (half, twice) in twice.into_iter().enumerate() {
                    // SAFETY: 8 of BLOCK / 2 pairs.
                    unsafe {
                        let to = whole.pairs[g].as_mut_ptr().cast::<i32>().add(4 * i + 8 * half);
                        _mm256_store_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(twice));
                    }
                }
            }
            totals[g] = _mm256_madd_epi16(sums, _mm256_set1_epi16(-8));
        }
        // SAFETY: four elements.
        unsafe { _mm_storeu_si128(whole.start.as_mut_ptr().cast(), whole_sums_of_lanes(totals)) };
        whole
    }

    /// Adds the products of two rows' bytes and their weights.
    ///
    /// # Safety
    /// The bytes exist, 16 for each row, and so does the pair.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(&self, pair: usize, rows: [*const u8; 2], sums: &mut [[__m256i; 2]; G]) {
        // SAFETY: the caller's.
        let rows = unsafe { rows.map(|row| _mm_loadu_si128(row.cast())) };
        let bytes = _mm256_inserti128_si256::<1>(
            _mm256_castsi128_si256(_mm_unpacklo_epi8(rows[0], rows[1])),
            _mm_unpackhi_epi8(rows[0], rows[1]),
        );
        let numbers = halves(bytes);
        for g in 0..G {
            // SAFETY: the caller's.
            let weights = _mm256_set1_epi32(unsafe { self.pairs[g].as_ptr().cast::<i32>().add(pair).read() });
            for half in 0..2 {
                sums[g][half] = _mm256_add_epi16(sums[g][half], _mm256_maddubs_epi16(numbers[half], weights));
            }
        }
    }
}

/// `out[g] = factors[g] × out[g] + Σ weights[g × BLOCK + r] × values[r]`, as `kernels::add_values`. Two rows are taken at a
/// time: lanes are elements.
///
/// # Safety
/// As there; weights after the last row, up to a multiple of eight, are zero.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn add_values<const G: usize>(
    weights: *const f32,
    values: RowPtr,
    size: usize,
    factors: &[f32; G],
    out: *mut f32,
    out_stride: usize,
) {
    let n_blocks = size / QK;
    // The next block's weights are scaled early, so that nothing waits for their maximum.
    let mut scaled = [const { Scaled::<G>::EMPTY }; 2];
    // SAFETY: the caller's; so below.
    unsafe { scaled[0].set(weights, values, 0) };
    for b in 0..n_blocks {
        if b + 1 < n_blocks {
            // SAFETY: the rows have the block.
            unsafe { scaled[(b + 1) % 2].set(weights, values, b + 1) };
        }
        let scaled = &scaled[b % 2];
        // SAFETY: it was set for these rows.
        let whole = unsafe { Whole::new(scaled, values.n) };
        // Sums may leave 16 bits and come back: with `start` they are eight times 4095 at most.
        let mut sums = [[_mm256_setzero_si256(); 2]; G];
        let at = |row: usize| values.data.wrapping_add(row * values.bytes + b * QK_BYTES + 2);
        let eights = values.n / 8;
        for i in 0..eights {
            let first = at(8 * i);
            if b == 0 {
                values.prefetch.issue::<8>(8 * i);
            }
            for pair in 0..4 {
                let rows = [2 * pair, 2 * pair + 1].map(|row| first.wrapping_add(row * values.bytes));
                // SAFETY: the rows exist.
                unsafe { whole.add(4 * i + pair, rows, &mut sums) };
            }
        }
        for pair in 4 * eights..values.n.div_ceil(2) {
            // The weight after the last row is zero.
            let rows = [2 * pair, (2 * pair + 1).min(values.n - 1)].map(at);
            // SAFETY: the rows exist.
            unsafe { whole.add(pair, rows, &mut sums) };
        }
        for g in 0..G {
            let (unit, factor) = (_mm256_set1_ps(scaled.unit[g]), _mm256_set1_ps(factors[g]));
            let start = _mm256_set1_epi16(whole.start[g] as i16);
            for half in 0..2 {
                let sums = _mm256_add_epi16(sums[g][half], start);
                let eights = [_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums)];
                for (i, eight) in eights.into_iter().enumerate() {
                    // SAFETY: out has G × `size` elements.
                    unsafe {
                        let out = out.add(g * out_stride + b * QK + 16 * half + 8 * i);
                        let before = _mm256_mul_ps(_mm256_loadu_ps(out), factor);
                        let sum = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight));
                        _mm256_storeu_ps(out, _mm256_fmadd_ps(sum, unit, before));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::block::Prefetch, *};
    use crate::ggml::processor::Features;

    const G: usize = 3;

    /// The sum of `n` rows of `size` elements: of numbers 0 to 15, which stand for themselves less 8, times a scale.
    struct Rows {
        n: usize,
        size: usize,
        numbers: Vec<u8>,
        scale: f32,
        /// An f16.
        scale_bits: u16,
    }

    impl Rows {
        /// `None` where the processor has no AVX2.
        fn sum(&self, weights: &[f32; G * BLOCK]) -> Option<Vec<f32>> {
            let mut bytes = Vec::new();
            for block in self.numbers.chunks_exact(QK) {
                bytes.extend(self.scale_bits.to_le_bytes());
                bytes.extend((0..QK / 2).map(|i| block[i] | block[QK / 2 + i] << 4));
            }
            let values = RowPtr {
                data: bytes.as_ptr(),
                bytes: self.size / QK * QK_BYTES,
                n: self.n,
                prefetch: Prefetch::NOTHING,
            };
            let mut out = vec![1.0; G * self.size];
            if Features::detect() < Features::Avx2 {
                return None;
            }
            // SAFETY: the features are there, and all rows; weights and results are as many as it wants.
            unsafe {
                add_values::<G>(weights.as_ptr(), values, self.size, &[2.0, 0.0, 1.0], out.as_mut_ptr(), self.size);
            }
            Some(out)
        }

        fn exact(&self, weights: &[f32; G * BLOCK]) -> Vec<f64> {
            let element =
                |r: usize, i: usize| f64::from(self.scale) * (f64::from(self.numbers[r * self.size + i]) - 8.0);
            let mut out = Vec::new();
            for (g, before) in [2.0, 0.0, 1.0].into_iter().enumerate() {
                for i in 0..self.size {
                    let weight = |r: usize| f64::from(weights[g * BLOCK + r]);
                    out.push(before + (0..self.n).map(|r| weight(r) * element(r, i)).sum::<f64>());
                }
            }
            out
        }
    }

    proptest::proptest! {
        /// Whole multiples of a 126th of the largest weight are not rounded, whatever the number of rows.
        #[test]
        fn whole_weights_are_exact(
            n in 1..=BLOCK,
            blocks in 1_usize..4,
            numbers in proptest::collection::vec(0_u8..16, BLOCK * 3 * QK),
            whole in proptest::collection::vec(0_u8..32, G * BLOCK),
            is_negative in proptest::bool::ANY,
        ) {
            let mut weights = [0.0; G * BLOCK];
            for g in 0..G {
                for r in 0..n {
                    // Powers below one: their sum is no more than what 126 and 64 numbers of 32 come to.
                    weights[g * BLOCK + r] = f32::from(whole[g * BLOCK + r]) / 126.0;
                }
                weights[g * BLOCK + n / 2] = 1.0;
            }
            let (scale, scale_bits) = if is_negative { (-0.5, 0xb800) } else { (0.25, 0x3400) };
            let numbers = numbers[..n * blocks * QK].to_vec();
            let rows = Rows { n, size: blocks * QK, numbers, scale, scale_bits };
            if let Some(got) = rows.sum(&weights) {
                for (got, exact) in got.iter().zip(rows.exact(&weights)) {
                    proptest::prop_assert!((f64::from(*got) - exact).abs() < 1e-4, "{got}, not {exact}");
                }
            }
        }

        /// The largest sums that there can be stay within 16 bits: rows of the same number and weight.
        #[test]
        fn the_largest_sums_fit(n in 1..=BLOCK, number in 0_u8..16) {
            let mut weights = [0.0; G * BLOCK];
            for g in 0..G {
                weights[g * BLOCK..][..n].fill(1.0);
            }
            let rows = Rows { n, size: QK, numbers: vec![number; n * QK], scale: -0.5, scale_bits: 0xb800 };
            if let Some(got) = rows.sum(&weights) {
                for (got, exact) in got.iter().zip(rows.exact(&weights)) {
                    // One step for all rows, of which there are 4,031 / 64 to a weight at least.
                    proptest::prop_assert!((f64::from(*got) - exact).abs() <= 4.0 * n as f64 / 60.0, "{got}, not {exact}");
                }
            }
        }
    }

    /// Rounded to the nearest, weights of a third of a step would all be nothing.
    #[test]
    fn many_small_weights_count() {
        let mut weights = [0.0; G * BLOCK];
        for g in 0..G {
            weights[g * BLOCK..][..BLOCK].fill(0.3 / 126.0);
            weights[g * BLOCK + 20] = 1.0;
        }
        // The heavy row has nothing to add.
        let numbers = (0..BLOCK * QK).map(|i| if i / QK == 20 { 8 } else { 15 }).collect();
        let rows = Rows { n: BLOCK, size: QK, numbers, scale: 0.25, scale_bits: 0x3400 };
        if let Some(got) = rows.sum(&weights) {
            for (got, exact) in got.iter().zip(rows.exact(&weights)) {
                let step = 7.0 * 0.25 / 126.0;
                assert!((f64::from(*got) - exact).abs() < 2.0 * step, "{got}, not {exact}");
            }
        }
    }
}
