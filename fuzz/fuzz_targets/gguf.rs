//! Whatever bytes a file holds: loading it as a model, and running what loads, never panics or aborts.
//!
//! `cargo xtask fuzz` runs it for ten minutes.
#![no_main]

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use libfuzzer_sys::fuzz_target;
use simlayer::{AddBos, Model, ModelParams, Session, SessionParams, Special};
use simlayer_testkit::{RandomModel, RopeScaling, Vocabulary, WeightType, gguf::GgufFile, gguf::Meta};

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let path = input_file();
    fs::write(path, bytes).expect("the temporary folder is writable");
    let Ok(model) = Model::load(path, &ModelParams::default()) else { return };
    let _ = run(&model);
});

fn run(model: &Model) -> Result<(), Box<dyn std::error::Error>> {
    let tokens = model.vocab().tokenize("ab c\n", AddBos::Yes, Special::Parse)?;
    for token in 0..model.vocab().n_tokens() {
        model.vocab().piece(token as i32, true);
    }
    let params = SessionParams { n_threads: 1, ..SessionParams::default() };
    let mut session = Session::new(model, params)?;
    session.prefill(&tokens)?;
    session.decode(tokens[0])?;
    Ok(())
}

/// One file for all inputs: in memory where there is such a folder, without a name, gone with the process.
fn input_file() -> &'static Path {
    static FILE: OnceLock<(File, PathBuf)> = OnceLock::new();
    let (_, path) = FILE.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let file = tempfile::tempfile_in(folder).expect("a temporary file");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        (file, path)
    });
    path
}

/// Writes small models to the folder that `cargo fuzz` reads first.
fn write_seeds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/gguf");
    fs::create_dir_all(&corpus).expect("fuzz/corpus can be made");
    let small = || RandomModel { vocabulary: Vocabulary::Few, ..RandomModel::tiny() };
    let mut byte_pairs = small().gguf();
    byte_pairs.remove("tokenizer.ggml.scores");
    byte_pairs.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "smollm");
    byte_pairs.set("tokenizer.ggml.merges", Meta::array(["a b", "ab c"]));
    let seeds: [(&str, GgufFile); 6] = [
        ("plain", small().gguf()),
        ("byte-pairs", byte_pairs),
        ("f32", RandomModel { weight_type: WeightType::F32, tied: true, ..small() }.gguf()),
        ("linear", RandomModel { rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }), ..small() }.gguf()),
        (
            "yarn",
            RandomModel {
                rope_scaling: Some(RopeScaling::Yarn { factor: 2.0, n_ctx_orig: 64 }),
                sliding_window: Some(4),
                ..small()
            }
            .gguf(),
        ),
        (
            "biases",
            RandomModel { qkv_bias: true, attn_out_bias: true, ffn_bias: true, rope_freqs: true, ..small() }.gguf(),
        ),
    ];
    for (name, file) in seeds {
        file.write(corpus.join(name));
    }
}
