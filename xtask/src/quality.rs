//! What lazy layers cost on texts of different kinds, rule by rule: the table of `docs/quality.md`.
//!
//! None of the texts is in the repository: two come from a package of texts in the public domain, three from packages
//! that Cargo.lock pins.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::prepare::{self, Env};
use crate::sh;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Lengths of the texts in tokens, those that are scored included.
    #[arg(long, value_delimiter = ',', default_value = "3000,6000")]
    lengths: Vec<usize>,
    /// Last tokens of each, which are scored.
    #[arg(long, default_value_t = 256)]
    score: usize,
    /// How many layers of SmolLM2's 30 are lazy.
    #[arg(long, value_delimiter = ',', default_value = "8,14,20,24")]
    lazy: Vec<usize>,
    /// Kinds of text, all by default.
    #[arg(long, value_delimiter = ',')]
    texts: Vec<String>,
    /// Further options for `simlayer-run perplexity`.
    #[arg(long, default_value = "--lazy-type f16")]
    options: String,
    /// The profile; by default the one in the repository.
    #[arg(long)]
    profile: Option<PathBuf>,
    /// A folder for what the runs print as JSON. What is there already is not run again.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// SmolLM2's layers.
const N_LAYER: usize = 30;

/// Bytes of a text that are used at most: enough for any length asked for.
const TEXT_BYTES: usize = 40_000;

enum Source {
    /// The package of texts.
    Texts,
    /// A package of Cargo.lock.
    Cargo(&'static str),
}

/// Kinds of text, where they come from, and the file.
const TEXTS: [(&str, Source, &str); 5] = [
    ("prose", Source::Texts, "shksprdata/ancillary/britannica-11th.txt"),
    ("dialogue", Source::Texts, "shksprdata/texts/coriolanus_gut.txt"),
    ("reference", Source::Cargo("llama-cpp-sys-2"), "llama.cpp/tools/server/README.md"),
    ("code", Source::Cargo("llama-cpp-sys-2"), "llama.cpp/src/llama-kv-cache.cpp"),
    ("list", Source::Cargo("cc"), "CHANGELOG.md"),
];

pub fn run(args: &Args) -> Result<()> {
    if let Some(unknown) = args.texts.iter().find(|kind| TEXTS.iter().all(|(name, ..)| name != kind)) {
        bail!("there is no text of kind {unknown}");
    }
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    let model = prepare::model()?;
    let program = env.build_simlayer_run()?;
    let profile = args.profile.clone().unwrap_or_else(prepare::profile);
    let out = args.out.clone().unwrap_or_else(|| prepare::tools_dir().join("quality"));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let rules = rules(&args.lazy);

    let mut rows = Vec::new();
    for (kind, from, file) in &TEXTS {
        if !args.texts.is_empty() && !args.texts.iter().any(|text| text == kind) {
            continue;
        }
        let text = text(&env, kind, from, file)?;
        for &length in &args.lengths {
            let path = out.join(format!("{kind}-{length}.json"));
            if !path.is_file() {
                let skip = length.checked_sub(args.score).context("--score is longer than --lengths")?;
                let mut command = env.command(&program.display().to_string());
                command.arg("perplexity").arg("-m").arg(&model).arg("-f").arg(&text).arg("--json");
                command.args(["--skip", &skip.to_string(), "--score", &args.score.to_string(), "--score-batch", "64"]);
                command.arg("--kl").arg("--lazy-profile").arg(&profile).args(args.options.split_whitespace());
                for rule in &rules {
                    command.args(["--compare", rule]);
                }
                std::fs::write(&path, sh::output(&mut command)?).with_context(|| path.display().to_string())?;
            }
            let json = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let json: Value = serde_json::from_str(&json).with_context(|| path.display().to_string())?;
            rows.push((format!("{kind}, {length}"), losses(&json).with_context(|| path.display().to_string())?));
        }
    }
    print!("{}", table(&args.lazy, &rows));
    Ok(())
}

/// The rules that are compared: for each number of layers the paper's and ours, then all layers lazy.
fn rules(lazy: &[usize]) -> Vec<String> {
    let share = |n: &usize| *n as f64 / N_LAYER as f64;
    let pairs = lazy.iter().flat_map(|n| [format!("budget:{:.4}", share(n)), format!("profile:{:.4}", share(n))]);
    pairs.chain(["budget:1".to_string()]).collect()
}

/// The divergence of each run, in the rules' order.
fn losses(json: &Value) -> Option<Vec<f64>> {
    json["runs"].as_array()?.iter().map(|run| run["kl_mean"].as_f64()).collect()
}

fn table(lazy: &[usize], rows: &[(String, Vec<f64>)]) -> String {
    let mut out = String::from("| text, tokens |");
    for n in lazy {
        out += &format!(" {n}: mass | profile | ratio |");
    }
    out += " all 30 |\n|---|";
    out += &"---|".repeat(3 * lazy.len() + 1);
    out += "\n";
    let mut line = |name: &str, kls: &[f64]| {
        out += &format!("| {name} |");
        for pair in kls.chunks_exact(2) {
            out += &format!(" {:.4} | {:.4} | {:.2} |", pair[0], pair[1], pair[1] / pair[0]);
        }
        out += &kls.last().map_or(String::new(), |kl| format!(" {kl:.4} |"));
        out += "\n";
    };
    for (name, kls) in rows {
        line(name, kls);
    }
    let columns = rows.iter().map(|(_, kls)| kls.len()).min().unwrap_or(0);
    let mean = |column: usize| rows.iter().map(|(_, kls)| kls[column]).sum::<f64>() / rows.len() as f64;
    line("**mean**", &(0..columns).map(mean).collect::<Vec<_>>());
    out
}

/// The beginning of a text, in a file.
fn text(env: &Env, kind: &str, from: &Source, file: &str) -> Result<PathBuf> {
    let folder = prepare::tools_dir().join("texts");
    let path = folder.join(kind).with_extension("txt");
    if !path.is_file() {
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let source = match from {
            Source::Texts => package_of_texts(&folder)?.join(file),
            Source::Cargo(package) => env.package_source(package)?.join(file),
        };
        let bytes = std::fs::read(&source).with_context(|| source.display().to_string())?;
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let end = text.char_indices().map(|(at, _)| at).take_while(|&at| at <= TEXT_BYTES).last().unwrap_or(0);
        std::fs::write(&path, &text[..end]).with_context(|| path.display().to_string())?;
    }
    Ok(path)
}

/// The unpacked package of texts.
fn package_of_texts(folder: &Path) -> Result<PathBuf> {
    let unpacked = folder.join("package");
    if !unpacked.is_dir() {
        let sdist = prepare::pip_download("texts", ".tar.gz", &["--no-binary", ":all:"])?;
        std::fs::create_dir_all(&unpacked)?;
        sh::run(Command::new("tar").arg("-xzf").arg(sdist).arg("-C").arg(&unpacked).arg("--strip-components=1"))?;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_make_as_many_layers_lazy_as_asked_for() {
        assert_eq!(rules(&[8, 24]), ["budget:0.2667", "profile:0.2667", "budget:0.8000", "profile:0.8000", "budget:1"]);
    }

    #[test]
    fn the_table_has_ratios_and_means() {
        let json = json!({"runs": [{"kl_mean": 0.02}, {"kl_mean": 0.005}, {"kl_mean": 0.1}]});
        let rows = [("a, 10".to_string(), losses(&json).unwrap()), ("b, 10".to_string(), vec![0.04, 0.025, 0.3])];
        let table = table(&[8], &rows);
        assert!(table.starts_with("| text, tokens | 8: mass | profile | ratio | all 30 |\n|---|---|---|---|---|\n"));
        assert!(table.contains("| a, 10 | 0.0200 | 0.0050 | 0.25 | 0.1000 |\n"), "{table}");
        assert!(table.contains("| **mean** | 0.0300 | 0.0150 | 0.50 | 0.2000 |\n"), "{table}");
        assert_eq!(losses(&json!({"runs": [{}]})), None);
    }
}
