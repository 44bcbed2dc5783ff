//! A layer whose attention and feed-forward lie beside each other.

use super::{FeedForward, Layer, Norm, SelfAttention};
use crate::{
    ggml::{Graph, Tensor},
    model::{Attention, LayerStep},
};

/// Attention and feed-forward of the same normed input, both added to the residual stream.
pub(in crate::model) struct Parallel {
    pub norm: Norm,
    pub attention: SelfAttention,
    pub feed_forward: FeedForward,
}

impl Layer for Parallel {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let input = self.norm.apply(graph, step.hidden);
        let attended = self.attention.apply(graph, step, &input, attention);
        let attended = step.kept(graph, &attended);
        let output = self.feed_forward.apply(graph, &step.kept(graph, &input));
        graph.add(&graph.add(&output, &step.kept(graph, step.hidden)), &attended)
    }
}
