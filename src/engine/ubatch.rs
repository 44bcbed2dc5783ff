//! A ubatch through all layers in one graph (chunk-major).

use super::{
    Error,
    attention::Score,
    inputs::{Inputs, Part},
    second_look::SecondLook,
    sequence::LayerCache,
    session::{BatchEntry, Session, compute},
};
use crate::{
    cache::Store,
    ggml::{Device, Graph, Tensor},
    lazy::At,
    model::LayerStep,
    vocab::Token,
};

/// A graph with its inputs and outputs. It can run again as long as its key stays the same.
pub(super) struct CachedGraph {
    key: Key,
    graph: Graph,
    inputs: Inputs,
    logits: Option<Tensor>,
    embeddings: Option<Tensor>,
    scores: Vec<Score>,
    looks: Vec<SecondLook>,
}

/// What a graph's shape depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    parts: Vec<Part>,
    n_outputs: usize,
    /// For each part and layer: its store, and how many rows attention reads.
    stores: Vec<(u64, usize)>,
}

impl Session {
    /// Runs tokens that fit one ubatch, of one or more sequences, and takes their scores. `ends`: they are not followed
    /// by others of the same call.
    pub(super) fn run_ubatch(&mut self, batch: &[BatchEntry<'_>], ends: bool) -> Result<(), Error> {
        let done = self.try_ubatch(batch, ends);
        if done.is_err() {
            for entry in batch {
                self.recover(entry.seq, entry.tokens.len());
            }
        }
        done
    }

    fn try_ubatch(&mut self, batch: &[BatchEntry<'_>], ends: bool) -> Result<(), Error> {
        let mut parts = Vec::new();
        let mut tokens: Vec<Token> = Vec::new();
        let mut outputs: Vec<i32> = Vec::new();
        for entry in batch {
            self.before_writing(entry.seq, self.seq_n_past(entry.seq) + entry.tokens.len());
            self.reserve(entry)?;
            let part = self.part(entry, tokens.len(), ends);
            tokens.extend_from_slice(entry.tokens);
            let first_wanted = part.n - entry.outputs.n_rows(part.n);
            outputs.extend((part.first + first_wanted..part.first + part.n).map(|row| row as i32));
            parts.push(part);
        }

        let mut ready = self.graph_for(batch, &parts, outputs.len())?;
        ready.inputs.fill(&parts, &tokens, &outputs);
        ready.looks.iter_mut().for_each(SecondLook::fill);
        compute(&mut self.scheduler, &ready.graph, &ready.scores, &mut self.score_time)?;
        let mut rows_before = self.logits.len() / self.model.hparams().n_vocab;
        if let Some(logits) = &ready.logits {
            let start = self.logits.len();
            self.logits.resize(start + outputs.len() * self.model.hparams().n_vocab, 0.0);
            logits.read(0, &mut self.logits[start..]);
        }
        if let Some(embeddings) = &ready.embeddings {
            self.embeddings.extend(embeddings.to_f32());
        }
        let mut scores: Vec<Vec<(usize, f32)>> = vec![Vec::new(); parts.len()];
        for score in &ready.scores {
            scores[score.part].push((score.layer, score.value()));
        }
        // Only a decode step is likely to come again.
        self.decode_graph = parts.iter().all(|part| part.n == 1 && part.n_score == 0).then_some(ready);

        for (entry, (part, scores)) in batch.iter().zip(parts.iter().zip(scores)) {
            self.advance(entry, part, scores)?;
            rows_before += entry.outputs.n_rows(part.n);
            if entry.prompt_end {
                self.set_mark(entry, rows_before);
            }
        }
        Ok(())
    }

    fn reserve(&mut self, entry: &BatchEntry<'_>) -> Result<(), Error> {
        let fresh = (!self.sequences.contains_key(&entry.seq)).then(|| self.new_sequence());
        let sequence = self.sequences.entry(entry.seq).or_insert_with(|| fresh.expect("made for a new sequence"));
        let n_past = sequence.n_past;
        for (layer, maker) in sequence.layers.iter_mut().zip(&self.makers) {
            layer.reserve(n_past, entry.tokens.len(), maker, &mut self.scheduler)?;
        }
        Ok(())
    }

    fn part(&self, entry: &BatchEntry<'_>, first: usize, ends: bool) -> Part {
        let sequence = &self.sequences[&entry.seq];
        let (n, n_past) = (entry.tokens.len(), sequence.n_past);
        let n_score = match self.params.lazy.at {
            At::Prefill if ends && self.scores_end(entry) => self.n_score(n, n_past + n, At::Prefill),
            At::Decode if sequence.score_next => self.n_score(n, n_past + n, At::Decode),
            _ => 0,
        };
        Part { first, n, n_past, n_score, exact_from: sequence.exact_from }
    }

    /// The graph of the last step when it serves again, else a new one; with memory behind its tensors either way.
    fn graph_for(&mut self, batch: &[BatchEntry<'_>], parts: &[Part], n_outputs: usize) -> Result<CachedGraph, Error> {
        let caches: Vec<&[LayerCache]> = batch.iter().map(|entry| &*self.sequences[&entry.seq].layers).collect();
        let key = Key::new(parts, &caches, n_outputs);
        if let Some(cached) = self.decode_graph.take()
            && cached.key == key
            && self.scheduler.can_rerun(&cached.graph)
        {
            return Ok(cached);
        }
        let hparams = self.model.hparams();
        let architecture = self.model.architecture();
        let graph = self.new_graph(self.scheduler.max_nodes());
        let mut inputs = Inputs::default();
        let n_tokens = parts.iter().map(|part| part.n).sum();
        let ids = inputs.tokens(&graph, n_tokens);
        let positions = inputs.positions(&graph, n_tokens);
        let keep = (n_outputs < n_tokens).then(|| inputs.outputs(&graph, n_outputs.max(1)));
        let mut hidden = architecture.embed(&graph, &ids);
        let mut attention = self.attention(&mut inputs, parts, caches.clone());
        let (mut looks, mut looked) = (self.second_looks(parts), Vec::new());
        for index in 0..hparams.n_layer {
            let is_last = index + 1 == hparams.n_layer;
            let keep = keep.as_ref().filter(|_| is_last);
            let step = LayerStep { index, hidden: &hidden, positions: &positions, keep, n_ctx: self.params.n_ctx };
            graph.set_device(self.makers[index].apart());
            let result = architecture.layer(&graph, &step, &mut attention);
            let whole = Some(&result).filter(|_| keep.is_none());
            for look in &mut looks {
                looked.extend(self.look_again(&graph, look, &caches, index, &hidden, whole));
            }
            hidden = result;
        }
        let mut scores = attention.scores;
        scores.extend(looked);
        let output = self.model.output_device();
        graph.set_device((output != Device::cpu()).then_some(output));
        let logits = (n_outputs > 0).then(|| architecture.output(&graph, &hidden).as_output());
        if let Some(logits) = &logits {
            graph.expand(logits);
        }
        let embeddings = logits.as_ref().filter(|_| self.wants_embeddings).and_then(Tensor::multiplied);
        let embeddings = embeddings.map(Tensor::as_output);
        self.scheduler.alloc(&graph)?;
        Ok(CachedGraph { key, graph, inputs, logits, embeddings, scores, looks })
    }

    /// Counts the tokens in, and lets layers become lazy where a prompt has ended.
    fn advance(&mut self, entry: &BatchEntry<'_>, part: &Part, mut scores: Vec<(usize, f32)>) -> Result<(), Error> {
        let at = self.params.lazy.at;
        if let Some(sequence) = self.sequences.get_mut(&entry.seq) {
            sequence.append(entry.tokens);
            match at {
                At::Decode if entry.prompt_end => sequence.score_next = true,
                At::Decode if part.n_score > 0 => sequence.score_next = false,
                _ => {}
            }
        }
        self.note_scores(entry.seq, part.n_score, &mut scores);
        let decided_now = match at {
            At::Prefill => entry.prompt_end,
            At::Decode => part.n_score > 0,
        };
        if decided_now && !scores.is_empty() {
            self.decide(entry.seq, &scores)?;
        }
        if decided_now || entry.prompt_end {
            self.shrink_known(entry.seq)?;
        }
        Ok(())
    }
}

impl Key {
    fn new(parts: &[Part], caches: &[&[LayerCache]], n_outputs: usize) -> Key {
        let store = |part: &Part, layer: &LayerCache| {
            (layer.store().map_or(u64::MAX, Store::id), layer.rows_read(part.n_past + part.n))
        };
        let stores = parts
            .iter()
            .zip(caches)
            .flat_map(|(part, layers)| layers.iter().map(move |layer| store(part, layer)))
            .collect();
        // A step differs from the one before by its positions only, which are inputs.
        let parts = parts.iter().map(|part| Part { n_past: 0, exact_from: 0, ..*part }).collect();
        Key { parts, n_outputs, stores }
    }
}
