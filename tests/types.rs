//! What each cache type costs: the table of `docs/quality.md`. It takes some minutes, so that it is run by hand:
//!
//! ```sh
//! cargo test --release --test types -- --ignored --nocapture
//! ```
//!
//! On weights in f32, so that the cache's rounding is not lost in that of quantised activations.

mod common;

use common::{load, plain, session, story, unquantized::smollm2_f32_path};
use simlayer::{AddBos, KvRotate, SessionParams, Special, Token, ggml::Type};
use simlayer_testkit::{UpstreamRef, workspace_root};

const N_PREFILL: usize = 2_000;
const N_SCORE: usize = 400;

/// Layers that are lazy where not all cache types change: 14 of 30.
const LAZY: &str = "budget:0.4667";

const TYPES: [(&str, Type, Type); 4] = [
    ("q4_0/q4_0", Type::Q4_0, Type::Q4_0),
    ("q5_0/q4_0", Type::Q5_0, Type::Q4_0),
    ("q8_0/q4_0", Type::Q8_0, Type::Q4_0),
    ("q8_0/q8_0", Type::Q8_0, Type::Q8_0),
];

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Rotated,
    NotRotated,
    /// Rotated, with the sink and the newest tokens in f16: the default.
    Exact,
}

const WAYS: [Way; 3] = [Way::NotRotated, Way::Rotated, Way::Exact];

fn with(way: Way, mut params: SessionParams) -> SessionParams {
    params.kv_rotate = if way == Way::NotRotated { KvRotate::Never } else { KvRotate::default() };
    params.kv_exact = if way == Way::Exact { params.kv_exact } else { 0 };
    params
}

#[test]
#[ignore = "a table for the docs, which takes some minutes"]
fn what_each_type_costs() {
    let path = smollm2_f32_path();
    let model = load(&path);
    // The demo's story, and the text that profiles are made on.
    let calibration = std::fs::read_to_string(workspace_root().join("src/quality/calibration.txt")).expect("the text");
    let mut calibration = model.vocab().tokenize(&calibration, AddBos::Yes, Special::Text).expect("tokens");
    calibration.truncate(N_PREFILL + N_SCORE);
    let texts = [story(&model, N_PREFILL + N_SCORE), calibration];
    // Over both texts.
    let perplexity = |params: SessionParams| {
        let nll = |tokens| common::nll(&mut session(&model, params.clone()), tokens, N_PREFILL, 1);
        (texts.iter().map(|tokens| nll(tokens)).sum::<f64>() / texts.len() as f64).exp()
    };
    let upstream = |k: &str, v: &str| {
        (texts.iter().map(|tokens| upstream_nll(&path, tokens, k, v)).sum::<f64>() / texts.len() as f64).exp()
    };

    let lazy = |k, v| {
        let mut params = common::lazy_f16(LAZY, 1024);
        (params.lazy.type_k, params.lazy.type_v) = (Some(k), Some(v));
        params
    };
    let all = |k, v| {
        let mut params = plain();
        (params.type_k, params.type_v) = (k, v);
        params
    };
    let f16 = [perplexity(lazy(Type::F16, Type::F16)), perplexity(all(Type::F16, Type::F16)), upstream("f16", "f16")];
    println!("f16: 14 lazy {:.4}, all active {:.4}, upstream {:.4}", f16[0], f16[1], f16[2]);
    let cost = |perplexity: f64, f16: f64| 100.0 * (perplexity / f16 - 1.0);
    println!("| K/V | 14 lazy: as is | rotated | + exact | all: as is | rotated | + exact | upstream |");
    println!("|---|---|---|---|---|---|---|---|");
    let mut costs = Vec::new();
    for (name, k, v) in TYPES {
        let in_lazy = WAYS.map(|way| cost(perplexity(with(way, lazy(k, v))), f16[0]));
        let in_all = WAYS.map(|way| cost(perplexity(with(way, all(k, v))), f16[1]));
        let (k, v) = name.split_once('/').expect("two types");
        let theirs = cost(upstream(k, v), f16[2]);
        print!("| {name} |");
        for cost in in_lazy.iter().chain(&in_all).chain([&theirs]) {
            print!(" {cost:+.2} % |");
        }
        println!();
        costs.push((in_lazy, in_all, theirs));
    }
    let [(lazy_q4, q4, theirs), _, (_, q8_q4, _), _] = costs[..] else { unreachable!("four pairs of types") };
    let [_, rotated, exact] = q4;
    assert!(q8_q4[1] <= 0.6, "q8_0/q4_0 in all layers, rotated: {:.2} %", q8_q4[1]);
    assert!(rotated <= theirs, "q4_0 in all layers, rotated: {rotated:.2} %, upstream {theirs:.2} %");
    assert!(exact <= theirs / 2.0, "q4_0 in all layers with exact tokens: {exact:.2} %, upstream {theirs:.2} %");
    assert!(lazy_q4[2] <= 2.0, "q4_0 in 14 lazy layers: {:.2} %", lazy_q4[2]);
}

/// Upstream's mean negative log-likelihood, with flash attention.
fn upstream_nll(path: &std::path::Path, tokens: &[Token], k: &str, v: &str) -> f64 {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens_path = folder.path().join("tokens.json");
    std::fs::write(&tokens_path, serde_json::to_string(tokens).expect("JSON")).expect("written");
    let [prefill, score] = [("prefill", N_PREFILL), ("score", N_SCORE)].map(|(name, n)| format!("--{name}={n}"));
    let options = ["--tokens", &tokens_path.to_string_lossy(), &prefill, &score, "--layers=none", "--sink=4"];
    let options = [&options[..], &["--window=1024", "--from=prefill-end"]].concat();
    let answer =
        UpstreamRef::new().with_options(&["-fa", "on", "-ctk", k, "-ctv", v]).run("restricted", path, &options);
    answer["nll"].as_f64().expect("nll")
}
