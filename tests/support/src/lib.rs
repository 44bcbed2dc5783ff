//! What the tests need: GGUF files with random weights or deliberate faults, the reference program (unmodified
//! llama.cpp in a process of its own), and the metrics that compare the two.
//!
//! A test's helper may panic: a panic is a failed test.

#![forbid(unsafe_code)]

mod clip;
mod decoder;
pub mod gguf;
mod lora;
pub mod markdown;
pub mod metrics;
mod model;
mod quantize;
mod rng;
mod upstream;
mod vocab;
mod weights;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// An allocator that knows the most that was allocated at once.
pub use peak_alloc::PeakAlloc;

pub use clip::RandomClip;
pub use decoder::{Heads, Latent, RandomDecoder, Shape, Ssm};
pub use lora::RandomLora;
pub use model::{RandomModel, RopeScaling};
pub use quantize::{WeightType, dequantize, quantize};
pub use rng::Rng;
pub use upstream::{Given, Greedy, Logits, UpstreamRef};
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
    pre_tokenizers_by_expressions(llama_source).into_values().flatten().collect()
}

/// The same, by the list of regular expressions with which they split.
pub fn pre_tokenizers_by_expressions(llama_source: &str) -> BTreeMap<String, BTreeSet<String>> {
    let path = Path::new(llama_source).join("src/llama-vocab.cpp");
    let source = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // What stands in front of an assignment names it, and after it comes the type's name.
    let mut types: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let assigned: Vec<&str> = source.split("pre_type = LLAMA_VOCAB_PRE_TYPE_").collect();
    for pair in assigned.windows(2) {
        let named = pair[0].split("tokenizer_pre == \"").skip(1).filter_map(|rest| rest.split_once('"'));
        let end = pair[1].find(';').expect("an assignment ends");
        types.entry(&pair[1][..end]).or_default().extend(named.map(|(name, _)| name.to_owned()));
    }
    let mut lists: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let choices: Vec<&str> = source.split("regex_exprs = {").collect();
    for pair in choices.windows(2) {
        let (_, cases) = pair[0].rsplit_once("};").expect("a list stands before");
        let end = pair[1].find("};").expect("a list ends");
        let list: String = pair[1][..end].lines().map(str::trim).filter(|line| !line.starts_with("//")).collect();
        let cases = cases.split("case LLAMA_VOCAB_PRE_TYPE_").skip(1).filter_map(|rest| rest.split_once(':'));
        let names = cases.filter_map(|(case, _)| types.remove(case)).flatten();
        lists.entry(list).or_default().extend(names);
    }
    // What has no list of its own splits as the others do that have none.
    lists.entry(String::new()).or_default().extend(types.into_values().flatten());
    lists.retain(|_, names| !names.is_empty());
    let names: BTreeSet<&str> = lists.values().flatten().map(String::as_str).collect();
    assert!(names.len() > 80 && names.contains("gpt-4o") && lists.len() > 25, "{lists:?}");
    lists
}
