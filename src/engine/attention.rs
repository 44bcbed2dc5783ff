//! Attention of a ubatch's tokens over their sequences' caches, which they are written to; and its scores.

use std::slice;

use super::{
    batch::Part,
    groups::{Group, groups},
    inputs::{Inputs, Keys},
    layer::LayerCache,
    score::{SCORE_NAME, Score, Taken},
    setup::{Kernel, LayerPlan, Setup},
};
use crate::{
    cache::{Chain, RowShape, Span, StateStore, Store},
    ggml::{FusedAttention, Graph, HeadRows, KvSegment, Packing, Tensor, Type},
    model::{Attention, AttentionOptions, Mixed, State},
};

/// Intermediate results of a score are kept below this many bytes, by scoring a few KV heads at a time.
const SCORE_BYTES: usize = 64 << 20;

/// Attention of a ubatch over the caches of its sequences.
pub(super) struct CacheAttention<'a> {
    pub inputs: &'a mut Inputs,
    pub parts: &'a [Part],
    /// For each part the layers' caches of its sequence.
    pub caches: &'a [&'a [LayerCache]],
    pub setup: &'a Setup,
    pub look: Look,
    /// The layers' scores, where they are of attention mass.
    pub scores: Vec<Score>,
    /// Keys and values of the ubatch's tokens that layers to come read as well.
    pub shared: Vec<Shared>,
    /// What the last layer's state has given for all tokens of the ubatch, where it has one: a second look at the layer
    /// finds it there, for nothing of it depends on what is seen.
    pub recurred: Option<Tensor>,
}

/// A part's keys and values in a layer that others share.
pub(super) struct Shared {
    part: usize,
    layer: usize,
    k: Tensor,
    v: Tensor,
}

/// What queries do with the caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// They are written and attended to. Where it is asked for, the attention mass on what the layer would keep if it
    /// was lazy is scored.
    First { scored: bool },
    /// The tokens are in stores that keep all, and attend to this span of them, or to everything.
    Again(Option<Span>),
}

impl Attention for CacheAttention<'_> {
    fn attend(
        &mut self,
        graph: &Graph,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions<'_>,
    ) -> Tensor {
        self.attend_parts(graph, layer, q, Some([k, v]), options)
    }

    fn attend_shared(&mut self, graph: &Graph, layer: usize, q: &Tensor, options: &AttentionOptions<'_>) -> Tensor {
        self.attend_parts(graph, layer, q, None, options)
    }

    fn recur(
        &mut self,
        graph: &Graph,
        layer: usize,
        inputs: &[&Tensor],
        mix: &dyn Fn(&[Tensor], &State) -> Mixed,
    ) -> Tensor {
        if let (Look::Again(_), [part], Some(recurred)) = (self.look, self.parts, &self.recurred) {
            return graph.rows(recurred, part.first, part.n);
        }
        let mut outputs: Option<Tensor> = None;
        let (parts, caches) = (self.parts, self.caches);
        for (index, part) in parts.iter().enumerate() {
            let store = state(&caches[index][layer]);
            let [row, next] = self.inputs.state_rows(graph, index);
            let columns = graph.get_rows(&store.columns, &row);
            let before = State { columns, matrices: store.matrices.clone(), row };
            let own: Vec<Tensor> = inputs.iter().map(|input| graph.rows(input, part.first, part.n)).collect();
            let Mixed { output, columns, matrices } = mix(&own, &before);
            let write = |target: &Tensor, state: &Tensor| {
                let state = graph.reshape(&graph.contiguous_if_needed(state), &[target.shape()[0], 1]);
                graph.expand(&graph.set_rows(target, &state, &next));
            };
            write(&store.columns, &columns);
            if let (Some(target), Some(matrices)) = (&store.matrices, &matrices) {
                write(target, matrices);
            }
            outputs = Some(match outputs {
                Some(others) => graph.concat(&others, &output, 1),
                None => output,
            });
        }
        let outputs = outputs.expect("a ubatch has at least one part");
        self.recurred = Some(outputs.clone());
        outputs
    }
}

impl CacheAttention<'_> {
    pub(super) fn plan(&self, layer: usize) -> &LayerPlan {
        &self.setup.layers[layer].plan
    }

    fn attend_parts(
        &mut self,
        graph: &Graph,
        layer: usize,
        q: &Tensor,
        own: Option<[&Tensor; 2]>,
        options: &AttentionOptions<'_>,
    ) -> Tensor {
        let together = self.rotates_together(layer, options);
        let rotated = together.map(|format| self.rotated(graph, layer, format, q, own));
        let (q, own) = match &rotated {
            Some((q, own)) => (q, own.as_ref().map(|[k, v]| [k, v])),
            None => (q, own),
        };
        let mut attended: Option<Tensor> = None;
        let owner = self.setup.model.hparams().owner(layer);
        let caches: Vec<&LayerCache> = self.caches.iter().map(|layers| &layers[owner]).collect();
        for Group { parts, slab } in groups(self.plan(owner), self.parts, &caches) {
            let is_rotated = together.is_some();
            let one = match slab {
                Some((slab, slots)) => {
                    self.attend_together(graph, (parts, slab, slots), layer, q, own, (options, is_rotated))
                }
                None => self.attend_part(graph, (parts.start, layer), q, own, (options, is_rotated)),
            };
            attended = Some(match attended {
                Some(others) => graph.concat(&others, &one, 1),
                None => one,
            });
        }
        let attended = attended.expect("a ubatch has at least one part");
        match together {
            Some(format) => self.rotated_back(graph, layer, format, attended),
            None => attended,
        }
    }

    /// `own`: the tokens' keys and values, of a layer that has some. `is_rotated`: they and the queries are as the rows are, and
    /// so is to be the result.
    fn attend_part(
        &mut self,
        graph: &Graph,
        (index, reader): (usize, usize),
        q: &Tensor,
        own: Option<[&Tensor; 2]>,
        (options, is_rotated): (&AttentionOptions<'_>, bool),
    ) -> Tensor {
        let part = self.parts[index];
        let layers: &[LayerCache] = self.caches[index];
        let hparams = self.setup.model.hparams();
        // Whose keys and values are read: all but the queries is that layer's.
        let layer = hparams.owner(reader);
        let last_reader = hparams.last_reader(layer);
        let (cache, rotations) = (&layers[layer], &self.setup.layers[layer].rotations);
        let format = store(cache).format();
        let (rotate_k, rotate_v) = (format.rotate_k && !is_rotated, format.rotate_v && !is_rotated);
        let mut q = slice(graph, q, &part);
        if rotate_k {
            q = rotations.rotate_key(graph, &q);
        }
        // `[head size, tokens, heads]`: what attention wants.
        let queries = swapped(graph, &q);
        // `[value size, tokens, heads]` → `[value size × heads, tokens]`
        let joined = |mut attended: Tensor| {
            if rotate_v {
                attended = swapped(graph, &rotations.rotate_value(graph, &swapped(graph, &attended)));
            }
            if let Some(matrices) = options.outputs {
                attended = graph.mul_mat(matrices, &attended);
            }
            rows(graph, &graph.contiguous_if_needed(&swapped(graph, &attended)))
        };
        if let Look::Again(span) = self.look {
            return joined(self.attend_again(graph, (index, layer), cache, &queries, span, options));
        }
        let [k, v] = match own {
            Some([k, v]) => {
                let mut k = slice(graph, k, &part);
                if rotate_k {
                    k = rotations.rotate_key(graph, &k);
                }
                let k = rows(graph, &k);
                let v = if self.plan(layer).rows.values_in_keys {
                    k.clone()
                } else {
                    let v = slice(graph, v, &part);
                    rows(graph, &if rotate_v { rotations.rotate_value(graph, &v) } else { v })
                };
                if last_reader != layer {
                    self.shared.push(Shared { part: index, layer, k: k.clone(), v: v.clone() });
                }
                [k, v]
            }
            None => {
                let known = self.shared.iter().find(|shared| (shared.part, shared.layer) == (index, layer));
                known.map(|shared| [shared.k.clone(), shared.v.clone()]).expect("the owner's graph is built before")
            }
        };
        let own = Own { queries, k, v, heads: self.plan(layer).rows.heads };

        // Several tokens read their own keys as they come and are written afterwards where a ring would overwrite rows
        // that an earlier one's window still holds, or where the newest tokens of a quantised cache are to be exact.
        let overwrites = cache.span.is_some_and(|span| part.n_past + part.n > span.n_rows());
        if reader == layer
            && let Some(input) = options.input
        {
            self.write_scores(graph, (index, layer), cache, input);
        }
        let write_first = part.n == 1 || !(overwrites || cache.exact.is_some());
        let is_owner = reader == layer;
        if write_first && is_owner {
            self.write(graph, index, cache, &own, Which::Both);
        }
        let attended = self.attend_cache(graph, (index, layer), cache, &own, write_first, options);
        if !write_first {
            // Nodes run in the order in which they are added. The last layer that reads them writes the rings; a store that
            // keeps all is written at once, for its scores.
            graph.expand(&attended);
            match (is_owner && !overwrites, reader == last_reader) {
                (true, true) => self.write(graph, index, cache, &own, Which::Both),
                (true, false) => self.write(graph, index, cache, &own, Which::Main),
                (false, true) if overwrites => self.write(graph, index, cache, &own, Which::Both),
                (false, true) => self.write(graph, index, cache, &own, Which::Exact),
                (false, false) => {}
            }
        }
        if self.look == (Look::First { scored: true }) && part.n_score > 0 && cache.is_active() {
            self.score(graph, (index, layer), cache, &own.queries, options);
        }
        joined(attended)
    }

    /// Attends to a span of what the layer holds, the tokens included. → `[value size, tokens, heads]`
    fn attend_again(
        &mut self,
        graph: &Graph,
        (index, layer): (usize, usize),
        cache: &LayerCache,
        queries: &Tensor,
        span: Option<Span>,
        options: &AttentionOptions<'_>,
    ) -> Tensor {
        let (part, store) = (self.parts[index], store(cache));
        let n_rows = cache.rows_read(part.n_past + part.n);
        let device = self.plan(layer).apart;
        let rows = self.plan(layer).rows;
        if let Some((keys, chains)) = in_tiles(cache, span, n_rows) {
            let mask = self.inputs.mask(graph, &part, index, &keys, device);
            let views = chains.map(|(chain, n)| [chain.keys(rows, graph, n), chain.values(rows, graph, n)]);
            let masks = [columns(graph, &mask, 0, n_rows), columns(graph, &mask, n_rows, keys[1].n_rows())];
            let segments: Vec<KvSegment<'_>> =
                views.iter().zip(&masks).map(|([k, v], mask)| KvSegment { k, v, mask: Some(mask) }).collect();
            return swapped(graph, &fused(graph, queries, &segments, options, &[]));
        }
        let mask = self.inputs.mask(graph, &part, index, &[Keys::All { span, n_rows, exact: None }], device);
        let (k, v) = (store.keys(rows, graph, n_rows), store.values(rows, graph, n_rows));
        attention(graph, self.plan(layer), queries, [&k, &v], &mask, options)
    }

    /// Writes the tokens' rows into the layer's stores.
    fn write(&mut self, graph: &Graph, index: usize, cache: &LayerCache, own: &Own, which: Which) {
        let part = self.parts[index];
        let main = cache.store.as_ref().filter(|_| which != Which::Exact);
        let exact = cache.exact.as_ref().filter(|_| which != Which::Main);
        let stores = [main.map(|store| (store, cache.span)), exact.map(|exact| (&exact.store, Some(exact.span)))];
        // Before the exact store loses what the tiles are made of.
        if main.is_some_and(|store| store.format().has_tiles()) {
            self.write_tiles(graph, index, cache, own);
        }
        let written = |store: &Store| {
            let values = store.own_value_rows().map(|stored| (own.v.clone(), stored.clone()));
            let all = std::iter::once((own.k.clone(), store.k.clone())).chain(values);
            all.filter(|(_, stored)| !stored.ty().is_tiles())
        };
        for (chain, span) in stores.into_iter().flatten() {
            let from = if span.is_some() { 0 } else { cache.held_from };
            let Some(span) = span.filter(|_| part.n > 1) else {
                // Rows of their own, one after the other.
                let row = span.map_or(part.n_past - from, |span| span.row(part.n_past));
                for run in chain.runs(row..row + part.n) {
                    let tokens = run.rows.start - row..run.rows.end - row;
                    // The next steps write other rows of the piece.
                    let rows = self.inputs.rows(graph, index, tokens.clone(), span, from + run.piece.start);
                    for (own, stored) in written(run.store) {
                        let own = some(graph, &own, tokens.start, tokens.len());
                        let stored = some(graph, &stored, run.piece_first, run.piece.len());
                        graph.expand(&graph.set_rows(&stored, &own, &rows));
                    }
                }
                continue;
            };
            // Of tokens that share a row the last is kept.
            for kept in span.kept_ranges(part.n_past + part.n) {
                let kept = kept.start.max(part.n_past)..kept.end;
                if kept.is_empty() {
                    continue;
                }
                let row = span.row(kept.start);
                for run in chain.runs(row..row + kept.len()) {
                    for (own, stored) in written(run.store) {
                        let token = kept.start - part.n_past + run.rows.start - row;
                        let from = graph.rows(&own, token, run.rows.len());
                        let to = graph.rows(&stored, run.first, run.rows.len());
                        graph.expand(&graph.copy(&from, &to));
                    }
                }
            }
        }
    }

    /// Makes the tiles that the tokens finish, of the tokens and of what the exact store has.
    fn write_tiles(&mut self, graph: &Graph, index: usize, cache: &LayerCache, own: &Own) {
        let part = self.parts[index];
        let (Some(chain), Some(exact)) = (&cache.store, &cache.exact) else {
            unreachable!("beside a store of tiles is an exact one")
        };
        let heads = own.heads;
        let due = self.inputs.due(graph, &part, index, cache.span, exact.span);
        for is_key in [true, false] {
            let rows = |chain: &Chain| -> Vec<Tensor> {
                let tensor = |store: &Store| if is_key { store.k.clone() } else { store.value_rows().clone() };
                let all = chain.runs(0..chain.n_rows());
                all.map(|run| some(graph, &tensor(run.store), run.first, run.rows.len())).collect()
            };
            let (rows_written, tiles) = (if is_key { &own.k } else { &own.v }, rows(chain));
            if tiles[0].ty().is_tiles() {
                let own = &graph.contiguous_if_needed(rows_written);
                let packing = Packing { own, exact: &rows(&exact.store), tiles: &tiles, due: &due, heads };
                graph.expand(&graph.pack_tiles(&packing));
            }
        }
    }

    /// Writes how much the tokens' rows will be asked for, where these may be pruned or rescued later.
    fn write_scores(&mut self, graph: &Graph, (index, layer): (usize, usize), cache: &LayerCache, input: &Tensor) {
        let (Some(pruning), Some(scores)) = (&self.setup.layers[layer].pruning, &cache.scores) else { return };
        let Part { first, n, .. } = self.parts[index];
        let of_rows = graph.mul_mat(&pruning.map, &some(graph, input, first, n));
        let from = if cache.span.is_some() { 0 } else { cache.held_from };
        let rows = self.inputs.rows(graph, index, 0..n, cache.span, from);
        graph.expand(&graph.set_rows(&scores.tensor, &of_rows, &rows));
    }

    /// Attends to what the layer keeps, and to the tokens themselves. `has_own`: they are in the cache already.
    /// → `[value size, tokens, heads]`
    fn attend_cache(
        &mut self,
        graph: &Graph,
        (index, layer): (usize, usize),
        cache: &LayerCache,
        own: &Own,
        has_own: bool,
        options: &AttentionOptions<'_>,
    ) -> Tensor {
        let (part, span, shape) = (self.parts[index], cache.span, self.plan(layer).rows);
        let (kernel, device) = (self.plan(layer).kernel, self.plan(layer).apart);
        // Rounded as they will be stored. Not quantised though: that would lose more than is needed.
        let rounded = |rows: &Tensor, stored: Type| match stored {
            Type::F32 => rows.clone(),
            ty if ty.is_quantized() => graph.cast(rows, Type::F16),
            ty => graph.cast(rows, ty),
        };
        let own_rows = cache
            .store
            .as_ref()
            .filter(|_| !has_own)
            .map(|store| (rounded(&own.k, store.format().k), rounded(&own.v, store.format().v)));
        let mut groups: Vec<(Source<'_>, Keys)> = Vec::new();
        if let Some(store) = &cache.store {
            let n_past = part.n_past;
            let n_rows = if has_own { cache.rows_read(n_past + part.n) } else { cache.used_rows(n_past) };
            let exact = cache.exact.as_ref().map(|exact| exact.span);
            let from = cache.held_from;
            groups.push((Source::Stored(store), Keys::Stored { span, from, n_rows, has_own, exact }));
        }
        if let Some(exact) = &cache.exact {
            let keys = Keys::Exact { span, exact: exact.span, has_own };
            groups.push((Source::Stored(&exact.store), keys));
        }
        if part.n_past == 0 && !has_own {
            groups.clear();
        }
        if let Some((k, v)) = &own_rows {
            groups.push((Source::Own(k, v), Keys::Own { span, n: part.n }));
        }
        let keys: Vec<Keys> = groups.iter().map(|(_, keys)| *keys).collect();
        let mask = self.inputs.mask(graph, &part, index, &keys, device);
        if kernel == Kernel::Fused {
            let mut first = 0;
            let views: Vec<([Vec<Tensor>; 2], Tensor)> = groups
                .iter()
                .map(|(source, keys)| {
                    let mask = columns(graph, &mask, first, keys.n_rows());
                    first += keys.n_rows();
                    (source.heads(graph, shape, keys.n_rows()), mask)
                })
                .collect();
            let segments: Vec<KvSegment<'_>> =
                views.iter().map(|([k, v], mask)| KvSegment { k, v, mask: Some(mask) }).collect();
            let lists = cache.lists().filter(|lists| lists.counts().any(|n| n > 0));
            let of_heads = lists.map_or_else(Vec::new, |lists| lists.rows(graph));
            return swapped(graph, &fused(graph, &own.queries, &segments, options, &of_heads));
        }
        match &groups[..] {
            [(source, keys)] if has_own => {
                let [k, v] = source.heads(graph, shape, keys.n_rows());
                attention(graph, self.plan(layer), &own.queries, [&k, &v], &mask, options)
            }
            groups => {
                // In one piece, one after the other: ggml's operations know one tensor only.
                let joined = |tensor: fn(&Source<'_>) -> Tensor| {
                    let parts = groups
                        .iter()
                        .map(|(source, keys)| graph.cast(&graph.rows(&tensor(source), 0, keys.n_rows()), Type::F32));
                    let all = parts.reduce(|all, more| graph.concat(&all, &more, 1)).expect("at least the tokens' own");
                    // What ggml reads of a cache that is not f32.
                    let is_f32 = groups.iter().all(|(source, _)| tensor(source).ty() == Type::F32);
                    if is_f32 { all } else { graph.cast(&all, Type::F16) }
                };
                let k = joined(|source| source.keys());
                let v = if shape.values_in_keys { k.clone() } else { joined(|source| source.values()) };
                let [k, v] = Source::Own(&k, &v).heads(graph, shape, k.shape()[1]);
                attention(graph, self.plan(layer), &own.queries, [&k, &v], &mask, options)
            }
        }
    }

    /// The attention mass of the part's last queries on what a lazy layer would keep (method: SimLayerKV, section 3).
    /// The store holds the part's tokens.
    fn score(
        &mut self,
        graph: &Graph,
        (index, layer): (usize, usize),
        cache: &LayerCache,
        queries: &Tensor,
        options: &AttentionOptions<'_>,
    ) {
        let Part { n, n_past, n_score, .. } = self.parts[index];
        // Attention needs the queries as well: they are not the score's.
        graph.expand(queries);
        let first_node = graph.n_nodes();
        let n_rows = cache.rows_read(n_past + n);
        let LayerPlan { apart, lazy_span, kernel, rows, .. } = *self.plan(layer);
        let stored = Keys::Stored { span: None, from: 0, n_rows, has_own: true, exact: None };
        let (all, chains) = match in_tiles(cache, None, n_rows) {
            Some((keys, chains)) => (keys.to_vec(), chains.to_vec()),
            None => (vec![stored], vec![(store(cache), n_rows)]),
        };
        let mask = self.inputs.mask(graph, &self.parts[index], index, &all, apart);
        let kept: Vec<Tensor> = all
            .iter()
            .map(|keys| self.inputs.kept(graph, &self.parts[index], index, lazy_span, *keys, apart))
            .collect();
        let keys: Vec<Vec<Tensor>> = chains.iter().map(|(chain, n)| chain.keys(rows, graph, *n)).collect();
        let mask = graph.rows(&mask, n - n_score, n_score);
        let [head_size, _, heads, _] = queries.shape();
        let [_, token_bytes, head_bytes, _] = queries.strides();
        let first = (n - n_score) * token_bytes;
        let queries = graph.view(queries, [head_size, n_score, heads], [token_bytes, head_bytes], first);
        let masses = if kernel == Kernel::Fused {
            vec![fused_mass(graph, &queries, (&keys, &kept), &mask, options)]
        } else {
            masses(graph, &queries, single(&keys[0]), &kept[0], &mask, options)
        };
        for mass in &masses {
            if let Some(device) = apart {
                graph.place(mass, device);
            }
            graph.expand(mass);
        }
        graph.name_nodes_from(first_node, SCORE_NAME);
        self.scores.push(Score { part: index, layer, taken: Taken::Masses(masses) });
    }
}

/// Groups of rows, and the stores that these are in with how many there are.
type Groups<'a> = ([Keys; 2], [(&'a Chain, usize); 2]);

/// The rows of a layer that keeps all, and their stores with how many there are, where they are in tiles: the newest are in
/// the exact store alone.
fn in_tiles(cache: &LayerCache, span: Option<Span>, n_rows: usize) -> Option<Groups<'_>> {
    let store = store(cache);
    let exact = cache.exact.as_ref().filter(|_| store.format().has_tiles())?;
    let stored = Keys::All { span, n_rows, exact: Some(exact.span) };
    let newest = Keys::Exact { span, exact: exact.span, has_own: true };
    Some(([stored, newest], [(store, n_rows), (&exact.store, exact.span.n_rows())]))
}

/// The state of a layer that has one.
fn state(cache: &LayerCache) -> &StateStore {
    cache.state.as_ref().expect("room was reserved before the graph is built")
}

/// Rows that attention reads.
enum Source<'a> {
    Stored(&'a Chain),
    /// The tokens' own keys and values.
    Own(&'a Tensor, &'a Tensor),
}

impl Source<'_> {
    /// The first `n` keys and values, by heads and in pieces: see [`KvSegment`].
    fn heads(&self, graph: &Graph, shape: RowShape, n: usize) -> [Vec<Tensor>; 2] {
        match self {
            Source::Stored(chain) => [chain.keys(shape, graph, n), chain.values(shape, graph, n)],
            Source::Own(k, v) => [vec![shape.keys(graph, k, 0..n)], vec![shape.values(graph, v, 0..n)]],
        }
    }

    /// Rows of keys, for kernels that want them in one piece.
    fn keys(&self) -> Tensor {
        match self {
            Source::Stored(chain) => chain.single().k.clone(),
            Source::Own(k, _) => (*k).clone(),
        }
    }

    /// Rows of values, likewise.
    fn values(&self) -> Tensor {
        match self {
            Source::Stored(chain) => chain.single().value_rows().clone(),
            Source::Own(_, v) => (*v).clone(),
        }
    }
}

/// The one piece of rows for kernels that want no more.
fn single(pieces: &[Tensor]) -> &Tensor {
    assert_eq!(pieces.len(), 1, "rows are in one piece");
    &pieces[0]
}

/// Some of a tensor's rows, or itself where they are all.
fn some(graph: &Graph, rows: &Tensor, first: usize, n: usize) -> Tensor {
    if n == rows.shape()[1] { rows.clone() } else { graph.rows(rows, first, n) }
}

/// The store of a layer whose tokens have room.
pub(super) fn store(cache: &LayerCache) -> &Chain {
    cache.store.as_ref().expect("room was reserved before the graph is built")
}

/// Attention by our own operation. → `[value size, heads, tokens]`
fn fused(
    graph: &Graph,
    queries: &Tensor,
    segments: &[KvSegment<'_>],
    options: &AttentionOptions<'_>,
    of_heads: &[HeadRows],
) -> Tensor {
    let AttentionOptions { scale, softcap, sinks, .. } = *options;
    graph.fused_attention(queries, segments, &FusedAttention { scale, soft_cap: softcap, sinks, of_heads })
}

/// Attention to keys and values, in pieces where the kernel is our own, on the layer's device. → `[value size, tokens, heads]`, of as
/// many sequences as the queries are of.
pub(super) fn attention(
    graph: &Graph,
    plan: &LayerPlan,
    queries: &Tensor,
    [keys, values]: [&[Tensor]; 2],
    mask: &Tensor,
    options: &AttentionOptions<'_>,
) -> Tensor {
    let place = |node: Tensor| {
        if let Some(device) = plan.apart {
            graph.place(&node, device);
        }
        node
    };
    if plan.kernel == Kernel::Fused {
        let segment = KvSegment { k: keys, v: values, mask: Some(mask) };
        return swapped(graph, &fused(graph, queries, &[segment], options, &[]));
    }
    let (keys, values) = (single(keys), single(values));
    if plan.kernel == Kernel::Flash {
        let AttentionOptions { scale, softcap, sinks, .. } = *options;
        // As llama.cpp does it, so that the logits are its own.
        let halved = |rows: &Tensor| if rows.ty() == Type::F32 { graph.cast(rows, Type::F16) } else { rows.clone() };
        let (keys, values) = (&halved(keys), &halved(values));
        let attended = place(graph.flash_attn(queries, keys, values, mask, scale, softcap.unwrap_or(0.0), sinks));
        return swapped(graph, &attended);
    }
    let weights = place(weights(graph, queries, keys, mask, options));
    let values = if values.ty().is_quantized() { graph.cast(values, Type::F32) } else { values.clone() };
    let transposed = graph.contiguous(&graph.permute(&values, [1, 0, 2, 3]));
    place(graph.mul_mat(&transposed, &weights))
}

/// Heads and tokens in each other's place.
fn swapped(graph: &Graph, heads: &Tensor) -> Tensor {
    graph.permute(heads, [0, 2, 1, 3])
}

/// Which of a layer's stores are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Both,
    Main,
    Exact,
}

/// A part's tokens, rotated as the store is: queries `[head size, tokens, heads]`, keys and values as rows.
struct Own {
    queries: Tensor,
    k: Tensor,
    /// The keys, where values are in them.
    v: Tensor,
    /// KV heads.
    heads: usize,
}

/// The mass `[1, n_score, heads]` of queries `[head size, n_score, heads]`, as attention whose values are what is
/// `kept` `[n_score, rows]`: element i of what query i reads is the sum of its weights on what is kept for it.
fn fused_mass(
    graph: &Graph,
    queries: &Tensor,
    (keys, kept): (&[Vec<Tensor>], &[Tensor]),
    mask: &Tensor,
    options: &AttentionOptions<'_>,
) -> Tensor {
    let starts = kept.iter().scan(0, |first, kept| {
        let start = *first;
        *first += kept.shape()[1];
        Some((start, kept.shape()[1]))
    });
    let masks: Vec<Tensor> = starts.map(|(first, n)| columns(graph, mask, first, n)).collect();
    let segments: Vec<KvSegment<'_>> = (keys.iter().zip(kept).zip(&masks))
        .map(|((k, kept), mask)| KvSegment { k, v: slice::from_ref(kept), mask: Some(mask) })
        .collect();
    let read = fused(graph, queries, &segments, options, &[]);
    let [n_score, heads, ..] = read.shape();
    let [_, head_bytes, query_bytes, _] = read.strides();
    let diagonal = graph.view(&read, [1, n_score, heads], [query_bytes + size_of::<f32>(), head_bytes], 0);
    graph.contiguous(&diagonal).as_output()
}

/// The same in ggml's operations, of a few heads at a time.
fn masses(
    graph: &Graph,
    queries: &Tensor,
    keys: &Tensor,
    kept: &Tensor,
    mask: &Tensor,
    options: &AttentionOptions<'_>,
) -> Vec<Tensor> {
    let [head_size, n_score, heads, _] = queries.shape();
    let [_, n_rows, kv_heads, _] = keys.shape();
    let kept = graph.contiguous(&graph.permute(kept, [1, 0, 2, 3]));
    let [_, token_bytes, head_bytes, _] = queries.strides();
    let [_, row_bytes, kv_head_bytes, _] = keys.strides();
    let shared = heads / kv_heads;
    let bytes_per_kv_head = n_rows * n_score * shared * size_of::<f32>();
    let at_once = (SCORE_BYTES / bytes_per_kv_head.max(1)).clamp(1, kv_heads);
    let mass = |first: usize| {
        let some = at_once.min(kv_heads - first);
        let offset = first * shared * head_bytes;
        let q = graph.view(queries, [head_size, n_score, some * shared], [token_bytes, head_bytes], offset);
        let k = graph.view(keys, [head_size, n_rows, some], [row_bytes, kv_head_bytes], first * kv_head_bytes);
        let sinks = options.sinks.map(|sinks| {
            let [_, logit_bytes, ..] = sinks.strides();
            let offset = first * shared * size_of::<f32>();
            graph.view(sinks, [some * shared, 1, 1], [logit_bytes, logit_bytes], offset)
        });
        let weights = weights(graph, &q, &k, mask, &AttentionOptions { sinks: sinks.as_ref(), ..*options });
        graph.sum_rows(&graph.mul(&weights, &kept)).as_output()
    };
    (0..kv_heads).step_by(at_once).map(mass).collect()
}

/// Columns of a mask `[rows, tokens]`.
fn columns(graph: &Graph, mask: &Tensor, first: usize, n: usize) -> Tensor {
    let [cell_bytes, row_bytes, ..] = mask.strides();
    graph.view(mask, [n, mask.shape()[1], 1], [row_bytes, row_bytes], first * cell_bytes)
}

/// Attention weights `[rows, tokens, heads]` of queries `[head size, tokens, heads]`.
fn weights(graph: &Graph, queries: &Tensor, keys: &Tensor, mask: &Tensor, options: &AttentionOptions<'_>) -> Tensor {
    let AttentionOptions { scale, softcap, sinks, .. } = *options;
    let products = graph.mul_mat_f32(keys, queries);
    match softcap {
        Some(cap) => graph.soft_max(&graph.tanh(&graph.scale(&products, scale / cap)), mask, cap, sinks),
        None => graph.soft_max(&products, mask, scale, sinks),
    }
}

/// The part's tokens of `[head size, heads, tokens]`.
pub(super) fn slice(graph: &Graph, all: &Tensor, part: &Part) -> Tensor {
    let [head_size, heads, n, _] = all.shape();
    if part.n == n {
        return all.clone();
    }
    let [_, head_bytes, token_bytes, _] = all.strides();
    graph.view(all, [head_size, heads, part.n], [head_bytes, token_bytes], part.first * token_bytes)
}

/// `[head size, heads, tokens]` → `[head size × heads, tokens]`.
pub(super) fn rows(graph: &Graph, heads: &Tensor) -> Tensor {
    let [head_size, n_heads, n, _] = heads.shape();
    graph.reshape(heads, &[head_size * n_heads, n])
}
