//! A long prompt, layer by layer (layer-major): only one layer's cache is ever uncompressed.
//!
//! The hidden states of the whole prompt are kept; each layer reads them ubatch by ubatch over a full-length f16
//! scratch store, is scored, and moves into its final store before the next layer begins. Peak memory is the final
//! stores, one layer's scratch and the hidden states.

use std::ops::Range;

use super::{
    Error,
    attention::Score,
    inputs::{Inputs, Part},
    second_look::SecondLook,
    sequence::{LayerCache, Sequence},
    session::{BatchEntry, Outputs, Session, compute, piece_ends, single_part},
};
use crate::{
    cache::{Format, Lease, Meter},
    ggml::{self, Context, Device, Graph, Tensor, Type},
    lazy::{At, Selector},
    model::LayerStep,
};

/// Rows of logits that are computed at once.
const OUTPUT_ROWS: usize = 512;

/// The hidden states of one piece of a prompt, `[n_embd, n]`, in memory of their own: where they go from one device to
/// the next, no more than a piece of them is held twice.
struct Hidden {
    states: Tensor,
    device: Device,
    /// The piece's place in the prompt.
    tokens: Range<usize>,
    _lease: Lease,
}

impl Hidden {
    fn new(n_embd: usize, tokens: Range<usize>, device: Device, meter: &Meter) -> Result<Hidden, Error> {
        let context = Context::new(1);
        let states = context.tensor(Type::F32, &[n_embd, tokens.len()]).named("hidden");
        let bytes = context.alloc(device.buffer_type(), "the prompt's hidden states")?;
        Ok(Hidden { states, device, tokens, _lease: meter.lease(bytes) })
    }

    /// Moves the states to a device, where they are not there already: they follow the layers, so that caches can stay
    /// where they are.
    fn move_to(&mut self, device: Device, meter: &Meter) -> Result<(), Error> {
        if self.device == device {
            return Ok(());
        }
        let n_embd = self.states.shape()[0];
        let moved = Hidden::new(n_embd, self.tokens.clone(), device, meter)?;
        moved.states.write(0, &self.states.to_f32());
        *self = moved;
        Ok(())
    }
}

impl Session {
    pub(super) fn prefill_layer_major(
        &mut self,
        entry: &BatchEntry<'_>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<(), Error> {
        self.decode_graph = None;
        self.sequences.remove(&entry.seq);
        let mut sequence = self.new_sequence();
        let done = self.read_layers(entry, &mut sequence, progress);
        match done {
            Ok(hidden) => {
                self.sequences.insert(entry.seq, sequence);
                let logits = self.output_logits(entry, &hidden);
                drop(hidden);
                ggml::release_free_memory();
                if logits.is_err() {
                    self.seq_clear(entry.seq);
                }
                logits
            }
            Err(error) => Err(error),
        }
    }

    fn read_layers(
        &mut self,
        entry: &BatchEntry<'_>,
        sequence: &mut Sequence,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Vec<Hidden>, Error> {
        let n_tokens = entry.tokens.len();
        let n_layer = self.model.hparams().n_layer;
        let ends = piece_ends(n_tokens, self.params.n_ubatch, self.params.lazy.n_last);
        let mut hidden = self.embed(entry, &ends)?;
        let n_score = match self.params.lazy.at {
            At::Prefill if entry.prompt_end => self.n_score(n_tokens, n_tokens, At::Prefill),
            _ => 0,
        };
        let mut selector = self.selector();
        for index in 0..n_layer {
            // Before the layer's scratch is there.
            hidden.iter_mut().try_for_each(|piece| piece.move_to(self.makers[index].device, &self.meter))?;
            let score = self.read_layer(entry, sequence, index, &hidden, n_score, &mut |piece| {
                progress((index as f32 + piece) / n_layer as f32);
            })?;
            self.settle(entry, sequence, index, score, &mut selector)?;
        }
        sequence.n_past = n_tokens;
        sequence.score_next = self.params.lazy.at == At::Decode && entry.prompt_end;
        Ok(hidden)
    }

    /// The embeddings, on the first layer's device.
    fn embed(&mut self, entry: &BatchEntry<'_>, ends: &[usize]) -> Result<Vec<Hidden>, Error> {
        let mut hidden = Vec::with_capacity(ends.len());
        for tokens in pieces(ends) {
            let mut piece = self.embed_piece(entry, tokens)?;
            piece.move_to(self.makers[0].device, &self.meter)?;
            hidden.push(piece);
        }
        Ok(hidden)
    }

    /// The processor looks embeddings up.
    fn embed_piece(&mut self, entry: &BatchEntry<'_>, tokens: Range<usize>) -> Result<Hidden, Error> {
        let piece = Hidden::new(self.model.hparams().n_embd, tokens.clone(), Device::cpu(), &self.meter)?;
        let graph = Graph::new(16);
        let mut inputs = Inputs::default();
        let ids = inputs.tokens(&graph, tokens.len());
        let embedded = self.model.architecture().embed(&graph, &ids);
        graph.expand(&graph.copy(&embedded, &piece.states));
        self.scheduler.alloc(&graph)?;
        inputs.fill(&[], &entry.tokens[tokens], &[]);
        self.scheduler.compute(&graph)?;
        // The graph would keep the states where they are.
        self.scheduler.release();
        Ok(piece)
    }

    /// All pieces through one layer, over a scratch store that `settle` moves to its final place. The layer's score,
    /// when one was asked for.
    fn read_layer(
        &mut self,
        entry: &BatchEntry<'_>,
        sequence: &mut Sequence,
        index: usize,
        hidden: &[Hidden],
        n_score: usize,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Option<f32>, Error> {
        let n_tokens = entry.tokens.len();
        let is_last = index + 1 == self.model.hparams().n_layer;
        let layers = &mut sequence.layers;
        let scratch = self.makers[index].make(layers[index].used_rows(n_tokens), layers[index].span(), Format::F16)?;
        layers[index].put_scratch(scratch);

        let mut score = None;
        let mut inputs = Inputs::default();
        for Hidden { states, tokens: piece, .. } in hidden {
            let ends_prompt = piece.end == n_tokens;
            let n_score = if ends_prompt { n_score.min(piece.len()) } else { 0 };
            let parts: [Part; 1] = single_part(piece.len(), piece.start, n_score);
            let graph = self.new_graph(1024);
            inputs.clear();
            let positions = inputs.positions(&graph, piece.len());
            // Of the last layer only the tokens with outputs are carried on; all have their keys and values stored.
            let first_wanted = match entry.outputs {
                _ if !is_last => 0,
                Outputs::All => 0,
                Outputs::Last if ends_prompt => piece.len() - 1,
                _ => piece.len(),
            };
            let outputs: Vec<i32> = (first_wanted..piece.len()).map(|row| row as i32).collect();
            let keep = (first_wanted > 0).then(|| inputs.outputs(&graph, outputs.len().max(1)));
            let mut attention = self.attention(&mut inputs, &parts, vec![&*layers]);
            let n_ctx = self.params.n_ctx;
            let step = LayerStep { index, hidden: states, positions: &positions, keep: keep.as_ref(), n_ctx };
            let result = self.model.architecture().layer(&graph, &step, &mut attention);
            let mut scores = attention.scores;
            let mut looks = self.second_looks(&parts);
            for look in &mut looks {
                let whole = Some(&result).filter(|_| keep.is_none());
                scores.extend(self.look_again(&graph, look, &[&*layers], index, states, whole));
            }
            if !outputs.is_empty() {
                graph.expand(&graph.copy(&result, &graph.rows(states, first_wanted, outputs.len())));
            }
            self.scheduler.alloc(&graph)?;
            inputs.fill(&parts, &entry.tokens[piece.clone()], &outputs);
            looks.iter_mut().for_each(SecondLook::fill);
            compute(&mut self.scheduler, &graph, &scores, &mut self.score_time)?;
            score = scores.first().map(Score::value).or(score);
            progress(piece.end as f32 / n_tokens as f32);
        }
        self.scheduler.release();
        Ok(score)
    }

    /// Moves a layer's scratch to its final store, and shrinks the layer that becomes lazy now, if any does.
    fn settle(
        &mut self,
        entry: &BatchEntry<'_>,
        sequence: &mut Sequence,
        index: usize,
        score: Option<f32>,
        selector: &mut Selector,
    ) -> Result<(), Error> {
        let n_tokens = entry.tokens.len();
        let format = self.lazy_format;
        sequence.layers[index].score = score.or(sequence.layers[index].score);
        let known = entry.prompt_end && selector.is_known_lazy(index);
        let lazy = match score {
            Some(score) => selector.scored(index, score),
            None => known.then_some(index),
        };
        // The shrinking comes first: it makes room for the final store of this layer. Where this layer is the one, it
        // shrinks straight from the scratch, so that nothing is quantised twice.
        if let Some(lazy) = lazy {
            let layer: &mut LayerCache = &mut sequence.layers[lazy];
            if layer.is_active() {
                layer.make_lazy(n_tokens, self.spans[lazy], format, &self.makers[lazy], &mut self.scheduler)?;
            }
        }
        sequence.layers[index].keep_scratch(n_tokens, &self.makers[index], &mut self.scheduler)?;
        Ok(())
    }

    fn output_logits(&mut self, entry: &BatchEntry<'_>, hidden: &[Hidden]) -> Result<(), Error> {
        let n_tokens = entry.tokens.len();
        let n_vocab = self.model.hparams().n_vocab;
        let first = match entry.outputs {
            Outputs::None => n_tokens,
            Outputs::Last => n_tokens - 1,
            Outputs::All => 0,
        };
        for Hidden { states, tokens: piece, .. } in hidden {
            for start in (first.max(piece.start)..piece.end).step_by(OUTPUT_ROWS) {
                let n = OUTPUT_ROWS.min(piece.end - start);
                let graph = self.new_graph(32);
                let states = graph.rows(states, start - piece.start, n);
                let logits = self.model.architecture().output(&graph, &states).as_output();
                graph.expand(&logits);
                let embeddings = logits.multiplied().filter(|_| self.wants_embeddings).map(Tensor::as_output);
                self.scheduler.alloc(&graph)?;
                self.scheduler.compute(&graph)?;
                let filled = self.logits.len();
                self.logits.resize(filled + n * n_vocab, 0.0);
                logits.read(0, &mut self.logits[filled..]);
                if let Some(embeddings) = embeddings {
                    self.embeddings.extend(embeddings.to_f32());
                }
            }
        }
        // The last graph would keep the hidden states.
        self.scheduler.release();
        Ok(())
    }
}

fn pieces(ends: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends.iter().copied()).map(|(start, end)| start..end)
}
