//! The order in which a thread's share is worked through.

use super::{
    formats::Layout,
    input::{BLOCK, SLICE_LEN, Slice, slices},
    product::{Column, Product},
};

/// An instruction set that there are kernels for.
pub(super) trait Isa {
    /// A block of as many rows as a panel has, whose lanes are rows.
    type Panel: Copy;
    const EMPTY: Self::Panel;
    /// Rows of a panel.
    const ROWS: usize;
    /// Panels that are multiplied together.
    const PANELS: usize;

    /// This thread's memory for panels. It grows to what the largest product needs, and stays.
    fn with_panels(work: impl FnOnce(&mut Vec<Self::Panel>));

    /// Multiplies the rows from `row` on, `panels.len() / blocks` panels of them, with a slice of `N` vectors. A vector's
    /// result does not depend on `N`.
    ///
    /// # Safety
    /// As [`Kernels::multiply_rows`]; panels are those of the slice, and there are `N` columns.
    unsafe fn multiply<F: Layout, const N: usize>(
        product: &Product,
        row: usize,
        slice: Slice,
        panels: &[Self::Panel],
        columns: &[Column],
    );
}

/// Kernels for a type of weights.
pub(super) trait Kernels<F: Layout>: Isa {
    /// Multiplies the product's rows with all `N` columns, fewer than [`Product::MIN_PANEL`]. A vector's result does not
    /// depend on `N`.
    ///
    /// # Safety
    /// The pointers of the product are good for what its fields say; the processor has the features.
    unsafe fn multiply_rows<const N: usize>(product: &Product);

    /// Unpacks, of the rows from `row` on, the elements that `slice` says. Behind the last rows some come again.
    ///
    /// # Safety
    /// As [`Kernels::multiply_rows`]; there is a panel for each block.
    unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Self::Panel]);
}

/// Quantised elements of the vectors that are worked on at once: they are to stay in a core's second-level cache.
const SLICE_ELEMENTS: usize = 384 << 10;

/// # Safety
/// The pointers are good for what the fields say; the processor has the features.
pub(super) unsafe fn run<K: Kernels<F>, F: Layout>(product: &Product) {
    // SAFETY: as the caller says.
    unsafe {
        match product.columns.len() {
            0 => {}
            1 => K::multiply_rows::<1>(product),
            2 => K::multiply_rows::<2>(product),
            3 => K::multiply_rows::<3>(product),
            Product::MIN_PANEL.. => K::with_panels(|panels| multiply_slices::<K, F>(product, panels)),
        }
    }
}

/// # Safety
/// As [`run`].
unsafe fn multiply_slices<K: Kernels<F>, F: Layout>(product: &Product, panels: &mut Vec<K::Panel>) {
    let len = SLICE_LEN.min(product.k);
    let parts = product.columns.len().div_ceil(SLICE_ELEMENTS / len);
    if panels.len() < K::PANELS * len / BLOCK {
        panels.resize(K::PANELS * len / BLOCK, K::EMPTY);
    }
    for columns in product.columns.chunks(product.columns.len().div_ceil(parts)) {
        for slice in slices(product.k) {
            let blocks = slice.len / BLOCK;
            for row in product.rows.clone().step_by(K::PANELS * K::ROWS) {
                let n_panels = (product.rows.end - row).div_ceil(K::ROWS).min(K::PANELS);
                let panels = &mut panels[..n_panels * blocks];
                // SAFETY: as the caller says; a slice's length is a multiple of a step, as `k` and SLICE_LEN are.
                unsafe {
                    for (i, panels) in panels.chunks_exact_mut(blocks).enumerate() {
                        K::fill(product, row + i * K::ROWS, slice, panels);
                    }
                    for columns in columns.chunks(4) {
                        match columns.len() {
                            1 => K::multiply::<F, 1>(product, row, slice, panels, columns),
                            2 => K::multiply::<F, 2>(product, row, slice, panels, columns),
                            3 => K::multiply::<F, 3>(product, row, slice, panels, columns),
                            _ => K::multiply::<F, 4>(product, row, slice, panels, columns),
                        }
                    }
                }
            }
        }
    }
}
