//! Writes a model with random weights in the shape of a real one, for measuring speed where no real one is at hand.
//!
//! ```sh
//! cargo run --release -p simlayer-testkit --example random_model -- llama-3.2-1b q4_K_M random-1b.gguf
//! cargo run --release -p simlayer-testkit --example random_model -- qwen3-8b q8_0 random-8b.gguf
//! ```

use std::{env, process::ExitCode};

use simlayer_testkit::{RandomDecoder, Shape, Ssm, WeightType, gguf::Meta};

const USAGE: &str = "usage: random_model SHAPE WEIGHTS FILE
SHAPE    llama-3.2-1b, gemma-3-270m, qwen3-8b, qwen3-30b-a3b, qwen3moe (8 of 32 experts, 1.3 thousand million weights), tiny,
         qwen35 (6 delta nets, 2 layers that attend, 190 million weights)
WEIGHTS  a type (q8_0, q6_K, iq4_xs, ...), TYPE+TYPE (the second for values, the feed-forward's output and the output in
         the layers where a mixture of medium size has more bits), or q4_K_M (q4_K+q6_K) or q5_K_M (q5_K+q6_K)";

/// LLaMA-3.2-1B's shape and number of tokens: 1.24 thousand million weights.
fn llama(shape: Shape) -> RandomDecoder {
    let mut model = RandomDecoder::new(
        "llama",
        Shape {
            n_layer: 16,
            n_embd: 2048,
            n_head: 32,
            n_head_kv: 8,
            head_size: 64,
            n_ff: 8192,
            tied: true,
            n_vocab: 128_256,
            ..shape
        },
    );
    model.key("context_length", 131_072u32);
    model.key("rope.freq_base", 500_000f32);
    model.key("rope.dimension_count", 64u32);
    model.rope_factors("rope_freqs.weight", 64, 8.0);
    for layer in model.layers() {
        model.pre_norms(layer);
        model.attention(layer);
        model.gated(layer);
    }
    model
}

/// Qwen 3's kind.
fn qwen3(shape: Shape) -> RandomDecoder {
    let mut model = RandomDecoder::new("qwen3", shape);
    for layer in model.layers() {
        model.pre_norms(layer);
        model.attention(layer);
        model.head_norms(layer);
        model.gated(layer);
    }
    model
}

fn qwen3_8b(shape: Shape) -> RandomDecoder {
    let mut model = qwen3(Shape {
        n_layer: 36,
        n_embd: 4096,
        n_head: 32,
        n_head_kv: 8,
        head_size: 128,
        n_ff: 12_288,
        n_vocab: 151_936,
        ..shape
    });
    model.key("context_length", 262_144u32);
    model.key("rope.freq_base", 1_000_000f32);
    model
}

/// Gemma 3 270M's shape. Its rows of 640 are no whole blocks of 256: what is called Q4_K_M has them in q5_0 and q8_0.
fn gemma3_270m(shape: Shape) -> RandomDecoder {
    let mut model = RandomDecoder::new(
        "gemma3",
        Shape {
            n_layer: 18,
            n_embd: 640,
            n_head: 4,
            n_head_kv: 1,
            head_size: 256,
            n_ff: 2048,
            tied: true,
            n_vocab: 262_144,
            ..shape
        },
    );
    model.key("context_length", 32_768u32);
    model.key("rope.freq_base", 1_000_000f32);
    model.key("rope.freq_base_swa", 10_000f32);
    model.key("attention.sliding_window", 512u32);
    for layer in model.layers() {
        model.pre_norms(layer);
        model.post_norms(layer);
        model.head_norms(layer);
        model.attention(layer);
        model.gated(layer);
    }
    model
}

/// Four small layers, for trying what measures larger ones.
fn tiny(shape: Shape) -> RandomDecoder {
    qwen3(Shape { n_layer: 4, n_embd: 256, n_head: 8, n_head_kv: 2, head_size: 64, n_ff: 512, n_vocab: 1000, ..shape })
}

/// Qwen 3's kind with experts of 768, of which a token uses 8.
fn qwen3_experts(shape: Shape) -> RandomDecoder {
    const EXPERT_WIDTH: usize = 768;
    let mut model = RandomDecoder::new("qwen3moe", Shape { n_expert_used: 8, ..shape });
    model.expert_keys();
    model.key("expert_feed_forward_length", EXPERT_WIDTH as u32);
    for layer in model.layers() {
        model.pre_norms(layer);
        model.attention(layer);
        model.head_norms(layer);
        model.experts(layer, EXPERT_WIDTH);
    }
    model
}

/// Qwen3-30B-A3B's kind, a quarter as many experts and a third as many layers.
fn qwen3moe(shape: Shape) -> RandomDecoder {
    let mut model = qwen3_experts(Shape {
        n_layer: 16,
        n_embd: 1024,
        n_head: 16,
        n_head_kv: 4,
        head_size: 128,
        n_ff: 3072,
        n_vocab: 32_000,
        n_expert: 32,
        ..shape
    });
    model.key("context_length", 40_960u32);
    model.key("rope.freq_base", 1_000_000f32);
    model
}

/// Qwen3-30B-A3B's shape.
fn qwen3_30b_a3b(shape: Shape) -> RandomDecoder {
    let mut model = qwen3_experts(Shape {
        n_layer: 48,
        n_embd: 2048,
        n_head: 32,
        n_head_kv: 4,
        head_size: 128,
        n_ff: 6144,
        n_vocab: 151_936,
        n_expert: 128,
        ..shape
    });
    model.key("context_length", 262_144u32);
    model.key("rope.freq_base", 10_000_000f32);
    model
}

/// Qwen 3.5's kind, small: two of eight layers attend.
fn qwen35(shape: Shape) -> RandomDecoder {
    const SIZES: Ssm = Ssm { width: 4, head: 128, heads: 16, state: 128, groups: 8 };
    let mut model = RandomDecoder::new(
        "qwen35",
        Shape {
            n_layer: 8,
            n_embd: 1024,
            n_head: 8,
            n_head_kv: 2,
            head_size: 128,
            n_ff: 3072,
            n_vocab: 32_000,
            ..shape
        },
    );
    model.key("context_length", 131_072u32);
    model.key("rope.freq_base", 10_000_000f32);
    model.key("rope.dimension_count", 64u32);
    model.key("rope.dimension_sections", Meta::array([11i32, 11, 10, 0]));
    model.ssm_keys(SIZES);
    for layer in model.layers() {
        model.norm(layer, "attn_norm");
        model.norm(layer, "post_attention_norm");
        model.gated(layer);
        if layer % 4 == 3 {
            model.gated_attention(layer);
        } else {
            model.delta_net(layer, SIZES, false);
            model.delta_rates(layer, SIZES, false);
        }
    }
    model
}

/// The types of a mixture: of most matrices, and of those that have more bits.
fn types(weights: &str) -> Option<(WeightType, Option<WeightType>)> {
    let weights = match weights.to_lowercase().as_str() {
        "q4_k_m" => "q4_K+q6_K".to_owned(),
        "q5_k_m" => "q5_K+q6_K".to_owned(),
        _ => weights.to_owned(),
    };
    let known = |name: &str| WeightType::ALL.into_iter().find(|ty| ty.name().eq_ignore_ascii_case(name));
    match weights.split_once('+') {
        None => Some((known(&weights)?, None)),
        Some((most, larger)) => Some((known(most)?, Some(known(larger)?))),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [shape, weights, path] = arguments.as_slice() else {
        eprintln!("{USAGE}");
        return ExitCode::FAILURE;
    };
    let write = match shape.as_str() {
        "llama-3.2-1b" => llama,
        "gemma-3-270m" => gemma3_270m,
        "qwen3-8b" => qwen3_8b,
        "qwen3moe" => qwen3moe,
        "qwen3-30b-a3b" => qwen3_30b_a3b,
        "tiny" => tiny,
        "qwen35" => qwen35,
        _ => {
            eprintln!("{shape} is no shape\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    let Some((weight_type, larger_type)) = types(weights) else {
        eprintln!("{weights} are no types of weights\n{USAGE}");
        return ExitCode::FAILURE;
    };
    write(Shape { weight_type, larger_type, expert_type: weight_type, ..Shape::default() }).write(path);
    ExitCode::SUCCESS
}
