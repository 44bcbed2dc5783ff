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
    ("afmoe", super::afmoe::build),
    ("apertus", super::apertus::build),
    ("arcee", super::arcee::build),
    ("bailingmoe2", super::bailingmoe2::build),
    ("cohere2", super::cohere2::build),
    ("cohere2moe", super::cohere2moe::build),
    ("command-r", super::command_r::build),
    ("deepseek2", super::deepseek2::build),
    ("deepseek2-ocr", super::deepseek2ocr::build),
    ("dots1", super::dots1::build),
    ("ernie4_5", super::ernie4_5::build),
    ("ernie4_5-moe", super::ernie4_5_moe::build),
    ("exaone-moe", super::exaone_moe::build),
    ("exaone4", super::exaone4::build),
    ("falcon-h1", super::falcon_h1::build),
    ("gemma", super::gemma::build),
    ("gemma2", super::gemma2::build),
    ("gemma3", super::gemma3::build),
    ("gemma3n", super::gemma3n::build),
    ("gemma4", super::gemma4::build),
    ("glm4", super::glm4::build),
    ("glm4moe", super::glm4moe::build),
    ("gpt-oss", super::gpt_oss::build),
    ("granite", super::granite::build),
    ("granitehybrid", super::granitehybrid::build),
    ("granitemoe", super::granitemoe::build),
    ("hunyuan-dense", super::hunyuan_dense::build),
    ("hunyuan-moe", super::hunyuan_moe::build),
    ("internlm2", super::internlm2::build),
    ("lfm2", super::lfm2::build),
    ("lfm2moe", super::lfm2moe::build),
    ("llama", super::llama::build),
    ("llama4", super::llama4::build),
    ("mimo2", super::mimo2::build),
    ("minicpm", super::minicpm::build),
    ("minicpm3", super::minicpm3::build),
    ("minimax-m2", super::minimax_m2::build),
    ("mistral3", super::mistral3::build),
    ("mistral4", super::deepseek2::build),
    ("nemotron", super::nemotron::build),
    ("nemotron_h", super::nemotron_h::build),
    ("nemotron_h_moe", super::nemotron_h::build),
    ("olmo", super::olmo::build),
    ("olmo2", super::olmo2::build),
    ("olmoe", super::olmoe::build),
    ("phi3", super::phi3::build),
    ("phimoe", super::phimoe::build),
    ("qwen2", super::qwen2::build),
    ("qwen2moe", super::qwen2moe::build),
    ("qwen2vl", super::qwen2vl::build),
    ("qwen3", super::qwen3::build),
    ("qwen35", super::qwen35::build),
    ("qwen35moe", super::qwen35moe::build),
    ("qwen3moe", super::qwen3moe::build),
    ("qwen3next", super::qwen3next::build),
    ("qwen3vl", super::qwen3vl::build),
    ("qwen3vlmoe", super::qwen3vlmoe::build),
    ("seed_oss", super::seed_oss::build),
    ("smallthinker", super::smallthinker::build),
    ("smollm3", super::smollm3::build),
    ("stablelm", super::stablelm::build),
    ("starcoder2", super::starcoder2::build),
    ("step35", super::step35::build),
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
