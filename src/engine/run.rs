//! A batch, entry by entry: tokens whose rows are still there are not computed again, a long prompt goes layer by layer,
//! and everything else ubatch by ubatch.

use std::{collections::BTreeSet, slice};

use super::{
    batch::{BatchEntry, Embeddings, MAX_PARTS, NO_TOKEN, Outputs, SeqId, pieces, pieces_cut},
    error::Error,
    executor::Executor,
    guard,
    prefill::prefill,
    sequence::Sequence,
    sequences::Sequences,
    setup::Setup,
    snapshot::Snapshot,
    ubatch::run_ubatch,
};

/// Appends tokens to one or more sequences; the executor has their rows afterwards. `progress` is told the share that is
/// done, from 0 to 1.
pub(super) fn run(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    batch: &[BatchEntry<'_>],
    progress: &mut dyn FnMut(f32),
) -> Result<(), Error> {
    check(setup, sequences, batch)?;
    batch.iter().try_for_each(|entry| finish_look(setup, executor, sequences, entry.seq))?;
    executor.logits.clear();
    executor.embeddings.clear();
    let n_tokens: usize = batch.iter().map(|entry| entry.tokens.len()).sum();
    let params = &setup.params;
    let threads = if n_tokens > batch.len() { params.n_threads_batch } else { params.n_threads };
    executor.scheduler.set_threads(threads)?;

    let total = n_tokens as f32;
    let mut done = 0;
    let mut waiting = batch;
    while let [entry, rest @ ..] = waiting {
        let n = entry.tokens.len();
        let again = sequences.get_mut(entry.seq).map_or(0, |sequence| sequence.replay(entry, executor));
        if again > 0 {
            if again < n {
                run_alone(setup, executor, sequences, &entry.piece(again..n), &mut |_| {})?;
            }
            done += n;
            waiting = rest;
        } else if reads_layer_major(setup, sequences, entry) {
            let (start, share) = (done as f32 / total, n as f32 / total);
            prefill(setup, executor, sequences, entry, &mut |part| progress(start + share * part))?;
            done += n;
            waiting = rest;
        } else {
            // As many entries as fit one ubatch go together; a longer one goes in pieces by itself.
            let fitting = entries_that_fit(setup, sequences, waiting);
            let (together, rest) = waiting.split_at(fitting.max(1));
            if fitting <= 1 {
                let told = &mut |tokens| progress((done + tokens) as f32 / total);
                run_alone(setup, executor, sequences, entry, told)?;
            } else {
                run_ubatch(setup, executor, sequences, together, None, true)?;
            }
            done += together.iter().map(|entry| entry.tokens.len()).sum::<usize>();
            waiting = rest;
        }
        progress(done as f32 / total);
    }
    Ok(())
}

/// What is read next is read after the look that is under way, if one is.
fn finish_look(setup: &Setup, executor: &mut Executor, sequences: &mut Sequences, seq: SeqId) -> Result<(), Error> {
    sequences.get_mut(seq).map_or(Ok(()), |sequence| sequence.finish_look(setup, executor))
}

fn check(setup: &Setup, sequences: &Sequences, batch: &[BatchEntry<'_>]) -> Result<(), Error> {
    let (n_vocab, n_ctx) = (setup.model.hparams().n_vocab, setup.params.n_ctx);
    let mut seen = BTreeSet::new();
    for entry in batch {
        if entry.tokens.is_empty() {
            return Err(Error::Empty);
        }
        if !seen.insert(entry.seq) {
            return Err(Error::SequenceTwice(entry.seq));
        }
        let is_unknown = |&&token: &&i32| usize::try_from(token).map_or(true, |id| id >= n_vocab);
        if let Some(&token) = entry.tokens.iter().find(is_unknown) {
            return Err(Error::Token { token, n_vocab });
        }
        let needed = sequences.n_past(entry.seq) + entry.tokens.len();
        if needed > n_ctx {
            return Err(Error::ContextFull { needed, n_ctx });
        }
    }
    if batch.is_empty() { Err(Error::Empty) } else { Ok(()) }
}

/// Appends rows of embeddings to a sequence, in place of tokens; the executor has their rows of results afterwards.
pub(super) fn run_embeddings(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    (seq, outputs, prompt_end): (SeqId, Outputs, bool),
    embeddings: &Embeddings<'_>,
) -> Result<(), Error> {
    let (hparams, params) = (setup.model.hparams(), &setup.params);
    let (width, per_token) = (hparams.n_embd_input(), hparams.rope.kind.positions_per_token());
    let n = embeddings.rows.len() / width;
    let wrong = |why: String| Err(Error::Embeddings(why));
    if n == 0 || !embeddings.rows.len().is_multiple_of(width) {
        return wrong(format!("{} elements are no rows of {width}", embeddings.rows.len()));
    }
    if ![0, n * per_token].contains(&embeddings.positions.len()) {
        let given = embeddings.positions.len();
        return wrong(format!("{given} positions for {n} rows, each of which has {per_token}"));
    }
    if embeddings.see_each_other && n > params.n_ubatch {
        return wrong(format!("{n} rows see each other; a ubatch has {} (give a larger one)", params.n_ubatch));
    }
    let n_past = sequences.n_past(seq);
    // A picture may come in several calls.
    let last = sequences.get(seq).map_or(0, |sequence| sequence.positions.at(n_past.saturating_sub(1)));
    if embeddings.positions.iter().take(n).any(|&position| usize::try_from(position).map_or(true, |at| at < last)) {
        return wrong(format!("a position is before {last}, where the sequence's last token is"));
    }
    if !embeddings.positions[..n.min(embeddings.positions.len())].is_sorted() {
        return wrong("the first positions of rows go back".to_owned());
    }
    if n_past + n > params.n_ctx {
        return Err(Error::ContextFull { needed: n_past + n, n_ctx: params.n_ctx });
    }
    finish_look(setup, executor, sequences, seq)?;
    executor.logits.clear();
    executor.embeddings.clear();
    executor.scheduler.set_threads(params.n_threads_batch)?;

    let tokens = vec![NO_TOKEN; n];
    let entry = BatchEntry { seq, tokens: &tokens, outputs, prompt_end };
    for range in pieces(n, params.n_ubatch, 0) {
        let of_piece = |dimension: &[i32]| dimension[range.clone()].to_vec();
        let positions: Vec<i32> = embeddings.positions.chunks_exact(n).flat_map(of_piece).collect();
        let rows = &embeddings.rows[range.start * width..range.end * width];
        let piece = Embeddings { rows, positions: &positions, ..*embeddings };
        let (ends, entry) = (range.end == n, entry.piece(range));
        run_ubatch(setup, executor, sequences, slice::from_ref(&entry), Some(piece), ends)?;
    }
    Ok(())
}

/// An entry by itself, in pieces where it does not fit one ubatch. The last piece holds all tokens that are scored.
fn run_alone(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    entry: &BatchEntry<'_>,
    progress: &mut dyn FnMut(usize),
) -> Result<(), Error> {
    let (n, params) = (entry.tokens.len(), &setup.params);
    let anchor = guard::anchor(sequences.get_or_new(entry.seq, setup), entry, setup);
    for range in pieces_cut(n, anchor, params.n_ubatch, params.lazy.n_queries) {
        let end = range.end;
        if anchor == Some(range.start) {
            let sequence = sequences.get_or_new(entry.seq, setup);
            // A new sequence's states are there before its first token.
            let (n_past, row) = (sequence.n_past(), sequence.place.state_row);
            sequence.reserve(n_past..n_past + range.len(), setup, executor)?;
            sequence.anchor = Some(Snapshot::of(n_past, &sequence.layers, row, &setup.meter));
        }
        run_ubatch(setup, executor, sequences, slice::from_ref(&entry.piece(range)), None, end == n)?;
        if end < n {
            progress(end);
        }
    }
    Ok(())
}

fn entries_that_fit(setup: &Setup, sequences: &Sequences, batch: &[BatchEntry<'_>]) -> usize {
    let mut tokens = 0;
    let has_anchor = |entry: &BatchEntry<'_>| match sequences.get(entry.seq) {
        Some(sequence) => guard::anchor(sequence, entry, setup).is_some(),
        None => guard::anchor(&Sequence::new(setup), entry, setup).is_some(),
    };
    let fits = |entry: &&BatchEntry<'_>| {
        tokens += entry.tokens.len();
        tokens <= setup.params.n_ubatch
            && !reads_layer_major(setup, sequences, entry)
            && !sequences.get(entry.seq).is_some_and(Sequence::may_replay)
            && !has_anchor(entry)
    };
    batch.iter().take(MAX_PARTS).take_while(fits).count()
}

fn reads_layer_major(setup: &Setup, sequences: &Sequences, entry: &BatchEntry<'_>) -> bool {
    let params = &setup.params;
    params.layer_major && sequences.n_past(entry.seq) == 0 && entry.tokens.len() > params.n_ubatch
}
