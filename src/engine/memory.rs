//! What can be done with sequences besides running tokens: copies, the positions that are still held, decisions on
//! demand, settings that change while a session lives.

use std::ops::RangeInclusive;

use super::{
    Error,
    sequence::Sequence,
    session::{SeqId, Session, check, lazy_format, spans},
};
use crate::{
    ggml::{self, Scheduler, Type},
    lazy::{LayerWindows, LazyParams},
};

impl Session {
    /// The sequences that hold tokens.
    pub fn seq_ids(&self) -> Vec<SeqId> {
        self.sequences.iter().filter(|(_, sequence)| sequence.n_past > 0).map(|(&seq, _)| seq).collect()
    }

    /// The positions that every layer of a sequence still holds, up to the last one; `None` when it has no tokens.
    ///
    /// What lazy layers hold of the sink besides is not counted: the range has no gaps.
    pub fn seq_held(&self, seq: SeqId) -> Option<RangeInclusive<usize>> {
        let sequence = self.sequences.get(&seq).filter(|sequence| sequence.n_past > 0)?;
        let first = sequence.layers.iter().map(|layer| layer.held_from).max().unwrap_or(0);
        Some(first..=sequence.n_past - 1)
    }

    /// The fewest tokens from which on a sequence can be cut to any number by [`Session::seq_truncate`] so that what
    /// follows is as if the rest had never been there; 0 while nothing was dropped. It can be cut to fewer as well, as long
    /// as the windows are there, but beside quantised caches the newest tokens are no longer exact then
    /// ([`super::SessionParams::kv_exact`]).
    pub fn seq_resumable(&self, seq: SeqId) -> usize {
        self.sequences.get(&seq).map_or(0, Sequence::resumable)
    }

    /// Whether [`Session::seq_truncate`] to `n` tokens would succeed.
    pub fn seq_can_truncate(&self, seq: SeqId, n: usize) -> bool {
        n == 0 || self.sequences.get(&seq).is_none_or(|sequence| sequence.can_truncate(n))
    }

    /// Makes sequence `to` a copy of the first `n` tokens of sequence `from`, with caches of its own. What `to` held is
    /// gone. False, with nothing changed, when a layer of `from` has dropped what `n` tokens need.
    ///
    /// # Errors
    /// When memory runs out; nothing is changed then.
    pub fn seq_copy(&mut self, from: SeqId, to: SeqId, n: usize) -> Result<bool, Error> {
        if from == to || !self.seq_can_truncate(from, n) {
            return Ok(from == to);
        }
        let Some(source) = self.sequences.get(&from).filter(|_| n > 0) else {
            self.seq_clear(to);
            return Ok(true);
        };
        let n_past = source.n_past;
        let mut layers = Vec::with_capacity(source.layers.len());
        for (layer, maker) in source.layers.iter().zip(&self.makers) {
            layers.push(layer.copy(n_past, None, None, maker, &mut self.scheduler)?);
        }
        let mut copy = source.with_layers(layers);
        copy.mark = source.mark_of_copy();
        copy.truncate(n);
        self.seq_clear(to);
        self.sequences.insert(to, copy);
        Ok(true)
    }

    /// Empties all sequences but one.
    pub fn seq_keep(&mut self, seq: SeqId) {
        let kept = self.sequences.remove(&seq);
        self.clear();
        self.sequences.extend(kept.map(|sequence| (seq, sequence)));
    }

    /// Applies the policy now: to the scores that were taken last, or as its fixed set says. Returns how many layers are
    /// lazy; `None` when the policy needs scores and none were taken yet.
    ///
    /// # Errors
    /// When the sequence has no tokens, or memory runs out.
    pub fn decide_now(&mut self, seq: SeqId) -> Result<Option<usize>, Error> {
        let sequence = self.sequences.get(&seq).filter(|sequence| sequence.n_past > 0).ok_or(Error::NoSequence(seq))?;
        let layers = sequence.layers.iter().enumerate().filter(|(_, layer)| layer.is_active());
        let scores: Vec<(usize, f32)> = layers.filter_map(|(index, layer)| Some((index, layer.score?))).collect();
        if self.selector().needs_scores() {
            let any_active = self.layers(seq).iter().any(|layer| layer.kind == "full");
            if scores.is_empty() && any_active {
                return Ok(None);
            }
            self.decide(seq, &scores)?;
        } else {
            self.shrink_known(seq)?;
        }
        Ok(Some(self.layers(seq).iter().filter(|layer| layer.lazy).count()))
    }

    /// How lazy layers are found and what they keep.
    pub fn lazy_params(&self) -> (&LazyParams, Option<Type>, Option<Type>) {
        (&self.params.lazy, self.params.lazy_type_k, self.params.lazy_type_v)
    }

    /// Changes how lazy layers are found and what they keep, for decisions to come: a layer that is lazy already stays
    /// as it is. Types are those of [`super::SessionParams`].
    ///
    /// # Errors
    /// When the parameters do not fit the model; nothing is changed then.
    pub fn set_lazy(&mut self, lazy: LazyParams, type_k: Option<Type>, type_v: Option<Type>) -> Result<(), Error> {
        let mut params = self.params.clone();
        (params.lazy, params.lazy_type_k, params.lazy_type_v) = (lazy, type_k, type_v);
        super::profile::settle(&mut params.lazy, &self.model)?;
        let hparams = self.model.hparams();
        check(&params, hparams)?;
        self.spans = spans(&params.lazy, hparams.n_layer);
        self.lazy_format = lazy_format(&params, hparams.head_size);
        self.params = params;
        self.decode_graph = None;
        Ok(())
    }

    /// Gives single layers other windows, for decisions to come.
    ///
    /// # Errors
    /// When a layer does not exist, or a window is 0; nothing is changed then.
    pub fn set_windows(&mut self, windows: LayerWindows) -> Result<(), Error> {
        let (type_k, type_v) = (self.params.lazy_type_k, self.params.lazy_type_v);
        self.set_lazy(LazyParams { windows, ..self.params.lazy.clone() }, type_k, type_v)
    }

    /// Uses this many threads from now on: for decoding, and for several tokens of a sequence at once.
    pub fn set_threads(&mut self, n_threads: usize, n_threads_batch: usize) {
        (self.params.n_threads, self.params.n_threads_batch) = (n_threads.max(1), n_threads_batch.max(1));
    }

    /// Whether [`Session::embeddings`] are kept, from the next call on.
    pub fn set_embeddings(&mut self, wanted: bool) {
        self.wants_embeddings = wanted;
        self.decode_graph = None;
    }

    /// The last call's hidden states behind the final norm: a row of `n_embd` for each row of [`Session::logits`], or
    /// nothing unless they were asked for.
    pub fn embeddings(&self) -> &[f32] {
        &self.embeddings
    }

    /// Exchanges the last call's logits with another buffer, so that they need not be copied.
    pub fn swap_logits(&mut self, other: &mut Vec<f32>) {
        std::mem::swap(&mut self.logits, other);
    }

    /// What computes: for callbacks and threads of the caller's.
    pub fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    /// Bytes of intermediate results.
    pub fn compute_bytes(&self) -> usize {
        self.scheduler.buffer_bytes()
    }

    /// Gives freed memory back to the system.
    pub fn release_memory(&mut self) {
        ggml::release_free_memory();
    }
}
