//! Why a conversation has become no prompt.

use crate::vocab::VocabError;

/// What can go wrong while a conversation is formatted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The template does not parse or run, and no built-in template fits.
    #[error("the chat template fails: {0}")]
    Template(String),
    /// The template refuses this conversation, for instance because the roles do not alternate.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template takes more steps than a conversation of this size can need.
    #[error("the chat template does not come to an end")]
    Endless,
    /// The template passes over something of this conversation, in every form in which it could be given.
    #[error("the chat template would lose {0}: leave that out, or choose another template")]
    Lost(String),
    /// There is no built-in template of this name.
    #[error("no built-in chat template is called {0}")]
    UnknownTemplate(String),
    /// The prompt could not be turned into tokens.
    #[error(transparent)]
    Vocab(#[from] VocabError),
}

/// What can go wrong with a model's tool calls, reasoning and schemas.
#[cfg(feature = "serve")]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The schema is none, or one that is too large or too deep.
    #[error("the JSON schema cannot be used: {0}")]
    Schema(String),
    /// The template does not parse, or nothing can be made of how it writes calls.
    #[error("the chat template cannot be used: {0}")]
    Template(String),
    /// The request says what no template can be given.
    #[error("the request cannot be used: {0}")]
    Request(String),
    /// The prompt was not rendered.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The answer is not written as the request's format says.
    #[error("the model's answer cannot be read: {0}")]
    Answer(String),
}
