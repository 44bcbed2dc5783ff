//! Parts of a ubatch whose rows in a layer one operation reads, and for how long sequences have decoded together.

use std::ops::Range;

use super::{
    batch::{Part, SeqId},
    layer::LayerCache,
    setup::{Kernel, LayerPlan},
};
use crate::{
    cache::{Slab, Slots, slots},
    ggml::Error,
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
            && let Some(slab) = slots(caches[last.parts.start..=index].iter().filter_map(|cache| cache.store.as_ref()))
        {
            (last.parts.end, last.slab) = (index + 1, Some(slab));
        } else {
            groups.push(Group { parts: index..index + 1, slab: None });
        }
    }
    groups
}

/// Whether one operation may read a part's rows with those of others.
pub(super) fn may_join(plan: &LayerPlan, part: &Part, cache: &LayerCache) -> bool {
    let is_apart = plan.apart.is_some() && plan.kernel != Kernel::Fused && !plan.rows.values_in_keys;
    let is_token = part.n == 1 && part.n_score == 0 && !part.see_each_other;
    is_apart
        && is_token
        && cache.store.is_some()
        && cache.exact.is_none()
        && (cache.span.is_some() || cache.held_from == 0)
}

/// Rows that are read of each of these parts' stores, which lie in one slab.
pub(super) fn rows_read(parts: &[Part], caches: &[&LayerCache]) -> usize {
    parts.iter().zip(caches).map(|(part, cache)| cache.rows_read(part.n_past + part.n)).max().unwrap_or(0)
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
    pub fn is_steady(&mut self, seqs: Vec<SeqId>) -> bool {
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
