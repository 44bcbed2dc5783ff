//! Needles in made-up text: is a number found again after thousands of tokens, and how sure is the model?
//!
//! A text is read once. Then each of its numbers is asked for on a copy of the cache, so that one text serves many
//! trials. A trial is scored by the probability of the answer's tokens, and by whether greedy decoding would give it.

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
    lazy::{LayerWindows, LazyParams, Measure, Policy},
    quality::{self, metrics},
};
use text::{Haystack, Needle, Random};

use crate::{
    args::{PasskeyArgs, Variant},
    failure::Failure,
    interrupt,
    options::Run,
    plot::{self, HeatMaps, Panel},
    progress::Progress,
};

/// Needles of one depth in one text, in the multi-key variant.
const PER_DEPTH: usize = 4;
/// Where a contender's text lies, and the copy that a question is asked on.
const TEXT: SeqId = 1;
const QUESTION: SeqId = 2;

/// A way to keep the text.
#[derive(Debug, Clone)]
struct Contender {
    name: &'static str,
    policy: Policy,
    windows: LayerWindows,
    /// Types of the active layers, when they are not the run's own.
    types: Option<(Type, Type)>,
}

#[derive(Debug, Clone, Default, Serialize)]
struct Cell {
    length: usize,
    depth: f64,
    /// Trials in which greedy decoding gives the number.
    correct: usize,
    trials: usize,
    /// Mean log-probability of an answer's token, over all trials.
    log_prob: f64,
}

impl Cell {
    fn accuracy(&self) -> f64 {
        self.correct as f64 / self.trials.max(1) as f64
    }
}

#[derive(Debug, Serialize)]
struct Outcome {
    name: &'static str,
    lazy: String,
    accuracy: f64,
    log_prob: f64,
    /// Bytes of the cache behind the longest text.
    kv_bytes: usize,
    cells: Vec<Cell>,
}

pub fn run(args: PasskeyArgs) -> Result<(), Failure> {
    if let Some(path) = &args.plot {
        plot::check_name(path)?;
    }
    let run = Run::settle(args.common)?;
    let depths = depths(&args.depths)?;
    let (model, _) = run.load()?;
    // A profile's layers and windows, not its name: the file is read once.
    let settled = Session::new(&model, run.session.clone())?.lazy_params().clone();
    let contenders = contenders(&args.compare, &settled, &model);
    let (per_depth, together) = match args.variant {
        Variant::Multi => (PER_DEPTH.min(args.trials), depths.len()),
        Variant::Single => (1, 1),
    };
    let texts = args.trials.div_ceil(per_depth);
    let mut results: Vec<Outcome> = contenders
        .iter()
        .map(|contender| Outcome {
            name: contender.name,
            lazy: contender.policy.to_string(),
            accuracy: 0.0,
            log_prob: 0.0,
            kv_bytes: 0,
            cells: Vec::new(),
        })
        .collect();

    let progress = Progress::new("needles");
    let total: usize = args.lengths.iter().sum();
    let mut done = 0;
    for &length in &args.lengths {
        let mut cells: Vec<Vec<Cell>> =
            vec![
                depths.iter().map(|&depth| Cell { length, depth: depth * 100.0, ..Cell::default() }).collect();
                contenders.len()
            ];
        for group in depths.chunks(together) {
            let first = depths.iter().position(|depth| depth == &group[0]).unwrap_or(0);
            for text in 0..texts {
                // Each text has a seed of its own, so that one length's trials do not depend on the others.
                let seed = args.seed ^ ((length as u64) << 40) ^ ((text as u64) << 20) ^ first as u64;
                let asked = per_depth.min(args.trials - text * per_depth);
                let haystack = text::haystack(model.vocab(), &mut Random::new(seed), length, group, per_depth)
                    .map_err(Failure::run)?;
                ask_all(&run.session, &model, &contenders, &haystack, asked, &mut |contender, needle, trial| {
                    let cell = &mut cells[contender][first + needle.depth];
                    cell.trials += 1;
                    cell.correct += usize::from(trial.found);
                    cell.log_prob += trial.log_prob;
                    results[contender].kv_bytes = results[contender].kv_bytes.max(trial.kv_bytes);
                })?;
                let share = (text + 1) as f32 / texts as f32 * group.len() as f32 / depths.len() as f32
                    + first as f32 / depths.len() as f32;
                progress.set((done as f32 + length as f32 * share) / total as f32);
            }
        }
        done += length;
        for (result, mut cells) in results.iter_mut().zip(cells) {
            for cell in &mut cells {
                cell.log_prob /= cell.trials.max(1) as f64;
            }
            result.cells.extend(cells);
        }
    }
    drop(progress);
    for result in &mut results {
        let n = result.cells.len().max(1) as f64;
        result.accuracy = result.cells.iter().map(Cell::accuracy).sum::<f64>() / n;
        result.log_prob = result.cells.iter().map(|cell| cell.log_prob).sum::<f64>() / n;
    }

    let mut out = interrupt::stdout();
    if args.output.json {
        // The run's own setting is the one that was asked for; the others are beside it.
        let own = results.iter().find(|result| result.name == LAZY).unwrap_or(&results[0]);
        let object = json!({
            "cells": own.cells,
            "accuracy": own.accuracy,
            "log_prob": own.log_prob,
            "variant": args.variant.name(),
            "seed": args.seed,
            "runs": results,
            "model": model.name(),
        });
        serde_json::to_writer(&mut out, &object)?;
        writeln!(out)?;
    } else {
        print(&mut out, &results, &args.lengths, &depths)?;
    }
    out.flush()?;
    if let Some(path) = &args.plot {
        plot::write(path, &picture(&model, &results, &args.lengths, &depths, args.variant))?;
    }
    Ok(())
}

/// The name of the run's own setting.
const LAZY: &str = "lazy";

fn contenders(compare: &bool, lazy: &LazyParams, model: &Model) -> Vec<Contender> {
    let own = Contender { name: LAZY, policy: lazy.policy.clone(), windows: lazy.windows.clone(), types: None };
    if !compare {
        return vec![own];
    }
    // Layers that are sliding-window by design cannot be lazy.
    let all = model.hparams().windows.iter().enumerate().filter(|(_, window)| window.is_none());
    let all = Policy::Layers(all.map(|(layer, _)| layer).collect());
    let other = |name, policy, types| Contender { name, policy, windows: LayerWindows::default(), types };
    vec![
        other("full", Policy::Off, Some((Type::F16, Type::F16))),
        own,
        other("StreamingLLM", all, None),
        other("all q4_0", Policy::Off, Some((Type::Q4_0, Type::Q4_0))),
    ]
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
    kv_bytes: usize,
}

/// Reads a text for each contender and asks for the first `asked` numbers of each depth.
fn ask_all(
    params: &SessionParams,
    model: &Model,
    contenders: &[Contender],
    haystack: &Haystack,
    asked: usize,
    count: &mut dyn FnMut(usize, &Needle, Trial),
) -> Result<(), Failure> {
    // Read once, uncompressed and scored; contenders that read with full attention are made from it.
    let mut base_params = quality::uncompressed(params);
    base_params.lazy.policy = Policy::Threshold(Some(1.0));
    let mut base = Session::new(model, base_params)?;
    interrupt::watch();
    base.prefill(&haystack.tokens)?;
    for (index, contender) in contenders.iter().enumerate() {
        let mut own_params = params.clone();
        own_params.lazy.policy = contender.policy.clone();
        own_params.lazy.windows = contender.windows.clone();
        let mut own = Session::new(model, own_params)?;
        let types = contender.types.unwrap_or((params.type_k, params.type_v));
        let session = if own.reads_windowed() {
            own.prefill(&haystack.tokens)?;
            own.fork(0, TEXT, &BTreeSet::new())?;
            &mut own
        } else {
            let lazy = match contender.policy.measure() {
                Measure::Mass => own.choose(&base.layers(0)),
                Measure::Output => own.choose(&quality::output_scores(model, params, &haystack.tokens)?),
            };
            base.set_windows(contender.windows.clone())?;
            base.fork_with(0, TEXT, &lazy, Some(types))?;
            &mut base
        };
        let kv_bytes = session.layers(TEXT).iter().map(|layer| layer.kv_bytes).sum();
        let mut asked_at = vec![0; haystack.needles.len()];
        for needle in &haystack.needles {
            if asked_at[needle.depth] == asked {
                continue;
            }
            asked_at[needle.depth] += 1;
            let (found, log_prob) = ask(session, model, needle)?;
            count(index, needle, Trial { found, log_prob, kv_bytes });
        }
        session.seq_clear(TEXT);
    }
    Ok(())
}

/// Whether greedy decoding gives the needle's number, and the mean log-probability of its tokens.
fn ask(session: &mut Session, model: &Model, needle: &Needle) -> Result<(bool, f64), Failure> {
    let (question, answer) = needle.question(model.vocab())?;
    session.fork(TEXT, QUESTION, &BTreeSet::new())?;
    let n_vocab = model.hparams().n_vocab;
    let mut run = |tokens: &[i32], outputs| {
        session.run(&[BatchEntry { seq: QUESTION, tokens, outputs, prompt_end: false }])?;
        Ok::<_, simlayer::Error>(session.logits().to_vec())
    };
    let mut rows = run(&question, Outputs::Last)?;
    if let Some((_, fed)) = answer.split_last().filter(|(_, fed)| !fed.is_empty()) {
        rows.extend(run(fed, Outputs::All)?);
    }
    session.seq_clear(QUESTION);
    let mut found = true;
    let mut sum = 0.0;
    for (row, &token) in rows.chunks_exact(n_vocab).zip(&answer) {
        found &= metrics::top(row) == token;
        sum -= metrics::nll(row, token);
    }
    Ok((found, sum / answer.len().max(1) as f64))
}

fn print(out: &mut impl Write, results: &[Outcome], lengths: &[usize], depths: &[f64]) -> io::Result<()> {
    for result in results {
        writeln!(
            out,
            "{}: {:.1} % found, mean token probability {:.3}, KV cache up to {} bytes",
            result.name,
            result.accuracy * 100.0,
            result.log_prob.exp(),
            result.kv_bytes
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
            "{}: {}-key needles, share found and probability of a token",
            model.name().unwrap_or("model"),
            variant.name()
        ),
        lengths: lengths.iter().map(usize::to_string).collect(),
        depths: depths.iter().map(|depth| format!("{:.0} %", depth * 100.0)).collect(),
        panels: found.chain(sure).collect(),
    }
}
