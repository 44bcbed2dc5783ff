//! What is computed once for the tokens of all sequences of a ubatch, where it could be once for each: on devices, where every
//! operation is a kernel to launch.

use super::attention::{CacheAttention, store};
use crate::{
    cache::Format,
    ggml::{Graph, Tensor},
    model::AttentionOptions,
};

impl CacheAttention<'_> {
    /// How all sequences have their rows in a layer, where their tokens are rotated in one operation. Not on the
    /// processor, where ggml sums otherwise for several tokens.
    pub fn rotates_together(&self, layer: usize, options: &AttentionOptions<'_>) -> Option<Format> {
        let owner = self.setup.model.hparams().owner(layer);
        if self.parts.len() < 2 || self.plan(owner).apart.is_none() || options.outputs.is_some() {
            return None;
        }
        let mut formats = self.caches.iter().map(|caches| store(&caches[owner]).format());
        let first = formats.next()?;
        (formats.all(|format| format == first) && (first.rotate_k || first.rotate_v)).then_some(first)
    }

    /// Queries, keys and values of all tokens as rows of this format are.
    pub fn rotated(
        &self,
        graph: &Graph,
        layer: usize,
        format: Format,
        q: &Tensor,
        own: Option<[&Tensor; 2]>,
    ) -> (Tensor, Option<[Tensor; 2]>) {
        let rotations = &self.setup.layers[self.setup.model.hparams().owner(layer)].rotations;
        let key = |rows: &Tensor| if format.rotate_k { rotations.rotate_key(graph, rows) } else { rows.clone() };
        let value = |rows: &Tensor| if format.rotate_v { rotations.rotate_value(graph, rows) } else { rows.clone() };
        (key(q), own.map(|[k, v]| [key(k), value(v)]))
    }

    /// What all tokens have attended to `[value size × heads, n]`, as it is without the rotation.
    pub fn rotated_back(&self, graph: &Graph, layer: usize, format: Format, attended: Tensor) -> Tensor {
        if !format.rotate_v {
            return attended;
        }
        let hparams = self.setup.model.hparams();
        let [_, value_size, heads, _] = hparams.heads(layer);
        let shape = attended.shape();
        let by_heads = graph.reshape(&attended, &[value_size, heads, shape[1]]);
        let rotations = &self.setup.layers[hparams.owner(layer)].rotations;
        graph.reshape(&rotations.rotate_value(graph, &by_heads), &shape[..2])
    }
}
