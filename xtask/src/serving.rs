//! `simlayer-run serve`, for chores that ask it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

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

    /// Starts another server, which is to answer at `url` when it is ready; what it says goes to the file `log`.
    pub fn start_other(mut command: Command, url: String, log: &Path) -> Result<Serving> {
        let line = sh::shown(&command);
        eprintln!("$ {line}");
        let file = File::create(log)?;
        let child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn();
        let mut serving = Serving { child: child.with_context(|| format!("cannot start `{line}`"))?, url };
        let start = Instant::now();
        while serving.get("/health").is_err() {
            if serving.child.try_wait()?.is_some() || start.elapsed() > Duration::from_secs(120) {
                bail!("`{line}` is not ready:\n{}", fs::read_to_string(log)?);
            }
            thread::sleep(Duration::from_millis(200));
        }
        Ok(serving)
    }

    /// What is answered at a path.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.ask("POST", path, &body.to_string())
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(self.url.trim_start_matches("http://"))?;
        let length = body.len();
        // Of version 1.0, whose answers come in one piece.
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.split(' ').nth(1) == Some("200"), "{method} {path}: {answer}");
        Ok(serde_json::from_str(body)?)
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

/// Words that no other prompt has in this order, about `n` tokens.
pub fn prompt(seed: u64, n: usize) -> String {
    const WORDS: [&str; 12] =
        ["sea", "wind", "stone", "river", "cloud", "light", "tree", "road", "bird", "hill", "rain", "fire"];
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        WORDS[(state % 12) as usize]
    };
    let mut text = String::new();
    (0..n).for_each(|_| {
        text.push(' ');
        text.push_str(next());
    });
    text
}
