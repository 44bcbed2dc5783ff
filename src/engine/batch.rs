//! What is to be run: tokens of sequences, which of them have outputs, and how they are cut to fit.

use std::ops::Range;

use crate::vocab::Token;

/// A sequence's number. [`Session::prefill`](super::Session::prefill) and [`Session::decode`](super::Session::decode)
/// use number 0.
pub type SeqId = u32;

/// Which tokens' logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outputs {
    None,
    #[default]
    Last,
    All,
}

impl Outputs {
    /// Those of `n` tokens whose rows are wanted.
    pub(super) fn rows(self, n: usize) -> Range<usize> {
        match self {
            Outputs::None => n..n,
            Outputs::Last => n.saturating_sub(1)..n,
            Outputs::All => 0..n,
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

impl<'a> BatchEntry<'a> {
    /// Some of its tokens as an entry of their own.
    pub(super) fn piece(&self, tokens: Range<usize>) -> BatchEntry<'a> {
        let is_last = tokens.end == self.tokens.len();
        let outputs = match self.outputs {
            Outputs::Last if !is_last => Outputs::None,
            outputs => outputs,
        };
        let prompt_end = self.prompt_end && is_last;
        BatchEntry { seq: self.seq, tokens: &self.tokens[tokens], outputs, prompt_end }
    }
}

/// Rows that stand in a sequence in place of tokens: what encodes pictures or sounds for a model gives them.
#[derive(Debug, Clone, Copy)]
pub struct Embeddings<'a> {
    /// [`Hparams::n_embd_input`](crate::model::Hparams::n_embd_input) elements for each, one row after the other.
    pub rows: &'a [f32],
    /// Of a model that gives each token several positions (M-RoPE): all first ones, then all second ones, and so on. Empty
    /// where they are those that follow, in all dimensions but the last, as a text's.
    pub positions: &'a [i32],
    /// Whether each sees those behind it as well. They go into one ubatch then.
    pub see_each_other: bool,
}

/// What a ubatch's tokens are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fed<'a> {
    pub tokens: &'a [Token],
    /// What stands in place of all of them.
    pub embeddings: Option<Embeddings<'a>>,
}

impl<'a> From<&'a [Token]> for Fed<'a> {
    fn from(tokens: &'a [Token]) -> Fed<'a> {
        Fed { tokens, embeddings: None }
    }
}

/// Stands for a token that was given as a row of an embedding: there is no such one.
pub(super) const NO_TOKEN: Token = -1;

/// The tokens of one sequence in a ubatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Index of its first token in the ubatch.
    pub first: usize,
    pub n: usize,
    /// Tokens of the sequence before these.
    pub n_past: usize,
    /// Last tokens of these whose attention is scored; 0 for none.
    pub n_score: usize,
    /// After the sink, exact stores hold no position before this one.
    pub exact_from: usize,
    /// The row of recurrent layers' states that is the sequence's before these tokens.
    pub state_row: usize,
    /// What is added to a token's number in the sequence for its position, where none is given for it.
    pub shift: i32,
    /// Whether each token sees those behind it as well.
    pub see_each_other: bool,
}

impl Part {
    /// Its scored tokens as a part of their own, at the same place.
    pub fn scored(self) -> Part {
        let others = self.n - self.n_score;
        Part { first: self.first + others, n: self.n_score, n_past: self.n_past + others, n_score: 0, ..self }
    }
}

/// Sequences that go into one ubatch at most.
pub(super) const MAX_PARTS: usize = 16;

/// `n` tokens in pieces, one after the other: each has at most `n_ubatch` tokens, and the last one at least
/// `min(n, n_queries, n_ubatch)`.
pub(super) fn pieces(n: usize, n_ubatch: usize, n_queries: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = (1..n.div_ceil(n_ubatch)).map(|i| i * n_ubatch).collect();
    if let Some(end) = ends.last_mut() {
        // Taken from the piece before: moving its end keeps every size within a ubatch.
        *end = (*end).min(n - n_queries.min(n_ubatch));
    }
    ends.push(n);
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends.iter().copied()).map(|(start, end)| start..end).collect()
}

/// As [`pieces`], with one that begins at `cut`, where that is given.
pub(super) fn pieces_cut(n: usize, cut: Option<usize>, n_ubatch: usize, n_queries: usize) -> Vec<Range<usize>> {
    match cut.filter(|&cut| cut > 0) {
        None => pieces(n, n_ubatch, n_queries),
        Some(cut) => {
            let rest = pieces(n - cut, n_ubatch, n_queries).into_iter().map(|piece| cut + piece.start..cut + piece.end);
            pieces(cut, n_ubatch, 0).into_iter().chain(rest).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_cover_the_tokens(n in 1usize..3000, n_ubatch in 1usize..600, n_queries in 1usize..100) {
            let pieces = pieces(n, n_ubatch, n_queries);
            let covered: Vec<usize> = pieces.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..n).collect::<Vec<_>>());
            prop_assert!(pieces.iter().all(|piece| piece.len() <= n_ubatch));
            prop_assert!(pieces.last().unwrap().len() >= n_queries.min(n).min(n_ubatch));
        }

        /// Cut into pieces, as many rows are wanted as of the whole, and the same; a prompt ends once.
        #[test]
        fn pieces_want_what_the_whole_wants(n in 1usize..60, n_ubatch in 1usize..20, which in 0usize..3) {
            let tokens: Vec<Token> = (0..n as Token).collect();
            let outputs = [Outputs::None, Outputs::Last, Outputs::All][which];
            let whole = BatchEntry { seq: 3, tokens: &tokens, outputs, prompt_end: true };
            let pieces: Vec<BatchEntry<'_>> =
                pieces(n, n_ubatch, 4).into_iter().map(|range| whole.piece(range)).collect();
            let wanted = |entry: &BatchEntry<'_>| entry.tokens[entry.outputs.rows(entry.tokens.len())].to_vec();
            prop_assert_eq!(pieces.iter().flat_map(wanted).collect::<Vec<_>>(), wanted(&whole));
            prop_assert_eq!(pieces.iter().filter(|piece| piece.prompt_end).count(), 1);
        }
    }
}
