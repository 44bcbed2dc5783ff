//! Tensors that are elsewhere than their layers: experts with the processor, single matrices on another server.

use std::path::Path;

use simlayer::{FitTarget, Model, ModelParams, SessionParams, TensorOverride, fit, ggml::Device};
use simlayer_testkit::{RandomDecoder, Rng, Shape, WeightType, metrics::mean_kl};

use super::{MAX_KL, Proxy, as_servers, connect, count, load_here, logits, plain, run, servers};

const N_LAYER: usize = 4;
const N_VOCAB: usize = 600;

fn random_qwen3moe(path: &Path, ty: WeightType) {
    let shape = Shape { n_layer: N_LAYER, n_vocab: N_VOCAB, weight_type: ty, expert_type: ty, ..Shape::default() };
    let mut model = RandomDecoder::new("qwen3moe", shape);
    model.key("expert_feed_forward_length", 64u32);
    model.key("context_length", 65_536u32);
    model.expert_keys();
    for layer in model.layers() {
        model.pre_norms(layer);
        model.attention(layer);
        model.head_norms(layer);
        model.experts(layer, 64);
    }
    model.write(path);
}

fn load(path: &Path, devices: &[Device], overrides: &[TensorOverride]) -> Model {
    let params = ModelParams {
        devices: Some(devices.to_vec()),
        tensor_overrides: overrides.to_vec(),
        repack: false,
        ..ModelParams::default()
    };
    Model::load(path, &params).unwrap_or_else(|error| panic!("{error}"))
}

fn on(pattern: &str, device: Device) -> TensorOverride {
    TensorOverride { pattern: pattern.to_owned(), device }
}

fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Wherever tensors are, the logits are those of all of them on one device; and each is where it was to be.
#[test]
fn logits_do_not_depend_on_where_tensors_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let (_servers, devices) = servers(2);
    let [first, second] = devices[..] else { panic!("two devices") };
    let is_expert = |name: &str| name.contains("_exps");
    let mut first_wins = vec![on("blk\\.1\\.ffn_down_exps", second)];
    first_wins.push(TensorOverride::experts());
    type Expected<'a> = Box<dyn Fn(&str) -> Device + 'a>;
    let cases: [(&str, Vec<TensorOverride>, Expected<'_>); 5] = [
        ("-ncmoe 2", TensorOverride::experts_of_first(2), {
            Box::new(move |name| if is_expert(name) && layer_of(name) < Some(2) { Device::cpu() } else { first })
        }),
        ("-cmoe", vec![TensorOverride::experts()], {
            Box::new(move |name| if is_expert(name) { Device::cpu() } else { first })
        }),
        ("-ot exps=RPC1", vec![on("exps", second)], {
            Box::new(move |name| if is_expert(name) { second } else { first })
        }),
        ("-ot: the first that matches", first_wins, {
            Box::new(move |name| match name {
                "blk.1.ffn_down_exps.weight" => second,
                name if is_expert(name) => Device::cpu(),
                _ => first,
            })
        }),
        ("-ot: a layer's attention and norms", vec![on(r"^blk\.(0|3)\.(?!ffn_.*_exps)", Device::cpu())], {
            Box::new(move |name| match layer_of(name) {
                Some(0 | 3) if !is_expert(name) => Device::cpu(),
                _ => first,
            })
        }),
    ];
    for ty in [WeightType::F32, WeightType::Q8_0] {
        random_qwen3moe(&path, ty);
        let mut rng = Rng::new(11);
        let (prompt, decoded) = (rng.tokens(150, N_VOCAB), rng.tokens(8, N_VOCAB));
        let expected = logits(&load(&path, &[first], &[]), &as_servers(), &prompt, &decoded);
        let here = logits(&load_here(&path), &as_servers(), &prompt, &decoded);
        assert!(mean_kl(&expected, &here) < MAX_KL, "one server and the processor differ");
        for (name, overrides, place) in &cases {
            let model = load(&path, &[first], overrides);
            assert!((0..N_LAYER).all(|layer| model.layer_device(layer) == first), "{name}: caches move");
            let mut n_moved = 0;
            for tensor in model.tensors() {
                let wanted = if tensor.name == "token_embd.weight" { Device::cpu() } else { place(&tensor.name) };
                assert_eq!(tensor.device, wanted, "{name}: {}", tensor.name);
                n_moved += usize::from(tensor.overridden);
            }
            let kl = mean_kl(&expected, &logits(&model, &as_servers(), &prompt, &decoded));
            println!("{ty:?}, {name}: {n_moved} of {} tensors moved, mean KL {kl:.3e}", model.tensors().len());
            assert!(n_moved > 0 && kl < 1e-9, "{ty:?}, {name}: {n_moved} moved, mean KL {kl}");
        }
        // With our own kernels for what the processor has.
        let model = load(&path, &[first], &[TensorOverride::experts()]);
        let mut params = plain();
        params.n_threads = 1;
        let kl = mean_kl(&expected, &logits(&model, &params, &prompt, &decoded));
        println!("{ty:?}, our own kernels: mean KL {kl:.3e}");
        // Activations of quantised experts are rounded elsewhere, which tips the choice of some.
        assert!(ty != WeightType::F32 || kl < MAX_KL, "mean KL {kl}");
    }
}

/// A product is where its weight is: of experts with the processor a step sends activations, and never weights.
#[test]
fn activations_are_sent_and_no_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    random_qwen3moe(&path, WeightType::F32);
    let (servers, _) = servers(1);
    let proxy = Proxy::before(&servers[0]);
    let devices = connect(&proxy.address);
    let tokens = Rng::new(12).tokens(40, N_VOCAB);
    let mut sent = Vec::new();
    for overrides in [vec![], vec![TensorOverride::experts()]] {
        let model = load(&path, &devices, &overrides);
        let mut session = super::session(&model, as_servers());
        session.prefill(&tokens[..30]).expect("prefill");
        session.decode(tokens[30]).expect("decode");
        let before = count(&[&proxy]);
        for &token in &tokens[31..] {
            session.decode(token).expect("decode");
        }
        sent.push((count(&[&proxy]) - before) / 9);
    }
    // Of each layer: what the experts read, whom to take and how they weigh, and what they give (n_embd 64, 2 of 6 experts);
    // and a graph's header for each border, which is sent anew. The experts of one layer have 3 × 64 × 64 × 6 elements.
    println!("{} bytes a token with all on the server, {} with the experts here", sent[0], sent[1]);
    let of_experts = 4 * 3 * 64 * 64 * 6;
    assert!(sent[1] > sent[0] && sent[1] - sent[0] < of_experts, "{sent:?}: weights of a layer are {of_experts} bytes");
}

/// What does not fit goes to the processor: the context first, then experts, then layers. With the program, which says so.
#[test]
fn what_does_not_fit_is_fitted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    random_qwen3moe(&path, WeightType::F32);
    let (_servers, devices) = servers(1);
    let free = devices[0].memory().0;
    let model = ModelParams { devices: Some(devices), ..ModelParams::default() };
    let mut session = SessionParams { n_ctx: 1024, ..plain() };
    // 4 layers, 2 heads of 16, keys and values in f16: 512 bytes a token.
    let caches = 1024 * 512;
    let left = |bytes: usize| FitTarget { margins: vec![free - bytes], ..FitTarget::default() };
    let places = |params: &ModelParams| Model::tensors_of(&path, params).expect("a header");
    let on_device: usize = places(&model).iter().filter(|place| place.device != Device::cpu()).map(|t| t.bytes).sum();
    let experts: usize = places(&model).iter().filter(|t| t.name.contains("exps")).map(|t| t.bytes).sum();
    let of_layer = experts / N_LAYER;
    let fitted = |session: &SessionParams, bytes: usize| fit(&path, &model, session, &left(bytes)).expect("a header");
    let all = on_device + caches;
    let options = |bytes: usize| fitted(&session, bytes).options;
    assert_eq!(options(all), Vec::<String>::new());
    assert_eq!(options(all - 1), ["-ncmoe 1"]);
    assert_eq!(options(all - of_layer), ["-ncmoe 1"]);
    assert_eq!(options(all - of_layer - 1), ["-ncmoe 2"]);
    assert_eq!(options(all - experts), ["-ncmoe 4"]);
    let less = fitted(&session, all - experts - 1);
    assert!(less.fits && less.options[..] == ["-ncmoe 4", "-ngl 4"], "{:?}", less.options);
    assert_eq!(places(&less.model).iter().filter(|place| place.overridden).count(), 3 * N_LAYER);
    // Nothing is moved that the user has placed, and a context that was asked for stays.
    let kept = fit(&path, &model, &session, &FitTarget { moves: false, ..left(all - 1) }).expect("a header");
    assert!(!kept.fits && kept.options.is_empty(), "{:?}", kept.options);
    // As many tokens as the model was trained for: as many as fit, in steps of 256.
    session.n_ctx = 0;
    assert_eq!(fitted(&session, on_device + 512 * 10_000).options, ["-c 9984"]);
    // Lazy caches are counted: with all layers lazy the rings are the same at any length.
    session.lazy.policy = "layers:0,1,2,3".parse().expect("a policy");
    session.lazy.prefill = Some(simlayer::lazy::PrefillMode::Window);
    assert_eq!(fitted(&session, on_device + 512 * 10_000).options, Vec::<String>::new());

    let path = path.to_str().expect("UTF-8");
    let small = super::Server::start(&["--mem", "12"]);
    let common = ["-m", path, "--rpc", &small.address, "-fitt", "1", "-c", "8192"];
    let (code, stdout, stderr) = run(&[&["devices", "--plan", "--json"][..], &common].concat());
    assert_eq!(code, Some(0), "{stderr}");
    let plan: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(plan["fit"]["fits"], true, "{}", plan["fit"]);
    let on_cpu = |plan: &serde_json::Value| {
        let tensors = plan["tensors"].as_array().expect("a list");
        tensors.iter().filter(|tensor| tensor["device"] == "CPU").count()
    };
    assert_eq!(on_cpu(&plan), 1, "the embeddings alone");
    let (code, stdout, stderr) = run(&[&["devices", "--plan", "--json", "-ncmoe", "3"][..], &common].concat());
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(on_cpu(&serde_json::from_str(&stdout).expect("JSON")), 1 + 3 * 3);
    // A server that has room for less: what a run moves, it says.
    drop(small);
    let small = super::Server::start(&["--mem", "3"]);
    let common = ["-m", path, "--rpc", &small.address, "-fitt", "2", "-c", "1024"];
    let (code, _, stderr) = run(&[&["-p", "a", "-n", "2", "--verbose", "--ignore-eos"][..], &common].concat());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("to fit the devices' free memory: -ncmoe "), "{stderr}");
    assert!(
        stderr.contains("blk.0.ffn_up_exps.weight: f32, 96.00 KiB on CPU (file, by --override-tensor)"),
        "{stderr}"
    );
    let wrong = |options: &[&str]| run(&[options, &["-p", "a", "-n", "1", "-m", path]].concat());
    let (code, _, stderr) = wrong(&["-ot", "exps=XPU"]);
    assert!(code == Some(2) && stderr.contains("there is no XPU here"), "{code:?} {stderr}");
    let (code, _, stderr) = wrong(&["-ot", "exps(=CPU"]);
    assert!(code == Some(1) && stderr.contains("exps(: no pattern of tensors' names"), "{code:?} {stderr}");
}
