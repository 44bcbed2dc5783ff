//! Text to tokens and back.

mod utf8;

use std::{path::Path, sync::Arc};

#[doc(inline)]
pub use crate::ggml::{SpecialToken, VocabKind};
use crate::gguf::{Gguf, Override, check_vocab};
pub use utf8::Utf8Stream;

use crate::ggml::RawVocab;

/// A token's number in the vocabulary, from 0 on.
pub type Token = i32;

/// What can go wrong between text and tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabError {
    /// The file's vocabulary is missing or broken.
    #[error("it cannot be read: {0}")]
    Load(String),
    /// A text could not be turned into tokens.
    #[error("the text cannot be tokenized: {0}")]
    Tokenize(String),
    /// Tokens could not be turned into text.
    #[error("the tokens cannot be turned into text: {0}")]
    Detokenize(String),
}

/// A model's vocabulary, tokenized by llama.cpp's own code. Cheap to clone; any thread may use it.
#[derive(Debug, Clone)]
pub struct Vocab {
    raw: Arc<RawVocab>,
}

/// Whether BOS comes before a text's tokens, and EOS after them, where the model asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddBos {
    /// The text is a whole one, or the beginning of one.
    Yes,
    /// The text continues another.
    No,
}

/// What the names of special tokens ("<|im_end|>") are in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Those tokens: the text is a chat template's.
    Parse,
    /// Text like any other: it must not speak for the chat template.
    Text,
}

impl Vocab {
    /// Reads the vocabulary of a GGUF file; of a split model, its first file holds it.
    ///
    /// # Errors
    /// [`VocabError::Load`] when the file has no vocabulary or a broken one.
    pub fn load(path: &Path) -> Result<Vocab, VocabError> {
        Vocab::load_with(path, &[])
    }

    /// As [`Vocab::load`]; `overrides` take the place of the file's keys.
    ///
    /// # Errors
    /// As [`Vocab::load`].
    pub fn load_with(path: &Path, overrides: &[(String, Override)]) -> Result<Vocab, VocabError> {
        let checked = Gguf::open(path).and_then(|mut file| {
            for (key, value) in overrides {
                file.set_override(key, value.clone());
            }
            check_vocab(&file)
        });
        checked.map_err(|error| VocabError::Load(error.to_string()))?;
        Vocab::load_checked(path, overrides)
    }

    /// As [`Vocab::load`], for a file whose vocabulary keys have been checked. `overrides` take the place of its keys.
    pub(crate) fn load_checked(path: &Path, overrides: &[(String, Override)]) -> Result<Vocab, VocabError> {
        let raw = RawVocab::load(path, overrides).map_err(VocabError::Load)?;
        Ok(Vocab { raw: Arc::new(raw) })
    }

    /// llama.cpp's own vocabulary, for calls that this crate does not wrap. Valid as long as any clone of `self`.
    #[doc(hidden)]
    pub fn raw(&self) -> &Arc<RawVocab> {
        &self.raw
    }

    /// The algorithm that the vocabulary tokenizes with.
    pub fn kind(&self) -> VocabKind {
        self.raw.kind()
    }

    /// How many tokens there are. A model's logits have this length.
    pub fn n_tokens(&self) -> usize {
        self.raw.n_tokens()
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`VocabError::Tokenize`] when the model has no tokenizer or the text is longer than 2 GiB.
    pub fn tokenize(&self, text: &str, add_bos: AddBos, special: Special) -> Result<Vec<Token>, VocabError> {
        self.tokenize_bytes(text.as_bytes(), add_bos, special)
    }

    /// As [`Vocab::tokenize`], for bytes that need not be valid UTF-8.
    ///
    /// # Errors
    /// As [`Vocab::tokenize`].
    pub fn tokenize_bytes(&self, text: &[u8], add_bos: AddBos, special: Special) -> Result<Vec<Token>, VocabError> {
        let (adds, parses) = (add_bos == AddBos::Yes, special == Special::Parse);
        self.raw.tokenize(text, adds, parses).map_err(VocabError::Tokenize)
    }

    /// The bytes that a token stands for; a token may end inside a UTF-8 character, see [`Utf8Stream`]. Control tokens
    /// give nothing, or with `special` their names. A number that is no token gives nothing.
    pub fn piece(&self, token: Token, special: bool) -> Vec<u8> {
        self.raw.piece(token, special).unwrap_or_default()
    }

    /// The text of several tokens, what [`Vocab::tokenize`] made them from; bytes that are not valid UTF-8 become
    /// U+FFFD. Control tokens give nothing, or with `special` their names.
    ///
    /// # Errors
    /// [`VocabError::Detokenize`] when a number is no token.
    pub fn detokenize(&self, tokens: &[Token], special: bool) -> Result<String, VocabError> {
        let bytes = self.detokenize_bytes(tokens, special)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// As [`Vocab::detokenize`], but the bytes as they are.
    ///
    /// # Errors
    /// As [`Vocab::detokenize`].
    pub fn detokenize_bytes(&self, tokens: &[Token], special: bool) -> Result<Vec<u8>, VocabError> {
        self.raw.detokenize(tokens, false, special).map_err(VocabError::Detokenize)
    }

    /// The id of a special token; `None` where the vocabulary has no such token.
    pub fn special(&self, token: SpecialToken) -> Option<Token> {
        self.raw.special(token)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<Token> {
        self.special(SpecialToken::Bos)
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<Token> {
        self.special(SpecialToken::Eos)
    }

    /// The token that ends a turn of a conversation.
    pub fn eot(&self) -> Option<Token> {
        self.special(SpecialToken::Eot)
    }

    /// Whether a text begins with BOS, as the model asks.
    pub fn adds_bos(&self) -> bool {
        self.raw.adds_bos()
    }

    /// Whether a text ends with EOS, as the model asks.
    pub fn adds_eos(&self) -> bool {
        self.raw.adds_eos()
    }

    /// Whether the token ends a generation (EOS, EOT and their like).
    pub fn is_eog(&self, token: Token) -> bool {
        self.raw.is_eog(token)
    }

    /// Every token that ends a generation.
    pub fn eog_tokens(&self) -> Vec<Token> {
        (0..).take(self.n_tokens()).filter(|&token| self.is_eog(token)).collect()
    }

    /// Whether the token is a control token, which no text stands for.
    pub fn is_control(&self, token: Token) -> bool {
        self.raw.is_control(token)
    }

    /// The name of a token (`<s>`, `<|im_end|>`), also of a control token; a number that is no token has an empty name.
    pub fn name(&self, token: Token) -> String {
        String::from_utf8_lossy(&self.piece(token, true)).into_owned()
    }
}
