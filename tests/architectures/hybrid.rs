//! Models in which only some layers attend: recurrent states besides, which a sequence carries from token to token.

use simlayer::{BatchEntry, Error, LayerKind, Model, ModelParams, Outputs, Session, SessionParams, Token};
use simlayer_testkit::{Logits, RandomDecoder, Shape, Ssm, gguf::Meta, metrics::mean_kl};

use crate::{
    check::{
        MAX_KL, Written, has_upstreams_logits, in_one_thread, restricted_layers_are_upstreams,
        sequences_and_states_go_on, upstream, write,
    },
    common::{ggmls_attention, plain, session},
};

/// LFM2: a short convolution in two of three layers.
fn random_lfm2(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("lfm2", shape);
    let attends = |layer: usize| layer % 3 == 2;
    let kv_heads = Meta::array(m.layers().map(|i| if attends(i) { shape.n_head_kv as u32 } else { 0 }));
    m.key("attention.head_count_kv", kv_heads);
    m.key("shortconv.l_cache", if shape.tied { 4u32 } else { 3 });
    for i in m.layers() {
        m.pre_norms(i);
        m.gated(i);
        if attends(i) {
            m.attention(i);
            m.head_norms(i);
        } else {
            m.short_conv(i, if shape.tied { 4 } else { 3 });
        }
    }
    m
}

#[test]
fn lfm2() {
    check([Shape { n_layer: 6, ..Shape::default() }, Shape { n_layer: 7, ..Shape::other() }].map(random_lfm2));
}

fn delta_net(shape: Shape) -> Ssm {
    match shape.tied {
        false => Ssm { width: 4, head: 16, heads: 4, state: 16, groups: 2 },
        true => Ssm { width: 3, head: 32, heads: 3, state: 32, groups: 3 },
    }
}

/// Qwen 3.5: every `interval`-th layer attends, or those that a list leaves; a further token's layer behind the others.
fn random_qwen35(shape: Shape, architecture: &'static str, joint: bool) -> RandomDecoder {
    let mut m = RandomDecoder::new(architecture, shape);
    let ssm = delta_net(shape);
    m.ssm_keys(ssm);
    m.key("rope.dimension_count", 8u32);
    if architecture != "qwen3next" {
        let sections = if shape.tied { [2i32, 1, 1, 0] } else { [2, 2, 1, 0] };
        m.key("rope.dimension_sections", Meta::array(sections));
    }
    let attends: Vec<bool> = m.layers().map(|i| if shape.tied { [1, 2, 5].contains(&i) } else { i % 2 == 1 }).collect();
    if shape.tied {
        m.key("attention.recurrent_layers", Meta::array(attends.iter().map(|attends| !attends)));
    } else {
        m.key("full_attention_interval", 2u32);
    }
    let has_experts = architecture != "qwen35";
    if has_experts {
        m.expert_keys();
        m.key("expert_feed_forward_length", 48u32);
        m.key("expert_shared_feed_forward_length", 32u32);
    }
    let add = |m: &mut RandomDecoder, i: usize, attends: bool| {
        m.norm(i, "attn_norm");
        m.norm(i, "post_attention_norm");
        if has_experts {
            m.experts(i, 48);
            m.shared_expert(i, 32, true);
        } else {
            m.gated(i);
        }
        if attends {
            m.gated_attention(i);
        } else {
            m.delta_net(i, ssm, joint && shape.tied);
            m.delta_rates(i, ssm, joint);
        }
    };
    for (i, &attends) in attends.iter().enumerate() {
        add(&mut m, i, attends);
    }
    if !shape.tied {
        let next = m.next_token_layer();
        add(&mut m, next, true);
    }
    m
}

fn qwen35_shapes() -> [Shape; 2] {
    [Shape { n_layer: 6, ..Shape::default() }, Shape { n_layer: 6, ..Shape::other() }]
}

#[test]
fn qwen35() {
    check(qwen35_shapes().map(|shape| random_qwen35(shape, "qwen35", false)));
}

#[test]
fn qwen35moe() {
    check(qwen35_shapes().map(|shape| random_qwen35(shape, "qwen35moe", false)));
}

#[test]
fn qwen3next() {
    check(qwen35_shapes().map(|shape| random_qwen35(shape, "qwen3next", true)));
}

fn mamba2(shape: Shape) -> Ssm {
    match shape.tied {
        false => Ssm { width: 4, head: 32, heads: 4, state: 16, groups: 2 },
        true => Ssm { width: 4, head: 16, heads: 12, state: 32, groups: 1 },
    }
}

/// Granite 4 H: Mamba-2 in most layers; experts and positions in one of the models.
fn random_granitehybrid(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("granitehybrid", shape);
    let attends = |layer: usize| layer % 3 == 1;
    let kv_heads = Meta::array(m.layers().map(|i| if attends(i) { shape.n_head_kv as u32 } else { 0 }));
    m.key("attention.head_count_kv", kv_heads);
    m.ssm_keys(mamba2(shape));
    m.key("logit_scale", 2f32);
    if shape.tied {
        m.key("embedding_scale", 3f32);
        m.key("residual_scale", 0.7f32);
        m.key("attention.scale", 0.3f32);
        m.key("rope.scaling.finetuned", false);
    } else {
        m.expert_keys();
        m.key("expert_shared_feed_forward_length", 48u32);
    }
    for i in m.layers() {
        m.pre_norms(i);
        if attends(i) {
            m.attention(i);
        } else {
            m.mamba2(i, mamba2(shape), true);
        }
        if shape.tied {
            m.gated(i);
        } else {
            m.experts(i, shape.n_ff);
            m.shared_expert(i, 48, false);
        }
    }
    m
}

#[test]
fn granitehybrid() {
    check([Shape { n_layer: 6, ..Shape::default() }, Shape { n_layer: 5, ..Shape::other() }].map(random_granitehybrid));
}

/// Falcon H1: attention and Mamba-2 in every layer.
fn random_falcon_h1(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("falcon-h1", shape);
    m.ssm_keys(mamba2(shape));
    for i in m.layers() {
        m.norm(i, "attn_norm");
        m.bare_row(&format!("blk.{i}.ffn_norm"), shape.n_embd);
        m.attention(i);
        m.mamba2(i, mamba2(shape), shape.tied);
        m.gated(i);
    }
    m
}

#[test]
fn falcon_h1() {
    check([Shape::default(), Shape { n_layer: 3, ..Shape::other() }].map(random_falcon_h1));
}

/// LFM2 with experts behind the first layer.
fn random_lfm2moe(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("lfm2moe", shape);
    let attends = |layer: usize| layer % 3 == 1;
    let kv_heads = Meta::array(m.layers().map(|i| if attends(i) { shape.n_head_kv as u32 } else { 0 }));
    m.key("attention.head_count_kv", kv_heads);
    m.key("shortconv.l_cache", 3u32);
    m.expert_keys();
    m.key("expert_feed_forward_length", 48u32);
    m.key("expert_gating_func", if shape.tied { 1u32 } else { 2 });
    let n_dense = if shape.tied { 0 } else { 1 };
    m.key("leading_dense_block_count", n_dense as u32);
    for i in m.layers() {
        m.pre_norms(i);
        if i < n_dense {
            m.gated(i);
        } else {
            m.experts(i, 48);
            m.selection_bias(i);
        }
        if attends(i) {
            m.attention(i);
            m.head_norms(i);
        } else {
            m.short_conv(i, 3);
        }
    }
    m
}

#[test]
fn lfm2moe() {
    check([Shape { n_layer: 6, ..Shape::default() }, Shape { n_layer: 5, ..Shape::other() }].map(random_lfm2moe));
}

/// Nemotron H: Mamba-2, a feed-forward, attention, a feed-forward, and so on; with experts in a narrower space in one of the
/// models with experts, and a further token's layer behind the others.
fn random_nemotron_h(shape: Shape, architecture: &'static str) -> RandomDecoder {
    let mut m = RandomDecoder::new(architecture, shape);
    let has_experts = architecture == "nemotron_h_moe";
    let (attends, feeds) = (|layer: usize| layer % 4 == 2, |layer: usize| layer % 2 == 1);
    let of_layers = |is: &dyn Fn(usize) -> bool, n: usize| {
        (0..shape.n_layer).map(|i| if is(i) { n as u32 } else { 0 }).collect::<Vec<_>>()
    };
    let mut kv_heads = of_layers(&attends, shape.n_head_kv);
    let mut n_ff = of_layers(&feeds, shape.n_ff);
    m.ssm_keys(mamba2(shape));
    m.key("attention.layer_norm_epsilon", 1e-5f32);
    if has_experts {
        m.expert_keys();
        m.key("expert_feed_forward_length", 48u32);
        m.key("expert_shared_feed_forward_length", 32u32);
        m.key("expert_shared_count", 1u32);
        m.key("expert_weights_norm", !shape.tied);
        m.key("expert_weights_scale", if shape.tied { 1f32 } else { 1.7 });
        if shape.tied {
            m.key("moe_latent_size", 64u32);
        }
    }
    for i in m.layers() {
        m.norm(i, "attn_norm");
        if feeds(i) && has_experts {
            let n_in = if shape.tied { 64 } else { shape.n_embd };
            m.plain_experts(i, n_in, 48);
            m.selection_bias(i);
            m.plain_named(i, "_shexp", 32);
            if shape.tied {
                m.matrix(&format!("blk.{i}.ffn_latent_down"), shape.n_embd, n_in);
                m.matrix(&format!("blk.{i}.ffn_latent_up"), n_in, shape.n_embd);
            }
        } else if feeds(i) {
            m.plain(i);
        } else if attends(i) {
            m.attention(i);
        } else {
            m.mamba2(i, mamba2(shape), true);
        }
    }
    if has_experts && !shape.tied {
        let i = m.next_token_layer();
        m.row(&format!("blk.{i}.nextn.shared_head_norm"), shape.n_embd);
        m.norm(i, "attn_norm");
        m.norm(i, "post_attention_norm");
        m.attention(i);
        m.plain_experts(i, shape.n_embd, 48);
        m.selection_bias(i);
        m.plain_named(i, "_shexp", 32);
        kv_heads.push(shape.n_head_kv as u32);
        n_ff.push(0);
    }
    m.key("attention.head_count_kv", Meta::array(kv_heads));
    m.key("feed_forward_length", Meta::array(n_ff));
    m
}

fn nemotron_h_shapes() -> [Shape; 2] {
    [Shape { n_layer: 8, ..Shape::default() }, Shape { n_layer: 7, ..Shape::other() }]
}

#[test]
fn nemotron_h() {
    check(nemotron_h_shapes().map(|shape| random_nemotron_h(shape, "nemotron_h")));
}

#[test]
fn nemotron_h_moe() {
    check(nemotron_h_shapes().map(|shape| random_nemotron_h(shape, "nemotron_h_moe")));
}

/// What every architecture must do, and what recurrent layers have to besides.
fn check(models: impl IntoIterator<Item = RandomDecoder>) {
    for (variant, random) in models.into_iter().enumerate() {
        let name = format!("{} {variant}", random.architecture);
        let written = write(&random, 360);
        has_upstreams_logits(&name, &written);
        restricted_layers_are_upstreams(&name, &written);
        sequences_in_a_batch_are_upstreams(&name, &written);
        sequences_and_states_go_on(&name, &written);
        going_back_is_as_if_nothing_had_been(&name, &written);
        states_do_not_grow(&name, &written);
        a_look_leaves_no_trace(&name, &written);
    }
}

fn run(session: &mut Session, tokens: &[Token], prompt_end: bool) -> Vec<f32> {
    session.run(&[BatchEntry { seq: 0, tokens, outputs: Outputs::Last, prompt_end }]).expect("run");
    session.logits().to_vec()
}

fn decode(session: &mut Session, tokens: &[Token]) -> Vec<Vec<f32>> {
    tokens.iter().map(|token| run(session, std::slice::from_ref(token), false)).collect()
}

/// Two sequences of different lengths in one batch, each with a state of its own, and a copy of one of them.
fn sequences_in_a_batch_are_upstreams(name: &str, Written { path, tokens, model, .. }: &Written) {
    let prompts = [tokens[..37].to_vec(), tokens[100..190].to_vec()];
    let decoded = [tokens[200..208].to_vec(), tokens[300..308].to_vec()];
    let theirs = upstream()
        .with_options(&["-fa", "on"])
        .logits(path, Logits { prompts: &prompts, all: false, decode: Some(&decoded) });
    let mut params = in_one_thread(ggmls_attention());
    params.n_ubatch = 256;
    let mut session = session(model, params);
    let n_vocab = model.hparams().n_vocab;
    let step = |session: &mut Session, parts: [(u32, &[Token]); 2]| -> [Vec<f32>; 2] {
        let entry = |(seq, tokens)| BatchEntry { seq, tokens, outputs: Outputs::Last, prompt_end: false };
        session.run(&parts.map(entry)).expect("run");
        let rows: Vec<Vec<f32>> = session.logits().chunks_exact(n_vocab).map(<[f32]>::to_vec).collect();
        rows.try_into().expect("a row of each")
    };
    let mut ours = [Vec::new(), Vec::new()];
    let mut note = |rows: [Vec<f32>; 2]| ours.iter_mut().zip(rows).for_each(|(all, row)| all.push(row));
    note(step(&mut session, [(0, &prompts[0]), (7, &prompts[1])]));
    for i in 0..8 {
        if i == 4 {
            session.sequence(7).copy_to(9).expect("a copy");
            session.sequence(7).clear();
        }
        let second = if i < 4 { 7 } else { 9 };
        note(step(&mut session, [(0, &decoded[0][i..=i]), (second, &decoded[1][i..=i])]));
    }
    let kl = mean_kl(&theirs, &ours.concat());
    println!("{name}: two sequences in a batch: mean KL {kl:.2e}");
    assert!(kl < MAX_KL, "{name}: two sequences in a batch: mean KL {kl}");
}

/// From a prompt's end and from a checkpoint; where there is no snapshot, no way back is claimed.
fn going_back_is_as_if_nothing_had_been(name: &str, Written { tokens, model, .. }: &Written) {
    let params = SessionParams { n_ubatch: 128, ..in_one_thread(plain()) };
    let other = &tokens[330..350];
    let fresh = |n: usize| {
        let mut session = session(model, params.clone());
        let at_end = run(&mut session, &tokens[..300], true);
        decode(&mut session, &tokens[300..n]);
        (at_end, decode(&mut session, other))
    };
    let mut session = session(model, params.clone());
    run(&mut session, &tokens[..300], true);
    decode(&mut session, &tokens[300..316]);
    assert_eq!((session.seq_held(0), session.seq_resumable(0)), (Some(315..=315), 316), "{name}");
    for n in [315, 301, 299, 100] {
        assert!(!session.seq_can_truncate(0, n) && !session.truncate(n), "{name}: {n}");
        assert_eq!(session.n_past(), 316, "{name}");
    }
    assert!(session.truncate(300), "{name}");
    assert!(decode(&mut session, other) == fresh(300).1, "{name}: from the prompt's end");
    assert!(session.truncate(300), "{name}: once more");

    decode(&mut session, &tokens[300..310]);
    let checkpoint = session.checkpoint(0);
    decode(&mut session, &tokens[310..326]);
    let restored = session.restore(0, &checkpoint).expect("restored");
    assert_eq!((restored.n_past, restored.n_read), (310, 0), "{name}");
    assert!(decode(&mut session, other) == fresh(310).1, "{name}: from a checkpoint");
    // A whole answer taken back, and the prompt's last tokens asked for again, need the prompt's end alone.
    assert!(session.truncate(300) && session.truncate(300), "{name}");
    assert!(session.truncate(0) && session.n_past() == 0, "{name}");
    let (at_end, next) = fresh(300);
    assert!(run(&mut session, &tokens[..300], true) == at_end && decode(&mut session, other) == next, "{name}: anew");
}

fn states_do_not_grow(name: &str, Written { tokens, model, .. }: &Written) {
    let mut session = session(model, SessionParams { n_ubatch: 64, ..in_one_thread(plain()) });
    let mut sizes = Vec::new();
    for n in [1, 40, 300] {
        session.clear();
        run(&mut session, &tokens[..n], true);
        let layers = session.layers(0);
        let hparams = model.hparams();
        for layer in &layers {
            let is_recurrent = hparams.states[layer.index].is_some();
            assert_eq!(layer.state_bytes > 0, is_recurrent, "{name}: {layer:?}");
            assert_eq!(layer.kv_bytes > layer.state_bytes, hparams.attends[layer.index], "{name}: {layer:?}");
            let kind = match (hparams.attends[layer.index], hparams.states[layer.index]) {
                (true, _) => LayerKind::Full,
                (false, Some(state)) if state.matrices > 0 => LayerKind::Recurrent,
                (false, Some(_)) => LayerKind::Convolution,
                (false, None) => LayerKind::Nothing,
            };
            assert_eq!(layer.kind, kind, "{name}: {layer:?}");
        }
        sizes.push(layers.iter().map(|layer| layer.state_bytes).collect::<Vec<_>>());
    }
    assert!(sizes[0] == sizes[1] && sizes[1] == sizes[2], "{name}: {sizes:?}");
    assert_eq!(session.kv().active_layers, model.hparams().attends.iter().filter(|&&attends| attends).count());
}

/// Where no layer meets the bound, all is as if nobody had looked; where all do, all that attend are lazy.
fn a_look_leaves_no_trace(name: &str, Written { tokens, model, .. }: &Written) {
    for layer_major in [true, false] {
        let params = |policy: &str| {
            let mut params = SessionParams { n_ubatch: 128, layer_major, ..in_one_thread(plain()) };
            params.lazy.policy = policy.parse().expect("a policy");
            params.lazy.n_window = 64;
            params
        };
        let looked = |policy: &str| {
            let mut session = session(model, params(policy));
            let at_end = run(&mut session, &tokens[..300], true);
            let n_lazy = session.kv().lazy_layers;
            (session.foretold(0), n_lazy, at_end, decode(&mut session, &tokens[300..310]))
        };
        let (foretold, n_lazy, at_end, next) = looked("kl:1e-30");
        assert_eq!((foretold, n_lazy), (Some(0.0), 0), "{name}");
        // Such a prompt is cut where the look begins.
        let mut plainly = session(model, SessionParams { layer_major: false, ..params("off") });
        run(&mut plainly, &tokens[..236], false);
        let expected = run(&mut plainly, &tokens[236..300], true);
        let expected_next = decode(&mut plainly, &tokens[300..310]);
        if layer_major {
            let kl = mean_kl(&[expected], &[at_end]).max(mean_kl(&expected_next, &next));
            assert!(kl < 1e-6, "{name}: {kl}");
        } else {
            assert!(expected == at_end && expected_next == next, "{name}");
        }
        let n_candidates = (0..model.hparams().n_layer).filter(|&layer| model.hparams().can_be_lazy(layer)).count();
        let (foretold, n_lazy, ..) = looked("kl:1000");
        assert!(foretold.is_some_and(|kl| kl > 0.0), "{name}: {foretold:?}");
        assert_eq!(n_lazy, n_candidates, "{name}");

        // As llama-server gives a prompt: the look at its end goes back into the piece before.
        let mut session = session(model, SessionParams { split_prompts: true, ..params("kl:1000") });
        run(&mut session, &tokens[..296], false);
        run(&mut session, &tokens[296..300], true);
        assert!(session.foretold(0).is_some_and(|kl| kl > 0.0), "{name}: in pieces");
        assert_eq!(session.kv().lazy_layers, n_candidates, "{name}: in pieces");
    }
}

/// Whenever a run ends early, the sequence is as it was.
#[test]
fn an_interrupted_run_leaves_states_as_they_were() {
    let written = write(&random_qwen35(qwen35_shapes()[0], "qwen35", false), 360);
    let Written { tokens, model, .. } = &written;
    let params = SessionParams { n_ubatch: 512, layer_major: false, ..in_one_thread(plain()) };
    let mut straight = session(model, params.clone());
    run(&mut straight, &tokens[..100], false);
    let expected = decode(&mut straight, &tokens[100..105]);
    let mut interrupted = 0;
    for delay in (0..40).map(|step| std::time::Duration::from_micros(150 * step)) {
        let mut session = session(model, params.clone());
        run(&mut session, &tokens[..100], false);
        let flag = session.abort_flag();
        let entry = BatchEntry { seq: 0, tokens: &tokens[110..360], outputs: Outputs::Last, prompt_end: false };
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                flag.store(true, std::sync::atomic::Ordering::SeqCst);
            });
            session.run(&[entry])
        });
        flag.store(false, std::sync::atomic::Ordering::SeqCst);
        match result {
            Err(Error::Interrupted) => {
                interrupted += 1;
                assert_eq!(session.n_past(), 100);
                assert!(decode(&mut session, &tokens[100..105]) == expected, "after {delay:?}");
            }
            result => result.expect("a whole run"),
        }
    }
    println!("{interrupted} of 40 runs were interrupted");
    assert!(interrupted > 0);
}

/// Sizes that do not fit are errors that name their key.
#[test]
fn sizes_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("wrong.gguf");
    let refused_naming = |named: &str, mut random: RandomDecoder, key: &str, value: Meta| {
        random.key(key, value);
        random.write(&path);
        let error = Model::load(&path, &ModelParams::default()).expect_err("a wrong size").to_string();
        assert!(error.contains(&format!("{}.{named}", random.architecture)), "{key}: {error}");
    };
    let refused = |random: RandomDecoder, key: &str, value: Meta| refused_naming(key, random, key, value);
    let [default, other] = qwen35_shapes();
    for (key, value) in [
        ("ssm.conv_kernel", 1u32),
        ("ssm.conv_kernel", 0),
        ("ssm.inner_size", 65),
        ("ssm.time_step_rank", u32::MAX >> 1),
        ("full_attention_interval", 0),
    ] {
        refused(random_qwen35(default, "qwen35", false), key, value.into());
    }
    let qwen35 = random_qwen35(default, "qwen35", false);
    refused_naming("ssm.time_step_rank", qwen35, "ssm.group_count", 3u32.into());
    refused(random_qwen35(other, "qwen35", false), "attention.recurrent_layers", Meta::array([true, false]));
    refused(random_lfm2(default), "shortconv.l_cache", 1u32.into());
    // A layer that is said to attend where an architecture needs it to, and does not.
    let no_heads = || Meta::array([2u32, 0, 2, 2]);
    refused(random_falcon_h1(Shape::default()), "attention.head_count_kv", no_heads());
    for (key, value) in [("ssm.group_count", 5u32), ("ssm.time_step_rank", 7)] {
        refused(random_falcon_h1(Shape::default()), key, value.into());
    }
}

/// What does not grow with the text cannot be made lazy.
#[test]
fn recurrent_layers_cannot_be_lazy() {
    let Written { model, _folder, .. } = write(&random_lfm2(Shape { n_layer: 6, ..Shape::default() }), 10);
    let params = |policy: &str| {
        let mut params = in_one_thread(plain());
        params.lazy.policy = policy.parse().expect("a policy");
        params
    };
    let error = Session::new(&model, params("layers:0,2")).expect_err("a convolution").to_string();
    assert!(error.contains("layer 0 cannot be lazy") && error.contains("recurrent"), "{error}");
    Session::new(&model, params("layers:2,5")).expect("those that attend");
    // Of two layers that attend a budget of a half leaves one.
    let mut half = session(&model, SessionParams { n_ubatch: 64, ..params("budget:0.5") });
    let tokens: Vec<Token> = (0..300).map(|i| 5 + i % 200).collect();
    half.prefill(&tokens).expect("a prompt");
    assert_eq!((half.kv().lazy_layers, half.kv().active_layers), (0, 2), "within the window");
    let mut small = params("budget:0.5");
    small.lazy.n_window = 64;
    let mut half = session(&model, small);
    half.prefill(&tokens).expect("a prompt");
    assert_eq!((half.kv().lazy_layers, half.kv().active_layers), (1, 1));
    assert!(half.layers(0).iter().all(|layer| layer.score.is_some() == [2, 5].contains(&layer.index)));
}
