//! A long prompt, layer by layer (layer-major): only one layer's cache is ever uncompressed.
//!
//! The hidden states of the whole prompt are kept; each layer reads them ubatch by ubatch over a full-length f16
//! scratch store, is scored, and moves into its final store before the next layer begins. Peak memory is the final
//! stores, one layer's scratch and the hidden states.
//!
//! A card waits while a graph is built, and computes its masks anew in each: there some layers go together, an eighth of
//! them, or all where nothing will be smaller than its scratch. So do a layer and those that read its keys and values.

use std::ops::Range;

use super::{
    batch::{BatchEntry, Part, pieces_cut},
    error::Error,
    executor::Executor,
    guard,
    inputs::Inputs,
    layer::LayerCache,
    sequence::Sequence,
    sequences::Sequences,
    setup::Setup,
    snapshot::Snapshot,
    step::{Step, Stretch},
};
use crate::{
    cache::{Format, Lease, Meter},
    ggml::{Context, Device, Tensor, Type},
    lazy::{At, Selector},
};

/// Rows of logits that are computed at once.
const OUTPUT_ROWS: usize = 512;

/// The hidden states of one piece of a prompt, `[width, n]`, in memory of their own: where they go from one device to
/// the next, no more than a piece of them is held twice.
struct Hidden {
    states: Tensor,
    device: Device,
    /// The piece's place in the prompt.
    tokens: Range<usize>,
    _lease: Lease,
}

impl Hidden {
    fn new(width: usize, tokens: Range<usize>, device: Device, meter: &Meter) -> Result<Hidden, Error> {
        let context = Context::new(1);
        let states = context.tensor(Type::F32, &[width, tokens.len()]).named("hidden");
        let bytes = context.alloc(device.buffer_type(), "the prompt's hidden states")?;
        Ok(Hidden { states, device, tokens, _lease: meter.lease(bytes) })
    }

    /// Moves the states to a device, where they are not there already: they follow the layers, so that caches can stay
    /// where they are.
    fn move_to(&mut self, device: Device, meter: &Meter) -> Result<(), Error> {
        if self.device == device {
            return Ok(());
        }
        let width = self.states.shape()[0];
        let moved = Hidden::new(width, self.tokens.clone(), device, meter)?;
        moved.states.write(0, &self.states.to_f32());
        *self = moved;
        Ok(())
    }
}

/// Reads a prompt into a sequence, which is emptied before.
pub(super) fn prefill(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    entry: &BatchEntry<'_>,
    progress: &mut dyn FnMut(f32),
) -> Result<(), Error> {
    sequences.clear(entry.seq, executor);
    let mut sequence = Sequence::new(setup);
    let read = read_layers(setup, executor, &mut sequence, entry, progress);
    let hidden = read.inspect_err(|_| executor.forget())?;
    let done = add_output(setup, executor, entry, &hidden);
    drop(hidden);
    executor.forget();
    done?;
    if entry.prompt_end {
        sequence.begin_look(setup);
        if !setup.params.look_in_steps {
            sequence.finish_look(setup, executor)?;
        }
        sequence.prune(setup.params.lazy.at == At::Prefill, setup, executor)?;
        let n_rows = executor.logits.len() / setup.model.hparams().n_vocab;
        sequence.set_mark(entry, n_rows, setup, executor);
    }
    sequences.put(entry.seq, Some(sequence), executor);
    Ok(())
}

/// The prompt through all layers; what it leaves the last one with.
fn read_layers(
    setup: &Setup,
    executor: &mut Executor,
    sequence: &mut Sequence,
    entry: &BatchEntry<'_>,
    progress: &mut dyn FnMut(f32),
) -> Result<Vec<Hidden>, Error> {
    let (params, n_tokens) = (&setup.params, entry.tokens.len());
    let hparams = setup.model.hparams();
    let device = |layer: usize| setup.layers[layer].plan.device;
    let width = setup.model.architecture().width();
    let piece = |tokens| Hidden::new(width, tokens, device(0), &setup.meter);
    let anchor = guard::anchor(sequence, entry, setup);
    sequence.anchor = anchor.map(|at| Snapshot::empty(at, setup.layers.len()));
    let pieces = pieces_cut(n_tokens, anchor, params.n_ubatch, params.lazy.n_queries);
    let mut hidden = pieces.into_iter().map(piece).collect::<Result<Vec<Hidden>, Error>>()?;
    let n_score = match params.lazy.at {
        At::Prefill if setup.scores_end(entry) => setup.n_score(n_tokens, n_tokens, At::Prefill),
        _ => 0,
    };
    let mut selector = setup.selector();
    for group in setup.groups.iter().cloned() {
        // Before the layers' scratches are there.
        hidden.iter_mut().try_for_each(|piece| piece.move_to(device(group.start), &setup.meter))?;
        let prompt = Prompt { setup, entry, group: group.clone(), hidden: &hidden, n_score };
        let scores = prompt.read(executor, sequence, &mut |piece| {
            progress((group.start as f32 + piece * group.len() as f32) / hparams.n_layer as f32);
        })?;
        for (index, score) in group.zip(scores) {
            settle(setup, executor, sequence, (index, score), entry, &mut selector)?;
        }
    }
    sequence.append(entry.tokens);
    sequence.place.state_row = hidden.len() % 2;
    sequence.place.scored = (n_score, n_tokens);
    sequence.place.score_next = params.lazy.at == At::Decode && entry.prompt_end;
    Ok(hidden)
}

/// Moves a layer's scratch to its final store, and shrinks the layer that becomes lazy now, if any does.
fn settle(
    setup: &Setup,
    executor: &mut Executor,
    sequence: &mut Sequence,
    (index, score): (usize, Option<f32>),
    entry: &BatchEntry<'_>,
    selector: &mut Selector,
) -> Result<(), Error> {
    let n_tokens = entry.tokens.len();
    sequence.layers[index].score = score.or(sequence.layers[index].score);
    // The shrinking comes first: it makes room for the final store of this layer. Where this layer is the one, it
    // shrinks straight from the scratch, so that nothing is quantised twice.
    if entry.prompt_end {
        sequence.decide(index, score, n_tokens, selector, setup, executor)?;
    }
    let (layer, of_layer) = (&mut sequence.layers[index], &setup.layers[index]);
    layer.keep_scratch(n_tokens, of_layer, &mut executor.scheduler)?;
    if setup.prunes_at_once() {
        layer.prune(n_tokens, of_layer)?;
    }
    Ok(())
}

/// A prompt on its way through a group of layers.
struct Prompt<'a> {
    setup: &'a Setup,
    entry: &'a BatchEntry<'a>,
    group: Range<usize>,
    hidden: &'a [Hidden],
    n_score: usize,
}

/// A piece of the prompt on its way.
struct Piece {
    step: Step,
    part: [Part; 1],
    /// Rows of the piece that are carried on after the group.
    rows: Vec<i32>,
}

impl Prompt<'_> {
    /// All pieces through the group, over scratch stores that [`settle`] moves to their final places. The layers' scores,
    /// when they were asked for.
    fn read(
        &self,
        executor: &mut Executor,
        sequence: &mut Sequence,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Vec<Option<f32>>, Error> {
        let n_tokens = self.entry.tokens.len();
        let Sequence { layers, anchor, .. } = sequence;
        for index in self.group.clone() {
            let (layer, setup) = (&mut layers[index], &self.setup.layers[index]);
            layer.reserve_state(setup)?;
            if layer.attends() {
                let scratch = setup.make(layer.used_rows(n_tokens), layer.span, Format::F16)?;
                layer.put_scratch(setup.chain(scratch));
                layer.reserve_scores(setup)?;
            }
        }

        // The last graphs are the largest. Where memory grew with each, a device would free and take it a hundred times.
        let plan = |index: usize| &self.setup.layers[index].plan;
        let first = self.group.start;
        let is_new = first == 0 || plan(first - 1).device != plan(first).device;
        if is_new && plan(first).apart.is_some() {
            for hidden in &self.hidden[self.hidden.len().saturating_sub(2)..] {
                let piece = self.piece(hidden, 0, layers, Inputs::default());
                if piece.step.graph.n_nodes() > 0 {
                    executor.scheduler.alloc(&piece.step.graph)?;
                }
            }
        }
        let mut scores = vec![None; self.group.len()];
        let mut inputs = Inputs::default();
        for (number, hidden) in self.hidden.iter().enumerate() {
            let state_row = number % 2;
            if let Some(anchor) = anchor.as_mut().filter(|anchor| anchor.n_past == hidden.tokens.start) {
                self.group.clone().for_each(|i| anchor.keep(i, &layers[i], state_row, &self.setup.meter));
            }
            for (layer, setup) in layers[self.group.clone()].iter_mut().zip(&self.setup.layers[self.group.clone()]) {
                layer.keep_leaving(hidden.tokens.clone(), setup);
            }
            // Built while the device computes the piece before.
            inputs.clear();
            let Piece { mut step, part, rows } = self.piece(hidden, state_row, layers, inputs);
            // Nothing is to be done of a feed-forward alone at the model's end for tokens without outputs.
            if step.graph.n_nodes() == 0 {
                inputs = step.inputs;
                continue;
            }
            executor.scheduler.alloc(&step.graph)?;
            let tokens = &self.entry.tokens[hidden.tokens.clone()];
            let is_awaited = anchor.as_ref().is_some_and(|anchor| anchor.n_past == hidden.tokens.end);
            let scored = match is_awaited {
                true => executor.run(&mut step, &part, tokens.into(), &rows)?,
                false => executor.start(&mut step, &part, tokens.into(), &rows)?,
            };
            for scored in scored {
                scores[scored.layer - first] = Some(scored.value);
            }
            inputs = step.inputs;
            for (layer, setup) in layers[self.group.clone()].iter_mut().zip(&self.setup.layers[self.group.clone()]) {
                layer.wrote(hidden.tokens.end);
                layer.rescue(hidden.tokens.end, setup)?;
            }
            progress(hidden.tokens.end as f32 / n_tokens as f32);
        }
        // The last graph would keep the scratches.
        executor.forget();
        Ok(scores)
    }

    /// A piece through the group, whose scratches are there, and its states in this row.
    fn piece(&self, hidden: &Hidden, state_row: usize, layers: &[LayerCache], inputs: Inputs) -> Piece {
        let Hidden { states, tokens: piece, .. } = hidden;
        let n_tokens = self.entry.tokens.len();
        let n_score = if piece.end == n_tokens { self.n_score.min(piece.len()) } else { 0 };
        let part = [Part {
            first: 0,
            n: piece.len(),
            n_past: piece.start,
            n_score,
            exact_from: 0,
            state_row,
            shift: 0,
            see_each_other: false,
        }];
        // Of the last layer only the tokens with outputs are carried on; all have their keys and values stored.
        let wanted = match self.group.end == self.setup.layers.len() {
            true => self.entry.outputs.rows(n_tokens).start.clamp(piece.start, piece.end) - piece.start..piece.len(),
            false => 0..piece.len(),
        };
        let stretch = Stretch {
            layers: self.group.clone(),
            parts: &part,
            caches: &[layers],
            entering: Some(states).filter(|_| self.group.start > 0),
            has_embeddings: false,
            n_wanted: wanted.len(),
        };
        let step = self.setup.step(&stretch, inputs);
        if !wanted.is_empty() {
            let leaving = step.graph.rows(states, wanted.start, wanted.len());
            step.graph.expand(&step.graph.copy(&step.hidden, &leaving));
        }
        Piece { step, part, rows: wanted.map(|row| row as i32).collect() }
    }
}

/// Computes the rows of results of what has left the last layer.
fn add_output(setup: &Setup, executor: &mut Executor, entry: &BatchEntry<'_>, hidden: &[Hidden]) -> Result<(), Error> {
    let first = entry.outputs.rows(entry.tokens.len()).start;
    for Hidden { states, tokens: piece, .. } in hidden {
        for start in (first.max(piece.start)..piece.end).step_by(OUTPUT_ROWS) {
            let n = OUTPUT_ROWS.min(piece.end - start);
            let graph = setup.graph(Setup::max_nodes(1));
            let rows = graph.rows(states, start - piece.start, n);
            let output = setup.output(&graph, &rows, executor.wants_embeddings);
            executor.run_output(&graph, &output)?;
        }
    }
    Ok(())
}
