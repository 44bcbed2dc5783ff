//! What can go wrong.

use super::batch::SeqId;
use crate::{
    ggml,
    lazy::{ProfileError, PruneMapError},
    model,
    vocab::Token,
};

/// What can go wrong while a session runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("token {token} is not in the vocabulary of {n_vocab} tokens")]
    Token { token: Token, n_vocab: usize },
    #[error("embeddings do not fit: {0}")]
    Embeddings(String),
    #[error("no tokens were given")]
    Empty,
    #[error("the context is full: {needed} tokens are needed, it holds {n_ctx} (give a larger context size)")]
    ContextFull { needed: usize, n_ctx: usize },
    #[error("a K cache of type {ty} needs heads whose size is a multiple of {block}; this model's are {head_size}")]
    CacheType { ty: ggml::Type, block: usize, head_size: usize },
    #[error("a quantised V cache needs flash attention (it is off)")]
    FlashAttention,
    #[error("{0}")]
    Params(String),
    #[error("layer {layer} cannot have a window of its own: {why}")]
    Window { layer: usize, why: String },
    #[error("layer {layer} cannot be lazy: {why}")]
    LazyLayer { layer: usize, why: String },
    #[error("sequence {0} is in this batch twice")]
    SequenceTwice(SeqId),
    #[error("rows cannot be pruned: {0}")]
    Prune(String),
    #[error("rows cannot be rescued: {0}")]
    Rescue(String),
    #[error(transparent)]
    PruneMap(#[from] PruneMapError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error("interrupted")]
    Interrupted,
    #[error("sequence {0} has no tokens")]
    NoSequence(SeqId),
    #[error(transparent)]
    Ggml(ggml::Error),
}

impl From<ggml::Error> for Error {
    fn from(error: ggml::Error) -> Error {
        match error {
            ggml::Error::Aborted => Error::Interrupted,
            error => Error::Ggml(error),
        }
    }
}
