//! `simlayer-run serve`, for chores that ask it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::prepare::{self, Env};
use crate::sh;

/// What is served, and by which program.
#[derive(Debug, clap::Args)]
pub struct Served {
    /// A GGUF model; default: the one that demo and tests use.
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// A simlayer-run that is built already.
    #[arg(long)]
    simlayer_run: Option<PathBuf>,
}

impl Served {
    /// The program and the model, fetched and built where they are not named.
    pub fn ready(&self, env: &mut Env) -> Result<(PathBuf, PathBuf)> {
        prepare::libclang(env)?;
        let model = self.model.clone().map_or_else(prepare::model, Ok)?;
        let program = self.simlayer_run.clone().map_or_else(|| env.build_simlayer_run(), Ok)?;
        Ok((program, model))
    }
}

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct Serving {
    child: Child,
    /// `http://…` without a slash at its end.
    pub url: String,
}

impl Serving {
    /// Starts it at a free port; returns when it listens. What it says goes to stderr where `is_told`.
    pub fn start<S: AsRef<OsStr>>(
        env: &Env,
        program: &Path,
        model: &Path,
        args: &[S],
        is_told: bool,
    ) -> Result<Serving> {
        let mut command = env.command(&program.display().to_string());
        command.args(["serve", "--port", "0", "-m"]).arg(model).args(args);
        let line = sh::shown(&command);
        eprintln!("$ {line}");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut serving =
            Serving { child: child.with_context(|| format!("cannot start `{line}`"))?, url: String::new() };
        let Some(stderr) = serving.child.stderr.take() else { bail!("`{line}` has no stderr") };
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let url = lines.by_ref().find_map(|line| {
            let url = line.strip_prefix("listening at ").map(str::to_owned);
            said.push(line);
            url
        });
        serving.url = url.with_context(|| format!("`{line}` ended:\n{}", said.join("\n")))?;
        // Whoever does not read lets it wait.
        thread::spawn(move || lines.filter(|_| is_told).for_each(|line| eprintln!("{line}")));
        Ok(serving)
    }

    /// Resident bytes.
    pub fn memory(&self) -> Result<u64> {
        let path = format!("/proc/{}/statm", self.child.id());
        let text = std::fs::read_to_string(&path).context("the server has ended")?;
        Ok(text.split(' ').nth(1).context(path)?.parse::<u64>()? * 4096)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
