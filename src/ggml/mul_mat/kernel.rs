//! What is known of a kernel for weights of one type.

use super::{
    input::{Quantize, Scheme},
    product::Product,
};

/// A kernel for weights of one type.
pub(in crate::ggml) struct Kernel {
    /// Multiplies one thread's share. The pointers must be good for what the fields say, and the processor must have the
    /// features that the function is for.
    pub(super) run: unsafe fn(&Product),
    pub(super) quantize: Quantize,
    /// How the input is quantised.
    pub scheme: Scheme,
    /// Elements of which a row must have a multiple.
    pub(super) step: usize,
    /// Tokens up to which the kernel is faster than ggml's.
    pub(super) max_tokens: usize,
}
