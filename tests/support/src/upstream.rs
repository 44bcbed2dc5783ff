//! The client of the reference program: unmodified llama.cpp in a process of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::{metrics::read_rows, workspace_root};

/// The reference: unmodified llama.cpp of the same revision, in a process of its own (`tests/upstream`).
#[derive(Debug, Clone)]
pub struct UpstreamRef {
    program: PathBuf,
    /// Options for every run, such as `-fa off` or `-t 2`.
    options: Vec<String>,
    environment: Vec<[String; 2]>,
}

/// What to compute logits for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Logits<'a> {
    pub prompts: &'a [Vec<i32>],
    /// Rows for every token of the prompts, not only for the last.
    pub all: bool,
    /// Tokens to decode one by one after each prompt, one more row for each.
    pub decode: Option<&'a [Vec<i32>]>,
}

/// A greedy continuation.
#[derive(Debug, Clone, Deserialize)]
pub struct Greedy {
    pub tokens: Vec<i32>,
    /// The two largest logits of every step, with their tokens.
    pub top2: Vec<[(i32, f32); 2]>,
}

impl Default for UpstreamRef {
    fn default() -> Self {
        Self::new()
    }
}

impl UpstreamRef {
    /// The program that `SIMLAYER_UPSTREAM_REF` names, or the one built in the workspace. Where the tests run on devices
    /// (`SIMLAYER_TEST_RPC`, `SIMLAYER_TEST_DEVICE`), it leaves weights as they are in the file, as devices do: repacked
    /// ones are summed otherwise.
    pub fn new() -> UpstreamRef {
        let program = std::env::var_os("SIMLAYER_UPSTREAM_REF")
            .map_or_else(|| workspace_root().join("tests/upstream/target/release/upstream-ref"), PathBuf::from);
        let hint = "run `cargo xtask test`, which builds it";
        assert!(program.is_file(), "the reference program {} is missing: {hint}", program.display());
        let on_devices =
            ["SIMLAYER_TEST_RPC", "SIMLAYER_TEST_DEVICE"].map(std::env::var_os).iter().any(Option::is_some);
        let options = on_devices.then(|| "--no-repack".to_owned()).into_iter().collect();
        UpstreamRef { program, options, environment: Vec::new() }
    }

    /// Adds options to every run, such as `["-fa", "off"]`.
    pub fn with_options(mut self, options: &[&str]) -> UpstreamRef {
        self.options.extend(options.iter().map(|&option| option.to_owned()));
        self
    }

    /// Sets a variable for every run.
    pub fn with_variable(mut self, name: &str, value: &str) -> UpstreamRef {
        self.environment.push([name, value].map(str::to_owned));
        self
    }

    /// Runs a command on a model and returns what it prints, or what it wrote to stderr when it fails.
    pub fn try_run(&self, command: &str, model: &Path, arguments: &[&str]) -> Result<Value, String> {
        let mut run = Command::new(&self.program);
        run.arg(command).arg("-m").arg(model).args(arguments).args(&self.options);
        run.envs(self.environment.iter().map(|[name, value]| (name, value)));
        let output = run.output().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.program.display()));
        if !output.status.success() {
            return Err(format!("{run:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
        let printed = String::from_utf8_lossy(&output.stdout);
        Ok(serde_json::from_str(&printed)
            .unwrap_or_else(|error| panic!("{run:?} printed no JSON ({error}): {printed}")))
    }

    /// As [`UpstreamRef::try_run`]; a failure fails the test.
    pub fn run(&self, command: &str, model: &Path, arguments: &[&str]) -> Value {
        self.try_run(command, model, arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The model's sizes and special tokens.
    pub fn info(&self, model: &Path) -> Value {
        self.run("info", model, &[])
    }

    /// Whether it computes on a card: where it was built for one, and there is one. `model` is any that it can load.
    pub fn offloads(&self, model: &Path) -> bool {
        self.info(model)["offloads"] == true
    }

    /// The tokens of each text.
    pub fn tokenize(&self, model: &Path, texts: &[&[u8]], add_special: bool, parse_special: bool) -> Vec<Vec<i32>> {
        let input = Input::new(texts);
        let mut arguments = vec!["--in", input.path()];
        if !add_special {
            arguments.push("--no-special");
        }
        if parse_special {
            arguments.push("--parse-special");
        }
        member(self.run("tokenize", model, &arguments), "tokens")
    }

    /// The bytes that each list of tokens stands for. Special tokens are shown with `unparse_special`.
    pub fn detokenize(&self, model: &Path, lists: &[Vec<i32>], unparse_special: bool) -> Vec<Vec<u8>> {
        let input = Input::new(lists);
        let mut arguments = vec!["--in", input.path()];
        if unparse_special {
            arguments.push("--unparse-special");
        }
        member(self.run("detokenize", model, &arguments), "bytes")
    }

    /// Rows of logits, prompt by prompt: of the last token or all, then of the decoded ones.
    pub fn logits(&self, model: &Path, what: Logits<'_>) -> Vec<Vec<f32>> {
        let input = Input::new(what.prompts);
        let decode = what.decode.map(Input::new);
        let rows = input.folder.path().join("rows.f32");
        let mut arguments = vec!["--in", input.path(), "--out", rows.to_str().expect("temporary paths are UTF-8")];
        if what.all {
            arguments.push("--all");
        }
        if let Some(decode) = &decode {
            arguments.extend(["--decode", decode.path()]);
        }
        let n_vocab = member(self.run("logits", model, &arguments), "n_vocab");
        read_rows(&rows, n_vocab)
    }

    /// Rows of logits: of the last of some embeddings among tokens, and of each token behind them.
    pub fn given(&self, model: &Path, given: &Given<'_>) -> Vec<Vec<f32>> {
        let Given { before, positions, next, non_causal, after, rows } = given;
        let input = Input::new(&serde_json::json!({
            "before": before, "positions": positions, "next": next, "non_causal": non_causal, "after": after,
        }));
        let path = |name: &str| input.folder.path().join(name).to_str().expect("temporary paths are UTF-8").to_owned();
        let [given, out] = ["given.f32", "rows.f32"].map(path);
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        fs::write(&given, bytes).expect("the temporary folder is writable");
        let printed = self.run("given", model, &["--in", input.path(), "--rows", &given, "--out", &out]);
        read_rows(out.as_ref(), member(printed, "n_vocab"))
    }

    /// `n` greedily chosen tokens after each prompt. The end of the text does not stop it.
    pub fn greedy(&self, model: &Path, prompts: &[Vec<i32>], n: usize) -> Vec<Greedy> {
        let input = Input::new(prompts);
        member(self.run("greedy", model, &["--in", input.path(), "-n", &n.to_string()]), "results")
    }
}

/// Embeddings in place of tokens, among tokens.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    pub before: &'a [i32],
    /// `[elements × rows]`
    pub rows: &'a [f32],
    /// Of the rows: all first ones, then all second ones, and so on.
    pub positions: &'a [i32],
    /// Whether the rows see each other.
    pub non_causal: bool,
    /// Where the first token behind them stands.
    pub next: usize,
    pub after: &'a [i32],
}

/// A file with JSON for the program to read; gone when dropped.
struct Input {
    folder: TempDir,
    path: String,
}

impl Input {
    fn new(value: &(impl serde::Serialize + ?Sized)) -> Input {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("input.json");
        fs::write(&path, serde_json::to_vec(value).expect("lists become JSON"))
            .expect("the temporary folder is writable");
        let path = path.to_str().expect("temporary paths are UTF-8").to_owned();
        Input { folder, path }
    }

    fn path(&self) -> &str {
        &self.path
    }
}

fn member<T: serde::de::DeserializeOwned>(mut printed: Value, name: &str) -> T {
    serde_json::from_value(printed[name].take()).unwrap_or_else(|error| panic!("the reference's {name}: {error}"))
}
