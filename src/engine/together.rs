//! What is computed once for the tokens of all sequences of a ubatch, where it could be once for each: on devices, where every
//! operation is a kernel to launch.

use std::ops::Range;

use super::{
    attention::{CacheAttention, attention, rows, slice, store},
    batch::Part,
    groups::rows_read,
    inputs::Keys,
    layer::LayerCache,
};
use crate::{
    cache::{Format, Slab, Slots},
    ggml::{Graph, Tensor},
    model::AttentionOptions,
};

impl CacheAttention<'_> {
    /// Attends for parts with one token each, whose rows lie in one slab. `own` and `is_rotated` are as for a part.
    /// → `[value size × heads, parts]`
    pub fn attend_together(
        &mut self,
        graph: &Graph,
        (parts, slab, slots): (Range<usize>, &Slab, Slots),
        reader: usize,
        q: &Tensor,
        own: Option<[&Tensor; 2]>,
        (options, is_rotated): (&AttentionOptions<'_>, bool),
    ) -> Tensor {
        let setup = self.setup;
        let layer = setup.model.hparams().owner(reader);
        let plan = &setup.layers[layer].plan;
        let caches: Vec<&LayerCache> = self.caches[parts.clone()].iter().map(|layers| &layers[layer]).collect();
        let (span, format) = (caches[0].span, store(caches[0]).format());
        let tokens = Part { n: parts.len(), ..self.parts[parts.start] };
        let mut q = slice(graph, q, &tokens);
        let mut own = own.filter(|_| reader == layer).map(|own| own.map(|rows| slice(graph, rows, &tokens)));
        if !is_rotated {
            (q, own) = self.rotated(graph, reader, format, &q, own.as_ref().map(|[k, v]| [k, v]));
        }
        if let Some(own) = own {
            let ids = self.inputs.slab_rows(graph, parts.clone(), span, (slots, slab.n_rows()));
            for (stored, own) in slab.tensors().zip(&own) {
                graph.expand(&graph.set_rows(stored, &rows(graph, own), &ids));
            }
        }
        let ([head_size, heads, n, _], [_, head_bytes, token_bytes, _]) = (q.shape(), q.strides());
        let queries = graph.view_4d(&q, [head_size, 1, heads, n], [token_bytes, head_bytes, token_bytes], 0);
        let n_rows = rows_read(&self.parts[parts.clone()], &caches);
        let keys = Keys::Stored { span, from: 0, n_rows, has_own: true, exact: None };
        let device = plan.apart.unwrap_or(plan.device);
        let mask = self.inputs.mask_together(graph, parts, keys, device);
        let k = plan.rows.keys_together(graph, slab, slots, n_rows);
        let v = plan.rows.values_together(graph, slab, slots, n_rows);
        // `[value size, 1, heads, parts]` → `[value size, heads, parts]`
        let attended = attention(graph, plan, &queries, [&[k], &[v]], &mask, options);
        let [value_size, ..] = attended.shape();
        let attended = graph.contiguous_if_needed(&graph.permute(&attended, [0, 2, 1, 3]));
        let attended = graph.reshape(&attended, &[value_size * heads, n]);
        if is_rotated { attended } else { self.rotated_back(graph, reader, format, attended) }
    }

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
