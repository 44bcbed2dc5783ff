//! Writes a model with random weights in the shape of a real one, for measuring speed where no real one is at hand.
//!
//! ```sh
//! cargo run --release -p simlayer-testkit --example random_model -- random-1b.gguf
//! ```

use std::{env, path::PathBuf, process::ExitCode};

use simlayer_testkit::{RandomModel, WeightType};

/// LLaMA-3.2-1B's shape with q8_0 weights; its vocabulary is small, so that it has 0.97 of 1.24 thousand million weights.
fn of_a_thousand_million() -> RandomModel {
    RandomModel {
        n_layer: 16,
        n_embd: 2048,
        n_head: 32,
        n_head_kv: 8,
        head_size: 64,
        n_ff: 8192,
        n_ctx_train: 131_072,
        rope_freq_base: 500_000.0,
        rope_freqs: true,
        tied: true,
        weight_type: WeightType::Q8_0,
        ..RandomModel::default()
    }
}

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [path] = arguments.as_slice() else {
        eprintln!("usage: random_model FILE");
        return ExitCode::FAILURE;
    };
    of_a_thousand_million().write(path);
    ExitCode::SUCCESS
}
