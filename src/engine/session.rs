//! The public face: a model at work, with its sequences.

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, Write},
    mem,
    ops::RangeInclusive,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use super::{
    batch::{BatchEntry, Embeddings, Outputs, SeqId},
    checkpoint::{self, Checkpoint, Restored},
    error::Error,
    executor::{Executor, StepReport},
    layer::LayerReport,
    plan,
    run::{run, run_embeddings},
    sequence::Sequence,
    sequences::Sequences,
    setup::{SessionParams, Setup},
    state::{self, Kind, StateError},
};
use crate::{
    cache::{KvReport, Meter},
    ggml::{self, Scheduler, Type},
    lazy::{LayerWindows, LazyParams, Policy, Prune},
    model::{LoraAdapter, Model},
    vocab::Token,
};

/// A model at work: its sequences with their caches, and the memory to compute in.
pub struct Session {
    setup: Setup,
    executor: Executor,
    sequences: Sequences,
}

impl Session {
    /// Starts a session. The cache is allocated as tokens come.
    ///
    /// # Errors
    /// When the parameters do not fit the model, or a device cannot be started.
    pub fn new(model: &Model, params: SessionParams) -> Result<Session, Error> {
        let setup = Setup::new(model, params, Meter::default())?;
        let executor = Executor::new(&setup)?;
        Ok(Session { setup, executor, sequences: Sequences::default() })
    }

    pub fn model(&self) -> &Model {
        &self.setup.model
    }

    /// Tokens that a sequence can hold.
    pub fn n_ctx(&self) -> usize {
        self.setup.params.n_ctx
    }
}

/// Running tokens.
impl Session {
    /// Reads a prompt (or a later part of the conversation) and returns the logits of its last token. Layers become
    /// lazy at its end.
    ///
    /// # Errors
    /// When a token is unknown, the context is full, or memory runs out. The sequence is then as before; where a lazy
    /// layer had dropped tokens meanwhile it is empty.
    pub fn prefill(&mut self, tokens: &[Token]) -> Result<&[f32], Error> {
        self.prefill_with(tokens, &mut |_| {})
    }

    /// As [`Session::prefill`], telling the share that is done, from 0 to 1.
    pub fn prefill_with(&mut self, tokens: &[Token], progress: &mut dyn FnMut(f32)) -> Result<&[f32], Error> {
        let entry = BatchEntry { seq: 0, tokens, outputs: Outputs::Last, prompt_end: true };
        self.run_with(&[entry], progress)?;
        Ok(self.last_logits())
    }

    /// Appends one token and returns the logits that follow it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: Token) -> Result<&[f32], Error> {
        self.run(&[BatchEntry { seq: 0, tokens: &[token], outputs: Outputs::Last, prompt_end: false }])?;
        Ok(self.last_logits())
    }

    /// Appends tokens to one or more sequences. The logits are then in [`Session::logits`].
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn run(&mut self, batch: &[BatchEntry<'_>]) -> Result<(), Error> {
        self.run_with(batch, &mut |_| {})
    }

    /// As [`Session::run`], telling the share that is done, from 0 to 1.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn run_with(&mut self, batch: &[BatchEntry<'_>], progress: &mut dyn FnMut(f32)) -> Result<(), Error> {
        run(&self.setup, &mut self.executor, &mut self.sequences, batch, progress)
    }

    /// Appends rows to a sequence in place of tokens: pictures and sounds, as their encoders give them to this model. The
    /// logits are then in [`Session::logits`]. They are not scored: a prompt should end with text.
    ///
    /// # Errors
    /// When rows or positions do not fit the model, and as [`Session::prefill`].
    pub fn run_embeddings(
        &mut self,
        seq: SeqId,
        embeddings: &Embeddings<'_>,
        outputs: Outputs,
        prompt_end: bool,
    ) -> Result<(), Error> {
        let (executor, sequences) = (&mut self.executor, &mut self.sequences);
        run_embeddings(&self.setup, executor, sequences, (seq, outputs, prompt_end), embeddings)
    }

    /// Where the next token of a sequence stands for RoPE: its number, unless pictures came before
    /// ([`Embeddings::positions`]).
    #[doc(hidden)]
    pub fn seq_next_position(&self, seq: SeqId) -> usize {
        self.sequences.get(seq).map_or(0, |sequence| sequence.positions.next(sequence.n_past()))
    }

    /// Where a token of a sequence stands for RoPE, in the first dimension.
    #[doc(hidden)]
    pub fn seq_position(&self, seq: SeqId, token: usize) -> usize {
        self.sequences.get(seq).map_or(token, |sequence| sequence.positions.at(token))
    }

    /// Tokens of a sequence that stand before a position.
    #[doc(hidden)]
    pub fn seq_tokens_before(&self, seq: SeqId, position: usize) -> usize {
        self.sequences.get(seq).map_or(0, |sequence| sequence.positions.tokens_before(position, sequence.n_past()))
    }

    /// The logits of the last call: a row of `n_vocab` for each token that was asked for, in the batch's order.
    pub fn logits(&self) -> &[f32] {
        &self.executor.logits
    }

    fn last_logits(&self) -> &[f32] {
        let logits = self.logits();
        &logits[logits.len().saturating_sub(self.setup.model.hparams().n_vocab)..]
    }

    /// Exchanges the last call's logits with another buffer, so that they need not be copied.
    #[doc(hidden)]
    pub fn swap_logits(&mut self, other: &mut Vec<f32>) {
        mem::swap(&mut self.executor.logits, other);
    }

    /// Whether [`Session::embeddings`] are kept, from the next call on.
    pub fn set_embeddings(&mut self, wanted: bool) {
        if mem::replace(&mut self.executor.wants_embeddings, wanted) != wanted {
            self.executor.forget();
        }
    }

    /// The last call's hidden states after the final norm: a row of `n_embd` for each row of [`Session::logits`], or
    /// nothing unless they were asked for.
    pub fn embeddings(&self) -> &[f32] {
        &self.executor.embeddings
    }

    /// A flag that makes the running call return [`Error::Interrupted`]: that of [`SessionParams::abort`], where one was
    /// given. It stays set until it is taken back.
    pub fn abort_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(self.executor.scheduler.abort_flag())
    }

    /// Uses this many threads from now on: for decoding, and for several tokens of a sequence at once.
    pub fn set_threads(&mut self, n_threads: usize, n_threads_batch: usize) {
        let params = &mut self.setup.params;
        (params.n_threads, params.n_threads_batch) = (n_threads.max(1), n_threads_batch.max(1));
    }

    /// Changes the LoRA adapters and what they are multiplied by, for tokens to come. What the cache holds was computed
    /// with those of before, and stays.
    ///
    /// # Errors
    /// When an adapter is another model's, or there are too many; nothing is changed then.
    pub fn set_adapters(&mut self, adapters: Vec<(LoraAdapter, f32)>) -> Result<(), Error> {
        let current = &self.setup.params.adapters;
        let is_same = |((a, x), (b, y)): (&(LoraAdapter, f32), &(LoraAdapter, f32))| a.is_same(b) && x == y;
        if current.len() == adapters.len() && current.iter().zip(&adapters).all(is_same) {
            return Ok(());
        }
        let params = SessionParams { adapters, ..self.setup.params.clone() };
        self.setup = Setup::new(&self.setup.model, params, self.setup.meter.clone())?;
        self.sequences.forget_prompt_ends();
        self.sequences.stop_looks();
        self.executor.forget();
        Ok(())
    }

    /// What computes: for callbacks and threads of the caller's.
    #[doc(hidden)]
    pub fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.executor.scheduler
    }

    /// Measures from now on how long it takes to score layers, for [`Session::score_time`]. Graphs that score run a
    /// little slower so.
    #[doc(hidden)]
    pub fn time_scores(&mut self) {
        self.executor.score_time = Some(Duration::ZERO);
    }

    /// How long scoring took since [`Session::time_scores`]; `None` without it.
    #[doc(hidden)]
    pub fn score_time(&self) -> Option<Duration> {
        self.executor.score_time
    }

    /// Bytes of intermediate results.
    #[doc(hidden)]
    pub fn compute_bytes(&self) -> usize {
        self.executor.scheduler.buffer_bytes()
    }

    /// What the last decode step was made of; `None` where none can run again. For measuring.
    pub fn step_report(&self) -> Option<StepReport> {
        self.executor.report()
    }

    /// Gives freed memory back to the system.
    #[doc(hidden)]
    pub fn release_memory(&mut self) {
        ggml::release_free_memory();
    }
}

/// Lazy layers.
impl Session {
    /// The rule that makes layers lazy: [`Policy::Layers`] where a profile was asked for, or found by `auto`.
    pub fn policy(&self) -> &Policy {
        &self.setup.params.lazy.policy
    }

    /// Whether lazy layers see only sink and window while a prompt is read.
    #[doc(hidden)]
    pub fn reads_windowed(&self) -> bool {
        self.setup.params.lazy.windowed_prefill()
    }

    /// The layers that the policy makes lazy after a prompt whose layers have these scores.
    #[doc(hidden)]
    pub fn choose(&self, layers: &[LayerReport]) -> BTreeSet<usize> {
        let mut selector = self.setup.selector();
        layers.iter().filter_map(|layer| selector.decide(layer.index, layer.score)).collect()
    }

    /// Applies the policy now: to the scores that were taken last, or as its fixed set says. Returns how many layers are
    /// lazy; `None` when the policy needs scores and none were taken yet.
    ///
    /// # Errors
    /// When the sequence has no tokens, or memory runs out.
    pub fn decide_now(&mut self, seq: SeqId) -> Result<Option<usize>, Error> {
        let sequence = self.sequences.get_mut(seq).filter(|sequence| sequence.n_past() > 0);
        let sequence = sequence.ok_or(Error::NoSequence(seq))?;
        if !sequence.decide_now(&self.setup, &mut self.executor)? {
            return Ok(None);
        }
        sequence.look_before_dropping(&self.setup, &mut self.executor)?;
        Ok(Some(sequence.layers.iter().filter(|layer| layer.lazy).count()))
    }

    /// Whether a look before dropping is under way in a sequence: [`Session::look_step`] is to follow
    /// ([`SessionParams::look_in_steps`]). The look is given up when the sequence is cut, or the parameters change, and copies
    /// and states are not looked at: what became lazy stays so then, and the next prompt's end is looked at. Tokens that are
    /// appended to the sequence wait for the rest of it.
    pub fn is_looking(&self, seq: SeqId) -> bool {
        self.sequences.get(seq).is_some_and(|sequence| sequence.looking.is_some())
    }

    /// Does a step of the look before dropping in a sequence, which takes about as long as a piece of `n_tokens` of its prompt
    /// would now, and not longer than a short one. False when there is none, or it was the last one. Other sequences can be
    /// run between the steps: what comes of them all is what would come of them in one piece, but for rounding.
    ///
    /// # Errors
    /// When memory runs out, or the call is interrupted. The look is over then; what became lazy stays so.
    pub fn look_step(&mut self, seq: SeqId, n_tokens: usize) -> Result<bool, Error> {
        match self.sequences.get_mut(seq) {
            Some(sequence) => sequence.look_step(n_tokens, &self.setup, &mut self.executor),
            None => Ok(false),
        }
    }

    /// Gives up the look before dropping in a sequence, if one is under way.
    pub fn stop_look(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.get_mut(seq) {
            sequence.looking = None;
        }
    }

    /// How far the logits moved when a sequence was last looked at before layers became lazy ([`Policy::Kl`]), with the
    /// layers that then did: a divergence in nats. `None` where it was not looked at.
    #[doc(hidden)]
    pub fn foretold(&self, seq: SeqId) -> Option<f64> {
        self.sequences.get(seq)?.looked.map(|looked| looked.kl)
    }

    /// How lazy layers are found and what they keep.
    pub fn lazy_params(&self) -> &LazyParams {
        &self.setup.params.lazy
    }

    /// Changes how lazy layers are found and what they keep, for decisions to come: a layer that is lazy already stays
    /// as it is.
    ///
    /// # Errors
    /// When the parameters do not fit the model; nothing is changed then.
    pub fn set_lazy(&mut self, lazy: LazyParams) -> Result<(), Error> {
        let params = SessionParams { lazy, ..self.setup.params.clone() };
        self.setup = Setup::new(&self.setup.model, params, self.setup.meter.clone())?;
        self.sequences.stop_looks();
        self.executor.forget();
        Ok(())
    }

    /// Gives single layers other windows, for decisions to come.
    ///
    /// # Errors
    /// When a layer does not exist, or a window is 0; nothing is changed then.
    #[doc(hidden)]
    pub fn set_windows(&mut self, windows: LayerWindows) -> Result<(), Error> {
        self.set_lazy(LazyParams { windows, ..self.lazy_params().clone() })
    }
}

/// Sequences.
impl Session {
    /// Tokens in sequence 0.
    pub fn n_past(&self) -> usize {
        self.seq_n_past(0)
    }

    /// Tokens in a sequence.
    #[doc(hidden)]
    pub fn seq_n_past(&self, seq: SeqId) -> usize {
        self.sequences.n_past(seq)
    }

    /// The tokens of a sequence.
    #[doc(hidden)]
    pub fn seq_tokens(&self, seq: SeqId) -> &[Token] {
        self.sequences.get(seq).map_or(&[], |sequence| &sequence.tokens)
    }

    /// The sequences that hold tokens.
    pub fn seq_ids(&self) -> Vec<SeqId> {
        self.sequences.ids()
    }

    /// What the cache takes. Lazy and active layers are those of the longest sequence.
    pub fn kv(&self) -> KvReport {
        self.sequences.report(&self.setup)
    }

    /// What a sequence of `n` tokens takes before any layer is lazy, in bytes: what must be free for a prompt of that
    /// length that is read piece by piece.
    #[doc(hidden)]
    pub fn bytes_of(&self, n: usize) -> usize {
        plan::sequence_bytes(&self.setup, n)
    }

    /// What a look before dropping takes besides at a prompt's end of `n` tokens, in bytes, while it goes on: 0 where the policy
    /// does not look.
    #[doc(hidden)]
    pub fn look_bytes_of(&self, n: usize) -> usize {
        plan::look_bytes(&self.setup, n)
    }

    /// What an uncompressed f16 cache of `n` tokens takes, in bytes.
    #[doc(hidden)]
    pub fn f16_bytes_of(&self, n: usize) -> usize {
        self.setup.model.hparams().f16_kv_bytes(n)
    }

    /// Each layer of a sequence: its score, whether it is lazy, its bytes.
    pub fn layers(&self, seq: SeqId) -> Vec<LayerReport> {
        self.sequences.get(seq).map_or_else(Vec::new, Sequence::report)
    }

    /// The positions that every layer of a sequence still holds, up to the last one; `None` when it has no tokens.
    ///
    /// What lazy layers hold of the sink besides is not counted: the range has no gaps.
    #[doc(hidden)]
    pub fn seq_held(&self, seq: SeqId) -> Option<RangeInclusive<usize>> {
        self.sequences.held(seq)
    }

    /// The fewest tokens from which on a sequence can be cut to any number by [`Session::seq_truncate`] so that what
    /// follows is as if the rest had never been there; 0 while nothing was dropped. It can be cut to fewer as well, as long
    /// as the windows are there, but beside quantised caches the newest tokens are no longer exact then
    /// ([`SessionParams::kv_exact`]).
    #[doc(hidden)]
    pub fn seq_resumable(&self, seq: SeqId) -> usize {
        self.sequences.get(seq).map_or(0, Sequence::resumable)
    }

    /// Whether [`Session::seq_truncate`] to `n` tokens would succeed.
    #[doc(hidden)]
    pub fn seq_can_truncate(&self, seq: SeqId, n: usize) -> bool {
        self.sequences.can_truncate(seq, n)
    }

    /// Keeps the first `n` tokens of sequence 0. False, with nothing changed, when a layer has dropped tokens that they
    /// need: what a lazy layer dropped cannot come back. [`LazyParams::n_slack`] tokens (on devices a tenth less at the worst) can always be taken back, and a
    /// whole answer: what begins at the end of the last prompt, or at a checkpoint ([`SequenceView::restore`](super::SequenceView::restore)).
    /// Once old rows were pruned ([`SessionParams::prune`]) the newest 32 can.
    /// Of a model with recurrent layers nothing else can be: what has gone into a state cannot be taken out of it.
    pub fn truncate(&mut self, n: usize) -> bool {
        self.seq_truncate(0, n)
    }

    /// Keeps the first `n` tokens of a sequence; see [`Session::truncate`].
    #[doc(hidden)]
    pub fn seq_truncate(&mut self, seq: SeqId, n: usize) -> bool {
        self.sequences.truncate(seq, n, &mut self.executor)
    }

    /// Empties all sequences and frees their caches.
    pub fn clear(&mut self) {
        self.sequences.clear_all(&mut self.executor);
    }

    /// Empties one sequence.
    #[doc(hidden)]
    pub fn seq_clear(&mut self, seq: SeqId) {
        self.sequences.clear(seq, &mut self.executor);
    }

    /// Empties all sequences but one.
    pub fn seq_keep(&mut self, seq: SeqId) {
        self.sequences.keep(seq, &mut self.executor);
    }

    /// Makes sequence `to` a copy of the first `n` tokens of sequence `from`. Both share their rows until one of them writes. What
    /// `to` held is gone. False, with nothing changed, when a layer of `from` has dropped what `n` tokens need.
    ///
    /// # Errors
    /// When memory runs out; nothing is changed then.
    #[doc(hidden)]
    pub fn seq_copy(&mut self, from: SeqId, to: SeqId, n: usize) -> Result<bool, Error> {
        self.sequences.copy(&self.setup, &mut self.executor, (from, to), n)
    }

    /// Copies a sequence to another, which is emptied before. In the copy the layers `lazy` are lazy as if the policy
    /// had chosen them when the prompt ended. Layers that are lazy already stay so.
    ///
    /// # Errors
    /// When memory runs out; the sequence `to` is then empty.
    #[doc(hidden)]
    pub fn fork(&mut self, from: SeqId, to: SeqId, lazy: &BTreeSet<usize>) -> Result<(), Error> {
        self.fork_with(from, to, lazy, None)
    }

    /// As [`Session::fork`]; the copy's layers have the types of keys and values that they would have with these in active
    /// ones, where they are given.
    ///
    /// # Errors
    /// As [`Session::fork`], and when the types are no cache types of this model.
    #[doc(hidden)]
    pub fn fork_with(
        &mut self,
        from: SeqId,
        to: SeqId,
        lazy: &BTreeSet<usize>,
        types: Option<(Type, Type)>,
    ) -> Result<(), Error> {
        self.sequences.clear(to, &mut self.executor);
        let formats = types.map(|(type_k, type_v)| self.setup.formats(type_k, type_v)).transpose()?;
        self.sequences.fork(&self.setup, &mut self.executor, (from, to), lazy, formats.as_deref())
    }
}

/// States and checkpoints.
impl Session {
    /// Bytes that [`Session::save_seq`] writes.
    #[doc(hidden)]
    pub fn seq_state_bytes(&self, seq: SeqId) -> usize {
        state::bytes(self.setup.model.hparams(), self.sequences.get(seq), Kind::Whole)
    }

    /// Writes a sequence: its tokens, their keys and values as they are, lazy layers with what they hold, and the scores.
    /// The logits are not part of it.
    ///
    /// # Errors
    /// When `to` cannot be written.
    #[doc(hidden)]
    pub fn save_seq(&self, seq: SeqId, to: &mut dyn Write) -> io::Result<()> {
        state::save(&self.setup, self.sequences.get(seq), Kind::Whole, to)
    }

    /// What a state that this session can read depends on, as text: the weights, the adapters, the types and spans of caches.
    #[doc(hidden)]
    pub fn state_settings(&self) -> String {
        let SessionParams { type_k, type_v, kv_rotate, kv_exact, lazy, prune, adapters, .. } = &self.setup.params;
        let weights: String = self.setup.model.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
        let LazyParams { type_k: lazy_k, type_v: lazy_v, n_sink, n_window, n_slack, n_rescued, windows, .. } = lazy;
        let adapters: Vec<_> = adapters.iter().map(|(adapter, scale)| (adapter.path(), scale)).collect();
        let rescue = if *n_rescued == 0 { String::new() } else { format!(" rescue {n_rescued}") };
        format!(
            "{weights} {type_k}/{type_v} {kv_rotate:?} exact {kv_exact} lazy {lazy_k:?}/{lazy_v:?} {n_sink}+{n_window}+{n_slack} \
             {windows:?} {adapters:?}{}",
            // As it was before there was pruning.
            if *prune == Prune::Off { String::new() } else { format!(" prune {prune}") } + &rescue
        )
    }

    /// Bytes of the state at the beginning of `from`, as its header says.
    ///
    /// # Errors
    /// When it does not begin with a header, or `from` is shorter than the header says.
    #[doc(hidden)]
    pub fn state_length(from: &[u8]) -> Result<usize, StateError> {
        state::length(from)
    }

    /// Reads what [`Session::save_seq`] wrote into sequence `seq`, whose old tokens are gone then. Returns the bytes
    /// that the state took; there may be others after it.
    ///
    /// # Errors
    /// When the state is damaged, of another model or of other cache types, does not fit the context, or memory runs
    /// out. Nothing is changed then.
    #[doc(hidden)]
    pub fn load_seq(&mut self, seq: SeqId, from: &[u8]) -> Result<usize, StateError> {
        let (sequence, length) = state::read(&self.setup, from)?;
        self.sequences.put(seq, sequence, &mut self.executor);
        Ok(length)
    }

    /// Reads several sequences, as [`Session::load_seq`] does; all sequences that there were are gone then.
    ///
    /// # Errors
    /// As [`Session::load_seq`].
    #[doc(hidden)]
    pub fn load_seqs(&mut self, states: &[(SeqId, &[u8])]) -> Result<(), StateError> {
        let mut sequences = Vec::new();
        for &(seq, from) in states {
            sequences.push((seq, state::read(&self.setup, from)?.0));
        }
        self.clear();
        for (seq, sequence) in sequences {
            self.sequences.put(seq, sequence, &mut self.executor);
        }
        Ok(())
    }

    /// Notes where a sequence is, to come back with [`Session::restore`] after it has grown: the lazy layers' windows and
    /// sinks, and the newest tokens' rows in f16. Active layers keep their rows; they are not part of it.
    #[doc(hidden)]
    pub fn checkpoint(&self, seq: SeqId) -> Checkpoint {
        let mut bytes = Vec::with_capacity(self.seq_checkpoint_bytes(seq));
        // A vector takes everything.
        let _ = self.save_checkpoint(seq, &mut bytes);
        Checkpoint::from_bytes(bytes)
    }

    /// As [`Session::checkpoint`], written somewhere.
    ///
    /// # Errors
    /// When `to` cannot be written.
    #[doc(hidden)]
    pub fn save_checkpoint(&self, seq: SeqId, to: &mut dyn Write) -> io::Result<()> {
        state::save(&self.setup, self.sequences.get(seq), Kind::Partial, to)
    }

    /// Bytes of a checkpoint of the sequence as it is.
    #[doc(hidden)]
    pub fn seq_checkpoint_bytes(&self, seq: SeqId) -> usize {
        state::bytes(self.setup.model.hparams(), self.sequences.get(seq), Kind::Partial)
    }

    /// Makes a sequence as it was when the checkpoint was made. It must have grown from there; where it has not, or a layer
    /// has become lazy since and dropped what would be needed, the checkpoint's tokens are read anew.
    ///
    /// # Errors
    /// When the checkpoint is damaged or of another model; nothing is changed then. When reading anew fails, as
    /// [`Session::prefill`]; the sequence is then empty.
    #[doc(hidden)]
    pub fn restore(&mut self, seq: SeqId, checkpoint: &Checkpoint) -> Result<Restored, StateError> {
        self.restore_checkpoint(seq, checkpoint.as_bytes())
    }

    /// As [`Session::restore`], from the checkpoint at the beginning of `from`.
    ///
    /// # Errors
    /// As [`Session::restore`].
    #[doc(hidden)]
    pub fn restore_checkpoint(&mut self, seq: SeqId, from: &[u8]) -> Result<Restored, StateError> {
        checkpoint::restore(&self.setup, &mut self.executor, &mut self.sequences, seq, from)
    }
}

#[cfg(test)]
impl Session {
    /// What a sequence's layers hold, and what they are set up as.
    pub(super) fn internals(&self, seq: SeqId) -> (&[super::layer::LayerCache], &Setup) {
        (self.sequences.layers(seq), &self.setup)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("params", &self.setup.params).field("kv", &self.kv()).finish_non_exhaustive()
    }
}
