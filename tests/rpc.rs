//! Layers and caches on memory that this process cannot read: devices of ggml's RPC servers, each a process of its own
//! on loopback.

#![cfg(feature = "rpc")]

mod common;
#[path = "rpc/placement.rs"]
mod placement;
#[path = "rpc/steps.rs"]
mod steps;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use common::{company::check_company, ggmls_attention, logits, plain, session, story, top};
use simlayer::{
    BatchEntry, Model, ModelParams, Outputs, Session, SessionParams, Token,
    ggml::{self, Device, Type},
    lazy::{At, PrefillMode},
};
use simlayer_testkit::{
    RandomModel, Rng, WeightType,
    metrics::{kl, mean_kl},
    smollm2_path,
};

/// The bound on the mean KL to the processor's logits, as in the tests against llama.cpp.
const MAX_KL: f64 = 1e-4;

/// A server on a port of its own; killed at the end.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(options: &[&str]) -> Server {
        // The port is free now; should another program take it meanwhile, the next try has another one.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
            let mut command = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
            command.args(["rpc-server", "-t", "1", "-p", &port.to_string()]).args(options);
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the server starts");
            let mut server = Server { child, address: format!("127.0.0.1:{port}") };
            let deadline = Instant::now() + Duration::from_secs(30);
            while server.child.try_wait().expect("a state").is_none() && Instant::now() < deadline {
                if TcpStream::connect(&server.address).is_ok() {
                    return server;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        panic!("no server listens");
    }

    fn resident(&self) -> Option<i64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()? * 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn servers(n: usize) -> (Vec<Server>, Vec<Device>) {
    let servers: Vec<Server> = (0..n).map(|_| Server::start(&["--mem", "4096"])).collect();
    let devices = servers.iter().flat_map(|server| connect(&server.address)).collect();
    (servers, devices)
}

fn connect(address: &str) -> Vec<Device> {
    ggml::rpc::connect(address).unwrap_or_else(|error| panic!("{error}"))
}

/// The model with the last `layers` (the output counts as one) shared out evenly over the devices.
fn load_on(path: &Path, devices: &[Device], layers: Option<usize>) -> Model {
    let params = ModelParams {
        devices: Some(devices.to_vec()),
        tensor_split: vec![1.0; devices.len()],
        gpu_layers: layers,
        ..ModelParams::default()
    };
    Model::load(path, &params).unwrap_or_else(|error| panic!("{error}"))
}

/// ggml's kernels with one thread, as the servers here have: with another number ggml's flash attention rounds otherwise.
fn as_servers() -> SessionParams {
    let mut params = ggmls_attention();
    params.n_threads = 1;
    params
}

/// The same without any device, and with the weights as the file has them: so has a server.
fn load_here(path: &Path) -> Model {
    let mut params = ModelParams::default();
    (params.devices, params.repack) = (Some(Vec::new()), false);
    Model::load(path, &params).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn logits_are_the_processors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let (_servers, devices) = servers(2);
    let base = RandomModel::default;
    let models = [
        ("f32", base()),
        ("biases", RandomModel { qkv_bias: true, attn_out_bias: true, ffn_bias: true, n_layer: 3, ..base() }),
        ("RoPE factors, tied", RandomModel { rope_freqs: true, tied: true, ..base() }),
        ("sliding window", RandomModel { sliding_window: Some(48), ..base() }),
        ("q8_0", RandomModel { weight_type: WeightType::Q8_0, head_size: 64, ..base() }),
        ("q4_0", RandomModel { weight_type: WeightType::Q4_0, ..base() }),
    ];
    for (name, random) in models {
        random.write(&path);
        let mut rng = Rng::new(7);
        let (prompt, decoded) = (rng.tokens(300, random.n_vocab()), rng.tokens(20, random.n_vocab()));
        let here = load_here(&path);
        // Whole prompts, layer by layer, and ubatch by ubatch without flash attention.
        let mut pieces = as_servers();
        (pieces.layer_major, pieces.n_ubatch, pieces.flash_attn) = (false, 70, false);
        let mut by_layer = as_servers();
        by_layer.n_ubatch = 64;
        for n in [1, 2] {
            let there = load_on(&path, &devices[..n], None);
            assert_eq!(there.devices(), devices[..n], "{name}");
            for params in [as_servers(), pieces.clone(), by_layer.clone()] {
                let expected = logits(&here, &params, &prompt, &decoded);
                let kl = mean_kl(&expected, &logits(&there, &params, &prompt, &decoded));
                println!("{name}, {n} servers: mean KL {kl:.3e}");
                assert!(kl < MAX_KL, "{name}, {n} servers: mean KL {kl}");
            }
        }
    }
}

/// Some layers here, with our own kernels, and some there.
#[test]
fn layers_here_and_there_go_together() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 4, ..RandomModel::default() };
    random.write(&path);
    let (_servers, devices) = servers(2);
    let mut rng = Rng::new(8);
    let (prompt, decoded) = (rng.tokens(200, random.n_vocab()), rng.tokens(10, random.n_vocab()));
    let expected = logits(&load_here(&path), &plain(), &prompt, &decoded);
    for layers in 1..=5 {
        let there = load_on(&path, &devices, Some(layers));
        let kl = mean_kl(&expected, &logits(&there, &plain(), &prompt, &decoded));
        println!("{layers} there: mean KL {kl:.3e}");
        assert!(kl < MAX_KL, "{layers} there: mean KL {kl}");
    }
}

/// Scores, shrinking, rotation, rings, copies and states: all on the servers.
#[test]
fn lazy_layers_are_those_of_the_processor() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 6, ..RandomModel::default() };
    random.write(&path);
    let (_servers, devices) = servers(2);
    let (here, there) = (load_here(&path), load_on(&path, &devices, None));
    let mut rng = Rng::new(9);
    let turns: Vec<Vec<Token>> = [400, 170].iter().map(|&n| rng.tokens(n, random.n_vocab())).collect();
    for (policy, ty, layer_major, at) in [
        ("budget:0.5", Type::F16, true, At::Prefill),
        ("budget:0.5", Type::Q4_0, true, At::Prefill),
        ("threshold:0.15", Type::Q8_0, false, At::Prefill),
        ("layers:0,3,5", Type::Q4_0, false, At::Prefill),
        ("budget:0.7", Type::Q4_0, false, At::Decode),
        ("output:0.5", Type::Q4_0, true, At::Prefill),
        ("output:0.5", Type::F16, false, At::Prefill),
    ] {
        let run = |model: &Model| {
            let mut params = as_servers();
            params.lazy.policy = policy.parse().expect("a policy");
            // With the sink 256 rows, which devices round up to.
            (params.lazy.n_window, params.lazy.at, params.layer_major) = (252, at, layer_major);
            (params.type_k, params.type_v, params.n_ubatch) = (ty, ty, 128);
            let mut session = session(model, params);
            let mut rows = Vec::new();
            for turn in &turns {
                rows.push(session.prefill(turn).expect("prefill").to_vec());
                for &token in &turn[..10] {
                    rows.push(session.decode(token).expect("decode").to_vec());
                }
            }
            // A copy, and a state that comes back, go on alike.
            assert!(session.seq_copy(0, 1, session.n_past()).expect("copied"));
            let mut state = Vec::new();
            session.save_seq(0, &mut state).expect("saved");
            session.load_seq(2, &state).expect("loaded");
            for seq in 0..3 {
                let entry = BatchEntry { seq, tokens: &turns[0][..1], outputs: Outputs::Last, prompt_end: false };
                session.run(&[entry]).expect("decode");
                rows.push(session.logits().to_vec());
            }
            let [.., first, second, third] = &rows[..] else { panic!("three rows") };
            assert!(kl(first, second) < 1e-9 && kl(first, third) < 1e-9, "{policy}: a copy goes on otherwise");
            (rows, session.layers(0), session.kv())
        };
        let ((expected, layers, kv), (rows, layers_there, kv_there)) = (run(&here), run(&there));
        for (layer, other) in layers.iter().zip(&layers_there) {
            assert_eq!(layer.lazy, other.lazy, "{policy}: layer {}", layer.index);
            let [score, other] = [layer.score, other.score].map(Option::unwrap_or_default);
            assert!((score - other).abs() < 0.005, "{policy}, layer {}: {score} and {other}", layer.index);
        }
        let n_lazy = layers.iter().filter(|layer| layer.lazy).count();
        let kl = mean_kl(&expected, &rows);
        println!("{policy}, {ty}: {n_lazy} lazy, mean KL {kl:.3e}");
        assert!(n_lazy > 0 && kl < MAX_KL, "{policy}, {ty}: {n_lazy} lazy, mean KL {kl}");
        assert_eq!(kv.allocated_bytes, kv_there.allocated_bytes, "{policy}: {kv:?}, {kv_there:?}");
    }
}

#[test]
fn two_servers_say_the_tokens_of_one_process() {
    let (_servers, devices) = servers(2);
    let greedy = |model: &Model| {
        let mut session = session(model, as_servers());
        let mut token = top(session.prefill(&story(model, 60)).expect("prefill"));
        let mut tokens = vec![token];
        for _ in 0..23 {
            token = top(session.decode(token).expect("decode"));
            tokens.push(token);
        }
        tokens
    };
    let there = load_on(&smollm2_path(), &devices, None);
    assert!((0..30).all(|layer| there.layer_device(layer) == devices[usize::from(layer > 15)]));
    assert_eq!(greedy(&there), greedy(&load_here(&smollm2_path())));
}

/// Passes bytes on to a server and counts them.
struct Proxy {
    address: String,
    bytes: Arc<AtomicU64>,
}

impl Proxy {
    fn before(server: &Server) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let bytes = Arc::new(AtomicU64::new(0));
        let (target, counter) = (server.address.clone(), Arc::clone(&bytes));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(&target)) else { return };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().expect("a handle"), to.try_clone().expect("a handle"));
                    to.set_nodelay(true).expect("set");
                    let counter = Arc::clone(&counter);
                    std::thread::spawn(move || pass_on(from, to, &counter));
                }
            }
        });
        Proxy { address, bytes }
    }
}

/// Bytes that went either way so far.
fn count(proxies: &[&Proxy]) -> u64 {
    proxies.iter().map(|proxy| proxy.bytes.load(Ordering::SeqCst)).sum()
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        counter.fetch_add(n as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    // The other side has ended; so does this one.
    let _ = to.shutdown(Shutdown::Both);
}

/// Hidden states are sent, not caches, and no masks: whatever the depth, a token takes as many bytes.
#[test]
fn what_a_token_sends_does_not_grow_with_the_context() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let (servers, _) = servers(2);
    // Bytes of a token at both depths, by hidden size.
    let mut sent = Vec::new();
    for n_embd in [128, 512] {
        let random = RandomModel { n_layer: 4, n_embd, n_ff: 128, n_ctx_train: 8192, ..RandomModel::default() };
        random.write(&path);
        let proxies = [Proxy::before(&servers[0]), Proxy::before(&servers[1])];
        let devices: Vec<Device> = proxies.iter().flat_map(|proxy| connect(&proxy.address)).collect();
        let model = load_on(&path, &devices, None);
        let mut params = plain();
        // One layer of each server keeps a ring, of 256 rows from the beginning on.
        params.lazy.policy = "layers:1,3".parse().expect("a policy");
        (params.lazy.n_window, params.lazy.n_slack) = (64, 128);
        let mut session = session(&model, params);
        let tokens = Rng::new(2).tokens(3_100, random.n_vocab());
        let count = || count(&[&proxies[0], &proxies[1]]);
        let mut at_depth = |depth: usize| {
            session.clear();
            session.prefill(&tokens[..depth]).expect("prefill");
            session.decode(tokens[depth]).expect("decode");
            // The graph is there: every 256 tokens it is sent anew.
            let before = count();
            for &token in &tokens[depth + 1..depth + 21] {
                session.decode(token).expect("decode");
            }
            (count() - before) / 20
        };
        sent.push([at_depth(100), at_depth(3_000)]);
        let [shallow, deep] = sent[sent.len() - 1];
        let payload = 4 * (n_embd * 3 + random.n_vocab()) as u64;
        println!(
            "n_embd {n_embd}: {shallow} bytes at depth 100, {deep} at 3000; embedding, hidden state (twice), logits {payload}"
        );
        assert!(deep <= shallow + 16, "{deep} bytes at depth 3000, {shallow} at 100");
        // Beside the payload: positions, row numbers, and the headers of a few dozen messages.
        assert!(deep < payload + 16_384, "{deep} bytes for a payload of {payload}");
    }
    let grown = sent[1][1] as i64 - sent[0][1] as i64;
    assert!((grown - 3 * 4 * (512 - 128)).abs() <= 64, "with the hidden size a token's bytes grow by {grown}");
}

/// Rows go back to the system when layers become lazy, on each server.
#[test]
fn memory_of_each_server_falls_when_layers_shrink() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 4, n_embd: 128, n_head_kv: 8, head_size: 64, ..RandomModel::default() };
    random.write(&path);
    let (servers, devices) = servers(2);
    let model = load_on(&path, &devices, None);
    let mut params = plain();
    params.lazy.policy = "layers:0,3".parse().expect("a policy");
    (params.lazy.prefill, params.lazy.n_window, params.layer_major) = (Some(PrefillMode::Full), 64, false);
    let mut session = session(&model, params);
    let tokens = Rng::new(3).tokens(2_000, random.n_vocab());
    session.run(&[BatchEntry { seq: 0, tokens: &tokens, outputs: Outputs::None, prompt_end: false }]).expect("read");
    let memory = || -> Vec<(i64, Option<i64>)> {
        let each = devices.iter().zip(&servers);
        each.map(|(device, server)| (device.memory().0 as i64, server.resident())).collect()
    };
    let (before, kv_before) = (memory(), session.kv().allocated_bytes);
    assert_eq!(session.decide_now(0).expect("decided"), Some(2));
    let (after, kv_after) = (memory(), session.kv().allocated_bytes);
    // Two of four layers with equal caches, one on each server.
    let expected = (kv_before - kv_after) as i64 / 2;
    assert!(expected > 3_000_000, "{expected}");
    for ((free, resident), (free_after, resident_after)) in before.into_iter().zip(after) {
        println!(
            "{expected} bytes expected, {} are free again, resident {resident:?} -> {resident_after:?}",
            free_after - free
        );
        // Intermediate results of moving rows stay with the session.
        assert!(free_after - free > expected - (2 << 20), "{} bytes are free again", free_after - free);
        if let (Some(before), Some(after)) = (resident, resident_after) {
            assert!(before - after > expected * 7 / 10, "{before} bytes were resident, {after} are");
        }
    }
}

/// Wherever the border between two devices is, no more than a piece of the hidden states is held twice.
#[test]
fn hidden_states_move_in_pieces() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    // Hidden states that outweigh the caches.
    let random = RandomModel { n_layer: 4, n_embd: 512, n_head: 4, n_ff: 64, ..RandomModel::default() };
    random.write(&path);
    let (_servers, devices) = servers(2);
    let tokens = Rng::new(6).tokens(2_000, random.n_vocab());
    for split in [[1.0, 4.0], [3.0, 2.0], [4.0, 1.0]] {
        let mut params = ModelParams::default();
        (params.devices, params.tensor_split) = (Some(devices.clone()), split.to_vec());
        let model = Model::load(&path, &params).unwrap_or_else(|error| panic!("{error}"));
        let mut params = plain();
        params.lazy.policy = "layers:1,3".parse().expect("a policy");
        (params.lazy.n_window, params.n_ubatch) = (64, 128);
        let mut session = session(&model, params);
        session.prefill(&tokens).expect("prefill");
        let kv = session.kv();
        let one_layer = tokens.len().next_multiple_of(256) * 2 * 2 * random.n_head_kv * random.head_size;
        let hidden = tokens.len() * random.n_embd * 4;
        let bound = kv.allocated_bytes + one_layer + hidden;
        println!("{split:?}: peak {} of {bound} allowed, hidden states {hidden}", kv.peak_bytes);
        assert!(kv.peak_bytes <= bound, "{split:?}: {kv:?}, bound {bound}");
    }
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
    let output = command.args(arguments).stdin(Stdio::null()).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// An endless run of the program whose server is killed.
#[test]
fn a_lost_server_is_an_error_and_no_hang() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    RandomModel { n_ctx_train: 100_000, ..RandomModel::default() }.write(&path);
    let mut server = Server::start(&[]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
    command.arg("-m").arg(&path).args(["-p", "a", "-n", "90000", "--ignore-eos", "-t", "1", "--rpc", &server.address]);
    let mut program = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut stdout = program.stdout.take().expect("a pipe");
    stdout.read_exact(&mut [0; 8]).expect("it generates");
    // What else it writes must not fill the pipe.
    let drain = std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
    let start = Instant::now();
    server.child.kill().expect("killed");
    let output = program.wait_with_output().expect("it ends");
    let (took, stderr) = (start.elapsed(), String::from_utf8_lossy(&output.stderr));
    drain.join().expect("drained").expect("read");
    println!("code {:?} after {:.2} s: {}", output.status.code(), took.as_secs_f64(), stderr.trim());
    assert!(took < Duration::from_secs(10), "it took {took:?}");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains(&format!("error: the connection to remote server {} was lost", server.address)),
        "{stderr}"
    );
}

#[test]
fn a_server_that_is_not_there_or_has_no_room_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 4, n_embd: 512, ..RandomModel::default() };
    random.write(&path);
    let path = path.to_str().expect("UTF-8");

    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").to_string();
    let (code, _, stderr) = run(&["-m", path, "-p", "a", "-n", "1", "--rpc", &free]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains(&format!("remote server {free}: cannot connect")), "{stderr}");

    let small = Server::start(&["--mem", "2"]);
    let (code, _, stderr) = run(&["-m", path, "-p", "a", "-n", "1", "--fit", "off", "--rpc", &small.address]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("out of memory") && stderr.contains("weights"), "{stderr}");

    // The server gave everything back, and is there for the next client.
    let [device] = connect(&small.address)[..] else { panic!("one device") };
    assert_eq!(device.memory(), (2 << 20, 2 << 20));
}

#[test]
fn devices_are_listed_and_planned_for() {
    let server = Server::start(&["--mem", "100"]);
    let path = smollm2_path();
    let path = path.to_str().expect("UTF-8");
    let plan = |options: &[&str]| -> serde_json::Value {
        let mut arguments = vec!["devices", "--json", "--plan", "-m", path, "-c", "4096", "--rpc", &server.address];
        arguments.extend(options);
        let (code, stdout, stderr) = run(&arguments);
        assert_eq!(code, Some(0), "{stderr}");
        serde_json::from_str(&stdout).expect("JSON")
    };
    let all = plan(&["--lazy", "budget:0.5", "--lazy-type", "f16"]);
    let devices = all["devices"].as_array().expect("a list");
    let remote = devices.iter().find(|device| device["name"] == "RPC0").expect("the server's");
    assert_eq!((remote["kind"].as_str(), remote["total_bytes"].as_u64()), (Some("gpu"), Some(100 << 20)));
    let [here, there] = &all["plan"].as_array().expect("a list")[..] else { panic!("two devices: {all}") };
    assert_eq!((here["layers"].as_array().map(Vec::len), here["output"].as_bool()), (Some(0), Some(false)));
    assert_eq!((there["layers"].as_array().map(Vec::len), there["output"].as_bool()), (Some(30), Some(true)));
    // 30 layers, keys and values, 3 heads of 64, f16; half of the layers keep 1028 rows of 4096 and 252 of the slack of
    // 256, in 1280 rows: a multiple of 256.
    let full = 30 * 2 * 192 * 2 * 4096_u64;
    assert_eq!(there["kv_bytes"].as_u64(), Some(full));
    assert_eq!(there["lazy_kv_bytes"].as_u64(), Some(full / 2 + full / 2 * 1280 / 4096));
    let half = plan(&["-ngl", "16", "--lazy", "auto"]);
    assert_eq!(half["plan"][1]["layers"].as_array().map(Vec::len), Some(15));
    assert_eq!(half["plan"][1]["lazy_kv_bytes"], serde_json::Value::Null);
    let weights = |plan: &serde_json::Value| -> Vec<u64> {
        (0..2).map(|i| plan["plan"][i]["weight_bytes"].as_u64().expect("bytes")).collect()
    };
    assert!(weights(&half)[0] > weights(&all)[0] && weights(&half)[1] < weights(&all)[1]);
}

/// A session whose memory is freed does not disturb another one on the same server.
#[test]
fn sessions_share_a_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel::default();
    random.write(&path);
    let (_servers, devices) = servers(1);
    let model = load_on(&path, &devices, None);
    let tokens = Rng::new(4).tokens(60, random.n_vocab());
    let start = |params: SessionParams| -> Session {
        let mut session = session(&model, params);
        session.prefill(&tokens).expect("prefill");
        session
    };
    let expected: Vec<Vec<f32>> = {
        let mut alone = start(plain());
        tokens[..6].iter().map(|&token| alone.decode(token).expect("decode").to_vec()).collect()
    };
    let mut first = start(plain());
    for (i, &token) in tokens[..6].iter().enumerate() {
        // ggml's server forgets its graphs when anything is freed.
        let other = start(plain());
        if i % 2 == 0 {
            drop(other);
        }
        let row = first.decode(token).expect("decode").to_vec();
        assert!(kl(&expected[i], &row) < 1e-9, "token {i}");
    }
}
