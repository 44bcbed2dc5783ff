//! For AVX2 with FMA and F16C.
//!
//! With few vectors rows are taken one at a time, a block of 32 weights in a register. With many, eight rows are
//! unpacked once into a panel whose lanes are rows: then four weights of all eight are multiplied with four numbers of a
//! vector at once, nothing is ever summed across lanes, and a block's scales are applied to eight rows together.
//!
//! Vectors are kept in arrays that loops with constant bounds index, as in `attention::kernels`.
#![allow(clippy::needless_range_loop)]

use std::{arch::x86_64::*, cell::RefCell};

use ggml_sys as sys;

use super::product::{Kernels, Product, ROWS, TILE_BYTES};

pub struct Avx2;

impl Kernels for Avx2 {
    unsafe fn run(product: &Product, ty: sys::ggml_type) {
        // SAFETY: as the caller says.
        unsafe {
            match ty {
                sys::GGML_TYPE_Q4_0 => run::<Q4_0>(product),
                sys::GGML_TYPE_Q4_1 => run::<Q4_1>(product),
                _ => run::<Q8_0>(product),
            }
        }
    }
}

/// From this many vectors on a panel is worth its making.
const MIN_PANEL: usize = 4;

/// Elements of a block.
const BLOCK: usize = 32;

/// How weights are stored in blocks of 32. An element is its number times the scale, plus the minimum.
trait Block {
    const BYTES: usize;
    /// Whether blocks have a minimum: where numbers are stored with an offset, it is minus the offset times the scale.
    const HAS_MIN: bool;
    /// Factor of what [`Block::scale_and_minimum`] gives as the minimum.
    const MIN_FACTOR: f32;
    /// Where weights have no sign, products of two of them and two numbers of an input fit in 16 bits eight times.
    const SIGNED: bool;

    /// The numbers in their order.
    ///
    /// # Safety
    /// The block exists; so do the features.
    unsafe fn unpack(block: *const u8) -> __m256i;
    /// The scale in all lanes, and in lane 1 what becomes the minimum.
    ///
    /// # Safety
    /// As `unpack`.
    #[inline(always)]
    unsafe fn scale_and_minimum(block: *const u8) -> (__m256, __m256) {
        // SAFETY: a block begins with its scale.
        let scale = unsafe { splat_half(block) };
        (scale, scale)
    }
    /// The halves that are the scale and, where blocks store one, the minimum.
    ///
    /// # Safety
    /// As `unpack`.
    #[inline(always)]
    unsafe fn halves(block: *const u8) -> [u16; 2] {
        // SAFETY: as above.
        [unsafe { block.cast::<u16>().read_unaligned() }; 2]
    }
}

struct Q4_0;
struct Q4_1;
struct Q8_0;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack_halves(bytes: *const u8) -> __m256i {
    // SAFETY: good for 16 bytes.
    let low = unsafe { _mm_loadu_si128(bytes.cast()) };
    let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), _mm_srli_epi16::<4>(low));
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn splat_half(from: *const u8) -> __m256 {
    // SAFETY: good for two bytes.
    _mm256_cvtph_ps(_mm_set1_epi16(unsafe { from.cast::<i16>().read_unaligned() }))
}

impl Block for Q4_0 {
    const BYTES: usize = 18;
    const HAS_MIN: bool = true;
    const MIN_FACTOR: f32 = -8.0;
    const SIGNED: bool = false;
    #[inline(always)]
    unsafe fn unpack(block: *const u8) -> __m256i {
        // SAFETY: a block is its scale and 16 bytes.
        unsafe { unpack_halves(block.add(2)) }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn two_halves(from: *const u8) -> (__m256, __m256) {
    // SAFETY: good for four bytes.
    let both = _mm256_cvtph_ps(_mm_set1_epi32(unsafe { from.cast::<i32>().read_unaligned() }));
    (_mm256_moveldup_ps(both), both)
}

impl Block for Q4_1 {
    const BYTES: usize = 20;
    const HAS_MIN: bool = true;
    const MIN_FACTOR: f32 = 1.0;
    const SIGNED: bool = false;
    #[inline(always)]
    unsafe fn unpack(block: *const u8) -> __m256i {
        // SAFETY: a block is its scale, its minimum and 16 bytes.
        unsafe { unpack_halves(block.add(4)) }
    }
    #[inline(always)]
    unsafe fn scale_and_minimum(block: *const u8) -> (__m256, __m256) {
        // SAFETY: as above.
        unsafe { two_halves(block) }
    }
    #[inline(always)]
    unsafe fn halves(block: *const u8) -> [u16; 2] {
        // SAFETY: as above.
        unsafe { block.cast::<[u16; 2]>().read_unaligned() }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack_bytes(bytes: *const u8) -> __m256i {
    // SAFETY: good for 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.cast()) }
}

impl Block for Q8_0 {
    const BYTES: usize = 34;
    const HAS_MIN: bool = false;
    const MIN_FACTOR: f32 = 0.0;
    const SIGNED: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8) -> __m256i {
        // SAFETY: a block is its scale and 32 bytes.
        unsafe { unpack_bytes(block.add(2)) }
    }
}

/// Some vectors, quantised to eight bits in blocks of 32.
#[derive(Default)]
struct Input {
    /// Between −127 and 127.
    numbers: Vec<i8>,
    /// By block.
    scales: Vec<f32>,
    /// Each block's sum of numbers, times its scale.
    sums: Vec<f32>,
}

/// One vector of an [`Input`].
#[derive(Clone, Copy)]
struct Vector {
    numbers: *const i8,
    scales: *const f32,
    sums: *const f32,
}

/// A block of eight rows.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Panel {
    /// Four numbers of each row, eight times.
    numbers: [[u8; 32]; 8],
    scales: [f32; ROWS],
    minima: [f32; ROWS],
}

#[derive(Default)]
struct Scratch {
    input: Input,
    panels: Vec<Panel>,
}

thread_local! {
    /// It grows to the largest product and stays.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Input {
    /// # Safety
    /// `vectors` vectors from number `first` of the product's input on exist; the processor has the features.
    unsafe fn quantize(&mut self, product: &Product, first: usize, vectors: usize) {
        let blocks = product.k / BLOCK;
        if self.scales.len() < vectors * blocks {
            self.numbers.resize(vectors * product.k, 0);
            self.scales.resize(vectors * blocks, 0.0);
            self.sums.resize(vectors * blocks, 0.0);
        }
        let numbers = self.numbers.chunks_exact_mut(product.k);
        let scales = self.scales.chunks_exact_mut(blocks).zip(self.sums.chunks_exact_mut(blocks));
        for (i, (numbers, (scales, sums))) in numbers.zip(scales).take(vectors).enumerate() {
            // SAFETY: as the caller says.
            unsafe { quantize(product.input.add((first + i) * product.input_bytes).cast(), numbers, scales, sums) };
        }
    }

    /// # Safety
    /// The vector was quantised.
    unsafe fn vector(&self, product: &Product, index: usize) -> Vector {
        let block = index * (product.k / BLOCK);
        // SAFETY: as the caller says.
        unsafe {
            Vector {
                numbers: self.numbers.as_ptr().add(index * product.k),
                scales: self.scales.as_ptr().add(block),
                sums: self.sums.as_ptr().add(block),
            }
        }
    }
}

/// # Safety
/// The pointers are good for what the fields say; the processor has the features.
unsafe fn run<B: Block>(product: &Product) {
    SCRATCH.with_borrow_mut(|scratch| {
        let bytes = product.k + product.k / BLOCK * 2 * size_of::<f32>();
        let tile = (TILE_BYTES / bytes).next_multiple_of(4).min(product.n);
        for first in (0..product.n).step_by(tile) {
            let n = tile.min(product.n - first);
            // SAFETY: as the caller says.
            unsafe {
                scratch.input.quantize(product, first, n);
                multiply_tile::<B>(product, scratch, first, n);
            }
        }
    });
}

/// Multiplies with the `n` vectors from number `first` on, which were quantised.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_tile<B: Block>(product: &Product, scratch: &mut Scratch, first: usize, n: usize) {
    let blocks = product.k / BLOCK;
    let mut row = product.rows.start;
    // SAFETY: as the caller says.
    unsafe {
        while n >= MIN_PANEL && row + ROWS <= product.rows.end {
            if scratch.panels.len() < blocks {
                let empty = Panel { numbers: [[0; 32]; 8], scales: [0.0; ROWS], minima: [0.0; ROWS] };
                scratch.panels.resize(blocks, empty);
            }
            fill_panels::<B>(product, row, &mut scratch.panels[..blocks]);
            let panels = &scratch.panels[..blocks];
            let mut done = 0;
            while done < n {
                let input = &scratch.input;
                done += match n - done {
                    1 => multiply_panels::<B, 1>(product, panels, input, row, first, done),
                    2 => multiply_panels::<B, 2>(product, panels, input, row, first, done),
                    3 => multiply_panels::<B, 3>(product, panels, input, row, first, done),
                    _ => multiply_panels::<B, 4>(product, panels, input, row, first, done),
                };
            }
            row += ROWS;
        }
        for row in row..product.rows.end {
            let mut done = 0;
            while done < n {
                let input = &scratch.input;
                done += match n - done {
                    1 => multiply_row::<B, 1>(product, input, row, first, done),
                    2 => multiply_row::<B, 2>(product, input, row, first, done),
                    _ => multiply_row::<B, 3>(product, input, row, first, done),
                };
            }
        }
    }
}

/// Multiplies a row with the `N` vectors of `input` from number `done` on; the first of all has number `first` in the
/// product. Sums are kept apart for even and odd blocks, so that an addition need not wait for the one before. A vector's
/// result does not depend on `N`. Returns `N`.
///
/// # Safety
/// As [`run`]; a row has an even number of blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_row<B: Block, const N: usize>(
    product: &Product,
    input: &Input,
    row: usize,
    first: usize,
    done: usize,
) -> usize {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    let mut minima = [_mm256_setzero_ps(); N];
    // SAFETY: rows are `k` elements; so are the vectors.
    unsafe {
        let mut vectors = [input.vector(product, done); N];
        for i in 1..N {
            vectors[i] = input.vector(product, done + i);
        }
        let weights = product.weights.add(row * product.row_bytes);
        for pair in (0..product.k / BLOCK).step_by(2) {
            for a in 0..2 {
                let b = pair + a;
                let block = weights.add(b * B::BYTES);
                // Rows follow each other: what comes in some rows is asked for now.
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(2048).cast());
                let numbers = B::unpack(block);
                let (scale, minimum) = B::scale_and_minimum(block);
                for i in 0..N {
                    let vector = vectors[i];
                    let x = _mm256_loadu_si256(vector.numbers.add(b * BLOCK).cast());
                    let pairs = if B::SIGNED {
                        _mm256_maddubs_epi16(_mm256_abs_epi8(numbers), _mm256_sign_epi8(x, numbers))
                    } else {
                        _mm256_maddubs_epi16(numbers, x)
                    };
                    let dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                    let factor = _mm256_mul_ps(scale, _mm256_broadcast_ss(&*vector.scales.add(b)));
                    sums[i][a] = _mm256_fmadd_ps(dot, factor, sums[i][a]);
                    if B::HAS_MIN {
                        let sum = _mm256_broadcast_ss(&*vector.sums.add(b));
                        minima[i] = _mm256_fmadd_ps(minimum, sum, minima[i]);
                    }
                }
            }
        }
        for i in 0..N {
            let sum = _mm256_add_ps(sums[i][0], sums[i][1]);
            let minimum = _mm_movehdup_ps(_mm256_castps256_ps128(minima[i]));
            let out = product.out.add((first + done + i) * product.out_bytes).cast::<f32>();
            *out.add(row) = sum_of_lanes(sum) + B::MIN_FACTOR * _mm_cvtss_f32(minimum);
        }
    }
    N
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of_lanes(x: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Unpacks the eight rows from `row` on.
///
/// # Safety
/// As [`run`]; the rows exist, and there is a panel for each block.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fill_panels<B: Block>(product: &Product, row: usize, panels: &mut [Panel]) {
    for (b, panel) in panels.iter_mut().enumerate() {
        let (mut scales, mut minima) = ([0u16; ROWS], [0u16; ROWS]);
        let mut rows = [_mm256_setzero_si256(); ROWS];
        for r in 0..ROWS {
            // SAFETY: the rows have as many blocks as there are panels.
            unsafe {
                let block = product.weights.add((row + r) * product.row_bytes + b * B::BYTES);
                rows[r] = B::unpack(block);
                [scales[r], minima[r]] = B::halves(block);
            }
        }
        // Eight rows of eight groups of four numbers → eight groups of eight rows.
        let mut twos = [_mm256_setzero_si256(); ROWS];
        for r in (0..ROWS).step_by(2) {
            twos[r] = _mm256_unpacklo_epi32(rows[r], rows[r + 1]);
            twos[r + 1] = _mm256_unpackhi_epi32(rows[r], rows[r + 1]);
        }
        let mut fours = [_mm256_setzero_si256(); ROWS];
        for r in [0, 4] {
            fours[r] = _mm256_unpacklo_epi64(twos[r], twos[r + 2]);
            fours[r + 1] = _mm256_unpackhi_epi64(twos[r], twos[r + 2]);
            fours[r + 2] = _mm256_unpacklo_epi64(twos[r + 1], twos[r + 3]);
            fours[r + 3] = _mm256_unpackhi_epi64(twos[r + 1], twos[r + 3]);
        }
        // SAFETY: the fields are 32 bytes each.
        unsafe {
            for g in 0..4 {
                let low = _mm256_permute2x128_si256::<0x20>(fours[g], fours[g + 4]);
                let high = _mm256_permute2x128_si256::<0x31>(fours[g], fours[g + 4]);
                _mm256_store_si256(panel.numbers[g].as_mut_ptr().cast(), low);
                _mm256_store_si256(panel.numbers[g + 4].as_mut_ptr().cast(), high);
            }
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().cast()));
            _mm256_store_ps(panel.scales.as_mut_ptr(), scales);
            let minima = _mm256_cvtph_ps(_mm_loadu_si128(minima.as_ptr().cast()));
            _mm256_store_ps(panel.minima.as_mut_ptr(), _mm256_mul_ps(minima, _mm256_set1_ps(B::MIN_FACTOR)));
        }
    }
}

/// Multiplies eight rows, the first of which is `row`, with `N` vectors as [`multiply_row`] does. Returns `N`.
///
/// # Safety
/// As [`run`]; the panels are those of the rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_panels<B: Block, const N: usize>(
    product: &Product,
    panels: &[Panel],
    input: &Input,
    row: usize,
    first: usize,
    done: usize,
) -> usize {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_ps(); N];
    // SAFETY: vectors have as many blocks as there are panels.
    unsafe {
        let mut vectors = [input.vector(product, done); N];
        for i in 1..N {
            vectors[i] = input.vector(product, done + i);
        }
        for (b, panel) in panels.iter().enumerate() {
            let mut dots = [_mm256_setzero_si256(); N];
            for g in 0..8 {
                let numbers = _mm256_load_si256(panel.numbers[g].as_ptr().cast());
                for i in 0..N {
                    let four = vectors[i].numbers.add(b * BLOCK + 4 * g).cast::<i32>().read_unaligned();
                    let x = _mm256_set1_epi32(four);
                    dots[i] = if B::SIGNED {
                        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(numbers), _mm256_sign_epi8(x, numbers));
                        _mm256_add_epi32(dots[i], _mm256_madd_epi16(pairs, ones))
                    } else {
                        // At most 2 × 15 × 127 in size, so that eight of them fit in 16 bits.
                        _mm256_add_epi16(dots[i], _mm256_maddubs_epi16(numbers, x))
                    };
                }
            }
            let (scales, minima) = (_mm256_load_ps(panel.scales.as_ptr()), _mm256_load_ps(panel.minima.as_ptr()));
            for i in 0..N {
                let dot = if B::SIGNED { dots[i] } else { _mm256_madd_epi16(dots[i], ones) };
                let factor = _mm256_mul_ps(scales, _mm256_broadcast_ss(&*vectors[i].scales.add(b)));
                sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, sums[i]);
                if B::HAS_MIN {
                    sums[i] = _mm256_fmadd_ps(minima, _mm256_broadcast_ss(&*vectors[i].sums.add(b)), sums[i]);
                }
            }
        }
        for i in 0..N {
            let out = product.out.add((first + done + i) * product.out_bytes).cast::<f32>();
            _mm256_storeu_ps(out.add(row), sums[i]);
        }
    }
    N
}

/// Quantises a vector to eight bits in blocks of 32.
///
/// # Safety
/// `from` has 32 elements for each of `scales`, `numbers` has room for as many; the processor has the features.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize(from: *const f32, numbers: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
    for (b, ((numbers, scale), sum)) in numbers.chunks_exact_mut(BLOCK).zip(scales).zip(sums).enumerate() {
        // SAFETY: as the caller says.
        unsafe {
            let block = quantize_block(from.add(b * BLOCK));
            _mm256_storeu_si256(numbers.as_mut_ptr().cast(), block.numbers);
            *scale = block.scale;
            *sum = block.sum as f32 * block.scale;
        }
    }
}

/// 32 elements as 8-bit numbers with a scale.
pub(in crate::ggml) struct QuantizedBlock {
    pub numbers: __m256i,
    pub scale: f32,
    /// Of the numbers.
    pub sum: i32,
}

/// # Safety
/// 32 elements; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::ggml) unsafe fn quantize_block(from: *const f32) -> QuantizedBlock {
    let sign = _mm256_set1_ps(-0.0);
    let mut x = [_mm256_setzero_ps(); 4];
    let mut largest = _mm256_setzero_ps();
    for i in 0..4 {
        // SAFETY: as the caller says.
        x[i] = unsafe { _mm256_loadu_ps(from.add(8 * i)) };
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, x[i]));
    }
    let four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps::<1>(largest));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    let largest = _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    let factor = _mm256_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
    let mut whole = [_mm256_setzero_si256(); 4];
    for i in 0..4 {
        whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], factor));
    }
    let low = _mm256_packs_epi32(whole[0], whole[1]);
    let high = _mm256_packs_epi32(whole[2], whole[3]);
    // Packing works on each half of a register by itself; this puts the fours into their order.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let numbers = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    let total = _mm256_add_epi32(_mm256_add_epi32(whole[0], whole[1]), _mm256_add_epi32(whole[2], whole[3]));
    // Exact: the sum is 32 × 127 at most.
    let sum = sum_of_lanes(_mm256_cvtepi32_ps(total)) as i32;
    QuantizedBlock { numbers, scale: largest / 127.0, sum }
}
