//! Which architectures there are.

use std::path::Path;

use super::{
    Error,
    parts::{Builder, Decoder},
};
use crate::gguf::{self, Gguf};

/// Builds a model of one architecture, whose tensors are checked and have no memory yet.
pub(super) type Build = fn(&mut Builder<'_>) -> Result<Decoder, Error>;

/// The architectures that can be run, by the name in their files: a new one is a file of its own, named in `mod.rs`, and
/// a line here.
const ARCHITECTURES: &[(&str, Build)] = &[
    ("cohere2", super::cohere2::build),
    ("exaone4", super::exaone4::build),
    ("gemma", super::gemma::build),
    ("gemma2", super::gemma2::build),
    ("gemma3", super::gemma3::build),
    ("glm4", super::glm4::build),
    ("gpt-oss", super::gpt_oss::build),
    ("granite", super::granite::build),
    ("granitemoe", super::granitemoe::build),
    ("llama", super::llama::build),
    ("mistral3", super::mistral3::build),
    ("olmo2", super::olmo2::build),
    ("olmoe", super::olmoe::build),
    ("phi3", super::phi3::build),
    ("qwen2", super::qwen2::build),
    ("qwen2moe", super::qwen2moe::build),
    ("qwen3", super::qwen3::build),
    ("qwen3moe", super::qwen3moe::build),
    ("seed_oss", super::seed_oss::build),
    ("smollm3", super::smollm3::build),
];

/// How the architecture is built that the file at `path` names.
pub(super) fn find(name: &str, path: &Path) -> Result<Build, Error> {
    match ARCHITECTURES.iter().find(|(known, _)| *known == name) {
        Some((_, build)) => Ok(*build),
        None => Err(Error::Architecture {
            path: path.to_owned(),
            architecture: gguf::shown(name.as_bytes()),
            supported: ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// Checks that models of the file's architecture are run.
///
/// # Errors
/// When they are not ([`Error::is_unsupported`]), or the file names none.
pub fn check_architecture(file: &Gguf) -> Result<(), Error> {
    find(file.architecture()?, file.path()).map(|_| ())
}
