//! The order in which a thread's share is worked through.

use super::{
    formats::Layout,
    input::{BLOCK, Input},
    product::Product,
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

    /// This thread's scratch memory. It grows to what the largest product needs, and stays.
    fn with_scratch(work: impl FnOnce(&mut Scratch<Self::Panel>));

    /// Multiplies the rows from `row` on, `panels.len() / blocks` panels of them, with the vectors of a slice.
    ///
    /// # Safety
    /// As [`Kernels::multiply_rows`]; panels and input are those of the slice.
    unsafe fn multiply<F: Layout>(product: &Product, row: usize, slice: Slice, panels: &[Self::Panel], input: &Input);
}

/// Kernels for a type of weights.
pub(super) trait Kernels<F: Layout>: Isa {
    /// Multiplies the product's rows with all vectors of `input`, fewer than [`Product::MIN_PANEL`].
    ///
    /// # Safety
    /// The pointers of the product are good for what its fields say; the processor has the features.
    unsafe fn multiply_rows(product: &Product, input: &Input);

    /// Unpacks, of the rows from `row` on, the elements that `slice` says. Behind the last rows some come again.
    ///
    /// # Safety
    /// As [`Kernels::multiply_rows`]; there is a panel for each block.
    unsafe fn fill(product: &Product, row: usize, slice: Slice, panels: &mut [Self::Panel]);
}

pub(super) struct Scratch<P> {
    pub input: Input,
    pub panels: Vec<P>,
}

/// What is worked on at once: some vectors, and some elements of each and of all rows.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    /// The first vector.
    pub first: usize,
    /// How many they are.
    pub n: usize,
    /// The first element.
    pub from: usize,
    /// How many they are.
    pub len: usize,
}

/// Elements of a slice at most: a panel of them is to stay in a core's first-level cache.
const SLICE_LEN: usize = 1024;

/// Quantised elements of a slice at most: they are to stay in a core's second-level cache.
const SLICE_ELEMENTS: usize = 384 << 10;

/// # Safety
/// The pointers are good for what the fields say; the processor has the features.
pub(super) unsafe fn run<K: Kernels<F>, F: Layout>(product: &Product) {
    K::with_scratch(|scratch| {
        // SAFETY: as the caller says.
        unsafe {
            if product.n < Product::MIN_PANEL {
                scratch.input.quantize::<F>(product, 0, product.n, 0, product.k);
                K::multiply_rows(product, &scratch.input);
            } else {
                multiply_slices::<K, F>(product, scratch);
            }
        }
    });
}

/// # Safety
/// As [`run`].
unsafe fn multiply_slices<K: Kernels<F>, F: Layout>(product: &Product, scratch: &mut Scratch<K::Panel>) {
    let len = SLICE_LEN.min(product.k);
    let slices = product.n.div_ceil(SLICE_ELEMENTS / len);
    let n = product.n.div_ceil(slices);
    if scratch.panels.len() < K::PANELS * len / BLOCK {
        scratch.panels.resize(K::PANELS * len / BLOCK, K::EMPTY);
    }
    for first in (0..product.n).step_by(n) {
        for from in (0..product.k).step_by(len) {
            let slice = Slice { first, n: n.min(product.n - first), from, len: len.min(product.k - from) };
            let blocks = slice.len / BLOCK;
            // SAFETY: as the caller says; a slice's length is a multiple of a step, as `k` and SLICE_LEN are.
            unsafe {
                scratch.input.quantize::<F>(product, first, slice.n, from, slice.len);
                for row in product.rows.clone().step_by(K::PANELS * K::ROWS) {
                    let panels = (product.rows.end - row).div_ceil(K::ROWS).min(K::PANELS);
                    let panels = &mut scratch.panels[..panels * blocks];
                    for (i, panels) in panels.chunks_exact_mut(blocks).enumerate() {
                        K::fill(product, row + i * K::ROWS, slice, panels);
                    }
                    K::multiply::<F>(product, row, slice, panels, &scratch.input);
                }
            }
        }
    }
}
