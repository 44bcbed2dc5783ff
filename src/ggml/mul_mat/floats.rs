//! Few vectors with weights that are floats: nothing is quantised, and sums are in f32.
//!
//! Four rows are multiplied with some vectors at once, lanes being elements. A slice's lanes are summed, then slices. With many
//! vectors ggml's products are as fast.
//!
//! No closure computes with vectors: it would not have the processor's features switched on.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;

use super::{
    input::{BLOCK, Scheme, Slice, slices},
    kernel::Kernel,
    product::{Column, Product},
};
use crate::ggml::{
    attention::{simd::Simd, x86},
    processor::Features,
};

/// A type of weights.
pub(super) trait Float {
    const BYTES: usize;

    /// # Safety
    /// As [`Simd`]'s methods, for `V::LANES` elements.
    unsafe fn load<V: Simd>(from: *const u8) -> V;
}

pub(super) struct F16;
pub(super) struct Bf16;

impl Float for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: as the caller says.
        unsafe { V::load_f16(from.cast()) }
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: as the caller says.
        unsafe { V::load_bf16(from.cast()) }
    }
}

/// The kernel for weights of a type.
pub(super) fn kernel<W: Float>(features: Features) -> Option<&'static Kernel> {
    match features {
        Features::Portable => None,
        Features::Avx2 | Features::AvxVnni => Some(Of::<W>::EIGHT_LANES),
        Features::Avx512 | Features::Avx512Vnni => Some(Of::<W>::SIXTEEN_LANES),
    }
}

struct Of<W>(PhantomData<W>);

impl<W: Float> Of<W> {
    const EIGHT_LANES: &Kernel = &Kernel {
        run: eight_lanes::<W>,
        quantize: copy,
        // The input is taken as it is.
        scheme: Scheme { block_bytes: BLOCK * size_of::<f32>(), groups: 0, offset: 0 },
        step: BLOCK,
        max_tokens: Product::MIN_PANEL - 1,
    };
    const SIXTEEN_LANES: &Kernel = &Kernel { run: sixteen_lanes::<W>, ..*Self::EIGHT_LANES };
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn eight_lanes<W: Float>(product: &Product) {
    // SAFETY: as `Kernel::run` says.
    unsafe { run::<x86::Avx2, W>(product) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
unsafe fn sixteen_lanes<W: Float>(product: &Product) {
    // SAFETY: as `Kernel::run` says.
    unsafe { run::<x86::Avx512, W>(product) }
}

/// See [`super::input::Quantize`].
///
/// # Safety
/// As there.
unsafe fn copy(_: Scheme, from: *const f32, len: usize, to: *mut u8) {
    // SAFETY: as the caller says.
    unsafe { to.cast::<f32>().copy_from_nonoverlapping(from, len) }
}

/// Rows that are multiplied together.
const ROWS: usize = 4;

/// Multiplies a thread's share. A vector's result does not depend on how many others there are.
///
/// # Safety
/// The pointers are good for what the fields say; the caller has the processor's features of `V` switched on.
#[inline(always)]
unsafe fn run<V: Simd, W: Float>(product: &Product) {
    for row in product.rows.clone().step_by(ROWS) {
        for slice in slices(product.k) {
            let mut columns = product.columns;
            while !columns.is_empty() {
                // SAFETY: as the caller says; there are as many columns.
                let done = unsafe {
                    match columns.len() {
                        1 => tile::<V, W, 1>(product, row, slice, columns),
                        2 => tile::<V, W, 2>(product, row, slice, columns),
                        _ => tile::<V, W, 3>(product, row, slice, columns),
                    }
                };
                columns = &columns[done..];
            }
        }
    }
}

/// Multiplies the rows from `row` on, four at most, with `N` columns. Returns `N`.
///
/// # Safety
/// As [`run`]; there are `N` columns.
#[inline(always)]
unsafe fn tile<V: Simd, W: Float, const N: usize>(
    product: &Product,
    row: usize,
    slice: Slice,
    columns: &[Column],
) -> usize {
    // SAFETY: rows and vectors have the slice's elements, which are a multiple of a block; results have the rows.
    unsafe {
        // Behind the last row it comes again.
        let rows: [*const u8; ROWS] =
            std::array::from_fn(|r| product.row((row + r).min(product.rows.end - 1)).add(slice.from * W::BYTES));
        let vectors: [*const f32; N] = product.vectors(columns, slice).map(|vector| vector.numbers.cast());
        let mut sums = [[V::splat(0.0); ROWS]; N];
        for j in (0..slice.len).step_by(V::LANES) {
            let mut x = [V::splat(0.0); N];
            for i in 0..N {
                x[i] = V::load(vectors[i].add(j));
            }
            for r in 0..ROWS {
                let w = W::load::<V>(rows[r].add(j * W::BYTES));
                for i in 0..N {
                    sums[i][r] = w.mul_add(x[i], sums[i][r]);
                }
            }
        }
        for (column, sums) in columns.iter().zip(sums) {
            let mut of_rows = [0.0; ROWS];
            V::sum_each(sums, of_rows.as_mut_ptr());
            for (r, sum) in of_rows.into_iter().enumerate().take(product.rows.end - row) {
                let result = column.results.add(row + r);
                *result = if slice.from == 0 { sum } else { *result + sum };
            }
        }
    }
    N
}
