//! A ubatch through all layers in one graph (chunk-major).

use std::iter;

use super::{
    batch::{BatchEntry, Embeddings, Fed, Part},
    error::Error,
    executor::Executor,
    gather::gather,
    layer::LayerCache,
    mark::Place,
    sequence::Sequence,
    sequences::Sequences,
    setup::Setup,
    step::Stretch,
};
use crate::{lazy::At, vocab::Token};

/// Runs tokens that fit one ubatch, of one or more sequences, and takes their scores. `ends`: they are not followed by
/// others of the same call. `embeddings` stand in place of the tokens of a single sequence.
pub(super) fn run_ubatch(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    batch: &[BatchEntry<'_>],
    embeddings: Option<Embeddings<'_>>,
    ends: bool,
) -> Result<(), Error> {
    let done = try_ubatch(setup, executor, sequences, batch, embeddings, ends);
    if done.is_err() {
        executor.forget();
        for entry in batch {
            sequences.recover(entry.seq, entry.tokens.len(), executor);
        }
    }
    done
}

fn try_ubatch(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    batch: &[BatchEntry<'_>],
    embeddings: Option<Embeddings<'_>>,
    ends: bool,
) -> Result<(), Error> {
    let mut parts = Vec::new();
    let mut tokens: Vec<Token> = Vec::new();
    let mut rows: Vec<i32> = Vec::new();
    for entry in batch {
        let (first, n) = (tokens.len(), entry.tokens.len());
        let sequence = sequences.get_or_new(entry.seq, setup);
        let n_past = sequence.n_past();
        sequence.before_writing(n_past + n, &setup.meter);
        sequence.reserve(n_past..n_past + n, setup, executor)?;
        let part = part(setup, sequence, entry, first, ends);
        // The scores' queries go through layers again as tokens of text.
        parts.push(match embeddings {
            Some(Embeddings { see_each_other, .. }) => Part { n_score: 0, see_each_other, ..part },
            None => part,
        });
        rows.extend(entry.outputs.rows(n).map(|row| (first + row) as i32));
        tokens.extend_from_slice(entry.tokens);
    }

    gather(setup, executor, sequences, batch, &parts);
    let caches: Vec<&[LayerCache]> = batch.iter().map(|entry| sequences.layers(entry.seq)).collect();
    let layers = 0..setup.layers.len();
    let stretch = Stretch {
        layers,
        parts: &parts,
        caches: &caches,
        entering: None,
        has_embeddings: embeddings.is_some(),
        n_wanted: rows.len(),
    };
    let mut ready = executor.step(setup, &stretch)?;
    let mut n_rows = executor.logits.len() / setup.model.hparams().n_vocab;
    let scored = executor.run(&mut ready.step, &parts, Fed { tokens: &tokens, embeddings }, &rows)?;
    // Only a decode step is likely to come again.
    if parts.iter().all(|part| part.n == 1 && part.n_score == 0) {
        executor.keep(ready);
    }

    for (index, (entry, part)) in iter::zip(batch, &parts).enumerate() {
        let of_part = scored.iter().filter(|scored| scored.part == index);
        let scores = of_part.map(|scored| (scored.layer, scored.value)).collect();
        let Some(sequence) = sequences.get_mut(entry.seq) else { continue };
        sequence.place_tokens(entry.tokens.len(), embeddings.map_or(&[], |embeddings| embeddings.positions));
        advance(setup, executor, sequence, entry, part.n_score, scores)?;
        n_rows += entry.outputs.rows(part.n).len();
        if entry.prompt_end {
            sequence.set_mark(entry, n_rows, setup, executor);
        }
    }
    Ok(())
}

fn part(setup: &Setup, sequence: &Sequence, entry: &BatchEntry<'_>, first: usize, ends: bool) -> Part {
    let (n, n_past) = (entry.tokens.len(), sequence.n_past());
    let n_score = match setup.params.lazy.at {
        At::Prefill if ends && setup.scores_end(entry) => setup.n_score(n, n_past + n, At::Prefill),
        At::Decode if sequence.place.score_next => setup.n_score(n, n_past + n, At::Decode),
        _ => 0,
    };
    let Place { exact_from, state_row, .. } = sequence.place;
    let shift = sequence.positions.shift(n_past);
    Part { first, n, n_past, n_score, exact_from, state_row, shift, see_each_other: false }
}

/// Counts the tokens in, and lets layers become lazy where a prompt has ended.
fn advance(
    setup: &Setup,
    executor: &mut Executor,
    sequence: &mut Sequence,
    entry: &BatchEntry<'_>,
    n_score: usize,
    mut scores: Vec<(usize, f32)>,
) -> Result<(), Error> {
    sequence.append(entry.tokens);
    sequence.rescue(setup)?;
    sequence.place.state_row = 1 - sequence.place.state_row;
    sequence.note_scores(n_score, &mut scores, setup.params.lazy.n_queries);
    let decides = match setup.params.lazy.at {
        At::Prefill => entry.prompt_end,
        At::Decode => {
            sequence.place.score_next = entry.prompt_end || (sequence.place.score_next && n_score == 0);
            n_score > 0
        }
    };
    if decides || entry.prompt_end {
        // A fixed set needs no scores.
        sequence.decide_all(if decides { &scores } else { &[] }, setup, executor)?;
    }
    if entry.prompt_end {
        sequence.begin_look(setup);
        if !setup.params.look_in_steps {
            sequence.finish_look(setup, executor)?;
        }
    }
    sequence.prune(decides, setup, executor)
}
