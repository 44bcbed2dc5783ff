//! The foundation's promise: logits and greedy tokens are those of unmodified llama.cpp of the same revision.
//!
//! That holds to the bit with ggml's attention. This crate's own rounds elsewhere, and a model with quantised weights
//! makes much of any rounding, since activations are quantised to eight bits before each product: upstream's own two
//! ways of attention are as far from each other there. With weights in f32 nothing is quantised, and the strict bounds
//! hold for our attention too; and from what the model says in f32, our kernels are no farther than upstream's.

mod common;

use std::path::Path;

use common::{
    attention_is_ggmls, bound, ggmls_attention, load, load_as_upstream, logits, plain, session, shorter, smollm2,
    steady_smollm2, story, top, unquantized::smollm2_f32_path, upstreams_file,
};
use simlayer::{Model, SessionParams, Token, ggml::Type};
use simlayer_testkit::{
    Logits, RandomModel, Rng, UpstreamRef, WeightType,
    metrics::{entropy, mean_kl, same_top},
    smollm2_path,
};

/// The bound on the mean KL between upstream's logits and ours, in nats.
const MAX_KL: f64 = 1e-4;

/// The same for another device than the processor, where upstream's flash attention, caches or activations round otherwise.
const DEVICE_KL: f64 = 1e-3;

fn check_smollm2_logits(path: &Path, params: &SessionParams, upstreams_options: &[&str]) {
    let model = load(path);
    let text = story(&model, 1_520);
    let prompts: Vec<Vec<Token>> = [1, 37, shorter(700), shorter(1_500)].map(|n| text[..n].to_vec()).into();
    let continuations: Vec<Vec<Token>> = prompts.iter().map(|prompt| text[prompt.len()..][..8].to_vec()).collect();
    let theirs = UpstreamRef::new()
        .with_options(upstreams_options)
        .logits(&upstreams_file(path), Logits { prompts: &prompts, all: false, decode: Some(&continuations) });
    let ours: Vec<Vec<f32>> = prompts
        .iter()
        .zip(&continuations)
        .flat_map(|(prompt, decoded)| logits(&model, params, prompt, decoded))
        .collect();
    let kl = mean_kl(&theirs, &ours);
    println!("mean KL {kl:.3e} over {} rows", ours.len());
    assert!(kl < bound(MAX_KL, DEVICE_KL), "mean KL {kl}");
    for (row, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        let behind = behind(theirs, ours);
        let is_tie = behind < bound(0.0, 0.05);
        assert!(same_top(theirs, ours) || is_tie, "row {row}: another top token, {behind} behind upstream's");
    }
}

/// How far our top token is behind upstream's, in upstream's logits.
fn behind(theirs: &[f32], ours: &[f32]) -> f64 {
    f64::from(theirs[top(theirs) as usize] - theirs[top(ours) as usize])
}

#[test]
fn smollm2_logits_are_upstreams() {
    check_smollm2_logits(&smollm2_path(), &ggmls_attention(), &[]);
}

/// Upstream with caches in f32, and without flash attention, which rounds queries to f16 and sums differently for each
/// number of threads: that alone is a mean KL of 4e-5 with two of them, and 1.6e-4 with one.
const EXACT: [&str; 6] = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"];

/// As [`plain`], with nothing rounded to f16 either.
fn exact() -> SessionParams {
    let mut params = plain();
    (params.type_k, params.type_v) = (Type::F32, Type::F32);
    // Layer by layer a prompt is read over keys and values in f16.
    params.layer_major = false;
    params
}

#[test]
fn unquantised_smollm2s_logits_are_upstreams_with_our_attention() {
    check_smollm2_logits(&smollm2_f32_path(), &exact(), &EXACT);
}

fn check_smollm2_greedy_tokens(path: &Path, params: &SessionParams, upstreams_options: &[&str], n: usize) {
    let model = load(path);
    let text = story(&model, 3_600);
    let prompts: Vec<Vec<Token>> = (0..10).map(|i| text[i * 350..][..20 + 25 * i].to_vec()).collect();
    let theirs = UpstreamRef::new().with_options(upstreams_options).greedy(&upstreams_file(path), &prompts, n);
    let mut identical = 0;
    for (i, (prompt, theirs)) in prompts.iter().zip(&theirs).enumerate() {
        let mut session = session(&model, params.clone());
        let mut token = top(session.prefill(prompt).expect("prefill"));
        let mut ours = vec![token];
        while ours.len() < n {
            token = top(session.decode(token).expect("decode"));
            ours.push(token);
        }
        match ours.iter().zip(&theirs.tokens).position(|(ours, theirs)| ours != theirs) {
            None => identical += 1,
            Some(step) => {
                let [(_, first), (_, second)] = theirs.top2[step];
                assert!(
                    first - second < 0.05,
                    "prompt {i} parts at token {step}, where {first} stood against {second}"
                );
            }
        }
    }
    println!("{identical} of {} greedy runs identical", prompts.len());
    assert!(identical >= 9, "{identical} of {} greedy runs identical", prompts.len());
}

#[test]
fn smollm2_greedy_tokens_are_upstreams() {
    check_smollm2_greedy_tokens(&smollm2_path(), &ggmls_attention(), &[], shorter(64));
}

#[test]
fn unquantised_smollm2s_greedy_tokens_are_upstreams_with_our_attention() {
    check_smollm2_greedy_tokens(&smollm2_f32_path(), &exact(), &EXACT, shorter(32));
}

/// What the model says when no activation is quantised and nothing is rounded to f16: upstream's answer to that is the
/// measure of both programs' defaults.
#[test]
fn our_kernels_are_as_near_to_the_unquantised_model_as_upstreams() {
    let model = smollm2();
    let text = story(&model, 1_100);
    let prompts = [37, shorter(300), shorter(700), shorter(1_000)].map(|n| text[..n].to_vec());
    let continuations = prompts.each_ref().map(|prompt| text[prompt.len()..][..shorter(32)].to_vec());
    let what = Logits { prompts: &prompts, all: false, decode: Some(&continuations) };
    let exact = UpstreamRef::new().with_options(&EXACT).logits(&smollm2_f32_path(), what);
    let theirs = UpstreamRef::new().logits(&smollm2_path(), what);
    let ours: Vec<Vec<f32>> = prompts
        .iter()
        .zip(&continuations)
        .flat_map(|(prompt, decoded)| logits(&model, &plain(), prompt, decoded))
        .collect();
    let (our_kl, their_kl) = (mean_kl(&exact, &ours), mean_kl(&exact, &theirs));
    println!("mean KL to the unquantised model: {our_kl:.3e}, upstream's {their_kl:.3e}");
    // Both are noise of the same kind; a tenth is what one run of it differs from another.
    assert!(our_kl < 1.1 * their_kl, "{our_kl} against upstream's {their_kl}");
}

/// Whatever rounds differently changes this model's logits as much as upstream's other way of attention does.
#[test]
fn our_attention_is_as_near_to_upstreams_two_as_they_are_to_each_other() {
    let model = smollm2();
    let text = story(&model, 720);
    let prompts = [37, shorter(300), shorter(700)].map(|n| text[..n].to_vec());
    let continuations = prompts.each_ref().map(|prompt| text[prompt.len()..][..shorter(16)].to_vec());
    let [with, without] = ["on", "off"].map(|flash_attn| {
        UpstreamRef::new()
            .with_options(&["-fa", flash_attn])
            .logits(&smollm2_path(), Logits { prompts: &prompts, all: false, decode: Some(&continuations) })
    });
    let ours: Vec<Vec<f32>> = prompts
        .iter()
        .zip(&continuations)
        .flat_map(|(prompt, decoded)| logits(&model, &plain(), prompt, decoded))
        .collect();
    let theirs = mean_kl(&with, &without);
    for (name, other) in [("with", &with), ("without", &without)] {
        let kl = mean_kl(other, &ours);
        println!("mean KL {kl:.3e} to upstream {name} flash attention, {theirs:.3e} between these two");
        assert!(kl < 1.5 * theirs, "{name} flash attention: {kl} against {theirs}");
    }
}

/// Prompts of three lengths, and tokens decoded after each, against upstream.
fn compare(name: &str, random: &RandomModel, params: &SessionParams) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    random.write(&path);
    let model = if params.fused_attention { load(&path) } else { load_as_upstream(&path) };
    let mut rng = Rng::new(7);
    // A window that the file asks for is not upstream's for this architecture; within it the two agree.
    let longest = random.sliding_window.map_or(300, |window| 300.min(window as usize - 20));
    let prompts: Vec<Vec<Token>> = [1, 40, longest].map(|n: usize| rng.tokens(n, random.n_vocab())).into();
    let decoded: Vec<Vec<Token>> = prompts.iter().map(|_| rng.tokens(20, random.n_vocab())).collect();
    let what = Logits { prompts: &prompts, all: false, decode: Some(&decoded) };
    let theirs = UpstreamRef::new().logits(&upstreams_file(&path), what);
    let ours: Vec<Vec<f32>> =
        prompts.iter().zip(&decoded).flat_map(|(prompt, decoded)| logits(&model, params, prompt, decoded)).collect();
    let kl = mean_kl(&theirs, &ours);
    println!("{name}: mean KL {kl:.3e}, entropy {:.2}", entropy(&ours[0]));
    assert!(kl < bound(MAX_KL, DEVICE_KL), "{name}: mean KL {kl}");
    for (row, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        // Our attention may decide a tie the other way, and so may a device.
        let margin = if params.fused_attention { 0.05 } else { bound(0.0, 0.05) };
        let behind = behind(theirs, ours);
        assert!(behind <= margin, "{name}, row {row}: another top token, {behind} behind upstream's");
    }
}

#[test]
fn every_variation_of_llama_has_upstreams_logits() {
    for (name, random) in RandomModel::variations() {
        compare(name, &random, &ggmls_attention());
    }
}

/// Their weights are f32: nothing is quantised, so that small differences stay small.
#[test]
fn every_variation_of_llama_has_upstreams_logits_with_our_attention() {
    for (name, random) in RandomModel::variations() {
        compare(name, &random, &plain());
    }
}

#[test]
fn every_weight_type_has_upstreams_logits() {
    for weight_type in WeightType::ALL {
        let random = RandomModel { weight_type, ..RandomModel::default() };
        compare(&format!("{weight_type:?}"), &random, &ggmls_attention());
    }
}

/// Upstream knows layers of different widths in other architectures only: one of them is ours otherwise.
#[test]
fn layers_of_different_widths_have_upstreams_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let [ours, theirs] = ["llama", "deci"].map(|name| folder.path().join(name).with_extension("gguf"));
    let random = RandomModel { n_layer: 3, n_ff_step: 256, ..RandomModel::default() };
    random.write(&ours);
    let mut file = random.gguf();
    for (key, _) in &mut file.keys {
        if let Some(key_of) = key.strip_prefix(b"llama.") {
            *key = [b"deci.", key_of].concat();
        }
    }
    file.set("general.architecture", "deci").write(&theirs);
    let model = load(&ours);
    assert_eq!(model.hparams().n_ff, [512, 768, 1024]);
    let mut rng = Rng::new(7);
    let prompts: Vec<Vec<Token>> = [1, 40, 300].map(|n: usize| rng.tokens(n, random.n_vocab())).into();
    let what = Logits { prompts: &prompts, all: false, decode: None };
    let theirs = UpstreamRef::new().logits(&upstreams_file(&theirs), what);
    let ours: Vec<Vec<f32>> =
        prompts.iter().flat_map(|prompt| logits(&model, &ggmls_attention(), prompt, &[])).collect();
    let kl = mean_kl(&theirs, &ours);
    println!("mean KL {kl:.3e}, entropy {:.2}", entropy(&ours[0]));
    assert!(kl < bound(MAX_KL, DEVICE_KL), "mean KL {kl}");
}

/// With flash attention upstream reads caches in f32 as if they were f16, and so do we with ggml's kernels: to the bit.
#[test]
fn f32_caches_have_upstreams_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel::default();
    random.write(&path);
    let model = load(&path);
    let mut rng = Rng::new(7);
    let prompts: Vec<Vec<Token>> = [1, 40, 300].map(|n: usize| rng.tokens(n, random.n_vocab())).into();
    let decoded: Vec<Vec<Token>> = prompts.iter().map(|_| rng.tokens(20, random.n_vocab())).collect();
    let what = Logits { prompts: &prompts, all: false, decode: Some(&decoded) };
    for (k, v) in [(Type::F32, Type::F32), (Type::F32, Type::F16), (Type::F16, Type::F32), (Type::BF16, Type::F32)] {
        let options = ["-fa", "on", "-t", "1", "-ctk", k.name(), "-ctv", v.name()];
        let theirs = UpstreamRef::new().with_options(&options).logits(&upstreams_file(&path), what);
        let mut params = ggmls_attention();
        (params.type_k, params.type_v, params.n_threads, params.layer_major) = (k, v, 1, false);
        let ours: Vec<Vec<f32>> = prompts
            .iter()
            .zip(&decoded)
            .flat_map(|(prompt, decoded)| logits(&model, &params, prompt, decoded))
            .collect();
        let kl = mean_kl(&theirs, &ours);
        // A server has as many threads as it was started with, and ggml sums in as many parts.
        let most = if attention_is_ggmls() { DEVICE_KL } else { 0.0 };
        assert!(kl <= most, "{k}, {v}: mean KL {kl}");
        assert!(most > 0.0 || theirs == ours, "{k}, {v}");
    }
}

/// A sliding window is honoured: upstream ignores the key for this architecture, but its softmax can be restricted.
#[test]
fn a_sliding_window_is_upstream_restricted_to_it() {
    const WINDOW: u32 = 48;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("window.gguf");
    let random = RandomModel { sliding_window: Some(WINDOW), ..RandomModel::default() };
    random.write(&path);
    let model = load(&path);
    let tokens = Rng::new(3).tokens(400, random.n_vocab());
    let tokens_path = folder.path().join("tokens.json");
    std::fs::write(&tokens_path, serde_json::to_string(&tokens).expect("JSON")).expect("written");
    let theirs = UpstreamRef::new().run(
        "restricted",
        &path,
        &[
            "--tokens",
            &tokens_path.to_string_lossy(),
            "--prefill=300",
            "--score=100",
            "--layers=all",
            "--sink=0",
            &format!("--window={WINDOW}"),
            "--from=start",
        ],
    );
    let theirs = theirs["nll"].as_f64().expect("nll");
    for (layer_major, n_ubatch, piece) in [(true, 64, 1), (false, 64, 1), (false, 7, 100), (true, 512, 13)] {
        let mut params = plain();
        (params.layer_major, params.n_ubatch) = (layer_major, n_ubatch);
        let ours = common::nll(&mut session(&model, params), &tokens, 300, piece);
        println!("ubatch {n_ubatch}, {piece} tokens at once: {ours:.5}, upstream {theirs:.5}");
        // CUDA multiplies f32 matrices with 2 to 16 columns in tf32.
        assert!((ours - theirs).abs() < bound(2e-3, 5e-3), "ubatch {n_ubatch}: {ours} against {theirs}");
    }
}

/// The same cache types, read the same way (ubatch by ubatch): the same loss, rotation included.
#[test]
fn quantised_caches_are_upstreams() {
    let model = smollm2();
    let text = story(&model, 300);
    for (k, v) in [("q8_0", "q8_0"), ("q4_0", "q4_0")] {
        let prompts = [text[..280].to_vec()];
        let decoded = [text[280..].to_vec()];
        let theirs = UpstreamRef::new()
            .with_options(&["-ctk", k, "-ctv", v])
            .logits(&upstreams_file(&smollm2_path()), Logits { prompts: &prompts, all: false, decode: Some(&decoded) });
        let mut params = ggmls_attention();
        params.type_k = Type::cache_type_from_name(k).expect("a type");
        params.type_v = Type::cache_type_from_name(v).expect("a type");
        params.layer_major = false;
        let ours = logits(&model, &params, &prompts[0], &decoded[0]);
        let kl = mean_kl(&theirs, &ours);
        println!("{k}/{v}: mean KL {kl:.3e}");
        // What a device rounds to four bits differs here and there.
        assert!(kl < bound(MAX_KL, 20.0 * DEVICE_KL), "{k}/{v}: mean KL {kl}");
    }
}

#[test]
fn without_flash_attention_too() {
    let model = smollm2();
    let text = story(&model, shorter(600) + 20);
    let (prompt, decoded) = text.split_at(shorter(600));
    let (prompts, decoded) = ([prompt.to_vec()], [decoded.to_vec()]);
    let theirs = UpstreamRef::new()
        .with_options(&["-fa", "off"])
        .logits(&upstreams_file(&smollm2_path()), Logits { prompts: &prompts, all: false, decode: Some(&decoded) });
    let mut params = plain();
    params.flash_attn = false;
    let kl = mean_kl(&theirs, &logits(&model, &params, &prompts[0], &decoded[0]));
    assert!(kl < bound(MAX_KL, DEVICE_KL), "mean KL {kl}");
}

/// Sequences of one batch do not see each other, whatever their lengths.
fn check_sequences(model: &Model, text: &[Token], params: &SessionParams) {
    use simlayer::{BatchEntry, Outputs};

    let prompts = [&text[..1], &text[10..60], &text[100..340]];
    let mut together = session(model, params.clone());
    let entries: Vec<BatchEntry<'_>> = (0..)
        .zip(prompts)
        .map(|(seq, tokens)| BatchEntry { seq, tokens, outputs: Outputs::Last, prompt_end: true })
        .collect();
    together.run(&entries).expect("prefill");
    let n_vocab = model.hparams().n_vocab;
    for step in 0..3 {
        let rows: Vec<Vec<f32>> = together.logits().chunks_exact(n_vocab).map(<[f32]>::to_vec).collect();
        for (prompt, row) in prompts.iter().zip(&rows) {
            let alone = logits(model, params, prompt, &text[400..400 + step]);
            let kl = mean_kl(&alone[step..], std::slice::from_ref(row));
            assert!(kl < MAX_KL, "step {step}: mean KL {kl}");
        }
        let next = [text[400 + step]];
        let entries: Vec<BatchEntry<'_>> =
            (0..3).map(|seq| BatchEntry { seq, tokens: &next, outputs: Outputs::Last, prompt_end: false }).collect();
        together.run(&entries).expect("decode");
    }
}

#[test]
fn sequences_in_one_batch_are_as_if_alone() {
    let model = steady_smollm2();
    check_sequences(&model, &story(&model, 500), &ggmls_attention());
}

/// Our kernels take few tokens otherwise than many; where weights are f32 that changes next to nothing.
#[test]
fn sequences_in_one_batch_are_as_if_alone_with_our_kernels() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel::default();
    random.write(&path);
    check_sequences(&load(&path), &Rng::new(5).tokens(500, random.n_vocab()), &plain());
}

/// Memory grows with the sequence: at most a quarter more than is used, and one block in each store.
#[test]
fn memory_grows_with_the_sequence() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_ctx_train: 8192, ..RandomModel::default() };
    random.write(&path);
    let model = load(&path);
    let mut session = session(&model, plain());
    let per_token = model.hparams().f16_kv_bytes_per_token();
    for token in Rng::new(1).tokens(3_000, random.n_vocab()) {
        session.decode(token).expect("decode");
        let kv = session.kv();
        let used = kv.context_tokens * per_token;
        assert!(kv.allocated_bytes <= used + used / 4 + 256 * per_token, "{kv:?}");
        assert!(kv.allocated_bytes >= used, "{kv:?}");
    }
}
