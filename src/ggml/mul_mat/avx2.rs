//! For AVX2 with FMA and F16C, and with AVX-VNNI, which sums products of four in 32 bits.
//!
//! With few vectors rows are taken one at a time, 32 weights in a register. With many, panels of eight rows are
//! multiplied with four numbers of a vector at once: lanes are rows.
//!
//! Without AVX-VNNI weights of 8 bits get their sign back, and it is moved to the vector's numbers: products of two pairs of
//! full bytes would not fit in the 16 bits that the processor's sums of two have. Those of fewer bits do, so many at a time.
//!
//! Vectors are kept in arrays that loops with constant bounds index, as in `attention::kernels`.
#![allow(clippy::needless_range_loop)]

use std::{arch::x86_64::*, cell::RefCell};

use super::{
    formats::{Format, Layout, Q4_Kx8, Scales, q4_k_x8},
    input::{BLOCK, Slice, slices},
    product::{Column, Product},
    run::{Isa, Kernels},
    simd::{floats, sum_of_lanes},
};

/// A block of eight rows.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Panel {
    /// Four numbers of each row, eight times.
    numbers: [[u8; 32]; 8],
    /// Of each row's first and, where groups are 16 elements, second group.
    scales: [[f32; 8]; 2],
    minima: [[f32; 8]; 2],
}

thread_local! {
    static PANELS: RefCell<Vec<Panel>> = const { RefCell::new(Vec::new()) };
}

pub(super) struct Avx2;

/// With AVX-VNNI, too.
pub(super) struct AvxVnni;

/// The traits' functions for an instruction set, each compiled with its features; what they call is inlined into them.
macro_rules! kernels {
    ($isa:ident, $vnni:literal, $panels:literal, $features:literal) => {
        impl Isa for $isa {
            type Panel = Panel;
            const EMPTY: Panel = Panel { numbers: [[0; 32]; 8], scales: [[0.0; 8]; 2], minima: [[0.0; 8]; 2] };
            const ROWS: usize = 8;
            const PANELS: usize = $panels;

            fn with_panels(work: impl FnOnce(&mut Vec<Panel>)) {
                PANELS.with_borrow_mut(work);
            }

            #[target_feature(enable = $features)]
            unsafe fn multiply<F: Layout, const N: usize>(
                product: &Product,
                row: usize,
                slice: Slice,
                panels: &[Panel],
                columns: &[Column],
            ) {
                // SAFETY: as the caller says.
                unsafe {
                    if panels.len() == slice.len / BLOCK {
                        multiply::<F, $vnni, 1, N>(product, row, slice, panels, columns);
                    } else {
                        multiply::<F, $vnni, $panels, N>(product, row, slice, panels, columns);
                    }
                }
            }
        }

        impl<F: Format> Kernels<F> for $isa {
            /// Four rows at a time where blocks are short: then their scales are unpacked together.
            #[target_feature(enable = $features)]
            unsafe fn multiply_rows<const N: usize>(product: &Product) {
                let mut row = product.rows.start;
                // SAFETY: as the caller says.
                unsafe {
                    while F::STEP == 64 && row + 4 <= product.rows.end {
                        multiply_four_rows::<F, $vnni, N>(product, row);
                        row += 4;
                    }
                    for row in row..product.rows.end {
                        multiply_row::<F, $vnni, N>(product, row);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
                // SAFETY: as the caller says.
                unsafe { fill::<F, $vnni>(product, row, slice, panels) }
            }
        }

        impl Kernels<Q4_Kx8> for $isa {
            #[target_feature(enable = $features)]
            unsafe fn multiply_rows<const N: usize>(product: &Product) {
                for row in product.rows.clone().step_by(q4_k_x8::ROWS) {
                    // SAFETY: as the caller says; rows are a multiple of eight, threads' shares too.
                    unsafe { multiply_q4_k_x8::<$vnni, N>(product, row) }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
                // SAFETY: as the caller says.
                unsafe { fill_q4_k_x8(product, row, slice, panels) }
            }
        }
    };
}

kernels!(Avx2, false, 1, "avx2,fma,f16c");
kernels!(AvxVnni, true, 2, "avx2,fma,f16c,avxvnni");

/// Multiplies eight rows with `N` vectors: two lanes a row, four rows in a register.
///
/// # Safety
/// As [`Kernels::multiply_rows`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_q4_k_x8<const VNNI: bool, const N: usize>(product: &Product, row: usize) {
    let (fifteen, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let twice = [_mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)];
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
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
                    // By vector, group and half of the rows: sums of four, or of two, of at most 2 × 15 × 127, four of which fit together.
                    let mut dots = [[[_mm256_setzero_si256(); 2]; 2]; N];
                    for c in 4 * pair..4 * pair + 4 {
                        let from = block.add(q4_k_x8::NUMBERS + 64 * c);
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(q4_k_x8::AHEAD).cast());
                        for h in 0..2 {
                            let both = _mm256_loadu_si256(from.add(32 * h).cast());
                            let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(both), fifteen);
                            let numbers = [_mm256_and_si256(both, fifteen), upper];
                            for i in 0..N {
                                for g in 0..2 {
                                    let at = s * 256 + (2 * pair + g) * 32 + c % 4 * 8;
                                    let x =
                                        _mm256_set1_epi64x(vectors[i].numbers.add(at).cast::<i64>().read_unaligned());
                                    dots[i][g][h] = if VNNI {
                                        _mm256_dpbusd_avx_epi32(dots[i][g][h], numbers[g], x)
                                    } else {
                                        _mm256_add_epi16(dots[i][g][h], _mm256_maddubs_epi16(numbers[g], x))
                                    };
                                }
                            }
                        }
                    }
                    for g in 0..2 {
                        let group = 2 * pair + g;
                        let (scales, of_rows) = q4_k_x8::scales_of_rows(block, group);
                        for i in 0..N {
                            let factors =
                                _mm256_mul_ps(scales, _mm256_broadcast_ss(&*vectors[i].scales.add(s * 8 + group)));
                            for h in 0..2 {
                                let dots = dots[i][g][h];
                                let fours = if VNNI { dots } else { _mm256_madd_epi16(dots, ones) };
                                let dot = _mm256_cvtepi32_ps(fours);
                                let factor = _mm256_permutevar8x32_ps(factors, twice[h]);
                                sums[i][h] = _mm256_fmadd_ps(dot, factor, sums[i][h]);
                            }
                            let sum = _mm256_broadcast_ss(&*vectors[i].sums.add(s * 8 + group));
                            minima[i] = _mm256_fmadd_ps(of_rows, sum, minima[i]);
                        }
                    }
                }
            }
        }
        for i in 0..N {
            // Rows 0, 1, 4, 5 and 2, 3, 6, 7.
            let sum = _mm256_castps_pd(_mm256_hadd_ps(sums[i][0], sums[i][1]));
            let sum = _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(sum));
            _mm256_storeu_ps(product.columns[i].results.add(row), _mm256_add_ps(sum, minima[i]));
        }
    }
}

/// See [`Kernels::fill`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fill_q4_k_x8(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
    let fifteen = _mm256_set1_epi8(15);
    // SAFETY: rows have the slice's elements, and there is a panel for each of its blocks.
    unsafe {
        let rows = product.row(row);
        for (s, panels) in panels.chunks_exact_mut(8).enumerate() {
            let block = rows.add((slice.from / 256 + s) * q4_k_x8::BYTES);
            for (g, panel) in panels.iter_mut().enumerate() {
                let (scales, minima) = q4_k_x8::scales_of_rows(block, g);
                _mm256_store_ps(panel.scales[0].as_mut_ptr(), scales);
                _mm256_store_ps(panel.minima[0].as_mut_ptr(), minima);
            }
            for c in 0..16 {
                let from = block.add(q4_k_x8::NUMBERS + 64 * c);
                let mut a = _mm256_loadu_si256(from.cast());
                let mut b = _mm256_loadu_si256(from.add(32).cast());
                for g in 0..2 {
                    let x = _mm256_castsi256_ps(_mm256_and_si256(a, fifteen));
                    let y = _mm256_castsi256_ps(_mm256_and_si256(b, fifteen));
                    // Of each row's eight bytes the first four, and the last; rows 0, 1, 4, 5 and 2, 3, 6, 7.
                    let first = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(x, y));
                    let last = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(x, y));
                    let numbers = &mut panels[c / 4 * 2 + g].numbers[c % 4 * 2..];
                    let first = _mm256_permute4x64_epi64::<0b11_01_10_00>(first);
                    let last = _mm256_permute4x64_epi64::<0b11_01_10_00>(last);
                    _mm256_store_si256(numbers[0].as_mut_ptr().cast(), first);
                    _mm256_store_si256(numbers[1].as_mut_ptr().cast(), last);
                    (a, b) = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
                }
            }
        }
    }
}

/// Whether the kernels take numbers with their sign.
const fn is_signed<F: Layout, const VNNI: bool>() -> bool {
    F::BITS == 8 && !VNNI
}

/// 32 numbers as the kernels take them.
///
/// # Safety
/// As [`Format::unpack`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<F: Format, const VNNI: bool>(step: *const u8, part: usize) -> __m256i {
    // SAFETY: as the caller says.
    let numbers = unsafe { F::unpack(step, part) };
    if is_signed::<F, VNNI>() { _mm256_xor_si256(numbers, _mm256_set1_epi8(i8::MIN)) } else { numbers }
}

/// Products of numbers, in sums of two.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_of_two<F: Layout>(numbers: __m256i, x: __m256i) -> __m256i {
    if is_signed::<F, false>() {
        _mm256_maddubs_epi16(_mm256_abs_epi8(numbers), _mm256_sign_epi8(x, numbers))
    } else {
        _mm256_maddubs_epi16(numbers, x)
    }
}

/// Products of numbers, in sums of four.
///
/// # Safety
/// With `VNNI` the processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums_of_four<F: Layout, const VNNI: bool>(numbers: __m256i, x: __m256i) -> __m256i {
    if VNNI {
        // SAFETY: as the caller says.
        unsafe { _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), numbers, x) }
    } else {
        _mm256_madd_epi16(sums_of_two::<F>(numbers, x), _mm256_set1_epi16(1))
    }
}

/// Multiplies four rows with `N` vectors. A vector's result does not depend on `N`.
///
/// # Safety
/// As [`Kernels::multiply_rows`]; steps are 64 elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_four_rows<F: Format, const VNNI: bool, const N: usize>(product: &Product, row: usize) {
    let has_offset = F::OFFSET != 0 && !is_signed::<F, VNNI>();
    let mut sums = [[_mm256_setzero_ps(); 4]; N];
    let mut minima = [[_mm256_setzero_ps(); 2]; N];
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
                let scales = F::scales_of_four_rows(steps);
                let mut factors = [[_mm256_setzero_ps(); 2]; N];
                for i in 0..N {
                    let two = |of_blocks: *const f32| {
                        _mm256_castpd_ps(_mm256_set1_pd(of_blocks.add(2 * s).cast::<f64>().read_unaligned()))
                    };
                    let (of_vector, of_sums) = (two(vectors[i].scales), two(vectors[i].sums));
                    if F::HAS_MIN {
                        // Beside each scale is the minimum.
                        let of_vector = _mm256_unpacklo_ps(of_vector, of_vector);
                        let of_sums = _mm256_unpacklo_ps(_mm256_setzero_ps(), of_sums);
                        for h in 0..2 {
                            factors[i][h] = _mm256_mul_ps(scales[h], of_vector);
                            minima[i][h] = _mm256_fmadd_ps(scales[h], of_sums, minima[i][h]);
                        }
                    } else {
                        factors[i][0] = _mm256_mul_ps(scales[0], of_vector);
                        if has_offset {
                            minima[i][0] = _mm256_fmadd_ps(scales[0], of_sums, minima[i][0]);
                        }
                    }
                }
                for r in 0..4 {
                    // What comes in some rows is asked for now.
                    _mm_prefetch::<_MM_HINT_T0>(steps[r].wrapping_add(4 * product.row_bytes).cast());
                    for part in 0..2 {
                        let numbers = unpack::<F, VNNI>(steps[r], part);
                        let (half, lane) = if F::HAS_MIN { (r / 2, r % 2 * 4 + 2 * part) } else { (0, 2 * r + part) };
                        let lanes = _mm256_set1_epi32(lane as i32);
                        for i in 0..N {
                            let x = _mm256_loadu_si256(vectors[i].numbers.add(64 * s + BLOCK * part).cast());
                            let dot = _mm256_cvtepi32_ps(sums_of_four::<F, VNNI>(numbers, x));
                            let factor = _mm256_permutevar8x32_ps(factors[i][half], lanes);
                            sums[i][r] = _mm256_fmadd_ps(dot, factor, sums[i][r]);
                        }
                    }
                }
            }
        }
        for i in 0..N {
            let minima = floats(minima[i]);
            for r in 0..4 {
                let of_row = if F::HAS_MIN {
                    minima[4 * r + 1] + minima[4 * r + 3]
                } else {
                    -F::OFFSET as f32 * (minima[2 * r] + minima[2 * r + 1])
                };
                *product.columns[i].results.add(row + r) = sum_of_lanes(sums[i][r]) + of_row;
            }
        }
    }
}

/// Multiplies a row with `N` vectors. A vector's result does not depend on `N`. Sums are kept apart for even and odd
/// parts, so that an addition need not wait for the one before.
///
/// # Safety
/// As [`Kernels::multiply_rows`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_row<F: Format, const VNNI: bool, const N: usize>(product: &Product, row: usize) {
    let parts = F::STEP / BLOCK;
    let has_offset = F::OFFSET != 0 && !is_signed::<F, VNNI>();
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    let mut minima = [_mm256_setzero_ps(); N];
    // SAFETY: rows are `k` elements; so are the vectors.
    unsafe {
        for slice in slices(product.k) {
            let vectors = product.vectors::<N>(product.columns, slice);
            let weights = product.row(row).add(slice.from / F::STEP * F::BYTES);
            for s in 0..slice.len / F::STEP {
                let (step, at) = (weights.add(s * F::BYTES), s * F::STEP);
                let scales = F::scales(step);
                let mut factors = [[_mm256_setzero_ps(); 2]; N];
                for i in 0..N {
                    let of_vector = vectors[i].scales_of_step::<F>(at);
                    if F::GROUP == BLOCK {
                        factors[i][0] = _mm256_mul_ps(scales.scales[0], of_vector);
                        if F::HAS_MIN || has_offset {
                            let sums = vectors[i].sums_of_step::<F>(at, 0);
                            minima[i] = _mm256_fmadd_ps(scales.of_sums::<F>()[0], sums, minima[i]);
                        }
                    } else {
                        for half in 0..2 {
                            let first = 4 * half as i32;
                            let [a, b, c, d] = [first, first + 1, first + 2, first + 3];
                            let twice = _mm256_setr_epi32(a, a, b, b, c, c, d, d);
                            let of_groups = _mm256_permutevar8x32_ps(of_vector, twice);
                            factors[i][half] = _mm256_mul_ps(scales.scales[half], of_groups);
                            let sums = vectors[i].sums_of_step::<F>(at, half);
                            minima[i] = _mm256_fmadd_ps(scales.of_sums::<F>()[half], sums, minima[i]);
                        }
                    }
                }
                for part in 0..parts {
                    // Rows follow each other: what comes in some rows is asked for now.
                    _mm_prefetch::<_MM_HINT_T0>(step.wrapping_add(part * (F::BYTES / parts) + 2048).cast());
                    let numbers = unpack::<F, VNNI>(step, part);
                    let (half, lanes) = if F::GROUP == BLOCK {
                        (0, _mm256_set1_epi32(part as i32))
                    } else {
                        let a = 2 * (part % 4) as i32;
                        (part / 4, _mm256_setr_epi32(a, a, a, a, a + 1, a + 1, a + 1, a + 1))
                    };
                    for i in 0..N {
                        let x = _mm256_loadu_si256(vectors[i].numbers.add(at + BLOCK * part).cast());
                        let dot = _mm256_cvtepi32_ps(sums_of_four::<F, VNNI>(numbers, x));
                        let factor = _mm256_permutevar8x32_ps(factors[i][half], lanes);
                        sums[i][part % 2] = _mm256_fmadd_ps(dot, factor, sums[i][part % 2]);
                    }
                }
            }
        }
        for i in 0..N {
            let factor = if F::HAS_MIN { 1.0 } else { -F::OFFSET as f32 };
            let sum = _mm256_add_ps(sums[i][0], sums[i][1]);
            *product.columns[i].results.add(row) =
                sum_of_lanes(_mm256_fmadd_ps(minima[i], _mm256_set1_ps(factor), sum));
        }
    }
}

/// See [`Kernels::fill`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fill<F: Format, const VNNI: bool>(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
    let groups = F::STEP / F::GROUP;
    // SAFETY: rows have the slice's elements, and there is a panel for each of its blocks.
    unsafe {
        let mut steps = [product.row(row).add(slice.from / F::STEP * F::BYTES); 8];
        for r in 1..8 {
            let row = (row + r).min(product.rows.end - 1);
            steps[r] = product.row(row).add(slice.from / F::STEP * F::BYTES);
        }
        for panels in panels.chunks_exact_mut(F::STEP / BLOCK) {
            for r in 0..8 {
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
            for part in 0..F::STEP / BLOCK {
                let mut rows = [_mm256_setzero_si256(); 8];
                for r in 0..8 {
                    rows[r] = unpack::<F, VNNI>(steps[r], part);
                }
                let columns = transpose(rows);
                for c in 0..8 {
                    _mm256_store_si256(panels[part].numbers[c].as_mut_ptr().cast(), columns[c]);
                }
            }
            for r in 0..8 {
                steps[r] = steps[r].wrapping_add(F::BYTES);
            }
        }
    }
}

/// Eight rows of eight groups of four numbers → eight groups of eight rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(rows: [__m256i; 8]) -> [__m256i; 8] {
    let mut twos = [_mm256_setzero_si256(); 8];
    for r in (0..8).step_by(2) {
        twos[r] = _mm256_unpacklo_epi32(rows[r], rows[r + 1]);
        twos[r + 1] = _mm256_unpackhi_epi32(rows[r], rows[r + 1]);
    }
    let mut fours = [_mm256_setzero_si256(); 8];
    for r in [0, 4] {
        fours[r] = _mm256_unpacklo_epi64(twos[r], twos[r + 2]);
        fours[r + 1] = _mm256_unpackhi_epi64(twos[r], twos[r + 2]);
        fours[r + 2] = _mm256_unpacklo_epi64(twos[r + 1], twos[r + 3]);
        fours[r + 3] = _mm256_unpackhi_epi64(twos[r + 1], twos[r + 3]);
    }
    let mut columns = [_mm256_setzero_si256(); 8];
    for c in 0..4 {
        columns[c] = _mm256_permute2x128_si256::<0x20>(fours[c], fours[c + 4]);
        columns[c + 4] = _mm256_permute2x128_si256::<0x31>(fours[c], fours[c + 4]);
    }
    columns
}

/// Multiplies `P` panels with the `N` vectors of `columns`. A vector's result depends on neither number.
///
/// # Safety
/// As [`Isa::multiply`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<F: Layout, const VNNI: bool, const P: usize, const N: usize>(
    product: &Product,
    row: usize,
    slice: Slice,
    panels: &[Panel],
    columns: &[Column],
) {
    // Sums of two that fit into 16 bits together: of numbers of 4 bits 2 × 15 × 127 eight times.
    let together = match F::BITS {
        ..=4 => F::GROUP / 4,
        5 => 4,
        6 => 2,
        _ => 1,
    };
    let (has_offset, ones) = (F::OFFSET != 0 && !is_signed::<F, VNNI>(), _mm256_set1_epi16(1));
    let blocks = slice.len / BLOCK;
    // SAFETY: vectors have as many blocks as each panel; results have an element for each row.
    unsafe {
        let vectors = product.vectors::<N>(columns, slice);
        let mut results = [columns[0].results; N];
        for i in 0..N {
            results[i] = columns[i].results.add(row);
        }
        let rows = _mm256_set1_epi32((product.rows.end - row).min(8 * P) as i32);
        let mut masks = [_mm256_setzero_si256(); P];
        for p in 0..P {
            let before = _mm256_set1_epi32(8 * p as i32);
            masks[p] = _mm256_cmpgt_epi32(rows, _mm256_add_epi32(before, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
        }
        let mut sums = [[_mm256_setzero_ps(); P]; N];
        if slice.from > 0 {
            for i in 0..N {
                for p in 0..P {
                    sums[i][p] = _mm256_maskload_ps(results[i].wrapping_add(8 * p), masks[p]);
                }
            }
        }
        for b in 0..blocks {
            let mut of_panels = [panels.as_ptr().add(b); P];
            for p in 0..P {
                of_panels[p] = panels.as_ptr().add(p * blocks + b);
            }
            let mut of_block = [[_mm256_setzero_ps(); P]; N];
            for group in 0..BLOCK / F::GROUP {
                let mut dots = [[_mm256_setzero_si256(); P]; N];
                for g in (group * F::GROUP / 4..(group + 1) * F::GROUP / 4).step_by(together) {
                    let mut pairs = [[_mm256_setzero_si256(); P]; N];
                    for g in g..g + together {
                        let mut numbers = [_mm256_setzero_si256(); P];
                        for p in 0..P {
                            numbers[p] = _mm256_load_si256((*of_panels[p]).numbers[g].as_ptr().cast());
                        }
                        for i in 0..N {
                            let four = vectors[i].numbers.add(b * BLOCK + 4 * g).cast::<i32>().read_unaligned();
                            let four = _mm256_set1_epi32(four);
                            for p in 0..P {
                                if VNNI {
                                    dots[i][p] = _mm256_dpbusd_avx_epi32(dots[i][p], numbers[p], four);
                                } else {
                                    pairs[i][p] = _mm256_add_epi16(pairs[i][p], sums_of_two::<F>(numbers[p], four));
                                }
                            }
                        }
                    }
                    for i in 0..N {
                        for p in 0..P {
                            if !VNNI {
                                dots[i][p] = _mm256_add_epi32(dots[i][p], _mm256_madd_epi16(pairs[i][p], ones));
                            }
                        }
                    }
                }
                for p in 0..P {
                    let scales = _mm256_load_ps((*of_panels[p]).scales[group].as_ptr());
                    for i in 0..N {
                        let mut dot = dots[i][p];
                        if has_offset {
                            let start = _mm256_set1_epi32(*vectors[i].starts.add(b * (BLOCK / F::GROUP) + group));
                            dot = _mm256_add_epi32(dot, start);
                        }
                        let dot = _mm256_cvtepi32_ps(dot);
                        let before = of_block[i][p];
                        of_block[i][p] =
                            if group == 0 { _mm256_mul_ps(dot, scales) } else { _mm256_fmadd_ps(dot, scales, before) };
                    }
                }
            }
            for i in 0..N {
                let scale = _mm256_broadcast_ss(&*vectors[i].scales.add(b));
                for p in 0..P {
                    sums[i][p] = _mm256_fmadd_ps(of_block[i][p], scale, sums[i][p]);
                }
            }
            if F::HAS_MIN {
                for group in 0..BLOCK / F::GROUP {
                    for i in 0..N {
                        let sum = _mm256_broadcast_ss(&*vectors[i].sums.add(b * (BLOCK / F::GROUP) + group));
                        for p in 0..P {
                            let minima = _mm256_load_ps((*of_panels[p]).minima[group].as_ptr());
                            sums[i][p] = _mm256_fmadd_ps(minima, sum, sums[i][p]);
                        }
                    }
                }
            }
        }
        for i in 0..N {
            for p in 0..P {
                _mm256_maskstore_ps(results[i].wrapping_add(8 * p), masks[p], sums[i][p]);
            }
        }
    }
}
