//! For 64-bit Arm: NEON, which all such processors have, and what some have beside it for products of 8-bit numbers.
//!
//! With few vectors rows are taken one at a time, 16 weights in a register. With many, panels of eight rows are multiplied
//! with some numbers of a vector at once: lanes are rows. Numbers have their sign, so that sums need no correction. `dots`
//! has what depends on the processor; whole numbers are summed exactly and floats always in the same order, so that all
//! processors give the same bits.
//!
//! Vectors are kept in arrays that loops with constant bounds index, as in `attention::kernels`.
#![allow(clippy::needless_range_loop)]

mod dots;
pub(super) mod formats;
mod quantize;

use std::{
    arch::{aarch64::*, asm},
    cell::RefCell,
    marker::PhantomData,
};

use self::{
    dots::{DotProd, Dots, I8mm, Neon},
    formats::*,
    quantize::quantize,
};
use super::{
    input::{BLOCK, Slice, slices},
    kernel::Kernel,
    product::{Column, Product},
    run::{Isa, Kernels, run},
};
use crate::ggml::{Type, processor::Features};

/// The kernel for weights of this type, as in a file or as ggml repacks them, with these features; `None` where ggml's is used.
pub(super) fn kernel(ty: Type, is_repacked: bool, features: Features) -> Option<&'static Kernel> {
    struct Of<D, F>(PhantomData<(D, F)>);
    impl<D: Dots, F: Format> Of<D, F> {
        const KERNEL: &Kernel =
            &Kernel { run: run::<D, F>, quantize, scheme: F::SCHEME, step: F::STEP, max_tokens: usize::MAX };
    }
    fn of<F: Format>(features: Features) -> Option<&'static Kernel> {
        match features {
            Features::Portable => None,
            Features::Neon => Some(Of::<Neon, F>::KERNEL),
            Features::DotProd => Some(Of::<DotProd, F>::KERNEL),
            Features::I8mm => Some(Of::<I8mm, F>::KERNEL),
        }
    }
    match ty {
        // ggml's kernels for what it repacks are written for these processors.
        _ if is_repacked => None,
        Type::Q4_0 => of::<Q4_0>(features),
        Type::Q4_1 => of::<Q4_1>(features),
        Type::Q5_0 => of::<Q5_0>(features),
        Type::Q5_1 => of::<Q5_1>(features),
        Type::Q8_0 => of::<Q8_0>(features),
        Type::Q4_K => of::<Q4_K>(features),
        Type::Q5_K => of::<Q5_K>(features),
        Type::Q6_K => of::<Q6_K>(features),
        Type::Q2_K => of::<Q2_K>(features),
        Type::Q3_K => of::<Q3_K>(features),
        Type::IQ4_NL => of::<IQ4_NL>(features),
        Type::IQ4_XS => of::<IQ4_XS>(features),
        Type::MXFP4 => of::<Mxfp4>(features),
        _ => None,
    }
}

/// A block of eight rows.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Panel {
    /// As [`Dots::arrange`] has put them.
    numbers: [[i8; 16]; 16],
    /// Of each row's first and, where groups are 16 elements, second group.
    scales: [[f32; 8]; 2],
    minima: [[f32; 8]; 2],
}

thread_local! {
    static PANELS: RefCell<Vec<Panel>> = const { RefCell::new(Vec::new()) };
}

impl<D: Dots> Isa for D {
    type Panel = Panel;
    const EMPTY: Panel = Panel { numbers: [[0; 16]; 16], scales: [[0.0; 8]; 2], minima: [[0.0; 8]; 2] };
    const ROWS: usize = 8;
    const PANELS: usize = 1;

    fn with_panels(work: impl FnOnce(&mut Vec<Panel>)) {
        PANELS.with_borrow_mut(work);
    }

    unsafe fn multiply<F: Layout, const N: usize>(
        product: &Product,
        row: usize,
        slice: Slice,
        panels: &[Panel],
        columns: &[Column],
    ) {
        // SAFETY: as the caller says.
        unsafe { multiply::<D, F, N>(product, row, slice, panels, columns) }
    }
}

impl<D: Dots, F: Format> Kernels<F> for D {
    unsafe fn multiply_rows<const N: usize>(product: &Product) {
        for row in product.rows.clone() {
            // SAFETY: as the caller says.
            unsafe { multiply_row::<D, F, N>(product, row) }
        }
    }

    unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
        // SAFETY: as the caller says.
        unsafe { fill::<D, F>(product, row, slice, panels) }
    }
}

/// Asks for memory that is soon read.
#[inline(always)]
fn prefetch(from: *const u8) {
    // SAFETY: a hint that reads nothing, whatever the address. Standard Rust has no intrinsic for it yet.
    unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) from, options(nostack, preserves_flags, readonly)) };
}

/// Four elements of a step's; of one with two groups these, and zeros.
///
/// # Safety
/// They exist.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_four<F: Layout>(from: *const f32) -> float32x4_t {
    // SAFETY: as the caller says.
    unsafe { if F::GROUPS == 2 { vcombine_f32(vld1_f32(from), vdup_n_f32(0.0)) } else { vld1q_f32(from) } }
}

/// Multiplies a row with `N` vectors. A vector's result does not depend on `N`. Sums are kept apart for even and odd groups,
/// so that an addition need not wait for the one before.
///
/// # Safety
/// As [`Kernels::multiply_rows`].
#[target_feature(enable = "neon")]
unsafe fn multiply_row<D: Dots, F: Format, const N: usize>(product: &Product, row: usize) {
    let parts = F::STEP / BLOCK;
    let zero = vdupq_n_s32(0);
    let mut sums = [[vdupq_n_f32(0.0); 2]; N];
    let mut minima = [vdupq_n_f32(0.0); N];
    // SAFETY: rows are `k` elements; so are the vectors.
    unsafe {
        for slice in slices(product.k) {
            let vectors = product.vectors::<N>(product.columns, slice);
            let weights = product.row(row).add(slice.from / F::STEP * F::BYTES);
            for s in 0..slice.len / F::STEP {
                let (step, at) = (weights.add(s * F::BYTES), s * F::STEP);
                let scales = F::scales(step);
                let mut factors = [[0.0_f32; 16]; N];
                for i in 0..N {
                    for four in 0..F::GROUPS.div_ceil(4) {
                        let of_vector = vectors[i].scales.add(at / BLOCK);
                        let of_vector = if F::GROUP == BLOCK {
                            load_four::<F>(of_vector.add(4 * four))
                        } else {
                            let two = vld1_f32(of_vector.add(2 * four));
                            vcombine_f32(vdup_lane_f32::<0>(two), vdup_lane_f32::<1>(two))
                        };
                        let factor = vmulq_f32(scales.scales[four], of_vector);
                        vst1q_f32(factors[i].as_mut_ptr().add(4 * four), factor);
                        if F::HAS_MIN {
                            let sums = load_four::<F>(vectors[i].sums.add(at / F::GROUP + 4 * four));
                            minima[i] = vfmaq_f32(minima[i], scales.minima[four], sums);
                        }
                    }
                }
                for part in 0..parts {
                    // Rows follow each other: what comes in some rows is asked for now.
                    prefetch(step.wrapping_add(part * (F::BYTES / parts) + 2048));
                    let [low, high] = F::unpack(step, part);
                    for i in 0..N {
                        let x = vectors[i].numbers.add(at + BLOCK * part);
                        let [x_low, x_high] = [vld1q_s8(x), vld1q_s8(x.add(16))];
                        if F::GROUP == BLOCK {
                            let dot = vcvtq_f32_s32(D::dot(D::dot(zero, low, x_low), high, x_high));
                            sums[i][part % 2] = vfmaq_n_f32(sums[i][part % 2], dot, factors[i][part]);
                        } else {
                            let dots = [D::dot(zero, low, x_low), D::dot(zero, high, x_high)];
                            for (half, dot) in dots.into_iter().enumerate() {
                                let factor = factors[i][2 * part + half];
                                sums[i][half] = vfmaq_n_f32(sums[i][half], vcvtq_f32_s32(dot), factor);
                            }
                        }
                    }
                }
            }
        }
        for i in 0..N {
            let sum = vaddq_f32(sums[i][0], sums[i][1]);
            *product.columns[i].results.add(row) = vaddvq_f32(vaddq_f32(sum, minima[i]));
        }
    }
}

/// See [`Kernels::fill`].
///
/// # Safety
/// As there.
#[target_feature(enable = "neon")]
unsafe fn fill<D: Dots, F: Format>(product: &Product, row: usize, slice: Slice, panels: &mut [Panel]) {
    // SAFETY: rows have the slice's elements, and there is a panel for each of its blocks.
    unsafe {
        let mut steps = [product.row(row).add(slice.from / F::STEP * F::BYTES); 8];
        for r in 1..8 {
            let row = (row + r).min(product.rows.end - 1);
            steps[r] = product.row(row).add(slice.from / F::STEP * F::BYTES);
        }
        for panels in panels.chunks_exact_mut(F::STEP / BLOCK) {
            for r in 0..8 {
                let scales = F::scales(steps[r]);
                let (mut of_groups, mut minima) = ([0.0_f32; 16], [0.0_f32; 16]);
                for four in 0..F::GROUPS.div_ceil(4) {
                    vst1q_f32(of_groups.as_mut_ptr().add(4 * four), scales.scales[four]);
                    vst1q_f32(minima.as_mut_ptr().add(4 * four), scales.minima[four]);
                }
                for g in 0..F::GROUPS {
                    let (panel, group) = (&mut panels[g * F::GROUP / BLOCK], g % (BLOCK / F::GROUP));
                    panel.scales[group][r] = of_groups[g];
                    if F::HAS_MIN {
                        panel.minima[group][r] = minima[g];
                    }
                }
            }
            for part in 0..F::STEP / BLOCK {
                let mut rows = [[vdupq_n_s8(0); 2]; 8];
                for r in 0..8 {
                    rows[r] = F::unpack(steps[r], part);
                }
                let numbers = D::arrange(rows);
                for i in 0..16 {
                    vst1q_s8(panels[part].numbers[i].as_mut_ptr(), numbers[i]);
                }
            }
            for r in 0..8 {
                steps[r] = steps[r].wrapping_add(F::BYTES);
            }
        }
    }
}

/// Multiplies a panel with a slice of `N` vectors. A vector's result does not depend on `N`.
///
/// # Safety
/// As [`Isa::multiply`].
#[target_feature(enable = "neon")]
unsafe fn multiply<D: Dots, F: Layout, const N: usize>(
    product: &Product,
    row: usize,
    slice: Slice,
    panels: &[Panel],
    columns: &[Column],
) {
    let groups = BLOCK / F::GROUP;
    let n_rows = (product.rows.end - row).min(8);
    // SAFETY: vectors have as many blocks as there are panels; results have an element for each row.
    unsafe {
        let vectors = product.vectors::<N>(columns, slice);
        let mut sums = [[vdupq_n_f32(0.0); 2]; N];
        if slice.from > 0 {
            for i in 0..N {
                let mut before = [0.0_f32; 8];
                columns[i].results.add(row).copy_to_nonoverlapping(before.as_mut_ptr(), n_rows);
                sums[i] = load_eight(&before);
            }
        }
        for (b, panel) in panels.iter().enumerate() {
            let mut numbers = [vectors[0].numbers; N];
            for i in 0..N {
                numbers[i] = vectors[i].numbers.add(b * BLOCK);
            }
            let mut of_block = [[vdupq_n_f32(0.0); 2]; N];
            for group in 0..groups {
                let halves = group * F::GROUP / 16..(group + 1) * F::GROUP / 16;
                let dots = D::dots(&panel.numbers, numbers, halves);
                let scales = load_eight(&panel.scales[group]);
                for i in 0..N {
                    for h in 0..2 {
                        let dot = vcvtq_f32_s32(dots[i][h]);
                        of_block[i][h] = match group {
                            0 => vmulq_f32(dot, scales[h]),
                            _ => vfmaq_f32(of_block[i][h], dot, scales[h]),
                        };
                    }
                }
            }
            for i in 0..N {
                let scale = *vectors[i].scales.add(b);
                for h in 0..2 {
                    sums[i][h] = vfmaq_n_f32(sums[i][h], of_block[i][h], scale);
                }
                if F::HAS_MIN {
                    for group in 0..groups {
                        let minima = load_eight(&panel.minima[group]);
                        let sum = *vectors[i].sums.add(b * groups + group);
                        for h in 0..2 {
                            sums[i][h] = vfmaq_n_f32(sums[i][h], minima[h], sum);
                        }
                    }
                }
            }
        }
        for i in 0..N {
            let mut after = [0.0_f32; 8];
            vst1q_f32(after.as_mut_ptr(), sums[i][0]);
            vst1q_f32(after.as_mut_ptr().add(4), sums[i][1]);
            columns[i].results.add(row).copy_from_nonoverlapping(after.as_ptr(), n_rows);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_eight(from: &[f32; 8]) -> [float32x4_t; 2] {
    // SAFETY: eight elements.
    unsafe { [vld1q_f32(from.as_ptr()), vld1q_f32(from.as_ptr().add(4))] }
}
