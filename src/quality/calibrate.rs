//! Finds out which layers a model can spare: the order of a [`Profile`].
//!
//! The prompt of each excerpt is read once, uncompressed. Its cache is then copied with other layers lazy each time, and
//! a continuation is run over the copy in one batch: that is cheap. Harm is what happens to a text's next tokens, by
//! divergence, and to answers about notes far back in the prompt, by their likelihood: texts seldom need what is far back,
//! and a layer that fetches it does its harm there. So each layer's harm is measured alone. Then, from
//! all layers lazy, the layer whose rescue helps most becomes active, again and again: what a layer does can be done by
//! another, so harms do not add up, and are measured again as the set changes. Where few layers are lazy, the harms of
//! single layers serve. Where windows of their own are asked for, each cut's layers exchange rows of their caches. At last
//! the cuts of the order are measured in real runs on the first excerpt, in the way in which they will be used.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Excerpt, Excerpts,
    exchange::exchanges,
    harm::{Base, Sum, check, real_run},
    journal::{Found, Journal, Trial},
    meter::{Estimate, Meter, Stage, Step, Steps},
    uncompressed,
};
use crate::{
    engine::{BatchEntry, Error, Outputs, SeqId, Session, SessionParams},
    lazy::{CalibrationText, Cut, LayerWindows, LazyParams, Policy, PrefillMode, Profile, ProfiledLayer},
    model::Model,
};

/// Layers that are tried before one is rescued: half of them by their harm alone, half by what their rescue was worth
/// when it was tried last.
const CANDIDATES: usize = 4;

/// Shares of lazy layers whose cost is measured in a real run.
const CUTS: [f64; 4] = [0.25, MIDDLE_CUT, 0.75, 1.0];
const MIDDLE_CUT: f64 = 0.5;

/// How many times the harm of the middle cut a windowed prefill may do, in place of a full one.
const WINDOWED_HARM: f64 = 1.5;

const CUTS_STAGE: &str = "cuts, in real runs";

/// The copy of a sequence that is continued.
const COPY: SeqId = SeqId::MAX;

/// Makes a model's profile. `params` says what lazy layers keep and in which types, and how their prompt will be read; if it
/// says nothing, windowed, unless that costs more than half as much again as full attention with half of the layers lazy.
/// With `windows`, each cut's layers may have windows of these sizes in place of `params.lazy.n_window`, where that takes no
/// more memory and a real run shows less loss.
///
/// # Errors
/// [`Error::Params`] when an excerpt's prompt is not longer than sink and window, so that nothing would be dropped, or
/// when nothing is left to score; else as [`Session::prefill`]. [`Error::Interrupted`] when `params.abort` is set.
pub fn calibrate(
    model: &Model,
    params: &SessionParams,
    excerpts: &Excerpts,
    windows: &[usize],
    progress: &mut dyn FnMut(Stage),
) -> Result<Profile, Error> {
    calibrate_on(model, params, excerpts, windows, &mut Journal::none(), progress)
}

/// As [`calibrate`], without measuring anew what the journal holds, and noting there what is measured.
///
/// # Errors
/// As [`calibrate`]; [`Error::Profile`] when the journal's file cannot be written.
pub fn calibrate_on(
    model: &Model,
    params: &SessionParams,
    excerpts: &Excerpts,
    windows: &[usize],
    journal: &mut Journal,
    progress: &mut dyn FnMut(Stage),
) -> Result<Profile, Error> {
    let n_candidates = model.hparams().n_scorable();
    let mut run = Calibration::start(model, params, excerpts, windows, journal, progress)?;

    let harms = run.harms()?;
    let order = run.order(&harms)?;
    let masses = run.masses.clone();
    let mut proposals = Vec::new();
    for lazy in cut_sizes(n_candidates) {
        proposals.push(run.propose_windows(&order[..lazy], windows)?);
    }
    let mut cuts = Vec::new();
    let Calibration { base, mut meter, journal, .. } = run;
    let first = excerpts.excerpts.iter().zip(&base).next().ok_or(Error::Empty)?;
    let mut run = |lazy: usize, windows: &[usize], prefill: PrefillMode| {
        let layers = &order[..lazy];
        let own: LayerWindows = layers.iter().copied().zip(windows.iter().copied()).collect();
        let trial = Trial { lazy: layers.to_vec(), windows: own.to_string(), cut: Some(prefill) };
        if let Some(found) = journal.find(&trial) {
            return Ok(found);
        }
        meter.begin();
        let found = measure_cut(model, params, first, prefill, (layers, &own), &mut meter)?;
        journal.note(trial, found)?;
        meter.done(CUTS_STAGE, Step::Cut);
        Ok::<_, Error>(found)
    };
    let prefill = match params.lazy.prefill {
        Some(prefill) => prefill,
        None => {
            let half = cut_size(MIDDLE_CUT, n_candidates);
            let full = run(half, &[], PrefillMode::Full)?;
            let windowed = run(half, &[], PrefillMode::Window)?;
            if windowed.kl > WINDOWED_HARM * full.kl { PrefillMode::Full } else { PrefillMode::Window }
        }
    };
    for (lazy, proposed) in cut_sizes(n_candidates).into_iter().zip(proposals) {
        let mut measure = |windows: &[usize]| {
            let found = run(lazy, windows, prefill)?;
            Ok::<_, Error>(Cut {
                lazy,
                kl_mean: found.kl,
                nll_mean: found.nll,
                compression: found.compression.unwrap_or(1.0),
                windows: windows.to_vec(),
                kl_mean_one_window: None,
            })
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
        model: model.identity().clone(),
        text: CalibrationText {
            sha256: excerpts.sha256(),
            n_prompt: excerpts.n_prompt,
            n_score: excerpts.excerpts.iter().map(|excerpt| excerpt.n_text).max().unwrap_or(0),
            excerpts: excerpts.excerpts.len(),
            n_answer: excerpts.n_answer(),
        },
        layers: harms
            .iter()
            .map(|(&index, harm)| ProfiledLayer { index, harm_kl: harm.kl, harm_nll: harm.nll, mass: masses[index] })
            .collect(),
        cuts,
        settings: Vec::new(),
    })
}

fn cut_sizes(n_candidates: usize) -> Vec<usize> {
    CUTS.iter().map(|&share| cut_size(share, n_candidates)).collect::<BTreeSet<_>>().into_iter().collect()
}

fn cut_size(share: f64, n_candidates: usize) -> usize {
    ((share * n_candidates as f64).round() as usize).max(1)
}

/// The harm with all layers lazy, by which other harms are measured.
#[derive(Debug, Clone, Copy)]
struct Scale(Found);

impl Scale {
    /// The harm to texts and the harm to answers, each as a share of what it is with all layers lazy. Answers count where
    /// they are any worse then: a model that knows none of them has nothing to lose.
    fn of(&self, found: Found) -> f64 {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let nll = found.nll.zip(self.0.nll).map_or(0.0, |(part, whole)| share(part, whole));
        share(found.kl, self.0.kl) + nll
    }
}

struct Calibration<'a> {
    session: Session,
    excerpts: &'a Excerpts,
    /// Of each excerpt.
    base: Vec<Base>,
    /// The layers that can become lazy.
    candidates: Vec<usize>,
    /// Each layer's attention mass, over all excerpts.
    masses: Vec<f32>,
    meter: Meter<'a>,
    journal: &'a mut Journal,
}

impl<'a> Calibration<'a> {
    fn start(
        model: &Model,
        params: &SessionParams,
        excerpts: &'a Excerpts,
        windows: &[usize],
        journal: &'a mut Journal,
        progress: &'a mut dyn FnMut(Stage),
    ) -> Result<Calibration<'a>, Error> {
        let hparams = model.hparams();
        let candidates: Vec<usize> = (0..hparams.n_layer).filter(|&layer| hparams.can_be_lazy(layer)).collect();
        let n_candidates = candidates.len();
        check(params, excerpts)?;
        if candidates.is_empty() {
            return Err(Error::Params("no layer of this model can become lazy".to_owned()));
        }
        let LazyParams { n_window, prefill, .. } = params.lazy;
        let mut params = uncompressed(params);
        // No mass is above 1: the layers are scored, and all stay active.
        params.lazy.policy = Policy::Threshold(Some(1.0));
        let mut session = Session::new(model, params)?;
        let n_excerpts = excerpts.excerpts.len();
        let longest = excerpts.excerpts.iter().map(|excerpt| excerpt.rest.len()).max().unwrap_or(0);
        let mut steps = planned(n_candidates, n_excerpts, n_window, windows);
        if prefill.is_none() {
            // The middle cut in the other way, too.
            steps.add(Step::Cut, 1);
        }
        for trial in journal.trials() {
            steps.remove(if trial.cut.is_some() { Step::Cut } else { set(trial.lazy.len(), n_candidates) });
        }
        let estimate = Estimate::new(steps, n_excerpts, excerpts.n_prompt, longest);
        let mut meter = Meter::new(estimate, progress);
        let mut masses = vec![0.0; hparams.n_layer];
        for (seq, excerpt) in (0..).zip(&excerpts.excerpts) {
            let entry = BatchEntry { seq, tokens: &excerpt.prompt, outputs: Outputs::None, prompt_end: true };
            session.run_with(&[entry], &mut |share| meter.part("the prompt", Step::Prompt, share))?;
            meter.done("the prompt", Step::Prompt);
            for (mass, layer) in masses.iter_mut().zip(session.layers(seq)) {
                *mass += layer.score.unwrap_or(1.0) / n_excerpts as f32;
            }
        }
        let mut run = Calibration { session, excerpts, base: Vec::new(), candidates, masses, meter, journal };
        for (index, excerpt) in excerpts.excerpts.iter().enumerate() {
            run.continue_copy(index, &BTreeSet::new())?;
            run.base.push(Base::new(excerpt, run.session.logits()));
            run.session.seq_clear(COPY);
            run.meter.done("the uncompressed run", Step::Base);
        }
        Ok(run)
    }

    /// Runs an excerpt's rest over a copy of its prompt's cache in which these layers are lazy. The rows are the session's.
    fn continue_copy(&mut self, excerpt: usize, lazy: &BTreeSet<usize>) -> Result<(), Error> {
        let seq = SeqId::try_from(excerpt).unwrap_or(COPY);
        self.session.fork(seq, COPY, lazy)?;
        let tokens = &self.excerpts.excerpts[excerpt].rest;
        self.session.run(&[BatchEntry { seq: COPY, tokens, outputs: Outputs::All, prompt_end: false }])
    }

    /// The harm when these layers are lazy, and some have windows of their own.
    fn harm(&mut self, what: &'static str, lazy: &BTreeSet<usize>, windows: &LayerWindows) -> Result<Found, Error> {
        let trial = Trial { lazy: lazy.iter().copied().collect(), windows: windows.to_string(), cut: None };
        if let Some(found) = self.journal.find(&trial) {
            return Ok(found);
        }
        self.meter.begin();
        let asked = self.session.lazy_params().windows.clone();
        if !windows.is_empty() {
            self.session.set_windows(windows.or(&asked))?;
        }
        let mut sum = Sum::default();
        for (index, excerpt) in self.excerpts.excerpts.iter().enumerate() {
            self.continue_copy(index, lazy)?;
            self.base[index].compare(excerpt, self.session.logits(), &mut sum);
            self.session.seq_clear(COPY);
        }
        if !windows.is_empty() {
            self.session.set_windows(asked)?;
        }
        let found = sum.found(None);
        self.journal.note(trial, found)?;
        self.meter.done(what, set(lazy.len(), self.candidates.len()));
        Ok(found)
    }

    /// Each layer's harm when it alone is lazy.
    fn harms(&mut self) -> Result<BTreeMap<usize, Found>, Error> {
        let alone = |layer| BTreeSet::from([layer]);
        let candidates = self.candidates.clone();
        let harm =
            |layer| self.harm("one layer at a time", &alone(layer), &LayerWindows::default()).map(|harm| (layer, harm));
        candidates.into_iter().map(harm).collect()
    }

    fn scale(&mut self) -> Result<Scale, Error> {
        let all = self.candidates.iter().copied().collect();
        self.harm("all layers", &all, &LayerWindows::default()).map(Scale)
    }

    /// All layers that can become lazy, the least harmful first.
    fn order(&mut self, found: &BTreeMap<usize, Found>) -> Result<Vec<usize>, Error> {
        let scale = self.scale()?;
        let mut harms = vec![0.0; self.masses.len()];
        found.iter().for_each(|(&layer, &harm)| harms[layer] = scale.of(harm));
        let mut lazy: BTreeSet<usize> = self.candidates.iter().copied().collect();
        let mut harm = scale.of(scale.0);
        // What a layer's rescue was worth when it was tried last.
        let mut gains: Vec<Option<f64>> = vec![None; harms.len()];
        let mut rescued = Vec::new();
        while lazy.len() > self.candidates.len() / 2 {
            let mut best: Option<(f64, usize)> = None;
            for layer in candidates(&lazy, &harms, &gains) {
                lazy.remove(&layer);
                let with_it = scale.of(self.harm("growing sets", &lazy, &LayerWindows::default())?);
                lazy.insert(layer);
                gains[layer] = Some(harm - with_it);
                if best.is_none_or(|(least, _)| with_it < least) {
                    best = Some((with_it, layer));
                }
            }
            let Some((with_it, layer)) = best else { break };
            lazy.remove(&layer);
            harm = with_it;
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
        let window = self.session.lazy_params().n_window;
        let exchanges = exchanges(layers.len(), window, sizes);
        let nearest_less = exchanges.iter().map(|exchange| exchange.smaller).max();
        let nearest_more = exchanges.iter().map(|exchange| exchange.larger).min();
        let (Some(less), Some(more)) = (nearest_less, nearest_more) else { return Ok(Vec::new()) };
        let scale = self.scale()?;
        let set: BTreeSet<usize> = layers.iter().copied().collect();
        let mut loss = |windows: LayerWindows| self.harm(WHAT, &set, &windows).map(|found| scale.of(found));
        let mut losses = |size: usize| {
            layers.iter().map(|&layer| loss([(layer, size)].into_iter().collect())).collect::<Result<Vec<f64>, _>>()
        };
        let (with_less, with_more) = (losses(less)?, losses(more)?);
        let mut best = (loss(LayerWindows::default())?, Vec::new());
        for exchange in exchanges {
            let windows = exchange.windows(window, &with_less, &with_more);
            let harm = loss(layers.iter().copied().zip(windows.iter().copied()).collect())?;
            if harm < best.0 {
                best = (harm, windows);
            }
        }
        Ok(best.1)
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

/// A real run with these layers lazy, from an excerpt's prompt on, with windows of their own if there are any.
fn measure_cut(
    model: &Model,
    params: &SessionParams,
    (excerpt, base): (&Excerpt, &Base),
    prefill: PrefillMode,
    (layers, windows): (&[usize], &LayerWindows),
    meter: &mut Meter<'_>,
) -> Result<Found, Error> {
    let mut params = params.clone();
    params.lazy.policy = Policy::Layers(layers.iter().copied().collect());
    params.lazy.windows = windows.or(&params.lazy.windows);
    params.lazy.prefill = Some(prefill);
    let session = real_run(model, params, excerpt, &mut |share| meter.part(CUTS_STAGE, Step::Cut, 0.9 * share))?;
    let mut sum = Sum::default();
    base.compare(excerpt, session.logits(), &mut sum);
    Ok(sum.found(Some(session.kv().compression)))
}

/// The steps of a calibration, as many as it may take; the windows that a cut's layers are tried with are the most.
fn planned(n_candidates: usize, n_excerpts: usize, window: usize, windows: &[usize]) -> Steps {
    let mut steps = Steps::default();
    steps.add(Step::Prompt, n_excerpts);
    steps.add(Step::Base, n_excerpts);
    steps.add(set(1, n_candidates), n_candidates);
    steps.add(set(n_candidates, n_candidates), 1);
    for n_lazy in n_candidates / 2..n_candidates {
        steps.add(set(n_lazy, n_candidates), CANDIDATES.min(n_lazy + 1));
    }
    for lazy in cut_sizes(n_candidates) {
        steps.add(Step::Cut, 1);
        let tried = exchanges(lazy, window, windows).len();
        if tried > 0 {
            steps.add(set(lazy, n_candidates), 2 * lazy + 1 + tried);
            steps.add(Step::Cut, 1);
        }
    }
    steps
}

fn set(n_lazy: usize, n_candidates: usize) -> Step {
    Step::Set { active: 1.0 - n_lazy as f64 / n_candidates as f64 }
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
        assert_eq!(cut_sizes(30), [8, 15, 23, 30]);
        assert_eq!(cut_sizes(1), [1]);
        assert_eq!(cut_sizes(2), [1, 2]);
    }
}
