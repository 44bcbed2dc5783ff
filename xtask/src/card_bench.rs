//! What a card gains: random models in the shapes of real ones, one and four conversations at several depths, against
//! llama.cpp's own llama-batched-bench on the same card. The most important come first, and what does not fit into the
//! time is named.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::prepare::{self, Env};
use crate::{cuda_check, sh, upstream};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A simlayer-run for the card; by default cuda-check's.
    #[arg(long, value_name = "FILE")]
    simlayer_run: Option<PathBuf>,
    /// A llama-batched-bench for the card, of the same revision; without it nothing is compared.
    #[arg(long, value_name = "FILE")]
    llama_batched_bench: Option<PathBuf>,
    /// Where the random models are, or are to be written.
    #[arg(long, value_name = "FOLDER")]
    models: Option<PathBuf>,
    /// Write the models (24 GB), for which no card is needed, and measure nothing.
    #[arg(long)]
    prepare: bool,
    /// After this long nothing more is begun.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// The same commands on the processor: a small model, short texts, and llama.cpp's program as `cargo xtask upstream
    /// llama-batched-bench` builds it.
    #[arg(long)]
    dry_run: bool,
    /// Write everything measured to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Args {
    /// cuda-check's program on the card, ten minutes.
    pub fn of_card(llama_batched_bench: Option<PathBuf>) -> Args {
        let (simlayer_run, models, json) = (None, None, None);
        Args { simlayer_run, llama_batched_bench, models, prepare: false, minutes: 10, dry_run: false, json }
    }
}

/// A model, and at which depths it is measured, the most important first.
struct Case {
    shape: &'static str,
    weights: &'static str,
    n_layer: usize,
    depths: Vec<usize>,
}

/// One setting of ours.
struct Setting {
    name: &'static str,
    options: Vec<String>,
}

#[derive(Debug, Clone)]
struct Figure {
    model: &'static str,
    depth: usize,
    conversations: usize,
    setting: &'static str,
    /// `decode` or `prefill`.
    what: &'static str,
    tokens_per_second: f64,
}

const LLAMA_CPP: &str = "llama.cpp";
const CONVERSATIONS: [usize; 2] = [4, 1];

/// What the figures are to show: model's depth, conversations, setting, and how many times llama.cpp's speed.
const GOALS: [(&str, usize, &str, f64); 3] =
    [("decode", 4, "three quarters", 1.8), ("prefill", 1, "budget:0.5", 0.97), ("prefill", 1, "windowed", 1.3)];
/// The depth of the goals.
const GOAL_DEPTH: usize = 32_768;

pub fn run(args: &Args) -> Result<()> {
    let cases = cases(args.dry_run);
    let env = &mut Env::default();
    prepare::libclang(env)?;
    let folder = args.models.clone().unwrap_or_else(|| prepare::tools_dir().join("random"));
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for case in &cases {
        sh::step(&format!("model {} {}", case.shape, case.weights), || write(env, case, &folder))?;
    }
    if args.prepare {
        return Ok(());
    }
    let program = match (&args.simlayer_run, args.dry_run) {
        (Some(program), _) => program.clone(),
        (None, true) => env.build_simlayer_run()?,
        (None, false) => cuda_check::program_path(),
    };
    let theirs = match (&args.llama_batched_bench, args.dry_run) {
        (Some(program), _) => Some(program.clone()),
        (None, true) => Some(upstream::tool("llama-batched-bench")?),
        (None, false) => None,
    };
    let bench = Bench {
        program,
        theirs,
        dry_run: args.dry_run,
        until: Instant::now() + Duration::from_secs(60 * args.minutes),
    };
    let (mut figures, mut left_out) = (Vec::new(), Vec::new());
    for (case, depth) in order(&cases) {
        for conversations in CONVERSATIONS {
            bench.measure(case, &folder, (depth, conversations), &mut figures, &mut left_out);
        }
    }
    print(&figures, &left_out);
    let goal_depth = if args.dry_run { cases[0].depths[0] } else { GOAL_DEPTH };
    let goals: Vec<Value> = cases.iter().flat_map(|case| goals(case, goal_depth, &figures)).collect();
    if let Some(path) = &args.json {
        let figures: Vec<Value> = figures.iter().map(to_json).collect();
        let report = json!({ "dry_run": args.dry_run, "figures": figures, "goals": goals, "left_out": left_out });
        std::fs::write(path, serde_json::to_string_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn cases(dry_run: bool) -> Vec<Case> {
    let case = |shape, weights, n_layer, depths: &[usize]| Case { shape, weights, n_layer, depths: depths.to_vec() };
    match dry_run {
        true => vec![case("tiny", "q8_0", 4, &[512, 256])],
        false => vec![
            case("qwen3-8b", "q4_K_M", 36, &[32_768, 8_192, 131_072]),
            case("qwen3-30b-a3b", "q4_K_M", 48, &[32_768, 8_192, 131_072]),
        ],
    }
}

/// The first depth of all models, then the second.
fn order(cases: &[Case]) -> impl Iterator<Item = (&Case, usize)> {
    let most = cases.iter().map(|case| case.depths.len()).max().unwrap_or(0);
    (0..most).flat_map(|index| cases.iter().filter_map(move |case| Some((case, *case.depths.get(index)?))))
}

fn path_of(case: &Case, folder: &Path) -> PathBuf {
    folder.join(format!("{}-{}.gguf", case.shape, case.weights))
}

fn write(env: &Env, case: &Case, folder: &Path) -> Result<()> {
    let path = path_of(case, folder);
    if path.is_file() {
        return Ok(());
    }
    // Under its name once it is whole.
    let partial = path.with_extension("part");
    let mut cargo = env.cargo();
    cargo.args(["run", "--release", "-p", "simlayer-testkit", "--example", "random_model", "--"]);
    sh::run(cargo.args([case.shape, case.weights]).arg(&partial))?;
    std::fs::rename(&partial, &path).with_context(|| path.display().to_string())
}

fn settings(case: &Case) -> Vec<Setting> {
    let three_quarters: Vec<String> = (0..case.n_layer).filter(|i| i % 4 != 0).map(|i| i.to_string()).collect();
    let layers = format!("layers:{}", three_quarters.join(","));
    let setting = |name, options: &[&str]| Setting { name, options: options.iter().map(|&o| o.to_owned()).collect() };
    vec![
        setting("three quarters", &["--lazy", &layers]),
        setting("off", &["--lazy", "off"]),
        setting("budget:0.5", &["--lazy", "budget:0.5"]),
        setting("windowed", &["--lazy", &layers, "--lazy-type", "f16", "--lazy-prefill", "window"]),
    ]
}

struct Bench {
    program: PathBuf,
    theirs: Option<PathBuf>,
    dry_run: bool,
    until: Instant,
}

impl Bench {
    fn measure(
        &self,
        case: &Case,
        folder: &Path,
        (depth, conversations): (usize, usize),
        figures: &mut Vec<Figure>,
        left_out: &mut Vec<String>,
    ) {
        let model = path_of(case, folder);
        let figure = |setting, what, tokens_per_second| {
            let model = case.shape;
            Figure { model, depth, conversations, setting, what, tokens_per_second }
        };
        let mut attempt = |name: &str, run: &dyn Fn() -> Result<Vec<Figure>>| {
            let what = format!("{} at {depth}, {conversations} conversations, {name}", case.shape);
            if Instant::now() > self.until {
                return left_out.push(format!("{what}: no time was left"));
            }
            match run() {
                Ok(found) => figures.extend(found),
                // As where memory does not do: the others are of use all the same.
                Err(error) => {
                    left_out.push(format!("{what}: {}", error.to_string().lines().last().unwrap_or_default()))
                }
            }
        };
        if let Some(program) = &self.theirs {
            attempt(LLAMA_CPP, &|| {
                let [decode, prefill] = self.theirs(program, &model, depth, conversations)?;
                Ok(vec![figure(LLAMA_CPP, "decode", decode), figure(LLAMA_CPP, "prefill", prefill)])
            });
        }
        for Setting { name, options } in &settings(case) {
            // What is the same while decoding, and what is only of interest for prompts.
            if *name != "windowed" {
                attempt(&format!("{name}, decode"), &|| {
                    let speed = self.ours(&model, options, ["0", "32"], depth, conversations)?;
                    Ok(vec![figure(name, "decode", speed)])
                });
            }
            if conversations == 1 && *name != "three quarters" {
                attempt(&format!("{name}, prefill"), &|| {
                    let speed = self.ours(&model, options, [&depth.to_string(), "0"], 0, 1)?;
                    Ok(vec![figure(name, "prefill", speed)])
                });
            }
        }
    }

    fn ours(
        &self,
        model: &Path,
        options: &[String],
        [prompt, generate]: [&str; 2],
        depth: usize,
        conversations: usize,
    ) -> Result<f64> {
        let mut command = sh::command(&self.program);
        command
            .arg("bench")
            .arg("-m")
            .arg(model)
            .args(["--json", "--reps", "1", "--prompt", prompt, "--gen", generate]);
        command.args(["--depth", &depth.to_string(), "--sequences", &conversations.to_string()]).args(options);
        if self.dry_run {
            // Rings that are shorter than the text.
            command.args(["--device", "none", "--lazy-window", "64", "--lazy-slack", "0"]);
        }
        cuda_check::finds_libraries(&mut command);
        let report: Value = serde_json::from_str(&sh::output(&mut command)?)?;
        report["runs"][0]["tokens_per_second"].as_f64().context("no speed in the bench's report")
    }

    /// Speeds of decoding and prefill.
    fn theirs(&self, program: &Path, model: &Path, depth: usize, conversations: usize) -> Result<[f64; 2]> {
        let mut command = sh::command(program);
        let n_ctx = conversations * (depth + 64);
        command.arg("-m").arg(model).args(["-fa", "on", "-ntg", "32", "-npp", &depth.to_string()]);
        command.args(["-npl", &conversations.to_string(), "-c", &n_ctx.to_string(), "--output-format", "jsonl"]);
        command.args(["-b", "2048", "-ub", "512", "-ngl", if self.dry_run { "0" } else { "99" }]);
        cuda_check::finds_libraries(&mut command);
        speeds(&sh::output(&mut command)?)
    }
}

/// Decoding and prefill, of what llama-batched-bench writes.
fn speeds(text: &str) -> Result<[f64; 2]> {
    let mut lines = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let line = lines.find(Value::is_object).context("llama-batched-bench wrote no line of JSON")?;
    let speed = |name: &str| line[name].as_f64().with_context(|| format!("no {name} in {line}"));
    Ok([speed("speed_tg")?, speed("speed_pp")?])
}

fn print(figures: &[Figure], left_out: &[String]) {
    println!(
        "{:<16} {:>8} {:>5}  {:<8} {:<16} {:>10} {:>12}",
        "model", "depth", "conv.", "", "", "tokens/s", LLAMA_CPP
    );
    for figure in figures {
        let Figure { model, depth, conversations, setting, what, tokens_per_second } = figure;
        let times = times(figure, figures).map_or("–".to_owned(), |times| format!("{times:.2} ×"));
        println!(
            "{model:<16} {depth:>8} {conversations:>5}  {what:<8} {setting:<16} {tokens_per_second:>10.2} {times:>12}"
        );
    }
    for what in left_out {
        println!("left out: {what}");
    }
}

/// How many times llama.cpp's speed it is.
fn times(figure: &Figure, figures: &[Figure]) -> Option<f64> {
    let is_base = |other: &&Figure| {
        let place = |f: &Figure| (f.model, f.depth, f.conversations, f.what);
        other.setting == LLAMA_CPP && place(other) == place(figure)
    };
    figures.iter().find(is_base).map(|base| figure.tokens_per_second / base.tokens_per_second)
}

/// What was to be shown of a model, and whether it is.
fn goals(case: &Case, depth: usize, figures: &[Figure]) -> Vec<Value> {
    let goal = |&(what, conversations, setting, least): &(&str, usize, &str, f64)| {
        let is_it = |f: &&Figure| {
            (f.model, f.depth, f.conversations, f.setting, f.what) == (case.shape, depth, conversations, setting, what)
        };
        let found = figures.iter().find(is_it).and_then(|figure| times(figure, figures));
        let verdict = match found {
            Some(times) if times >= least => "holds",
            Some(_) => "does not hold",
            None => "not measured",
        };
        let shown = found.map_or("–".to_owned(), |times| format!("{times:.2}"));
        println!(
            "{}, {what} at {depth}, {conversations} conversations, {setting}: {shown} of {least} ×: {verdict}",
            case.shape
        );
        json!({ "model": case.shape, "what": what, "setting": setting, "least": least, "times": found, "verdict": verdict })
    };
    GOALS.iter().map(goal).collect()
}

fn to_json(figure: &Figure) -> Value {
    let Figure { model, depth, conversations, setting, what, tokens_per_second } = figure;
    json!({
        "model": model,
        "depth": depth,
        "conversations": conversations,
        "setting": setting,
        "what": what,
        "tokens_per_second": tokens_per_second,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_llama_cpp_writes_is_read() {
        let text =
            "main: n_kv_max = 8\n{\"pp\": 512, \"tg\": 32, \"pl\": 4, \"speed_pp\": 100.5, \"speed_tg\": 40.0}\n";
        assert_eq!(speeds(text).unwrap(), [40.0, 100.5]);
        assert!(speeds("nothing").is_err());
    }

    #[test]
    fn the_most_important_comes_first() {
        let found: Vec<_> = order(&cases(false)).map(|(case, depth)| (case.shape, depth)).collect();
        assert_eq!(found[..3], [("qwen3-8b", 32_768), ("qwen3-30b-a3b", 32_768), ("qwen3-8b", 8_192)]);
    }

    #[test]
    fn a_goal_is_met_by_times_llama_cpps_speed() {
        let case = &cases(false)[0];
        let figure = |setting, tokens_per_second| Figure {
            model: case.shape,
            depth: GOAL_DEPTH,
            conversations: 4,
            setting,
            what: "decode",
            tokens_per_second,
        };
        let verdicts = |ours: f64| {
            let found = goals(case, GOAL_DEPTH, &[figure(LLAMA_CPP, 100.0), figure("three quarters", ours)]);
            found.iter().map(|goal| goal["verdict"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(verdicts(180.0), ["holds", "not measured", "not measured"]);
        assert_eq!(verdicts(179.0)[0], "does not hold");
    }
}
