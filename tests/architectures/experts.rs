//! Architectures whose tokens go through few of many experts.

use simlayer::{Model, ModelParams, ggml::Type};
use simlayer_testkit::{Logits, RandomDecoder, Shape, gguf::Meta, metrics::mean_kl};

use crate::{
    check::{MAX_KL, Written, check, in_one_thread, states_go_on, upstream, write},
    common::{logits, plain},
};

/// Values of `expert_gating_func`.
const SOFTMAX: u32 = 1;
const SIGMOID: u32 = 2;
const SOFTMAX_OF_USED: u32 = 3;

/// The width of an expert.
const N_FF: usize = 48;

/// A model of experts whose keys most architectures read.
fn with_keys(architecture: &'static str, shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new(architecture, shape);
    m.expert_keys();
    m.key("expert_feed_forward_length", N_FF as u32);
    m
}

#[test]
fn qwen3vlmoe() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape { n_ff: 192, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("qwen3vlmoe", shape);
        m.expert_keys();
        m.key("rope.dimension_sections", Meta::array(if shape.tied { [4, 2, 2, 0] } else { [6, 5, 5, 0] }));
        let n_ff = if shape.tied { shape.n_ff / shape.n_expert_used } else { N_FF };
        if !shape.tied {
            m.key("expert_feed_forward_length", n_ff as u32);
            m.key("n_deepstack_layers", 3u32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            m.experts(i, n_ff);
        }
        m
    }));
}

#[test]
fn glm4moe() {
    let images = Shape { tied: true, ..Shape::default() };
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other(), images].map(|shape| {
        let mut m = with_keys("glm4moe", shape);
        let is_full = shape.seed == 2;
        m.key("rope.dimension_count", shape.head_size as u32 / 2);
        m.key("expert_shared_count", if is_full { 2u32 } else { 1 });
        m.key("leading_dense_block_count", 1u32);
        if is_full {
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 2.5f32);
            m.key("expert_gating_func", SIGMOID);
        }
        if shape == images {
            m.key("rope.dimension_sections", Meta::array([2, 1, 1, 0]));
        }
        let mut layers: Vec<usize> = m.layers().collect();
        if is_full {
            layers.push(m.next_token_layer());
        }
        for i in layers {
            m.norm(i, "attn_norm");
            m.norm(i, "post_attention_norm");
            m.attention(i);
            if is_full {
                m.head_norms(i);
            } else {
                m.qkv_biases(i);
            }
            if i == 0 {
                m.gated(i);
            } else {
                m.experts(i, N_FF);
                m.selection_bias(i);
                m.shared_expert(i, N_FF * if is_full { 2 } else { 1 }, false);
            }
        }
        m
    }));
}

#[test]
fn minimax_m2() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape { tied: false, ..Shape::other() }].map(|shape| {
        let mut m = with_keys("minimax-m2", shape);
        m.key("expert_gating_func", if shape.seed == 1 { SIGMOID } else { SOFTMAX });
        m.key("rope.dimension_count", shape.head_size as u32 / 2);
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.qk_norms(i, [m.q_width(), m.kv_width()]);
            m.experts(i, shape.n_ff);
            m.selection_bias(i);
        }
        m
    }));
}

#[test]
fn ernie4_5_moe() {
    check([Shape::default(), Shape { head_size: 32, ..Shape::other() }].map(|shape| {
        let mut m = with_keys("ernie4_5-moe", shape);
        m.key("interleave_moe_layer_step", 1u32);
        if shape.tied {
            m.key("leading_dense_block_count", 2u32);
            m.key("expert_shared_feed_forward_length", 64u32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            if shape.tied && i < 2 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            if shape.tied {
                m.selection_bias(i);
                m.shared_expert(i, 64, false);
            }
        }
        m
    }));
}

/// With groups of experts and without.
#[test]
fn bailingmoe2() {
    let grouped = Shape { n_expert: 12, n_expert_used: 4, ..Shape::default() };
    check([grouped, Shape { tied: false, ..Shape::other() }].map(|shape| {
        let mut m = with_keys("bailingmoe2", shape);
        let is_grouped = shape == grouped;
        m.key("expert_shared_count", 1u32);
        m.key("expert_gating_func", if is_grouped { SIGMOID } else { SOFTMAX });
        if is_grouped {
            m.key("expert_group_count", 4u32);
            m.key("expert_group_used_count", 2u32);
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 2.5f32);
            m.key("leading_dense_block_count", 1u32);
        } else {
            m.key("expert_shared_feed_forward_length", 64u32);
            m.key("rope.dimension_count", shape.head_size as u32 / 2);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.fused_attention(i);
            m.head_norms(i);
            if is_grouped && i == 0 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            if is_grouped {
                m.selection_bias(i);
                m.shared_expert(i, N_FF, false);
            } else {
                m.shared_expert(i, 64, false);
            }
        }
        m
    }));
}

#[test]
fn dots1() {
    check([Shape { n_head_kv: 4, ..Shape::default() }, Shape { tied: false, ..Shape::other() }].map(|shape| {
        let mut m = with_keys("dots1", shape);
        let is_full = shape.seed == 2;
        m.key("expert_shared_count", 2u32);
        m.key("expert_gating_func", if is_full { SIGMOID } else { SOFTMAX_OF_USED });
        if is_full {
            m.key("leading_dense_block_count", 2u32);
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 1.7f32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            if is_full && i < 2 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            m.shared_expert(i, 2 * N_FF, false);
            if is_full {
                m.selection_bias(i);
            }
        }
        m
    }));
}

#[test]
fn hunyuan_moe() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other()].map(|shape| {
        let mut m = with_keys("hunyuan-moe", shape);
        if shape.tied {
            m.key("expert_shared_feed_forward_length", 64u32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            m.experts(i, shape.n_ff);
            m.shared_expert(i, if shape.tied { 64 } else { shape.n_ff }, false);
        }
        m
    }));
}

#[test]
fn exaone_moe() {
    let shapes =
        [Shape { seed: 3, n_layer: 8, ..Shape::default() }, Shape { tied: false, n_layer: 6, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = with_keys("exaone-moe", shape);
        let is_full = shape.seed == 2;
        m.key("attention.sliding_window", 40u32);
        m.key("expert_gating_func", SIGMOID);
        m.key("leading_dense_block_count", 1u32);
        if is_full {
            m.key("attention.sliding_window_pattern", 3u32);
            m.key("expert_shared_feed_forward_length", 64u32);
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 2.5f32);
            let i = m.next_token_layer();
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            m.gated(i);
        } else {
            // llama.cpp of this revision fails on files that have both.
            m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            if i == 0 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            m.shared_expert(i, if is_full { 64 } else { N_FF }, false);
            if is_full {
                m.selection_bias(i);
            }
        }
        m
    }));
}

#[test]
fn afmoe() {
    check([Shape { n_layer: 8, head_size: 32, ..Shape::default() }, Shape::other()].map(|shape| {
        let mut m = with_keys("afmoe", shape);
        let is_full = shape.seed == 1;
        m.key("expert_shared_count", if is_full { 1u32 } else { 0 });
        // llama.cpp of this revision fails on files without windows.
        m.key("attention.sliding_window", 40u32);
        if is_full {
            m.key("rope.freq_base_swa", 2_000f32);
            m.key("leading_dense_block_count", 2u32);
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 2.8f32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.post_norms(i);
            m.attention(i);
            m.head_norms(i);
            m.attention_gate(i, m.q_width());
            if is_full && i < 2 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            m.selection_bias(i);
            if is_full {
                m.shared_expert(i, N_FF, false);
            }
        }
        m
    }));
}

/// The window is 4096 whatever the key says: no prompt here is longer.
#[test]
fn smallthinker() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape { n_layer: 8, ..Shape::other() }].map(|shape| {
        let mut m = with_keys("smallthinker", shape);
        m.key("expert_gating_func", if shape.tied { SIGMOID } else { SOFTMAX_OF_USED });
        if shape.n_layer == 8 {
            m.key("attention.sliding_window", 40u32);
            m.key("rope.freq_base_swa", 2_000f32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.experts(i, N_FF);
        }
        m
    }));
}

#[test]
fn phimoe() {
    check([128u32, 1024].map(|n_ctx_orig| {
        let shape = if n_ctx_orig == 128 { Shape::default() } else { Shape { tied: false, ..Shape::other() } };
        let mut m = RandomDecoder::new("phimoe", shape);
        m.expert_keys();
        m.key("rope.dimension_count", shape.head_size as u32);
        m.key("rope.scaling.original_context_length", n_ctx_orig);
        m.rope_factors("rope_factors_short.weight", shape.head_size, 2.0);
        m.rope_factors("rope_factors_long.weight", shape.head_size, 30.0);
        m.bias("output_norm", shape.n_embd);
        m.bias("output", m.n_vocab);
        for i in m.layers() {
            m.pre_norms(i);
            m.norm_bias(i, "attn_norm");
            m.norm_bias(i, "ffn_norm");
            m.attention(i);
            m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
            m.experts(i, shape.n_ff);
            if shape.seed == 2 {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

/// With norms of either kind.
#[test]
fn cohere2moe() {
    let shapes =
        [Shape { seed: 4, n_layer: 8, tied: true, ..Shape::default() }, Shape { n_layer: 6, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = with_keys("cohere2moe", shape);
        let is_full = shape.seed == 2;
        m.key("rope.dimension_count", shape.head_size as u32);
        m.key("attention.sliding_window", 40u32);
        m.key("logit_scale", 0.6f32);
        m.key("leading_dense_block_count", 1u32);
        if is_full {
            m.key("attention.sliding_window_pattern", 3u32);
            m.key("expert_shared_count", 2u32);
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 1.7f32);
        } else {
            m.centred_norms();
            m.key("expert_gating_func", SOFTMAX);
        }
        let mut layers: Vec<usize> = m.layers().collect();
        if is_full {
            layers.push(m.next_token_layer());
        }
        for i in layers {
            m.norm(i, "attn_norm");
            m.attention(i);
            if i == 0 {
                m.gated(i);
            } else if is_full {
                m.fused_experts(i, N_FF);
                m.shared_expert(i, 2 * N_FF, false);
            } else {
                m.experts(i, N_FF);
            }
        }
        m
    }));
}

/// Layers with windows have other numbers of heads.
#[test]
fn step35() {
    let shapes = [Shape { head_size: 32, ..Shape::default() }, Shape { tied: false, n_head_kv: 3, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = with_keys("step35", shape);
        let is_full = shape.seed == 2;
        let has_window = |i: usize| i % 3 != 2;
        let n_head = |i: usize| if is_full && has_window(i) { 9 } else { shape.n_head };
        m.key("attention.sliding_window", 40u32);
        m.key("expert_shared_feed_forward_length", 64u32);
        let mut layers: Vec<usize> = m.layers().collect();
        if is_full {
            layers.push(m.next_token_layer());
            m.key("attention.head_count", Meta::array(layers.iter().map(|&i| n_head(i) as u32)));
            m.key("attention.key_length", shape.head_size as u32);
            m.key("attention.value_length", shape.head_size as u32);
            m.key("rope.freq_base_swa", 2_000f32);
            m.key("rope.dimension_count_swa", 12u32);
            m.key("expert_weights_norm", true);
            m.key("expert_weights_scale", 1.7f32);
            // Some layers cut nothing.
            m.key("swiglu_clamp_exp", Meta::array(layers.iter().map(|&i| if i == 3 { 0.0 } else { 0.6f32 })));
            m.key("swiglu_clamp_shexp", Meta::array(layers.iter().map(|&i| if i == 2 { 0.0 } else { 0.4f32 })));
        } else {
            m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
        }
        m.key("attention.sliding_window_pattern", Meta::array(layers.iter().map(|&i| has_window(i))));
        for i in layers {
            m.pre_norms(i);
            m.attention_of(i, n_head(i));
            if is_full {
                m.head_norms(i);
                m.attention_gate(i, n_head(i));
            }
            if i == 0 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            m.shared_expert(i, 64, false);
            if is_full {
                m.selection_bias(i);
            }
        }
        m
    }));
}

/// Every layer has experts, or every other.
fn random_llama4(shape: Shape) -> RandomDecoder {
    let mut m = with_keys("llama4", shape);
    let step = if shape.tied { 2 } else { 1 };
    m.key("interleave_moe_layer_step", step as u32);
    if shape.tied {
        m.key("rope.freq_base_swa", 2_000f32);
        m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
    }
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        if (i + 1) % step != 0 {
            m.gated(i);
            continue;
        }
        m.experts(i, N_FF);
        m.shared_expert(i, N_FF, false);
    }
    m
}

#[test]
fn llama4() {
    // Maverick, told by its experts, has no norms of queries and keys.
    let maverick = Shape { n_expert: 128, n_expert_used: 1, n_layer: 8, ..Shape::other() };
    check([Shape { head_size: 32, ..Shape::default() }, maverick].map(random_llama4));
}

/// Chunks hold 8192 tokens: a prompt that ends shortly after the first one, and tokens decoded from there.
#[test]
fn llama4_beyond_a_chunk() {
    const PROMPT: usize = 8200;
    let shape = Shape { n_head_kv: 1, n_embd: 32, n_head: 2, n_ff: 32, ..Shape::default() };
    let Written { path, tokens, model, _folder, .. } = &write(&random_llama4(shape), PROMPT + 20);
    let (prompts, decoded) = ([tokens[..PROMPT].to_vec()], [tokens[PROMPT..].to_vec()]);
    let what = Logits { prompts: &prompts, all: false, decode: Some(&decoded) };
    for (ty, fused) in [(Type::F16, false), (Type::F32, true)] {
        let options = ["-fa", if fused { "off" } else { "on" }, "-ctk", ty.name(), "-ctv", ty.name()];
        let theirs = upstream().with_options(&options).logits(path, what);
        let mut params = in_one_thread(plain());
        (params.n_ctx, params.type_k, params.type_v, params.fused_attention) = (PROMPT + 56, ty, ty, fused);
        for layer_major in [true, false] {
            params.layer_major = layer_major;
            let ours = logits(model, &params, &prompts[0], &decoded[0]);
            let kl = mean_kl(&theirs, &ours);
            println!("fused {fused}, layer-major {layer_major}: mean KL {kl:.2e}");
            assert!(kl < MAX_KL, "fused {fused}, layer-major {layer_major}: mean KL {kl}");
        }
        states_go_on("llama4", model, &params, &prompts[0], &decoded[0]);
    }
}

/// Keys of routers and of RoPE's sections that make no sense are refused by name.
#[test]
fn wrong_keys_are_named() {
    let refused = |change: &dyn Fn(&mut RandomDecoder), names: &[&str]| {
        let mut m = with_keys("glm4moe", Shape { n_expert: 8, ..Shape::default() });
        for i in m.layers() {
            m.norm(i, "attn_norm");
            m.norm(i, "post_attention_norm");
            m.attention(i);
            m.experts(i, N_FF);
        }
        change(&mut m);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("random.gguf");
        m.write(&path);
        let loaded = Model::load(&path, &ModelParams::default());
        if names.is_empty() {
            loaded.expect("fits");
            return;
        }
        let error = loaded.expect_err("refused").to_string();
        for name in names {
            assert!(error.contains(name), "{error}");
        }
    };
    refused(&|_| (), &[]);
    refused(&|m| m.key("expert_gating_func", 4u32), &["glm4moe.expert_gating_func", "4"]);
    refused(&|m| m.key("expert_group_count", 3u32), &["glm4moe.expert_group_count", "3 groups of 8"]);
    refused(&|m| m.key("expert_group_count", 8u32), &["glm4moe.expert_group_count", "8 groups of 8"]);
    refused(&|m| m.key("expert_group_count", 4u32), &["glm4moe.expert_group_used_count"]);
    let both = |m: &mut RandomDecoder| {
        m.key("expert_group_count", 4u32);
        m.key("expert_group_used_count", 4u32);
    };
    refused(&both, &["glm4moe.expert_group_used_count", "4 of 4"]);
    let sections = |sections: &'static [u32]| {
        move |m: &mut RandomDecoder| m.key("rope.dimension_sections", Meta::array(sections.iter().copied()))
    };
    refused(&sections(&[4, 4]), &["glm4moe.rope.dimension_sections", "2 numbers"]);
    refused(&sections(&[u32::MAX, 4, 1, 1]), &["glm4moe.rope.dimension_sections", "of 8 pairs"]);
    refused(&|m| m.key("leading_dense_block_count", 1u32), &["blk.0.ffn_gate.weight"]);
}
