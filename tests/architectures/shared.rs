//! Architectures of which some layers read the keys and values of another one.

use simlayer::{
    BatchEntry, LayerKind, LayerReport, ModelParams, Outputs, SessionParams,
    ggml::Type,
    lazy::{LazyParams, Policy},
    plan,
};
use simlayer_testkit::{Heads, RandomDecoder, Shape, gguf::Meta, metrics::mean_kl};

use crate::{
    check::{MAX_KL, Written, check, check_scores, in_one_thread, write},
    common::{lazy_f16, logits, plain, session},
};

/// What tells Gemma 4's models from each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemma4 {
    shape: Shape,
    /// Layers without windows.
    global: &'static [usize],
    /// The last layers that read an earlier one's keys and values.
    n_shared: usize,
    /// Heads of keys and values in global layers, and the size of all their heads.
    global_kv: usize,
    global_size: usize,
    /// Whether values of global layers are made of their keys.
    from_keys: bool,
    /// Width of the layers' own embeddings.
    own: usize,
    /// Experts in all layers but the first.
    experts: bool,
}

pub(crate) fn random_gemma4(config: Gemma4) -> RandomDecoder {
    let Gemma4 { shape, global, n_shared, global_kv, global_size, from_keys, own, experts } = config;
    let mut m = RandomDecoder::new("gemma4", shape);
    let is_global = |layer: usize| global.contains(&layer);
    let kv = |layer: usize| if is_global(layer) { global_kv } else { shape.n_head_kv };
    // Layers that share are wider.
    let n_own = shape.n_layer - n_shared;
    let n_ff = |layer: usize| if layer < n_own { shape.n_ff } else { 2 * shape.n_ff };
    m.key("attention.head_count_kv", Meta::array(m.layers().map(|layer| kv(layer) as u32)));
    m.key("feed_forward_length", Meta::array(m.layers().map(|layer| n_ff(layer) as u32)));
    m.key("attention.sliding_window", 32u32);
    m.key("attention.sliding_window_pattern", Meta::array(m.layers().map(|layer| !is_global(layer))));
    m.key("embedding_length_per_layer_input", own as u32);
    for (key, size) in [("", global_size), ("_swa", shape.head_size)] {
        m.key(&format!("attention.key_length{key}"), size as u32);
        m.key(&format!("attention.value_length{key}"), size as u32);
        m.key(&format!("rope.dimension_count{key}"), size as u32);
    }
    if n_shared > 0 {
        m.key("attention.shared_kv_layers", n_shared as u32);
        m.key("rope.freq_base_swa", 5_000f32);
    } else {
        m.key("final_logit_softcapping", 8f32);
    }
    if experts {
        m.expert_keys();
        m.key("expert_feed_forward_length", 48u32);
    }
    if own > 0 {
        m.layer_embeddings(own);
    }
    m.rope_factors("rope_freqs.weight", global_size, 8.0);
    for i in m.layers() {
        m.pre_norms(i);
        m.post_norms(i);
        let size = if is_global(i) { global_size } else { shape.head_size };
        // The first layer that shares has what it does not need.
        let (keys, values) = (i <= n_own, !(from_keys && is_global(i)));
        m.unscaled_attention(i, Heads { n_head: shape.n_head, n_head_kv: kv(i), size, keys, values });
        m.gated_of(i, n_ff(i));
        if own > 0 {
            m.own_input(i, own);
            m.row(&format!("blk.{i}.layer_output_scale"), 1);
        }
        if experts && i > 0 {
            if shape.tied {
                m.fused_experts(i, 48)
            } else {
                m.experts(i, 48)
            }
            m.bare_row_around(&format!("blk.{i}.ffn_gate_inp.scale"), shape.n_embd, 2.0 * (shape.n_embd as f32).sqrt());
            m.bare_row(&format!("blk.{i}.ffn_down_exps.scale"), shape.n_expert);
            m.norm(i, "pre_ffw_norm_2");
            m.post_norm(i, "post_ffw_norm_1");
            m.post_norm(i, "post_ffw_norm_2");
        }
    }
    m
}

/// As E2B and E4B: layers that share, embeddings for each.
pub(crate) fn gemma4_small() -> Gemma4 {
    Gemma4 {
        shape: Shape { n_layer: 9, tied: true, post_norm: 3.0, ..Shape::default() },
        global: &[1, 3, 5, 7],
        n_shared: 3,
        global_kv: 2,
        global_size: 32,
        from_keys: false,
        own: 32,
        experts: false,
    }
}

#[test]
fn gemma4() {
    // As the 31B: fewer heads of keys, which are values as well, in global layers.
    let dense = Gemma4 {
        shape: Shape { n_head_kv: 6, n_layer: 6, ..Shape::other() },
        global: &[2, 5],
        n_shared: 0,
        from_keys: true,
        own: 0,
        ..gemma4_small()
    };
    // As the 26B.
    let experts = Gemma4 { shape: Shape { n_layer: 6, ..Shape::default() }, experts: true, ..dense };
    check([gemma4_small(), dense, experts].map(random_gemma4));
}

/// Hidden states of a token.
const STREAMS: usize = 4;

pub(crate) fn random_gemma3n(shape: Shape, global: Option<&[usize]>) -> RandomDecoder {
    let mut m = RandomDecoder::new("gemma3n", shape);
    m.key("attention.sliding_window", 32u32);
    if let Some(global) = global {
        m.key("attention.sliding_window_pattern", Meta::array(m.layers().map(|layer| !global.contains(&layer))));
        m.key("rope.freq_base_swa", 5_000f32);
    }
    m.altup(STREAMS);
    m.layer_embeddings(256);
    for i in m.layers() {
        m.pre_norms(i);
        m.post_norms(i);
        let Shape { n_head, n_head_kv, head_size: size, .. } = shape;
        m.unscaled_attention(i, Heads { n_head, n_head_kv, size, keys: true, values: true });
        m.gated(i);
        m.altup_layer(i, STREAMS);
        m.laurel(i, 64);
        m.own_input(i, 256);
    }
    m
}

#[test]
fn gemma3n() {
    let small = Shape { n_layer: 23, tied: true, post_norm: 0.4, ..Shape::default() };
    let other = Shape { n_layer: 22, head_size: 32, post_norm: 0.4, ..Shape::other() };
    check([random_gemma3n(small, Some(&[2, 9, 19, 21])), random_gemma3n(other, None)]);
}

#[test]
fn scores_of_all_that_read_a_store() {
    check_scores(&random_gemma4(gemma4_small()));
}

/// Layers that share have nothing, and count for nothing.
#[test]
fn stores_are_counted_once() {
    let Written { path, tokens, model, _folder, .. } = &write(&random_gemma4(gemma4_small()), 300);
    let kinds = |layers: &[LayerReport]| layers.iter().map(|layer| (layer.kind, layer.shares)).collect::<Vec<_>>();
    let (full, window) = ((LayerKind::Full, None), (LayerKind::Window, None));
    let shared = |owner| (LayerKind::Shared, Some(owner));
    let expected = vec![window, full, window, full, window, full, shared(4), shared(5), shared(4)];

    let mut without = session(model, in_one_thread(plain()));
    without.prefill(tokens).expect("prefill");
    let layers = without.layers(0);
    assert_eq!(kinds(&layers), expected);
    assert!(layers[6..].iter().all(|layer| layer.kv_bytes == 0 && layer.score.is_none()), "{layers:?}");
    // Two heads of 32 elements in the three global layers, two of 16 in 32 rows of the three with windows; f16 both.
    let expected_bytes = 3 * 2 * 2 * (300 * 2 * 32 + 32 * 2 * 16);
    assert_eq!(without.kv().f16_bytes, expected_bytes);
    assert_eq!(without.kv().active_layers, 6);
    let params = SessionParams { n_ctx: 512, ..plain() };
    let planned = plan(path, &ModelParams::default(), &params).expect("a plan");
    let caches = &planned[0].caches;
    assert_eq!(caches.iter().map(|cache| (cache.kind, cache.shares)).collect::<Vec<_>>(), expected);
    assert_eq!(caches[7].kv_bytes + caches[7].lazy_kv_bytes, 0);

    // A budget counts the three stores, and a layer that shares is not named.
    for layer_major in [true, false] {
        for policy in [Policy::Budget(0.5), Policy::Output(0.5)] {
            let mut params = in_one_thread(lazy_f16("budget:0.5", 40));
            (params.lazy.policy, params.layer_major, params.n_ubatch) = (policy.clone(), layer_major, 64);
            let mut session = session(model, params);
            session.prefill(tokens).expect("prefill");
            let layers = session.layers(0);
            let lazy = layers.iter().filter(|layer| layer.lazy).count();
            assert_eq!((lazy, session.kv().active_layers), (1, 5), "{policy}, {layer_major}: {layers:?}");
        }
    }
    let error = simlayer::Session::new(model, lazy_f16("layers:7", 40)).expect_err("refused").to_string();
    assert!(error.contains("layer 5"), "{error}");
}

/// Newest tokens in f16 beside quantised stores, rings that wrap, several sequences: however a prompt is read, layers that
/// share see what the owner of the store sees.
#[test]
fn quantised_stores_are_shared() {
    let shape = Shape { head_size: 32, ..gemma4_small().shape };
    let wide = Gemma4 { shape, global_size: 64, ..gemma4_small() };
    let Written { tokens, model, _folder, .. } = &write(&random_gemma4(wide), 320);
    let (prompt, decoded) = tokens.split_at(300);
    let exact = logits(model, &in_one_thread(plain()), prompt, decoded);
    for (layer_major, n_ubatch) in [(true, 512), (true, 64), (false, 64), (false, 7)] {
        let kl = |ty, kv_exact| {
            let mut params = in_one_thread(plain());
            (params.layer_major, params.n_ubatch) = (layer_major, n_ubatch);
            (params.type_k, params.type_v, params.kv_exact) = (ty, ty, kv_exact);
            mean_kl(&exact, &logits(model, &params, prompt, decoded))
        };
        let eight = kl(Type::Q8_0, 32);
        let four = [0, 32].map(|kv_exact| kl(Type::Q4_0, kv_exact));
        let run = format!("layer-major {layer_major}, ubatch {n_ubatch}: q8_0 {eight:.1e}, q4_0 {four:?}");
        println!("{run}");
        // A row that was seen twice or not at all would be a hundred times worse.
        assert!(eight < 3e-3, "{run}");
        assert!(four[1] < four[0], "newest tokens in f16 are of no use: {run}");
    }
}

/// A look before dropping leaves everything as it was, and what it measures is of all layers that read a store.
#[test]
fn looks_and_ways_back() {
    let Written { tokens, model, _folder, .. } = &write(&random_gemma4(gemma4_small()), 340);
    let (prompt, decoded) = tokens.split_at(320);
    for layer_major in [true, false] {
        let mut params = in_one_thread(plain());
        (params.layer_major, params.n_ubatch, params.lazy) = (layer_major, 64, LazyParams::default());
        (params.lazy.n_window, params.lazy.policy) = (40, Policy::Kl(1e-9));
        let looked = logits(model, &params, prompt, decoded);
        params.lazy.policy = Policy::Off;
        assert_eq!(looked, logits(model, &params, prompt, decoded), "a look changed something");

        params.lazy.policy = Policy::Kl(1e3);
        let mut session = session(model, params);
        session.prefill(prompt).expect("prefill");
        let lazy: Vec<usize> = session.layers(0).iter().filter(|layer| layer.lazy).map(|layer| layer.index).collect();
        assert_eq!(lazy, [1, 3, 5]);

        // The last answer taken back, and given once more.
        let mut decode = |token: &i32| session.decode(*token).expect("decode").to_vec();
        let first: Vec<Vec<f32>> = decoded.iter().map(&mut decode).collect();
        assert!(session.truncate(prompt.len()));
        let entry = |tokens| [BatchEntry { seq: 0, tokens, outputs: Outputs::Last, prompt_end: false }];
        for (token, before) in decoded.iter().zip(&first) {
            session.run(&entry(std::slice::from_ref(token))).expect("run");
            let kl = mean_kl(std::slice::from_ref(before), &[session.logits().to_vec()]);
            assert!(kl < MAX_KL, "{kl}");
        }
    }
}
