//! Pruning: of the rows of layers that are not lazy those are dropped that no later token will look for, once they are old.
//!
//! A linear map of the layer's normed input foretells how much a row will be asked for ([`PruneMap`](crate::lazy::PruneMap), after KVzap, arXiv
//! 2601.07891); one bound for all layers and KV heads says what is dropped, so that heads keep very different shares. Each head
//! has a list of the rows that it keeps of the older ones, which every later token sees; the newest are in the layer's store as
//! ever. The keys keep the positions that they were made with.
//!
//! Rows are dropped in steps, so that a decode graph serves for many tokens.

use std::{cmp::Ordering, slice};

use super::{
    error::Error,
    executor::Executor,
    layer::LayerCache,
    pruning::{BACK, SINK, STORE_ROWS, WINDOW},
    sequence::Sequence,
    setup::{LayerSetup, Setup},
};
use crate::{
    cache::{Format, HeadLists},
    ggml,
    lazy::Policy,
};

/// Rows that are looked at together, so that what is copied meanwhile stays small.
const PIECE: usize = 1024;

impl Setup {
    /// Whether rows are dropped while a prompt is read: nothing is to be decided at its end that would need them.
    pub fn prunes_at_once(&self) -> bool {
        let lazy = &self.params.lazy;
        (lazy.policy == Policy::Off || lazy.windowed_prefill()) && !lazy.narrow_keys
    }
}

impl LayerCache {
    /// Whether enough rows are old to drop some of them.
    fn may_prune(&self, n_past: usize, setup: &LayerSetup) -> bool {
        let has_scores = setup.prunes && self.scores.is_some() && self.store.is_some();
        has_scores && self.span.is_none() && n_past >= self.held_from + STORE_ROWS
    }

    /// Drops the rows that are old, of `n_past`, and little asked for. What the layer holds is as before after an error.
    pub fn prune(&mut self, n_past: usize, setup: &LayerSetup) -> Result<(), ggml::Error> {
        let (Some(pruning), Some(store), Some(scores)) = (&setup.pruning, &self.store, &self.scores) else {
            return Ok(());
        };
        if !self.may_prune(n_past, setup) {
            return Ok(());
        }
        let (n_old, n_new) = (n_past - WINDOW - BACK - self.held_from, WINDOW + BACK);
        let (first, from, heads) = (self.held_from, self.held_from + n_old, pruning.least.len());
        // What the exact store has of the beginning is hidden in the other one; lists hide nothing.
        let n_exact = self.exact.as_ref().map_or(0, |exact| exact.span.n_sink);
        let values = scores.read(0..n_old);
        let keeps = |row: usize, head: usize| {
            let (position, score) = (first + row, values[row * heads + head]);
            let is_low = score.partial_cmp(&pruning.least[head]) == Some(Ordering::Less);
            position >= n_exact && (position < SINK || !is_low)
        };
        let more: Vec<usize> = (0..heads).map(|head| (0..n_old).filter(|&row| keeps(row, head)).count()).collect();

        let tail = setup.chain(setup.make(STORE_ROWS, None, store.format())?);
        let tail_scores = setup.make_scores(STORE_ROWS)?;
        let mut lists = self.pruned.take().unwrap_or_else(|| setup.make_lists(store.format()));
        if let Err(error) = lists.reserve(&more) {
            self.pruned = Some(lists).filter(|lists| lists.counts().any(|n| n > 0));
            return Err(error);
        }
        let [k_bytes, v_bytes] = head_bytes(setup, store.format());
        let mut rows = Vec::new();
        for start in (0..n_old).step_by(PIECE) {
            let n = PIECE.min(n_old - start);
            rows.clear();
            store.read_rows(slice::from_ref(&(start..start + n)), &mut rows);
            let (k, v) = rows.split_at(n * heads * k_bytes);
            for head in 0..heads {
                let kept = (0..n).filter(|row| keeps(start + row, head));
                let of = |all: &[u8], bytes: usize| {
                    let part = |row: usize| &all[(row * heads + head) * bytes..][..bytes];
                    kept.clone().flat_map(part).copied().collect::<Vec<u8>>()
                };
                let (keys, values) = (of(k, k_bytes), of(v, v_bytes));
                lists.push(head, keys.len() / k_bytes, &[keys, values].concat());
            }
        }
        rows.clear();
        store.read_rows(slice::from_ref(&(n_old..n_old + n_new)), &mut rows);
        tail.write_rows(slice::from_ref(&(0..n_new)), &rows);
        tail_scores.write(0, &scores.read(n_old..n_old + n_new));
        (self.store, self.scores, self.pruned, self.held_from) = (Some(tail), Some(tail_scores), Some(lists), from);
        Ok(())
    }
}

/// Bytes of a head's key and of its value.
fn head_bytes(setup: &LayerSetup, format: Format) -> [usize; 2] {
    let rows = setup.plan.rows;
    [format.k.row_bytes(rows.key_size), format.v.row_bytes(rows.value_size)]
}

impl Sequence {
    /// Drops old rows where enough are there. `settled`: a prompt has ended, and which layers are lazy is decided.
    pub fn prune(&mut self, settled: bool, setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        let n_past = self.n_past();
        // Layers that are pruned do not become lazy any more: none is before the rule has really chosen.
        let begins = settled && self.looking.is_none() && n_past > setup.params.lazy.n_kept();
        let has_begun = self.layers.iter().any(|layer| layer.pruned.is_some());
        let is_due = self.layers.iter().zip(&setup.layers).any(|(layer, setup)| layer.may_prune(n_past, setup));
        if !is_due || !(begins || has_begun || setup.prunes_at_once()) {
            return Ok(());
        }
        // The old stores go only when no graph refers to them any more.
        executor.forget();
        for (layer, setup) in self.layers.iter_mut().zip(&setup.layers) {
            layer.prune(n_past, setup)?;
        }
        executor.forget();
        Ok(())
    }
}

impl LayerSetup {
    /// Lists without rows for the layer's KV heads.
    pub fn make_lists(&self, format: Format) -> HeadLists {
        HeadLists::new(self.plan.rows, format, self.plan.device.buffer_type(), self.meter())
    }
}
