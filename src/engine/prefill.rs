//! A long prompt, layer by layer (layer-major): only one layer's cache is ever uncompressed.
//!
//! The hidden states of the whole prompt are kept; each layer reads them ubatch by ubatch over a full-length f16
//! scratch store, is scored, and moves into its final store before the next layer begins. Peak memory is the final
//! stores, one layer's scratch and the hidden states.
//!
//! A card waits while a graph is built, and computes its masks anew in each: there some layers go together, an eighth of
//! them, or all where nothing will be smaller than its scratch.

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
    lazy::{At, Policy, Selector},
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

/// What [`Session::group_graph`] builds.
struct GroupGraph {
    graph: Graph,
    parts: [Part; 1],
    /// Rows of the piece that are carried on behind the group.
    outputs: Vec<i32>,
    scores: Vec<Score>,
    looks: Vec<SecondLook>,
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
                match logits {
                    Ok(()) if entry.prompt_end => {
                        self.set_mark(entry, self.logits.len() / self.model.hparams().n_vocab)
                    }
                    Ok(()) => {}
                    Err(_) => self.seq_clear(entry.seq),
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
        let n_embd = self.model.hparams().n_embd;
        let piece = |tokens| Hidden::new(n_embd, tokens, self.makers[0].device, &self.meter);
        let mut hidden = pieces(&ends).map(piece).collect::<Result<Vec<Hidden>, Error>>()?;
        let n_score = match self.params.lazy.at {
            At::Prefill if self.scores_end(entry) => self.n_score(n_tokens, n_tokens, At::Prefill),
            _ => 0,
        };
        let mut selector = self.selector();
        for group in self.groups(&sequence.layers) {
            // Before the layers' scratches are there.
            hidden.iter_mut().try_for_each(|piece| piece.move_to(self.makers[group.start].device, &self.meter))?;
            let scores = self.read_group(entry, sequence, group.clone(), &hidden, n_score, &mut |piece| {
                progress((group.start as f32 + piece * group.len() as f32) / n_layer as f32);
            })?;
            for (index, score) in group.zip(scores) {
                self.settle(entry, sequence, index, score, &mut selector)?;
            }
        }
        sequence.append(entry.tokens);
        sequence.scored = (n_score, n_tokens);
        sequence.score_next = self.params.lazy.at == At::Decode && entry.prompt_end;
        Ok(hidden)
    }

    /// The layers, in groups that are read together: neighbours on one device.
    fn groups(&self, layers: &[LayerCache]) -> Vec<Range<usize>> {
        let n_layer = layers.len();
        let lazy = &self.params.lazy;
        let none_shrinks = lazy.policy == Policy::Off || lazy.windowed_prefill();
        let scratch_stays = none_shrinks && layers.iter().all(|layer| layer.format == Format::F16);
        let mut groups: Vec<Range<usize>> = Vec::new();
        for index in 0..n_layer {
            let maker = &self.makers[index];
            let at_most = match maker.apart() {
                None => 1,
                Some(_) if scratch_stays => n_layer,
                Some(_) => n_layer / 8,
            };
            match groups.last_mut() {
                Some(group) if group.len() < at_most && self.makers[group.start].device == maker.device => {
                    group.end = index + 1;
                }
                _ => groups.push(index..index + 1),
            }
        }
        groups
    }

    /// All pieces through a group of layers, over scratch stores that `settle` moves to their final places. The layers'
    /// scores, when they were asked for.
    fn read_group(
        &mut self,
        entry: &BatchEntry<'_>,
        sequence: &mut Sequence,
        group: Range<usize>,
        hidden: &[Hidden],
        n_score: usize,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Vec<Option<f32>>, Error> {
        let n_tokens = entry.tokens.len();
        let layers = &mut sequence.layers;
        for index in group.clone() {
            let layer = &mut layers[index];
            let scratch = self.makers[index].make(layer.used_rows(n_tokens), layer.span(), Format::F16)?;
            layer.put_scratch(scratch);
        }

        // The last graphs are the largest. Where memory grew with each, a device would free and take it a hundred times.
        let maker = &self.makers[group.start];
        let is_new = group.start == 0 || self.makers[group.start - 1].device != maker.device;
        if is_new && maker.apart().is_some() {
            for piece in &hidden[hidden.len().saturating_sub(2)..] {
                let ready = self.group_graph(entry, layers, &group, piece, n_score, &mut Inputs::default());
                self.scheduler.alloc(&ready.graph)?;
            }
        }
        let mut values = vec![None; group.len()];
        let mut inputs = Inputs::default();
        for piece in hidden {
            // Built while the device computes the piece before.
            inputs.clear();
            let mut ready = self.group_graph(entry, layers, &group, piece, n_score, &mut inputs);
            self.scheduler.alloc(&ready.graph)?;
            inputs.fill(&ready.parts, &entry.tokens[piece.tokens.clone()], &ready.outputs);
            ready.looks.iter_mut().for_each(SecondLook::fill);
            if ready.scores.is_empty() {
                self.scheduler.start(&ready.graph)?;
            } else {
                compute(&mut self.scheduler, &ready.graph, &ready.scores, &mut self.score_time)?;
            }
            for score in &ready.scores {
                values[score.layer - group.start] = Some(score.value());
            }
            progress(piece.tokens.end as f32 / n_tokens as f32);
        }
        self.scheduler.release();
        Ok(values)
    }

    /// A piece of the prompt through a group of layers, whose scratches are there.
    fn group_graph(
        &self,
        entry: &BatchEntry<'_>,
        layers: &[LayerCache],
        group: &Range<usize>,
        Hidden { states, tokens: piece, .. }: &Hidden,
        n_score: usize,
        inputs: &mut Inputs,
    ) -> GroupGraph {
        let n_layer = self.model.hparams().n_layer;
        let ends_prompt = piece.end == entry.tokens.len();
        let n_score = if ends_prompt { n_score.min(piece.len()) } else { 0 };
        let parts: [Part; 1] = single_part(piece.len(), piece.start, n_score);
        let graph = self.new_graph(1024 * group.len());
        let positions = inputs.positions(&graph, piece.len());
        // Of the last layer only the tokens with outputs are carried on; all have their keys and values stored.
        let first_wanted = match entry.outputs {
            _ if group.end < n_layer => 0,
            Outputs::All => 0,
            Outputs::Last if ends_prompt => piece.len() - 1,
            _ => piece.len(),
        };
        let outputs: Vec<i32> = (first_wanted..piece.len()).map(|row| row as i32).collect();
        let keep = (first_wanted > 0).then(|| inputs.outputs(&graph, outputs.len().max(1)));
        let (mut looks, mut looked) = (self.second_looks(&parts), Vec::new());
        let n_ctx = self.params.n_ctx;
        let mut behind = match group.start {
            0 => self.model.architecture().embed(&graph, &inputs.tokens(&graph, piece.len())),
            _ => states.clone(),
        };
        let mut attention = self.attention(inputs, &parts, vec![layers]);
        for index in group.clone() {
            let keep = keep.as_ref().filter(|_| index + 1 == n_layer);
            let step = LayerStep { index, hidden: &behind, positions: &positions, keep, n_ctx };
            let result = self.model.architecture().layer(&graph, &step, &mut attention);
            for look in &mut looks {
                let whole = Some(&result).filter(|_| keep.is_none());
                looked.extend(self.look_again(&graph, look, &[layers], index, &behind, whole));
            }
            behind = result;
        }
        let mut scores = attention.scores;
        scores.extend(looked);
        if !outputs.is_empty() {
            graph.expand(&graph.copy(&behind, &graph.rows(states, first_wanted, outputs.len())));
        }
        GroupGraph { graph, parts, outputs, scores, looks }
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
            Some(score) if entry.prompt_end => selector.scored(index, score),
            _ => known.then_some(index),
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
