//! What can go wrong while a model is loaded.

use std::path::PathBuf;

use crate::{ggml, gguf, vocab::VocabError};

/// What can go wrong while a model is loaded. Every message names the file, or the parameter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error("{path}: architecture \"{architecture}\" is not supported (supported: {supported})")]
    Architecture { path: PathBuf, architecture: String, supported: String },
    #[error("{path}: key {key}: {why}")]
    Key { path: PathBuf, key: String, why: String },
    /// A model of a kind that is not run, though its architecture is.
    #[error("{path}: key {key}: {why}")]
    Unsupported { path: PathBuf, key: String, why: String },
    #[error("{path}: tensor {tensor} is missing; the file is incomplete or of another architecture")]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{path}: tensor {tensor}: is not known to this architecture")]
    UnknownTensor { path: PathBuf, tensor: String },
    #[error("{path}: tensor {tensor}: {why}")]
    Tensor { path: PathBuf, tensor: String, why: String },
    #[error("{path}: vocabulary: {source}")]
    Vocab { path: PathBuf, source: VocabError },
    #[error("{path}: loading was cancelled")]
    Cancelled { path: PathBuf },
    #[error("tensor override {0}")]
    TensorOverride(String),
    #[error("{path}: {source}")]
    Ggml { path: PathBuf, source: ggml::Error },
}

impl Error {
    /// Whether the file may be as it should be, of a model that this crate does not run.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Error::Architecture { .. } | Error::Unsupported { .. } | Error::UnknownTensor { .. })
    }
}
