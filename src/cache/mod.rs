//! The cache of a sequence: for each layer a store of key and value rows, or a recurrent state. It knows nothing of
//! architectures.

mod chain;
mod due;
mod gather;
mod meter;
mod pruned;
mod rescued;
mod rotation;
mod shrink;
mod slab;
mod span;
mod state;
mod store;

pub(crate) use chain::Chain;
pub(crate) use due::tiles_due;
pub(crate) use gather::{apart, slots, together};
pub(crate) use meter::{Lease, Meter};
pub(crate) use pruned::{HeadLists, RowScores};
pub(crate) use rescued::{Listed, Rescued};
pub(crate) use rotation::Rotations;
pub(crate) use shrink::{Move, Moving, move_rows};
pub(crate) use slab::{Slab, Slots};
pub(crate) use span::Span;
pub(crate) use state::StateStore;
pub use store::KvRotate;
pub(crate) use store::{Format, RowShape, Store};

/// What the cache takes. Bytes are those of the real buffers, not of a formula.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct KvReport {
    /// Tokens in the context, over all sequences.
    pub context_tokens: usize,
    /// What an uncompressed f16 cache of this context takes, recurrent layers' states included. Tokens whose rows several sequences
    /// share are counted once.
    pub f16_bytes: usize,
    /// What the buffers hold now: what sequences share is counted once.
    pub allocated_bytes: usize,
    /// The highest sum of all buffers at any moment, prefill's scratch included.
    pub peak_bytes: usize,
    /// `f16_bytes / allocated_bytes`; 0 while nothing is allocated.
    pub compression: f64,
    pub lazy_layers: usize,
    /// Layers that are not lazy and have dropped old rows.
    pub pruned_layers: usize,
    /// Layers with keys and values of their own that are not lazy.
    pub active_layers: usize,
    /// How far the prompt's logits moved with the lazy layers, in nats, where the policy goes by that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foretold_kl: Option<f64>,
}
