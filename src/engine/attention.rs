use super::{
    inputs::{Inputs, Part},
    sequence::LayerCache,
};
use crate::{
    cache::{Rotations, Span, Store},
    ggml::{FusedAttention, Graph, KvSegment, Tensor, Type},
    model::Attention,
};

/// Rows that attention reads are rounded up to this many, so that a decode graph serves as many steps (as in llama.cpp).
pub(super) const ROWS_STEP: usize = 256;

/// Intermediate results of a score are kept below this many bytes, by scoring a few KV heads at a time.
const SCORE_BYTES: usize = 64 << 20;

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// Our own operation.
    Fused,
    /// ggml's operation.
    Flash,
    /// Products and a softmax, with the matrix of all weights between them.
    Separate,
}

/// Attention of a ubatch over the caches of its sequences.
pub(super) struct CacheAttention<'a> {
    pub inputs: &'a mut Inputs,
    pub parts: &'a [Part],
    /// For each part the layers' caches of its sequence.
    pub caches: Vec<&'a [LayerCache]>,
    pub rotations: &'a Rotations,
    pub head_size: usize,
    pub kernel: Kernel,
    /// What a lazy layer would keep: the span whose attention mass is the score.
    pub score_span: Span,
    /// Attention mass of the scored queries, `[1, n_score, heads]` each.
    pub scores: Vec<Score>,
}

pub(super) struct Score {
    pub part: usize,
    pub layer: usize,
    /// Masses of a few heads each.
    pub masses: Vec<Tensor>,
}

impl Score {
    /// The mean over heads and queries.
    pub fn mean(&self) -> f32 {
        let masses: Vec<f32> = self.masses.iter().flat_map(Tensor::to_f32).collect();
        (masses.iter().map(|&mass| f64::from(mass)).sum::<f64>() / masses.len().max(1) as f64) as f32
    }
}

impl Attention for CacheAttention<'_> {
    fn attend(&mut self, graph: &Graph, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let mut attended: Option<Tensor> = None;
        for part in 0..self.parts.len() {
            let one = self.attend_part(graph, layer, part, q, k, v);
            attended = Some(match attended {
                Some(others) => graph.concat(&others, &one, 1),
                None => one,
            });
        }
        attended.expect("a ubatch has at least one part")
    }
}

impl CacheAttention<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.head_size as f32).sqrt()
    }

    fn attend_part(&mut self, graph: &Graph, layer: usize, index: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let part = self.parts[index];
        let cache = &self.caches[index][layer];
        let store = cache.store().expect("room was reserved before the graph is built");
        let format = store.format;
        let (mut q, mut k, mut v) = (slice(graph, q, &part), slice(graph, k, &part), slice(graph, v, &part));
        if format.rotate_k {
            q = self.rotations.rotate_key(graph, &q);
            k = self.rotations.rotate_key(graph, &k);
        }
        if format.rotate_v {
            v = self.rotations.rotate_value(graph, &v);
        }
        // `[head size, tokens, heads]`: what attention wants.
        let queries = graph.permute(&q, [0, 2, 1, 3]);
        let projected = Projected { queries, k: rows(graph, &k), v: rows(graph, &v) };

        let attended = match cache.span() {
            Some(span) if part.n > 1 => self.attend_behind_ring(graph, store, span, index, &projected),
            span => self.attend_stored(graph, store, span, (index, layer), &projected),
        };
        // `[head size, heads, tokens]`
        let attended = if format.rotate_v { self.rotations.rotate_value(graph, &attended) } else { attended };
        let [head_size, heads, n, _] = attended.shape();
        graph.reshape(&attended, &[head_size * heads, n])
    }

    /// Writes the tokens' rows, then attends to the store.
    fn attend_stored(
        &mut self,
        graph: &Graph,
        store: &Store,
        span: Option<Span>,
        (index, layer): (usize, usize),
        Projected { queries, k, v }: &Projected,
    ) -> Tensor {
        let part = self.parts[index];
        let rows = self.inputs.rows(graph, part.n, index, span);
        graph.expand(&graph.set_rows(&store.k, k, &rows));
        graph.expand(&graph.set_rows(&store.v, v, &rows));

        let n_past = part.n_past + part.n;
        let used = span.map_or(n_past, |span| span.used_rows(n_past));
        let n_rows = used.next_multiple_of(ROWS_STEP).min(store.n_rows());
        let keys = Store::heads(graph, &store.k, self.head_size, n_rows);
        let values = Store::heads(graph, &store.v, self.head_size, n_rows);
        let mask = self.inputs.mask(graph, part.n, index, span, n_rows);
        if part.n_score > 0 && span.is_none() {
            self.score(graph, (index, layer), queries, &keys, &mask);
        }
        self.attention(graph, queries, &keys, &values, &mask)
    }

    /// Several tokens over a ring: they attend to the ring as it was and to their own rows, because a row that a later
    /// token overwrites is still in an earlier token's window.
    fn attend_behind_ring(
        &mut self,
        graph: &Graph,
        store: &Store,
        span: Span,
        index: usize,
        Projected { queries, k, v }: &Projected,
    ) -> Tensor {
        let part = self.parts[index];
        let n_old = span.used_rows(part.n_past);
        let mask = self.inputs.mask_behind_ring(graph, part.n, index, span, n_old);
        let attended = match self.kernel {
            Kernel::Fused => self.fused_behind_ring(graph, store, n_old, queries, (k, v), &mask),
            Kernel::Flash | Kernel::Separate => {
                let with_old = |stored: &Tensor, own: &Tensor| {
                    let all = match n_old {
                        0 => own.clone(),
                        _ => graph.concat(&graph.cast(&graph.rows(stored, 0, n_old), Type::F32), own, 1),
                    };
                    let all = if stored.ty() == Type::F32 { all } else { graph.cast(&all, Type::F16) };
                    Store::heads(graph, &all, self.head_size, n_old + part.n)
                };
                self.attention(graph, queries, &with_old(&store.k, k), &with_old(&store.v, v), &mask)
            }
        };
        // The ring must be read before it is written: nodes run in the order in which they are added.
        graph.expand(&attended);
        for kept in span.kept_ranges(part.n_past + part.n) {
            let kept = kept.start.max(part.n_past)..kept.end;
            if kept.is_empty() {
                continue;
            }
            for (own, stored) in [(k, &store.k), (v, &store.v)] {
                let from = graph.rows(own, kept.start - part.n_past, kept.len());
                let to = graph.rows(stored, span.row(kept.start), kept.len());
                graph.expand(&graph.copy(&from, &to));
            }
        }
        attended
    }

    /// → `[head size, heads, tokens]`
    fn attention(&self, graph: &Graph, queries: &Tensor, keys: &Tensor, values: &Tensor, mask: &Tensor) -> Tensor {
        match self.kernel {
            Kernel::Fused => return self.fused(graph, queries, &[KvSegment { k: keys, v: values, mask: Some(mask) }]),
            Kernel::Flash => return graph.flash_attn(queries, keys, values, mask, self.scale()),
            Kernel::Separate => {}
        }
        let weights = graph.soft_max(&graph.mul_mat_f32(keys, queries), mask, self.scale());
        let values = if values.ty().is_quantized() { graph.cast(values, Type::F32) } else { values.clone() };
        let transposed = graph.contiguous(&graph.permute(&values, [1, 0, 2, 3]));
        let attended = graph.mul_mat(&transposed, &weights);
        graph.contiguous(&graph.permute(&attended, [0, 2, 1, 3]))
    }

    /// Over the ring's rows, of whatever type they are, and the tokens' own.
    fn fused_behind_ring(
        &self,
        graph: &Graph,
        store: &Store,
        n_old: usize,
        queries: &Tensor,
        (k, v): (&Tensor, &Tensor),
        mask: &Tensor,
    ) -> Tensor {
        let n = queries.shape()[1];
        let [cell_bytes, row_bytes, ..] = mask.strides();
        let columns = |first: usize, rows: usize| graph.view(mask, [rows, n, 1], [row_bytes, 0], first * cell_bytes);
        let heads = |rows: &Tensor, n: usize| Store::heads(graph, rows, self.head_size, n);
        // Rounded as they will be stored, so that a sequence that fits the ring is as in a full store. Not quantised
        // though: that would lose more than is needed.
        let own = |rows: &Tensor, stored: &Tensor| match stored.ty() {
            Type::F32 => heads(rows, n),
            ty if ty.is_quantized() => heads(&graph.cast(rows, Type::F16), n),
            ty => heads(&graph.cast(rows, ty), n),
        };
        let (own_k, own_v, own_mask) = (own(k, &store.k), own(v, &store.v), columns(n_old, n));
        let own = KvSegment { k: &own_k, v: &own_v, mask: Some(&own_mask) };
        if n_old == 0 {
            return self.fused(graph, queries, &[own]);
        }
        let (old_k, old_v, old_mask) = (heads(&store.k, n_old), heads(&store.v, n_old), columns(0, n_old));
        self.fused(graph, queries, &[KvSegment { k: &old_k, v: &old_v, mask: Some(&old_mask) }, own])
    }

    fn fused(&self, graph: &Graph, queries: &Tensor, segments: &[KvSegment<'_>]) -> Tensor {
        graph.fused_attention(queries, segments, &FusedAttention { scale: self.scale(), soft_cap: None, sinks: None })
    }

    /// The attention mass of the part's last queries on what a lazy layer would keep (method: SimLayerKV, section 3).
    fn score(&mut self, graph: &Graph, (index, layer): (usize, usize), queries: &Tensor, keys: &Tensor, mask: &Tensor) {
        let Part { n, n_score, .. } = self.parts[index];
        let [head_size, _, heads, _] = queries.shape();
        let [_, n_rows, kv_heads, _] = keys.shape();
        let kept = self.inputs.kept(graph, n_score, index, self.score_span, n_rows);
        let mask = graph.rows(mask, n - n_score, n_score);

        let shared = heads / kv_heads;
        let bytes_per_kv_head = n_rows * n_score * shared * size_of::<f32>();
        let at_once = (SCORE_BYTES / bytes_per_kv_head.max(1)).clamp(1, kv_heads);
        let [_, token_bytes, head_bytes, _] = queries.strides();
        let [_, row_bytes, kv_head_bytes, _] = keys.strides();
        let mut masses = Vec::new();
        for first in (0..kv_heads).step_by(at_once) {
            let some = at_once.min(kv_heads - first);
            let offset = (n - n_score) * token_bytes + first * shared * head_bytes;
            let q = graph.view(queries, [head_size, n_score, some * shared], [token_bytes, head_bytes], offset);
            let k = graph.view(keys, [head_size, n_rows, some], [row_bytes, kv_head_bytes], first * kv_head_bytes);
            let weights = graph.soft_max(&graph.mul_mat_f32(&k, &q), &mask, self.scale());
            let mass = graph.sum_rows(&graph.mul(&weights, &kept)).as_output();
            graph.expand(&mass);
            masses.push(mass);
        }
        self.scores.push(Score { part: index, layer, masses });
    }
}

/// A part's tokens, rotated as the store is: queries `[head size, tokens, heads]`, keys and values as rows.
struct Projected {
    queries: Tensor,
    k: Tensor,
    v: Tensor,
}

/// The part's tokens of `[head size, heads, tokens]`.
fn slice(graph: &Graph, all: &Tensor, part: &Part) -> Tensor {
    let [head_size, heads, n, _] = all.shape();
    if part.n == n {
        return all.clone();
    }
    let [_, head_bytes, token_bytes, _] = all.strides();
    graph.view(all, [head_size, heads, part.n], [head_bytes, token_bytes], part.first * token_bytes)
}

/// `[head size, heads, tokens]` → `[head size × heads, tokens]`.
fn rows(graph: &Graph, heads: &Tensor) -> Tensor {
    let [head_size, n_heads, n, _] = heads.shape();
    graph.reshape(heads, &[head_size * n_heads, n])
}
