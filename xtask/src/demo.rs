//! From nothing to an answer: fetch a small model, build, ask it about a long text, and say what
//! the cache took.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::prepare::{self, Env};
use crate::sh::{self, step};

const STORY: &str = include_str!("../demo/story.txt");
const QUESTION: &str = "What is the name of the white passenger ship in this story? Answer in one sentence.";

pub fn run() -> Result<()> {
    let mut env = Env::default();
    let model = step("prepare", || {
        prepare::libclang(&mut env)?;
        prepare::model()
    })?;
    let program = step("build", || env.build_simlayer_run())?;
    let answer = step("ask", || ask(&env, &program, &model))?;
    print!("{}", report(&answer)?);
    Ok(())
}

fn ask(env: &Env, program: &Path, model: &Path) -> Result<Value> {
    let prompt_file = prepare::tools_dir().join("demo-prompt.txt");
    std::fs::create_dir_all(prepare::tools_dir())?;
    std::fs::write(&prompt_file, chat_prompt(STORY.trim(), QUESTION))
        .with_context(|| prompt_file.display().to_string())?;
    let mut command = env.command(&program.display().to_string());
    command.arg("-m").arg(model).arg("-f").arg(&prompt_file);
    command.args(["-n", "64", "--temp", "0", "--json"]);
    // Made by `simlayer-run calibrate`: which of this model's layers can be spared.
    command.args(["--lazy", "profile"]).arg("--lazy-profile").arg(prepare::profile());
    eprintln!("$ {}", sh::shown(&command));
    let out = command.stderr(std::process::Stdio::inherit()).output()?;
    if !out.status.success() {
        bail!("simlayer-run failed: {}", out.status);
    }
    serde_json::from_slice(&out.stdout).context("simlayer-run wrote no JSON")
}

/// The model's own chat format (ChatML), with a system message, which it was trained to see.
fn chat_prompt(text: &str, question: &str) -> String {
    format!(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n\
         <|im_start|>user\n{text}\n\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
}

/// What to print, from simlayer-run's JSON.
fn report(answer: &Value) -> Result<String> {
    let text = answer["text"].as_str().context("simlayer-run's JSON has no text")?.trim();
    if text.is_empty() {
        bail!("the model said nothing");
    }
    let words = STORY.split_whitespace().count();
    let mut out = format!("\nThe model read a story of {words} words.\n> {QUESTION}\n{text}\n\n");
    let mut line = |label: &str, value: Option<String>| {
        if let Some(value) = value {
            out += &format!("{label:<14}{value}\n");
        }
    };
    let rate = |key: &str| Some(format!("{:.1} tokens/s", answer["timings"][key].as_f64()?));
    line("prompt", answer["prompt_tokens"].as_u64().map(|n| format!("{n} tokens")));
    line("prefill", rate("prefill_tokens_per_second"));
    line("decode", rate("decode_tokens_per_second"));
    let kv = &answer["kv"];
    let mib = |key: &str| Some(format!("{:.1} MiB", kv[key].as_f64()? / (1 << 20) as f64));
    line("full cache", mib("f16_bytes").map(|size| format!("{size} in f16")));
    line("cache now", mib("allocated_bytes"));
    line("cache peak", mib("peak_bytes"));
    let saved = kv["f16_bytes"].as_f64().zip(kv["allocated_bytes"].as_f64()).map(|(full, now)| full - now);
    line("saved", saved.map(|bytes| format!("{:.1} MiB", bytes / (1 << 20) as f64)));
    line("compression", kv["compression"].as_f64().map(|c| format!("{c:.2} ×")));
    line(
        "lazy layers",
        count(&kv["lazy_layers"])
            .zip(count(&kv["active_layers"]))
            .map(|(lazy, active)| format!("{lazy} of {}", lazy + active)),
    );
    Ok(out)
}

/// A number, or the length of a list.
fn count(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| Some(value.as_array()?.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn report_shows_the_answer_and_the_cache() {
        let answer = json!({
            "text": "The Aurora.\n",
            "prompt_tokens": 3642,
            "timings": {"prefill_tokens_per_second": 200.0, "decode_tokens_per_second": 50.0},
            "kv": {
                "f16_bytes": 104857600, "allocated_bytes": 20971520, "peak_bytes": 31457280,
                "compression": 5.0, "lazy_layers": [1, 2], "active_layers": 28
            },
        });
        let report = report(&answer).expect("an answer is there");
        for part in ["The Aurora.", "3642 tokens", "100.0 MiB in f16", "20.0 MiB", "80.0 MiB", "5.00 ×", "2 of 30"] {
            assert!(report.contains(part), "{part} in {report}");
        }
    }

    #[test]
    fn an_empty_answer_is_an_error() {
        assert!(report(&json!({"text": "  "})).is_err());
        assert!(report(&json!({})).is_err());
    }
}
