//! What a calibration reads: prompts of text and made-up notes, the text's next tokens, and questions about the notes.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::items;
use crate::vocab::{AddBos, Special, Token, Vocab, VocabError};

/// Texts for those who bring none: a story with a table, rules, code, dialogue and questions, and a program's handbook.
/// The parts of each refer to each other.
pub const BUILT_IN_TEXTS: [&str; 2] = [include_str!("calibration.txt"), include_str!("handbook.txt")];

/// A prompt, and what is scored after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Excerpt {
    pub prompt: Vec<Token>,
    /// The text's next tokens, then questions about the prompt's notes, with their answers.
    pub rest: Vec<Token>,
    /// Tokens of `rest` that are the text's: the divergence after each of them counts.
    pub n_text: usize,
    /// Where the answers are in `rest`: the likelihood of each of their tokens counts.
    pub answers: Vec<Range<usize>>,
}

/// What a calibration is made on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Excerpts {
    pub excerpts: Vec<Excerpt>,
    /// Tokens of each prompt.
    pub n_prompt: usize,
}

/// Why a text gives no excerpts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExcerptsError {
    #[error("the text has {tokens} tokens, too few for {wanted}")]
    Short { tokens: usize, wanted: String },
    #[error(transparent)]
    Vocab(#[from] VocabError),
}

/// How much of a text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Tokens of a prompt.
    pub n_prompt: usize,
    /// The text's next tokens, which are scored.
    pub n_score: usize,
    /// Excerpts of each text.
    pub n_excerpts: usize,
    /// Questions about notes in each prompt. Without any there are no notes: all of the prompt is the text's.
    pub n_questions: usize,
}

impl Extent {
    /// The text's tokens in a prompt, at most.
    fn n_text(&self) -> usize {
        if self.n_questions == 0 { self.n_prompt } else { self.n_prompt / 2 }
    }
}

impl Excerpts {
    /// Makes prompts out of texts: the beginning of an excerpt, notes, its rest; or the excerpt alone. A text without notes
    /// must be long enough, with notes these fill what it leaves. The same texts give the same excerpts.
    ///
    /// # Errors
    /// [`ExcerptsError`] when a text is too short, or cannot be tokenised.
    pub fn compose(vocab: &Vocab, texts: &[&[u8]], extent: Extent) -> Result<Excerpts, ExcerptsError> {
        let Extent { n_prompt, n_score, n_excerpts, n_questions } = extent;
        let mut excerpts = Vec::new();
        for text in texts {
            let tokens = vocab.tokenize_bytes(text, AddBos::Yes, Special::Text)?;
            let size = (tokens.len() / n_excerpts.max(1)).min(extent.n_text() + n_score);
            let least = if n_questions == 0 { n_prompt + n_score } else { n_score + 1 };
            if n_prompt == 0 || n_score == 0 || size < least {
                let wanted = format!("{n_excerpts} excerpts of {n_prompt} and {n_score}");
                return Err(ExcerptsError::Short { tokens: tokens.len(), wanted });
            }
            for excerpt in tokens.chunks_exact(size).take(n_excerpts) {
                let (read, scored) = excerpt.split_at(size - n_score);
                let length = n_prompt - read.len();
                let notes = items::notes(vocab, excerpts.len() as u64, length, n_questions)?;
                let (head, tail) = read.split_at(read.len() / 2);
                excerpts.push(Excerpt {
                    prompt: [head, &notes.tokens, tail].concat(),
                    rest: [scored, &notes.questions].concat(),
                    n_text: n_score,
                    answers: notes.answers.into_iter().map(|at| at.start + n_score..at.end + n_score).collect(),
                });
            }
        }
        Ok(Excerpts { excerpts, n_prompt })
    }

    /// SHA-256 of all tokens, in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for Excerpt { prompt, rest, .. } in &self.excerpts {
            prompt.iter().chain(rest).for_each(|token| hash.update(token.to_le_bytes()));
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Tokens of all answers.
    pub fn n_answer(&self) -> usize {
        self.excerpts.iter().flat_map(|excerpt| &excerpt.answers).map(Range::len).sum()
    }
}
