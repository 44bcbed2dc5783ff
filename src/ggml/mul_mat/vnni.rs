//! For AVX-512 with VNNI.
//!
//! With few vectors rows are taken one at a time, 64 weights in a register. With many, panels of 16 rows are multiplied
//! with four numbers of a vector at once: lanes are rows.
//!
//! Vectors are kept in arrays that loops with constant bounds index, as in `attention::kernels`.
#![allow(clippy::needless_range_loop)]

use std::{arch::x86_64::*, cell::RefCell};

use super::{
    formats::{Format, Layout, Q4_Kx8, Scales, q4_k_x8},
    input::{BLOCK, Slice, slices},
    product::{Column, Product},
    run::{Isa, Kernels},
    simd::floats,
};

pub(super) struct Vnni;

/// A block of 16 rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Panel {
    /// Four numbers of each row, eight times.
    numbers: [[u8; 64]; 8],
    /// Of each row's first and, where groups are 16 elements, second group.
    scales: [[f32; 16]; 2],
    minima: [[f32; 16]; 2],
}

thread_local! {
    static PANELS: RefCell<Vec<Panel>> = const { RefCell::new(Vec::new()) };
}

impl Isa for Vnni {
    type Panel = Panel;
    const EMPTY: Panel = Panel { numbers: [[0; 64]; 8], scales: [[0.0; 16]; 2], minima: [[0.0; 16]; 2] };
    const ROWS: usize = 16;
    const PANELS: usize = 2;

    fn with_panels(work: impl FnOnce(&mut Vec<Panel>)) {
        PANELS.with_borrow_mut(work);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn multiply<F: Layout, const N: usize>(
        product: &Product,
        row: usize,
        slice: Slice,
        panels: &[Panel],
        columns: &[Column],
    ) {
        // SAFETY: as the caller says.
        unsafe {
            if panels.len() > slice.len / BLOCK {
                multiply::<F, 2, N>(product, row, slice, panels, columns);
            } else {
                multiply::<F, 1, N>(product, row, slice, panels, columns);
            }
        }
    }
}

impl<F: Format> Kernels<F> for Vnni {
    /// Four rows at a time where blocks are short: then their scales are unpacked together.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn multiply_rows<const N: usize>(product: &Product) {
        let mut row = product.rows.start;
        // SAFETY: as the caller says.
        unsafe {
            while F::STEP == 64 && row + 4 <= product.rows.end {
                multiply_four_rows::<F, N>(product, row);
                row += 4;
            }
            for row in row..product.rows.end {
                multiply_row::<F, N>(product, row);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
        // SAFETY: as the caller says.
        unsafe { fill::<F>(product, row, slice, panels) }
    }
}

impl Kernels<Q4_Kx8> for Vnni {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn multiply_rows<const N: usize>(product: &Product) {
        for row in product.rows.clone().step_by(q4_k_x8::ROWS) {
            // SAFETY: as the caller says; rows are a multiple of eight, threads' shares too.
            unsafe { multiply_q4_k_x8::<N>(product, row) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
        // SAFETY: as the caller says.
        unsafe { fill_q4_k_x8(product, row, slice, panels) }
    }
}

/// Multiplies eight rows with `N` vectors: two lanes a row, for eight of a row's numbers each.
///
/// # Safety
/// As [`Kernels::multiply_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn multiply_q4_k_x8<const N: usize>(product: &Product, row: usize) {
    let (fifteen, twice) = (_mm512_set1_epi8(15), _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0));
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    let mut minima = [_mm256_setzero_ps(); N];
    // SAFETY: rows are `k` elements; so are the vectors.
    unsafe {
        for slice in slices(product.k) {
            let vectors = product.vectors::<N>(product.columns, slice);
            let weights = product.row(row).add(slice.from / 256 * q4_k_x8::BYTES);
            for s in 0..slice.len / 256 {
                let block = weights.add(s * q4_k_x8::BYTES);
                for line in 0..q4_k_x8::NUMBERS / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(q4_k_x8::AHEAD + 64 * line).cast());
                }
                for pair in 0..4 {
                    let mut dots = [[_mm512_setzero_si512(); 2]; N];
                    for c in 4 * pair..4 * pair + 4 {
                        let from = block.add(q4_k_x8::NUMBERS + 64 * c);
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(q4_k_x8::AHEAD).cast());
                        let both = _mm512_loadu_si512(from.cast());
                        let numbers =
                            [_mm512_and_si512(both, fifteen), _mm512_and_si512(_mm512_srli_epi16::<4>(both), fifteen)];
                        for i in 0..N {
                            for g in 0..2 {
                                let at = s * 256 + (2 * pair + g) * 32 + c % 4 * 8;
                                let x = _mm512_set1_epi64(vectors[i].numbers.add(at).cast::<i64>().read_unaligned());
                                dots[i][g] = _mm512_dpbusd_epi32(dots[i][g], numbers[g], x);
                            }
                        }
                    }
                    for g in 0..2 {
                        let group = 2 * pair + g;
                        let (scales, of_rows) = q4_k_x8::scales_of_rows(block, group);
                        let scales = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(scales));
                        for i in 0..N {
                            let factor = _mm512_mul_ps(scales, _mm512_set1_ps(*vectors[i].scales.add(s * 8 + group)));
                            sums[i][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i][g]), factor, sums[i][g]);
                            let sum = _mm256_set1_ps(*vectors[i].sums.add(s * 8 + group));
                            minima[i] = _mm256_fmadd_ps(of_rows, sum, minima[i]);
                        }
                    }
                }
            }
        }
        for i in 0..N {
            let sum = _mm512_add_ps(sums[i][0], sums[i][1]);
            let sum = _mm512_add_ps(sum, _mm512_movehdup_ps(sum));
            let even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
            let sum = _mm512_castps512_ps256(_mm512_permutexvar_ps(even, sum));
            _mm256_storeu_ps(product.columns[i].results.add(row), _mm256_add_ps(sum, minima[i]));
        }
    }
}

/// See [`Kernels::fill`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn fill_q4_k_x8(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
    let fifteen = _mm512_set1_epi8(15);
    // Of each row's eight bytes the first four, and the last.
    let first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let last = _mm512_or_si512(first, _mm512_set1_epi32(1));
    // SAFETY: rows have the slice's elements, and there is a panel for each of its blocks.
    unsafe {
        let next = if row + q4_k_x8::ROWS < product.rows.end { row + q4_k_x8::ROWS } else { row };
        let (rows, next) = (product.row(row), product.row(next));
        for (s, panels) in panels.chunks_exact_mut(8).enumerate() {
            let at = (slice.from / 256 + s) * q4_k_x8::BYTES;
            let blocks = [rows.add(at), next.add(at)];
            for (g, panel) in panels.iter_mut().enumerate() {
                for h in 0..2 {
                    let (scales, minima) = q4_k_x8::scales_of_rows(blocks[h], g);
                    _mm256_storeu_ps(panel.scales[0].as_mut_ptr().add(8 * h), scales);
                    _mm256_storeu_ps(panel.minima[0].as_mut_ptr().add(8 * h), minima);
                }
            }
            for c in 0..16 {
                let mut a = _mm512_loadu_si512(blocks[0].add(q4_k_x8::NUMBERS + 64 * c).cast());
                let mut b = _mm512_loadu_si512(blocks[1].add(q4_k_x8::NUMBERS + 64 * c).cast());
                for g in 0..2 {
                    let (x, y) = (_mm512_and_si512(a, fifteen), _mm512_and_si512(b, fifteen));
                    let numbers = &mut panels[c / 4 * 2 + g].numbers[c % 4 * 2..];
                    _mm512_store_si512(numbers[0].as_mut_ptr().cast(), _mm512_permutex2var_epi32(x, first, y));
                    _mm512_store_si512(numbers[1].as_mut_ptr().cast(), _mm512_permutex2var_epi32(x, last, y));
                    (a, b) = (_mm512_srli_epi16::<4>(a), _mm512_srli_epi16::<4>(b));
                }
            }
        }
    }
}

/// Multiplies four rows with `N` vectors. A vector's result does not depend on `N`.
///
/// # Safety
/// As [`Kernels::multiply_rows`]; steps are 64 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn multiply_four_rows<F: Format, const N: usize>(product: &Product, row: usize) {
    let mut sums = [[_mm512_setzero_ps(); 4]; N];
    let mut minima = [_mm512_setzero_ps(); N];
    // SAFETY: rows are `k` elements; so are the vectors.
    unsafe {
        for slice in slices(product.k) {
            let vectors = product.vectors::<N>(product.columns, slice);
            let weights = product.row(row).add(slice.from / 64 * F::BYTES);
            for s in 0..slice.len / 64 {
                let first = weights.add(s * F::BYTES);
                let mut steps = [first; 4];
                for r in 1..4 {
                    steps[r] = first.add(r * product.row_bytes);
                }
                let scales = F::scales_of_four_rows_512(steps);
                let mut factors = [_mm512_setzero_ps(); N];
                for i in 0..N {
                    let of_vector =
                        _mm512_castpd_ps(_mm512_set1_pd(vectors[i].scales.add(2 * s).cast::<f64>().read_unaligned()));
                    let sums =
                        _mm512_castpd_ps(_mm512_set1_pd(vectors[i].sums.add(2 * s).cast::<f64>().read_unaligned()));
                    if F::HAS_MIN {
                        // Beside each scale is the minimum.
                        factors[i] = _mm512_mul_ps(scales, _mm512_unpacklo_ps(of_vector, of_vector));
                        let sums = _mm512_unpacklo_ps(_mm512_setzero_ps(), sums);
                        minima[i] = _mm512_fmadd_ps(scales, sums, minima[i]);
                    } else {
                        factors[i] = _mm512_mul_ps(scales, of_vector);
                        minima[i] = _mm512_fmadd_ps(scales, sums, minima[i]);
                    }
                }
                for r in 0..4 {
                    // What comes in some rows is asked for now.
                    _mm_prefetch::<_MM_HINT_T0>(steps[r].wrapping_add(4 * product.row_bytes).cast());
                    let numbers = F::unpack_pair(steps[r], 0);
                    let lane = if F::HAS_MIN { 4 * r as i32 } else { 2 * r as i32 };
                    let (a, b) = (lane, if F::HAS_MIN { lane + 2 } else { lane + 1 });
                    let lanes = _mm512_set_epi32(b, b, b, b, b, b, b, b, a, a, a, a, a, a, a, a);
                    for i in 0..N {
                        let x = _mm512_loadu_si512(vectors[i].numbers.add(64 * s).cast());
                        let dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), numbers, x));
                        sums[i][r] = _mm512_fmadd_ps(dot, _mm512_permutexvar_ps(lanes, factors[i]), sums[i][r]);
                    }
                }
            }
        }
        for i in 0..N {
            let sums = sums_of_lanes(sums[i]);
            // Of rows: fours of lanes, or the first twos.
            let minima = if F::HAS_MIN {
                minima[i]
            } else {
                let twos = _mm512_set_epi32(8, 8, 7, 6, 8, 8, 5, 4, 8, 8, 3, 2, 8, 8, 1, 0);
                _mm512_mul_ps(_mm512_permutexvar_ps(twos, minima[i]), _mm512_set1_ps(-F::OFFSET as f32))
            };
            let [a, b] = [_mm512_castps512_ps128(minima), _mm512_extractf32x4_ps::<1>(minima)];
            let [c, d] = [_mm512_extractf32x4_ps::<2>(minima), _mm512_extractf32x4_ps::<3>(minima)];
            _mm_storeu_ps(product.columns[i].results.add(row), _mm_add_ps(sums, sums_of_fours(a, b, c, d)));
        }
    }
}

/// The sum of each register's lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
fn sums_of_lanes(x: [__m512; 4]) -> __m128 {
    let mut fours = [_mm_setzero_ps(); 4];
    for r in 0..4 {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(x[r]), _mm512_extractf32x8_ps::<1>(x[r]));
        fours[r] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    }
    sums_of_fours(fours[0], fours[1], fours[2], fours[3])
}

/// The sum of each register's lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
fn sums_of_fours(a: __m128, b: __m128, c: __m128, d: __m128) -> __m128 {
    let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab))
}

/// Multiplies a row with `N` vectors. A vector's result does not depend on `N`.
///
/// # Safety
/// As [`Kernels::multiply_rows`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn multiply_row<F: Format, const N: usize>(product: &Product, row: usize) {
    let pairs = F::STEP / 64;
    let mut sums = [_mm512_setzero_ps(); N];
    let mut minima = [_mm256_setzero_ps(); N];
    // SAFETY: rows are `k` elements; so are the vectors.
    unsafe {
        for slice in slices(product.k) {
            let vectors = product.vectors::<N>(product.columns, slice);
            let weights = product.row(row).add(slice.from / F::STEP * F::BYTES);
            for s in 0..slice.len / F::STEP {
                let (step, at) = (weights.add(s * F::BYTES), s * F::STEP);
                let scales = F::scales(step);
                let mut factors = [_mm512_setzero_ps(); N];
                for i in 0..N {
                    let of_vector = vectors[i].scales_of_step::<F>(at);
                    if F::GROUP == 32 {
                        factors[i] = _mm512_zextps256_ps512(_mm256_mul_ps(scales.scales[0], of_vector));
                        if F::HAS_MIN || F::OFFSET != 0 {
                            let sums = vectors[i].sums_of_step::<F>(at, 0);
                            minima[i] = _mm256_fmadd_ps(scales.of_sums::<F>()[0], sums, minima[i]);
                        }
                    } else {
                        let both = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(scales.scales[0]), scales.scales[1]);
                        let twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
                        let of_vector = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(of_vector));
                        factors[i] = _mm512_mul_ps(both, of_vector);
                        for part in 0..2 {
                            let sums = vectors[i].sums_of_step::<F>(at, part);
                            minima[i] = _mm256_fmadd_ps(scales.of_sums::<F>()[part], sums, minima[i]);
                        }
                    }
                }
                for p in 0..pairs {
                    // Rows follow each other: what comes in some rows is asked for now.
                    _mm_prefetch::<_MM_HINT_T0>(step.wrapping_add(p * (F::BYTES / pairs) + 2048).cast());
                    let numbers = F::unpack_pair(step, p);
                    let lanes = if F::GROUP == 32 {
                        let (a, b) = (2 * p as i32, 2 * p as i32 + 1);
                        _mm512_set_epi32(b, b, b, b, b, b, b, b, a, a, a, a, a, a, a, a)
                    } else {
                        let [a, b, c, d] = [4 * p as i32, 4 * p as i32 + 1, 4 * p as i32 + 2, 4 * p as i32 + 3];
                        _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a)
                    };
                    for i in 0..N {
                        let x = _mm512_loadu_si512(vectors[i].numbers.add(at + 64 * p).cast());
                        let dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), numbers, x));
                        sums[i] = _mm512_fmadd_ps(dot, _mm512_permutexvar_ps(lanes, factors[i]), sums[i]);
                    }
                }
            }
        }
        for i in 0..N {
            let factor = if F::HAS_MIN { 1.0 } else { -F::OFFSET as f32 };
            let minima = _mm512_zextps256_ps512(minima[i]);
            let sum = _mm512_fmadd_ps(minima, _mm512_set1_ps(factor), sums[i]);
            *product.columns[i].results.add(row) = _mm512_reduce_add_ps(sum);
        }
    }
}

/// See [`Kernels::fill`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn fill<F: Format>(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
    let groups = F::STEP / F::GROUP;
    // SAFETY: rows have the slice's elements, and there is a panel for each of its blocks.
    unsafe {
        let mut steps = [product.row(row).add(slice.from / F::STEP * F::BYTES); 16];
        for r in 1..16 {
            let row = (row + r).min(product.rows.end - 1);
            steps[r] = product.row(row).add(slice.from / F::STEP * F::BYTES);
        }
        for panels in panels.chunks_exact_mut(F::STEP / BLOCK) {
            for r in 0..16 {
                let Scales { scales, minima } = F::scales(steps[r]);
                let scales = floats(scales);
                for g in 0..groups {
                    panels[g * F::GROUP / BLOCK].scales[g % (BLOCK / F::GROUP)][r] = scales[g];
                }
                if F::HAS_MIN {
                    let minima = floats(minima);
                    for g in 0..groups {
                        panels[g * F::GROUP / BLOCK].minima[g % (BLOCK / F::GROUP)][r] = minima[g];
                    }
                }
            }
            for p in 0..F::STEP / 64 {
                let mut rows = [_mm512_setzero_si512(); 16];
                for r in 0..16 {
                    rows[r] = F::unpack_pair(steps[r], p);
                }
                let columns = transpose(rows);
                for c in 0..16 {
                    _mm512_store_si512(panels[2 * p + c / 8].numbers[c % 8].as_mut_ptr().cast(), columns[c]);
                }
            }
            for r in 0..16 {
                steps[r] = steps[r].wrapping_add(F::BYTES);
            }
        }
    }
}

/// 16 rows of 16 groups of four numbers → 16 groups of 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Within each quarter of a register, of four rows at a time.
    let mut fours = [_mm512_setzero_si512(); 16];
    for q in 0..4 {
        let [a, b, c, d] = [rows[4 * q], rows[4 * q + 1], rows[4 * q + 2], rows[4 * q + 3]];
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (next_low, next_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        fours[4 * q] = _mm512_unpacklo_epi64(low, next_low);
        fours[4 * q + 1] = _mm512_unpackhi_epi64(low, next_low);
        fours[4 * q + 2] = _mm512_unpacklo_epi64(high, next_high);
        fours[4 * q + 3] = _mm512_unpackhi_epi64(high, next_high);
    }
    // Then the quarters themselves.
    let mut columns = [_mm512_setzero_si512(); 16];
    for c in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(fours[c], fours[4 + c]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[c], fours[4 + c]);
        let next_even = _mm512_shuffle_i32x4::<0x88>(fours[8 + c], fours[12 + c]);
        let next_odd = _mm512_shuffle_i32x4::<0xdd>(fours[8 + c], fours[12 + c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even, next_even);
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, next_odd);
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, next_even);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, next_odd);
    }
    columns
}

/// Multiplies `P` panels with the `N` vectors of `columns`. A vector's result does not depend on `N`.
///
/// # Safety
/// As [`Isa::multiply`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
unsafe fn multiply<F: Layout, const P: usize, const N: usize>(
    product: &Product,
    row: usize,
    slice: Slice,
    panels: &[Panel],
    columns: &[Column],
) {
    let blocks = slice.len / BLOCK;
    // SAFETY: vectors have as many blocks as a row has panels; results have an element for each row.
    unsafe {
        let vectors = product.vectors::<N>(columns, slice);
        let mut results = [columns[0].results; N];
        for i in 0..N {
            results[i] = columns[i].results.add(row);
        }
        let mut masks = [0u16; P];
        for p in 0..P {
            masks[p] = u16::MAX >> (16 - (product.rows.end - row - 16 * p).min(16));
        }
        let mut sums = [[_mm512_setzero_ps(); N]; P];
        if slice.from > 0 {
            for p in 0..P {
                for i in 0..N {
                    sums[p][i] = _mm512_maskz_loadu_ps(masks[p], results[i].add(16 * p));
                }
            }
        }
        let panels = panels.as_ptr();
        for b in 0..blocks {
            let mut of_rows = [&*panels.add(b); P];
            for p in 1..P {
                of_rows[p] = &*panels.add(p * blocks + b);
            }
            let mut of_block = [[_mm512_setzero_ps(); N]; P];
            for group in 0..BLOCK / F::GROUP {
                let mut dots = [[_mm512_setzero_si512(); N]; P];
                if F::OFFSET != 0 {
                    for i in 0..N {
                        let start = _mm512_set1_epi32(*vectors[i].starts.add(b * (BLOCK / F::GROUP) + group));
                        for p in 0..P {
                            dots[p][i] = start;
                        }
                    }
                }
                for g in group * F::GROUP / 4..(group + 1) * F::GROUP / 4 {
                    let mut numbers = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        numbers[p] = _mm512_load_si512(of_rows[p].numbers[g].as_ptr().cast());
                    }
                    for i in 0..N {
                        let four = vectors[i].numbers.add(b * BLOCK + 4 * g).cast::<i32>().read_unaligned();
                        for p in 0..P {
                            dots[p][i] = _mm512_dpbusd_epi32(dots[p][i], numbers[p], _mm512_set1_epi32(four));
                        }
                    }
                }
                for p in 0..P {
                    let scales = _mm512_load_ps(of_rows[p].scales[group].as_ptr());
                    for i in 0..N {
                        let dot = _mm512_cvtepi32_ps(dots[p][i]);
                        of_block[p][i] = if group == 0 {
                            _mm512_mul_ps(dot, scales)
                        } else {
                            _mm512_fmadd_ps(dot, scales, of_block[p][i])
                        };
                    }
                }
            }
            for i in 0..N {
                let scale = _mm512_set1_ps(*vectors[i].scales.add(b));
                for p in 0..P {
                    sums[p][i] = _mm512_fmadd_ps(of_block[p][i], scale, sums[p][i]);
                }
                if F::HAS_MIN {
                    for group in 0..BLOCK / F::GROUP {
                        let sum = _mm512_set1_ps(*vectors[i].sums.add(b * (BLOCK / F::GROUP) + group));
                        for p in 0..P {
                            let minima = _mm512_load_ps(of_rows[p].minima[group].as_ptr());
                            sums[p][i] = _mm512_fmadd_ps(minima, sum, sums[p][i]);
                        }
                    }
                }
            }
        }
        for p in 0..P {
            for i in 0..N {
                _mm512_mask_storeu_ps(results[i].add(16 * p), masks[p], sums[p][i]);
            }
        }
    }
}
