//! Checkpoints: what a sequence needs besides its active layers' rows to go on from here once more.

use super::{
    batch::{BatchEntry, Outputs, SeqId},
    executor::Executor,
    layer::LayerCache,
    pruning,
    run::run,
    sequence::Sequence,
    sequences::Sequences,
    setup::Setup,
    state::{Kind, LayerHeader, LayerRows, State, StateError, mismatch},
};

/// A place in a sequence that one can come back to: [`Session::checkpoint`](super::Session::checkpoint).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint(Vec<u8>);

impl Checkpoint {
    /// From the bytes of another one, which are checked when it is restored.
    pub fn from_bytes(bytes: Vec<u8>) -> Checkpoint {
        Checkpoint(bytes)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// How a checkpoint was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Tokens in the sequence now.
    pub n_past: usize,
    /// Tokens that had to be read anew: 0, or all of them.
    pub n_read: usize,
    /// Bytes that the checkpoint took.
    pub n_bytes: usize,
}

/// Makes a sequence as it was when the checkpoint at the beginning of `from` was made, or reads its tokens anew.
pub(super) fn restore(
    setup: &Setup,
    executor: &mut Executor,
    sequences: &mut Sequences,
    seq: SeqId,
    from: &[u8],
) -> Result<Restored, StateError> {
    let mut state = State::open(setup, from)?;
    if state.kind == Kind::Whole {
        return Err(mismatch("it is a whole state and no checkpoint"));
    }
    let n_past = state.place.n_past;
    let restored = |n_read| Restored { n_past, n_read, n_bytes: state.length };
    let (exact, again) = (restored(0), restored(n_past));
    if n_past == 0 {
        sequences.clear(seq, executor);
        return Ok(exact);
    }
    let layers = state.layers(setup)?;
    let grown = sequences.get_mut(seq).filter(|sequence| sequence.tokens.starts_with(&state.tokens));
    if let Some(sequence) = grown {
        if fits(sequence, &layers, n_past) {
            sequence.layers.iter_mut().try_for_each(LayerCache::own_kept)?;
            for (layer, saved) in sequence.layers.iter_mut().zip(&layers) {
                layer.put_ring_rows(n_past, &saved.ring());
                layer.put_exact_rows(saved.exact);
                layer.put_state_row(state.place.state_row, saved.state);
            }
            sequence.settle(state.place);
            return Ok(exact);
        }
        if sequence.truncate(n_past) {
            return Ok(exact);
        }
    }
    sequences.clear(seq, executor);
    let entry = BatchEntry { seq, tokens: &state.tokens, outputs: Outputs::None, prompt_end: false };
    run(setup, executor, sequences, &[entry], &mut |_| {}).inspect_err(|_| sequences.clear(seq, executor))?;
    Ok(again)
}

/// Whether the layers still are as they were when a checkpoint of `n` tokens was made: its rows have a place.
fn fits(sequence: &Sequence, saved: &[LayerRows<'_>], n: usize) -> bool {
    let as_saved = |(layer, saved): (&LayerCache, &LayerRows<'_>)| {
        let now = LayerHeader::of(layer, n, Kind::Partial);
        let LayerHeader { lazy, span, format, exact, .. } = saved.header;
        let has_room = layer.store.is_some() == layer.attends() && layer.state.is_some() != saved.state.is_empty();
        // What was pruned since is gone, and the rest was not noted.
        let is_held = layer.pruned.is_none() || layer.held_from + pruning::WINDOW <= n;
        let has_lists = layer.rescued.is_some() || saved.listed().is_none();
        (now.lazy, now.span, now.format, now.exact) == (lazy, span, format, exact) && has_room && is_held && has_lists
    };
    sequence.layers.iter().zip(saved).all(as_saved)
}
