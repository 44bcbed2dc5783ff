//! What a calibration reads: excerpts of a text, and a text for those who bring none.

use crate::vocab::Token;

/// A text for those who bring none: a story, a table, rules, code, dialogue and questions, which refer to each other.
pub const BUILT_IN_TEXT: &str = include_str!("calibration.txt");

/// What a calibration is made on.
#[derive(Debug, Clone)]
pub struct Excerpts<'a> {
    /// The text, of which the profile keeps a hash.
    pub text: &'a [u8],
    pub excerpts: Vec<Vec<Token>>,
    /// First tokens of each excerpt, which are read as a prompt. The rest is scored.
    pub n_prompt: usize,
}
