//! What rules and cache types cost, over models, texts and made-up tasks: the tables of `docs/quality.md`.

mod foretold;
mod frontier;
mod table;
mod texts;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::prepare::{self, Env};
use crate::{root, sh};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Models, of those in models/ all by default: smollm2, qwen2.5-coder, gemma3.
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Lengths in tokens of texts (those that are scored included) and of tasks. What a model's context does not hold is
    /// left out.
    #[arg(long, value_delimiter = ',', default_value = "3000,8000,16000")]
    lengths: Vec<usize>,
    /// Kinds of text, all by default; none for none.
    #[arg(long, value_delimiter = ',')]
    texts: Vec<String>,
    /// Kinds of task, all by default; none for none.
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// Last tokens of each text, which are scored.
    #[arg(long, default_value_t = 256)]
    score: usize,
    /// When tasks ask: after the prompt was read, or at its end (prompt), which reads it for each question.
    #[arg(long, value_delimiter = ',', default_value = "after")]
    ask: Vec<String>,
    /// Where a task's answers are hidden, in percent of its text.
    #[arg(long, default_value = "5,50")]
    depths: String,
    /// Answers asked for at each depth.
    #[arg(long, default_value_t = 4)]
    trials: usize,
    /// A rule, or RULE@K/V with these cache types in active layers; may be given several times. Without any, all that are
    /// worth a comparison.
    #[arg(long = "rule", value_name = "RULE")]
    rules: Vec<String>,
    /// Further options for simlayer-run.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    options: String,
    /// A simlayer-run that is built already.
    #[arg(long, value_name = "FILE")]
    simlayer_run: Option<PathBuf>,
    /// A folder for what the runs print as JSON. What is there already is not run again.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Run nothing: tables of what is in the folder.
    #[arg(long)]
    kept: bool,
    /// Also print every cell.
    #[arg(long)]
    all: bool,
    /// Draws what looks foretold of texts against what was lost later into this SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Compare ways to make a cache small, unless --rule says which, and draw their bytes against their harm into this SVG.
    #[arg(long, value_name = "FILE")]
    frontier: Option<PathBuf>,
    /// Print the cells in which a rule (auto, if none is named) is worse than promised, and fail where there are some.
    #[arg(long, value_name = "RULE", num_args = 0..=1, default_missing_value = "auto")]
    check: Option<String>,
}

/// Types alone, what is chosen without asking, the paper's rules, ours, and all layers lazy as StreamingLLM has it.
const RULES: [&str; 10] = [
    "off@q8_0/q4_0",
    "off@q4_0",
    "off@auto/q4_0",
    "auto",
    "auto@auto/q4_0",
    "threshold",
    "budget:0.5",
    "output:0.5",
    "profile:0.5",
    "budget:1",
];

/// Tasks, by the name of their variant.
const TASKS: [&str; 4] = ["multi", "variables", "definition", "turns"];

/// A model that may be at hand: its name here, how its file's name begins, and its context.
struct Known {
    name: &'static str,
    file: &'static str,
    context: usize,
}

const MODELS: [Known; 3] = [
    Known { name: "smollm2", file: "smollm2-135m-instruct", context: 8_192 },
    Known { name: "qwen2.5-coder", file: "qwen2.5-coder-0.5b-instruct", context: 32_768 },
    Known { name: "gemma3", file: "gemma-3-270m", context: 32_768 },
];

/// What is read.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Text(String),
    /// A task, and when it asks.
    Task(String, String),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Text(kind) => f.write_str(kind),
            Kind::Task(kind, ask) => write!(f, "{kind} ({ask})"),
        }
    }
}

/// One rule on one text or task.
#[derive(Debug, Clone)]
struct Measured {
    model: String,
    length: usize,
    kind: Kind,
    rule: String,
    /// What `simlayer-run` says of the rule.
    run: Value,
    /// What it says of the full cache, in tasks.
    full: Value,
}

pub fn run(args: &Args) -> Result<()> {
    let kinds = kinds(args)?;
    if let Some(unknown) = args.models.iter().find(|name| MODELS.iter().all(|known| known.name != **name)) {
        bail!("{unknown} is none of {}", MODELS.map(|known| known.name).join(", "));
    }
    let mut env = Env::default();
    let program = match &args.simlayer_run {
        Some(path) => path.clone(),
        None if args.kept => PathBuf::new(),
        None => {
            prepare::libclang(&mut env)?;
            env.build_simlayer_run()?
        }
    };
    let out = args.out.clone().unwrap_or_else(|| prepare::tools_dir().join("quality"));
    let rules = match (&args.rules[..], &args.frontier) {
        ([], None) => RULES.map(str::to_owned).to_vec(),
        ([], Some(_)) => frontier::RULES.map(str::to_owned).to_vec(),
        (rules, _) => rules.to_vec(),
    };

    let mut measured = Vec::new();
    for known in &MODELS {
        if !args.models.is_empty() && args.models.iter().all(|name| name != known.name) {
            continue;
        }
        let Some(model) = find_model(known)? else {
            eprintln!("{}: no file {}*.gguf in models/, left out", known.name, known.file);
            continue;
        };
        let mut rules_here = Vec::new();
        for rule in &rules {
            match profiled(args, &env, &program, &model, rule)? {
                Some(profiled) => rules_here.push(Rule { name: rule, profiled }),
                None => eprintln!("{}: no profile is known, {rule} is left out", known.name),
            }
        }
        for &length in &args.lengths {
            if length > known.context {
                eprintln!("{}: its context has {} tokens, {length} are left out", known.name, known.context);
                continue;
            }
            for kind in &kinds {
                let cell = Cell { args, env: &env, program: &program, model: &model, kind, length };
                let folder =
                    out.join(known.name).join(format!("{kind}-{length}").replace(['(', ')'], "").replace(' ', "-"));
                for (rule, run, full) in cell.measure(&folder, &rules_here)? {
                    let model = known.name.to_owned();
                    measured.push(Measured { model, length, kind: kind.clone(), rule, run, full });
                }
            }
        }
    }
    ensure!(!measured.is_empty(), "there is nothing to show: no model, or nothing kept in {}", out.display());
    if args.all {
        print!("{}", table::cells(&measured));
    }
    print!("{}", table::summaries(&measured));
    let texts = measured.iter().filter(|cell| matches!(cell.kind, Kind::Text(_)));
    let pairs = foretold::pairs(texts);
    print!("{}", foretold::correlations(&pairs));
    if let Some(path) = &args.plot {
        foretold::plot(&pairs, path)?;
    }
    if let Some(path) = &args.frontier {
        frontier::plot(&measured, path)?;
    }
    match &args.check {
        Some(rule) => check(rule, &measured),
        None => Ok(()),
    }
}

fn check(rule: &str, measured: &[Measured]) -> Result<()> {
    let broken = table::broken(rule, measured)?;
    println!("{}", broken.report);
    ensure!(broken.n == 0, "{rule} breaks {} of its promises", broken.n);
    Ok(())
}

/// The texts and tasks that are asked for.
fn kinds(args: &Args) -> Result<Vec<Kind>> {
    let texts = wanted(&args.texts, &texts::KINDS, "text")?;
    let tasks = wanted(&args.tasks, &TASKS, "task")?;
    let asks = wanted(&args.ask, &["after", "prompt"], "question")?;
    let tasks = tasks.iter().flat_map(|task| asks.iter().map(|ask| Kind::Task(task.clone(), ask.clone())));
    Ok(texts.iter().cloned().map(Kind::Text).chain(tasks).collect())
}

/// What is wanted of what there is, all where nothing is named.
fn wanted(named: &[String], all: &[&str], what: &str) -> Result<Vec<String>> {
    if named.is_empty() {
        return Ok(all.iter().map(|&name| name.to_owned()).collect());
    }
    if named == ["none"] {
        return Ok(Vec::new());
    }
    if let Some(unknown) = named.iter().find(|name| !all.contains(&name.as_str())) {
        bail!("there is no {what} of kind {unknown}, only {}", all.join(", "));
    }
    Ok(named.to_vec())
}

/// A rule, and of one by a profile the layers that it makes lazy, else null.
struct Rule<'a> {
    name: &'a str,
    profiled: Value,
}

/// The layers that a rule by a profile makes lazy in the profile that the program finds; null for other rules. `None` where
/// it finds none.
fn profiled(args: &Args, env: &Env, program: &Path, model: &Path, rule: &str) -> Result<Option<Value>> {
    if !rule.starts_with("profile") || args.kept {
        return Ok(Some(Value::Null));
    }
    let policy = rule.split(['@', '+']).next().unwrap_or(rule);
    let mut plan = env.command(&program.display().to_string());
    plan.args(["devices", "--plan", "--json", "--lazy", policy, "-m"]).arg(model);
    let plan = match sh::output(&mut plan) {
        Ok(plan) => plan,
        Err(error) if error.to_string().contains("no profile of") => return Ok(None),
        Err(error) => return Err(error),
    };
    let plan: Value = serde_json::from_str(&plan).context("simlayer-run wrote no JSON")?;
    let devices = plan["plan"].as_array().context("simlayer-run wrote no plan")?;
    let caches = devices.iter().filter_map(|device| device["caches"].as_array()).flatten();
    Ok(Some(caches.filter(|cache| cache["kind"] == "lazy").map(|cache| cache["index"].clone()).collect()))
}

/// The model's file, found by the beginning of its name. SmolLM2 is fetched where it is missing.
fn find_model(known: &Known) -> Result<Option<PathBuf>> {
    let folder = root().join("models");
    let mut found = Vec::new();
    if folder.is_dir() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            if name.starts_with(known.file) && name.ends_with(".gguf") {
                found.push(path);
            }
        }
    }
    found.sort();
    match found.into_iter().next() {
        Some(path) => Ok(Some(path)),
        None if known.name == MODELS[0].name => Ok(Some(prepare::model()?)),
        None => Ok(None),
    }
}

/// A text or task that a model reads.
struct Cell<'a> {
    args: &'a Args,
    env: &'a Env,
    program: &'a Path,
    model: &'a Path,
    kind: &'a Kind,
    length: usize,
}

impl Cell<'_> {
    /// Each rule's run and the full cache's, from the folder or measured now and kept there, in the rules' order.
    fn measure(&self, folder: &Path, rules: &[Rule<'_>]) -> Result<Vec<(String, Value, Value)>> {
        let arguments = self.arguments()?;
        // What a kept run must have been made with.
        let key = |rule: &Rule<'_>| {
            json!({
                "model": self.model.file_name().unwrap_or_default().to_string_lossy(),
                "arguments": arguments,
                "profile": rule.profiled,
            })
        };
        let path = |rule: &Rule<'_>| folder.join(file_name(rule.name)).with_extension("json");
        let mut runs = Vec::new();
        let mut missing = Vec::new();
        for (at, rule) in rules.iter().enumerate() {
            match kept(&path(rule), &key(rule), self.args.kept)? {
                Some((run, full)) => runs.push((at, run, full)),
                None => missing.push(at),
            }
        }
        if !missing.is_empty() && !self.args.kept {
            let names: Vec<&str> = missing.iter().map(|&at| rules[at].name).collect();
            let (done, full) = self.run(&arguments, &names)?;
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            for (at, run) in missing.into_iter().zip(done) {
                let rule = &rules[at];
                let object = json!({"rule": rule.name, "made_with": key(rule), "run": run, "full": full});
                // Whole or not at all.
                let (path, part) = (path(rule), path(rule).with_extension("part"));
                std::fs::write(&part, format!("{object}\n")).with_context(|| part.display().to_string())?;
                std::fs::rename(&part, &path).with_context(|| path.display().to_string())?;
                runs.push((at, run, full.clone()));
            }
        }
        runs.sort_by_key(|(at, ..)| *at);
        Ok(runs.into_iter().map(|(at, run, full)| (rules[at].name.to_owned(), run, full)).collect())
    }

    /// Runs the rules: what is said of each, and of the full cache.
    fn run(&self, arguments: &[String], rules: &[&str]) -> Result<(Vec<Value>, Value)> {
        let mut command = self.env.command(&self.program.display().to_string());
        command.args(arguments).arg("-m").arg(self.model).arg("--json");
        if let Kind::Text(kind) = self.kind {
            command.arg("-f").arg(texts::text(self.env, kind)?);
        }
        for rule in rules {
            command.args(["--compare", rule]);
        }
        eprintln!("{}, {} of {} tokens: {}", self.model.display(), self.kind, self.length, rules.join(" "));
        let said = sh::output(&mut command)?;
        let mut said: Value = serde_json::from_str(&said).context("simlayer-run wrote no JSON")?;
        let Value::Array(done) = said["runs"].take() else { bail!("simlayer-run wrote no runs") };
        ensure!(done.len() == rules.len(), "simlayer-run wrote {} runs, not {}", done.len(), rules.len());
        Ok((done, said["full"].take()))
    }

    /// The command and its options, but for files and rules.
    fn arguments(&self) -> Result<Vec<String>> {
        let Args { score, trials, depths, options, .. } = self.args;
        let line = match self.kind {
            Kind::Text(_) => {
                let skip = self.length.checked_sub(*score).filter(|&skip| skip > 0);
                let skip = skip.context("--score is longer than --lengths")?;
                format!("perplexity --kl --score-batch 64 --skip {skip} --score {score} {options}")
            }
            Kind::Task(task, ask) => {
                let length = self.length;
                format!(
                    "passkey --variant {task} --ask {ask} --lengths {length} --depths {depths} --trials {trials} {options}"
                )
            }
        };
        Ok(line.split_whitespace().map(str::to_owned).collect())
    }
}

/// A rule as the name of a file.
fn file_name(rule: &str) -> String {
    rule.replace([':', '@', '/', ',', '+'], "_").replace('.', "p")
}

/// A run that is kept, if it was made in the same way (or with any profile), and the full cache's beside it.
fn kept(path: &Path, key: &Value, any_profile: bool) -> Result<Option<(Value, Value)>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut object: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let made_with = &object["made_with"];
    let same = |name: &str| made_with[name] == key[name];
    if !same("model") || !same("arguments") || !(any_profile || same("profile")) {
        return Ok(None);
    }
    Ok(Some((object["run"].take(), object["full"].take())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted() {
        let named = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let all = ["a", "b"];
        assert_eq!(wanted(&[], &all, "text").unwrap(), ["a", "b"]);
        assert_eq!(wanted(&named(&["b"]), &all, "text").unwrap(), ["b"]);
        assert!(wanted(&named(&["none"]), &all, "text").unwrap().is_empty());
        assert!(wanted(&named(&["c"]), &all, "text").unwrap_err().to_string().contains("text of kind c"));
    }

    #[test]
    fn a_run_is_kept_for_what_it_was_made_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(file_name("off@q8_0/q4_0")).with_extension("json");
        let key = json!({"arguments": ["--score", "256"]});
        assert_eq!(kept(&path, &key, false).unwrap(), None);
        let object = json!({"made_with": key, "run": {"kl_mean": 0.5}, "full": null});
        std::fs::write(&path, object.to_string()).unwrap();
        assert_eq!(kept(&path, &key, false).unwrap(), Some((json!({"kl_mean": 0.5}), Value::Null)));
        assert_eq!(kept(&path, &json!({"arguments": ["--score", "64"]}), false).unwrap(), None);
        let profiled = json!({"arguments": ["--score", "256"], "profile": [1, 2]});
        assert_eq!(kept(&path, &profiled, false).unwrap(), None);
        assert!(kept(&path, &profiled, true).unwrap().is_some());
        std::fs::write(&path, "{").unwrap();
        assert!(kept(&path, &key, false).is_err());
    }

    #[test]
    fn rules_have_files_of_their_own() {
        let all: Vec<&str> = RULES.into_iter().chain(frontier::RULES).collect();
        let all = table::distinct(all.into_iter());
        let mut names: Vec<String> = all.iter().map(|rule| file_name(rule)).collect();
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }
}
