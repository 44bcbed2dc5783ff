//! Stores of sequences that keep decoding together are brought together, so that one operation writes the tokens' rows into all of
//! them, and one reads them: on devices, where every operation is a kernel to launch.

use std::ops::Range;

use super::{
    batch::{BatchEntry, Part, SeqId},
    executor::Executor,
    groups::may_join,
    layer::LayerCache,
    sequences::Sequences,
    setup::{LayerPlan, ROWS_STEP, Setup},
};
use crate::cache::{self, Chain, slots};

/// Brings the stores of sequences that keep decoding together into slabs, where one operation can serve several of them; and takes
/// those out that are left of slabs which others have gone from.
pub(super) fn gather(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    batch: &[BatchEntry<'_>],
    parts: &[Part],
) {
    if setup.layers.iter().all(|layer| layer.plan.apart.is_none()) {
        return;
    }
    let seqs: Vec<SeqId> = batch.iter().map(|entry| entry.seq).collect();
    let decoding = parts.iter().zip(&seqs).filter(|(part, _)| part.n == 1).map(|(_, &seq)| seq).collect();
    if executor.company.is_steady(decoding) {
        bring_together(setup, executor, sequences, parts, &seqs);
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
    slots(chains.iter().map(|chain| &**chain)).is_some() && !chains[0].is_left()
}
