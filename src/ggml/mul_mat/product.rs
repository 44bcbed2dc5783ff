//! A product of which each thread does a share, and what kernels for it have in common.

use std::ops::Range;

use super::input::{Input, Slice, Vector};

/// Rows are shared out to threads in groups of so many: the kernels take as many at once, or half of them.
pub(super) const ROWS: usize = 16;

/// One thread's share of a product.
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code, reason = "no kernels"))]
pub(super) struct Product<'a> {
    pub weights: *const u8,
    pub row_bytes: usize,
    pub k: usize,
    pub rows: Range<usize>,
    pub input: Input,
    /// What is multiplied, in any order.
    pub columns: &'a [Column],
}

/// A vector of the input, and where its results go, a number for each row.
#[derive(Clone, Copy)]
pub(super) struct Column {
    pub vector: usize,
    pub results: *mut f32,
}

impl Product<'_> {
    /// From this many vectors on rows are unpacked into panels; with fewer a vector's result does not depend on how many
    /// others there are.
    pub const MIN_PANEL: usize = 4;

    /// # Safety
    /// The row exists.
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code, reason = "no kernels"))]
    pub unsafe fn row(&self, index: usize) -> *const u8 {
        // SAFETY: as the caller says.
        unsafe { self.weights.add(index * self.row_bytes) }
    }

    /// A slice of the first `N` columns' vectors.
    ///
    /// # Safety
    /// There are as many columns.
    #[inline]
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code, reason = "no kernels"))]
    pub unsafe fn vectors<const N: usize>(&self, columns: &[Column], slice: Slice) -> [Vector; N] {
        // SAFETY: columns are of this product.
        std::array::from_fn(|i| unsafe { self.input.vector(columns[i].vector, slice) })
    }
}

/// The rows of `n_rows` that are thread number `thread`'s.
pub(super) fn share(n_rows: usize, thread: usize, n_threads: usize) -> Range<usize> {
    let groups = n_rows.div_ceil(ROWS);
    let first_of = |thread: usize| (thread * groups / n_threads * ROWS).min(n_rows);
    first_of(thread)..first_of(thread + 1)
}
