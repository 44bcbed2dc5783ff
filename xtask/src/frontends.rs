//! llama.cpp's own frontends, unmodified, on the library of `cargo xtask dist`: each must do its job, and say what it
//! says on llama.cpp's own library.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::prepare::{self, Env};
use crate::root;
use crate::sh::{self, step};
use crate::{dist, upstream};

/// A part of the chore.
#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Part {
    /// llama-simple, llama-completion, llama-bench.
    Tools,
    Perplexity,
    Server,
    /// Twenty conversations whose answers are taken back, by the library's own session.
    Turns,
    /// Conversations with llama-server whose layers become lazy.
    ServerTurns,
    /// A conversation of such a server that is saved, and restored by another process.
    ServerSlots,
    /// Many requests of mixed turns to such a server.
    ServerMany,
    /// A conversation about pictures with llama-server, with a random model that sees them.
    Picture,
    /// llama-completion with lazy layers.
    CompletionLazy,
    /// llama.cpp's own tests of states, sequences and threads, with and without lazy layers.
    MemoryTests,
    /// llama-cpp-python.
    Python,
    /// Its own tests.
    PythonTests,
    /// With lazy layers.
    PythonLazy,
    /// The same, over several prompts with a common beginning.
    PythonTurns,
}

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to run; default: everything.
    parts: Vec<Part>,
    /// Chat requests to llama-server.
    #[arg(long, default_value_t = 200)]
    requests: usize,
    /// Requests of `server-many`.
    #[arg(long, default_value_t = 2000)]
    turns: usize,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    prepare::cmake(&mut env)?;
    let model = prepare::model()?;
    let dist = step("library", || dist::build(&env, &env.target_dir()?.join("dist"), false))?;
    let frontends = Frontends { env: &env, model, lib: dist.join("lib") };
    let parts = if args.parts.is_empty() { Part::value_variants() } else { &args.parts };
    for part in parts {
        let name = part.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        step(&name, || match part {
            Part::Tools => frontends.tools(),
            Part::Perplexity => frontends.perplexity(),
            Part::Server => frontends.server(args.requests),
            Part::Turns => frontends.turns_of_sessions(),
            Part::ServerTurns => frontends.server_turns(),
            Part::ServerSlots => frontends.server_slots(),
            Part::ServerMany => frontends.server_many(args.turns),
            Part::Picture => frontends.picture(),
            Part::CompletionLazy => frontends.completion_lazy(),
            Part::MemoryTests => frontends.memory_tests(),
            Part::PythonTurns => frontends.python_turns(),
            Part::Python => frontends.python_features(),
            Part::PythonTests => frontends.python_tests(),
            Part::PythonLazy => frontends.python_lazy(),
        })?;
    }
    Ok(())
}

struct Frontends<'a> {
    env: &'a Env,
    model: PathBuf,
    lib: PathBuf,
}

impl Frontends<'_> {
    /// One of llama.cpp's programs, with our library in front or with its own.
    fn tool(&self, name: &str, ours: bool) -> Result<Command> {
        let mut command = self.env.command(&upstream::tool(name)?.display().to_string());
        command.env_remove("SIMLAYER_LAZY").arg("-m").arg(&self.model);
        if ours {
            command.env("LD_LIBRARY_PATH", &self.lib);
        } else {
            command.env_remove("LD_LIBRARY_PATH");
        }
        Ok(command)
    }

    fn tools(&self) -> Result<()> {
        for (name, arguments) in [
            ("llama-simple", vec!["-n", "24", "The sea is"]),
            ("llama-completion", vec!["-p", "The sea is", "-n", "24", "--temp", "0", "-no-cnv"]),
        ] {
            let [ours, theirs] = [true, false].map(|ours| sh::output(self.tool(name, ours)?.args(&arguments)));
            let (ours, theirs) = (ours?, theirs?);
            println!("{name}: {}", ours.trim());
            ensure!(ours == theirs, "{name} says otherwise on llama.cpp: {theirs}");
        }
        self.prompt_cache()?;
        let speeds = sh::output(self.tool("llama-bench", true)?.args(["-p", "128", "-n", "16", "-o", "json"]))?;
        let speeds: Value = serde_json::from_str(&speeds).context("llama-bench wrote no JSON")?;
        for test in speeds.as_array().context("llama-bench wrote no list")? {
            println!("llama-bench: {} prompt, {} generated: {} t/s", test["n_prompt"], test["n_gen"], test["avg_ts"]);
        }
        Ok(())
    }

    /// llama-completion writes its state to a file, and goes on from it.
    fn prompt_cache(&self) -> Result<()> {
        let file = prepare::tools_dir().join("frontends-prompt-cache.bin");
        if file.exists() {
            std::fs::remove_file(&file)?;
        }
        let run = || -> Result<(String, String)> {
            let mut command = self.tool("llama-completion", true)?;
            command.args(["-p", "The sea is", "-n", "24", "--temp", "0", "-no-cnv", "--prompt-cache"]).arg(&file);
            let output = command.stdin(std::process::Stdio::null()).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok((String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr).into_owned()))
        };
        let ((first, _), (second, messages)) = (run()?, run()?);
        ensure!(first == second, "with its prompt cache llama-completion says otherwise: {second}");
        let loaded = messages.lines().find(|line| line.contains("loaded a session"));
        println!("llama-completion, again: {}", loaded.context("its state was not loaded")?.trim());
        Ok(())
    }

    /// Over 4 chunks of 512, within 0.2 % of llama.cpp.
    fn perplexity(&self) -> Result<()> {
        let text = long_text()?;
        let of = |ours: bool| -> Result<f64> {
            let mut command = self.tool("llama-perplexity", ours)?;
            command.arg("-f").arg(&text).args(["-c", "512", "--chunks", "4"]);
            let output = command.output()?;
            let all = [output.stdout, output.stderr].concat();
            let all = String::from_utf8_lossy(&all);
            let figure = all.split("Final estimate: PPL = ").nth(1).and_then(|rest| rest.split(' ').next());
            figure.with_context(|| format!("llama-perplexity gave no figure:\n{all}"))?.parse().context("a number")
        };
        let (ours, theirs) = (of(true)?, of(false)?);
        println!("llama-perplexity: {ours}, llama.cpp {theirs}");
        ensure!((ours / theirs - 1.0).abs() <= 0.002, "more than 0.2 % apart");
        Ok(())
    }

    /// Four requests at a time, with one system prompt: no errors, the prompt reused, no growth.
    fn server(&self, requests: usize) -> Result<()> {
        let tool = self.tool("llama-server", true)?;
        let mut script = self.script("server.py");
        script.env("LD_LIBRARY_PATH", &self.lib).arg(requests.to_string());
        script.arg(tool.get_program()).args(tool.get_args());
        let result: Value = serde_json::from_str(&sh::output(&mut script)?)?;
        let (answered, reused) = (result["answered"].as_u64(), result["reused"].as_u64().unwrap_or(0));
        ensure!(answered == Some(requests as u64), "not all were answered: {}", result["errors"]);
        ensure!(reused as usize > requests * 100, "only {reused} prompt tokens were reused");
        let resident: Vec<u64> =
            result["resident"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        let (early, late) = resident.split_at(resident.len() / 2);
        let (early, late) = (early.iter().max().unwrap_or(&0), late.iter().max().unwrap_or(&0));
        println!("llama-server: {requests} answers, {reused} tokens reused, at most {early} bytes, then {late}");
        ensure!(*late as f64 <= *early as f64 * 1.02, "its memory grows");
        Ok(())
    }

    /// What `turns.py` tells of llama-server with lazy layers by this rule.
    fn turns(&self, rule: &str, slots: usize, what: &str) -> Result<Value> {
        let tool = self.tool("llama-server", true)?;
        let mut script = self.script("turns.py");
        script.env("LD_LIBRARY_PATH", &self.lib).env("SIMLAYER_LAZY", rule);
        if rule.starts_with("profile") {
            script.env("SIMLAYER_PROFILE", root().join("profiles/SmolLM2-135M-Instruct.Q4_1.simlayer.toml"));
        }
        script.arg(long_text()?).arg(slots.to_string()).arg(what).arg(tool.get_program()).args(tool.get_args());
        serde_json::from_str(&sh::output(&mut script)?).context("turns.py wrote no JSON")
    }

    fn turns_of_sessions(&self) -> Result<()> {
        let mut test = self.env.cargo();
        test.env("SIMLAYER_TEST_CONVERSATIONS", "20");
        let conversations = ["an_answer_taken_back", "an_edited_turn", "--test-threads=1", "--nocapture"];
        sh::run(test.args(["test", "--release", "--test", "turns", "--"]).args(conversations))
    }

    /// No request fails, an answer taken back comes again, and a further turn reads little more than what was said.
    fn server_turns(&self) -> Result<()> {
        for (rule, slots) in RULES.into_iter().flat_map(|rule| [(rule, 1), (rule, 4)]) {
            let result = self.turns(rule, slots, "conversation")?;
            let talks = result["talks"].as_array().context("talks")?;
            ensure!(talks.len() == slots, "{} of {slots} conversations", talks.len());
            for talk in talks {
                check_talk(talk).with_context(|| format!("{rule}, {slots} slots"))?;
            }
            let reads = |talk: &Value| -> Vec<String> {
                entries(talk)
                    .map(|entry| format!("{} {}", entry["what"].as_str().unwrap_or_default(), entry["read"]))
                    .collect()
            };
            println!("{rule}, {slots} slots: {}", reads(&talks[0]).join(", "));
            if slots > 1 {
                continue;
            }
            let edit =
                |talk: &Value| entries(talk).find(|entry| entry["what"] == "edit").map(|entry| entry["text"].clone());
            let (ours, fresh) = (edit(&talks[0]), edit(&result["fresh"]));
            println!("{rule}: an edit two turns back answers {}", ours.clone().unwrap_or_default());
            ensure!(ours.is_some() && ours == fresh, "a fresh server answers {}", fresh.unwrap_or_default());
            check_talk(&result["long"]).with_context(|| format!("{rule}, a long first answer"))?;
        }
        Ok(())
    }

    fn server_slots(&self) -> Result<()> {
        for rule in RULES {
            let result = self.turns(rule, 1, "slots")?;
            let (before, after) = (&result["before"], &result["after"]);
            println!(
                "{rule}: {} tokens restored, then read {} and {}",
                result["n_restored"], after[0]["read"], after[2]["read"]
            );
            ensure!(
                entries(after).all(|entry| entry["read"].as_u64().is_some_and(|n| n <= MOST_READ)),
                "too much is read"
            );
            ensure!(before[0]["text"] == after[0]["text"], "the next turn is answered otherwise: {after}");
            ensure!(after[0]["text"] == after[1]["text"], "regenerated it is another: {after}");
            ensure!(before[1]["text"] == after[2]["text"], "the second turn is answered otherwise: {after}");
        }
        Ok(())
    }

    /// No error, and memory that does not grow.
    fn server_many(&self, requests: usize) -> Result<()> {
        let result = self.turns("budget:0.5", 4, &requests.to_string())?;
        ensure!(result["errors"].as_array().is_some_and(Vec::is_empty), "{}", result["errors"]);
        // Each slot has as many in each quarter.
        ensure!(requests >= 16, "four quarters at 4 slots are at least 16 requests");
        ensure!(result["requests"].as_u64() == Some((requests / 16 * 16) as u64), "{} were done", result["requests"]);
        let quarters = result["resident"].as_array().context("turns.py tells of no quarters")?;
        let means: Vec<f64> = quarters
            .iter()
            .map(|quarter| {
                let bytes: Vec<f64> = entries(quarter).filter_map(Value::as_f64).collect();
                bytes.iter().sum::<f64>() / bytes.len().max(1) as f64
            })
            .collect();
        let &[first, .., last] = &means[..] else { bail!("{means:?} are no quarters") };
        println!(
            "llama-server, {} requests at 4 slots: no error; bytes resident in each quarter: {means:.0?}",
            result["requests"]
        );
        ensure!(last <= first * 1.05, "its memory grows");
        Ok(())
    }

    /// llama.cpp's tests end with 0 where they pass.
    fn memory_tests(&self) -> Result<()> {
        let story = std::fs::read_to_string(root().join("xtask/demo/story.txt"))?;
        let prompt: String = story.chars().take(3000).collect();
        // A folder of their own: they leave a state behind.
        let folder = prepare::tools_dir().join("frontends-memory-tests");
        std::fs::create_dir_all(&folder)?;
        let threads = ["-p", "The meaning of life is", "-n", "32", "-c", "256", "-ub", "32", "-np", "4", "-t", "2"];
        for (name, arguments) in [
            ("test-save-load-state", &["-p", &prompt, "-n", "16", "-c", "2048", "-b", "2048"][..]),
            ("test-state-restore-fragmented", &[]),
            ("test-thread-safety", &threads),
        ] {
            // 700 tokens are several windows of so many.
            for rule in ["off", "budget:0.5", "layers:2-25"] {
                let mut test = self.tool(name, true)?;
                test.env("SIMLAYER_LAZY", rule).env("SIMLAYER_WINDOW", "64").current_dir(&folder);
                sh::output(test.args(arguments)).with_context(|| format!("{name}, {rule}"))?;
                println!("{name}, {rule}: passed");
            }
        }
        Ok(())
    }

    /// A saved prompt is gone on with, also by another prompt that begins alike; a full context is an end, no crash.
    fn completion_lazy(&self) -> Result<()> {
        let story = std::fs::read_to_string(root().join("xtask/demo/story.txt"))?;
        let words: Vec<&str> = story.split(' ').take(1500).collect();
        let prompt = words.join(" ");
        let file = prepare::tools_dir().join("frontends-lazy-cache.bin");
        if file.exists() {
            std::fs::remove_file(&file)?;
        }
        let run = |prompt: &str, arguments: &[&str]| -> Result<String> {
            let mut command = self.tool("llama-completion", true)?;
            command.env("SIMLAYER_LAZY", "budget:0.5").env("SIMLAYER_WINDOW", "512");
            command.args(["-p", prompt, "-n", "24", "--temp", "0", "-no-cnv", "-b", "4096"]).args(arguments);
            sh::output(command.stdin(std::process::Stdio::null()))
        };
        let path = file.display().to_string();
        let cached = ["-c", "4096", "--prompt-cache", &path];
        let (first, second) = (run(&prompt, &cached)?, run(&prompt, &cached)?);
        ensure!(first == second, "with its prompt cache it says otherwise: {second}");
        let shorter = words[..1490].join(" ");
        let (from_cache, fresh) = (run(&shorter, &cached)?, run(&shorter, &["-c", "4096"])?);
        ensure!(from_cache.len() > shorter.len() && fresh.len() > shorter.len(), "no answer: {from_cache}");
        println!(
            "llama-completion, lazy: a saved prompt goes on with the same text; one that begins alike: {}",
            if from_cache == fresh { "also" } else { "with another text" }
        );
        let full = run(&words[..300].join(" "), &["-c", "512", "-n", "600", "--keep", "16"])?;
        println!("llama-completion, lazy, context full: {} characters", full.len());
        Ok(())
    }

    fn python_turns(&self) -> Result<()> {
        let text = long_text()?;
        for rule in ["budget:0.5", "threshold", "layers:2-25"] {
            let result = self.python("python_turns.py", true, Some(rule), &[&text])?;
            ensure!(result["first"] == result["again"], "{rule}: the same prompt is answered otherwise: {result}");
            ensure!(result["first"] == result["saved"], "{rule}: another context answers otherwise: {result}");
            ensure!(result["loaded"] == result["not_loaded"], "{rule}: a loaded state goes on otherwise: {result}");
            ensure!(result["cached"][0] == result["cached"][2], "{rule}: the cache answers otherwise: {result}");
            let same = result["other"] == result["other_fresh"];
            println!(
                "{rule}: the same prompt, a state and the cache give the same; a prompt that begins alike {}",
                if same { "also" } else { "another text than a fresh context" }
            );
        }
        Ok(())
    }

    /// llama-cpp-python on our library, or on llama.cpp's own. The script writes one JSON object.
    fn python(&self, script: &str, ours: bool, lazy: Option<&str>, arguments: &[&Path]) -> Result<Value> {
        let theirs = upstream::tool("llama-simple")?;
        let lib = if ours { &self.lib } else { theirs.parent().context("a folder")? };
        let mut script = self.script(script);
        script.env("PYTHONPATH", python_packages()?).env("LLAMA_CPP_LIB_PATH", lib).env_remove("SIMLAYER_LAZY");
        script.envs(lazy.map(|rule| ("SIMLAYER_LAZY", rule))).arg(&self.model).args(arguments);
        let output = sh::output(&mut script)?;
        serde_json::from_str(&output).with_context(|| format!("no JSON: {output}"))
    }

    /// Completion, streaming, chat, JSON by a grammar, embeddings and states, as on llama.cpp's own library.
    fn python_features(&self) -> Result<()> {
        let text = long_text()?;
        let arguments = [text.as_path(), Path::new("features")];
        let [ours, theirs] = [true, false].map(|ours| self.python("python.py", ours, None, &arguments));
        let (ours, theirs) = (ours?, theirs?);
        println!("completion and streaming: {}\nchat: {}", ours["completion"], ours["chat"]);
        println!("JSON by a grammar: {}", ours["json"]);
        ensure!(ours["json"]["name"].is_string() && ours["json"]["age"].is_i64(), "not what the schema asks for");
        ensure!(ours["completion"] == ours["streamed"], "streaming says otherwise: {}", ours["streamed"]);
        let n_saved = ours["saved"].as_array().map_or(0, Vec::len);
        println!("a saved state went on with the same {n_saved} tokens");
        ensure!(n_saved == 12 && ours["saved"] == ours["loaded"], "a saved state goes on otherwise");
        let width = |of: &Value| of.as_array().and_then(|list| list.first()?.as_array()).map_or(0, Vec::len);
        println!("embeddings: of {} tokens, pooled of {} numbers", width(&ours["embeddings"]), width(&ours["pooled"]));
        for name in ["completion", "chat", "json", "saved", "embeddings", "pooled"] {
            ensure!(ours[name] == theirs[name], "{name} is another on llama.cpp: {}", theirs[name]);
        }
        println!("all of it to the last digit as on llama.cpp's own library");
        Ok(())
    }

    /// Its own tests end as they do on llama.cpp's own library.
    fn python_tests(&self) -> Result<()> {
        let folder = upstream::python_tests()?;
        let [ours, theirs] = [true, false].map(|ours| self.python("own_tests.py", ours, None, &[folder.as_path()]));
        let (ours, theirs) = (ours?, theirs?);
        let names = |outcome: &str| -> Vec<&str> {
            let all = ours.as_object().into_iter().flatten();
            all.filter(|(_, found)| *found == outcome).map(|(name, _)| name.as_str()).collect()
        };
        let [passed, failed, skipped] = ["passed", "failed", "skipped"].map(names);
        println!("llama-cpp-python's tests: {} passed: {passed:?}", passed.len());
        println!("{} failed, as on llama.cpp (they know another model's answers): {failed:?}", failed.len());
        println!("{} skipped for lack of such a model: {skipped:?}", skipped.len());
        ensure!(!passed.is_empty(), "no test passed");
        ensure!(ours == theirs, "on llama.cpp's own library they end otherwise: {theirs}");
        Ok(())
    }

    /// A long prompt with half of the layers lazy: what the report says, what it saves, and what `simlayer-run` says.
    fn python_lazy(&self) -> Result<()> {
        let text = long_text()?;
        let arguments = [text.as_path(), Path::new("long")];
        let lazy = self.python("python.py", true, Some("budget:0.5"), &arguments)?;
        let full = self.python("python.py", true, None, &arguments)?;
        println!("6000 tokens, SIMLAYER_LAZY=budget:0.5: lazy layers {}", lazy["lazy_layers"]);
        println!("resident memory grew by {} bytes, without it by {}", lazy["resident"], full["resident"]);
        ensure!(full["lazy_layers"].as_array().is_some_and(Vec::is_empty), "layers are lazy that should not be");
        let n_lazy = lazy["lazy_layers"].as_array().map_or(0, Vec::len);
        ensure!(n_lazy == 15, "{n_lazy} lazy layers instead of 15");
        ensure!(lazy["resident"].as_u64() < full["resident"].as_u64(), "resident memory does not fall");
        let ours = self.simlayer_run(lazy["prompt"].as_str().context("a prompt")?)?;
        println!("simlayer-run: {}\nllama-cpp-python: {}", ours["text"], lazy["text"]);
        let n_tokens = lazy["tokens"].as_array().map_or(0, Vec::len);
        ensure!(
            n_tokens == 24 && lazy["tokens"] == ours["tokens"],
            "they differ: {} {}",
            lazy["tokens"],
            ours["tokens"]
        );
        println!("the same {n_tokens} tokens");
        Ok(())
    }

    /// What our own tool says after the same prompt, greedily, in its JSON.
    fn simlayer_run(&self, prompt: &str) -> Result<Value> {
        let program = self.env.build_simlayer_run()?;
        let file = prepare::tools_dir().join("frontends-prompt.txt");
        std::fs::write(&file, prompt)?;
        let mut command = self.env.command(&program.display().to_string());
        command.arg("-m").arg(&self.model).arg("-f").arg(&file).args(["-n", "24", "--temp", "0", "--json"]);
        let answer: Value = serde_json::from_str(&sh::output(command.args(["--lazy", "budget:0.5"]))?)?;
        ensure!(answer["prompt_tokens"] == 6000, "{} prompt tokens instead of 6000", answer["prompt_tokens"]);
        Ok(answer)
    }

    /// What llama-server says about pictures is what it says on unmodified llama.cpp, to the last digit, with the same ggml:
    /// the picture's rows are then the same.
    fn picture(&self) -> Result<()> {
        let folder = prepare::tools_dir().join("frontends-picture");
        std::fs::create_dir_all(&folder)?;
        let sees = folder.join("mmproj.gguf");
        let mut cargo = self.env.cargo();
        cargo.args([
            "run",
            "--release",
            "-q",
            "-p",
            "simlayer-testkit",
            "--example",
            "random_clip",
            "--",
            SMOLLM2_WIDTH,
        ]);
        sh::run(cargo.arg(&sees))?;
        let upstreams = folder.join("lib");
        if upstreams.exists() {
            std::fs::remove_dir_all(&upstreams)?;
        }
        std::fs::create_dir_all(&upstreams)?;
        for entry in std::fs::read_dir(&self.lib)? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            if name.to_string_lossy().starts_with("libggml") {
                symlink(&path, upstreams.join(name))?;
            }
        }
        symlink(self.lib.join("libsimlayer-upstream.so"), upstreams.join("libllama.so.0"))?;
        let answers = |lib: &Path| -> Result<Value> {
            let tool = self.tool("llama-server", true)?;
            let mut script = self.script("picture.py");
            script.env("LD_LIBRARY_PATH", lib).arg(tool.get_program()).args(tool.get_args());
            serde_json::from_str(&sh::output(script.arg("--mmproj").arg(&sees))?).context("picture.py wrote no JSON")
        };
        let (ours, theirs) = (answers(&self.lib)?, answers(&upstreams)?);
        println!("llama-server --mmproj: {}", ours[0]["text"]);
        ensure!(ours == theirs, "llama.cpp says otherwise: {theirs}, ours: {ours}");
        Ok(())
    }

    fn script(&self, name: &str) -> Command {
        let mut command = self.env.command("python3");
        command.arg(root().join("xtask/frontends").join(name));
        command
    }
}

/// Elements of SmolLM2's embeddings.
const SMOLLM2_WIDTH: &str = "576";

/// Rules for lazy layers that conversations are held under.
const RULES: [&str; 4] = ["auto", "budget:0.5", "profile:0.8", "threshold"];

/// Tokens that a turn may read beyond the first, and a regenerated answer.
const MOST_READ: u64 = 64;

fn entries(talk: &Value) -> impl DoubleEndedIterator<Item = &Value> {
    talk.as_array().into_iter().flatten()
}

/// What is asked of each request behind the first of a conversation.
fn check_talk(talk: &Value) -> Result<()> {
    let mut answer: Option<&Value> = None;
    for (i, entry) in entries(talk).enumerate() {
        let what = entry["what"].as_str().context("a request without a name")?;
        let read = entry["read"].as_u64().context("no number of tokens")?;
        // A branch begins behind an earlier turn and reads what followed it anew, as does what is said after cancelling.
        ensure!(i == 0 || what == "branch" || read <= MOST_READ, "{what}: {read} tokens are read: {talk}");
        if what.starts_with("regenerate") {
            ensure!(answer == Some(&entry["text"]), "{what}: the answer is another one: {talk}");
        }
        answer = Some(&entry["text"]);
    }
    Ok(())
}

/// The demo's story, twice: enough for four chunks.
fn long_text() -> Result<PathBuf> {
    let story = std::fs::read_to_string(root().join("xtask/demo/story.txt"))?;
    let path = prepare::tools_dir().join("frontends-text.txt");
    std::fs::create_dir_all(prepare::tools_dir())?;
    std::fs::write(&path, story.repeat(2))?;
    Ok(path)
}

/// llama-cpp-python without a library of its own, with what it imports, in a folder for PYTHONPATH.
fn python_packages() -> Result<PathBuf> {
    let dir = prepare::tools_dir().join("frontends");
    // What the folder was made from; written last.
    let stamp = dir.join("pins.txt");
    let pins = ["frontends", "upstream"].map(|name| std::fs::read_to_string(prepare::requirements(name)));
    let pins = pins.into_iter().collect::<std::io::Result<String>>()?;
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == pins) {
        return Ok(dir);
    }
    prepare::pip_install("build-backend")?;
    for (pins, arguments) in [("frontends", &[][..]), ("upstream", &["--no-build-isolation", "--no-binary", ":all:"])] {
        let mut pip = prepare::pip()?;
        pip.args(["install", "--quiet", "--no-deps", "--require-hashes", "--upgrade"]).args(arguments);
        pip.env("CMAKE_ARGS", "-DLLAMA_BUILD=OFF").arg("--target").arg(&dir);
        sh::run(pip.arg("-r").arg(prepare::requirements(pins)))?;
    }
    if !dir.join("llama_cpp/__init__.py").is_file() {
        bail!("pip has not put llama_cpp into {}", dir.display());
    }
    std::fs::write(&stamp, pins)?;
    Ok(dir)
}
