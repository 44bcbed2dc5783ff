//! Finds out which layers a model can spare: the order of a [`Profile`].
//!
//! The prompt of each excerpt is read once, uncompressed. Its cache is then copied with other layers lazy each time, and
//! a continuation is run over the copy in one batch: that is cheap. So each layer's harm is measured alone. Then, from
//! all layers lazy, the layer whose rescue helps most becomes active, again and again: what a layer does can be done by
//! another, so harms do not add up, and are measured again as the set changes. Where few layers are lazy, the harms of
//! single layers serve. Where windows of their own are asked for, each cut's layers exchange rows of their caches. At last
//! the cuts of the order are measured in real runs, in the way in which they will be used.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::{exchange::exchanges, metrics, uncompressed};
use crate::{
    engine::{BatchEntry, Error, Outputs, SeqId, Session, SessionParams},
    lazy::{CalibrationText, Cut, LayerWindows, Policy, PrefillMode, Profile, ProfiledLayer},
    model::Model,
    vocab::Token,
};

/// A text for those who bring none: a story, a table, rules, code, dialogue and questions, which refer to each other.
pub const BUILT_IN_TEXT: &str = include_str!("calibration.txt");

/// Layers that are tried before one is rescued: half of them by their harm alone, half by what their rescue was worth
/// when it was tried last.
const CANDIDATES: usize = 4;

/// Shares of lazy layers whose cost is measured in a real run.
const CUTS: [f64; 6] = [0.25, 0.4, 0.5, 0.65, 0.8, 1.0];

/// The copy of a sequence that is continued.
const COPY: SeqId = SeqId::MAX;

/// What a calibration is made on.
#[derive(Debug, Clone)]
pub struct Excerpts<'a> {
    /// The text, of which the profile keeps a hash.
    pub text: &'a [u8],
    pub excerpts: Vec<Vec<Token>>,
    /// First tokens of each excerpt, which are read as a prompt. The rest is scored.
    pub n_prompt: usize,
}

/// How far a calibration has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// What is being measured.
    pub what: &'static str,
    /// Share of the whole that is done, from 0 to 1; an estimate.
    pub share: f32,
}

/// Makes a model's profile. `params` says what lazy layers keep and in which types, and how their prompt will be read
/// (windowed if it says nothing). With `windows`, each cut's layers may have windows of these sizes in place of
/// `params.lazy.n_window`, where that takes no more memory and a real run shows less loss.
///
/// # Errors
/// [`Error::Params`] when an excerpt's prompt is not longer than sink and window, so that nothing would be dropped, or
/// when nothing is left to score; else as [`Session::prefill`]. [`Error::Interrupted`] when `watch`ed by an abort flag.
pub fn calibrate(
    model: &Model,
    params: &SessionParams,
    excerpts: &Excerpts<'_>,
    windows: &[usize],
    watch: &mut dyn FnMut(&Session),
    progress: &mut dyn FnMut(Stage),
) -> Result<Profile, Error> {
    let n_layer = model.hparams().n_layer;
    let mut run = Calibration::start(model, params, excerpts, windows, watch, progress)?;

    let mut harms = Vec::new();
    for layer in 0..n_layer {
        harms.push(run.kl(&BTreeSet::from([layer]))?);
        run.done("one layer at a time", Work::Single);
    }
    let order = run.order(&harms)?;
    let masses = run.masses.clone();
    let prefill = params.lazy.prefill.unwrap_or(PrefillMode::Window);
    let mut proposals = Vec::new();
    for lazy in cut_sizes(n_layer) {
        proposals.push(run.propose_windows(&order[..lazy], windows)?);
    }
    let mut cuts = Vec::new();
    let (base, mut meter) = run.finish();
    for (lazy, proposed) in cut_sizes(n_layer).into_iter().zip(proposals) {
        let mut measure = |windows: &[usize]| {
            let cut = measure_cut(model, params, excerpts, prefill, (&order[..lazy], windows), &base, watch)?;
            meter.done("cuts, in real runs", Work::Cut);
            Ok::<_, Error>(cut)
        };
        let cut = measure(&[])?;
        let other = if proposed.is_empty() { None } else { Some(measure(&proposed)?) };
        cuts.push(match other {
            Some(other) if other.kl_mean < cut.kl_mean => Cut { kl_mean_one_window: Some(cut.kl_mean), ..other },
            _ => cut,
        });
    }
    Ok(Profile {
        version: Profile::current_version(),
        n_sink: params.lazy.n_sink,
        n_window: params.lazy.n_window,
        prefill,
        order,
        model: model.identity()?,
        text: CalibrationText {
            sha256: Sha256::digest(excerpts.text).iter().map(|byte| format!("{byte:02x}")).collect(),
            n_prompt: excerpts.n_prompt,
            n_score: excerpts.excerpts.iter().map(|tokens| tokens.len() - excerpts.n_prompt).max().unwrap_or(0),
            excerpts: excerpts.excerpts.len(),
        },
        layers: harms
            .iter()
            .zip(masses)
            .enumerate()
            .map(|(index, (&harm_kl, mass))| ProfiledLayer { index, harm_kl, mass })
            .collect(),
        cuts,
    })
}

fn cut_sizes(n_layer: usize) -> Vec<usize> {
    let sizes = CUTS.iter().map(|share| (share * n_layer as f64).round() as usize).filter(|&n| n > 0);
    sizes.collect::<BTreeSet<_>>().into_iter().collect()
}

/// The rows of logits of the uncompressed run, with the [`metrics::log_sum_exp`] of each.
struct Base {
    rows: Vec<Vec<f32>>,
    sums: Vec<Vec<f64>>,
    n_vocab: usize,
}

impl Base {
    /// Sum over the rows of one excerpt of their divergence, and how many they are.
    fn kl(&self, excerpt: usize, rows: &[f32]) -> (f64, usize) {
        let base = self.rows[excerpt].chunks_exact(self.n_vocab).zip(&self.sums[excerpt]);
        let kls = base.zip(rows.chunks_exact(self.n_vocab)).map(|((base, &sum), row)| metrics::kl_with(base, sum, row));
        (kls.sum(), self.sums[excerpt].len())
    }
}

struct Calibration<'a> {
    session: Session,
    excerpts: &'a Excerpts<'a>,
    base: Base,
    /// Each layer's attention mass, over all excerpts.
    masses: Vec<f32>,
    meter: Meter<'a>,
}

impl<'a> Calibration<'a> {
    fn start(
        model: &Model,
        params: &SessionParams,
        excerpts: &'a Excerpts<'a>,
        windows: &[usize],
        watch: &mut dyn FnMut(&Session),
        progress: &'a mut dyn FnMut(Stage),
    ) -> Result<Calibration<'a>, Error> {
        let n_layer = model.hparams().n_layer;
        check(params, excerpts)?;
        let n_window = params.lazy.n_window;
        let mut params = uncompressed(params);
        // No mass is above 1: the layers are scored, and all stay active.
        params.lazy.policy = Policy::Threshold(Some(1.0));
        let mut session = Session::new(model, params)?;
        watch(&session);
        let mut meter = Meter::new(n_layer, excerpts, (n_window, windows), progress);
        let mut masses = vec![0.0; n_layer];
        for (seq, tokens) in (0..).zip(&excerpts.excerpts) {
            let prompt = &tokens[..excerpts.n_prompt];
            let entry = BatchEntry { seq, tokens: prompt, outputs: Outputs::None, prompt_end: true };
            session.run_with(&[entry], &mut |share| meter.part("the prompt", Work::Prompt, share))?;
            meter.done("the prompt", Work::Prompt);
            for (mass, layer) in masses.iter_mut().zip(session.layers(seq)) {
                *mass += layer.score.unwrap_or(1.0) / excerpts.excerpts.len() as f32;
            }
        }
        let n_vocab = model.hparams().n_vocab;
        let base = Base { rows: Vec::new(), sums: Vec::new(), n_vocab };
        let mut run = Calibration { session, excerpts, base, masses, meter };
        for excerpt in 0..excerpts.excerpts.len() {
            let rows = run.rows(excerpt, &BTreeSet::new())?;
            run.base.sums.push(rows.chunks_exact(n_vocab).map(metrics::log_sum_exp).collect());
            run.base.rows.push(rows);
            run.meter.done("the uncompressed run", Work::Single);
        }
        Ok(run)
    }

    /// The rows of an excerpt's continuation when these layers are lazy.
    fn rows(&mut self, excerpt: usize, lazy: &BTreeSet<usize>) -> Result<Vec<f32>, Error> {
        let seq = SeqId::try_from(excerpt).unwrap_or(COPY);
        self.session.fork(seq, COPY, lazy)?;
        let tokens = &self.excerpts.excerpts[excerpt][self.excerpts.n_prompt..];
        let entry = BatchEntry { seq: COPY, tokens, outputs: Outputs::All, prompt_end: false };
        self.session.run(&[entry])?;
        let rows = self.session.logits().to_vec();
        self.session.seq_clear(COPY);
        Ok(rows)
    }

    /// Mean divergence over all excerpts when these layers are lazy.
    fn kl(&mut self, lazy: &BTreeSet<usize>) -> Result<f64, Error> {
        let (mut sum, mut n) = (0.0, 0);
        for excerpt in 0..self.excerpts.excerpts.len() {
            let rows = self.rows(excerpt, lazy)?;
            let (kl, rows) = self.base.kl(excerpt, &rows);
            sum += kl;
            n += rows;
        }
        Ok(sum / n as f64)
    }

    fn done(&mut self, what: &'static str, work: Work) {
        self.meter.done(what, work);
    }

    /// All layers, the least harmful first.
    fn order(&mut self, harms: &[f64]) -> Result<Vec<usize>, Error> {
        let mut lazy: BTreeSet<usize> = (0..harms.len()).collect();
        let mut kl = self.kl(&lazy)?;
        self.done("growing sets", Work::Set);
        // What a layer's rescue was worth when it was tried last.
        let mut gains: Vec<Option<f64>> = vec![None; harms.len()];
        let mut rescued = Vec::new();
        while lazy.len() > harms.len() / 2 {
            let mut best: Option<(f64, usize)> = None;
            for layer in candidates(&lazy, harms, &gains) {
                lazy.remove(&layer);
                let with_it = self.kl(&lazy)?;
                lazy.insert(layer);
                self.done("growing sets", Work::Set);
                gains[layer] = Some(kl - with_it);
                if best.is_none_or(|(least, _)| with_it < least) {
                    best = Some((with_it, layer));
                }
            }
            let Some((with_it, layer)) = best else { break };
            lazy.remove(&layer);
            kl = with_it;
            rescued.push(layer);
        }
        let mut order: Vec<usize> = lazy.into_iter().collect();
        order.sort_by(|&a, &b| harms[a].total_cmp(&harms[b]));
        order.extend(rescued.iter().rev());
        Ok(order)
    }

    /// Windows for these lazy layers that seem to cost less than one for all, in the layers' order; nothing where none do.
    fn propose_windows(&mut self, layers: &[usize], sizes: &[usize]) -> Result<Vec<usize>, Error> {
        const WHAT: &str = "windows";
        let window = self.session.lazy_params().0.n_window;
        let exchanges = exchanges(layers.len(), window, sizes);
        let nearest_less = exchanges.iter().map(|exchange| exchange.smaller).max();
        let nearest_more = exchanges.iter().map(|exchange| exchange.larger).min();
        let (Some(less), Some(more)) = (nearest_less, nearest_more) else { return Ok(Vec::new()) };
        let set: BTreeSet<usize> = layers.iter().copied().collect();
        let asked = self.session.lazy_params().0.windows.clone();
        let mut loss = |windows: LayerWindows| {
            self.session.set_windows(windows.or(&asked))?;
            let kl = self.kl(&set)?;
            self.done(WHAT, Work::Set);
            Ok::<f64, Error>(kl)
        };
        let mut losses = |size: usize| {
            layers.iter().map(|&layer| loss([(layer, size)].into_iter().collect())).collect::<Result<Vec<f64>, _>>()
        };
        let (with_less, with_more) = (losses(less)?, losses(more)?);
        let mut best = (loss(LayerWindows::default())?, Vec::new());
        for exchange in exchanges {
            let windows = exchange.windows(window, &with_less, &with_more);
            let kl = loss(layers.iter().copied().zip(windows.iter().copied()).collect())?;
            if kl < best.0 {
                best = (kl, windows);
            }
        }
        self.session.set_windows(asked)?;
        Ok(best.1)
    }

    fn finish(self) -> (Base, Meter<'a>) {
        (self.base, self.meter)
    }
}

/// The lazy layers whose rescue is worth trying: those that do most harm alone, and those whose rescue was worth most
/// when it was tried. The first are tried again and again: what they are worth shows only when others are rescued.
fn candidates(lazy: &BTreeSet<usize>, harms: &[f64], gains: &[Option<f64>]) -> Vec<usize> {
    let by = |key: &dyn Fn(usize) -> f64| {
        let mut layers: Vec<usize> = lazy.iter().copied().collect();
        layers.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
        layers
    };
    let by_harm = by(&|layer| harms[layer]);
    let by_gain = by(&|layer| gains[layer].unwrap_or(f64::NEG_INFINITY));
    let tried = by_gain.into_iter().filter(|&layer| gains[layer].is_some());
    let mut chosen: Vec<usize> = by_harm.iter().copied().take(CANDIDATES / 2).collect();
    for layer in tried.take(CANDIDATES / 2).chain(by_harm) {
        if chosen.len() < CANDIDATES && !chosen.contains(&layer) {
            chosen.push(layer);
        }
    }
    chosen
}

/// A real run with these layers lazy, from the prompt on, with windows of their own if there are any.
fn measure_cut(
    model: &Model,
    params: &SessionParams,
    excerpts: &Excerpts<'_>,
    prefill: PrefillMode,
    (layers, windows): (&[usize], &[usize]),
    base: &Base,
    watch: &mut dyn FnMut(&Session),
) -> Result<Cut, Error> {
    let mut params = params.clone();
    params.lazy.policy = Policy::Layers(layers.iter().copied().collect());
    params.lazy.windows =
        layers.iter().copied().zip(windows.iter().copied()).collect::<LayerWindows>().or(&params.lazy.windows);
    params.lazy.prefill = Some(prefill);
    let mut session = Session::new(model, params)?;
    watch(&session);
    let (mut sum, mut n, mut compression) = (0.0, 0, 0.0);
    for (excerpt, tokens) in excerpts.excerpts.iter().enumerate() {
        session.clear();
        let (prompt, scored) = tokens.split_at(excerpts.n_prompt);
        session.run(&[BatchEntry { seq: 0, tokens: prompt, outputs: Outputs::None, prompt_end: true }])?;
        session.run(&[BatchEntry { seq: 0, tokens: scored, outputs: Outputs::All, prompt_end: false }])?;
        let (kl, rows) = base.kl(excerpt, session.logits());
        sum += kl;
        n += rows;
        compression += session.kv().compression / excerpts.excerpts.len() as f64;
    }
    Ok(Cut {
        lazy: layers.len(),
        kl_mean: sum / n as f64,
        compression,
        windows: windows.to_vec(),
        kl_mean_one_window: None,
    })
}

fn check(params: &SessionParams, excerpts: &Excerpts<'_>) -> Result<(), Error> {
    let n_kept = params.lazy.n_kept();
    if excerpts.excerpts.is_empty() || excerpts.excerpts.iter().any(|tokens| tokens.len() <= excerpts.n_prompt) {
        return Err(Error::Params("nothing is left of an excerpt to score: its prompt takes all of it".to_owned()));
    }
    if excerpts.n_prompt <= n_kept {
        return Err(Error::Params(format!(
            "a prompt of {} tokens: lazy layers keep {n_kept}, so they would drop nothing; give a longer text, or a \
             smaller window",
            excerpts.n_prompt
        )));
    }
    Ok(())
}

/// A piece of a calibration, and about how long it takes, in tokens computed.
#[derive(Debug, Clone, Copy)]
enum Work {
    Prompt,
    Single,
    Set,
    Cut,
}

struct Meter<'a> {
    done: f32,
    total: f32,
    n_prompt: f32,
    n_score: f32,
    progress: &'a mut dyn FnMut(Stage),
}

impl<'a> Meter<'a> {
    fn new(
        n_layer: usize,
        excerpts: &Excerpts<'_>,
        (window, windows): (usize, &[usize]),
        progress: &'a mut dyn FnMut(Stage),
    ) -> Meter<'a> {
        let n = excerpts.excerpts.len() as f32;
        let longest = excerpts.excerpts.iter().map(Vec::len).max().unwrap_or(0);
        let (n_prompt, n_score) = (excerpts.n_prompt as f32, longest.saturating_sub(excerpts.n_prompt) as f32);
        let mut meter = Meter { done: 0.0, total: 0.0, n_prompt, n_score, progress };
        let mut sets = 1 + CANDIDATES * n_layer.div_ceil(2);
        let mut cuts = cut_sizes(n_layer).len();
        for lazy in cut_sizes(n_layer) {
            let tried = exchanges(lazy, window, windows).len();
            if tried > 0 {
                sets += 2 * lazy + 1 + tried;
                cuts += 1;
            }
        }
        meter.total = n * meter.cost(Work::Prompt)
            + (n + n_layer as f32) * meter.cost(Work::Single)
            + sets as f32 * meter.cost(Work::Set)
            + cuts as f32 * meter.cost(Work::Cut);
        meter
    }

    fn cost(&self, work: Work) -> f32 {
        match work {
            Work::Prompt => self.n_prompt,
            // The continuation sees the whole prompt, on average twice of what the prompt's own tokens see.
            Work::Single => 1.5 * self.n_score,
            Work::Set => self.n_score,
            Work::Cut => 0.7 * self.n_prompt + self.n_score,
        }
    }

    fn part(&mut self, what: &'static str, work: Work, share: f32) {
        let done = self.done + share * self.cost(work);
        (self.progress)(Stage { what, share: (done / self.total).min(1.0) });
    }

    fn done(&mut self, what: &'static str, work: Work) {
        self.done += self.cost(work);
        self.part(what, work, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_harmful_ones_and_good_ones() {
        let all: BTreeSet<usize> = (0..6).collect();
        let harms = [0.1, 0.6, 0.2, 0.5, 0.3, 0.4];
        assert_eq!(candidates(&all, &harms, &[None; 6]), [1, 3, 5, 4]);
        let gains = [Some(0.3), Some(0.1), Some(0.2), None, None, None];
        assert_eq!(candidates(&all, &harms, &gains), [1, 3, 0, 2]);
        let gains = [None, Some(0.3), None, Some(0.1), None, None];
        assert_eq!(candidates(&all, &harms, &gains), [1, 3, 5, 4]);
        assert_eq!(candidates(&[0, 2].into(), &harms, &gains), [2, 0]);
    }

    #[test]
    fn cuts_of_any_model() {
        assert_eq!(cut_sizes(30), [8, 12, 15, 20, 24, 30]);
        assert_eq!(cut_sizes(1), [1]);
        assert_eq!(cut_sizes(2), [1, 2]);
    }
}
