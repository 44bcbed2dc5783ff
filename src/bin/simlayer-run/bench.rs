//! Speed of prefill (`pp512`) and decoding (`tg128`), measured as llama-bench does.

use std::{
    io::{self, IsTerminal, Write},
    slice,
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::json;
use simlayer::{BatchEntry, Error, Model, Outputs, SeqId, Session, Token};

use crate::{args::BenchArgs, build::Build, failure::Failure, interrupt, options::Run, report};

#[derive(Debug, Clone, Copy)]
enum Test {
    Prompt(usize),
    Generate(usize),
}

impl Test {
    fn name(self) -> String {
        match self {
            Test::Prompt(n) => format!("pp{n}"),
            Test::Generate(n) => format!("tg{n}"),
        }
    }

    fn n_tokens(self) -> usize {
        match self {
            Test::Prompt(n) | Test::Generate(n) => n,
        }
    }
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Measurement {
    test: String,
    depth: usize,
    /// Conversations at once.
    sequences: usize,
    /// Mean over the samples.
    tokens_per_second: f64,
    stddev: f64,
    samples: Vec<f64>,
    /// Bytes of the cache after the test.
    kv_bytes: usize,
    lazy_layers: usize,
    /// Time that scoring the layers took, as a share of the test's; none where nothing is scored.
    score_share: Option<f64>,
}

pub fn run(args: BenchArgs) -> Result<(), Failure> {
    let mut run = Run::settle(args.common)?;
    let prompts = args.prompt.iter().map(|&n| Test::Prompt(n));
    let tests: Vec<_> =
        prompts.chain(args.r#gen.iter().map(|&n| Test::Generate(n))).filter(|test| test.n_tokens() > 0).collect();
    if tests.is_empty() {
        return Err(Failure::usage("there is nothing to measure: give --prompt or --gen"));
    }
    let (model, _) = run.load()?;
    let mut out = interrupt::stdout();
    let mut runs = Vec::new();
    if !args.output.json {
        writeln!(
            out,
            "{:<10} {:>8} {:>12} {:>10} {:>14} {:>6} {:>8}",
            "test", "depth", "tokens/s", "± stddev", "KV bytes", "lazy", "scoring"
        )?;
    }
    for &depth in &args.depth {
        for &test in &tests {
            let measured = measure(&run, &model, (test, depth, args.sequences), args.reps)?;
            if !args.output.json {
                let Measurement { test, tokens_per_second, stddev, kv_bytes, lazy_layers, .. } = &measured;
                let scoring = measured.score_share.map_or("–".to_owned(), |share| format!("{:.2} %", share * 100.0));
                writeln!(
                    out,
                    "{test:<10} {depth:>8} {tokens_per_second:>12.2} {stddev:>10.2} {kv_bytes:>14} {lazy_layers:>6} {scoring:>8}"
                )?;
                out.flush()?;
            }
            runs.push(measured);
        }
    }
    if args.output.json {
        let object = json!({
            "runs": runs,
            "build": Build::this(),
            "model": model.name(),
            "threads": run.session.n_threads,
            "threads_batch": run.session.n_threads_batch,
        });
        report::write_json(&mut out, &object)?;
    }
    Ok(())
}

fn measure(
    run: &Run,
    model: &Model,
    (test, depth, sequences): (Test, usize, usize),
    reps: usize,
) -> Result<Measurement, Failure> {
    let mut params = run.session.clone();
    params.n_ctx = depth + test.n_tokens();
    let mut session = Session::new(model, params)?;
    interrupt::watch();
    let mut tokens = RandomTokens::new(model);

    // Warm up: a prompt as long as the test's, or one generated token.
    match test {
        Test::Prompt(_) => work(&mut session, test, sequences, &mut tokens)?,
        Test::Generate(_) => work(&mut session, Test::Generate(1), sequences, &mut tokens)?,
    }
    session.clear();
    session.time_scores();

    let progress = io::stderr().is_terminal();
    let mut samples = Vec::with_capacity(reps);
    let (mut scoring, mut testing) = (Duration::ZERO, Duration::ZERO);
    for rep in 1..=reps {
        if progress {
            eprint!("\r{} at depth {depth}: {rep}/{reps} ", test.name());
        }
        // Reading the depth again takes long; it is enough to take the last test back, where no lazy layer has
        // dropped tokens meanwhile.
        for seq in 0..sequences as SeqId {
            let mut sequence = session.sequence(seq);
            if sequence.len() <= depth || !sequence.truncate(depth) {
                sequence.clear();
                if depth > 0 {
                    sequence.prefill(&tokens.text(depth))?;
                }
            }
        }
        let scored_before = session.score_time().unwrap_or_default();
        let start = Instant::now();
        work(&mut session, test, sequences, &mut tokens)?;
        let elapsed = start.elapsed();
        samples.push((sequences * test.n_tokens()) as f64 / elapsed.as_secs_f64());
        testing += elapsed;
        scoring += session.score_time().unwrap_or_default() - scored_before;
    }
    if progress {
        eprint!("\r{:40}\r", "");
    }
    let (mean, stddev) = mean_and_stddev(&samples);
    let kv = session.kv();
    Ok(Measurement {
        test: test.name(),
        depth,
        sequences,
        tokens_per_second: mean,
        stddev,
        samples,
        kv_bytes: kv.allocated_bytes,
        lazy_layers: kv.lazy_layers,
        score_share: (!scoring.is_zero()).then(|| scoring.as_secs_f64() / testing.as_secs_f64()),
    })
}

/// The measured part of each sequence: a prompt read at once, with the logits of its last token, or tokens one by one, those of
/// all sequences together.
fn work(session: &mut Session, test: Test, sequences: usize, tokens: &mut RandomTokens) -> Result<(), Error> {
    match test {
        Test::Prompt(n) => {
            (0..sequences as SeqId).try_for_each(|seq| session.sequence(seq).prefill(&tokens.text(n)).map(drop))
        }
        Test::Generate(n) => {
            let mut next: Vec<Token> = (0..sequences).map(|_| tokens.first()).collect();
            for _ in 0..n {
                let entry = |(seq, token)| {
                    let tokens = slice::from_ref(token);
                    BatchEntry { seq, tokens, outputs: Outputs::Last, prompt_end: false }
                };
                session.run(&(0..).zip(&next).map(entry).collect::<Vec<_>>())?;
                next.fill_with(|| tokens.next());
            }
            Ok(())
        }
    }
}

/// Tokens drawn from the whole vocabulary: what they mean does not change the work.
struct RandomTokens {
    state: u64,
    n_vocab: u64,
    bos: Option<Token>,
}

impl RandomTokens {
    fn new(model: &Model) -> RandomTokens {
        let vocab = model.vocab();
        RandomTokens { state: 1, n_vocab: vocab.n_tokens() as u64, bos: vocab.bos().filter(|_| vocab.adds_bos()) }
    }

    fn first(&mut self) -> Token {
        self.bos.unwrap_or_else(|| self.next())
    }

    fn next(&mut self) -> Token {
        // Knuth's linear congruential generator; the high bits are the good ones.
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.n_vocab) as Token
    }

    fn text(&mut self, n: usize) -> Vec<Token> {
        let first = self.first();
        std::iter::once(first).chain(std::iter::repeat_with(|| self.next())).take(n).collect()
    }
}

/// Mean and sample standard deviation.
fn mean_and_stddev(samples: &[f64]) -> (f64, f64) {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n;
    if samples.len() < 2 {
        return (mean, 0.0);
    }
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        assert_eq!(mean_and_stddev(&[3.0]), (3.0, 0.0));
        assert_eq!(mean_and_stddev(&[1.0, 2.0, 3.0]), (2.0, 1.0));
    }
}
