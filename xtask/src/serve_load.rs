//! Many clients at once of `simlayer-run serve`: how much memory it takes, and how long running answers wait for their next
//! token while long prompts are read.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::prepare::Env;
use crate::serving::{Served, Serving, prompt};

/// Tokens of the prompts that are long.
const LONG: usize = 5500;
/// What the server may take besides caches and weights.
const BESIDES: u64 = 150 << 20;
/// What it may take more in the last quarter than in the one before: what a sample differs from the next by.
const GROWTH: f64 = 1.02;
/// Of a run of so many minutes.
const LONG_MINUTES: f64 = 10.0;
/// How long a token may be awaited while a long prompt is read, in medians.
const LONGEST: f64 = 4.0;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long the clients ask.
    #[arg(long, default_value_t = 15.0)]
    minutes: f64,
    /// Clients at once.
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Memory for the caches, in MiB.
    #[arg(long, default_value_t = 1024)]
    kv_mem: u64,
    #[command(flatten)]
    served: Served,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    let (program, model) = args.served.ready(&mut env)?;
    let server = Serving::start(&env, &program, &model, &["--kv-mem", &format!("{}M", args.kv_mem)], false)?;
    let longest = quiet(&server)?;
    let weights = std::fs::metadata(&model)?.len();
    let report = load(&server, args)?;
    let bound = (args.kv_mem << 20) + weights + BESIDES;
    report.check(bound)?;
    ensure!(longest <= LONGEST, "an answer waited for {longest:.1} times the median while a prompt was read");
    Ok(())
}

/// Asks for an answer piece by piece; `came` is called for each token.
fn ask(server: &Serving, prompt: &str, n: usize, mut came: impl FnMut(Instant)) -> Result<Outcome> {
    let body = json!({ "prompt": prompt, "n_predict": n, "stream": true, "ignore_eos": true, "return_tokens": true });
    let body = body.to_string();
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://"))?;
    write!(
        stream,
        "POST /completion HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    match line.split(' ').nth(1) {
        Some("200") => {}
        Some("503") => return Ok(Outcome::Busy),
        _ => {
            let _ = lines.read_to_string(&mut line);
            bail!("the server answered {line}");
        }
    }
    loop {
        line.clear();
        ensure!(lines.read_line(&mut line)? > 0, "the answer broke off");
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let data: Value = serde_json::from_str(data)?;
        ensure!(data.get("error").is_none(), "{data}");
        if data["stop"] == true {
            let milliseconds = |name: &str| data["timings"][name].as_f64().unwrap_or(0.0);
            return Ok(Outcome::Answered {
                read: Duration::from_secs_f64(milliseconds("prompt_ms") / 1e3),
                generated: Duration::from_secs_f64(milliseconds("predicted_ms") / 1e3),
                prompt: data["tokens_evaluated"].as_u64().unwrap_or(0) as usize,
                tokens: data["tokens_predicted"].as_u64().unwrap_or(0) as usize,
            });
        }
        came(Instant::now());
    }
}

enum Outcome {
    Answered { read: Duration, generated: Duration, prompt: usize, tokens: usize },
    Busy,
}

/// Four answers go on while one prompt of 6,000 tokens is read, and nobody else asks: how many medians the longest time between
/// their tokens is then.
fn quiet(server: &Serving) -> Result<f64> {
    let gaps = Mutex::new(Vec::new());
    let read = Mutex::new(None);
    let result = thread::scope(|scope| {
        let runners: Vec<_> = (0..4)
            .map(|index| {
                let gaps = &gaps;
                scope.spawn(move || {
                    let mut last: Option<Instant> = None;
                    ask(server, &prompt(index, 60), 700, |now| {
                        if let Some(last) = last.replace(now) {
                            gaps.lock().unwrap_or_else(|e| e.into_inner()).push((last, now));
                        }
                    })
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(600));
        let start = Instant::now();
        let long = ask(server, &prompt(99, 6000), 1, |_| ())?;
        *read.lock().unwrap_or_else(|e| e.into_inner()) = Some((start, Instant::now()));
        if let Outcome::Answered { prompt, read, .. } = long {
            println!("four answers, and a prompt of {prompt} tokens read in {:.1} s", read.as_secs_f64());
        }
        runners.into_iter().try_for_each(|runner| match runner.join() {
            Ok(result) => result.map(drop),
            Err(_) => bail!("a client panicked"),
        })
    });
    result?;
    let gaps = gaps.into_inner().unwrap_or_else(|e| e.into_inner());
    let (start, end) = read.into_inner().unwrap_or_else(|e| e.into_inner()).context("the prompt was read")?;
    let within = |(from, to): &(Instant, Instant)| (*to > start && *from < end).then(|| *to - *from);
    let longest = tell("time between tokens meanwhile", gaps.iter().filter_map(within).collect());
    tell(
        "and before and after",
        gaps.iter().filter(|gap| within(gap).is_none()).map(|(from, to)| *to - *from).collect(),
    );
    longest.context("no token came while the prompt was read")
}

fn tell(what: &str, mut gaps: Vec<Duration>) -> Option<f64> {
    gaps.sort_unstable();
    let (median, last) = (gaps.get(gaps.len() / 2)?, gaps.last()?);
    let at = |share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    let worst = last.as_secs_f64() / median.as_secs_f64();
    println!(
        "{what}: median {:.0} ms, 99 % {:.0} ms, longest {:.0} ms ({worst:.1} times the median), of {}",
        at(0.5),
        at(0.99),
        at(1.0),
        gaps.len()
    );
    Some(worst)
}

#[derive(Debug, Default)]
struct Report {
    minutes: f64,
    memory: Vec<u64>,
    errors: Vec<String>,
}

fn load(server: &Serving, args: &Args) -> Result<Report> {
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let (start, over) = (Instant::now(), AtomicBool::new(false));
    let [answered, busy, tokens, read] = [const { AtomicUsize::new(0) }; 4];
    let errors = Mutex::new(Vec::new());
    let gaps = Mutex::new(Vec::<(Instant, Instant)>::new());
    // When prompts that are long were being read.
    let long = Mutex::new(Vec::<(Instant, Instant)>::new());
    let mut memory = Vec::new();
    thread::scope(|scope| -> Result<()> {
        for client in 0..args.clients as u64 {
            let (over, errors, gaps, long) = (&over, &errors, &gaps, &long);
            let (answered, busy, tokens, read) = (&answered, &busy, &tokens, &read);
            scope.spawn(move || {
                for turn in 0.. {
                    if over.load(Ordering::SeqCst) {
                        break;
                    }
                    let seed = client * 1_000_003 + turn + 1;
                    let n = [100, 300, 700, 1500, 3000, 6000][(seed.wrapping_mul(2_654_435_761) >> 7) as usize % 6];
                    let mut times = Vec::new();
                    let outcome = ask(server, &prompt(seed, n), 16 + (seed % 7) as usize * 16, |now| times.push(now));
                    let now = Instant::now();
                    match outcome {
                        Ok(Outcome::Answered { read: took, generated, prompt, tokens: n }) => {
                            answered.fetch_add(1, Ordering::Relaxed);
                            tokens.fetch_add(n, Ordering::Relaxed);
                            read.fetch_add(prompt, Ordering::Relaxed);
                            if prompt > LONG {
                                let ended = now - generated;
                                long.lock().unwrap_or_else(|e| e.into_inner()).push((ended - took, ended));
                            }
                            let pairs = times.windows(2).map(|pair| (pair[0], pair[1]));
                            gaps.lock().unwrap_or_else(|e| e.into_inner()).extend(pairs);
                        }
                        Ok(Outcome::Busy) => {
                            busy.fetch_add(1, Ordering::Relaxed);
                            thread::sleep(Duration::from_millis(500));
                        }
                        Err(error) => errors.lock().unwrap_or_else(|e| e.into_inner()).push(format!("{error:#}")),
                    }
                }
            });
        }
        let mut watch = || -> Result<()> {
            while start.elapsed() < length {
                memory.push(server.memory()?);
                thread::sleep(Duration::from_millis(500));
            }
            Ok(())
        };
        let watched = watch();
        over.store(true, Ordering::SeqCst);
        watched
    })?;
    println!(
        "{} clients, {:.1} minutes: {} answers, {} tokens generated, {} tokens of prompts, {} times busy, {} errors",
        args.clients,
        args.minutes,
        answered.into_inner(),
        tokens.into_inner(),
        read.into_inner(),
        busy.into_inner(),
        errors.lock().unwrap_or_else(|e| e.into_inner()).len(),
    );
    let long = long.into_inner().unwrap_or_else(|e| e.into_inner());
    let gaps = gaps.into_inner().unwrap_or_else(|e| e.into_inner());
    let meanwhile = |(from, to): &&(Instant, Instant)| long.iter().any(|(start, end)| to > start && from < end);
    tell("time between tokens", gaps.iter().map(|(from, to)| *to - *from).collect());
    tell("while long prompts are read", gaps.iter().filter(meanwhile).map(|(from, to)| *to - *from).collect());
    let errors = errors.into_inner().unwrap_or_else(|e| e.into_inner());
    Ok(Report { minutes: args.minutes, memory, errors })
}

impl Report {
    fn check(&self, bound: u64) -> Result<()> {
        let mib = |bytes: u64| bytes >> 20;
        let most = self.memory.iter().copied().max().context("no sample")?;
        let half = &self.memory[self.memory.len() / 2..];
        let (third, fourth) = half.split_at(half.len() / 2);
        let mean = |samples: &[u64]| samples.iter().sum::<u64>() / samples.len().max(1) as u64;
        let growth = mean(fourth) as f64 / mean(third).max(1) as f64;
        println!(
            "resident memory, of {} samples: at most {} MiB of {} MiB; in the third quarter {} MiB, in the fourth {} MiB ({:+.1} %)",
            self.memory.len(),
            mib(most),
            mib(bound),
            mib(mean(third)),
            mib(mean(fourth)),
            (growth - 1.0) * 100.0,
        );
        for error in self.errors.iter().take(5) {
            println!("error: {error}");
        }
        ensure!(self.errors.is_empty(), "{} requests failed", self.errors.len());
        ensure!(most <= bound, "it takes more memory than it may");
        // Before that, caches of conversations fill what they may take.
        ensure!(growth <= GROWTH || self.minutes < LONG_MINUTES, "its memory grows");
        Ok(())
    }
}
