//! The program as a user runs it: the real binary on the real model.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use simlayer_testkit::{RandomLora, RandomModel, smollm2_path};

/// What a run wrote, and how it ended.
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    fn text(&self) -> &str {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        &self.stdout
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
    // Whatever profiles whoever runs the tests may have.
    command.env("SIMLAYER_PROFILES", "/no/such/folder");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn with_stdin(args: &[&str], stdin: &[u8]) -> Ran {
    let mut child = command(args).spawn().unwrap();
    // A program that ends before it has read everything closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap().into()
}

/// Runs the program with these arguments; `@` stands for `-m` and the model. One thread is enough, and does not wait
/// for others when the machine is busy with other tests.
macro_rules! run {
    ($($arg:expr),* $(,)?) => { with_stdin(&arguments(&[$($arg),*]), b"") };
}

fn model() -> String {
    smollm2_path().to_str().unwrap().to_owned()
}

fn arguments<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let model: &'static str = Box::leak(model().into_boxed_str());
    args.iter().flat_map(|&arg| if arg == "@" { vec!["-m", model, "-t", "1"] } else { vec![arg] }).collect()
}

#[test]
fn json_is_one_object() {
    let ran = run!["@", "-p", "The sea is", "-n", "12", "--temp", "0", "--json"];
    let json = ran.json();
    assert_eq!(ran.stdout.trim_end().lines().count(), 1);
    assert_eq!((json["prompt_tokens"].as_u64(), json["generated_tokens"].as_u64()), (Some(3), Some(12)));
    assert_eq!(json["tokens"].as_array().map(Vec::len), Some(12));
    assert_eq!(json["stop"], "length");
    assert!(json["text"].as_str().is_some_and(|text| text.len() > 12));
    for key in ["context_tokens", "f16_bytes", "allocated_bytes", "peak_bytes", "lazy_layers", "active_layers"] {
        assert!(json["kv"][key].is_u64(), "{key}");
    }
    // The last token of all is not read any more.
    assert_eq!(json["kv"]["context_tokens"], 14);
    assert!(json["kv"]["compression"].is_f64());
    assert_eq!(json["timings"].as_object().map(serde_json::Map::len), Some(5));
    for key in ["load_ms", "prefill_ms", "decode_ms", "prefill_tokens_per_second", "decode_tokens_per_second"] {
        assert!(json["timings"][key].as_f64().is_some_and(|value| value > 0.0), "{key}");
    }
    for line in ["prefill", "decode", "KV cache", "layers"] {
        assert!(ran.stderr.contains(line), "{}", ran.stderr);
    }
}

#[test]
fn streamed_text_is_the_text_of_the_json() {
    let streamed = run!["@", "-p", "Once upon a time", "-n", "24", "--temp", "0"];
    let json = run!["@", "-p", "Once upon a time", "-n", "24", "--temp", "0", "--json"].json();
    assert_eq!(streamed.text(), format!("{}\n", json["text"].as_str().unwrap()));
    let with_prompt = run!["@", "-p", "Once upon a time", "-n", "24", "--temp", "0", "--display-prompt"];
    assert_eq!(with_prompt.text(), format!("Once upon a time{}", streamed.text()));
}

#[test]
fn characters_of_several_tokens_are_shown_whole() {
    let grammar = "root ::= \"🦙é漢🏳️‍🌈\"";
    let ran = run!["@", "-p", "Hi", "--grammar", grammar];
    assert_eq!(ran.text(), "🦙é漢🏳️‍🌈\n");
    let json = run!["@", "-p", "Hi", "--grammar", grammar, "--json"].json();
    assert_eq!((json["text"].as_str(), json["stop"].as_str()), (Some("🦙é漢🏳️‍🌈"), Some("eos")));
    assert!(json["generated_tokens"].as_u64() > Some(4));
}

#[test]
fn the_seed_decides() {
    let text = |seed: &str| run!["@", "-p", "My favourite", "-n", "16", "-s", seed, "--json"].json();
    let first = text("7");
    assert_eq!(first["seed"], 7);
    assert_eq!(first["tokens"], text("7")["tokens"]);
    assert_ne!(first["tokens"], text("8")["tokens"]);
    let greedy = |seed: &str| run!["@", "-p", "My favourite", "-n", "16", "--temp", "0", "-s", seed, "--json"].json();
    assert_eq!(greedy("1")["tokens"], greedy("2")["tokens"]);
}

#[test]
fn prompts_from_files_and_stdin() {
    let tokens = |json: Value| (json["prompt_tokens"].clone(), json["tokens"].clone());
    let options = ["-n", "8", "--temp", "0", "--json"];
    let run = |prompt: &[&str], stdin: &[u8]| {
        tokens(with_stdin(&arguments(&[&["@"], prompt, &options].concat()), stdin).json())
    };
    let expected = run(&["-p", "First line\\nSecond line"], b"");
    assert_eq!(run(&["-f", "-"], b"First line\nSecond line\n"), expected);
    assert_ne!(run(&["-p", "First line\\nSecond line", "--no-escape"], b""), expected);

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "First line\nSecond line").unwrap();
    assert_eq!(run(&["-f", file.path().to_str().unwrap()], b""), expected);
    // Special tokens are read as such; bytes that are no text are no error.
    assert_eq!(run(&["-p", "<|im_start|>user"], b"").0, 2);
    run(&["-f", "-"], b"\xff\xfe\x00 text");
}

#[test]
fn wrong_usage_has_code_2() {
    let cases: &[&[&str]] = &[
        &[],
        &["-p", "x"],
        &["@"],
        &["@", "-p", "x", "-f", "y"],
        &["@", "-p", "x", "--no-such-option"],
        &["@", "-p", "x", "-n", "-5"],
        &["@", "-p", "x", "-ctk", "q3_k"],
        &["@", "-p", "x", "-fa", "perhaps"],
        &["@", "-p", "x", "-ngl", "some"],
        &["@", "-p", "x", "-dev", "CUDA7"],
        &["@", "-p", "x", "--lazy", "sometimes"],
        &["@", "-p", "x", "--lazy", "budget:2"],
        &["@", "-p", "x", "--lazy", "profile:kl=0"],
        &["@", "-p", "x", "--lazy", "profile:1.5"],
        &["@", "-p", "x", "--lazy-type", "q4_0/"],
        &["@", "-p", "x", "--lazy-at", "noon"],
        &["@", "-p", "x", "--seed", "99999999999"],
        &["@", "-p", "x", "--repeat-last-n", "-2"],
        &["@", "-p", "x", "--logit-bias", "12"],
        &["@", "chat", "--chat-template", "nosuch"],
        &["@", "bench", "--prompt", "0", "--gen", "0"],
        &["completions", "nosuch"],
    ];
    for case in cases {
        let ran = with_stdin(&arguments(case), b"");
        assert_eq!(ran.code, Some(2), "{case:?}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("error: ") && ran.stdout.is_empty(), "{case:?}: {}", ran.stderr);
    }
}

#[test]
fn failures_have_code_1_and_say_what_failed() {
    let not_a_model = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(not_a_model.path(), "this is no model").unwrap();
    let not_a_model = not_a_model.path().to_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let others = folder.path().join("others.gguf");
    RandomModel::tiny().gguf().set("general.architecture", "gptneox").write(&others);
    let others = others.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["-m", "no/such/model.gguf", "-p", "x"], "no/such/model.gguf"),
        (&["-m", not_a_model, "-p", "x"], not_a_model),
        (&["-m", others, "-p", "x"], "llama.cpp's own programs may run it, also on simlayer's libllama.so.0"),
        (&["@", "-f", "no/such/prompt.txt"], "no/such/prompt.txt"),
        (&["@", "-p", "x", "--grammar-file", "no/such.gbnf"], "no/such.gbnf"),
        (&["@", "-p", "x", "--lazy-profile", "no/such.toml"], "no/such.toml"),
        (&["@", "-p", "x", "--grammar", "root ::= ("], "grammar"),
        (&["@", "-p", "x", "-j", "{"], "--json-schema is no JSON"),
        (&["@", "-p", "x", "-j", "{\"type\": \"colour\"}"], "unrecognized type colour"),
        (&["@", "-p", "x", "-jf", "no/such.json"], "no/such.json"),
        (&["@", "-p", "x", "--repeat-penalty", "0"], "repeat_penalty"),
        (&["@", "-p", "a b c d e f g h i j", "-c", "4"], "n_ctx"),
        (&["@", "-p", ""], ""),
    ];
    for (case, mention) in cases {
        let ran = with_stdin(&arguments(case), b"");
        if mention.is_empty() {
            // This model adds no BOS: an empty prompt is nothing to go on from.
            assert!(ran.stderr.contains("empty"), "{}", ran.stderr);
        }
        assert_eq!(ran.code, Some(1), "{case:?}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(mention), "{case:?}: {}", ran.stderr);
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{case:?}: {}", ran.stderr);
        assert!(ran.stdout.is_empty());
    }
}

fn press_ctrl_c(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Starts the program, waits for the first bytes on the pipe that `from` takes, and presses Ctrl-C.
fn interrupted(args: &[&str]) -> Ran {
    let mut child = command(&arguments(args)).spawn().unwrap();
    let mut first = [0; 16];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    press_ctrl_c(&child);
    let mut ran = Ran::from(child.wait_with_output().unwrap());
    ran.stdout.insert_str(0, std::str::from_utf8(&first).unwrap());
    ran
}

#[test]
fn ctrl_c_ends_a_generation_cleanly() {
    let ran = interrupted(&["@", "-p", "1 2 3 4 5", "--ignore-eos", "--temp", "0"]);
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    assert!(ran.stderr.contains("decode") && ran.stderr.contains("KV cache"), "{}", ran.stderr);
    assert!(ran.stdout.ends_with('\n'));
}

#[test]
fn ctrl_c_ends_a_prefill_and_still_gives_the_json() {
    let mut child = command(&arguments(&["@", "-f", "-", "-n", "4", "--json", "-v"])).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all("All work and no play makes Jack a dull boy. ".repeat(600).as_bytes()).unwrap();
    drop(stdin);
    // The line about the session comes right before the prompt is read.
    let mut stderr = child.stderr.take().unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("lazy layers by") {
        let mut byte = [0];
        assert_eq!(stderr.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
        seen.extend(byte);
    }
    press_ctrl_c(&child);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(130), "{rest}");
    let json: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((json["stop"].as_str(), json["generated_tokens"].as_u64()), (Some("interrupted"), Some(0)));
    // The report has no speed of nothing, and no compression.
    assert!(json["kv"]["compression"].is_f64() && json["timings"]["decode_tokens_per_second"].is_f64());
    assert!(
        !rest.contains("tokens/s") && !rest.contains("compression") && rest.contains("decode   0 tokens"),
        "{rest}"
    );
}

#[test]
fn one_signal_ends_a_conversation_that_waits_for_its_next_line() {
    let mut child = command(&arguments(&["@", "chat", "-n", "4", "--temp", "0"])).spawn().unwrap();
    // The pipe stays open.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Hi\n").unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut answer = String::new();
    stdout.read_line(&mut answer).unwrap();
    assert!(answer.trim().len() > 1, "{answer:?}");
    std::thread::sleep(Duration::from_millis(200));
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(ended_within(&mut child, Duration::from_secs(10)), Some(130));
    drop(stdin);
}

#[test]
fn one_signal_ends_a_generation_whose_text_nobody_takes() {
    // More than a pipe holds, in few tokens; nobody reads it.
    let prompt = format!("{}\n", "-".repeat(64)).repeat(1100);
    let mut child = command(&arguments(&["@", "-f", "-", "--display-prompt", "-c", "8192", "-v"])).spawn().unwrap();
    child.stdin.take().unwrap().write_all(prompt.as_bytes()).unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("lazy layers by") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0);
    }
    std::thread::sleep(Duration::from_millis(300));
    press_ctrl_c(&child);
    assert_eq!(ended_within(&mut child, Duration::from_secs(10)), Some(130));
}

/// What is written when all is computed, into a pipe that has no room.
#[test]
#[cfg(target_os = "linux")]
fn one_signal_ends_a_report_that_nobody_takes() {
    let text = tempfile::NamedTempFile::new().unwrap();
    fs::write(text.path(), "All work and no play makes Jack a dull boy. ".repeat(4)).unwrap();
    let text = text.path().to_str().unwrap();
    let perplexity = ["@", "perplexity", "-f", text, "--skip", "8", "--score", "8"];
    let commands = [
        vec!["@", "bench", "--prompt", "8", "--gen", "0", "--reps", "1", "--json"],
        perplexity.to_vec(),
        [&perplexity[..], &["--json"]].concat(),
    ];
    for args in commands {
        let (reader, mut writer) = std::io::pipe().unwrap();
        // As much as a pipe holds.
        writer.write_all(&[b' '; 64 << 10]).unwrap();
        let mut child = command(&arguments(&args)).stdout(writer).spawn().unwrap();
        wait_until_it_writes(&mut child);
        press_ctrl_c(&child);
        assert_eq!(ended_within(&mut child, Duration::from_secs(10)), Some(130), "{args:?}");
        drop(reader);
    }
}

/// Waits until the program's main thread is inside a system call on its standard output, and stays there.
#[cfg(target_os = "linux")]
fn wait_until_it_writes(child: &mut Child) {
    let mut seen = 0;
    while seen < 10 {
        assert_eq!(child.try_wait().unwrap(), None, "it has ended");
        // The call's number and its first argument; "running" when there is none.
        let call = fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap();
        seen = if call.split(' ').nth(1) == Some("0x1") { seen + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The exit code; a program that goes on is killed.
fn ended_within(child: &mut Child, patience: Duration) -> Option<i32> {
    let start = Instant::now();
    while start.elapsed() < patience {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

#[test]
fn a_closed_pipe_ends_the_program() {
    let mut child = command(&arguments(&["@", "-p", "1 2 3", "--ignore-eos"])).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(Ran::from(child.wait_with_output().unwrap()).code, Some(0));
}

#[test]
fn generation_stops_where_it_should() {
    let full = run!["@", "-p", "1 2 3", "-c", "40", "--ignore-eos", "--temp", "0", "--json"];
    let json = full.json();
    let (prompt, generated) = (json["prompt_tokens"].as_u64().unwrap(), json["generated_tokens"].as_u64().unwrap());
    assert_eq!((json["stop"].as_str(), prompt + generated), (Some("context"), 41));
    assert!(full.stderr.contains("40"), "{}", full.stderr);

    let none = run!["@", "-p", "1 2 3", "-n", "0", "--json"].json();
    assert_eq!((none["generated_tokens"].as_u64(), none["kv"]["context_tokens"].as_u64()), (Some(0), Some(prompt)));

    // The end-of-text token wins by its bias, unless it is to be ignored.
    let eos = ["@", "-p", "1 2 3", "-n", "3", "--temp", "0", "--logit-bias", "2+1000", "--json"];
    let ended = with_stdin(&arguments(&eos), b"").json();
    assert_eq!((ended["stop"].as_str(), ended["generated_tokens"].as_u64()), (Some("eos"), Some(0)));
    let ignored = with_stdin(&arguments(&[&eos[..], &["--ignore-eos"]].concat()), b"").json();
    assert_eq!((ignored["stop"].as_str(), ignored["generated_tokens"].as_u64()), (Some("length"), Some(3)));
}

#[test]
fn grammars() {
    for seed in ["1", "2", "3"] {
        let ran = run!["@", "-p", "Is the sky blue?", "--grammar", "root ::= \"yes\" | \"no\"", "-s", seed];
        assert!(["yes\n", "no\n"].contains(&ran.text()), "{}", ran.stdout);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "root ::= [0-9]{3}\n").unwrap();
    let ran = run!["@", "-p", "A number:", "--grammar-file", file.path().to_str().unwrap()];
    let number = ran.text().trim_end();
    assert!(number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit()), "{number}");

    let schema = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120}}, "required": ["name", "age"]}"#;
    std::fs::write(file.path(), schema).unwrap();
    for schema in [["-j", schema], ["-jf", file.path().to_str().unwrap()]] {
        let ran = run!["@", "-p", "Ada, 36 years old, as JSON: ", "-n", "64", "--temp", "0", schema[0], schema[1]];
        let person: serde_json::Value = serde_json::from_str(ran.text()).unwrap();
        assert!(person["name"].as_str().is_some_and(|name| name.len() <= 48), "{person}");
        assert!(person["age"].as_i64().is_some_and(|age| (0..=120).contains(&age)), "{person}");
    }
}

/// llama.cpp's command lines: what is not supported says so, what does nothing here may be given.
#[test]
fn llama_cpps_command_lines() {
    for (args, said) in [
        (&["-dr", "some/model", "-p", "hi"][..], "-dr is not supported: fetch the model with -hf or -mu"),
        (&["@", "-p", "hi", "-mli"], "-mli is not supported: give a long message with -f"),
        (&["chat", "@", "--chat-template-kwargs", "[1]"], "it must be a JSON object"),
        (&["@", "-p", "hi", "-sys", "x"], "-sys (--system) is no option of generating"),
        (&["@", "-p", "hi", "-nope"], "there is no option -nope"),
        (&["@", "-p", "hi", "--override-kv", "a=b"], "it must be KEY=int:N"),
    ] {
        let ran = with_stdin(&arguments(args), b"");
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(said), "{args:?}: {}", ran.stderr);
    }
    let say = |options: &[&str]| {
        let all = [&["@", "-p", "The sea is", "-n", "12", "--temp", "0", "--json"], options].concat();
        with_stdin(&arguments(&all), b"").json()
    };
    let text = |json: &Value| json["text"].as_str().unwrap().to_owned();
    let alone = say(&[]);
    let same = ["-no-cnv", "--no-mmap", "--mlock", "--jinja", "--color", "auto", "--no-warmup", "-nr", "-np", "1"];
    assert_eq!(text(&say(&same)), text(&alone));
    // The file's own values in other words, and others.
    assert_eq!(text(&say(&["--rope-freq-base", "100000", "--rope-scaling", "none"])), text(&alone));
    assert_ne!(text(&say(&["--rope-freq-base", "500"])), text(&alone));
    assert_ne!(text(&say(&["--override-kv", "llama.rope.freq_base=float:500"])), text(&alone));
    assert_ne!(text(&say(&["--rope-scale", "16"])), text(&alone));
    assert_eq!(text(&say(&["--rope-scale", "16"])), text(&say(&["--rope-freq-scale", "0.0625"])));
    // A text that ends it is not part of it.
    let whole = text(&alone);
    let stop = &whole[4..8];
    let stopped = say(&["-r", "never to be found", "-r", stop]);
    assert_eq!((text(&stopped).as_str(), &stopped["stop"]), (&whole[..whole.find(stop).unwrap()], &"stop".into()));
    // Every byte of a file.
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"The sea is\n").unwrap();
    let path = file.path().to_str().unwrap();
    let read = |option: &str| run!["@", option, path, "-n", "1", "--json"].json()["prompt_tokens"].as_u64();
    assert_eq!((read("-f"), read("-bf")), (Some(3), Some(4)));
}

/// llama-cli's ways to a conversation are the command chat.
#[test]
fn a_conversation_of_one_turn() {
    let options = ["-n", "8", "--temp", "0", "-c", "512"];
    let chat =
        with_stdin(&arguments(&[&["chat", "@"][..], &options].concat()), b"What is the sea?\nAnd this is not read\n");
    let first = chat.text().lines().next().unwrap().to_owned();
    for asked in [
        &["@", "-p", "What is the sea?", "-st"][..],
        &["@", "-cnv", "-p", "What is the sea?", "-st"],
        &["chat", "@", "-p", "What is the sea?", "--single-turn"],
    ] {
        let ran = with_stdin(&arguments(&[asked, &options].concat()), b"another question\n");
        assert_eq!(ran.text().trim_end(), first, "{asked:?}");
    }
    // Variables reach the template.
    let mut template = tempfile::NamedTempFile::new().unwrap();
    template.write_all(b"{{ messages[0].content }}{% if shout %} IS FOR THE SEA{% endif %}").unwrap();
    let path = template.path().to_str().unwrap();
    let with = |variables: &str| {
        let asked = ["@", "-st", "-p", "A", "--chat-template-file", path, "--chat-template-kwargs", variables];
        with_stdin(&arguments(&[&asked[..], &options].concat()), b"").text().to_owned()
    };
    assert_ne!(with("{\"shout\": true}"), with("{}"));
}

/// A conversation that was kept goes on without reading it anew; one of another model is refused.
#[test]
fn conversations_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let kept = path("kept.chat");
    fs::write(path("question.txt"), "Name a colour.\n").unwrap();
    let options = ["chat", "@", "-n", "8", "--temp", "0", "-c", "1024"];
    let say = |lines: String| with_stdin(&arguments(&options), lines.as_bytes());
    let whole = say(format!("Name a colour.\n/save {kept}\nAnother one.\n"));
    let answers: Vec<&str> = whole.text().lines().filter(|line| !line.is_empty()).collect();
    let read = say(format!("/read {}\n", path("question.txt")));
    assert!(read.text().lines().any(|line| line == answers[0]), "{answers:?}: {}", read.text());
    let loaded = say(format!("/load {kept}\nAnother one.\n"));
    assert!(loaded.stderr.contains("2 messages"), "{}", loaded.stderr);
    assert_eq!(loaded.text().trim_end(), whole.text().trim_end().strip_prefix(read.text().trim_end()).unwrap().trim());
    // Only the new question is read.
    let prefilled = |ran: &Ran| {
        let line = ran.stderr.lines().find_map(|line| line.strip_prefix("prefill")).unwrap().trim();
        line.split(' ').next().unwrap().parse::<usize>().unwrap()
    };
    assert!(prefilled(&loaded) < prefilled(&whole) / 2, "{} and {}", prefilled(&loaded), prefilled(&whole));
    // Taken back, the question was never asked.
    let undone = say("Name a colour.\nSay nothing.\n/undo\nAnother one.\n".to_owned());
    assert!(undone.text().trim_end().ends_with(loaded.text().trim_end()), "{}", undone.text());
    // Of another model.
    let other = path("other.gguf");
    RandomModel::tiny().gguf().write(&other);
    let refused = with_stdin(&["chat", "-m", &other, "-c", "256"], format!("/load {kept}\n").as_bytes());
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("kept.chat: "), "{}", refused.stderr);
}

/// A prompt is read once, and one that begins alike from where it differs.
#[test]
fn prompts_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.bin").display().to_string();
    let say = |prompt: &str, more: &[&str]| {
        let all = [&["@", "-p", prompt, "-n", "8", "--temp", "0", "--json", "--prompt-cache", &file], more].concat();
        with_stdin(&arguments(&all), b"").json()
    };
    let prompt = "The sea is wide and the ships on it are small, and the harbour";
    let (first, second) = (say(prompt, &[]), say(prompt, &[]));
    let n = first["prompt_tokens"].as_u64().unwrap();
    assert_eq!((first["read_tokens"].as_u64(), second["read_tokens"].as_u64()), (Some(n), Some(1)));
    assert_eq!(first["text"], second["text"]);
    let bytes = fs::read(&file).unwrap();
    let longer = format!("{prompt} has a lighthouse. It was built in");
    let read_only = say(&longer, &["--prompt-cache-ro"]);
    assert!(read_only["read_tokens"].as_u64().unwrap() < n, "{read_only}");
    assert_eq!(fs::read(&file).unwrap(), bytes, "it is not written");
    assert_eq!(read_only["text"], run!["@", "-p", &longer, "-n", "8", "--temp", "0", "--json"].json()["text"]);
    // With the answer in it, the text goes on.
    let whole = say(prompt, &["--prompt-cache-all"]);
    let on = format!("{prompt}{}", whole["text"].as_str().unwrap());
    assert!(say(&on, &["--prompt-cache-ro"])["read_tokens"].as_u64().unwrap() <= 3);
    fs::write(&file, b"damaged").unwrap();
    let damaged = run!["@", "-p", "x", "-n", "1", "--prompt-cache", &file];
    assert_eq!(damaged.code, Some(1));
    assert!(damaged.stderr.contains("--prompt-cache") && damaged.stdout.is_empty(), "{}", damaged.stderr);
}

/// The README's first commands, as they stand there, on a model and a prompt of these names. (Those that measure take long:
/// that they can be typed is tested beside the command line's reader.)
#[test]
fn the_readmes_commands_run() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(fs::canonicalize(model()).unwrap(), folder.path().join("model.gguf")).unwrap();
    fs::write(folder.path().join("prompt.txt"), "The sea is wide, and the ships on it are small.").unwrap();
    let readme = fs::read_to_string(simlayer_testkit::workspace_root().join("README.md")).unwrap();
    let mut ran = Vec::new();
    for (line, words) in simlayer_testkit::markdown::commands(&readme) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let is_long = ["bench", "calibrate", "perplexity", "passkey", "rpc-server", "serve"]
            .iter()
            .any(|name| words.contains(name));
        let is_elsewhere = words.contains(&"--rpc") || words.contains(&"-hf");
        if words[0] != "simlayer-run" || is_long || is_elsewhere {
            continue;
        }
        let mut child = command(&words[1..]).current_dir(folder.path()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(b"/exit\n");
        let output: Ran = child.wait_with_output().unwrap().into();
        assert_eq!(output.code, Some(0), "README.md:{line}: {}", output.stderr);
        ran.push(words[1..].first().copied().unwrap_or_default().to_owned());
    }
    assert!(ran.len() >= 4, "{ran:?}");
    assert!(folder.path().join("scores.svg").is_file());
}

/// Samplers run in the order that is asked for, and as the file recommends where nothing is.
#[test]
fn samplers_and_what_a_file_recommends() {
    let text = |options: &[&str]| {
        let args = [&["@", "-p", "The sea is", "-n", "12", "-s", "7"], options].concat();
        with_stdin(&arguments(&args), b"").text().to_owned()
    };
    let (usual, greedy) = (text(&[]), text(&["--temp", "0"]));
    assert_ne!(usual, greedy);
    assert_eq!(text(&["--samplers", "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature"]), usual);
    assert_eq!(text(&["--sampler-seq", "edskypmxt"]), usual);
    assert_eq!(text(&["--sampler-seq", "k", "--top-k", "1"]), greedy);
    // Without top-k among them its number does not count.
    assert_ne!(text(&["--samplers", "temp", "--top-k", "1"]), greedy);
    assert_eq!(text(&["--numa", "isolate"]), usual);

    let recommends = ["--override-kv", "general.sampling.temp=float:0"];
    assert_eq!(text(&recommends), greedy);
    assert_eq!(text(&[&recommends[..], &["--temp", "0.8"]].concat()), usual);
    assert_eq!(text(&["--override-kv", "general.sampling.sequence=str:top_k,general.sampling.top_k=int:1"]), greedy);

    for (option, value) in [("--samplers", "top_k;nonsense"), ("--sampler-seq", "kz")] {
        let wrong = run!["@", "-p", "x", option, value];
        assert_eq!(wrong.code, Some(2), "{}", wrong.stderr);
        assert!(wrong.stderr.contains("is no sampler") && wrong.stderr.contains("top_k (k)"), "{}", wrong.stderr);
    }
}

/// What one is told without asking.
#[test]
fn first_contact() {
    let long = run!["@", "-p", "The sea", "-n", "1", "-c", "9000"];
    assert!(long.stderr.contains("a context of 9000 tokens; the model was trained with 8192"), "{}", long.stderr);
    assert!(!run!["@", "-p", "The sea", "-n", "1", "-c", "512"].stderr.contains("warning"));
    let plan = run!["devices", "@", "--plan"];
    for said in ["--lazy off, f16", "--lazy budget:0.5 -ctk q8_0 -ctv q4_0", "--lazy profile:0.8", "-c 8192"] {
        assert!(plan.text().contains(said), "{said}: {}", plan.text());
    }
    // A profile's layers are known beforehand; where none is known, that is said.
    let profile = run!["devices", "@", "--plan", "--lazy", "profile:0.8", "--json"];
    let lazy = |cache: &Value| cache["kind"] == "lazy";
    let caches = profile.json()["plan"][0]["caches"].as_array().unwrap().clone();
    assert_eq!(caches.iter().filter(|cache| lazy(cache)).count(), 24, "{caches:?}");
    let folder = tempfile::tempdir().unwrap();
    let unknown = folder.path().join("unknown.gguf");
    RandomModel::tiny().gguf().write(&unknown);
    let unknown = with_stdin(&["devices", "--plan", "-m", unknown.to_str().unwrap()], b"");
    assert!(unknown.text().contains("no profile of") && unknown.text().contains("calibrate"), "{}", unknown.text());
    let doctor = with_stdin(&["doctor", "-m", &model(), "--lib", "/no/such/folder"], b"");
    for said in ["simlayer-run ", "llama.cpp ", "--lib: /no/such/folder has none", "physical cores", "-c 8192"] {
        assert!(doctor.text().contains(said), "{said}: {}", doctor.text());
    }
    let script = run!["completions", "bash"];
    for value in ["budget", "q8_0", "chatml"] {
        assert!(script.text().contains(value), "{value}");
    }
}

/// Adapters change the text as often as they are named and as much as they count; one that counts nothing does not.
#[test]
fn adapters() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.gguf");
    let weights: Vec<_> = (0..30).map(|layer| (format!("blk.{layer}.attn_v.weight"), vec![576, 192])).collect();
    RandomLora { architecture: "llama", rank: 4, alpha: 8.0, seed: 5, gain: 1.0 }.write(&weights, &path);
    let path = path.to_str().unwrap();
    let (nothing, half) = (format!("{path}:0"), format!("{path}:0.5,{path}:0.5"));
    let say = |options: &[&str]| {
        let all = [&["@", "-p", "The sea is", "-n", "12", "--temp", "0", "--json"], options].concat();
        with_stdin(&arguments(&all), b"").json()["text"].as_str().unwrap().to_owned()
    };
    let alone = say(&[]);
    let adapted = say(&["--lora", path]);
    assert_ne!(alone, adapted);
    assert_eq!(say(&["--lora-scaled", &nothing]), alone);
    // Rounding differs a little between once and twice the half; the text is that of neither nothing nor a fault.
    assert_ne!(say(&["--lora-scaled", &half]), alone);
    let wrong = run!["@", "-p", "x", "-n", "1", "--lora", &model()];
    assert_eq!(wrong.code, Some(1));
    assert!(wrong.stderr.contains("key general.type"), "{}", wrong.stderr);
    let wrong = run!["@", "-p", "x", "--lora-scaled", path];
    assert_eq!(wrong.code, Some(2), "{}", wrong.stderr);
}

#[test]
fn llama_cpps_short_options() {
    let plain = run!["@", "-p", "The sea", "-n", "8", "--temp", "0", "--json"].json();
    let ran = run![
        "@", "-p", "The sea", "-n", "8", "--temp", "0", "--json", "-ngl", "99", "-dev", "none", "-ub=64", "-tb", "1",
        "-fa", "on", "-ctk", "f16", "-ctv=f16", "-t", "1"
    ];
    assert_eq!(ran.json()["tokens"], plain["tokens"]);
    let small = run!["@", "-p", "The sea", "-n", "8", "--temp", "0", "--json", "-ctk", "q8_0", "-ctv", "q4_0"].json();
    assert!(small["kv"]["allocated_bytes"].as_u64() < plain["kv"]["allocated_bytes"].as_u64(), "{small}");
}

/// The numbers of the report on stderr: tokens prefilled, decoded, in the context.
fn report(stderr: &str) -> [u64; 3] {
    let number = |start: &str, before: &str| {
        let line = stderr.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{stderr}"));
        let words: Vec<_> = line.split_whitespace().collect();
        let at = words.iter().position(|word| word.starts_with(before)).unwrap_or_else(|| panic!("{line}"));
        words[at - 1].parse().unwrap_or_else(|_| panic!("{line}"))
    };
    [number("prefill", "tokens"), number("decode", "tokens"), number("KV cache", "tokens")]
}

#[test]
fn a_conversation_over_pipes() {
    let chat = |lines: &str, options: &[&str]| {
        with_stdin(&arguments(&[&["@", "chat", "-n", "24", "--temp", "0"], options].concat()), lines.as_bytes())
    };
    let ran = chat("Count to five.\n\nWhat did I ask you to do?\nThank you.\n", &[]);
    assert!(ran.text().trim().len() > 40, "{}", ran.stdout);
    // Nothing was read twice: each turn continues the cache of the turns before.
    let [prefilled, decoded, context] = report(&ran.stderr);
    assert_eq!(prefilled + decoded, context, "{}", ran.stderr);

    let first = chat("Tell me about the sea.\n", &[]);
    let again = chat("Tell me about the sea.\n/regen\n/clear\nTell me about the sea.\n/exit\nHi\n", &[]);
    let answers: Vec<&str> = again.text().lines().collect();
    let [first_answer] = first.text().lines().collect::<Vec<_>>()[..] else { panic!("{}", first.stdout) };
    // The second answer's prompt is in the cache but for its last tokens, which are read in a smaller batch: sums in
    // another order may in time lead to another word.
    assert!(answers.len() == 3 && answers[1].get(..20) == first_answer.get(..20), "{}", again.stdout);
    assert_eq!([answers[0], answers[2]], [first_answer; 2]);

    let pirate = chat("Who are you?\n", &["--system", "You are Blackbeard, a pirate."]);
    assert_ne!(pirate.text(), chat("Who are you?\n", &[]).text());
    // Without a terminal a failure ends it.
    let full = chat("Tell me a very long story about everything.\n", &["-c", "16"]);
    assert!(full.code == Some(1) && full.stderr.contains("n_ctx"), "{}", full.stderr);
}

#[test]
fn chat_templates_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let template = |text: &str| {
        let path = folder.path().join("template.jinja");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let chat = |options: &[&str]| {
        with_stdin(&arguments(&[&["@", "chat", "-n", "4", "--temp", "0"], options].concat()), b"Who are you?\n")
    };
    let prompt_tokens = |ran: &Ran| report(&ran.stderr)[0];
    let system = ["--system", "You are Blackbeard, the pirate."];
    let chatml = chat(&[&["--chat-template", "chatml"], &system[..]].concat());
    chatml.text();

    // Text is handed over as the parts that a template walks.
    let path = template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}\
         <|im_end|>\n{% endfor %}<|im_start|>assistant\n\n",
    );
    let typed = chat(&[&["--chat-template-file", &path], &system[..]].concat());
    assert_eq!((typed.text(), prompt_tokens(&typed)), (chatml.text(), prompt_tokens(&chatml)));

    // A template without system messages.
    let path = template(
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}\
         {% endfor %}<|im_start|>assistant\n\n",
    );
    let (without, with) =
        (chat(&["--chat-template-file", &path]), chat(&[&["--chat-template-file", &path], &system[..]].concat()));
    with.text();
    assert!(prompt_tokens(&with) > prompt_tokens(&without) + 6, "{}", with.stderr);

    // What cannot be shown at all is an error, an empty template is ChatML.
    let path = template("{{ messages[0].role }}");
    let lost = chat(&["--chat-template-file", &path]);
    assert!(lost.code == Some(1) && lost.stderr.contains("would lose the text of message 1 (user)"), "{}", lost.stderr);
    let path = template("");
    let empty = chat(&[&["--chat-template-file", &path], &system[..]].concat());
    assert_eq!(empty.text(), chatml.text());
    assert!(empty.stderr.contains("is empty") && empty.stderr.contains("ChatML"), "{}", empty.stderr);
    assert!(!chatml.stderr.contains("ChatML"), "{}", chatml.stderr);

    let both = chat(&["--chat-template-file", &path, "--chat-template", "chatml"]);
    assert_eq!(both.code, Some(2), "{}", both.stderr);
    let missing = chat(&["--chat-template-file", "no/such.jinja"]);
    assert!(missing.code == Some(1) && missing.stderr.contains("no/such.jinja"), "{}", missing.stderr);
}

#[test]
fn a_conversation_repeats_with_its_seed() {
    let chat = |seed: &str| run_chat("Tell me a joke.\n/regen\n", &["-n", "16", "-s", seed]);
    let first = chat("5");
    assert_eq!(first, chat("5"));
    assert_ne!(first, chat("6"));
}

fn run_chat(lines: &str, options: &[&str]) -> String {
    with_stdin(&arguments(&[&["@", "chat"], options].concat()), lines.as_bytes()).text().to_owned()
}

/// An answer is taken back without reading the prompt anew, though it is longer than what lazy layers keep beyond their
/// window, and comes again.
#[test]
fn a_conversation_with_lazy_layers_goes_on() {
    let chat = |lines: &str| {
        let lazy = ["--lazy", "layers:2,3,5-9", "--lazy-window", "16", "--lazy-slack", "12"];
        let options = [&["@", "chat", "-n", "40", "--temp", "0"], &lazy[..]].concat();
        let ran = with_stdin(&arguments(&options), lines.as_bytes());
        assert!(ran.stderr.contains("layers   7 lazy"), "{}", ran.stderr);
        ran
    };
    let question = "Name three colours of the rainbow and say where they are in it, in one line.";
    let [straight, regenerated] = ["", "/regen\n"].map(|again| chat(&format!("{question}\n{again}Thank you.\n")));
    let text = |ran: &Ran| ran.text().to_owned();
    let [first, thanks] = ["", "Thank you.\n"].map(|more| text(&chat(&format!("{question}\n{more}"))));
    assert_eq!(text(&straight), thanks);
    let rest = thanks.strip_prefix(&first).expect("the same first answer");
    assert_eq!(text(&regenerated), format!("{first}{first}{rest}"));
    // The prompt's last token is all that is given again.
    let [read, read_again] = [&straight, &regenerated].map(|ran| report(&ran.stderr)[0]);
    assert_eq!(read_again, read + 1, "{}", regenerated.stderr);
}

#[test]
fn bench() {
    let args = ["bench", "@", "--prompt", "32,48", "--gen", "4", "--depth", "0,64", "-r", "2", "--lazy", "off"];
    let json = with_stdin(&arguments(&[&args[..], &["--json"]].concat()), b"").json();
    let runs = json["runs"].as_array().unwrap();
    let names: Vec<_> =
        runs.iter().map(|run| (run["test"].as_str().unwrap(), run["depth"].as_u64().unwrap())).collect();
    assert_eq!(names, [("pp32", 0), ("pp48", 0), ("tg4", 0), ("pp32", 64), ("pp48", 64), ("tg4", 64)]);
    for run in runs {
        let samples: Vec<f64> =
            run["samples"].as_array().unwrap().iter().map(|speed| speed.as_f64().unwrap()).collect();
        assert!(samples.len() == 2 && samples.iter().all(|&speed| speed > 0.0));
        assert!((run["tokens_per_second"].as_f64().unwrap() - (samples[0] + samples[1]) / 2.0).abs() < 1e-6);
        assert!(run["stddev"].as_f64().is_some() && run["kv_bytes"].as_u64() > Some(0), "{run}");
    }
    let table = run!["@", "bench", "-p", "16", "-n", "2", "-r", "1"];
    assert!(table.text().contains("pp16") && table.stdout.contains("tg2"), "{}", table.stdout);
}

#[test]
fn completions_and_help() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run!["completions", shell];
        assert!(script.text().contains("lazy-window") && script.stdout.contains("bench"), "{shell}");
    }
    assert!(run!["--help"].text().contains("--grammar-file"));
    assert!(run!["chat", "--help"].text().contains("--system"));
}

/// What a report of a fault should name.
#[test]
fn versions_say_what_was_built() {
    let short = run!["-V"];
    assert_eq!(short.text(), concat!("simlayer-run ", env!("CARGO_PKG_VERSION"), "\n"));
    let long = run!["--version"];
    assert!(long.text().starts_with(short.text()), "{}", long.text());
    let line = |name: &str| {
        let line = long.text().lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {}", long.text())).trim()
    };
    // The package that Cargo.lock pins.
    let lock = fs::read_to_string(simlayer_testkit::workspace_root().join("Cargo.lock")).unwrap();
    let pinned = lock.split("name = \"llama-cpp-sys-2\"\nversion = \"").nth(1).and_then(|rest| rest.split('"').next());
    let (version, origin) = line("ggml:").split_once(" of ").unwrap();
    assert!(version.split('.').count() == 3 && version.split('.').all(|part| part.parse::<u32>().is_ok()), "{version}");
    if std::env::var_os("GGML_SOURCE_DIR").is_none() {
        assert_eq!(origin, format!("llama-cpp-sys-2-{}", pinned.unwrap()));
    }
    let (version, source) = line("llama.cpp:").split_once(" (").unwrap();
    assert!(version.split('.').count() == 3 && version.split('.').all(|part| part.parse::<u32>().is_ok()), "{version}");
    assert_eq!(source.trim_end_matches(')'), origin);
    let features: Vec<&str> = line("features:").split(", ").collect();
    for (feature, is_on) in [("cli", true), ("rpc", cfg!(feature = "rpc")), ("cuda", cfg!(feature = "cuda"))] {
        assert_eq!(features.contains(&feature), is_on, "{feature} in {features:?}");
    }
    let revision = line("revision:");
    let commit = revision.trim_end_matches('+');
    assert!(revision == "unknown" || commit.len() >= 12 && commit.chars().all(|c| c.is_ascii_hexdigit()), "{revision}");

    let build = run!["bench", "@", "-p", "4", "-n", "0", "-r", "1", "--json"].json()["build"].clone();
    assert_eq!(build["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(build["ggml"], line("ggml:"));
    assert_eq!(build["llama_cpp"], line("llama.cpp:"));
    assert_eq!(build["target"], line("target:"));
    assert_eq!(build["revision"], revision);
    assert_eq!(build["features"], serde_json::json!(features));
}
