//! What the tests of the engine share.
#![allow(dead_code, reason = "each test binary uses some of it")]

pub mod company;
pub mod reference;
pub mod unquantized;

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use simlayer::{
    AddBos, BatchEntry, Model, ModelParams, Outputs, Session, SessionParams, Special, Token, ggml::Device, lazy::Policy,
};
use simlayer_testkit::{UpstreamRef, smollm2_path, workspace_root};

pub fn smollm2() -> Model {
    load(&smollm2_path())
}

/// SmolLM2 whose logits hardly depend on how many tokens are computed at once: in f32 on another device than the processor,
/// since CUDA sums products with quantised weights otherwise for each number of tokens.
pub fn steady_smollm2() -> Model {
    if on_another_device() { load(&unquantized::smollm2_f32_path()) } else { smollm2() }
}

/// With `SIMLAYER_TEST_RPC` (servers, `HOST:PORT,…`) weights and caches are on the servers' devices, with
/// `SIMLAYER_TEST_DEVICE` (names, `Vulkan0,…`) on these.
pub fn load(path: &Path) -> Model {
    load_with(path, ModelParams::default())
}

/// As [`load`], with weights repacked as upstream's are: for sessions with ggml's kernels.
pub fn load_as_upstream(path: &Path) -> Model {
    load_with(path, ModelParams { ggml_kernels: true, ..ModelParams::default() })
}

fn load_with(path: &Path, params: ModelParams) -> Model {
    let params = ModelParams { devices: test_devices(), ..params };
    let wanted = params.devices.clone();
    let model = Model::load(path, &params).unwrap_or_else(|error| panic!("{error}"));
    if let Some(wanted) = wanted {
        let mut layers = (0..model.hparams().n_layer).map(|layer| model.layer_device(layer));
        assert!(layers.all(|device| wanted.contains(&device)), "a layer is elsewhere than on {wanted:?}");
    }
    model
}

fn test_devices() -> Option<Vec<Device>> {
    let list = |variable: &str| -> Vec<String> {
        std::env::var(variable).iter().flat_map(|list| list.split(',')).map(str::to_owned).collect()
    };
    let mut devices = Vec::new();
    #[cfg(feature = "rpc")]
    for server in list("SIMLAYER_TEST_RPC") {
        devices.extend(simlayer::ggml::rpc::connect(&server).unwrap_or_else(|error| panic!("{error}")));
    }
    for name in list("SIMLAYER_TEST_DEVICE") {
        let found = Device::all().into_iter().find(|device| device.name() == name);
        devices.push(found.unwrap_or_else(|| panic!("there is no {name} here, only {:?}", Device::all())));
    }
    Some(devices).filter(|devices| !devices.is_empty())
}

/// Whether `SIMLAYER_TEST_DEVICE` puts layers on something else than a processor's arithmetic.
pub fn on_another_device() -> bool {
    std::env::var_os("SIMLAYER_TEST_DEVICE").is_some()
}

/// Whether ggml's flash attention reads the caches, which rounds f32 rows to f16: it does wherever layers are not in this process's
/// memory.
pub fn attention_is_ggmls() -> bool {
    on_another_device() || std::env::var_os("SIMLAYER_TEST_RPC").is_some()
}

/// A bound on a difference to upstream on the processor, or between two ways to compute the same: `exact` where both are
/// the same arithmetic of ggml's operations on the processor, and no less than `device` on another device. ggml's Vulkan
/// rounds f32 matrices whose rows are apart to f16 before a product of many columns: a head's keys and values are such.
pub fn bound(exact: f64, device: f64) -> f64 {
    if on_another_device() { exact.max(device) } else { exact }
}

/// The file that upstream reads for comparison with the model at `path`: a copy in f32 where we compute on another device
/// and upstream on the processor. Vulkan multiplies quantised weights with activations as they are, where the
/// processor's products round activations to eight bits. CUDA does so otherwise: there upstream is to be on the card, too.
pub fn upstreams_file(path: &Path) -> PathBuf {
    static UPSTREAM_OFFLOADS: OnceLock<bool> = OnceLock::new();
    if !on_another_device() || *UPSTREAM_OFFLOADS.get_or_init(|| UpstreamRef::new().offloads(path)) {
        return path.to_owned();
    }
    let of_smollm2 = unquantized::smollm2_f32_path();
    if path == smollm2_path() || path == of_smollm2 {
        return of_smollm2;
    }
    let copy = path.with_extension("f32.gguf");
    unquantized::write_unquantized(path, &copy);
    copy
}

/// A length of a text or a window, divided by `SIMLAYER_TEST_SHORTER` where that is set: for devices that take a minute for a
/// thousand tokens.
pub fn shorter(n: usize) -> usize {
    let divisor = std::env::var("SIMLAYER_TEST_SHORTER").ok().map(|text| text.parse().expect("a number"));
    n / divisor.unwrap_or(1)
}

/// `n` tokens of English prose: the demo's story, from its beginning as often as needed.
pub fn story(model: &Model, n: usize) -> Vec<Token> {
    let text = std::fs::read_to_string(workspace_root().join("xtask/demo/story.txt")).expect("the story");
    let tokens = model.vocab().tokenize(&text, AddBos::Yes, Special::Text).expect("tokens");
    tokens.iter().copied().cycle().take(n).collect()
}

/// Parameters without any laziness.
pub fn plain() -> SessionParams {
    let mut params = SessionParams::default();
    params.lazy.policy = Policy::Off;
    params.n_threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(2));
    params
}

/// As [`plain`], with ggml's own attention instead of this crate's.
pub fn ggmls_attention() -> SessionParams {
    let mut params = plain();
    params.fused_attention = false;
    params
}

/// As [`plain`], with a policy, and f16 in the lazy layers.
pub fn lazy_f16(policy: &str, n_window: usize) -> SessionParams {
    let mut params = plain();
    params.lazy.policy = policy.parse().expect("a policy");
    params.lazy.n_window = n_window;
    params.lazy.type_k = Some(simlayer::ggml::Type::F16);
    params.lazy.type_v = Some(simlayer::ggml::Type::F16);
    params
}

pub fn session(model: &Model, params: SessionParams) -> Session {
    Session::new(model, params).unwrap_or_else(|error| panic!("{error}"))
}

/// The logits behind the last prompt token, then behind each token of `decoded`.
pub fn logits(model: &Model, params: &SessionParams, prompt: &[Token], decoded: &[Token]) -> Vec<Vec<f32>> {
    let mut session = session(model, params.clone());
    let mut rows = vec![session.prefill(prompt).expect("prefill").to_vec()];
    rows.extend(decoded.iter().map(|&token| session.decode(token).expect("decode").to_vec()));
    rows
}

/// Mean negative log-likelihood of `tokens[n_prefill..]`, fed `piece` tokens at a time after the prefill.
pub fn nll(session: &mut Session, tokens: &[Token], n_prefill: usize, piece: usize) -> f64 {
    let n_vocab = session.model().hparams().n_vocab;
    let log_probability = |row: &[f32], token: Token| simlayer_testkit::metrics::log_softmax(row)[token as usize];
    let first = session.prefill(&tokens[..n_prefill]).expect("prefill").to_vec();
    let mut sum = -log_probability(&first, tokens[n_prefill]);
    let scored = &tokens[n_prefill..];
    let inputs = &scored[..scored.len() - 1];
    for (i, fed) in inputs.chunks(piece).enumerate() {
        let entry = BatchEntry { seq: 0, tokens: fed, outputs: Outputs::All, prompt_end: false };
        session.run(&[entry]).expect("decode");
        for (row, &next) in session.logits().chunks_exact(n_vocab).zip(&scored[i * piece + 1..]) {
            sum -= log_probability(row, next);
        }
    }
    sum / scored.len() as f64
}

pub fn top(logits: &[f32]) -> Token {
    simlayer_testkit::metrics::top(logits) as Token
}
