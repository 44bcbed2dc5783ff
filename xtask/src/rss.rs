//! Our resident memory against that of upstream's llama-simple: load a model, read a short prompt,
//! decode some tokens.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::prepare::{self, Env};
use crate::{sh, upstream};

const PROMPT: &str = "Hello my name is";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A GGUF model; default: the one that demo and tests use.
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// Tokens to decode.
    #[arg(short, long, default_value_t = 10)]
    n_predict: u32,
    /// How often each program runs; the medians count.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// A process's resident memory in bytes, from /proc/PID/smaps_rollup, which counts pages. The
/// figures in /proc/PID/status are sums of per-thread counters that lag behind by some 100 KiB.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Memory {
    resident: u64,
    anonymous: u64,
}

pub fn run(args: &Args) -> Result<()> {
    if !cfg!(target_os = "linux") {
        bail!("this reads /proc, which only Linux has");
    }
    if args.rounds == 0 {
        bail!("--rounds must be at least 1");
    }
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    let model = match &args.model {
        Some(path) => path.clone(),
        None => prepare::model()?,
    };
    let simple = upstream::tool("llama-simple")?;
    let ours = env.build_simlayer_run()?;
    let n = args.n_predict.to_string();

    let mut commands = [env.command(&simple.display().to_string()), env.command(&ours.display().to_string())];
    commands[0].arg("-m").arg(&model).args(["-n", &n, PROMPT]);
    commands[1].arg("-m").arg(&model).args(["-n", &n, "-p", PROMPT, "--temp", "0", "--ignore-eos"]);
    let mut samples = [Vec::new(), Vec::new()];
    for command in &commands {
        eprintln!("$ {}", sh::shown(command));
    }
    for _ in 0..args.rounds {
        for (command, samples) in commands.iter_mut().zip(&mut samples) {
            samples.push(watch(command)?);
        }
    }

    println!("| MiB at the highest moment | resident | of it anonymous | of it files |");
    println!("|---|---|---|---|");
    let medians = samples.map(median);
    for (name, memory) in ["llama-simple", "simlayer-run"].into_iter().zip(medians) {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} |",
            mib(memory.resident),
            mib(memory.anonymous),
            mib(memory.resident - memory.anonymous)
        );
    }
    println!("ours / llama-simple: {:.3}", medians[1].resident as f64 / medians[0].resident as f64);
    Ok(())
}

/// The run in the middle, by resident memory.
fn median(mut samples: Vec<Memory>) -> Memory {
    samples.sort_by_key(|memory| memory.resident);
    samples[samples.len() / 2]
}

/// Runs the command and looks at its memory every millisecond until it ends; returns the largest
/// sample.
fn watch(command: &mut Command) -> Result<Memory> {
    let line = sh::shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let file = format!("/proc/{}/smaps_rollup", child.id());
    let mut highest: Option<Memory> = None;
    let status = loop {
        if let Some(found) = std::fs::read_to_string(&file).ok().and_then(|text| parse(&text)) {
            highest = highest.filter(|before| before.resident > found.resident).or(Some(found));
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    highest.with_context(|| format!("`{line}` ended before its memory was seen"))
}

/// Reads /proc/PID/smaps_rollup; none when the process has no memory any more.
fn parse(text: &str) -> Option<Memory> {
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    Some(Memory { resident: bytes("Rss")?, anonymous: bytes("Anonymous")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_rollup_is_parsed() {
        let text = "55-7f ---p 00000000 00:00 0   [rollup]\nRss:     100 kB\nPss:  70 kB\nAnonymous:   60 kB\n";
        assert_eq!(parse(text), Some(Memory { resident: 102400, anonymous: 61440 }));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_process_is_watched() {
        let memory = watch(Command::new("sleep").arg("0.1"));
        assert!(memory.is_ok_and(|m| m.resident >= m.anonymous && m.resident > 0));
    }
}
