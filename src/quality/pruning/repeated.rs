//! Texts that a model reads and repeats.

use crate::vocab::{AddBos, Special, Token, Vocab, VocabError};

const INSTRUCTION: &str = "\n\nRepeat the text above, word for word:\n\n";

/// Tokens of a piece of text, at most and at least.
const PIECE: usize = 1024;
const LEAST_PIECE: usize = 64;

/// Rows that are not fitted: attention sinks are what they are for other reasons, and are never dropped.
pub(super) const SINK: usize = 4;

/// A text, what asks for it, and the text again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeated {
    pub(super) tokens: Vec<Token>,
    /// Tokens of the text, with the one that begins it.
    pub(super) n_text: usize,
    /// Where it begins again.
    pub(super) repeat: usize,
}

impl Repeated {
    /// Pieces of texts, each with its repetition, that fit a context of `n_ctx` tokens; of `n_pieces` the first.
    ///
    /// # Errors
    /// When a text cannot be tokenised.
    pub fn pieces(vocab: &Vocab, texts: &[&[u8]], n_ctx: usize, n_pieces: usize) -> Result<Vec<Repeated>, VocabError> {
        let instruction = vocab.tokenize_bytes(INSTRUCTION.as_bytes(), AddBos::No, Special::Text)?;
        let begin: Vec<Token> = vocab.bos().filter(|_| vocab.adds_bos()).into_iter().collect();
        let room = n_ctx.saturating_sub(instruction.len() + begin.len()) / 2;
        let mut pieces = Vec::new();
        for text in texts {
            let tokens = vocab.tokenize_bytes(text, AddBos::No, Special::Text)?;
            for piece in tokens.chunks(PIECE.min(room).max(1)).filter(|piece| piece.len() >= LEAST_PIECE) {
                let n_text = begin.len() + piece.len();
                pieces.push(Repeated {
                    tokens: [&begin, piece, &instruction, piece].concat(),
                    n_text,
                    repeat: n_text + instruction.len(),
                });
            }
        }
        pieces.truncate(n_pieces);
        Ok(pieces)
    }

    /// Tokens of the text.
    pub fn n_tokens(&self) -> usize {
        self.n_text
    }
}
