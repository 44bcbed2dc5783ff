//! What a layer has for its feed-forward.

use super::{Activation, Builder, Error, Experts, Gated, Plain};
use crate::ggml::{Graph, Tensor};

/// A layer's feed-forward.
pub(in crate::model) enum FeedForward {
    Gated(Gated),
    Plain(Plain),
    Experts(Box<Experts>),
}

impl FeedForward {
    /// In the first `leading_dense_block_count` layers a gated one (silu), in the others `experts`.
    pub fn after_leading_dense(
        b: &mut Builder<'_>,
        layer: usize,
        experts: impl FnOnce(&mut Builder<'_>, usize) -> Result<Experts, Error>,
    ) -> Result<FeedForward, Error> {
        let n_dense = b.keys.optional_u32("leading_dense_block_count")?.unwrap_or(0) as usize;
        Ok(match layer < n_dense {
            true => Gated::load(b, layer, Activation::Silu)?.into(),
            false => experts(b, layer)?.into(),
        })
    }

    /// The last product of what every token goes through summed in f32.
    pub fn with_f32_sums(self) -> FeedForward {
        match self {
            FeedForward::Gated(gated) => gated.with_f32_sums().into(),
            FeedForward::Experts(experts) => experts.with_f32_sums_of_shared().into(),
            FeedForward::Plain(plain) => plain.into(),
        }
    }

    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        match self {
            FeedForward::Gated(gated) => gated.apply(graph, input),
            FeedForward::Plain(plain) => plain.apply(graph, input),
            FeedForward::Experts(experts) => experts.apply(graph, input),
        }
    }
}

impl From<Experts> for FeedForward {
    fn from(experts: Experts) -> FeedForward {
        FeedForward::Experts(Box::new(experts))
    }
}

impl From<Gated> for FeedForward {
    fn from(gated: Gated) -> FeedForward {
        FeedForward::Gated(gated)
    }
}

impl From<Plain> for FeedForward {
    fn from(plain: Plain) -> FeedForward {
        FeedForward::Plain(plain)
    }
}
