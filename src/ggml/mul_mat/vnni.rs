//! For AVX-512 with VNNI: two blocks fill a register.

use std::{arch::x86_64::*, cell::RefCell};

use ggml_sys as sys;

use super::product::{Kernels, Product, TILE_BYTES};

pub struct Vnni;

impl Kernels for Vnni {
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

/// Two blocks of a quantised input, laid out as the weights of two blocks lie in a register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Pair {
    numbers: [i8; 64],
    /// The scale of the block that each lane's four numbers are of.
    scales: [f32; 16],
    /// What the sum of products starts from: it takes back that weights are stored with an offset.
    start: [i32; 16],
    /// Sums of the two blocks' elements in lanes 1 and 3, for weights that have a minimum.
    sums: [f32; 4],
}

/// How weights are stored in blocks of 32.
trait Block {
    const BYTES: usize;
    /// What is added to weights before they are stored, so that they are not negative.
    const OFFSET: i32;
    /// Whether blocks have a minimum beside the scale.
    const HAS_MIN: bool;
    /// Whether the second half of a block lies in the upper halves of the first half's bytes.
    const HALVES: bool;
    /// # Safety
    /// The block and the one after it exist; so do the features.
    unsafe fn unpack(block: *const u8) -> __m512i;
}

struct Q4_0;
struct Q4_1;
struct Q8_0;

/// Two times 16 bytes → 64 numbers: the first halves of both blocks, then the second halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn unpack_halves(first: *const u8, second: *const u8) -> __m512i {
    // SAFETY: both are good for 16 bytes.
    unsafe {
        let bytes = _mm256_inserti128_si256::<1>(
            _mm256_castsi128_si256(_mm_loadu_si128(first.cast())),
            _mm_loadu_si128(second.cast()),
        );
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), _mm256_srli_epi16::<4>(bytes));
        _mm512_and_si512(both, _mm512_set1_epi8(15))
    }
}

impl Block for Q4_0 {
    const BYTES: usize = 18;
    const OFFSET: i32 = 8;
    const HAS_MIN: bool = false;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8) -> __m512i {
        // SAFETY: a block is its scale and 16 bytes.
        unsafe { unpack_halves(block.add(2), block.add(20)) }
    }
}

impl Block for Q4_1 {
    const BYTES: usize = 20;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = true;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8) -> __m512i {
        // SAFETY: a block is its scale, its minimum and 16 bytes.
        unsafe { unpack_halves(block.add(4), block.add(24)) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn unpack_bytes(first: *const u8, second: *const u8) -> __m512i {
    // SAFETY: both are good for 32 bytes.
    unsafe {
        let bytes = _mm512_inserti64x4::<1>(
            _mm512_castsi256_si512(_mm256_loadu_si256(first.cast())),
            _mm256_loadu_si256(second.cast()),
        );
        // Adds 128, as the product wants numbers without a sign.
        _mm512_xor_si512(bytes, _mm512_set1_epi8(i8::MIN))
    }
}

impl Block for Q8_0 {
    const BYTES: usize = 34;
    const OFFSET: i32 = 128;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;
    #[inline(always)]
    unsafe fn unpack(block: *const u8) -> __m512i {
        // SAFETY: a block is its scale and 32 bytes.
        unsafe { unpack_bytes(block.add(2), block.add(36)) }
    }
}

thread_local! {
    /// The quantised input. It grows to the longest and stays.
    static INPUT: RefCell<Vec<Pair>> = const { RefCell::new(Vec::new()) };
}

/// # Safety
/// The pointers are good for what the fields say; the processor has the features.
unsafe fn run<B: Block>(product: &Product) {
    INPUT.with_borrow_mut(|pairs| {
        let per_vector = product.k / 64;
        let tile = (TILE_BYTES / (per_vector * size_of::<Pair>())).next_multiple_of(4).min(product.n);
        let empty = Pair { numbers: [0; 64], scales: [0.0; 16], start: [0; 16], sums: [0.0; 4] };
        if pairs.len() < tile * per_vector {
            pairs.resize(tile * per_vector, empty);
        }
        // SAFETY: as the caller says.
        unsafe {
            for first in (0..product.n).step_by(tile) {
                let n = tile.min(product.n - first);
                for (i, pairs) in pairs[..n * per_vector].chunks_exact_mut(per_vector).enumerate() {
                    quantize::<B>(product.input.add((first + i) * product.input_bytes).cast(), pairs);
                }
                multiply_tile::<B>(product, &pairs[..n * per_vector], first, n);
            }
        }
    });
}

/// Multiplies with the `n` vectors from number `first` on.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn multiply_tile<B: Block>(product: &Product, pairs: &[Pair], first: usize, n: usize) {
    let per_vector = product.k / 64;
    for row in product.rows.clone() {
        let mut done = 0;
        while done < n {
            let (pairs, first) = (&pairs[done * per_vector..], first + done);
            // SAFETY: as the caller says.
            done += unsafe {
                match n - done {
                    1 => multiply::<B, 1>(product, row, pairs, first),
                    2 => multiply::<B, 2>(product, row, pairs, first),
                    3 => multiply::<B, 3>(product, row, pairs, first),
                    _ => multiply::<B, 4>(product, row, pairs, first),
                }
            };
        }
    }
}

/// Multiplies a row with `N` vectors, of which the first has number `first`. Returns `N`.
///
/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn multiply<B: Block, const N: usize>(product: &Product, row: usize, pairs: &[Pair], first: usize) -> usize {
    let per_vector = product.k / 64;
    let pairs = pairs.as_ptr();
    // The lanes of the scales of two blocks, in `[scale, minimum, scale, minimum]` or `[scale, scale]`.
    let (a, b) = if B::HAS_MIN { (0, 2) } else { (0, 1) };
    let lanes = if B::HALVES {
        _mm512_set_epi32(b, b, b, b, a, a, a, a, b, b, b, b, a, a, a, a)
    } else {
        _mm512_set_epi32(b, b, b, b, b, b, b, b, a, a, a, a, a, a, a, a)
    };
    let mut sums = [_mm512_setzero_ps(); N];
    let mut minima = [_mm_setzero_ps(); N];
    // SAFETY: rows are `k` elements, that is `per_vector` pairs of blocks; so are the vectors.
    unsafe {
        let weights = product.weights.add(row * product.row_bytes);
        for p in 0..per_vector {
            let block = weights.add(p * 2 * B::BYTES);
            // Rows follow each other: what comes in some rows is asked for now.
            _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(2048).cast());
            let numbers = B::unpack(block);
            let next = block.add(B::BYTES);
            let halves = if B::HAS_MIN {
                let first = _mm_cvtsi32_si128(block.cast::<i32>().read_unaligned());
                _mm_insert_epi32::<1>(first, next.cast::<i32>().read_unaligned())
            } else {
                let first = _mm_cvtsi32_si128(i32::from(block.cast::<u16>().read_unaligned()));
                _mm_insert_epi16::<1>(first, i32::from(next.cast::<u16>().read_unaligned()))
            };
            let halves = _mm_cvtph_ps(halves);
            let scales = _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(halves));
            for i in 0..N {
                let input = &*pairs.add(i * per_vector + p);
                let start = match B::OFFSET {
                    0 => _mm512_setzero_si512(),
                    _ => _mm512_load_si512(input.start.as_ptr().cast()),
                };
                let product = _mm512_dpbusd_epi32(start, numbers, _mm512_load_si512(input.numbers.as_ptr().cast()));
                let factor = _mm512_mul_ps(scales, _mm512_load_ps(input.scales.as_ptr()));
                sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sums[i]);
                if B::HAS_MIN {
                    minima[i] = _mm_fmadd_ps(halves, _mm_load_ps(input.sums.as_ptr()), minima[i]);
                }
            }
        }
        for i in 0..N {
            let sum = _mm512_add_ps(sums[i], _mm512_zextps128_ps512(minima[i]));
            let out = product.out.add((first + i) * product.out_bytes).cast::<f32>();
            *out.add(row) = _mm512_reduce_add_ps(sum);
        }
    }
    N
}

/// Quantises a vector to eight bits in blocks of 32.
///
/// # Safety
/// `from` has 64 elements for each pair; the processor has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn quantize<B: Block>(from: *const f32, pairs: &mut [Pair]) {
    for (p, pair) in pairs.iter_mut().enumerate() {
        let mut quarters = [_mm_setzero_si128(); 4];
        let mut scales = [0.0; 2];
        for (block, scale) in scales.iter_mut().enumerate() {
            // SAFETY: as the caller says.
            let [low, high] = unsafe {
                let from = from.add(p * 64 + block * 32);
                [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))]
            };
            let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            *scale = largest / 127.0;
            let factor = _mm512_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            let low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, factor)));
            let high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, factor)));
            let (first, second) = if B::HALVES { (block, block + 2) } else { (2 * block, 2 * block + 1) };
            quarters[first] = low;
            quarters[second] = high;
        }
        let numbers = _mm512_inserti64x4::<1>(
            _mm512_castsi256_si512(_mm256_set_m128i(quarters[1], quarters[0])),
            _mm256_set_m128i(quarters[3], quarters[2]),
        );
        let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), numbers);
        let start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-B::OFFSET));
        // SAFETY: the fields are 64 bytes each.
        unsafe {
            _mm512_storeu_si512(pair.numbers.as_mut_ptr().cast(), numbers);
            _mm512_storeu_si512(pair.start.as_mut_ptr().cast(), start);
        }
        // Which block the four numbers of a lane are of: by halves 0 1 0 1 in fours, else 0 1 in eights.
        let second: __mmask16 = if B::HALVES { 0xf0f0 } else { 0xff00 };
        let lanes = _mm512_mask_blend_ps(second, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
        // SAFETY: 16 elements.
        unsafe { _mm512_storeu_ps(pair.scales.as_mut_ptr(), lanes) };
        let first_sum = _mm512_mask_reduce_add_epi32(!second, sums) as f32 * scales[0];
        let second_sum = _mm512_mask_reduce_add_epi32(second, sums) as f32 * scales[1];
        pair.sums = [0.0, first_sum, 0.0, second_sum];
    }
}
