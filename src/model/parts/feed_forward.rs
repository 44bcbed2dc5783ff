//! What a layer has for its feed-forward.

use super::{Experts, Gated};
use crate::ggml::{Graph, Tensor};

/// A layer's feed-forward.
pub(in crate::model) enum FeedForward {
    Gated(Gated),
    Experts(Experts),
}

impl FeedForward {
    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        match self {
            FeedForward::Gated(gated) => gated.apply(graph, input),
            FeedForward::Experts(experts) => experts.apply(graph, input),
        }
    }
}

impl From<Experts> for FeedForward {
    fn from(experts: Experts) -> FeedForward {
        FeedForward::Experts(experts)
    }
}

impl From<Gated> for FeedForward {
    fn from(gated: Gated) -> FeedForward {
        FeedForward::Gated(gated)
    }
}
