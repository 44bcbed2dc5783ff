//! Attention on the processor, as one operation of a ggml graph.
//!
//! Keys and values may lie in several segments of different types; the softmax runs over all of them together. Rows
//! are converted to f32 in registers (decode) or once for a tile of queries (prefill), and all sums are in f32. Rows
//! that no query of a tile sees are not read.
//!
//! In decode, with few queries, the threads divide the rows (split-K): a chunk's partial is kept in memory that the graph
//! owns, and added to its neighbour's by who finishes later. Chunks, and the order in which they are added, depend on the
//! number of rows only, so that the result does not depend on the number of threads.
//!
//! From above: `op` is the graph's node and chooses the kernels; `decode` and `prefill` do one run of it, a `call`, over
//! `views` of the tensors, in `chunks` and with `scratch` memory; `kernels` and `products` are the inner loops over a `block` of rows,
//! generic over the vectors of `simd`, `x86` and `neon`, with `q4` for four-bit rows and `tiled` for tiles.

mod block;
mod call;
mod chunks;
mod decode;
mod kernels;
#[cfg(target_arch = "aarch64")]
mod neon;
mod op;
mod prefill;
mod products;
#[cfg(target_arch = "x86_64")]
mod q4;
mod scratch;
pub(super) mod simd;
#[cfg(test)]
mod tests;
mod tiled;
mod views;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

pub(crate) use block::BLOCK as ATTENTION_BLOCK;
pub use op::{FusedAttention, HeadRows, KvSegment};
pub(super) use op::{Op, blocks};
pub(super) use scratch::Partials;
pub(super) use simd::f16_to_f32;
