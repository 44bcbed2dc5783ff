//! Many conversations, few of them in memory: each asked again in turn is restored from the disk, which has to take a tenth
//! at most of reading it anew.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::prepare::Env;
use crate::root;
use crate::serving::{Served, Serving};
use crate::sh;

/// Conversations that are read anew, to compare with.
const ANEW: usize = 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    served: Served,
    #[arg(long, default_value_t = 200)]
    conversations: usize,
    /// Conversations for which --kv-mem has room.
    #[arg(long, default_value_t = 20)]
    in_memory: u64,
    /// Tokens of each conversation's first prompt.
    #[arg(long, default_value_t = 1500)]
    tokens: usize,
    /// Threads of the server; default: its own.
    #[arg(short, long)]
    threads: Option<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    let (program, model) = args.served.ready(&mut env)?;
    let folder = env.target_dir()?.join("parking");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let (list, disk) = (folder.join("conversations.json"), folder.join("disk").display().to_string());
    let context = (args.tokens + 256).to_string();
    let serve = |options: &[&str]| {
        let threads = args.threads.as_ref().map_or(vec![], |threads| vec!["-t", threads]);
        let options = [&["-c", &context, "--parallel", "1"], &threads[..], options].concat();
        Serving::start(&env, &program, &model, &options, false)
    };
    let ask = |what: &str, server: &Serving, numbers: &[usize]| -> Result<Value> {
        let mut script = env.command("python3");
        script.arg(root().join("xtask/serve/parking.py")).args([what, &server.url]).arg(&list);
        let text = sh::output(script.args(numbers.iter().map(usize::to_string)))?;
        Ok(serde_json::from_str(&text)?)
    };

    // What one takes, and what reading it does.
    let one = ask("begin", &serve(&[])?, &[1, args.tokens])?;
    let (idle, f16) = (one["bytes"].as_u64().context("no bytes")?, one["f16_bytes"].as_u64().context("no f16_bytes")?);
    let kv_mem = (args.in_memory * idle + f16).to_string();
    let parks = ["--kv-mem", &kv_mem, "--kv-disk", &disk, "--kv-disk-mem", "100G"];

    let begun = ask("begin", &serve(&parks)?, &[args.conversations, args.tokens])?;
    // A new process: nothing is in its memory.
    let again = ask("again", &serve(&parks)?, &[])?;
    let anew = ask("again", &serve(&[])?, &[ANEW.min(args.conversations)])?;

    let restored = again["cached"].as_array().context("no cached")?;
    let restored = restored.iter().filter(|n| n.as_u64().is_some_and(|n| n >= args.tokens as u64)).count();
    let (again_seconds, anew_seconds) = (sorted(&again["seconds"])?, sorted(&anew["seconds"])?);
    let (p95, reading) = (percentile(&again_seconds, 95), percentile(&anew_seconds, 50));
    println!(
        "{} conversations of {} tokens, {:.1} MiB each (f16: {:.1} MiB); in memory at most {} at the first turn, {} at the second",
        args.conversations,
        args.tokens,
        idle as f64 / f64::from(1 << 20),
        f16 as f64 / f64::from(1 << 20),
        begun["most"],
        again["most"],
    );
    println!("restored from disk: {restored} of {}", again_seconds.len());
    println!(
        "time to first token: restored, median {:.0} ms, 95 % below {:.0} ms, most {:.0} ms; read anew, median {:.0} ms, least {:.0} ms",
        percentile(&again_seconds, 50) * 1e3,
        p95 * 1e3,
        percentile(&again_seconds, 100) * 1e3,
        reading * 1e3,
        percentile(&anew_seconds, 0) * 1e3,
    );
    println!("95 % of the restored take at most 1/{:.1} of reading anew", reading / p95);
    fs::remove_dir_all(&folder)?;
    ensure!(restored == args.conversations, "{} conversations were read anew", args.conversations - restored);
    ensure!(p95 <= reading / 10.0, "restoring takes more than a tenth of reading anew");
    Ok(())
}

fn sorted(seconds: &Value) -> Result<Vec<f64>> {
    let seconds = seconds.as_array().context("no seconds")?;
    let mut seconds: Vec<f64> = seconds.iter().filter_map(Value::as_f64).collect();
    seconds.sort_by(f64::total_cmp);
    ensure!(!seconds.is_empty(), "nothing was measured");
    Ok(seconds)
}

/// Of sorted numbers, one that `percent` of them do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.saturating_sub(1)]
}
