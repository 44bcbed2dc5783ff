use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use super::{
    Error,
    attention::{CacheAttention, Kernel, Look, ROWS_STEP, Score},
    inputs::{Inputs, Part},
    mark::BACK,
    second_look::SCORE_NAME,
    sequence::{LayerCache, LayerReport, Sequence, StoreMaker},
    ubatch::CachedGraph,
};
use crate::{
    cache::{Format, KvReport, KvRotate, Meter, Rotations, Span},
    ggml::{self, Device, Graph, Scheduler, Type},
    lazy::{At, LazyParams, Measure, Policy, Selector, default_threshold},
    model::{Hparams, Model},
    vocab::Token,
};

/// A sequence's number. [`Session::prefill`] and [`Session::decode`] use number 0.
pub type SeqId = u32;

/// How a session runs. The defaults are llama.cpp's.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SessionParams {
    /// Tokens that a sequence can hold; 0 for as many as the model was trained for.
    pub n_ctx: usize,
    /// Tokens that are computed at once.
    pub n_ubatch: usize,
    /// Threads for decoding.
    pub n_threads: usize,
    /// Threads for reading prompts; 0 for as many as for decoding.
    pub n_threads_batch: usize,
    /// Types of the active layers' keys and values.
    pub type_k: Type,
    pub type_v: Type,
    /// Types of the lazy layers' keys and values; `None` for q4_0, or f16 where the head size does not allow that.
    pub lazy_type_k: Option<Type>,
    pub lazy_type_v: Option<Type>,
    /// Attention in one operation, without the matrix of all weights.
    pub flash_attn: bool,
    /// Compute attention, and products of quantised weights, with this crate's own kernels, which are
    /// faster. Off (or without flash attention): with ggml's, whose logits are llama.cpp's bit for bit.
    pub fused_attention: bool,
    /// When keys and values are rotated.
    pub kv_rotate: KvRotate,
    /// Newest tokens that are kept in f16 as well, with the sink, beside each quantised store: most of what four bits
    /// lose is lost there (KIVI, arXiv 2402.02750). 0 for none, which is llama.cpp's way. Needs this crate's own
    /// attention kernel, and is ignored without it.
    pub kv_exact: usize,
    /// Keep what is needed to take an answer back and to ask for it again exactly: each prompt's last logits, the newest
    /// tokens' rows in f16 as they were then, and a long answer's first windows of lazy layers.
    pub keep_prompt_end: bool,
    /// Prompts may come in several calls of [`Session::run`], of which the last is marked as the prompt's end. The ends
    /// of all are scored then, so that a short last piece does not decide alone.
    pub split_prompts: bool,
    /// Read a long prompt layer by layer, so that only one layer's cache is ever uncompressed. Off: ubatch by ubatch.
    pub layer_major: bool,
    /// Which layers become lazy.
    pub lazy: LazyParams,
}

impl Default for SessionParams {
    fn default() -> Self {
        SessionParams {
            n_ctx: 0,
            n_ubatch: 512,
            n_threads: std::thread::available_parallelism().map_or(4, usize::from),
            n_threads_batch: 0,
            type_k: Type::F16,
            type_v: Type::F16,
            lazy_type_k: None,
            lazy_type_v: None,
            flash_attn: true,
            fused_attention: true,
            kv_rotate: KvRotate::default(),
            kv_exact: 32,
            keep_prompt_end: true,
            split_prompts: false,
            layer_major: true,
            lazy: LazyParams::default(),
        }
    }
}

/// Which tokens' logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outputs {
    None,
    #[default]
    Last,
    All,
}

impl Outputs {
    /// Rows of logits that `n` tokens give.
    pub(super) fn n_rows(self, n: usize) -> usize {
        match self {
            Outputs::None => 0,
            Outputs::Last => n.min(1),
            Outputs::All => n,
        }
    }
}

/// Tokens that continue one sequence.
#[derive(Debug, Clone, Copy)]
pub struct BatchEntry<'a> {
    pub seq: SeqId,
    pub tokens: &'a [Token],
    pub outputs: Outputs,
    /// Whether a prompt ends with these tokens: the sequence's active layers are then scored.
    pub prompt_end: bool,
}

/// A model at work: its sequences with their caches, and the memory to compute in.
pub struct Session {
    pub(super) model: Model,
    pub(super) params: SessionParams,
    pub(super) scheduler: Scheduler,
    /// For each layer what its stores are made from, on its device.
    pub(super) makers: Vec<StoreMaker>,
    pub(super) meter: Meter,
    /// Elements of a token's keys in one layer.
    pub(super) width: usize,
    pub(super) sequences: BTreeMap<SeqId, Sequence>,
    /// Rows of `n_vocab` logits, in the order of the last call's tokens.
    pub(super) logits: Vec<f32>,
    /// Rows of `n_embd`: what the output matrix is multiplied with, for the same tokens; empty unless asked for.
    pub(super) embeddings: Vec<f32>,
    pub(super) wants_embeddings: bool,
    pub(super) decode_graph: Option<CachedGraph>,
    /// What each layer keeps while it is lazy.
    pub(super) spans: Vec<Span>,
    pub(super) active_format: Format,
    pub(super) lazy_format: Format,
    threshold: f32,
    /// Time that scores took, where it is measured.
    pub(super) score_time: Option<Duration>,
}

impl Session {
    /// Starts a session. The cache is allocated as tokens come.
    ///
    /// # Errors
    /// When the parameters do not fit the model, or a device cannot be started.
    pub fn new(model: &Model, mut params: SessionParams) -> Result<Session, Error> {
        let hparams = model.hparams();
        if params.n_ctx == 0 {
            params.n_ctx = hparams.n_ctx_train;
        }
        if params.n_threads_batch == 0 {
            params.n_threads_batch = params.n_threads;
        }
        super::profile::settle(&mut params.lazy, model)?;
        check(&params, hparams)?;
        // A layer has some 30 nodes, a few more for each sequence in a batch; scores and rotations add theirs.
        let max_nodes = 1024 + 64 * hparams.n_layer * MAX_PARTS;
        let scheduler = Scheduler::new(&model.devices(), params.n_threads, max_nodes)?;
        let meter = Meter::default();
        let makers = makers(model, &params, &meter)?;
        Ok(Session {
            spans: spans(&params.lazy, hparams.n_layer),
            active_format: Format::new(params.type_k, params.type_v, params.kv_rotate),
            lazy_format: lazy_format(&params, hparams.head_size),
            threshold: default_threshold(&hparams.architecture, model.name(), hparams.rope.freq_base),
            score_time: None,
            model: model.clone(),
            params,
            scheduler,
            makers,
            meter,
            width: hparams.head_size * hparams.n_head_kv,
            sequences: BTreeMap::new(),
            logits: Vec::new(),
            embeddings: Vec::new(),
            wants_embeddings: false,
            decode_graph: None,
        })
    }

    /// Measures from now on how long it takes to score layers, for [`Session::score_time`]. Graphs that score run a
    /// little slower so.
    pub fn time_scores(&mut self) {
        self.score_time = Some(Duration::ZERO);
    }

    /// How long scoring took since [`Session::time_scores`]; `None` without it.
    pub fn score_time(&self) -> Option<Duration> {
        self.score_time
    }

    /// A graph for this session's kernels.
    pub(super) fn new_graph(&self, max_nodes: usize) -> Graph {
        let mut graph = Graph::new(max_nodes);
        graph.use_own_kernels(self.params.flash_attn && self.params.fused_attention);
        graph
    }

    /// Attention for the parts of a ubatch, over their sequences' caches.
    pub(super) fn attention<'a>(
        &'a self,
        inputs: &'a mut Inputs,
        parts: &'a [Part],
        caches: Vec<&'a [LayerCache]>,
    ) -> CacheAttention<'a> {
        CacheAttention {
            inputs,
            parts,
            caches,
            makers: &self.makers,
            spans: &self.spans,
            head_size: self.model.hparams().head_size,
            look: Look::First { scored: self.params.lazy.policy.measure() == Measure::Mass },
            scores: Vec::new(),
        }
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Whether lazy layers see only sink and window while a prompt is read.
    pub fn reads_windowed(&self) -> bool {
        self.params.lazy.windowed_prefill()
    }

    /// The layers that the policy makes lazy behind a prompt whose layers have these scores.
    pub fn choose(&self, layers: &[LayerReport]) -> BTreeSet<usize> {
        let mut selector = self.selector();
        let known = layers.iter().map(|layer| layer.index).filter(|&index| selector.is_known_lazy(index));
        let known: BTreeSet<usize> = known.collect();
        let scored = layers.iter().filter_map(|layer| selector.scored(layer.index, layer.score?));
        scored.chain(known).collect()
    }

    /// The rule that makes layers lazy: [`Policy::Layers`] where a profile was asked for, or found by `auto`.
    pub fn policy(&self) -> &Policy {
        &self.params.lazy.policy
    }

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
        self.check_batch(batch)?;
        self.logits.clear();
        self.embeddings.clear();
        let n_tokens: usize = batch.iter().map(|entry| entry.tokens.len()).sum();
        let threads = if n_tokens > batch.len() { self.params.n_threads_batch } else { self.params.n_threads };
        self.scheduler.set_threads(threads)?;

        let total = n_tokens as f32;
        let mut done = 0;
        let mut waiting = batch;
        while let [entry, rest @ ..] = waiting {
            let again = self.replay(entry);
            if again > 0 {
                let tokens = &entry.tokens[again..];
                if !tokens.is_empty() {
                    self.run_alone(&BatchEntry { tokens, ..*entry }, &mut |_| {})?;
                }
                done += entry.tokens.len();
                waiting = rest;
            } else if self.reads_layer_major(entry) {
                let share = entry.tokens.len() as f32 / total;
                let start = done as f32 / total;
                self.prefill_layer_major(entry, &mut |part| progress(start + share * part))?;
                done += entry.tokens.len();
                waiting = rest;
            } else {
                // As many entries as fit one ubatch go together; a longer one goes in pieces by itself.
                let n = self.entries_that_fit(waiting);
                let (together, rest) = waiting.split_at(n.max(1));
                if n <= 1 {
                    self.run_alone(entry, &mut |tokens| progress((done + tokens) as f32 / total))?;
                } else {
                    self.run_ubatch(together, true)?;
                }
                done += together.iter().map(|entry| entry.tokens.len()).sum::<usize>();
                waiting = rest;
            }
            progress(done as f32 / total);
        }
        Ok(())
    }

    fn check_batch(&self, batch: &[BatchEntry<'_>]) -> Result<(), Error> {
        let n_vocab = self.model.hparams().n_vocab;
        let mut seen = BTreeSet::new();
        for entry in batch {
            if entry.tokens.is_empty() {
                return Err(Error::Empty);
            }
            if !seen.insert(entry.seq) {
                return Err(Error::SequenceTwice(entry.seq));
            }
            if let Some(&token) =
                entry.tokens.iter().find(|&&token| usize::try_from(token).map_or(true, |id| id >= n_vocab))
            {
                return Err(Error::Token { token, n_vocab });
            }
            let needed = self.seq_n_past(entry.seq) + entry.tokens.len();
            if needed > self.params.n_ctx {
                return Err(Error::ContextFull { needed, n_ctx: self.params.n_ctx });
            }
        }
        if batch.is_empty() { Err(Error::Empty) } else { Ok(()) }
    }

    /// An entry by itself, in one ubatch where it fits.
    fn run_alone(&mut self, entry: &BatchEntry<'_>, progress: &mut dyn FnMut(usize)) -> Result<(), Error> {
        match entry.tokens.len() <= self.params.n_ubatch {
            true => self.run_ubatch(std::slice::from_ref(entry), true),
            false => self.run_in_pieces(entry, progress),
        }
    }

    fn entries_that_fit(&self, batch: &[BatchEntry<'_>]) -> usize {
        let mut tokens = 0;
        let fits = |entry: &&BatchEntry<'_>| {
            tokens += entry.tokens.len();
            tokens <= self.params.n_ubatch
                && !self.reads_layer_major(entry)
                && !self.sequences.get(&entry.seq).is_some_and(Sequence::may_replay)
        };
        batch.iter().take(MAX_PARTS).take_while(fits).count()
    }

    fn reads_layer_major(&self, entry: &BatchEntry<'_>) -> bool {
        self.params.layer_major && self.seq_n_past(entry.seq) == 0 && entry.tokens.len() > self.params.n_ubatch
    }

    /// The logits of the last call: a row of `n_vocab` for each token that was asked for, in the batch's order.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn last_logits(&self) -> &[f32] {
        let start = self.logits.len().saturating_sub(self.model.hparams().n_vocab);
        &self.logits[start..]
    }

    /// Tokens in sequence 0.
    pub fn n_past(&self) -> usize {
        self.seq_n_past(0)
    }

    /// Tokens in a sequence.
    pub fn seq_n_past(&self, seq: SeqId) -> usize {
        self.sequences.get(&seq).map_or(0, |sequence| sequence.n_past)
    }

    /// Tokens that a sequence can hold.
    pub fn n_ctx(&self) -> usize {
        self.params.n_ctx
    }

    /// Empties all sequences and frees their caches.
    pub fn clear(&mut self) {
        self.sequences.clear();
        self.decode_graph = None;
        self.scheduler.release();
        ggml::release_free_memory();
    }

    /// Empties one sequence.
    pub fn seq_clear(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
        self.decode_graph = None;
        self.scheduler.release();
    }

    /// Keeps the first `n` tokens of sequence 0. False, with nothing changed, when a layer has dropped tokens that they
    /// need: what a lazy layer dropped cannot come back. [`LazyParams::n_slack`] tokens can always be taken back, and a
    /// whole answer: what begins at the end of the last prompt, or [`Session::restore`]s a checkpoint.
    pub fn truncate(&mut self, n: usize) -> bool {
        self.seq_truncate(0, n)
    }

    /// Keeps the first `n` tokens of a sequence; see [`Session::truncate`].
    pub fn seq_truncate(&mut self, seq: SeqId, n: usize) -> bool {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return true };
        if n == 0 {
            self.seq_clear(seq);
            return true;
        }
        sequence.truncate(n)
    }

    /// A flag that makes the running call return [`Error::Interrupted`]. It stays set until it is taken back.
    pub fn abort_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(self.scheduler.abort_flag())
    }

    /// What the cache takes. Lazy and active layers are those of the longest sequence.
    pub fn kv(&self) -> KvReport {
        let context_tokens: usize = self.sequences.values().map(|sequence| sequence.n_past).sum();
        let hparams = self.model.hparams();
        let f16_bytes = self.sequences.values().map(|sequence| hparams.f16_kv_bytes(sequence.n_past)).sum();
        let allocated_bytes = self.meter.now();
        let longest = self.sequences.values().max_by_key(|sequence| sequence.n_past);
        let lazy_layers = longest.map_or(0, |sequence| sequence.layers.iter().filter(|layer| layer.lazy).count());
        KvReport {
            context_tokens,
            f16_bytes,
            allocated_bytes,
            peak_bytes: self.meter.peak(),
            compression: if allocated_bytes == 0 { 0.0 } else { f16_bytes as f64 / allocated_bytes as f64 },
            lazy_layers,
            active_layers: self.model.hparams().n_layer - lazy_layers,
        }
    }

    /// Each layer of a sequence: its score, whether it is lazy, its bytes.
    pub fn layers(&self, seq: SeqId) -> Vec<LayerReport> {
        let layers = self.sequences.get(&seq).map_or(&[][..], |sequence| &sequence.layers);
        layers.iter().enumerate().map(|(index, layer)| layer.report(index)).collect()
    }

    /// The rule for the next prompt of a sequence.
    pub(super) fn selector(&self) -> Selector {
        Selector::new(&self.params.lazy.policy, self.threshold, self.scorable_layers())
    }

    /// Layers that are not sliding-window by their own design.
    fn scorable_layers(&self) -> usize {
        self.model.hparams().windows.iter().filter(|window| window.is_none()).count()
    }

    /// A sequence without tokens: its layers are full, but for those that are restricted from the first token on.
    pub(super) fn new_sequence(&self) -> Sequence {
        let selector = self.selector();
        let windowed = self.params.lazy.windowed_prefill();
        let layer = |index| match self.model.hparams().windows[index] {
            Some(n_window) => {
                let span = Span { n_sink: 0, n_window, n_slack: self.params.lazy.n_slack };
                LayerCache::new(Some(span), false, self.active_format)
            }
            None if windowed && selector.is_known_lazy(index) => {
                LayerCache::new(Some(self.spans[index]), true, self.lazy_format)
            }
            None => LayerCache::new(None, false, self.active_format),
        };
        let layers = (0..self.model.hparams().n_layer).map(layer).collect();
        Sequence::new(layers)
    }

    /// Last tokens of a prompt of `n` tokens whose attention is to be scored when it ends at `n_past`: none while
    /// everything is within sink and window, where every layer's score is 1 and says nothing.
    pub(super) fn n_score(&self, n: usize, n_past: usize, at: At) -> usize {
        if !self.selector().needs_scores() || n_past <= self.params.lazy.n_kept() {
            return 0;
        }
        match at {
            At::Prefill => self.params.lazy.n_last.min(n),
            At::Decode => 1,
        }
    }

    /// Whether an entry's last tokens are scored, when the policy wants scores of prompts.
    pub(super) fn scores_end(&self, entry: &BatchEntry<'_>) -> bool {
        entry.prompt_end || (self.params.split_prompts && entry.tokens.len() > 1)
    }

    /// Notes scores of a sequence's last `n` queries. Where these are fewer than the policy asks for, and the ones before
    /// them were scored, too, the scores become means over both.
    pub(super) fn note_scores(&mut self, seq: SeqId, n: usize, scores: &mut [(usize, f32)]) {
        let n_last = self.params.lazy.n_last;
        let Some(sequence) = self.sequences.get_mut(&seq).filter(|_| !scores.is_empty()) else { return };
        let (n_before, end) = sequence.scored;
        let n_before = if end + n == sequence.n_past { n_before.min(n_last.saturating_sub(n)) } else { 0 };
        for (layer, score) in &mut *scores {
            let known = &mut sequence.layers[*layer].score;
            if let Some(before) = known.filter(|_| n_before > 0) {
                *score = (*score * n as f32 + before * n_before as f32) / (n + n_before) as f32;
            }
            *known = Some(*score);
        }
        sequence.scored = (n + n_before, sequence.n_past);
    }

    /// Takes the scores of a sequence's layers, in order, and shrinks what becomes lazy.
    pub(super) fn decide(&mut self, seq: SeqId, scores: &[(usize, f32)]) -> Result<(), Error> {
        let mut selector = self.selector();
        for &(layer, score) in scores {
            if let Some(lazy) = selector.scored(layer, score) {
                self.make_lazy(seq, lazy)?;
            }
        }
        ggml::release_free_memory();
        Ok(())
    }

    /// Shrinks the layers of a fixed set at the end of a prompt that was read with full attention.
    pub(super) fn shrink_known(&mut self, seq: SeqId) -> Result<(), Error> {
        let selector = self.selector();
        let Some(sequence) = self.sequences.get(&seq) else { return Ok(()) };
        let is_due = |&layer: &usize| sequence.layers[layer].is_active() && selector.is_known_lazy(layer);
        let due: Vec<usize> = (0..sequence.layers.len()).filter(is_due).collect();
        for &layer in &due {
            self.make_lazy(seq, layer)?;
        }
        if !due.is_empty() {
            ggml::release_free_memory();
        }
        Ok(())
    }

    fn make_lazy(&mut self, seq: SeqId, layer: usize) -> Result<(), Error> {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(()) };
        // The old store goes only when no graph refers to it any more.
        self.decode_graph = None;
        // The mark knows nothing of the new ring, which has no rows behind the last token.
        sequence.mark = None;
        sequence.behind.clear();
        let n_past = sequence.n_past;
        sequence.layers[layer].make_lazy(
            n_past,
            self.spans[layer],
            self.lazy_format,
            &self.makers[layer],
            &mut self.scheduler,
        )?;
        Ok(())
    }

    /// A long entry, one ubatch after the other. The last piece holds all tokens that are scored.
    fn run_in_pieces(&mut self, entry: &BatchEntry<'_>, progress: &mut dyn FnMut(usize)) -> Result<(), Error> {
        let n = entry.tokens.len();
        let mut done = 0;
        for end in piece_ends(n, self.params.n_ubatch, self.params.lazy.n_last) {
            let is_last = end == n;
            let outputs = match entry.outputs {
                Outputs::Last if !is_last => Outputs::None,
                outputs => outputs,
            };
            let piece = BatchEntry {
                seq: entry.seq,
                tokens: &entry.tokens[done..end],
                outputs,
                prompt_end: entry.prompt_end && is_last,
            };
            self.run_ubatch(&[piece], is_last)?;
            done = end;
            progress(done);
        }
        Ok(())
    }

    /// After a failure in the middle of a ubatch: what was written behind `n_past` is never read, but a ring may have
    /// lost rows that are still needed.
    pub(super) fn recover(&mut self, seq: SeqId, n: usize) {
        self.decode_graph = None;
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        let n_past = sequence.n_past;
        sequence.cut(n_past, n_past + n);
        if !sequence.layers.iter().all(|layer| layer.resumable() <= n_past) {
            self.seq_clear(seq);
        }
    }
}

/// Sequences that go into one ubatch at most.
pub(super) const MAX_PARTS: usize = 16;

/// Where the pieces of `n` tokens end: each has at most `n_ubatch` tokens, and the last one at least
/// `min(n, n_last, n_ubatch)`.
pub(super) fn piece_ends(n: usize, n_ubatch: usize, n_last: usize) -> Vec<usize> {
    let mut ends: Vec<usize> = (1..n.div_ceil(n_ubatch)).map(|i| i * n_ubatch).collect();
    if let Some(end) = ends.last_mut() {
        // Taken from the piece before: moving its end keeps every size within a ubatch.
        *end = (*end).min(n - n_last.min(n_ubatch));
    }
    ends.push(n);
    ends
}

/// Computes a graph that was given memory. Where time is measured, that of its scores is added.
pub(super) fn compute(
    scheduler: &mut Scheduler,
    graph: &Graph,
    scores: &[Score],
    time: &mut Option<Duration>,
) -> Result<(), Error> {
    match time {
        Some(total) if !scores.is_empty() => *total += scheduler.compute_timed(graph, SCORE_NAME)?,
        _ => scheduler.compute(graph)?,
    }
    Ok(())
}

/// Parts of a ubatch for one sequence alone.
pub(super) fn single_part(n: usize, n_past: usize, n_score: usize) -> [Part; 1] {
    [Part { first: 0, n, n_past, n_score, exact_from: 0 }]
}

/// How lazy layers keep their rows: q4_0 where nothing else is asked for and the head size allows it.
pub(super) fn lazy_format(params: &SessionParams, head_size: usize) -> Format {
    let smallest = if head_size.is_multiple_of(Type::Q4_0.block_size()) { Type::Q4_0 } else { Type::F16 };
    let [k, v] = [params.lazy_type_k, params.lazy_type_v].map(|given| given.unwrap_or(smallest));
    Format::new(k, v, params.kv_rotate)
}

/// What each layer keeps while it is lazy.
pub(super) fn spans(lazy: &LazyParams, n_layer: usize) -> Vec<Span> {
    (0..n_layer).map(|layer| lazy_span(lazy, layer)).collect()
}

/// What a layer keeps while it is lazy.
pub(super) fn lazy_span(lazy: &LazyParams, layer: usize) -> Span {
    Span { n_sink: lazy.n_sink, n_window: lazy.window(layer), n_slack: lazy.n_slack }
}

/// For each layer what its stores are made from: on the device of its weights.
fn makers(model: &Model, params: &SessionParams, meter: &Meter) -> Result<Vec<StoreMaker>, Error> {
    let hparams = model.hparams();
    let mut makers: Vec<StoreMaker> = Vec::with_capacity(hparams.n_layer);
    for index in 0..hparams.n_layer {
        let device = model.layer_device(index);
        if let Some(maker) = makers.iter().find(|maker| maker.device == device) {
            makers.push(maker.clone());
            continue;
        }
        let kernel = kernel(params, hparams, device);
        makers.push(StoreMaker {
            width: hparams.head_size * hparams.n_head_kv,
            device,
            kernel,
            meter: meter.clone(),
            rotations: Arc::new(Rotations::new(hparams.head_size, device.buffer_type())?),
            // ggml's kernels divide their work by the number of rows, and llama.cpp gives them a multiple of 256.
            block: if kernel == Kernel::Fused { 64 } else { ROWS_STEP },
            n_ctx: params.n_ctx,
            exact_span: (kernel == Kernel::Fused && params.kv_exact > 0).then_some(Span {
                n_sink: params.lazy.n_sink,
                n_window: params.kv_exact,
                // So that one can go back to just before a prompt's end.
                n_slack: if params.keep_prompt_end { BACK } else { 0 },
            }),
        });
    }
    Ok(makers)
}

/// What computes attention on a device.
pub(super) fn kernel(params: &SessionParams, hparams: &Hparams, device: Device) -> Kernel {
    let &Hparams { head_size, n_head, n_head_kv, .. } = hparams;
    let lazy = lazy_format(params, head_size);
    let types = [(Type::F16, Type::F16), (params.type_k, params.type_v), (lazy.k, lazy.v)];
    match params.flash_attn {
        false => Kernel::Separate,
        // Our kernel reads tensors by pointer.
        true if params.fused_attention && device.buffer_type().is_host() => Kernel::Fused,
        true if device == Device::cpu() => Kernel::Flash,
        // Where a device lacks a pair of types, the scheduler would move whole caches to the processor and back.
        true if types.iter().all(|&(k, v)| device.can_attend(head_size, n_head, n_head_kv, k, v)) => Kernel::Flash,
        true => Kernel::Separate,
    }
}

pub(super) fn check(params: &SessionParams, hparams: &Hparams) -> Result<(), Error> {
    let &Hparams { head_size, n_layer, .. } = hparams;
    let wrong = |why: &str| Err(Error::Params(why.to_owned()));
    if params.n_ubatch == 0 {
        return wrong("a ubatch of 0 tokens: give at least 1");
    }
    if params.n_threads == 0 {
        return wrong("0 threads: give at least 1");
    }
    if params.n_ctx > i32::MAX as usize {
        return wrong("the context size does not fit 31 bits");
    }
    if params.lazy.n_slack > i32::MAX as usize {
        return wrong("a slack that does not fit 31 bits");
    }
    if params.lazy.policy != Policy::Off {
        if params.lazy.n_window == 0 {
            return wrong("a lazy window of 0 tokens: it holds the query's own, so give at least 1");
        }
        if params.lazy.n_last == 0 {
            return wrong("0 lazy queries: the score needs at least 1");
        }
    }
    if let Some((layer, _)) = params.lazy.windows.iter().find(|&(layer, n)| layer >= n_layer || n == 0) {
        let why = format!("the model has layers 0 to {}, and a window at least 1 token", n_layer - 1);
        return Err(Error::Params(format!("layer {layer} of --lazy-windows: {why}")));
    }
    if let Policy::Layers(layers) = &params.lazy.policy {
        for &layer in layers {
            let why = match hparams.windows.get(layer) {
                Some(None) => continue,
                Some(Some(window)) => format!("it is sliding-window by design (window {window}); leave it out"),
                None => format!("the model has layers 0 to {}", n_layer - 1),
            };
            return Err(Error::Params(format!("layer {layer} of --lazy layers: {why}")));
        }
    }
    let types = [Some(params.type_k), Some(params.type_v), params.lazy_type_k, params.lazy_type_v];
    for ty in types.into_iter().flatten() {
        if !Type::CACHE.contains(&ty) {
            return Err(Error::Params(format!("{ty} is no cache type")));
        }
        if !head_size.is_multiple_of(ty.block_size()) {
            return Err(Error::CacheType { ty, block: ty.block_size(), head_size });
        }
    }
    if !params.flash_attn && params.type_v.is_quantized() {
        return Err(Error::FlashAttention);
    }
    Ok(())
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("params", &self.params).field("kv", &self.kv()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_cover_the_tokens(n in 1usize..3000, n_ubatch in 1usize..600, n_last in 1usize..100) {
            let ends = piece_ends(n, n_ubatch, n_last);
            let sizes: Vec<usize> =
                ends.iter().scan(0, |start, &end| { let size = end - *start; *start = end; Some(size) }).collect();
            prop_assert_eq!(sizes.iter().sum::<usize>(), n);
            prop_assert!(sizes.iter().all(|&size| size <= n_ubatch));
            prop_assert!(*sizes.last().unwrap() >= n_last.min(n).min(n_ubatch));
        }
    }
}
