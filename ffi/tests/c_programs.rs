//! C programs on the library that `cargo xtask dist` makes: what it exports, what it does, what it survives.
//!
//! `SIMLAYER_DIST` names the folder (`cargo xtask test` sets it). Without it the tests are skipped, or fail where `CI` is
//! set, as `cargo xtask test` does. The programs are compiled with AddressSanitizer, which
//! then watches the library's allocations as well.

use std::{
    collections::BTreeSet,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use simlayer::{AddBos, LayerKind, Session, SessionParams, Special, ggml::Type};
use simlayer_testkit::{
    Logits, RandomLora, RandomModel, Rng, UpstreamRef, Vocabulary,
    metrics::{kl, read_rows, top},
    pre_tokenizers_by_expressions, smollm2_path, workspace_root,
};
use tempfile::TempDir;

/// The folder with the library, or a loud nothing; on the machine that checks everything it must be there.
fn dist() -> Option<PathBuf> {
    let todo = "run `cargo xtask dist`, then set SIMLAYER_DIST to the folder that it names";
    let Some(dist) = std::env::var_os("SIMLAYER_DIST").map(PathBuf::from) else {
        assert!(std::env::var_os("CI").is_none(), "no library to test: {todo}");
        eprintln!("SKIPPED: {todo}");
        return None;
    };
    let library = dist.join("lib/libllama.so.0");
    assert!(library.is_file(), "{} is missing: {todo}", library.display());
    Some(dist)
}

struct Programs {
    dist: PathBuf,
    folder: TempDir,
}

impl Programs {
    fn new() -> Option<Programs> {
        Some(Programs { dist: dist()?, folder: tempfile::tempdir().expect("a folder") })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A small model with random weights.
    fn model(&self) -> String {
        let path = self.path().join("random.gguf");
        RandomModel::default().write(&path);
        path.display().to_string()
    }

    /// A small model with the named pre-tokenizer.
    fn model_with(&self, pre: &str) -> String {
        let path = self.path().join(pre).with_extension("gguf");
        let mut file = RandomModel { vocabulary: Vocabulary::Bpe, ..RandomModel::tiny() }.gguf();
        file.set("tokenizer.ggml.pre", pre).write(&path);
        path.display().to_string()
    }

    /// Compiles `ffi/tests/c/NAME.c`.
    fn build(&self, name: &str, flags: &[&str]) -> PathBuf {
        let program = self.path().join(name);
        let lib = self.dist.join("lib");
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]).args(flags);
        cc.arg(format!("-I{}", self.dist.join("include").display()));
        cc.arg(workspace_root().join("ffi/tests/c").join(name).with_extension("c")).arg("-o").arg(&program);
        cc.arg("-L").arg(&lib).arg(format!("-Wl,-rpath,{}", lib.display()));
        succeed(cc.args(["-lllama", "-lggml", "-lggml-cpu", "-lggml-rpc", "-lggml-base", "-lpthread", "-lm"]));
        program
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> String {
        let output = succeed(Command::new(program).args(arguments).env_remove("SIMLAYER_LAZY"));
        String::from_utf8(output.stdout).expect("text")
    }

    fn check(&self, name: &str, arguments: &[&str]) {
        let program = self.build(name, &["-fsanitize=address"]);
        assert_eq!(self.run(&program, arguments), "ok\n");
    }
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    output
}

/// The functions that a header declares.
fn declared(dist: &Path, header: &str, prefix: &str) -> BTreeSet<String> {
    let mut cc = Command::new("cc");
    cc.args(["-E", "-P", "-x", "c", "-include", header, "/dev/null"]).arg("-I").arg(dist.join("include"));
    let text = String::from_utf8(succeed(&mut cc).stdout).expect("text");
    let mut names = BTreeSet::new();
    for word in text.split(|c: char| c.is_whitespace() || "*,;){}".contains(c)) {
        if let Some((name, _)) = word.split_once('(')
            && name.starts_with(prefix)
        {
            names.insert(name.to_owned());
        }
    }
    // A name apart from its parenthesis.
    for (at, _) in text.match_indices(" (") {
        let name = text[..at].trim_end().rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next();
        names.extend(name.filter(|name| name.starts_with(prefix)).map(str::to_owned));
    }
    names
}

#[test]
fn exports_are_llama_cpps_and_simlayers() {
    let Some(dist) = dist() else { return };
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "--format=just-symbols"]).arg(dist.join("lib/libllama.so.0"));
    let text = String::from_utf8(succeed(&mut nm).stdout).expect("text");
    let found: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let (cpp, c): (BTreeSet<_>, BTreeSet<_>) = found.into_iter().partition(|name| name.starts_with("_Z"));
    let llama = declared(&dist, "llama.h", "llama_");
    let simlayer = declared(&dist, "simlayer.h", "simlayer_");
    assert_eq!((llama.len(), cpp.len(), simlayer.len()), (255, 14, 9));
    assert_eq!(c, llama.union(&simlayer).cloned().collect());
    assert!(cpp.iter().all(|name| name.contains("llama_")), "{cpp:?}");
}

#[test]
fn sequences() {
    let Some(programs) = Programs::new() else { return };
    programs.check("sequences", &[&programs.model()]);
}

/// What llama-server does with conversations, with lazy layers; `cargo xtask frontends` has the server itself.
#[test]
fn turns() {
    let Some(programs) = Programs::new() else { return };
    let model = programs.path().join("random.gguf");
    RandomModel { n_layer: 4, ..RandomModel::default() }.write(&model);
    programs.check("turns", &[&model.display().to_string(), "120"]);
}

#[test]
fn hostile_callers() {
    let Some(programs) = Programs::new() else { return };
    programs.check("hostile", &[&programs.model(), "100000"]);
}

#[test]
fn deep_recursion() {
    let Some(programs) = Programs::new() else { return };
    let models = ["gpt-4o", "deepseek-v3"].map(|pre| programs.model_with(pre));
    programs.check("deep", &models.each_ref().map(String::as_str));
}

/// Ten million characters without a break, for one pre-tokenizer of those that split with the same expressions, from a thread with 256 KiB of stack.
#[test]
#[ignore = "takes half an hour: docs/c-abi.md has the command"]
fn runs_for_every_pre_tokenizer() {
    let programs = Programs::new().expect("SIMLAYER_DIST names the library");
    let program = programs.build("runs", &[]);
    for names in pre_tokenizers_by_expressions(ggml_sys::LLAMA_SOURCE).into_values() {
        let Some(pre) = names.iter().find(|&pre| pre != "whitespace") else { continue };
        let said = programs.run(&program, &[&programs.model_with(pre), "10000000"]);
        print!("{pre}: {said}");
        assert!(said.ends_with("ok\n"), "{pre}: {said}");
    }
}

/// Every type that a cache can have.
const CACHE_TYPES: [&str; 9] = ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"];

/// Whatever the types of keys and values, the logits are llama.cpp's bit for bit; what it refuses is refused.
#[test]
fn caches_of_any_type_give_llama_cpps_logits() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.build("logits", &[]);
    let path = |name: &str| programs.path().join(name).display().to_string();
    let rows = path("rows.f32");
    let mut rng = Rng::new(19);
    // Heads of 64 are rotated where they are quantised, those of 32 are not.
    for head_size in [64, 32] {
        let random = RandomModel { head_size, ..RandomModel::default() };
        let model = path(&format!("{head_size}.gguf"));
        random.write(&model);
        let (prompt, fed) = (rng.tokens(200, random.n_vocab()), rng.tokens(10, random.n_vocab()));
        let words = |tokens: &[i32]| tokens.iter().map(i32::to_string).collect::<Vec<_>>();
        let tokens = [words(&prompt), vec!["--".to_owned()], words(&fed)].concat();
        let pairs = CACHE_TYPES.iter().flat_map(|&k| CACHE_TYPES.map(|v| (k, v)));
        for ((k, v), flash_attn) in pairs.flat_map(|pair| [(pair, "on"), (pair, "off")]) {
            let case = format!("heads of {head_size}, {k}, {v}, flash attention {flash_attn}");
            let options = [&*model, flash_attn, k, v, &*rows];
            let arguments: Vec<&str> = options.into_iter().chain(tokens.iter().map(String::as_str)).collect();
            let said = programs.run(&program, &arguments);
            let reference = UpstreamRef::new().with_options(&["-fa", flash_attn, "-t", "1", "-ctk", k, "-ctv", v]);
            // A quantised V needs flash attention.
            if flash_attn == "off" && !matches!(v, "f32" | "f16" | "bf16") {
                assert_eq!(said, "refused\n", "{case}");
                continue;
            }
            assert_eq!(said, "ok\n", "{case}");
            let (prompts, decode) = ([prompt.clone()], [fed.clone()]);
            let what = Logits { prompts: &prompts, all: false, decode: Some(&decode) };
            let theirs = reference.logits(model.as_ref(), what).concat();
            assert_eq!(theirs.len(), random.n_vocab() * (1 + fed.len()));
            let ours = std::fs::read(&rows).expect("the program has written it");
            assert!(ours == theirs.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>(), "{case}");
        }
    }
}

/// What rules make of a prompt on SmolLM2 is the same by the environment, by simlayer.h, and in the library; a profile is
/// found by what the model is.
#[test]
fn rules_by_environment_and_header() {
    let Some(programs) = Programs::new() else { return };
    let path = smollm2_path();
    let model = simlayer::Model::load(&path, &simlayer::ModelParams::default()).expect("SmolLM2");
    let story = std::fs::read_to_string(workspace_root().join("xtask/demo/story.txt")).expect("the story");
    let tokens = model.vocab().tokenize(&story, AddBos::Yes, Special::Text).expect("tokens");
    let tokens: Vec<i32> = tokens.into_iter().cycle().take(2_000).collect();
    let words: Vec<String> = tokens.iter().map(i32::to_string).collect();
    let program = programs.build("lazy", &[]);
    let said = |how: &str, rule: &str, keys: &str| {
        let model = path.display().to_string();
        let arguments: Vec<&str> =
            [&*model, how, rule, keys].into_iter().chain(words.iter().map(String::as_str)).collect();
        let output = succeed(Command::new(&program).args(arguments).env("SIMLAYER_PROFILES", "/no/such/folder"));
        String::from_utf8(output.stdout).expect("text")
    };
    for (rule, keys) in [("auto", "-"), ("auto", "auto"), ("kl:0.05", "-"), ("profile:0.5", "-"), ("off", "auto")] {
        let by_environment = said("environment", rule, keys);
        println!("{rule}, keys {keys}: {}", by_environment.trim_end());
        // Without a rule or keys of its own to begin with, a context has llama.cpp's attention.
        if rule != "off" {
            assert_eq!(by_environment, said("header", rule, keys), "{rule}, keys {keys}");
        }

        let mut params = SessionParams { n_ctx: 4096, n_threads: 2, split_prompts: true, ..SessionParams::default() };
        params.lazy.policy = rule.parse().expect("a rule");
        params.lazy.n_window = 256;
        if keys == "auto" {
            (params.lazy.narrow_keys, params.type_k, params.type_v) = (true, Type::Q8_0, Type::Q4_0);
        }
        let mut session = Session::new(&model, params).expect("a session");
        let mut next = top(session.prefill(&tokens).expect("logits")) as i32;
        let layers = session.layers(0);
        let kinds: String = layers.iter().map(|layer| if layer.kind == LayerKind::Lazy { 'l' } else { '-' }).collect();
        let n_lazy = kinds.matches('l').count();
        let bytes = session.kv().allocated_bytes;
        let foretold = session.foretold(0).unwrap_or(-1.0);
        let mut expected = format!("{kinds} {bytes} {foretold:.6}");
        for _ in 0..8 {
            expected += &format!(" {next}");
            next = top(session.decode(next).expect("logits")) as i32;
        }
        assert_eq!(by_environment.trim_end(), expected, "{rule}, keys {keys}");
        match rule {
            "profile:0.5" => assert_eq!(n_lazy, 15),
            "off" => assert_eq!(n_lazy, 0),
            _ => assert!(n_lazy > 0 && foretold >= 0.0, "nothing was looked at"),
        }
    }
}

/// LoRA adapters on SmolLM2: llama.cpp's logits, whatever is set in between.
#[test]
fn lora_adapters() {
    let Some(programs) = Programs::new() else { return };
    let model = smollm2_path();
    let path = |name: &str| programs.path().join(name).display().to_string();
    let (adapter, rows) = (path("adapter.gguf"), path("rows.f32"));
    let layers = (0..30).flat_map(|layer| {
        let weight = |name: &str, dims: [usize; 2]| (format!("blk.{layer}.{name}.weight"), dims.to_vec());
        [weight("attn_q", [576, 576]), weight("attn_v", [576, 192]), weight("ffn_down", [1536, 576])]
    });
    let random = RandomLora { architecture: "llama", rank: 8, alpha: 16.0, seed: 11, gain: 0.1 };
    random.write(&layers.collect::<Vec<_>>(), &adapter);
    let prompt = Rng::new(12).tokens(60, 49_152);
    let tokens: Vec<String> = prompt.iter().map(i32::to_string).collect();
    let program = programs.build("lora", &[]);
    let arguments = [&*model.display().to_string(), &adapter, &rows].map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().chain(&tokens).map(String::as_str).collect();
    assert_eq!(programs.run(&program, &arguments), "ok\n");
    let ours = read_rows(rows.as_ref(), 49_152);
    let theirs = |scales: &[&str]| {
        let mut reference = UpstreamRef::new();
        for scale in scales {
            reference = reference.with_options(&["--lora-scaled", &format!("{adapter}:{scale}")]);
        }
        let what = Logits { prompts: std::slice::from_ref(&prompt), all: false, decode: None };
        reference.logits(&model, what).remove(0)
    };
    let expected = [&[][..], &["1"], &["1"], &["0.25", "0.25"], &[]].map(theirs);
    assert_eq!(ours.len(), expected.len());
    for (ours, theirs) in ours.iter().zip(&expected) {
        let kl = kl(theirs, ours);
        println!("KL {kl:.2e}");
        assert!(kl < 1e-4, "{kl}");
    }
    assert!(kl(&expected[0], &expected[1]) > 0.01, "the test's adapter changes nothing");
}

/// A process of ours that is killed at the end.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A model on a server of ggml's RPC says the same tokens, and is where `llama_model_params` wants it.
#[test]
fn models_on_a_server() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.build("remote", &["-fsanitize=address"]);
    // Free now; should another program take it meanwhile, the check of the client fails.
    let address = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").to_string();
    let mut command = Command::new(&program);
    command.args(["serve", &address]).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server(command.spawn().expect("the server starts"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(&address).is_err() {
        assert!(Instant::now() < deadline, "nobody listens at {address}");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(programs.run(&program, &[&programs.model(), &address]), "ok\n");
    drop(server);
}

#[test]
fn damaged_states() {
    let Some(programs) = Programs::new() else { return };
    let folder = programs.path().display().to_string();
    programs.check("state", &["mutate", &programs.model(), &folder, "1000"]);
}

/// A conversation goes on in another process as if nothing had happened, also with lazy layers.
#[test]
fn states_survive_the_process() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.build("state", &[]);
    let model = smollm2_path().display().to_string();
    let file = programs.path().join("long.state").display().to_string();
    for rule in ["off", "budget:0.5"] {
        let saved = programs.run(&program, &["save", &model, &file, "4000", rule]);
        let loaded = programs.run(&program, &["load", &model, &file, "4000", rule]);
        assert_eq!(saved.split_whitespace().count(), 16);
        assert_eq!(saved, loaded, "{rule}");
    }
}

#[test]
fn examples() {
    let Some(programs) = Programs::new() else { return };
    let mut make = Command::new("make");
    make.arg("-C").arg(workspace_root().join("ffi/examples")).arg(format!("OUT={}", programs.path().display()));
    make.arg(format!("DIST={}", programs.dist.display())).arg("CFLAGS=-O2 -Wall -Wextra -Werror");
    succeed(&mut make);
    let model = smollm2_path().display().to_string();
    let text = programs.run(&programs.path().join("simple"), &[&model, "The sea is"]);
    assert!(text.split_whitespace().count() > 10, "{text}");

    let story = workspace_root().join("xtask/demo/story.txt").display().to_string();
    let report = programs.run(&programs.path().join("layers"), &[&model, &story, "budget:0.5", "256"]);
    assert_eq!(report.matches("  lazy  ").count(), 15, "{report}");
    assert!(report.contains(", 15 lazy layers, cache"), "{report}");
}

/// What `cargo xtask valgrind` runs. Valgrind knows no AVX-512, so that the library has to be a portable one.
#[test]
#[ignore = "needs Valgrind and a portable build of the library: run `cargo xtask valgrind`"]
fn valgrind_finds_nothing() {
    let programs = Programs::new().expect("SIMLAYER_DIST names the library");
    let (model, folder) = (programs.model(), programs.path().display().to_string());
    for (name, arguments) in [
        ("sequences", vec![&*model]),
        ("state", vec!["mutate", &model, &folder, "1000"]),
        ("hostile", vec![&model, "4000"]),
    ] {
        let program = programs.build(name, &[]);
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
        let output = succeed(valgrind.arg(program).args(arguments));
        let report = String::from_utf8_lossy(&output.stderr);
        let summary = report.lines().find(|line| line.contains("ERROR SUMMARY")).expect("Valgrind's summary");
        println!("{name}: {summary}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n", "{name}");
    }
}
