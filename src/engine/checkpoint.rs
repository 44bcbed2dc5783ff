//! Checkpoints: what a sequence needs besides its active layers' rows to go on from here once more.

use std::io::{self, Write};

use super::{
    mark::BACK,
    sequence::Sequence,
    session::{BatchEntry, Outputs, SeqId, Session},
    state::{Kind, LayerHeader, LayerRows, StateError, mismatch},
};

/// A place in a sequence that one can come back to: [`Session::checkpoint`].
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

impl Session {
    /// Notes where a sequence is, to come back with [`Session::restore`] after it has grown: the lazy layers' windows and
    /// sinks, and the newest tokens' rows in f16. Active layers keep their rows; they are not part of it.
    pub fn checkpoint(&self, seq: SeqId) -> Checkpoint {
        let mut bytes = Vec::with_capacity(self.seq_checkpoint_bytes(seq));
        // A vector takes everything.
        let _ = self.save_checkpoint(seq, &mut bytes);
        Checkpoint(bytes)
    }

    /// As [`Session::checkpoint`], written somewhere.
    ///
    /// # Errors
    /// When `to` cannot be written.
    pub fn save_checkpoint(&self, seq: SeqId, to: &mut dyn Write) -> io::Result<()> {
        self.save_state(seq, Kind::Partial, to)
    }

    /// Bytes of a checkpoint of the sequence as it is.
    pub fn seq_checkpoint_bytes(&self, seq: SeqId) -> usize {
        self.state_bytes(seq, Kind::Partial)
    }

    /// Makes a sequence as it was when the checkpoint was made. It must have grown from there; where it has not, or a layer
    /// has become lazy since and dropped what would be needed, the checkpoint's tokens are read anew.
    ///
    /// # Errors
    /// When the checkpoint is damaged or of another model; nothing is changed then. When reading anew fails, as
    /// [`Session::prefill`]; the sequence is then empty.
    pub fn restore(&mut self, seq: SeqId, checkpoint: &Checkpoint) -> Result<Restored, StateError> {
        self.restore_checkpoint(seq, &checkpoint.0)
    }

    /// As [`Session::restore`], from the checkpoint at the beginning of `from`.
    ///
    /// # Errors
    /// As [`Session::restore`].
    pub fn restore_checkpoint(&mut self, seq: SeqId, from: &[u8]) -> Result<Restored, StateError> {
        let mut state = self.open_state(from)?;
        if state.kind == Kind::Whole {
            return Err(mismatch("it is a whole state and no checkpoint"));
        }
        let restored = |n_read| Restored { n_past: state.n_past, n_read, n_bytes: state.length };
        let (exact, again) = (restored(0), restored(state.n_past));
        if state.n_past == 0 {
            self.seq_clear(seq);
            return Ok(exact);
        }
        let layers = state.layers(self)?;
        let grown = self.sequences.get_mut(&seq).filter(|sequence| sequence.tokens.starts_with(&state.tokens));
        if let Some(sequence) = grown {
            if sequence.fits(&layers, state.n_past) {
                // Without slack the rows come to lie where the mark's newest are.
                let slack = sequence.layers.iter().filter_map(|layer| layer.span()).map(|span| span.n_slack).min();
                sequence.mark.take_if(|mark| !mark.has_rings() && slack.is_some_and(|n_slack| n_slack < 2 * BACK));
                for (layer, saved) in sequence.layers.iter_mut().zip(&layers) {
                    layer.put_ring_rows(state.n_past, saved.header.held_from, saved.rows);
                    layer.put_exact_rows(saved.exact);
                }
                state.settle(sequence);
                return Ok(exact);
            }
            if sequence.truncate(state.n_past) {
                return Ok(exact);
            }
        }
        self.seq_clear(seq);
        self.run(&[BatchEntry { seq, tokens: &state.tokens, outputs: Outputs::None, prompt_end: false }])
            .inspect_err(|_| self.seq_clear(seq))?;
        Ok(again)
    }
}

impl Sequence {
    /// Whether the layers still are as they were when a checkpoint of `n` tokens was made: its rows have a place.
    fn fits(&self, saved: &[LayerRows<'_>], n: usize) -> bool {
        let as_saved = |(layer, saved): (&super::sequence::LayerCache, &LayerRows<'_>)| {
            let now = LayerHeader::of(layer, n, Kind::Partial);
            let LayerHeader { lazy, span, format, exact, .. } = saved.header;
            (now.lazy, now.span, now.format, now.exact) == (lazy, span, format, exact) && layer.store().is_some()
        };
        self.layers.iter().zip(saved).all(as_saved)
    }
}
