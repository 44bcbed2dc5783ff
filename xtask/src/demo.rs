//! From nothing to an answer: fetch a small model, build, ask it about a long text with the full cache, with llama.cpp's
//! q4_0 and with what is recommended, and say what each took.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::prepare::{self, Env};
use crate::sh::{self, step};

const STORY: &str = include_str!("../demo/story.txt");
const QUESTION: &str = "What is the name of the white passenger ship in this story? Answer in one sentence.";

/// What the same question is asked with: what it is called, and its options.
const SETTINGS: [(&str, &[&str]); 4] = [
    ("full, f16", &["--lazy", "off"]),
    ("llama.cpp's q4_0", &["--lazy", "off", "-ctk", "q4_0", "-ctv", "q4_0", "--kv-exact", "0"]),
    ("recommended", &["--lazy", "auto", "-ctk", "auto", "-ctv", "q4_0"]),
    // The one built in for this model, made by `simlayer-run calibrate`: which of its layers can be spared.
    ("with a profile", &["--lazy", "profile", "-ctk", "auto", "-ctv", "q4_0"]),
];

pub fn run() -> Result<()> {
    let mut env = Env::default();
    let model = step("prepare", || {
        prepare::libclang(&mut env)?;
        prepare::model()
    })?;
    let program = step("build", || env.build_simlayer_run())?;
    let answers: Result<Vec<Value>> = SETTINGS
        .iter()
        .map(|(name, options)| step(&format!("ask: {name}"), || ask(&env, &program, &model, options)))
        .collect();
    print!("{}", report(&answers?)?);
    Ok(())
}

fn ask(env: &Env, program: &Path, model: &Path, options: &[&str]) -> Result<Value> {
    let prompt_file = prepare::tools_dir().join("demo-prompt.txt");
    std::fs::create_dir_all(prepare::tools_dir())?;
    std::fs::write(&prompt_file, chat_prompt(STORY.trim(), QUESTION))
        .with_context(|| prompt_file.display().to_string())?;
    let mut command = env.command(&program.display().to_string());
    command.arg("-m").arg(model).arg("-f").arg(&prompt_file);
    command.args(["-n", "64", "--temp", "0", "--json"]);
    command.args(options);
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

/// What to print, from simlayer-run's JSON of each setting.
fn report(answers: &[Value]) -> Result<String> {
    let words = STORY.split_whitespace().count();
    let tokens = answers[0]["prompt_tokens"].as_u64().context("simlayer-run's JSON has no number of tokens")?;
    let mut out = format!("\nThe model read a story of {words} words, {tokens} tokens.\n> {QUESTION}\n\n");
    for ((name, _), answer) in SETTINGS.iter().zip(answers) {
        let text = answer["text"].as_str().context("simlayer-run's JSON has no text")?.trim();
        if text.is_empty() {
            bail!("{name}: the model said nothing");
        }
        out += &format!("{name:<18}{text}\n");
    }
    out += &format!("\n{:<18}{:>10}{:>10}{:>14}{:>14}\n", "", "cache", "of f16", "lazy layers", "tokens/s");
    for ((name, _), answer) in SETTINGS.iter().zip(answers) {
        let kv = &answer["kv"];
        let number =
            |value: &Value| value.as_f64().with_context(|| format!("{name}: simlayer-run's JSON lacks a number"));
        let (full, now) = (number(&kv["f16_bytes"])?, number(&kv["allocated_bytes"])?);
        let cache = format!("{:.1} MiB", now / f64::from(1 << 20));
        let share = format!("1/{:.1}", full / now);
        let layers = count(&kv["lazy_layers"]).zip(count(&kv["active_layers"]));
        let (lazy, active) = layers.with_context(|| format!("{name}: simlayer-run's JSON lacks layers"))?;
        let layers = format!("{lazy} of {}", lazy + active);
        let rate = format!("{:.1}", number(&answer["timings"]["decode_tokens_per_second"])?);
        out += &format!("{name:<18}{cache:>10}{share:>10}{layers:>14}{rate:>14}\n");
    }
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

    fn answer(text: &str, allocated: u64, lazy: &[u32]) -> Value {
        json!({
            "text": text,
            "prompt_tokens": 3642,
            "timings": {"decode_tokens_per_second": 50.0},
            "kv": {
                "f16_bytes": 104857600, "allocated_bytes": allocated,
                "lazy_layers": lazy, "active_layers": 30 - lazy.len(),
            },
        })
    }

    #[test]
    fn the_report_shows_answers_and_caches() {
        let answers = [
            answer("The Aurora.\n", 104857600, &[]),
            answer("Aurora", 29491200, &[]),
            answer("Aurora", 31457280, &[3]),
            answer("The Aurora", 10485760, &[1, 2]),
        ];
        let report = report(&answers).expect("answers are there");
        let line = |begin: &str| {
            let lines: Vec<_> = report.lines().filter(|line| line.starts_with(begin)).collect();
            lines[1].split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert!(report.contains("3642 tokens") && report.contains("full, f16         The Aurora.\n"), "{report}");
        assert_eq!(line("full, f16"), "full, f16 100.0 MiB 1/1.0 0 of 30 50.0");
        assert_eq!(line("llama.cpp's q4_0"), "llama.cpp's q4_0 28.1 MiB 1/3.6 0 of 30 50.0");
        assert_eq!(line("with a profile"), "with a profile 10.0 MiB 1/10.0 2 of 30 50.0");
    }

    #[test]
    fn an_empty_answer_is_an_error() {
        assert!(report(&[answer("  ", 1, &[])]).is_err());
        assert!(report(&[json!({})]).is_err());
    }
}
