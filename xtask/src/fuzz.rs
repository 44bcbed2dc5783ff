//! Runs the fuzz targets of `fuzz/` for a while.
//!
//! No sanitizer is used: the targets are Rust without `unsafe`, where a panic or a too large
//! allocation is what there is to find, and so a stable compiler suffices.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::prepare::{self, Env};
use crate::root;
use crate::sh::{self, step};

const CARGO_FUZZ: &str = "0.13.2";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long to run each target.
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// Targets to run; default: all.
    targets: Vec<String>,
    /// More options for libFuzzer, after `--`.
    #[arg(last = true)]
    options: Vec<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    step("prepare", || {
        prepare::libclang(&mut env)?;
        install(&env)
    })?;
    let targets = if args.targets.is_empty() {
        let list = sh::output(cargo_fuzz(&env)?.arg("list"))?;
        list.split_whitespace().map(String::from).collect()
    } else {
        args.targets.clone()
    };
    if targets.is_empty() {
        bail!("{}: no fuzz targets", root().join("fuzz").display());
    }
    for target in &targets {
        step(&format!("fuzz {target} for {} s", args.seconds), || {
            let mut command = cargo_fuzz(&env)?;
            command.args(["run", "--sanitizer", "none", target, "--"]);
            command.arg(format!("-max_total_time={}", args.seconds)).arg("-print_final_stats=1");
            // An allocation that the file does not justify becomes a finding.
            command.arg("-rss_limit_mb=1500");
            // And so does an input that takes longer than this.
            command.arg("-timeout=60");
            sh::run(command.args(&args.options))
        })?;
    }
    Ok(())
}

fn cargo_root() -> PathBuf {
    prepare::tools_dir().join("cargo")
}

/// Installs cargo-fuzz for this project alone.
fn install(env: &Env) -> Result<()> {
    if cargo_root().join("bin/cargo-fuzz").is_file() {
        return Ok(());
    }
    eprintln!("cargo-fuzz is missing");
    let mut install = env.cargo();
    install.args(["install", "cargo-fuzz", "--locked", "--version", CARGO_FUZZ, "--root"]);
    sh::run(install.arg(cargo_root())).context("cannot install cargo-fuzz")
}

/// `cargo fuzz`, which cargo finds on the PATH.
fn cargo_fuzz(env: &Env) -> Result<Command> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(cargo_root().join("bin")).chain(std::env::split_paths(&path));
    let mut command = env.cargo();
    command.env("PATH", std::env::join_paths(dirs)?).arg("fuzz");
    Ok(command)
}
