//! The sequences of a session, and what is done with them besides running tokens: copies, cuts, and what they hold.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::RangeInclusive,
};

use super::{batch::SeqId, error::Error, executor::Executor, layer::LayerCache, sequence::Sequence, setup::Setup};
use crate::cache::{self, Chain, Format, KvReport};

/// Sequences by their numbers.
#[derive(Debug, Default)]
pub(super) struct Sequences(BTreeMap<SeqId, Sequence>);

impl Sequences {
    pub fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.0.get(&seq)
    }

    pub fn get_mut(&mut self, seq: SeqId) -> Option<&mut Sequence> {
        self.0.get_mut(&seq)
    }

    /// The sequence, as one without tokens where there is none yet.
    pub fn get_or_new(&mut self, seq: SeqId, setup: &Setup) -> &mut Sequence {
        self.0.entry(seq).or_insert_with(|| Sequence::new(setup))
    }

    /// No sequence goes back to what its last prompt gave.
    pub fn forget_prompt_ends(&mut self) {
        self.0.values_mut().for_each(Sequence::forget_prompt_end);
    }

    /// What is being looked at was begun with other parameters.
    pub fn stop_looks(&mut self) {
        self.0.values_mut().for_each(|sequence| sequence.looking = None);
    }

    /// The layers' caches of a sequence.
    pub fn layers(&self, seq: SeqId) -> &[LayerCache] {
        self.get(seq).map_or(&[], |sequence| &sequence.layers)
    }

    /// Tokens in a sequence.
    pub fn n_past(&self, seq: SeqId) -> usize {
        self.get(seq).map_or(0, Sequence::n_past)
    }

    /// The sequences that hold tokens.
    pub fn ids(&self) -> Vec<SeqId> {
        self.0.iter().filter(|(_, sequence)| sequence.n_past() > 0).map(|(&seq, _)| seq).collect()
    }

    /// The positions that every layer of a sequence holds without a gap, up to the last one.
    pub fn held(&self, seq: SeqId) -> Option<RangeInclusive<usize>> {
        let sequence = self.get(seq).filter(|sequence| sequence.n_past() > 0)?;
        let last = sequence.n_past() - 1;
        let of_layers = sequence.layers.iter().map(|layer| layer.held_from).max().unwrap_or(0);
        Some(if sequence.is_recurrent() { last } else { of_layers }..=last)
    }

    /// What the caches take. Lazy and active layers are those of the longest sequence.
    pub fn report(&self, setup: &Setup) -> KvReport {
        let hparams = setup.model.hparams();
        let f16_bytes = self.0.values().map(|sequence| hparams.f16_kv_bytes(sequence.n_past())).sum::<usize>();
        let states = hparams.f16_kv_bytes(1) - hparams.f16_kv_bytes_per_token();
        let shared = self.shared().filter(|&n| n > 0).map(|n| hparams.f16_kv_bytes(n) - states);
        let f16_bytes = f16_bytes - shared.sum::<usize>();
        let allocated_bytes = setup.meter.now();
        let longest = self.0.values().max_by_key(|sequence| sequence.n_past());
        let count =
            |is: fn(&&LayerCache) -> bool| longest.map_or(0, |sequence| sequence.layers.iter().filter(is).count());
        let (lazy_layers, pruned_layers) = (count(|layer| layer.lazy), count(|layer| layer.pruned.is_some()));
        KvReport {
            context_tokens: self.0.values().map(Sequence::n_past).sum(),
            f16_bytes,
            allocated_bytes,
            peak_bytes: setup.meter.peak(),
            compression: if allocated_bytes == 0 { 0.0 } else { f16_bytes as f64 / allocated_bytes as f64 },
            lazy_layers,
            pruned_layers,
            active_layers: hparams.n_stores() - lazy_layers,
            foretold_kl: longest.and_then(|sequence| sequence.looked).map(|looked| looked.kl),
        }
    }

    /// How many tokens of each sequence have the same rows as those of one before it, as a layer without a span tells, if there is
    /// one. Of a pruned one's old rows as large a share as of the longest list.
    fn shared(&self) -> impl Iterator<Item = usize> {
        // Rows of each store that are read, which all begin with the first.
        let mut known: HashMap<_, usize> = HashMap::new();
        self.0.values().map(move |sequence| {
            let layer = sequence.layers.iter().find(|layer| layer.attends() && layer.span.is_none());
            let mut shared = |chain: &Chain, n: usize| {
                let mut shared = 0;
                for (store, rows) in chain.places(n) {
                    let end = known.entry(store).or_default();
                    shared += rows.end.min(*end).saturating_sub(rows.start);
                    *end = rows.end.max(*end);
                }
                shared
            };
            let old = layer.and_then(|layer| Some((layer.held_from, layer.pruned.as_ref()?.longest()?)));
            let of_old = old.map_or(0, |(held_from, (chain, n))| held_from * shared(chain, n) / n);
            let store = layer.and_then(|layer| Some((layer.store.as_ref()?, layer.used_rows(sequence.n_past()))));
            of_old + store.map_or(0, |(chain, n)| shared(chain, n))
        })
    }

    /// One layer's caches of sequences, which are there.
    pub fn caches(&self, seqs: &[SeqId], layer: usize) -> Vec<&LayerCache> {
        seqs.iter().map(|&seq| &self.layers(seq)[layer]).collect()
    }

    /// One layer's rows of sequences, in their order.
    pub fn chains(&mut self, seqs: &[SeqId], layer: usize) -> Vec<&mut Chain> {
        let place = |seq: &SeqId| seqs.iter().position(|other| other == seq);
        let all = self.0.iter_mut().filter_map(|(seq, sequence)| Some((place(seq)?, &mut sequence.layers[layer])));
        let mut chains: Vec<_> = all.filter_map(|(place, layer)| Some((place, layer.store.as_mut()?))).collect();
        chains.sort_by_key(|(place, _)| *place);
        chains.into_iter().map(|(_, chain)| chain).collect()
    }

    /// Takes what is left of slabs which others have gone from out of them, so that their memory is free: see [`cache::apart`].
    pub fn leave_slabs(&mut self, executor: &mut Executor) {
        let layers = self.0.values_mut().flat_map(|sequence| &mut sequence.layers);
        let chains = layers.filter_map(|layer| layer.store.as_mut());
        let mut left: Vec<&mut Chain> = chains.filter(|chain| chain.is_left()).collect();
        if left.is_empty() {
            return;
        }
        executor.forget();
        // Without memory for it they stay where they are.
        let moved = left.iter_mut().try_for_each(|chain| cache::apart(&mut executor.scheduler, chain));
        executor.company.note_moved(&moved);
        executor.forget();
    }

    /// Takes a sequence away.
    pub fn clear(&mut self, seq: SeqId, executor: &mut Executor) {
        self.0.remove(&seq);
        executor.forget();
        self.leave_slabs(executor);
    }

    /// Takes all sequences away.
    pub fn clear_all(&mut self, executor: &mut Executor) {
        self.0.clear();
        executor.forget();
    }

    /// Takes all sequences away but one.
    pub fn keep(&mut self, seq: SeqId, executor: &mut Executor) {
        self.0.retain(|&other, _| other == seq);
        executor.forget();
        self.leave_slabs(executor);
    }

    /// Puts a sequence, or none, where there may be another.
    pub fn put(&mut self, seq: SeqId, sequence: Option<Sequence>, executor: &mut Executor) {
        self.clear(seq, executor);
        self.0.extend(sequence.map(|sequence| (seq, sequence)));
    }

    /// Keeps the first `n` tokens of a sequence; false, with nothing changed, where that cannot be.
    pub fn truncate(&mut self, seq: SeqId, n: usize, executor: &mut Executor) -> bool {
        match self.get_mut(seq) {
            None => true,
            Some(_) if n == 0 => {
                self.clear(seq, executor);
                true
            }
            Some(sequence) => sequence.truncate(n),
        }
    }

    /// Whether [`Sequences::truncate`] would succeed.
    pub fn can_truncate(&self, seq: SeqId, n: usize) -> bool {
        n == 0 || self.get(seq).is_none_or(|sequence| sequence.can_truncate(n))
    }

    /// After a failure while `n` tokens were run: a sequence that cannot be gone on with is emptied.
    pub fn recover(&mut self, seq: SeqId, n: usize, executor: &mut Executor) {
        if self.get_mut(seq).is_some_and(|sequence| !sequence.recover(n)) {
            self.clear(seq, executor);
        }
    }

    /// Makes sequence `to` a copy of the first `n` tokens of another. False, with nothing changed, when a layer has dropped
    /// what they need.
    pub fn copy(
        &mut self,
        setup: &Setup,
        executor: &mut Executor,
        (from, to): (SeqId, SeqId),
        n: usize,
    ) -> Result<bool, Error> {
        if from == to || !self.can_truncate(from, n) {
            return Ok(from == to);
        }
        let copy = match self.get(from).filter(|_| n > 0) {
            Some(source) => {
                let mut copy = source.copy(setup, executor, &BTreeSet::new(), None)?;
                copy.truncate(n);
                Some(copy)
            }
            None => None,
        };
        self.put(to, copy, executor);
        Ok(true)
    }

    /// Makes sequence `to`, which is emptied before, a copy of another: see [`Sequence::copy`].
    pub fn fork(
        &mut self,
        setup: &Setup,
        executor: &mut Executor,
        (from, to): (SeqId, SeqId),
        lazy: &BTreeSet<usize>,
        formats: Option<&[[Format; 2]]>,
    ) -> Result<(), Error> {
        self.clear(to, executor);
        if let Some(source) = self.get(from) {
            let copy = source.copy(setup, executor, lazy, formats)?;
            self.0.insert(to, copy);
            executor.forget();
        }
        Ok(())
    }
}
