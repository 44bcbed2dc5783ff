//! The commands that measure quality, as a user runs them: the real binary on the real model, on short texts.

use std::process::Command;

use serde_json::Value;
use simlayer_testkit::{Logits, UpstreamRef, metrics::log_softmax, smollm2_path, workspace_root};

/// Runs a command with one thread and gives its JSON.
fn json(args: &[&str]) -> Value {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let stdout = String::from_utf8(output.stdout).expect("stdout is UTF-8");
    assert_eq!(stdout.trim_end().lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

fn run(args: &[&str]) -> std::process::Output {
    let model = smollm2_path();
    let (command, args) = args.split_first().expect("a command");
    let mut program = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
    program.arg(command).arg("-m").arg(model).args(["-t", "1"]).args(args);
    program.output().expect("it runs")
}

fn number(json: &Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {json}"))
}

fn story() -> String {
    workspace_root().join("xtask/demo/story.txt").to_string_lossy().into_owned()
}

#[test]
fn nothing_diverges_with_everything_off() {
    let score =
        json(&["perplexity", "-f", &story(), "--skip", "96", "--score", "32", "--lazy", "off", "--kl", "--json"]);
    assert_eq!(number(&score, "tokens_scored"), 32.0);
    assert!(number(&score, "kl_mean").abs() < 1e-6, "{score}");
    assert_eq!(number(&score, "same_top"), 1.0);
    assert_eq!(number(&score, "perplexity"), number(&score, "base_perplexity"));
    assert!((number(&score, "nll").exp() - number(&score, "perplexity")).abs() < 1e-9);
}

#[test]
fn laziness_is_seen() {
    let arguments = ["perplexity", "-f", &story(), "--skip", "192", "--score", "32", "--kl", "--json"];
    let score = json(&[&arguments[..], &["--lazy", "layers:0-29", "--lazy-window", "64"]].concat());
    assert!(number(&score, "kl_mean") > 1e-3, "{score}");
    assert!(number(&score, "same_top") < 1.0, "{score}");
    assert_eq!(score["lazy_layers"].as_array().map(Vec::len), Some(30));
    assert_eq!(score["kv"]["lazy_layers"], 30);
}

/// llama-perplexity's own sum: chunks of `n_ctx` tokens with fresh contexts, of which the second half is scored.
#[test]
fn perplexity_is_that_of_llama_perplexity() {
    let (n_ctx, n_chunks) = (128, 2);
    let text = std::fs::read_to_string(story()).expect("the story");
    let upstream = UpstreamRef::new().with_options(&["-t", "1"]);
    let tokens =
        UpstreamRef::new().tokenize(&smollm2_path(), &[text.trim_end_matches('\n').as_bytes()], true, false).remove(0);
    // This model wants no token at the beginning, so that chunks are taken as they are.
    let chunks: Vec<Vec<i32>> = tokens.chunks_exact(n_ctx).take(n_chunks).map(<[i32]>::to_vec).collect();
    let first = n_ctx / 2 + 1;
    let perplexity = |rows: &[Vec<f32>], rows_before_first: usize| {
        let rows = rows.chunks_exact(rows.len() / n_chunks);
        let nlls = chunks.iter().zip(rows).flat_map(|(chunk, rows)| {
            let rows = &rows[rows_before_first..];
            chunk[first..].iter().zip(rows).map(|(&token, row)| -log_softmax(row)[token as usize]).collect::<Vec<_>>()
        });
        let nlls: Vec<f64> = nlls.collect();
        (nlls.iter().sum::<f64>() / nlls.len() as f64).exp()
    };
    // As llama-perplexity feeds a chunk: all at once.
    let at_once = upstream.logits(&smollm2_path(), Logits { prompts: &chunks, all: true, decode: None });
    let at_once = perplexity(&at_once, first - 1);
    // As decoding does.
    let prompts: Vec<Vec<i32>> = chunks.iter().map(|chunk| chunk[..first].to_vec()).collect();
    let decoded: Vec<Vec<i32>> = chunks.iter().map(|chunk| chunk[first..n_ctx - 1].to_vec()).collect();
    let decoded = upstream.logits(&smollm2_path(), Logits { prompts: &prompts, all: false, decode: Some(&decoded) });
    let decoded = perplexity(&decoded, 0);

    let (skip, score) = (first.to_string(), (n_ctx - first).to_string());
    let arguments = ["perplexity", "-f", &story(), "--skip", &skip, "--score", &score, "--chunks", "2", "--json"];
    let ours = json(&[&arguments[..], &["--lazy", "off"]].concat());
    assert_eq!(number(&ours, "tokens_scored") as usize, n_chunks * (n_ctx - first));
    let ours = number(&ours, "perplexity");
    println!("{ours:.6}; llama.cpp {decoded:.6} token by token, {at_once:.6} at once");
    assert!((ours / decoded - 1.0).abs() < 1e-6, "{ours} against {decoded}");
    // The size of a batch changes the rounding of quantised activations, in llama.cpp as here.
    assert!((ours / at_once - 1.0).abs() < 5e-3, "{ours} against {at_once}");
}

#[test]
fn too_short_a_text_is_refused() {
    let output = run(&["perplexity", "-f", &story(), "--skip", "9000", "--score", "10"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("too few to skip 9000"), "{stderr}");
}
