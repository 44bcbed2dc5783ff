//! A product of which each thread does a share, and what kernels for it have in common.

use std::ops::Range;

/// Rows are shared out to threads in groups of so many: the kernels take as many at once, or half of them.
pub(super) const ROWS: usize = 16;

/// One thread's share of a product.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only x86-64 has kernels"))]
pub(super) struct Product {
    pub weights: *const u8,
    pub row_bytes: usize,
    pub k: usize,
    pub input: *const u8,
    pub input_bytes: usize,
    pub n: usize,
    pub rows: Range<usize>,
    pub out: *mut u8,
    pub out_bytes: usize,
}

#[cfg(target_arch = "x86_64")]
impl Product {
    /// From this many vectors on rows are unpacked into panels; with fewer a vector's result does not depend on how many
    /// others there are.
    pub const MIN_PANEL: usize = 4;

    /// # Safety
    /// The vector exists.
    pub unsafe fn vector(&self, index: usize) -> *const f32 {
        // SAFETY: as the caller says.
        unsafe { self.input.add(index * self.input_bytes).cast() }
    }

    /// # Safety
    /// The row exists.
    pub unsafe fn row(&self, index: usize) -> *const u8 {
        // SAFETY: as the caller says.
        unsafe { self.weights.add(index * self.row_bytes) }
    }

    /// Where a vector's results are, a number for each row.
    ///
    /// # Safety
    /// The vector exists.
    pub unsafe fn results(&self, vector: usize) -> *mut f32 {
        // SAFETY: as the caller says.
        unsafe { self.out.add(vector * self.out_bytes).cast() }
    }
}
