//! What a layer is to the rest of its model.

use crate::{
    ggml::{Graph, Tensor},
    model::{Attention, LayerStep},
};

/// Hidden states `[n_embd, n]` through one layer; see [`Architecture::layer`](crate::model::Architecture::layer).
pub(in crate::model) trait Layer: Send + Sync {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor;
}

impl Layer for Box<dyn Layer> {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        (**self).apply(graph, step, attention)
    }
}
