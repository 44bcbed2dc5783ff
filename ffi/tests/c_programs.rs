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
    Given, Latent, Logits, RandomDecoder, RandomLora, RandomModel, Rng, Shape, UpstreamRef, Vocabulary, WeightType,
    gguf::{GgufFile, Meta},
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

    /// Compiles `ffi/tests/c/NAME.c` and links it with our library.
    fn build(&self, name: &str, flags: &[&str]) -> PathBuf {
        let source = workspace_root().join("ffi/tests/c").join(name).with_extension("c");
        self.compile(&source, name, "-lllama", flags)
    }

    /// Compiles a file to a program, or what the flags say, and links it with a library.
    fn compile(&self, source: &Path, name: &str, library: &str, flags: &[&str]) -> PathBuf {
        let program = self.path().join(name);
        let lib = self.dist.join("lib");
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]).args(flags);
        cc.arg("-I").arg(self.dist.join("include")).arg("-I").arg(workspace_root().join("ffi/tests/c"));
        cc.arg(source).arg("-o").arg(&program);
        cc.arg("-L").arg(&lib).arg(format!("-Wl,-rpath,{}", lib.display())).arg(library);
        succeed(cc.args(["-lggml", "-lggml-cpu", "-lggml-rpc", "-lggml-base", "-lpthread", "-lm"]));
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
    assert_eq!((llama.len(), cpp.len(), simlayer.len()), (255, 14, 10));
    assert_eq!(c, llama.union(&simlayer).cloned().collect());
    assert!(cpp.iter().all(|name| name.contains("llama_")), "{cpp:?}");

    // The same but for ours is in the library that others fall through to.
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "--format=just-symbols"]).arg(dist.join("lib/libsimlayer-upstream.so"));
    let text = String::from_utf8(succeed(&mut nm).stdout).expect("text");
    assert_eq!(text.lines().map(str::to_owned).collect::<BTreeSet<_>>(), &cpp | &llama);
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

/// llama.cpp's variable that leaves quantised rows unrotated does so here.
#[test]
fn rotation_can_be_turned_off() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.build("logits", &[]);
    let path = |name: &str| programs.path().join(name).display().to_string();
    let (model, rows) = (path("64.gguf"), path("rows.f32"));
    let random = RandomModel { head_size: 64, ..RandomModel::default() };
    random.write(&model);
    let prompt = Rng::new(29).tokens(60, random.n_vocab());
    let words: Vec<String> = prompt.iter().map(i32::to_string).collect();
    let arguments: Vec<&str> = [&*model, "on", "q4_0", "q4_0", &*rows]
        .into_iter()
        .chain(words.iter().map(String::as_str))
        .chain(["--"])
        .collect();
    let [rotated, as_it_is] = ["0", "1"].map(|disabled| {
        let mut run = Command::new(&program);
        run.args(&arguments).env_remove("SIMLAYER_LAZY").env("LLAMA_ATTN_ROT_DISABLE", disabled);
        assert_eq!(succeed(&mut run).stdout, b"ok\n");
        let options = ["-fa", "on", "-t", "1", "-ctk", "q4_0", "-ctv", "q4_0"];
        let reference = UpstreamRef::new().with_options(&options).with_variable("LLAMA_ATTN_ROT_DISABLE", disabled);
        let what = Logits { prompts: std::slice::from_ref(&prompt), all: false, decode: None };
        let theirs = reference.logits(model.as_ref(), what).concat();
        let ours = std::fs::read(&rows).expect("the program has written it");
        assert!(ours == theirs.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>(), "{disabled}");
        ours
    });
    assert!(rotated != as_it_is);
}

/// Latent attention as well, over caches of keys alone, and over those of heads whose keys and values differ in size.
#[test]
fn latent_caches_give_llama_cpps_logits() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.build("logits", &[]);
    let path = |name: &str| programs.path().join(name).display().to_string();
    let rows = path("rows.f32");
    let mut rng = Rng::new(23);
    for absorbed in [true, false] {
        let sizes = Latent { rank: 64, q_rank: 0, plain: 32, n_rot: 32, value: 32, absorbed };
        let mut random = RandomDecoder::new("deepseek2", Shape::default());
        random.latent_keys(sizes);
        random.expert_keys();
        random.key("expert_feed_forward_length", 48u32);
        random.key("expert_shared_count", 1u32);
        random.key("leading_dense_block_count", 2u32);
        for i in random.layers() {
            random.pre_norms(i);
            random.latent_attention(i, sizes);
            if i < 2 {
                random.gated(i);
            } else {
                random.experts(i, 48);
                random.shared_expert(i, 48, false);
            }
        }
        let model = path(&format!("{absorbed}.gguf"));
        random.write(&model);
        let (prompt, fed) = (rng.tokens(200, random.n_vocab), rng.tokens(10, random.n_vocab));
        let words = |tokens: &[i32]| tokens.iter().map(i32::to_string).collect::<Vec<_>>();
        let tokens = [words(&prompt), vec!["--".to_owned()], words(&fed)].concat();
        let cases = [("f16", "on"), ("f16", "off"), ("f32", "off"), ("q8_0", "on"), ("q4_0", "on")];
        for (ty, flash_attn) in cases {
            let case = format!("absorbed {absorbed}, {ty}, flash attention {flash_attn}");
            let options = [&*model, flash_attn, ty, ty, &*rows];
            let arguments: Vec<&str> = options.into_iter().chain(tokens.iter().map(String::as_str)).collect();
            assert_eq!(programs.run(&program, &arguments), "ok\n", "{case}");
            let reference = UpstreamRef::new().with_options(&["-fa", flash_attn, "-t", "1", "-ctk", ty, "-ctv", ty]);
            let (prompts, decode) = ([prompt.clone()], [fed.clone()]);
            let what = Logits { prompts: &prompts, all: false, decode: Some(&decode) };
            let theirs = reference.logits(model.as_ref(), what).concat();
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

/// Rows of embeddings in place of tokens, by each of llama.h's ways: upstream's logits, bit for bit. Of a model that gives
/// tokens several positions, of one whose rows have others for the first layers, and of one whose rows see each other.
#[test]
fn embeddings_given_in_place_of_tokens() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.build("given", &["-fsanitize=address"]);
    for (architecture, see_each_other) in [("qwen2vl", false), ("qwen3vl", false), ("gemma3", true)] {
        let head_size = if architecture == "qwen2vl" { Shape::default().head_size } else { 32 };
        let shape = Shape { head_size, tied: true, post_norm: 0.4, n_layer: 6, ..Shape::default() };
        let mut m = RandomDecoder::new(architecture, shape);
        let mut width = shape.n_embd;
        match architecture {
            "gemma3" => m.key("attention.sliding_window", 32u32),
            "qwen2vl" => m.key("rope.dimension_sections", Meta::array([3, 3, 2, 0])),
            _ => m.key("rope.dimension_sections", Meta::array([6, 5, 5, 0])),
        }
        if architecture == "qwen3vl" {
            m.key("n_deepstack_layers", 2u32);
            width *= 3;
        }
        if architecture == "qwen2vl" {
            // llama.cpp of this revision does not read it here.
            m.key("attention.layer_norm_rms_epsilon", 0f32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.gated(i);
            if architecture == "gemma3" {
                m.post_norms(i);
            }
            if architecture != "qwen2vl" {
                m.head_norms(i);
            }
        }
        let path = |name: &str| programs.path().join(format!("{architecture}.{name}"));
        let [model, input, out] = ["gguf", "bin", "out"].map(path);
        m.write(&model);

        let (n_before, columns, lines, n_after) = (30, 6, 4, 20);
        let n_rows = columns * lines;
        let mut rng = Rng::new(3);
        let (before, after) = (rng.tokens(n_before, m.n_vocab), rng.tokens(n_after, m.n_vocab));
        let given: Vec<f32> = (0..n_rows * width).map(|_| rng.normal()).collect();
        let n_positions = if see_each_other { 1 } else { 4 };
        let position = |dimension: usize, cell: usize| match (n_positions, dimension) {
            (1, _) => n_before + cell,
            (_, 0) => n_before,
            (_, 1) => n_before + cell / columns,
            (_, 2) => n_before + cell % columns,
            _ => 0,
        };
        let positions = (0..n_positions).flat_map(|dimension| (0..n_rows).map(move |cell| position(dimension, cell)));
        let positions: Vec<i32> = positions.map(|position| position as i32).collect();
        let next = n_before + if n_positions == 1 { n_rows } else { columns };

        let sizes = [n_before, n_rows, n_positions, usize::from(see_each_other), next, n_after];
        let sizes = sizes.map(|size| size as i32);
        let numbers = sizes.iter().chain(&before).chain(&positions).chain(&after);
        let numbers = numbers.flat_map(|number| number.to_le_bytes());
        let bytes = numbers.chain(given.iter().flat_map(|x| x.to_le_bytes()));
        std::fs::write(&input, bytes.collect::<Vec<u8>>()).expect("written");
        let [model_path, input, to] = [&model, &input, &out].map(|path| path.display().to_string());
        assert_eq!(programs.run(&program, &[&model_path, &input, &to]), "ok\n");
        let ours = read_rows(&out, m.n_vocab);

        let reference = UpstreamRef::new().with_options(&["-t", "1", "-ub", "64"]);
        let theirs = reference.given(
            &model,
            &Given {
                before: &before,
                rows: &given,
                positions: &positions,
                non_causal: see_each_other,
                next,
                after: &after,
            },
        );
        assert_eq!(theirs.len(), 1 + n_after);
        let ways: Vec<&[Vec<f32>]> = ours.chunks_exact(theirs.len()).collect();
        assert_eq!(ways.len(), if see_each_other { 2 } else { 3 }, "{architecture}");
        for (way, ours) in ways.iter().enumerate() {
            let worst = theirs.iter().zip(*ours).map(|(theirs, ours)| kl(theirs, ours)).fold(0.0, f64::max);
            println!("{architecture}, way {way}: KL {worst:.2e}");
            // In two calls the rows see each other in stored keys, which changes the order of sums.
            assert!(if way < 2 { *ours == theirs } else { worst < 1e-4 }, "{architecture}, way {way}: {worst}");
        }
    }
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

/// A small model of an architecture that only unmodified llama.cpp runs.
fn gpt_neox() -> RandomDecoder {
    let mut model = RandomDecoder::new("gptneox", Shape { n_head_kv: 4, ..Shape::default() });
    let (n_embd, n_ff) = (model.shape.n_embd, model.shape.n_ff);
    model.remove_key("attention.layer_norm_rms_epsilon");
    model.key("attention.layer_norm_epsilon", 1e-5f32);
    model.key("use_parallel_residual", true);
    model.key("rope.dimension_count", 8u32);
    model.bias("output_norm", n_embd);
    for layer in model.layers() {
        let name = |part: &str| format!("blk.{layer}.{part}");
        model.pre_norms(layer);
        model.fused_attention(layer);
        model.matrix(&name("ffn_up"), n_embd, n_ff);
        model.matrix(&name("ffn_down"), n_ff, n_embd);
        for (part, n) in [("attn_norm", n_embd), ("ffn_norm", n_embd), ("attn_qkv", 3 * n_embd)] {
            model.bias(&name(part), n);
        }
        for (part, n) in [("attn_output", n_embd), ("ffn_up", n_ff), ("ffn_down", n_embd)] {
            model.bias(&name(part), n);
        }
    }
    model
}

/// A small encoder, which by itself gives the mean of a text's embeddings.
fn bert() -> GgufFile {
    let mut model = RandomDecoder::new("bert", Shape { n_head_kv: 4, tied: true, ..Shape::default() });
    let (n_embd, n_ff, n_vocab) = (model.shape.n_embd, model.shape.n_ff, model.n_vocab);
    model.key("context_length", 128u32);
    model.key("attention.layer_norm_epsilon", 1e-12f32);
    model.key("attention.causal", false);
    model.key("pooling_type", 1u32);
    model.matrix("token_types", n_embd, 2);
    model.matrix("position_embd", n_embd, 128);
    let norm = |model: &mut RandomDecoder, name: &str| {
        model.row(name, n_embd);
        model.bias(name, n_embd);
    };
    norm(&mut model, "token_embd_norm");
    for layer in model.layers() {
        let name = |part: &str| format!("blk.{layer}.{part}");
        model.attention(layer);
        model.qkv_biases(layer);
        model.bias(&name("attn_output"), n_embd);
        norm(&mut model, &name("attn_output_norm"));
        norm(&mut model, &name("layer_output_norm"));
        model.matrix(&name("ffn_up"), n_embd, n_ff);
        model.bias(&name("ffn_up"), n_ff);
        model.matrix(&name("ffn_down"), n_ff, n_embd);
        model.bias(&name("ffn_down"), n_embd);
    }
    let mut file = model.gguf().clone();
    assert!(n_vocab > 300, "the program asks for tokens below that");
    file.set("tokenizer.ggml.token_type_count", 2u32).remove_tensor("output_norm.weight");
    file
}

/// What simlayer does not run gives in our library what it gives in unmodified llama.cpp.
#[test]
fn other_models_fall_through() {
    let Some(programs) = Programs::new() else { return };
    let path = |name: &str| programs.path().join(name).display().to_string();
    let source = workspace_root().join("ffi/tests/c/fall_through.c");
    let ours = programs.build("fall_through", &["-fsanitize=address"]);
    let theirs = programs.compile(&source, "unmodified", "-lsimlayer-upstream", &[]);
    let (neox, encoder, llama) = (path("neox.gguf"), path("bert.gguf"), programs.model());
    let model = gpt_neox();
    model.write(&neox);
    model.gguf().write_split(programs.path(), "parts", 3);
    bert().write(&encoder);

    let decode = |program: &Path, name: &str| {
        let files = ["answers", "rows", "state", "quantised"].map(|file| path(&format!("{name}.{file}")));
        let [answers, rows, state, quantised] = &files;
        let parts = path("parts");
        let said = programs.run(program, &["decode", &neox, &llama, answers, rows, state, &parts, quantised]);
        let (tokens, notes) = said.split_once('\n').expect("two lines");
        let tokens: Vec<i32> = tokens.split_whitespace().map(|token| token.parse().expect("a token")).collect();
        let read = |file| std::fs::read(file).expect("the program has written it");
        assert!(!read(quantised).is_empty());
        (tokens, read(answers), read(rows), notes.trim().to_owned())
    };
    let (tokens, answers, rows, notes) = decode(&ours, "ours");
    let (their_tokens, their_answers, their_rows, their_notes) = decode(&theirs, "theirs");
    assert_eq!((&*notes, &*their_notes), ("6", "0"));
    assert_eq!((tokens.len(), &tokens), (20, &their_tokens));
    assert!(answers == their_answers, "answers differ");
    assert!(rows == their_rows, "logits differ");

    // And in a program of its own, built as its authors build it.
    let n_vocab = model.n_vocab;
    let prompt: Vec<i32> = (0..40u32).map(|i| ((i * 7919 + 13) % n_vocab as u32) as i32).collect();
    let reference = UpstreamRef::new().with_options(&["-fa", "on", "-t", "1"]);
    let what = Logits { prompts: &[prompt], all: false, decode: Some(&[tokens]) };
    let expected: Vec<u8> =
        reference.logits(neox.as_ref(), what).concat().into_iter().flat_map(f32::to_le_bytes).collect();
    assert!(rows == expected, "logits differ from the reference program's");

    // An encoder, a model whose architecture simlayer runs, for embeddings, and one with parts that it does not know.
    let (pooled, scaled) = (path("pooled.gguf"), path("scaled.gguf"));
    RandomModel::default().gguf().set("llama.pooling_type", 3u32).write(&pooled);
    let scale = 0.5f32.to_le_bytes().to_vec();
    RandomModel::default().gguf().add_tensor("blk.1.attn_output.scale", WeightType::F32.0, &[1], scale).write(&scaled);
    let embed = |program: &Path, name: &str, model: &str| {
        let answers = path(&format!("{name}.embeddings"));
        let notes = programs.run(program, &["embed", model, &answers]);
        (std::fs::read(answers).expect("the program has written it"), notes)
    };
    for model in [&encoder, &pooled, &scaled] {
        let (ours, theirs) = (embed(&ours, "ours", model), embed(&theirs, "theirs", model));
        assert_eq!((&*ours.1, &*theirs.1), ("1\n", "0\n"));
        assert!(ours.0 == theirs.0, "{model}: embeddings differ");
    }

    // Without that library an encoder is none of ours, and the other is run all the same.
    let alone = |model: &str| {
        let mut command = Command::new(&ours);
        command.args(["embed", model, &path("alone")]).env("SIMLAYER_UPSTREAM_LIB", path("none.so"));
        command.output().expect("the program starts")
    };
    let refused = alone(&encoder);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("none.so is missing"), "{why}");
    assert_eq!(String::from_utf8_lossy(&alone(&pooled).stdout), "0\n");
}

/// A function of llama.h.
struct Declaration {
    result: String,
    name: String,
    /// The types of its parameters.
    parameters: Vec<String>,
}

/// What `cc` leaves of llama.h, without attributes.
fn preprocessed(dist: &Path) -> String {
    let mut cc = Command::new("cc");
    cc.args(["-E", "-P", "-x", "c", "-include", "llama.h", "/dev/null"]).arg("-I").arg(dist.join("include"));
    let mut text = String::from_utf8(succeed(&mut cc).stdout).expect("text");
    while let Some(start) = text.find("__attribute__") {
        let mut depth = 0;
        let end = text[start..].find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            c == ')' && depth == 0
        });
        text.replace_range(start..=start + end.expect("a closing parenthesis"), "");
    }
    text
}

fn declarations(text: &str) -> Vec<Declaration> {
    let mut depth = 0;
    let statements = text.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ';' && depth == 0
    });
    let functions = statements.filter(|statement| !statement.contains('{') && !statement.contains("typedef"));
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let function = |statement: &str| {
        let (head, parameters) = statement.split_once('(')?;
        let head = words(head);
        let at = head.rfind("llama_").filter(|&at| !head[at..].contains([' ', '*']))?;
        let parameters = words(parameters.trim_end().strip_suffix(')').expect("a closing parenthesis"));
        assert!(!parameters.contains('('), "{parameters}: a parameter whose name is not last");
        let ty = |parameter: &str| {
            let parameter = parameter.trim();
            let ty = parameter.trim_end_matches(|c: char| c.is_ascii_alphanumeric() || c == '_').trim();
            if ty.is_empty() { parameter.to_owned() } else { ty.to_owned() }
        };
        let parameters = parameters.split(',').map(ty).filter(|ty| ty != "void").collect();
        Some(Declaration { result: head[..at].trim().to_owned(), name: head[at..].to_owned(), parameters })
    };
    functions.filter_map(function).collect()
}

/// Structs of llama.h that nobody outside knows: pointers to them are handles.
fn handles(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut opaque, mut known) = (BTreeSet::new(), BTreeSet::new());
    for (at, _) in text.match_indices("struct llama_") {
        let rest = &text[at + "struct ".len()..];
        let name: String = rest.chars().take_while(|&c| is_name(c)).collect();
        let has_body = rest[name.len()..].trim_start().starts_with('{');
        if has_body { &mut known } else { &mut opaque }.insert(name);
    }
    &opaque - &known
}

/// Every function of llama.h that takes a handle, and of llama-ext.h those that we export, reaches the other library with
/// one of its handles: here a library made for this, whose functions say only that they were called.
#[test]
fn every_function_with_a_handle_falls_through() {
    let Some(programs) = Programs::new() else { return };
    let header = preprocessed(&programs.dist);
    let functions = declarations(&header);
    assert_eq!(functions.len(), declared(&programs.dist, "llama.h", "llama_").len());
    let kinds: Vec<String> = handles(&header).into_iter().collect();
    let known = ["adapter_lora", "batch_ext", "context", "memory_i", "model", "vocab"];
    assert_eq!(kinds, known.map(|kind| format!("llama_{kind}")), "a new kind of handle");
    // The place of a type among them.
    let kind = |ty: &str| {
        let ty = ty.replace("llama_memory_t", "struct llama_memory_i *");
        let pointee = ty.strip_suffix('*')?.trim().rsplit(' ').next()?.to_owned();
        kinds.iter().position(|kind| *kind == pointee)
    };
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "--format=just-symbols"]).arg(programs.dist.join("lib/libllama.so.0"));
    let exports = String::from_utf8(succeed(&mut nm).stdout).expect("text");
    let extensions: Vec<&str> = exports.lines().filter(|name| name.starts_with("_Z")).collect();
    assert_eq!(extensions.len(), 14);

    let mut fake = String::from(
        "#include \"llama.h\"\n#include \"ggml.h\"\n#include <string.h>\n\
         #ifndef VERSION\n#define VERSION ggml_version()\n#endif\n\
         static char called[128];\nstatic long long objects[6][2];\n\
         const char * fake_called(void) { return called; }\nvoid fake_clear(void) { called[0] = 0; }\n",
    );
    for Declaration { result, name, parameters } in &functions {
        let parameters: Vec<String> = parameters.iter().enumerate().map(|(i, ty)| format!("{ty} p{i}")).collect();
        let value = match (&**result, kind(result)) {
            _ if name == "llama_version" => "return VERSION;".to_owned(),
            ("void", _) => String::new(),
            (_, Some(kind)) => format!("return ({result}) objects[{kind}];"),
            (_, None) => format!("return ({result}) {{ 0 }};"),
        };
        let parameters = if parameters.is_empty() { "void".to_owned() } else { parameters.join(", ") };
        fake += &format!("{result} {name}({parameters}) {{ strcpy(called, \"{name}\"); {value} }}\n");
    }
    for (i, name) in extensions.iter().enumerate() {
        fake += &format!("void * extension{i}(void) __asm__(\"{name}\");\n");
        fake += &format!("void * extension{i}(void) {{ strcpy(called, \"{name}\"); return 0; }}\n");
    }

    // Calls with handles, and with nothing otherwise.
    let (mut calls, mut ends, mut n_calls) = (String::new(), String::new(), 0);
    for Declaration { name, parameters, .. } in &functions {
        if !parameters.iter().any(|ty| kind(ty).is_some()) {
            continue;
        }
        n_calls += 1;
        let arguments: Vec<String> = parameters
            .iter()
            .map(|ty| match kind(ty) {
                Some(kind) => format!("({ty}) objects[{kind}]"),
                None => format!("({ty}) {{ 0 }}"),
            })
            .collect();
        let arguments = arguments.join(", ");
        if name.contains("free") {
            ends += &format!("    get();\n    REACHES({name}, {name}({arguments}));\n");
            ends += &format!("    DOES_NOT_REACH({name}({arguments}));\n");
        } else {
            calls += &format!("    REACHES({name}, {name}({arguments}));\n");
        }
    }
    assert!(n_calls > 100, "{n_calls}");
    let mut declared = String::new();
    for (i, name) in extensions.iter().enumerate() {
        // What is no number is returned where the caller says.
        let room = if name.contains("breakdown") { "room, " } else { "" };
        let handle = if name.contains("11llama_model") { "model" } else { "context" };
        let handle = kinds.iter().position(|kind| kind.ends_with(handle)).expect("a kind");
        declared += &format!("void * extension{i}() __asm__(\"{name}\");\n");
        calls += &format!("    REACHES({name}, extension{i}({room}objects[{handle}], 0, 0));\n");
    }
    for (file, text) in [("fake.c", &fake), ("calls.h", &calls), ("ends.h", &ends), ("extensions.h", &declared)] {
        std::fs::write(programs.path().join(file), text).expect("written");
    }
    let include = format!("-I{}", programs.path().display());
    let quiet = ["-Wno-unused-parameter", "-Wno-deprecated-declarations", "-Wno-strict-prototypes"];
    let fake = programs.path().join("fake.c");
    let library = programs.compile(&fake, "libfake.so", "-lggml-base", &[&quiet[..], &["-shared", "-fPIC"]].concat());
    let other = ["-shared", "-fPIC", "-DVERSION=\"another\""];
    let other = programs.compile(&fake, "libother.so", "-lggml-base", &[&quiet[..], &other].concat());
    let program = programs.build("routes", &[&quiet[..], &["-fsanitize=address", &include]].concat());
    let model = programs.path().join("neox.gguf").display().to_string();
    gpt_neox().write(&model);
    let run = |library: &Path, what: &str| {
        let mut command = Command::new(&program);
        command.args([&*model, &programs.model(), what]).env("SIMLAYER_UPSTREAM_LIB", library);
        String::from_utf8(succeed(&mut command).stdout).expect("text")
    };
    assert_eq!(run(&library, "calls"), "ok\n");
    let refused = run(&other, "refused");
    assert!(refused.contains("another revision (another, but ggml here is "), "{refused}");
    let missing = run(&programs.path().join("none.so"), "refused");
    assert!(missing.contains("architecture \"gptneox\" is not supported"), "{missing}");
    assert!(missing.contains("none.so is missing; it belongs beside libllama.so.0"), "{missing}");
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
