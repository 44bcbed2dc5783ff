//! Needles and other tasks in made-up text: is something found again after thousands of tokens, and how sure is the model?
//!
//! A text is read once. Then each question is asked on a copy of the cache, so that one text serves many trials; or the
//! question is the end of the prompt, which is then read for each. A trial is scored by the probability of the answer's
//! tokens, and by whether greedy decoding would give it.

mod tasks;
mod text;

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use serde::Serialize;
use serde_json::json;
use simlayer::{
    BatchEntry, Model, Outputs, SeqId, Session, SessionParams,
    ggml::Type,
    lazy::Policy,
    quality::{Contender, Held, Reading, metrics},
};
use text::{Ask, Random, Text, TextError};

use crate::{
    args::{AskWhen, Compare, PasskeyArgs, Variant},
    failure::Failure,
    interrupt,
    options::Run,
    plot::{self, HeatMaps, Panel},
    progress::Progress,
    report,
};

/// Needles of one depth in one text, where it has several.
const PER_DEPTH: usize = 4;
/// The copy that a question is asked on.
const QUESTION: SeqId = 2;

#[derive(Debug, Clone, Default, Serialize)]
struct Cell {
    length: usize,
    depth: f64,
    /// Trials in which greedy decoding gives the answer.
    correct: usize,
    trials: usize,
    /// Mean log-probability of an answer's token, over all trials.
    log_prob: f64,
    /// Mean divergence from the full cache, over the answers' tokens.
    kl_mean: f64,
}

impl Cell {
    fn accuracy(&self) -> f64 {
        self.correct as f64 / self.trials.max(1) as f64
    }
}

#[derive(Debug, Clone, Default, Serialize)]
struct Outcome {
    name: String,
    lazy: String,
    accuracy: f64,
    log_prob: f64,
    /// Trials in which greedy decoding gives the answer, and all.
    found: usize,
    trials: usize,
    /// Mean negative log-likelihood of an answer's token: `-log_prob`.
    answer_nll: f64,
    /// Mean divergence from the full cache, over the answers' tokens.
    kl_mean: f64,
    /// Bytes of the cache behind the longest text.
    kv_bytes: usize,
    /// What an f16 cache of that text takes, over `kv_bytes`.
    compression: f64,
    cells: Vec<Cell>,
}

impl Outcome {
    fn new(name: impl Into<String>, lazy: impl Into<String>) -> Outcome {
        Outcome { name: name.into(), lazy: lazy.into(), ..Outcome::default() }
    }

    fn count(&mut self, cell: usize, trial: &Trial) {
        let cell = &mut self.cells[cell];
        cell.trials += 1;
        cell.correct += usize::from(trial.found);
        cell.log_prob += trial.log_prob;
        cell.kl_mean += trial.kl;
        if trial.kv_bytes > self.kv_bytes {
            (self.kv_bytes, self.compression) = (trial.kv_bytes, trial.compression);
        }
    }

    /// Makes means of sums.
    fn settle(&mut self) {
        for cell in &mut self.cells {
            let trials = cell.trials.max(1) as f64;
            cell.log_prob /= trials;
            cell.kl_mean /= trials;
        }
        let n = self.cells.len().max(1) as f64;
        let mean = |value: &dyn Fn(&Cell) -> f64| self.cells.iter().map(value).sum::<f64>() / n;
        self.accuracy = mean(&Cell::accuracy);
        self.log_prob = mean(&|cell| cell.log_prob);
        self.kl_mean = mean(&|cell| cell.kl_mean);
        self.answer_nll = -self.log_prob;
        self.found = self.cells.iter().map(|cell| cell.correct).sum();
        self.trials = self.cells.iter().map(|cell| cell.trials).sum();
    }
}

pub fn run(args: PasskeyArgs) -> Result<(), Failure> {
    if let Some(path) = &args.plot {
        plot::check_name(path)?;
    }
    let mut run = Run::settle(args.common)?;
    let depths = depths(&args.depths)?;
    let (model, _) = run.load()?;
    let contenders = contenders(&args.compare, &run.session, &model)?;
    let (per_depth, together) = match args.variant {
        Variant::Single => (1, 1),
        _ => (PER_DEPTH.min(args.trials), depths.len()),
    };
    let texts = args.trials.div_ceil(per_depth);
    let mut full = Outcome::new(FULL, Policy::Off.to_string());
    let mut results: Vec<Outcome> = contenders.iter().map(|(outcome, _)| outcome.clone()).collect();

    interrupt::watch();
    let progress = Progress::new("needles");
    let total: usize = args.lengths.iter().sum();
    let mut done = 0;
    for &length in &args.lengths {
        let first_cell = full.cells.len();
        for outcome in results.iter_mut().chain([&mut full]) {
            outcome.cells.extend(depths.iter().map(|&depth| Cell { length, depth: depth * 100.0, ..Cell::default() }));
        }
        for group in depths.chunks(together) {
            let first = depths.iter().position(|depth| depth == &group[0]).unwrap_or(0);
            for text in 0..texts {
                // Each text has a seed of its own, so that one length's trials do not depend on the others.
                let seed = args.seed ^ ((length as u64) << 40) ^ ((text as u64) << 20) ^ first as u64;
                let asked = per_depth.min(args.trials - text * per_depth);
                let made = make(&model, args.variant, &mut Random::new(seed), length, group, (per_depth, asked));
                let made = made.map_err(Failure::run)?;
                let asked = match args.ask {
                    AskWhen::After => vec![made],
                    AskWhen::Prompt => made.asked_at_once(),
                };
                let share = |part: f32| {
                    let texts = (text as f32 + part) / texts as f32;
                    let share = (texts * group.len() as f32 + first as f32) / depths.len() as f32;
                    progress.set((done as f32 + length as f32 * share) / total as f32);
                };
                let n = asked.len() as f32;
                for (i, text) in asked.iter().enumerate() {
                    let rules = contenders.iter().map(|(_, contender)| contender);
                    ask_all(
                        &run.session,
                        &model,
                        rules,
                        text,
                        &mut |contender, ask, trial| {
                            let outcome = contender.map_or(&mut full, |index| &mut results[index]);
                            outcome.count(first_cell + first + ask.depth, trial);
                        },
                        &mut |part| share((i as f32 + part) / n),
                    )?;
                }
            }
        }
        done += length;
    }
    drop(progress);
    results.iter_mut().chain([&mut full]).for_each(Outcome::settle);

    let mut out = interrupt::stdout();
    if args.output.json {
        // The run's own setting is the one that was asked for; the others are beside it.
        let own = results.iter().find(|result| result.name == LAZY).unwrap_or(&results[0]);
        let object = json!({
            "cells": own.cells,
            "accuracy": own.accuracy,
            "log_prob": own.log_prob,
            "variant": args.variant.name(),
            "ask": args.ask.name(),
            "seed": args.seed,
            "full": full,
            "runs": results,
            "model": model.name(),
        });
        report::write_json(&mut out, &object)?;
    } else {
        print(&mut out, &results, &full, &args.lengths, &depths)?;
    }
    out.flush()?;
    if let Some(path) = &args.plot {
        plot::write(path, &picture(&model, &results, &args.lengths, &depths, args.variant))?;
    }
    Ok(())
}

/// The names of the run's own setting, and of the full cache.
const LAZY: &str = "lazy";
const FULL: &str = "full";

fn make(
    model: &Model,
    variant: Variant,
    random: &mut Random,
    length: usize,
    depths: &[f64],
    (per_depth, asked): (usize, usize),
) -> Result<Text, TextError> {
    match variant {
        Variant::Single | Variant::Multi => text::needles(model.vocab(), random, length, depths, (per_depth, asked)),
        _ => tasks::text(model, variant, random, length, depths, (per_depth, asked)),
    }
}

fn contenders(
    compare: &[Compare],
    params: &SessionParams,
    model: &Model,
) -> Result<Vec<(Outcome, Contender)>, Failure> {
    let mut all = Vec::new();
    for compare in compare {
        if let Compare::Rule(contender) = compare {
            all.push((Outcome::new(contender.to_string(), contender.policy.to_string()), contender.clone()));
        }
    }
    let usual = compare.contains(&Compare::Usual);
    if all.is_empty() || usual {
        // What a profile's layers are, not its name.
        let settled = Session::new(model, params.clone())?.policy().to_string();
        all.insert(0, (Outcome::new(LAZY, settled), params.lazy.policy.clone().into()));
    }
    if usual {
        // Layers that are sliding-window by design, or recurrent, cannot be lazy.
        let hparams = model.hparams();
        let lazy = Policy::Layers((0..hparams.n_layer).filter(|&layer| hparams.can_be_lazy(layer)).collect());
        let other = |name: &str, policy: Policy, types| {
            (Outcome::new(name, policy.to_string()), Contender { types, ..policy.into() })
        };
        all.insert(0, other(FULL, Policy::Off, Some((Type::F16, Type::F16))));
        all.insert(2, other("StreamingLLM", lazy, None));
        all.insert(3, other("all q4_0", Policy::Off, Some((Type::Q4_0, Type::Q4_0))));
    }
    Ok(all)
}

fn depths(percents: &[f64]) -> Result<Vec<f64>, Failure> {
    match percents.iter().find(|percent| !(0.0..=100.0).contains(*percent)) {
        Some(wrong) => Err(Failure::usage(format!("--depths {wrong}: it must be a percentage from 0 to 100"))),
        None => Ok(percents.iter().map(|percent| percent / 100.0).collect()),
    }
}

/// How one question was answered.
#[derive(Debug)]
struct Trial {
    found: bool,
    log_prob: f64,
    kl: f64,
    kv_bytes: usize,
    compression: f64,
}

/// Reads a text for each contender and asks its questions. `count` gets the contender's index, `None` for the full cache.
fn ask_all<'a>(
    params: &SessionParams,
    model: &Model,
    contenders: impl ExactSizeIterator<Item = &'a Contender>,
    text: &Text,
    count: &mut dyn FnMut(Option<usize>, &Ask, &Trial),
    progress: &mut dyn FnMut(f32),
) -> Result<(), Failure> {
    let total = contenders.len() as f32 + 1.0;
    let mut reading = Reading::new(model, params, &text.prompt, &mut |share| progress(share / total))?;
    let n_vocab = model.hparams().n_vocab;
    let mut full_rows: Vec<Vec<f32>> = Vec::new();
    let mut ask_each = |held: &mut Held<'_>, index: Option<usize>| -> Result<(), Failure> {
        let (kv_bytes, compression) = (held.kv_bytes(), held.compression());
        for (i, ask) in text.asks.iter().enumerate() {
            let rows = answer_rows(held, ask)?;
            let base = full_rows.get(i).unwrap_or(&rows);
            let (mut found, mut nll, mut kl) = (true, 0.0, 0.0);
            let both = rows.chunks_exact(n_vocab).zip(base.chunks_exact(n_vocab));
            for ((row, base), &token) in both.zip(&ask.answer) {
                found &= metrics::top(row) == token;
                nll += metrics::nll(row, token);
                kl += metrics::kl(base, row);
            }
            let n = ask.answer.len().max(1) as f64;
            count(index, ask, &Trial { found, log_prob: -nll / n, kl: kl / n, kv_bytes, compression });
            if index.is_none() {
                full_rows.push(rows);
            }
        }
        Ok(())
    };
    ask_each(&mut reading.full()?, None)?;
    for (index, contender) in contenders.enumerate() {
        let at = |share: f32| (1.0 + index as f32 + share) / total;
        let mut held = reading.under(contender, &mut |share| progress(at(share)))?;
        ask_each(&mut held, Some(index))?;
        progress(at(1.0));
    }
    Ok(())
}

/// The rows that predict an answer's tokens, from a copy of what is held.
fn answer_rows(held: &mut Held<'_>, ask: &Ask) -> Result<Vec<f32>, Failure> {
    let mut rows = held.row().to_vec();
    let (session, seq) = held.parts();
    session.fork(seq, QUESTION, &BTreeSet::new())?;
    let mut run = |tokens: &[i32], outputs| {
        session.run(&[BatchEntry { seq: QUESTION, tokens, outputs, prompt_end: false }])?;
        Ok::<_, simlayer::Error>(session.logits().to_vec())
    };
    if !ask.question.is_empty() {
        rows = run(&ask.question, Outputs::Last)?;
    }
    if let Some((_, fed)) = ask.answer.split_last().filter(|(_, fed)| !fed.is_empty()) {
        rows.extend(run(fed, Outputs::All)?);
    }
    session.seq_clear(QUESTION);
    Ok(rows)
}

fn print(
    out: &mut impl Write,
    results: &[Outcome],
    full: &Outcome,
    lengths: &[usize],
    depths: &[f64],
) -> io::Result<()> {
    for result in results {
        writeln!(
            out,
            "{}: {:.1} % found, mean token probability {:.3}, KV cache up to {} bytes (full cache: {:.1} %, {:.3}, {} bytes)",
            result.name,
            result.accuracy * 100.0,
            result.log_prob.exp(),
            result.kv_bytes,
            full.accuracy * 100.0,
            full.log_prob.exp(),
            full.kv_bytes,
        )?;
        write!(out, "{:>8}", "depth")?;
        for length in lengths {
            write!(out, " {length:>14}")?;
        }
        writeln!(out)?;
        for (i, depth) in depths.iter().enumerate() {
            write!(out, "{:>6} %", depth * 100.0)?;
            for cell in result.cells.iter().skip(i).step_by(depths.len()) {
                let found = format!("{}/{} ({:.2})", cell.correct, cell.trials, cell.log_prob.exp());
                write!(out, " {found:>14}")?;
            }
            writeln!(out)?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Exact matches above, token probabilities below.
fn picture(model: &Model, results: &[Outcome], lengths: &[usize], depths: &[f64], variant: Variant) -> HeatMaps {
    let cells = |result: &Outcome, value: &dyn Fn(&Cell) -> f64| -> Vec<Vec<f64>> {
        (0..depths.len())
            .map(|depth| result.cells.iter().skip(depth).step_by(depths.len()).map(value).collect())
            .collect()
    };
    let found = results
        .iter()
        .map(|result| Panel { title: format!("{}: found", result.name), cells: cells(result, &Cell::accuracy) });
    let sure = results.iter().map(|result| Panel {
        title: format!("{}: probability", result.name),
        cells: cells(result, &|cell| cell.log_prob.exp()),
    });
    HeatMaps {
        title: format!(
            "{}: {}, share found and probability of a token",
            model.name().unwrap_or("model"),
            match variant {
                Variant::Single | Variant::Multi => format!("{}-key needles", variant.name()),
                _ => variant.name().to_owned(),
            }
        ),
        lengths: lengths.iter().map(usize::to_string).collect(),
        depths: depths.iter().map(|depth| format!("{:.0} %", depth * 100.0)).collect(),
        panels: found.chain(sure).collect(),
    }
}
