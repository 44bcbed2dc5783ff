//! Checks the reference against itself: what it says must follow from other things that it says.
//! `cargo xtask test` fetches the model.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

const TEXT: &str = "In the spring the river rises and carries the ice away, and the first boats come up from the \
    coast. They bring salt, iron and letters. The people of the upper valley wait for them on the stone bridge, and \
    whoever sees the first sail may ring the bell. Last year it was a child of four, who had to be lifted up to reach \
    the rope. She rang it so long that the captain, who did not know the custom, believed that there was a fire.";

fn model() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{}: missing; `cargo xtask test` fetches it", path.display());
    path
}

/// A file for one test. Tests run at once, so each names its own.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn write(name: &str, value: &Value) -> PathBuf {
    let path = file(name);
    std::fs::write(&path, value.to_string()).unwrap();
    path
}

fn reference(command: &str, args: &[&str], files: &[(&str, &Path)]) -> Value {
    let mut program = Command::new(env!("CARGO_BIN_EXE_upstream-ref"));
    program.arg(command).arg("-m").arg(model()).args(args);
    if command != "tokenize" {
        // Tests run at once, and llama.cpp's threads wait for one another by spinning.
        program.args(["-t", "1"]);
    }
    for (option, path) in files {
        program.arg(option).arg(path);
    }
    let out = program.output().unwrap();
    assert!(out.status.success(), "{program:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn tokens(test: &str) -> Vec<i64> {
    let input = write(&format!("{test}-text.json"), &json!([TEXT]));
    let answer = reference("tokenize", &[], &[("--in", &input)]);
    let tokens = answer["tokens"][0].as_array().unwrap();
    tokens.iter().map(|t| t.as_i64().unwrap()).collect()
}

fn rows(path: &Path, n_vocab: usize) -> Vec<Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let floats: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(floats.len() % n_vocab, 0);
    floats.chunks_exact(n_vocab).map(|row| row.to_vec()).collect()
}

/// With a window of one and no sink, each token sees itself alone: its logits are those of the
/// prompt that has only this token.
#[test]
fn a_window_of_one_is_a_prompt_of_one() {
    let tokens = tokens("one");
    let (prefill, score) = (60, 10);
    let input = write("one-tokens.json", &json!(tokens));
    let restricted = file("one-restricted.bin");
    let args = "--prefill 60 --score 10 --layers all --sink 0 --window 1 --from start";
    let args: Vec<&str> = args.split(' ').collect();
    reference("restricted", &args, &[("--tokens", &input), ("--out", &restricted)]);

    let prompts: Vec<[i64; 1]> = tokens[prefill - 1..prefill - 1 + score].iter().map(|&t| [t]).collect();
    let input = write("one-prompts.json", &json!(prompts));
    let single = file("one-single.bin");
    let answer = reference("logits", &["-fa", "off"], &[("--in", &input), ("--out", &single)]);

    let n_vocab = answer["n_vocab"].as_u64().unwrap() as usize;
    let (restricted, single) = (rows(&restricted, n_vocab), rows(&single, n_vocab));
    assert_eq!((restricted.len(), single.len()), (score, score));
    for (a, b) in restricted.iter().zip(&single) {
        let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        // The batches differ in size, so sums may round differently.
        assert!(worst < 0.05, "logits differ by {worst}");
    }
}

/// A window that covers everything restricts nothing; a narrow one costs something.
#[test]
fn only_a_narrow_window_changes_the_perplexity() {
    let input = write("wide-tokens.json", &json!(tokens("wide")));
    let nll = |args: &str| {
        let args: Vec<&str> = args.split(' ').collect();
        let answer = reference("restricted", &args, &[("--tokens", &input)]);
        answer["nll"].as_f64().unwrap()
    };
    let plain = nll("--prefill 60 --score 30 -fa off");
    assert_eq!(nll("--prefill 60 --score 30 --layers all --window 1000"), plain);
    assert!(nll("--prefill 60 --score 30 --layers all --sink 0 --window 2") > plain + 0.5);
    // Nothing before the prefill's end is touched, but for the first scored token all is prefill.
    let one = nll("--prefill 60 --score 1 -fa off");
    assert_eq!(nll("--prefill 60 --score 1 --layers all --sink 0 --window 2"), one);
    assert_ne!(nll("--prefill 60 --score 1 --layers all --sink 0 --window 2 --from start"), one);
}

/// A window that covers everything has all of the mass; a part has less, and sink and window add up.
#[test]
fn masses_add_up() {
    let tokens = tokens("mass");
    let input = write("mass-tokens.json", &json!(tokens));
    let n = tokens.len();
    let scores = |sinks: usize, window: usize| {
        let (sinks, window) = (sinks.to_string(), window.to_string());
        let args = ["--sinks", &sinks, "--windows", &window, "--lasts", "1"];
        let answer = reference("scores", &args, &[("--tokens", &input)]);
        let layers = answer["scores"][0]["layers"].as_array().unwrap();
        layers.iter().map(|mass| mass.as_f64().unwrap()).collect::<Vec<f64>>()
    };
    let (all, sink, window, both) = (scores(0, n), scores(4, 0), scores(0, 20), scores(4, 20));
    assert_eq!(all.len(), 30);
    for layer in 0..all.len() {
        assert!((all[layer] - 1.0).abs() < 1e-4, "layer {layer}: {}", all[layer]);
        assert!((sink[layer] + window[layer] - both[layer]).abs() < 1e-6, "layer {layer}");
        assert!(both[layer] < 0.9999 && both[layer] > 0.0, "layer {layer}: {}", both[layer]);
    }
    // An overlap is counted once.
    assert_eq!(scores(n, n), all);
}

/// Greedy decoding takes the largest logit of each row that `logits --decode` writes.
#[test]
fn greedy_follows_the_logits() {
    let input = write("greedy-prompts.json", &json!([&tokens("greedy")[..20]]));
    let answer = reference("greedy", &["-n", "8"], &[("--in", &input)]);
    let generated: Vec<usize> =
        answer["results"][0]["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as usize).collect();
    let decode = write("greedy-decode.json", &json!([generated[..7]]));
    let out = file("greedy.bin");
    let answer = reference("logits", &[], &[("--in", &input), ("--decode", &decode), ("--out", &out)]);
    let rows = rows(&out, answer["n_vocab"].as_u64().unwrap() as usize);
    let largest: Vec<usize> = rows
        .iter()
        .map(|row| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap())
        .collect();
    assert_eq!(largest, generated);
}

/// What goes wrong is said on stderr, with exit code 1 and nothing on stdout.
#[test]
fn errors_are_reported() {
    let input = write("bad-tokens.json", &json!([1, 2, 999_999_999]));
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_upstream-ref"))
            .args(args)
            .arg("--tokens")
            .arg(&input)
            .arg("-m")
            .arg(model())
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(out.stdout.is_empty());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    assert!(run(&["scores"]).contains("token 999999999"));
    assert!(run(&["restricted", "--prefill", "2", "--score", "2"]).contains("not enough"));
    assert!(run(&["scores", "-fa", "on"]).contains("flash attention"));
    assert!(run(&["scores", "-ctk", "q9_9"]).contains("q9_9"));
}
