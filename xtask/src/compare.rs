//! Our speed against upstream's llama-bench, and other programs' that have its options and its output.
//!
//! They alternate within each round, and depths do, so that a machine that slows down or speeds up meanwhile
//! does so for all; figures are medians over the rounds. Beside speeds there is each process's peak of resident memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::prepare::{self, Env};
use crate::{plot, sh, upstream};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A GGUF model; default: the one that demo and tests use.
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// Tokens in the cache before the measurement starts.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    depths: Vec<u32>,
    /// Cache types, for K and V alike.
    #[arg(long, value_delimiter = ',', default_value = "f16")]
    types: Vec<String>,
    /// Tokens of the measured prefill; 0: none.
    #[arg(long, default_value_t = 512)]
    prompt: u32,
    /// Tokens of the measured decode; 0: none.
    #[arg(long = "gen", default_value_t = 64)]
    generate: u32,
    #[arg(short, long, default_value_t = 2)]
    threads: u32,
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Upstream without (0) and with (1) flash attention; the better of them is the base.
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    fa: Vec<u8>,
    /// One more setting of ours: a name, a colon, and the options that make it, for instance
    /// "half lazy:--lazy budget:0.5 -ctk q4_0 -ctv q4_0". May be given several times.
    #[arg(long)]
    ours: Vec<String>,
    /// A llama-bench that is built already, for instance with CUDA.
    #[arg(long, value_name = "FILE")]
    llama_bench: Option<PathBuf>,
    /// Another program to measure, by a bench of its own that has llama-bench's options and output: NAME=PATH, for
    /// instance "ik_llama.cpp=/path/to/llama-bench". May be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = rival)]
    rival: Vec<Rival>,
    /// A simlayer-run that is built already.
    #[arg(long, value_name = "FILE")]
    simlayer_run: Option<PathBuf>,
    /// Writes everything measured to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws time per token over the depth into this SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Draws (with --plot) what an earlier run wrote to this file, and measures nothing.
    #[arg(long, requires = "plot")]
    from: Option<PathBuf>,
}

/// A program beside llama.cpp and ours.
#[derive(Debug, Clone, PartialEq)]
struct Rival {
    name: String,
    bench: PathBuf,
}

fn rival(text: &str) -> Result<Rival, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok(Rival { name: name.to_owned(), bench: path.into() })
        }
        _ => Err("expected NAME=PATH".into()),
    }
}

/// Whose program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    LlamaCpp,
    /// Its place among `--rival`.
    Rival(usize),
    Simlayer,
}

/// Something that is measured.
#[derive(Debug)]
struct Contender {
    name: String,
    program: Program,
    /// The cache type; none for settings that `--ours` adds.
    kv_type: Option<String>,
    args: Vec<String>,
}

/// Samples by contender, depth, and test ("pp512", "tg64").
type Samples = BTreeMap<(usize, u32, String), Vec<Sample>>;

#[derive(Debug, Clone, Copy)]
struct Sample {
    tokens_per_second: f64,
    /// The whole process's peak of resident memory, in bytes: that of all tests of a run.
    peak_rss: u64,
}

pub fn run(args: &Args) -> Result<()> {
    if let (Some(from), Some(path)) = (&args.from, &args.plot) {
        let report = std::fs::read_to_string(from).with_context(|| from.display().to_string())?;
        let report = serde_json::from_str(&report).with_context(|| from.display().to_string())?;
        return plot::write(&report, path);
    }
    if args.rounds == 0 || args.depths.is_empty() || (args.prompt == 0 && args.generate == 0) {
        bail!("nothing to measure: give at least one round, one depth, and --prompt or --gen");
    }
    let mut env = Env::default();
    let model = match &args.model {
        Some(path) => path.clone(),
        None => prepare::model()?,
    };
    let bench = match &args.llama_bench {
        Some(path) => path.clone(),
        None => upstream::tool("llama-bench")?,
    };
    let ours = match &args.simlayer_run {
        Some(path) => path.clone(),
        None => {
            prepare::libclang(&mut env)?;
            env.build_simlayer_run()?
        }
    };
    let contenders = contenders(args)?;
    sh::warn_if_busy();
    let load_before = sh::load_average();

    let mut samples = Samples::new();
    for round in 1..=args.rounds {
        for &depth in &args.depths {
            for (index, contender) in contenders.iter().enumerate() {
                eprintln!("round {round}/{}, depth {depth}: {}", args.rounds, contender.name);
                let program = match contender.program {
                    Program::LlamaCpp => &bench,
                    Program::Rival(index) => &args.rival[index].bench,
                    Program::Simlayer => &ours,
                };
                let runs = measure(&env, program, &model, contender, args, depth)?;
                for (test, sample) in runs {
                    samples.entry((index, depth, test)).or_default().push(sample);
                }
            }
        }
    }

    let rows = rows(&contenders, &samples, args);
    print_table(&rows, &args.rival);
    let report = json!({
        "model": model.file_name().map(|n| n.to_string_lossy()),
        "cpu": cpu_name(),
        "threads": args.threads,
        "rounds": args.rounds,
        "load_before": load_before,
        "results": rows.iter().map(|row| row.json(&args.rival)).collect::<Vec<_>>(),
    });
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.plot {
        plot::write(&report, path)?;
    }
    Ok(())
}

fn contenders(args: &Args) -> Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    let benches = [(Program::LlamaCpp, "llama.cpp")];
    let rivals = args.rival.iter().enumerate().map(|(index, rival)| (Program::Rival(index), &*rival.name));
    let benches: Vec<_> = benches.into_iter().chain(rivals).collect();
    for kv_type in &args.types {
        let cache = ["-ctk", kv_type, "-ctv", kv_type].map(String::from);
        for fa in &args.fa {
            // Upstream cannot read quantised values without flash attention.
            if *fa == 0 && !matches!(kv_type.as_str(), "f16" | "bf16" | "f32") {
                continue;
            }
            let mut with_fa = cache.to_vec();
            with_fa.extend(["-fa".into(), fa.to_string()]);
            for (program, name) in &benches {
                contenders.push(Contender {
                    name: format!("{name} {kv_type} fa={fa}"),
                    program: *program,
                    kv_type: Some(kv_type.clone()),
                    args: with_fa.clone(),
                });
            }
        }
        contenders.push(Contender {
            name: format!("simlayer {kv_type}"),
            program: Program::Simlayer,
            kv_type: Some(kv_type.clone()),
            args: [&cache[..], &["--lazy".into(), "off".into()]].concat(),
        });
    }
    for text in &args.ours {
        let Some((name, options)) = text.split_once(':') else {
            bail!("--ours {text:?}: expected NAME:OPTIONS");
        };
        contenders.push(Contender {
            name: format!("simlayer {}", name.trim()),
            program: Program::Simlayer,
            kv_type: None,
            args: options.split_whitespace().map(String::from).collect(),
        });
    }
    Ok(contenders)
}

/// One run of one contender: the tests it made.
fn measure(
    env: &Env,
    program: &Path,
    model: &Path,
    contender: &Contender,
    args: &Args,
    depth: u32,
) -> Result<Vec<(String, Sample)>> {
    let mut command = env.command(&program.display().to_string());
    if contender.program != Program::Simlayer {
        command.arg("-m").arg(model).args(["-r", "1", "-o", "json"]);
        command.args(["-p", &args.prompt.to_string(), "-n", &args.generate.to_string()]);
        command.args(["-d", &depth.to_string(), "-t", &args.threads.to_string()]);
    } else {
        command.arg("bench").arg("-m").arg(model).args(["-r", "1", "--json"]);
        command.args(["--prompt", &args.prompt.to_string(), "--gen", &args.generate.to_string()]);
        command.args(["--depth", &depth.to_string(), "-t", &args.threads.to_string()]);
    }
    command.args(&contender.args);
    let (text, peak_rss) = sh::output_and_peak(&mut command)?;
    let answer: Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` wrote no JSON:\n{text}", sh::shown(&command)))?;
    let runs = if contender.program == Program::Simlayer { our_runs(&answer) } else { upstream_runs(&answer) };
    let runs = runs
        .filter(|runs| !runs.is_empty())
        .with_context(|| format!("`{}` wrote JSON without the expected runs:\n{text}", sh::shown(&command)))?;
    let sample = |(test, tokens_per_second)| (test, Sample { tokens_per_second, peak_rss });
    Ok(runs.into_iter().map(sample).collect())
}

fn upstream_runs(answer: &Value) -> Option<Vec<(String, f64)>> {
    let run = |run: &Value| {
        let (prompt, generated) = (run["n_prompt"].as_u64()?, run["n_gen"].as_u64()?);
        let test = if generated == 0 { format!("pp{prompt}") } else { format!("tg{generated}") };
        Some((test, run["avg_ts"].as_f64()?))
    };
    answer.as_array()?.iter().map(run).collect()
}

fn our_runs(answer: &Value) -> Option<Vec<(String, f64)>> {
    let run = |run: &Value| Some((run["test"].as_str()?.to_string(), run["tokens_per_second"].as_f64()?));
    answer["runs"].as_array()?.iter().map(run).collect()
}

/// One line of the table.
#[derive(Debug)]
struct Row {
    name: String,
    program: Program,
    test: String,
    depth: u32,
    samples: Vec<f64>,
    median: f64,
    /// Median of the peaks of resident memory, in MiB.
    peak_rss: f64,
    /// Against upstream's best with the same cache type.
    vs_same_type: Option<f64>,
    /// Against upstream's best with the first of `--types`.
    vs_first_type: Option<f64>,
    /// Against each rival's best with the first of `--types`.
    vs_rivals: Vec<Option<f64>>,
}

impl Row {
    fn json(&self, rivals: &[Rival]) -> Value {
        let vs_rivals = rivals.iter().zip(&self.vs_rivals).map(|(rival, ratio)| (rival.name.clone(), json!(ratio)));
        json!({
            "name": self.name,
            "upstream": self.program == Program::LlamaCpp,
            "test": self.test,
            "depth": self.depth,
            "tokens_per_second": self.median,
            "samples": self.samples,
            "peak_rss_mib": self.peak_rss,
            "vs_best_same_type": self.vs_same_type,
            "vs_best_first_type": self.vs_first_type,
            "vs_rivals": vs_rivals.collect::<serde_json::Map<_, _>>(),
        })
    }
}

fn rows(contenders: &[Contender], samples: &Samples, args: &Args) -> Vec<Row> {
    let first_type = &*args.types[0];
    let speeds_of = |samples: &[Sample]| samples.iter().map(|sample| sample.tokens_per_second).collect::<Vec<_>>();
    let best = |program: Program, depth: u32, test: &str, kv_type: &str| {
        let medians = samples.iter().filter_map(|((index, d, t), speeds)| {
            let contender = &contenders[*index];
            let fits = contender.program == program && contender.kv_type.as_deref() == Some(kv_type);
            (fits && *d == depth && t == test).then(|| median(&speeds_of(speeds)))
        });
        medians.reduce(f64::max)
    };
    let mut rows: Vec<Row> = samples
        .iter()
        .map(|((index, depth, test), samples)| {
            let contender = &contenders[*index];
            let speeds = speeds_of(samples);
            let peaks: Vec<f64> = samples.iter().map(|sample| sample.peak_rss as f64 / 1024.0 / 1024.0).collect();
            let (peak_rss, median) = (median(&peaks), median(&speeds));
            let same = contender.kv_type.as_deref().and_then(|t| best(Program::LlamaCpp, *depth, test, t));
            let against = |program| best(program, *depth, test, first_type).map(|best| median / best);
            Row {
                name: contender.name.clone(),
                program: contender.program,
                test: test.clone(),
                depth: *depth,
                samples: speeds,
                median,
                peak_rss,
                vs_same_type: same.map(|best| median / best),
                vs_first_type: against(Program::LlamaCpp),
                vs_rivals: (0..args.rival.len()).map(|index| against(Program::Rival(index))).collect(),
            }
        })
        .collect();
    // By depth and test first; the sort is stable, so contenders stay in their order.
    rows.sort_by(|a, b| (a.depth, &a.test).cmp(&(b.depth, &b.test)));
    rows
}

fn print_table(rows: &[Row], rivals: &[Rival]) {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let ratio = |r: &Option<f64>| r.map_or("–".to_string(), |r| format!("{r:.2} ×"));
    let column = |text: String| format!(" {text} |");
    let names: String = rivals.iter().map(|rival| column(format!("vs {}", rival.name))).collect();
    println!(
        "| depth | test  | {:width$} | tokens/s | lowest | highest | vs llama.cpp, same types | vs its best |{names} peak RSS |",
        "setting"
    );
    println!("|---|---|---|---|---|---|---|---|---|{}", "---|".repeat(rivals.len()));
    for row in rows {
        let lowest = row.samples.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = row.samples.iter().copied().fold(0.0, f64::max);
        let vs_rivals: String = row.vs_rivals.iter().map(|vs| column(ratio(vs))).collect();
        println!(
            "| {:5} | {:5} | {:width$} | {:8.2} | {lowest:6.2} | {highest:7.2} | {} | {} |{vs_rivals} {:.0} MiB |",
            row.depth,
            row.test,
            row.name,
            row.median,
            ratio(&row.vs_same_type),
            ratio(&row.vs_first_type),
            row.peak_rss,
        );
    }
}

/// The middle value; of an even number the mean of the two middle ones.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n % 2 == 1 { sorted[n / 2] } else { (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0 }
}

fn cpu_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn both_formats_are_read() {
        let upstream = json!([
            {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 250.5},
            {"n_prompt": 0, "n_gen": 64, "n_depth": 0, "avg_ts": 99.0},
        ]);
        let ours = json!({"runs": [
            {"test": "pp512", "depth": 0, "tokens_per_second": 250.5, "stddev": 0.0},
            {"test": "tg64", "depth": 0, "tokens_per_second": 99.0, "stddev": 0.0},
        ]});
        let expected = vec![("pp512".to_string(), 250.5), ("tg64".to_string(), 99.0)];
        assert_eq!(upstream_runs(&upstream), Some(expected.clone()));
        assert_eq!(our_runs(&ours), Some(expected));
        assert_eq!(our_runs(&json!({"runs": [{"test": "pp512"}]})), None);
    }

    #[test]
    fn rivals_are_a_name_and_a_path() {
        let expected = Rival { name: "other".into(), bench: "/a/b=c".into() };
        assert_eq!(rival("other=/a/b=c"), Ok(expected));
        assert!(["other", "=/a", "other="].iter().all(|text| rival(text).is_err()));
    }

    #[test]
    fn ratios_are_against_the_best_of_the_type() {
        let rival = Rival { name: "other".into(), bench: "other-bench".into() };
        let args = Args { rival: vec![rival], types: vec!["f16".into(), "q4_0".into()], ..args() };
        let contenders = contenders(&args).unwrap();
        let names: Vec<&str> = contenders.iter().map(|contender| &*contender.name).collect();
        let f16 = ["llama.cpp f16 fa=0", "other f16 fa=0", "llama.cpp f16 fa=1", "other f16 fa=1", "simlayer f16"];
        assert_eq!(names, [&f16[..], &["llama.cpp q4_0 fa=1", "other q4_0 fa=1", "simlayer q4_0"]].concat());
        let speeds = [10.0, 40.0, 20.0, 16.0, 50.0, 5.0, 4.0, 40.0];
        let sample = |tokens_per_second| Sample { tokens_per_second, peak_rss: 1 << 20 };
        let samples: Samples =
            speeds.into_iter().enumerate().map(|(i, s)| ((i, 0, "tg64".to_string()), vec![sample(s)])).collect();
        let rows = rows(&contenders, &samples, &args);
        assert_eq!((rows[7].vs_same_type, rows[7].vs_first_type), (Some(8.0), Some(2.0)));
        assert_eq!(rows[7].vs_rivals, [Some(1.0)]);
        assert_eq!(rows[7].json(&args.rival)["vs_rivals"]["other"], 1.0);
        assert_eq!((rows[0].vs_same_type, rows[0].peak_rss), (Some(0.5), 1.0));
    }

    /// What is measured where nothing is asked for.
    fn args() -> Args {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            args: Args,
        }
        <Command as clap::Parser>::parse_from(["compare"]).args
    }
}
