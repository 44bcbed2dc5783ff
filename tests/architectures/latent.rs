//! Attention whose keys and values differ in size, and latent attention, whose values are in the keys.

use simlayer_testkit::{Latent, RandomDecoder, Shape, gguf::Meta};

use crate::check::{check, check_scores};

/// A value of `expert_gating_func`.
const SIGMOID: u32 = 2;

/// The width of an expert.
const N_FF: usize = 48;

/// `step35` with values that are smaller, or larger, than keys.
#[test]
fn values_of_another_size() {
    let shapes = [
        Shape { head_size: 32, value_size: 24, ..Shape::default() },
        Shape { value_size: 32, n_head_kv: 3, tied: false, ..Shape::other() },
    ];
    check(shapes.map(|shape| {
        let mut m = RandomDecoder::new("step35", shape);
        m.expert_keys();
        m.key("expert_feed_forward_length", N_FF as u32);
        m.key("attention.sliding_window", 40u32);
        m.key("attention.sliding_window_pattern", Meta::array(m.layers().map(|i| i % 3 == 0)));
        m.key("expert_shared_feed_forward_length", 64u32);
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            if shape.seed == 2 {
                m.head_norms(i);
                m.attention_gate(i, shape.n_head);
            }
            m.gated(i);
        }
        m
    }));
}

/// The sizes of the models here, by their shape.
fn sizes(shape: Shape, absorbed: bool) -> Latent {
    match shape.tied {
        false => Latent { rank: 32, q_rank: 40, plain: 24, n_rot: 16, value: 20, absorbed },
        true => Latent { rank: 48, q_rank: 0, plain: 16, n_rot: 8, value: 32, absorbed },
    }
}

fn random_latent(architecture: &'static str, shape: Shape, absorbed: bool) -> RandomDecoder {
    let mut m = RandomDecoder::new(architecture, shape);
    let sizes = sizes(shape, absorbed);
    m.latent_keys(sizes);
    m.expert_keys();
    m.key("expert_feed_forward_length", N_FF as u32);
    m.key("expert_shared_count", if shape.tied { 1u32 } else { 2 });
    m.key("leading_dense_block_count", 1u32);
    if !shape.tied {
        m.key("expert_gating_func", SIGMOID);
        m.key("expert_weights_norm", true);
        m.key("expert_weights_scale", 2.5f32);
        m.key("expert_group_count", 3u32);
        m.key("expert_group_used_count", 2u32);
    }
    let mut layers: Vec<usize> = m.layers().collect();
    if !shape.tied && absorbed {
        layers.push(m.next_token_layer());
    }
    for i in layers {
        m.pre_norms(i);
        m.latent_attention(i, sizes);
        if i == 0 {
            m.gated(i);
            continue;
        }
        if shape.tied {
            m.fused_experts(i, N_FF)
        } else {
            m.experts(i, N_FF)
        }
        m.shared_expert(i, if shape.tied { N_FF } else { 2 * N_FF }, false);
        if !shape.tied {
            m.selection_bias(i);
        }
    }
    m
}

/// YaRN that stretches a short context.
fn yarn(m: &mut RandomDecoder, multiplier: Option<f32>) {
    m.key("rope.scaling.type", "yarn");
    m.key("rope.scaling.factor", 4f32);
    m.key("rope.scaling.original_context_length", 64u32);
    if let Some(multiplier) = multiplier {
        m.key("rope.scaling.yarn_log_multiplier", multiplier);
    }
}

#[test]
fn deepseek2() {
    let mut stretched = random_latent("deepseek2", Shape::default(), true);
    yarn(&mut stretched, Some(0.1));
    let mut of_v2 = random_latent("deepseek2", Shape { seed: 3, ..Shape::default() }, true);
    yarn(&mut of_v2, Some(0.0707));
    check([stretched, random_latent("deepseek2", Shape::other(), true), of_v2]);
}

/// As older files have it: keys and values of all heads are in the cache.
#[test]
fn deepseek2_with_heads_in_the_cache() {
    let mut stretched = random_latent("deepseek2", Shape::default(), false);
    yarn(&mut stretched, None);
    check([stretched, random_latent("deepseek2", Shape::other(), false)]);
}

#[test]
fn mistral4() {
    let mut stretched = random_latent("mistral4", Shape::default(), true);
    yarn(&mut stretched, Some(0.05));
    stretched.key("attention.temperature_scale", 0.3f32);
    stretched.key("attention.temperature_length", 60u32);
    check([stretched, random_latent("mistral4", Shape::other(), true)]);
}

#[test]
fn scores_of_latent_attention() {
    check_scores(&random_latent("deepseek2", Shape::default(), true));
}
