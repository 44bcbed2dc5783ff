//! One sequence of a session, as its user sees it.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    ops::RangeInclusive,
};

use super::{
    batch::{BatchEntry, Outputs, SeqId},
    checkpoint::{Checkpoint, Restored},
    error::Error,
    layer::LayerReport,
    session::Session,
    state::StateError,
};
use crate::vocab::Token;

/// One sequence of a session: [`Session::sequence`]. It need not hold tokens.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let model = simlayer::Model::load("model.gguf", &simlayer::ModelParams::default())?;
/// # let mut session = simlayer::Session::new(&model, simlayer::SessionParams::default())?;
/// session.sequence(3).prefill(&[1, 450, 7205])?;
/// session.sequence(3).copy_to(4)?;
/// session.sequence(4).decode(338)?;
/// assert_eq!((session.sequence(3).len(), session.sequence(4).len()), (3, 4));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SequenceView<'a> {
    session: &'a mut Session,
    seq: SeqId,
}

impl Session {
    /// The sequence of this number.
    pub fn sequence(&mut self, seq: SeqId) -> SequenceView<'_> {
        SequenceView { session: self, seq }
    }
}

impl SequenceView<'_> {
    pub fn id(&self) -> SeqId {
        self.seq
    }

    /// The tokens that it holds.
    pub fn tokens(&self) -> &[Token] {
        self.session.seq_tokens(self.seq)
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.session.seq_n_past(self.seq)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Each layer: its score, whether it is lazy, its bytes. Nothing of a sequence without tokens.
    pub fn report(&self) -> Vec<LayerReport> {
        self.session.layers(self.seq)
    }

    /// How far the prompt's logits moved with the layers that became lazy, a divergence in nats, where the policy goes by that
    /// ([`Policy::Kl`](crate::lazy::Policy::Kl)): what the next tokens will about lose. `None` where nothing was measured:
    /// all is within sink and window.
    pub fn foretold(&self) -> Option<f64> {
        self.session.foretold(self.seq)
    }

    /// The positions that every layer still holds, up to the last one; `None` when it has no tokens.
    ///
    /// What lazy layers hold of the sink besides is not counted: the range has no gaps.
    pub fn held(&self) -> Option<RangeInclusive<usize>> {
        self.session.seq_held(self.seq)
    }

    /// Reads a prompt (or a later part of the conversation) and returns the logits of its last token. Layers become lazy at
    /// its end.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn prefill(&mut self, tokens: &[Token]) -> Result<&[f32], Error> {
        self.run(tokens, true)
    }

    /// Appends one token and returns the logits that follow it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: Token) -> Result<&[f32], Error> {
        self.run(&[token], false)
    }

    fn run(&mut self, tokens: &[Token], prompt_end: bool) -> Result<&[f32], Error> {
        self.session.run(&[BatchEntry { seq: self.seq, tokens, outputs: Outputs::Last, prompt_end }])?;
        Ok(self.session.logits())
    }

    /// Keeps the first `n` tokens. False, with nothing changed, when a layer has dropped tokens that they need; see
    /// [`Session::truncate`].
    pub fn truncate(&mut self, n: usize) -> bool {
        self.session.seq_truncate(self.seq, n)
    }

    /// Takes all its tokens away.
    pub fn clear(&mut self) {
        self.session.seq_clear(self.seq);
    }

    /// Makes sequence `to` a copy of this one. What `to` held is gone. A copy takes memory only as the two come to differ, as long
    /// as attention is this crate's ([`SessionParams::fused_attention`](crate::SessionParams::fused_attention)); with ggml's, its
    /// first token takes a copy of all rows.
    ///
    /// # Errors
    /// When memory runs out; nothing is changed then.
    pub fn copy_to(&mut self, to: SeqId) -> Result<(), Error> {
        let n = self.len();
        self.session.seq_copy(self.seq, to, n).map(|_| ())
    }

    /// As [`SequenceView::copy_to`], but in the copy the layers `lazy` are lazy as if the policy had chosen them when the
    /// prompt ended. Layers that are lazy already stay so.
    ///
    /// # Errors
    /// When memory runs out; the sequence `to` is then empty.
    pub fn fork(&mut self, to: SeqId, lazy: &BTreeSet<usize>) -> Result<(), Error> {
        self.session.fork(self.seq, to, lazy)
    }

    /// Writes it as bytes that another session on the same model reads: its tokens, their keys and values as they are, lazy
    /// layers with what they hold, and the scores. The logits are not part of it.
    ///
    /// # Errors
    /// When `to` cannot be written.
    pub fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        self.session.save_seq(self.seq, to)
    }

    /// Reads what [`SequenceView::save`] wrote; the tokens that it held are gone then. Returns the bytes that the state took;
    /// there may be others after it.
    ///
    /// # Errors
    /// When the state is damaged, of another model or of other cache types, does not fit the context, or memory runs out.
    /// Nothing is changed then.
    pub fn load(&mut self, from: &[u8]) -> Result<usize, StateError> {
        self.session.load_seq(self.seq, from)
    }

    /// Notes where it is, to come back with [`SequenceView::restore`] after it has grown.
    pub fn checkpoint(&self) -> Checkpoint {
        self.session.checkpoint(self.seq)
    }

    /// Makes it as it was when the checkpoint was made. It must have grown from there; where it has not, or a layer has
    /// become lazy since and dropped what would be needed, the checkpoint's tokens are read anew.
    ///
    /// # Errors
    /// When the checkpoint is damaged or of another model; nothing is changed then. When reading anew fails, as
    /// [`Session::prefill`]; the sequence is then empty.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<Restored, StateError> {
        self.session.restore(self.seq, checkpoint)
    }
}
