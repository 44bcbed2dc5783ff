//! A product of which each thread does a share, and what kernels for it have in common.

use std::ops::Range;

use ggml_sys as sys;

/// Rows are shared out to threads in groups of so many: the AVX2 kernel takes that many at once.
pub(super) const ROWS: usize = 8;

/// Quantised input that is worked on at once: it is to stay in a core's own cache.
#[cfg(target_arch = "x86_64")]
pub(super) const TILE_BYTES: usize = 384 << 10;

/// The kernels of one instruction set.
pub(super) trait Kernels {
    /// # Safety
    /// The pointers are good for what the fields say, `ty` is the weights' type, and the processor has the features.
    unsafe fn run(product: &Product, ty: sys::ggml_type);
}

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
