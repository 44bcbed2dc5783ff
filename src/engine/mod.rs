//! Runs a model over sequences: prefill, decode, batches, and the moment at which layers become lazy.

mod attention;
mod checkpoint;
mod fork;
mod inputs;
mod mark;
mod memory;
mod plan;
mod prefill;
mod profile;
mod second_look;
mod sequence;
mod session;
mod state;
mod ubatch;

pub use checkpoint::{Checkpoint, Restored};
pub use plan::{DevicePlan, plan};
pub use sequence::LayerReport;
pub use session::{BatchEntry, Outputs, SeqId, Session, SessionParams};
pub use state::StateError;

use crate::{ggml, lazy::ProfileError, model, vocab::Token};

/// What can go wrong while a session runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("token {token} is not in the vocabulary of {n_vocab} tokens")]
    Token { token: Token, n_vocab: usize },
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
    #[error("sequence {0} is in this batch twice")]
    SequenceTwice(SeqId),
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
