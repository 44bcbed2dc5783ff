//! Attention whose keys and values differ in size, and latent attention, whose values are in the keys.

use simlayer::{KvRotate, LayerKind, ModelParams, SessionParams, ggml::Type, plan};
use simlayer_testkit::{Latent, Logits, RandomDecoder, Shape, gguf::Meta, metrics::mean_kl};

use crate::{
    check::{Written, check, check_scores, in_one_thread, states_go_on, upstream, write},
    common::{ggmls_attention, logits, plain, session},
};

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

#[test]
fn mimo2() {
    let shapes = [
        (Shape { head_size: 24, value_size: 16, ..Shape::default() }, None),
        (Shape { value_size: 24, n_head_kv: 3, tied: false, ..Shape::other() }, None),
        // Layers with windows have more KV heads, as in MiMo V2 Flash.
        (Shape { head_size: 24, value_size: 16, n_head_kv: 1, ..Shape::default() }, Some(2)),
    ];
    check(shapes.map(|(shape, windowed)| {
        let mut m = RandomDecoder::new("mimo2", shape);
        let is_full = shape.seed == 2;
        let n_head_kv = |i: usize| windowed.filter(|_| i.is_multiple_of(3)).unwrap_or(shape.n_head_kv);
        m.expert_keys();
        m.key("expert_feed_forward_length", N_FF as u32);
        m.key("attention.sliding_window", 40u32);
        let mut layers: Vec<usize> = m.layers().collect();
        if is_full {
            layers.push(m.next_token_layer());
            m.key("attention.value_scale", 0.7f32);
            m.key("rope.freq_base_swa", 2_000f32);
            m.key("rope.dimension_count", 8u32);
        }
        m.key("attention.sliding_window_pattern", Meta::array(layers.iter().map(|i| i % 3 == 0)));
        if windowed.is_some() {
            m.key("attention.head_count_kv", Meta::array(layers.iter().map(|&i| n_head_kv(i) as u32)));
        }
        for i in layers {
            m.pre_norms(i);
            m.shape.n_head_kv = n_head_kv(i);
            m.attention(i);
            if is_full {
                m.sinks(i);
            }
            if is_full && i == 0 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            if is_full {
                m.selection_bias(i);
            }
        }
        m
    }));
}

#[test]
fn deepseek2_ocr() {
    check([Shape { n_head_kv: 4, ..Shape::default() }, Shape { n_layer: 4, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("deepseek2-ocr", shape);
        m.expert_keys();
        m.key("rope.freq_base", 10_000f32);
        m.key("expert_feed_forward_length", N_FF as u32);
        m.key("expert_shared_count", 2u32);
        m.key("leading_dense_block_count", if shape.tied { 2u32 } else { 0 });
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            if shape.tied && i < 2 {
                m.gated(i);
                continue;
            }
            m.experts(i, N_FF);
            m.shared_expert(i, 2 * N_FF, false);
        }
        m
    }));
}

#[test]
fn minicpm3() {
    // Logits are multiplied by 256 / width.
    let shapes = [Shape { n_embd: 256, ..Shape::default() }, Shape { n_embd: 192, tied: false, ..Shape::other() }];
    check(shapes.map(|shape| {
        let mut m = RandomDecoder::new("minicpm3", shape);
        let sizes = Latent { q_rank: 40, ..sizes(Shape { tied: shape.seed == 2, ..shape }, false) };
        m.latent_keys(sizes);
        if shape.seed == 1 {
            m.key("rope.scaling.original_context_length", 128u32);
            m.key("rope.scaling.attn_factor", 1.2f32);
            m.rope_factors("rope_factors_short.weight", sizes.n_rot, 2.0);
            m.rope_factors("rope_factors_long.weight", sizes.n_rot, 30.0);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.latent_attention(i, sizes);
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
    let mut stretched = random_latent("deepseek2", Shape { seed: 5, ..Shape::default() }, true);
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

/// A model whose rows fit blocks of all types. Of latent rows 32 elements are rotated together; llama.cpp rotates of heads' rows
/// the keys, of 64, and not the values.
fn with_blocks(absorbed: bool) -> Written {
    let sizes = Latent { rank: 64, q_rank: 0, plain: 32, n_rot: 32, value: 32, absorbed };
    let mut m = RandomDecoder::new("deepseek2", Shape::default());
    m.latent_keys(sizes);
    m.key("expert_feed_forward_length", 48u32);
    m.key("expert_shared_count", 1u32);
    m.key("expert_count", 6u32);
    m.key("expert_used_count", 2u32);
    // All layers dense: no router decides by what is rounded.
    m.key("leading_dense_block_count", 4u32);
    for i in m.layers() {
        m.pre_norms(i);
        m.latent_attention(i, sizes);
        m.gated(i);
    }
    write(&m, 360)
}

/// Elements of a token's row in a cache of [`with_blocks`].
const WIDTH: usize = 64 + 32;

#[test]
fn a_latent_cache_holds_keys_alone() {
    let Written { model, tokens, path, .. } = &with_blocks(true);
    for ty in [Type::F16, Type::Q8_0, Type::Q4_0] {
        let mut params = in_one_thread(plain());
        // The values' type does not count.
        (params.type_k, params.type_v, params.kv_exact) = (ty, Type::F32, 0);
        let mut session = session(model, params.clone());
        session.prefill(&tokens[..300]).expect("prefill");
        let row = ty.row_bytes(WIDTH);
        for layer in session.layers(0) {
            assert!((300 * row..400 * row).contains(&layer.kv_bytes), "{ty}: {} bytes", layer.kv_bytes);
        }
        assert_eq!(session.kv().f16_bytes, 4 * 300 * 2 * WIDTH, "{ty}");
        params.n_ctx = 1000;
        let planned = plan(path, &ModelParams::default(), &params).expect("a plan");
        for cache in planned.iter().flat_map(|device| &device.caches) {
            assert_eq!((cache.kind, cache.kv_bytes), (LayerKind::Full, 1000 * row), "{ty}");
        }
    }
}

/// Quantised caches, rotated and not, with each way to compute attention, against f32; and as upstream has them.
#[test]
fn quantised_latent_caches() {
    let Written { model, tokens, .. } = &with_blocks(true);
    let (prompt, decoded) = (&tokens[..300], &tokens[300..320]);
    let of = |ty: Type, change: &dyn Fn(&mut SessionParams)| {
        let mut params = in_one_thread(plain());
        (params.type_k, params.type_v) = (ty, ty);
        change(&mut params);
        logits(model, &params, prompt, decoded)
    };
    let exact = of(Type::F32, &|_| {});
    for (ty, bound) in [(Type::Q8_0, 5e-3), (Type::Q4_0, 0.5)] {
        for rotate in [KvRotate::Never, KvRotate::Quantized] {
            for (fused, n_exact) in [(true, 0), (true, 32), (false, 0)] {
                let rows = of(ty, &|params| {
                    (params.fused_attention, params.kv_exact, params.kv_rotate) = (fused, n_exact, rotate);
                    params.n_ubatch = 64;
                });
                let kl = mean_kl(&exact, &rows);
                println!("{ty}, {rotate:?}, our kernel {fused}, {n_exact} exact: mean KL {kl:.2e}");
                assert!(kl < bound, "{ty}, {rotate:?}, our kernel {fused}, {n_exact} exact: mean KL {kl}");
            }
        }
    }
}

/// Latent rows, and those of heads whose keys and values differ in size, quantised as upstream has them.
#[test]
fn quantised_caches_are_upstreams() {
    for (absorbed, ty) in [(true, Type::Q8_0), (true, Type::Q4_0), (false, Type::Q8_0), (false, Type::Q4_0)] {
        let Written { model, tokens, path, .. } = &with_blocks(absorbed);
        let (prompt, decoded) = (tokens[..300].to_vec(), tokens[300..320].to_vec());
        let mut params = in_one_thread(ggmls_attention());
        (params.type_k, params.type_v, params.kv_rotate) = (ty, ty, KvRotate::LlamaCpp);
        params.layer_major = false;
        let ours = logits(model, &params, &prompt, &decoded);
        let options = ["-fa", "on", "-ctk", ty.name(), "-ctv", ty.name()];
        let what = Logits { prompts: &[prompt], all: false, decode: Some(&[decoded]) };
        let theirs = upstream().with_options(&options).logits(path, what);
        assert!(ours == theirs, "absorbed {absorbed}, {ty}: mean KL {}", mean_kl(&theirs, &ours));
    }
}

/// Half of the layers lazy in quantised rows: near those in f32, by each kernel; saved and loaded, and taken back.
#[test]
fn quantised_lazy_latent_layers() {
    let Written { model, tokens, .. } = &with_blocks(true);
    let (prompt, decoded) = (&tokens[..300], &tokens[300..320]);
    let params = |ty: Type, fused: bool, layer_major: bool| {
        let mut params = in_one_thread(plain());
        params.lazy.policy = "layers:0,2".parse().expect("a policy");
        (params.lazy.n_window, params.n_ubatch) = (40, 64);
        (params.lazy.type_k, params.lazy.type_v) = (Some(ty), Some(ty));
        (params.fused_attention, params.layer_major) = (fused, layer_major);
        params
    };
    let exact = logits(model, &params(Type::F32, true, true), prompt, decoded);
    for (fused, layer_major) in [(true, true), (true, false), (false, true), (false, false)] {
        // ggml's kernel has no exact tokens, and rounds queries as well.
        let (ty, bound) = if fused { (Type::Q4_0, 0.1) } else { (Type::Q8_0, 0.02) };
        let params = params(ty, fused, layer_major);
        let kl = mean_kl(&exact, &logits(model, &params, prompt, decoded));
        println!("lazy in {ty}, our kernel {fused}, layer-major {layer_major}: mean KL {kl:.2e}");
        assert!(kl < bound, "lazy in {ty}, our kernel {fused}, layer-major {layer_major}: mean KL {kl}");
        states_go_on("lazy latent layers", model, &params, prompt, decoded);

        let mut session = session(model, params);
        session.prefill(prompt).expect("prefill");
        let mut answer = || -> Vec<Vec<f32>> {
            let rows = decoded.iter().map(|&token| session.decode(token).expect("decode").to_vec()).collect();
            assert!(session.truncate(300));
            rows
        };
        assert!(answer() == answer(), "an answer taken back comes again otherwise");
    }
}

/// Where all layers meet a look's bound, all are lazy; where none does, and no keys may become narrow, all is as if nobody had
/// looked.
#[test]
fn looks_at_latent_layers() {
    let Written { model, tokens, .. } = &with_blocks(true);
    let read = |policy: &str, narrow_keys: bool| {
        let mut params = in_one_thread(plain());
        (params.type_k, params.lazy.narrow_keys) = (Type::Q8_0, narrow_keys);
        (params.lazy.policy, params.lazy.n_window) = (policy.parse().expect("a policy"), 40);
        let mut session = session(model, params);
        session.prefill(&tokens[..300]).expect("prefill");
        let lazy = session.kv().lazy_layers;
        let next: Vec<Vec<f32>> =
            tokens[300..310].iter().map(|&token| session.decode(token).expect("decode").to_vec()).collect();
        (lazy, session.foretold(0), next)
    };
    let (lazy, foretold, _) = read("kl:100", false);
    assert!(lazy == 4 && foretold.is_some_and(|kl| kl > 0.0 && kl < 100.0), "{lazy} lazy, {foretold:?}");
    let (_, _, never) = read("off", false);
    for narrow_keys in [false, true] {
        let (lazy, foretold, next) = read("kl:1e-30", narrow_keys);
        assert_eq!((lazy, foretold), (0, Some(0.0)));
        assert!(next == never, "a look has left a trace, narrow keys {narrow_keys}");
    }
}
