//! LoRA adapters: logits against unmodified llama.cpp, adapters changed between calls, and files that do not fit.

mod common;

use std::path::{Path, PathBuf};

use common::{ggmls_attention, load, load_as_upstream, logits, plain, session, smollm2, story};
use simlayer::{BatchEntry, LoraAdapter, MAX_ADAPTERS, Model, Outputs, SessionParams, Token, gguf::Gguf, lazy::Policy};
use simlayer_testkit::{
    Logits, RandomDecoder, RandomLora, Rng, Shape, UpstreamRef,
    metrics::{kl, mean_kl},
    smollm2_path,
};

/// The bound on the mean KL between upstream's logits and ours, in nats.
const MAX_KL: f64 = 1e-4;

/// Writes a random adapter of the file's matrices, in as far as `wants` says so of their names.
fn write_adapter(model: &Path, to: &Path, seed: u64, gain: f32, wants: impl Fn(&str) -> bool) -> PathBuf {
    let file = Gguf::open(model).expect("a model");
    let wanted = file.tensors().iter().filter(|info| info.n_dims > 1 && wants(&info.name));
    let weights: Vec<(String, Vec<usize>)> = wanted
        .map(|info| (info.name.clone(), info.shape[..info.n_dims].iter().map(|&n| n as usize).collect()))
        .collect();
    let architecture = file.architecture().expect("an architecture");
    let path = to.join(format!("adapter-{seed}.gguf"));
    RandomLora { architecture, rank: 8, alpha: 16.0, seed, gain }.write(&weights, &path);
    path
}

fn with_adapters(mut params: SessionParams, model: &Model, adapters: &[(&Path, f32)]) -> SessionParams {
    let load = |&(path, scale): &(&Path, f32)| (LoraAdapter::load(model, path).expect("an adapter"), scale);
    params.adapters = adapters.iter().map(load).collect();
    params
}

/// With ggml's kernels and with our own: upstream's logits, which are not those of the model alone.
fn has_upstreams_logits(path: &Path, prompt: &[Token], decoded: &[Token], adapters: &[(&Path, f32)]) {
    let scaled: Vec<String> = adapters.iter().map(|(path, scale)| format!("{}:{scale}", path.display())).collect();
    let options: Vec<&str> = scaled.iter().flat_map(|scaled| ["--lora-scaled", scaled]).collect();
    let (prompts, fed) = ([prompt.to_vec()], [decoded.to_vec()]);
    let what = Logits { prompts: &prompts, all: false, decode: Some(&fed) };
    let theirs = UpstreamRef::new().with_options(&["-fa", "on"]).with_options(&options).logits(path, what);
    let model = load_as_upstream(path);
    // llama.cpp adds what several adapters give in an order of its own, by their addresses: one of all orders is its.
    let orders = [adapters.to_vec(), adapters.iter().rev().copied().collect()];
    let ours = orders.map(|order| logits(&model, &with_adapters(ggmls_attention(), &model, &order), prompt, decoded));
    let alone = logits(&model, &ggmls_attention(), prompt, decoded);
    let error = ours.iter().map(|ours| mean_kl(&theirs, ours)).fold(f64::INFINITY, f64::min);
    let effect = mean_kl(&theirs, &alone);
    println!("{}: mean KL {error:.2e}; without adapters {effect:.2e}", path.display());
    assert!(error < MAX_KL, "{error}");
    assert!(effect > 0.01, "the test's adapters change nothing: {effect}");

    let model = load(path);
    let own = logits(&model, &with_adapters(plain(), &model, adapters), prompt, decoded);
    let plain_error = mean_kl(&alone, &logits(&model, &plain(), prompt, decoded));
    let error = mean_kl(&theirs, &own);
    println!("our kernels: {error:.2e}; without adapters on both sides {plain_error:.2e}");
    // Kernels of ours round elsewhere; adapters do not add to that.
    assert!(error < 2.0 * plain_error + 1e-3, "{error}, without adapters {plain_error}");
}

#[test]
fn smollm2_has_upstreams_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = smollm2_path();
    // The embedding serves for the output, too, and llama.cpp aborts where an adapter has it.
    let all = write_adapter(&path, folder.path(), 1, 0.1, |name| name != "token_embd.weight");
    let some = write_adapter(&path, folder.path(), 2, 0.1, |name| name.contains("attn_q") || name.contains("ffn_down"));
    let text = story(&smollm2(), 120);
    let (prompt, decoded) = text.split_at(100);
    has_upstreams_logits(&path, prompt, decoded, &[(&all, 1.0)]);
    has_upstreams_logits(&path, prompt, decoded, &[(&all, 0.5), (&some, -1.5)]);
}

/// A mixture of experts in f32, whose output is a matrix of its own.
fn random_experts(folder: &Path) -> (PathBuf, Vec<Token>) {
    let mut m = RandomDecoder::new("qwen3moe", Shape { tied: false, ..Shape::default() });
    m.expert_keys();
    m.key("expert_feed_forward_length", 64_u32);
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.head_norms(i);
        m.experts(i, 64);
    }
    let path = folder.join("experts.gguf");
    m.write(&path);
    (path, Rng::new(3).tokens(60, m.n_vocab))
}

#[test]
fn experts_and_the_output_have_upstreams_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, tokens) = random_experts(folder.path());
    let adapter = write_adapter(&path, folder.path(), 4, 0.3, |name| !name.contains("gate_inp"));
    let (prompt, decoded) = tokens.split_at(40);
    has_upstreams_logits(&path, prompt, decoded, &[(&adapter, 1.0)]);
}

/// Changed between calls, adapters apply to the tokens that come; an answer that is taken back is not given by those of
/// before; lazy layers stay so.
#[test]
fn adapters_change_between_calls() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write_adapter(&smollm2_path(), folder.path(), 5, 0.1, |name| name.contains("attn_v"));
    let model = smollm2();
    let adapter = LoraAdapter::load(&model, &path).expect("an adapter");
    let text = story(&model, 300);
    let mut params = plain();
    params.lazy.policy = Policy::Layers((0..15).collect());
    params.lazy.n_window = 64;
    let fresh = |adapters: Vec<(LoraAdapter, f32)>| session(&model, SessionParams { adapters, ..params.clone() });
    let expected = fresh(vec![(adapter.clone(), 2.0)]).prefill(&text).expect("logits").to_vec();
    let without = fresh(Vec::new()).prefill(&text).expect("logits").to_vec();
    assert!(kl(&expected, &without) > 0.01, "{}", kl(&expected, &without));

    let mut session = fresh(Vec::new());
    assert_eq!(session.prefill(&text).expect("logits"), without);
    session.set_adapters(vec![(adapter.clone(), 2.0)]).expect("adapters");
    session.clear();
    assert_eq!(session.prefill(&text).expect("logits"), expected);
    let lazy = session.kv().lazy_layers;
    assert_eq!(lazy, 15);

    // The prompt's last token once more, with nothing: its logits were noted with the adapter.
    session.decode(text[0]).expect("decode");
    session.set_adapters(vec![(adapter.clone(), 0.0)]).expect("adapters");
    assert!(session.truncate(text.len() - 1), "a token can be taken back");
    let entry = BatchEntry { seq: 0, tokens: &text[text.len() - 1..], outputs: Outputs::Last, prompt_end: true };
    session.run(&[entry]).expect("decode");
    assert!(kl(&expected, session.logits()) > 1e-4, "these are the logits of before");
    assert_eq!(session.kv().lazy_layers, lazy);

    // The same again is no change; too many, or another model's, are refused.
    session.set_adapters(vec![(adapter.clone(), 0.0)]).expect("adapters");
    let refused = session.set_adapters(vec![(adapter.clone(), 1.0); MAX_ADAPTERS + 1]).unwrap_err().to_string();
    assert!(refused.contains("at most 8"), "{refused}");
    let other = smollm2();
    let of_other = LoraAdapter::load(&other, &path).expect("an adapter");
    let refused = session.set_adapters(vec![(of_other, 1.0)]).unwrap_err().to_string();
    assert!(refused.contains("another model"), "{refused}");
    session.decode(text[1]).expect("it goes on");
}

#[test]
fn files_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.gguf");
    let model = smollm2();
    let weight = ("blk.3.attn_q.weight".to_owned(), vec![576, 576]);
    let lora = RandomLora { architecture: "llama", rank: 4, alpha: 4.0, seed: 1, gain: 0.1 };
    let good = lora.gguf(std::slice::from_ref(&weight));
    let refusal = |file: &simlayer_testkit::gguf::GgufFile| {
        file.write(&path);
        LoraAdapter::load(&model, &path).expect_err("it does not fit").to_string()
    };
    good.write(&path);
    LoraAdapter::load(&model, &path).expect("the file that the others are made of");

    let mut other = good.clone();
    other.set("general.architecture", "qwen2");
    assert!(refusal(&other).contains("key general.architecture: is \"qwen2\""), "{}", refusal(&other));
    let mut other = good.clone();
    other.set("general.type", "model");
    assert!(refusal(&other).contains("key general.type"), "{}", refusal(&other));
    let mut other = good.clone();
    other.remove_tensor("blk.3.attn_q.weight.lora_b");
    assert!(refusal(&other).contains("blk.3.attn_q.weight.lora_b is missing"), "{}", refusal(&other));
    let mut other = good.clone();
    other.add_tensor("blk.3.attn_q.weight", 0, &[4], vec![0; 16]);
    assert!(refusal(&other).contains("neither a lora_a nor a lora_b"), "{}", refusal(&other));
    let mut other = good.clone();
    other.remove_tensor("blk.3.attn_q.weight.lora_a");
    assert!(refusal(&other).contains("blk.3.attn_q.weight.lora_b"), "{}", refusal(&other));

    let unknown = lora.gguf(&[("blk.3.attn_p.weight".to_owned(), vec![576, 576])]);
    assert!(refusal(&unknown).contains("no tensor blk.3.attn_p.weight"), "{}", refusal(&unknown));
    let wide = lora.gguf(&[(weight.0.clone(), vec![512, 576])]);
    assert!(refusal(&wide).contains("has shape [512, 4], expected [576, 4"), "{}", refusal(&wide));
    let narrow = lora.gguf(&[(weight.0, vec![576, 575])]);
    assert!(refusal(&narrow).contains("has shape [4, 575], expected [4, 576"), "{}", refusal(&narrow));
    std::fs::write(&path, b"GGUF").expect("written");
    assert!(LoraAdapter::load(&model, &path).is_err());
}
