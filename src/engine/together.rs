//! What is computed once for the tokens of all sequences of a ubatch, where it could be once for each: on devices, where every
//! operation is a kernel to launch.
//!
//! Stores of sequences that keep decoding together come to lie in one slab ([`gather`]), so that one operation writes the tokens' rows
//! into all of them, and one reads them.

use std::ops::Range;

use super::{
    attention::{CacheAttention, attention, rows, slice, store},
    batch::{Part, SeqId},
    executor::Executor,
    inputs::Keys,
    layer::LayerCache,
    sequences::Sequences,
    setup::{Kernel, LayerPlan, ROWS_STEP, Setup},
};
use crate::{
    cache::{self, Chain, Format, Slab, Slots},
    ggml::{Error, Graph, Tensor},
    model::AttentionOptions,
};

/// Neighbouring parts of a ubatch, and where their rows in a layer are, when one operation reads them.
pub(super) struct Group<'a> {
    pub parts: Range<usize>,
    pub slab: Option<(&'a Slab, Slots)>,
}

/// The parts of a ubatch in groups, as one layer's caches are.
pub(super) fn groups<'a>(plan: &LayerPlan, parts: &[Part], caches: &[&'a LayerCache]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    for (index, (part, cache)) in parts.iter().zip(caches).enumerate() {
        if let Some(last) = groups.last_mut()
            && may_join(plan, &parts[last.parts.start], caches[last.parts.start])
            && may_join(plan, part, cache)
            && cache.span == caches[last.parts.start].span
            && let Some(slab) =
                Slots::of(caches[last.parts.start..=index].iter().filter_map(|cache| cache.store.as_ref()))
        {
            (last.parts.end, last.slab) = (index + 1, Some(slab));
        } else {
            groups.push(Group { parts: index..index + 1, slab: None });
        }
    }
    groups
}

/// Whether one operation may read a part's rows with those of others.
fn may_join(plan: &LayerPlan, part: &Part, cache: &LayerCache) -> bool {
    let is_apart = plan.apart.is_some() && plan.kernel != Kernel::Fused && !plan.rows.values_in_keys;
    let is_token = part.n == 1 && part.n_score == 0 && !part.see_each_other;
    is_apart
        && is_token
        && cache.store.is_some()
        && cache.exact.is_none()
        && (cache.span.is_some() || cache.held_from == 0)
}

/// Steps of the same sequences before their stores are brought together: that takes as long as some steps, and is in vain where others
/// decode at every step.
const STEADY: usize = 16;

/// Which sequences decode together, and for how long they have.
#[derive(Debug, Default)]
pub(super) struct Company {
    seqs: Vec<SeqId>,
    steps: usize,
    /// Whether there was no memory to bring stores together: it is not tried again.
    lacks_memory: bool,
}

impl Company {
    /// Whether stores of these sequences, which have a token each in this step, are worth being brought together.
    fn is_steady(&mut self, seqs: Vec<SeqId>) -> bool {
        if self.seqs == seqs {
            self.steps += 1;
        } else {
            (self.seqs, self.steps) = (seqs, 0);
        }
        self.steps >= STEADY && !self.lacks_memory
    }

    /// Stores of several sequences were to be moved. They stay where they are where that failed.
    pub fn note_moved(&mut self, moved: &Result<(), Error>) {
        self.lacks_memory |= matches!(moved, Err(Error::OutOfMemory { .. }));
    }
}

/// Brings the stores of sequences that keep decoding together into slabs, where one operation can serve several of them; and takes
/// those out that are left of slabs which others have gone from.
pub(super) fn gather(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    parts: &[Part],
    seqs: &[SeqId],
) {
    if setup.layers.iter().all(|layer| layer.plan.apart.is_none()) {
        return;
    }
    let decoding = parts.iter().zip(seqs).filter(|(part, _)| part.n == 1).map(|(_, &seq)| seq).collect();
    if executor.company.is_steady(decoding) {
        bring_together(setup, executor, sequences, parts, seqs);
    }
    sequences.leave_slabs(executor);
}

fn bring_together(setup: &Setup, executor: &mut Executor, sequences: &mut Sequences, parts: &[Part], seqs: &[SeqId]) {
    let mut any = false;
    for (index, layer) in setup.layers.iter().enumerate() {
        for run in runs(&layer.plan, parts, &sequences.caches(seqs, index)) {
            let mut chains = sequences.chains(&seqs[run], index);
            if is_gathered(&chains) {
                continue;
            }
            if !any {
                executor.forget();
            }
            any = true;
            let moved = cache::together(&mut executor.scheduler, &mut chains);
            executor.company.note_moved(&moved);
        }
    }
    if any {
        executor.forget();
    }
}

/// Parts that come one after the other and whose stores are of about one size, so that hardly more is read than there is.
fn runs(plan: &LayerPlan, parts: &[Part], caches: &[&LayerCache]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut sizes = 0..0;
    for (index, (part, cache)) in parts.iter().zip(caches).enumerate() {
        let Some(store) = cache.store.as_ref().filter(|store| may_join(plan, part, cache) && store.is_unshared())
        else {
            continue;
        };
        let n = store.n_rows();
        let (least, most) = (sizes.start.min(n), sizes.end.max(n));
        let is_alike = |other: &LayerCache| {
            other.span == cache.span && other.store.as_ref().is_some_and(|other| other.format() == store.format())
        };
        match runs.last_mut() {
            Some(run)
                if run.end == index && is_alike(caches[run.start]) && most - least <= (least / 10).max(ROWS_STEP) =>
            {
                run.end += 1;
                sizes = least..most;
            }
            _ => {
                runs.push(index..index + 1);
                sizes = n..n;
            }
        }
    }
    runs.retain(|run| run.len() > 1);
    runs
}

/// Whether one operation serves the chains already, and the slab has no room that nobody uses.
fn is_gathered(chains: &[&mut Chain]) -> bool {
    Slots::of(chains.iter().map(|chain| &**chain)).is_some()
        && !chains[0].slot().is_some_and(|(slab, _)| Slab::has_gaps(slab))
}

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
        let k = slab.keys(plan.rows, graph, slots, n_rows);
        let v = slab.values(plan.rows, graph, slots, n_rows);
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

/// Rows that are read of each of these parts' stores, which lie in one slab.
pub(super) fn rows_read(parts: &[Part], caches: &[&LayerCache]) -> usize {
    parts.iter().zip(caches).map(|(part, cache)| cache.rows_read(part.n_past + part.n)).max().unwrap_or(0)
}
