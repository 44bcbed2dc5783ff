//! Every architecture against unmodified llama.cpp of the same revision: logits, layers forced lazy, attention scores.
//!
//! A test function puts its architecture's random models together, one with and one without what is optional, and
//! gives them to [`check`].

mod check;
#[path = "../common/mod.rs"]
mod common;
mod dense;
mod experts;
mod given;
mod hybrid;
mod latent;
mod shared;

use std::path::Path;

use check::{MAX_KL, Written, check, check_scores, has_upstreams_logits, in_one_thread, upstream, write};
use common::{lazy_f16, load, logits, plain, session, unquantized::write_unquantized};
use simlayer::{LayerKind, Model, SessionParams, Token, ggml::Type};
use simlayer_testkit::{
    Logits, RandomDecoder, Shape, UpstreamRef, WeightType,
    gguf::Meta,
    metrics::{entropy, mean_kl, same_top},
};

#[test]
fn llama_with_experts() {
    check([Shape::default(), Shape { head_size: 32, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("llama", shape);
        m.key("rope.dimension_count", shape.head_size as u32);
        m.expert_keys();
        if shape.tied {
            m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.experts(i, shape.n_ff);
            if shape.tied {
                m.qkv_biases(i);
                m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
            }
        }
        m
    }));
}

#[test]
fn qwen2() {
    check([Shape::default(), Shape::other()].map(|shape| {
        let mut m = RandomDecoder::new("qwen2", shape);
        if shape.tied {
            m.bias("output", m.n_vocab);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.gated(i);
            if !shape.tied {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

fn random_qwen3(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("qwen3", shape);
    for i in m.layers() {
        m.pre_norms(i);
        m.head_norms(i);
        m.gated(i);
        match shape.tied {
            true => m.fused_attention(i),
            false => m.attention(i),
        }
    }
    m
}

#[test]
fn qwen3() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other()].map(random_qwen3));
}

/// The 27B models' scale is told by their number of layers.
fn random_gemma2(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("gemma2", shape);
    if shape.n_layer == 46 {
        m.key("attn_logit_softcapping", 50f32);
    } else {
        m.key("attention.sliding_window", 48u32);
        m.key("attn_logit_softcapping", 3f32);
        m.key("final_logit_softcapping", 6f32);
    }
    for i in m.layers() {
        m.pre_norms(i);
        m.post_norms(i);
        m.attention(i);
        m.gated(i);
    }
    m
}

#[test]
fn gemma2() {
    let small = Shape { tied: true, post_norm: 3.0, head_size: 32, ..Shape::default() };
    check([small, Shape { n_layer: 46, head_size: 32, ..Shape::other() }].map(random_gemma2));
}

pub(crate) fn random_gemma3(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("gemma3", shape);
    match shape.n_layer {
        // All layers global.
        5 => m.key("final_logit_softcapping", 8f32),
        // The 27B model's scale.
        62 => {
            m.key("attention.sliding_window", 24u32);
            m.key("attention.sliding_window_pattern", Meta::array((0..62).map(|i| i % 3 != 1)));
        }
        _ => {
            m.key("attention.sliding_window", 32u32);
            m.key("rope.freq_base_swa", 2_000f32);
            m.key("rope.scaling.type", "linear");
            m.key("rope.scaling.factor", 8f32);
        }
    }
    for i in m.layers() {
        m.pre_norms(i);
        m.post_norms(i);
        m.head_norms(i);
        m.attention(i);
        m.gated(i);
    }
    m
}

#[test]
fn gemma3() {
    let shapes = [
        Shape { n_layer: 14, tied: true, post_norm: 3.0, head_size: 32, ..Shape::default() },
        Shape { tied: false, ..Shape::other() },
        Shape { n_layer: 62, head_size: 32, post_norm: 0.4, ..Shape::default() },
    ];
    check(shapes.map(random_gemma3));
}

#[test]
fn phi3() {
    let fused = |n_ctx_orig: u32| {
        let shape = Shape::default();
        let mut m = RandomDecoder::new("phi3", shape);
        m.key("rope.dimension_count", shape.head_size as u32);
        m.key("rope.scaling.original_context_length", n_ctx_orig);
        m.key("rope.scaling.attn_factor", 1.2f32);
        m.key("attention.sliding_window", 32u32);
        m.rope_factors("rope_factors_short.weight", shape.head_size, 2.0);
        m.rope_factors("rope_factors_long.weight", shape.head_size, 30.0);
        for i in m.layers() {
            m.pre_norms(i);
            m.fused_attention(i);
            m.fused_gated(i);
        }
        m
    };
    let shape = Shape::other();
    let mut partial = RandomDecoder::new("phi3", shape);
    partial.key("rope.dimension_count", 12u32);
    for i in partial.layers() {
        partial.pre_norms(i);
        partial.attention(i);
        partial.fused_gated(i);
    }
    // The run's context is beyond the first's original one, and within the second's.
    check([fused(128), fused(1024), partial]);
}

pub(crate) fn random_granite(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("granite", shape);
    if shape.tied {
        m.key("logit_scale", 1.5f32);
        m.key("rope.scaling.finetuned", false);
    } else {
        m.key("logit_scale", 0.5f32);
        m.key("residual_scale", 0.6f32);
        m.key("embedding_scale", 3f32);
        m.key("attention.scale", 0.4f32);
    }
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.gated(i);
        if shape.tied {
            m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
            m.bias(&format!("blk.{i}.ffn_gate"), shape.n_ff);
            m.bias(&format!("blk.{i}.ffn_up"), shape.n_ff);
            m.bias(&format!("blk.{i}.ffn_down"), shape.n_embd);
        }
    }
    m
}

#[test]
fn granite() {
    check([Shape::default(), Shape { head_size: 32, ..Shape::other() }].map(random_granite));
}

#[test]
fn olmo2() {
    let shapes = [Shape::default(), Shape { n_layer: 8, n_head_kv: 2, tied: false, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = RandomDecoder::new("olmo2", shape);
        if shape.n_layer == 8 {
            m.key("attention.sliding_window", 48u32);
            m.key("rope.scaling.type", "yarn");
            m.key("rope.scaling.factor", 8f32);
            m.key("rope.scaling.original_context_length", 64u32);
        }
        for i in m.layers() {
            m.attention(i);
            m.qk_norms(i, [m.q_width(), m.kv_width()]);
            m.post_norms(i);
            m.gated(i);
        }
        m
    }));
}

#[test]
fn smollm3() {
    let shapes = [Shape::default(), Shape { n_layer: 9, head_size: 32, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = RandomDecoder::new("smollm3", shape);
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.gated(i);
            if shape.tied {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

#[test]
fn mistral3() {
    let scaled = |multiplier: f32, shape: Shape| {
        let mut m = RandomDecoder::new("mistral3", shape);
        m.key("rope.scaling.type", "yarn");
        m.key("rope.scaling.factor", 16f32);
        m.key("rope.scaling.original_context_length", 60u32);
        m.key("rope.scaling.yarn_beta_fast", 16f32);
        m.key("rope.scaling.yarn_beta_slow", 2f32);
        m.key("rope.scaling.yarn_log_multiplier", multiplier);
        m.key("attention.temperature_scale", 0.3f32);
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.gated(i);
        }
        m
    };
    let shape = Shape { tied: false, ..Shape::other() };
    let mut experts = RandomDecoder::new("mistral3", shape);
    experts.expert_keys();
    experts.rope_factors("rope_freqs.weight", shape.head_size, 4.0);
    for i in experts.layers() {
        experts.pre_norms(i);
        experts.attention(i);
        experts.experts(i, shape.n_ff);
    }
    check([scaled(1.0, Shape { head_size: 32, ..Shape::default() }), scaled(0.5, Shape::other()), experts]);
}

#[test]
fn glm4() {
    let shapes = [Shape { head_size: 32, ..Shape::default() }, Shape::other()];
    check(shapes.map(|shape| {
        let mut m = RandomDecoder::new("glm4", shape);
        m.key("rope.dimension_count", shape.head_size as u32 / 2);
        for i in m.layers() {
            m.pre_norms(i);
            m.post_norms(i);
            m.fused_gated(i);
            if shape.tied {
                m.fused_attention(i);
            } else {
                m.attention(i);
                m.qkv_biases(i);
            }
        }
        if shape.tied {
            // A layer that predicts a further token: in the file, but not run.
            let i = shape.n_layer;
            m.key("block_count", i as u32 + 1);
            m.key("nextn_predict_layers", 1u32);
            m.pre_norms(i);
            m.post_norms(i);
            m.fused_attention(i);
            m.fused_gated(i);
            m.matrix(&format!("blk.{i}.nextn.eh_proj"), 2 * shape.n_embd, shape.n_embd);
            m.row(&format!("blk.{i}.nextn.enorm"), shape.n_embd);
            m.row(&format!("blk.{i}.nextn.hnorm"), shape.n_embd);
        }
        m
    }));
}

#[test]
fn exaone4() {
    check([Shape::default(), Shape { n_layer: 64, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("exaone4", shape);
        m.key("attention.sliding_window", 32u32);
        if !shape.tied {
            m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
        }
        for i in m.layers() {
            m.attention(i);
            m.head_norms(i);
            m.post_norms(i);
            m.gated(i);
        }
        m
    }));
}

#[test]
fn cohere2() {
    check([Shape { tied: true, ..Shape::default() }, Shape { n_layer: 9, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("cohere2", shape);
        m.remove_key("attention.layer_norm_rms_epsilon");
        m.key("attention.layer_norm_epsilon", 1e-5f32);
        m.key("attention.sliding_window", 40u32);
        m.key("logit_scale", 0.6f32);
        m.key("rope.dimension_count", shape.head_size as u32);
        if shape.n_layer == 9 {
            m.key("attention.sliding_window_pattern", 3u32);
        }
        for i in m.layers() {
            m.norm(i, "attn_norm");
            m.attention(i);
            m.gated(i);
            if shape.n_layer == 9 {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

#[test]
fn qwen2moe() {
    check([Shape::default(), Shape { n_ff: 192, tied: false, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("qwen2moe", shape);
        m.expert_keys();
        let with_keys = shape.seed == 1;
        let (n_ff, n_shared) = if with_keys { (40, 72) } else { (shape.n_ff / shape.n_expert_used, shape.n_ff) };
        if with_keys {
            m.key("expert_feed_forward_length", n_ff as u32);
            m.key("expert_shared_feed_forward_length", n_shared as u32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.experts(i, n_ff);
            m.shared_expert(i, n_shared, true);
            if with_keys {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

fn random_qwen3moe(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("qwen3moe", shape);
    m.expert_keys();
    let n_ff = if shape.tied { shape.n_ff / shape.n_expert_used } else { 64 };
    if !shape.tied {
        m.key("expert_feed_forward_length", n_ff as u32);
    }
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.head_norms(i);
        m.experts(i, n_ff);
    }
    m
}

#[test]
fn qwen3moe() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape { n_ff: 192, ..Shape::other() }].map(random_qwen3moe));
}

/// Quantised experts, repacked for the processor where it has kernels for them. Activations are rounded to 8 bits before
/// each product, so that any other rounding tips the choice of some experts: by ggml's attention alone.
#[test]
fn quantised_experts_have_upstreams_logits() {
    for expert_type in [WeightType::Q4_0, WeightType::Q8_0, WeightType::MXFP4, WeightType::F16] {
        let random = random_qwen3moe(Shape { weight_type: WeightType::Q8_0, expert_type, ..Shape::default() });
        has_upstreams_logits(&format!("qwen3moe with {expert_type:?}"), &write(&random, 360));
    }
}

#[test]
fn granitemoe() {
    check([Shape::default(), Shape { head_size: 32, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("granitemoe", shape);
        m.expert_keys();
        m.key("logit_scale", 0.7f32);
        if !shape.tied {
            m.key("residual_scale", 0.6f32);
            m.key("embedding_scale", 3f32);
            m.key("attention.scale", 0.4f32);
            m.key("expert_shared_feed_forward_length", 48u32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.experts(i, shape.n_ff);
            if !shape.tied {
                m.shared_expert(i, 48, false);
            }
        }
        m
    }));
}

/// Quantised experts multiplied by our own kernels, which round activations to 8 bits by other scales: no further from the
/// same weights in f32 than upstream is. Every token goes through all experts, so that no rounding tips a choice.
#[test]
fn quantised_experts_are_no_further_from_unquantised_than_upstreams() {
    for expert_type in [WeightType::Q4_0, WeightType::Q8_0, WeightType::MXFP4] {
        let shape = Shape { weight_type: WeightType::Q8_0, expert_type, n_expert_used: 6, ..Shape::default() };
        assert_eq!(shape.n_expert_used, shape.n_expert);
        let written = write(&random_qwen3moe(shape), 360);
        let Written { path, tokens, .. } = &written;
        let prompts: Vec<Vec<Token>> = [1, 40, 300].map(|n| tokens[340 - n..340].to_vec()).into();
        let decoded: Vec<Vec<Token>> = prompts.iter().map(|_| tokens[340..].to_vec()).collect();
        let what = Logits { prompts: &prompts, all: false, decode: Some(&decoded) };
        let theirs = upstream().with_options(&["-fa", "on", "-ctk", "f32", "-ctv", "f32"]).logits(path, what);
        let mut params = in_one_thread(plain());
        (params.type_k, params.type_v) = (Type::F32, Type::F32);
        let logits_of = |path: &Path| -> Vec<Vec<f32>> {
            let model = load(path);
            let pairs = prompts.iter().zip(&decoded);
            pairs.flat_map(|(prompt, decoded)| logits(&model, &params, prompt, decoded)).collect()
        };
        let unquantised = path.with_extension("f32.gguf");
        write_unquantized(path, &unquantised);
        let (ours, exact) = (logits_of(path), logits_of(&unquantised));
        let [ours, theirs] = [&ours, &theirs].map(|logits| mean_kl(&exact, logits));
        let entropy = exact.iter().map(|row| entropy(row)).sum::<f64>() / exact.len() as f64;
        println!("{expert_type:?}: mean KL {ours:.2e}, upstream's {theirs:.2e}, mean entropy {entropy:.2}");
        assert!(ours < 1.2 * theirs, "{expert_type:?}: mean KL {ours}, upstream's {theirs}");
        assert!(entropy > 0.5, "{expert_type:?}: the test's model is one-sided, mean entropy {entropy}");
    }
}

fn random_gpt_oss(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("gpt-oss", shape);
    let n_ff = 64;
    m.expert_keys();
    m.key("expert_feed_forward_length", n_ff as u32);
    m.key("attention.sliding_window", 48u32);
    if shape.expert_type == WeightType::MXFP4 {
        m.key("rope.scaling.type", "yarn");
        m.key("rope.scaling.factor", 32f32);
        m.key("rope.scaling.original_context_length", 128u32);
    }
    for i in m.layers() {
        m.norm(i, "attn_norm");
        m.norm(i, "post_attention_norm");
        m.attention(i);
        m.qkv_biases(i);
        m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
        m.sinks(i);
        m.experts(i, n_ff);
        m.expert_biases(i, n_ff);
    }
    m
}

#[test]
fn gpt_oss() {
    let mxfp4 = Shape { expert_type: WeightType::MXFP4, head_size: 32, ..Shape::default() };
    check([Shape { tied: false, ..Shape::other() }, mxfp4].map(random_gpt_oss));
}

#[test]
fn gemma() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other()].map(|shape| {
        let mut m = RandomDecoder::new("gemma", Shape { tied: true, ..shape });
        for i in m.layers() {
            m.pre_norms(i);
            m.gated(i);
            match shape.tied {
                true => m.fused_attention(i),
                false => m.attention(i),
            }
        }
        m
    }));
}

#[test]
fn olmoe() {
    let shapes = [Shape { n_head_kv: 4, ..Shape::default() }, Shape { tied: false, n_ff: 64, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = RandomDecoder::new("olmoe", shape);
        m.expert_keys();
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.qk_norms(i, [m.q_width(), m.kv_width()]);
            m.experts(i, shape.n_ff);
        }
        m
    }));
}

#[test]
fn seed_oss() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other()].map(|shape| {
        let mut m = RandomDecoder::new("seed_oss", shape);
        for i in m.layers() {
            m.norm(i, "attn_norm");
            m.norm(i, "post_attention_norm");
            m.attention(i);
            m.gated(i);
            if !shape.tied {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

#[test]
fn scores_of_soft_capped_attention_are_upstreams() {
    check_scores(&random_gemma2(Shape { n_layer: 6, tied: true, post_norm: 3.0, head_size: 32, ..Shape::default() }));
}

#[test]
fn scores_of_normed_heads_are_upstreams() {
    check_scores(&random_qwen3(Shape { head_size: 32, ..Shape::default() }));
}

#[test]
fn scores_beside_layers_with_windows_are_upstreams() {
    check_scores(&random_gemma3(Shape { n_layer: 14, tied: true, post_norm: 3.0, head_size: 32, ..Shape::default() }));
}

#[test]
fn scores_with_learned_sinks_are_upstreams() {
    check_scores(&random_gpt_oss(Shape { n_layer: 6, ..Shape::default() }));
}

/// A real model, where somebody has put it (docs/architectures.md). Its windows hold 512 tokens: prompts within them give
/// upstream's logits; beyond, the order of keys in a ring rounds otherwise, which is no more than what upstream's two ways
/// to compute attention do to this model.
#[test]
fn gemma_3_270m() {
    let path = simlayer_testkit::workspace_root().join("models/gemma-3-270m-q4_k_m.gguf");
    if !path.is_file() {
        println!("SKIPPED: {} is not there", path.display());
        return;
    }
    let model = load(&path);
    assert!(model.hparams().windows.contains(&Some(512)) && model.hparams().windows.contains(&None));
    let text = common::story(&model, 1_520);
    let prompts: Vec<Vec<Token>> = [1, 40, 300, 1_500].map(|n| text[..n].to_vec()).into();
    let decoded: Vec<Vec<Token>> = prompts.iter().map(|prompt| text[prompt.len()..][..20].to_vec()).collect();
    let within = 3 * 21;
    let [with, without] = ["on", "off"].map(|fa| {
        let what = Logits { prompts: &prompts, all: false, decode: Some(&decoded) };
        UpstreamRef::new().with_options(&["-fa", fa]).logits(&path, what)
    });
    let theirs = mean_kl(&with, &without);
    let run = |fused: bool| -> Vec<Vec<f32>> {
        let mut params = plain();
        (params.fused_attention, params.n_threads) = (fused, SessionParams::default().n_threads);
        let run = |(prompt, decoded): (&Vec<Token>, &Vec<Token>)| logits(&model, &params, prompt, decoded);
        prompts.iter().zip(&decoded).flat_map(run).collect()
    };
    let (ggmls, ours) = (run(false), run(true));
    let kl = mean_kl(&with[..within], &ggmls[..within]);
    println!("Gemma 3 270M, ggml's attention within the window: mean KL {kl:.2e}");
    assert!(kl < MAX_KL, "mean KL {kl}");
    for (name, rows) in [("ggml's", &ggmls), ("our", &ours)] {
        let kl = mean_kl(&with, rows).min(mean_kl(&without, rows));
        let same = with.iter().zip(rows).filter(|(theirs, ours)| same_top(theirs, ours)).count();
        println!("{name} attention: mean KL {kl:.2e}, upstream's two {theirs:.2e}; {same} of {} tops", rows.len());
        assert!(kl <= theirs, "{name} attention: mean KL {kl}, upstream's two ways {theirs}");
    }
}

/// The file's architecture must be one that is known; the message lists those.
#[test]
fn an_unknown_architecture_lists_those_that_work() {
    let random = RandomDecoder::new("mamba", Shape::default());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    random.write(&path);
    let error = Model::load(Path::new(&path), &simlayer::ModelParams::default()).expect_err("refused").to_string();
    for name in ["mamba", "llama", "gpt-oss", "smollm3", "granitemoe"] {
        assert!(error.contains(name), "{error}");
    }
}

/// Keys that do not fit each other are refused by name.
#[test]
fn wrong_keys_are_named() {
    let refused = |change: &dyn Fn(&mut RandomDecoder), names: &[&str]| {
        let mut random = random_gpt_oss(Shape::default());
        change(&mut random);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("random.gguf");
        random.write(&path);
        let error = Model::load(&path, &simlayer::ModelParams::default()).expect_err("refused").to_string();
        for name in names {
            assert!(error.contains(name), "{error}");
        }
    };
    refused(&|m| m.key("expert_used_count", 7u32), &["gpt-oss.expert_used_count", "7 of 6"]);
    refused(&|m| m.key("expert_count", 0u32), &["gpt-oss.expert_count", "zero"]);
    refused(&|m| m.key("expert_count", 5u32), &["blk.0.ffn_gate_inp.weight", "shape"]);
    refused(&|m| m.remove_key("attention.sliding_window"), &["gpt-oss.attention.sliding_window"]);
    let pattern = Meta::array([true, false]);
    refused(&|m| m.key("attention.sliding_window_pattern", pattern.clone()), &["sliding_window_pattern", "2 entries"]);
    refused(&|m| m.key("nextn_predict_layers", 4u32), &["nextn_predict_layers", "4 of 4"]);
}

/// A layer that is sliding-window by design is told as such, and cannot be made lazy.
#[test]
fn layers_with_windows_are_reported() {
    let Written { model, tokens, _folder, .. } = &write(&random_gpt_oss(Shape::default()), 100);
    use LayerKind::{Full, Window};
    let mut session = session(model, in_one_thread(plain()));
    session.prefill(tokens).expect("prefill");
    let kinds: Vec<_> = session.layers(0).iter().map(|layer| (layer.kind, layer.window)).collect();
    assert_eq!(kinds, [(Window, Some(48)), (Full, None), (Window, Some(48)), (Full, None)]);

    let refused = simlayer::Session::new(model, in_one_thread(lazy_f16("layers:1,2", 40)));
    let error = refused.map(|_| ()).expect_err("refused").to_string();
    assert!(error.contains("layer 2") && error.contains("window 48"), "{error}");
}
