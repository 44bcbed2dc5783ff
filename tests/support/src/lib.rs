//! What the tests need: GGUF files with random weights or deliberate faults, the reference program (unmodified
//! llama.cpp in a process of its own), and the metrics that compare the two.
//!
//! A test's helper may panic: a panic is a failed test.

#![forbid(unsafe_code)]

mod decoder;
pub mod gguf;
pub mod metrics;
mod model;
mod quantize;
mod rng;
mod upstream;
mod vocab;
mod weights;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// An allocator that knows the most that was allocated at once.
pub use peak_alloc::PeakAlloc;

pub use decoder::{RandomDecoder, Shape};
pub use model::{RandomModel, RopeScaling};
pub use quantize::{WeightType, dequantize, quantize};
pub use rng::Rng;
pub use upstream::{Greedy, Logits, UpstreamRef};
pub use vocab::Vocabulary;

/// The workspace's root folder.
pub fn workspace_root() -> PathBuf {
    let support = Path::new(env!("CARGO_MANIFEST_DIR"));
    support.ancestors().nth(2).expect("tests/support lies two folders below the root").to_path_buf()
}

/// The real model that the tests use.
pub fn smollm2_path() -> PathBuf {
    let path = workspace_root().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing: run `cargo xtask test`, which fetches it", path.display());
    path
}

/// Every name of a pre-tokenizer that llama.cpp's vocabulary code knows, by its source.
pub fn pre_tokenizers(llama_source: &str) -> BTreeSet<String> {
    let path = Path::new(llama_source).join("src/llama-vocab.cpp");
    let source = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let names = source.split("tokenizer_pre == \"").skip(1).filter_map(|rest| rest.split_once('"'));
    let names: BTreeSet<String> = names.map(|(name, _)| name.to_owned()).collect();
    assert!(names.len() > 80 && names.contains("gpt-4o"), "{names:?}");
    names
}
