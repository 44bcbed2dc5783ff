//! Looking before dropping: what lazy layers drop is dropped only where this prompt, on this model, would not miss it.
//!
//! A sequence's last tokens are run once more, the layers in question over what they would keep, in the types in which
//! they would keep it. How far the logits move by that foretells how far those of the next tokens will
//! (docs/quality.md), whoever proposed the layers. Everything is then as it was before.
//!
//! The last tokens need not be those that ask for what came first: a question may follow in another turn. So pieces of
//! what would be dropped are run after them, as if the text repeated them. Whoever still finds a piece far back knows how
//! it goes on; the logits move where that is lost. Pieces are chosen that cannot be known otherwise: with tokens that are
//! rare in the text, and not among those that are kept.
//!
//! Of a sequence with recurrent layers the last tokens can be run again only from states of before them. They are kept while
//! the prompt is read ([`anchor`]); where there are none, nothing is dropped.
//!
//! Keys of fewer bits are tried in the same way ([`LazyParams::narrow_keys`]): there
//! are models, and layers, whose keys four bits ruin.
//!
//! A look goes in steps, each of which takes about as long as a piece of a prompt: one run of the probe, or as many rows
//! as are converted meanwhile. Whoever has others to answer does them one at a time ([`Session::look_step`]).
//!
//! [`LazyParams::narrow_keys`]: crate::lazy::LazyParams::narrow_keys
//! [`Session::look_step`]: super::Session::look_step

use std::mem;

use super::{
    batch::{BatchEntry, NO_TOKEN, Part},
    error::Error,
    executor::Executor,
    layer::{At, LayerCache, ScoredRows, resumable},
    looking::{Change, Looked, Looking, Ran, Stage, Trial},
    probe::{Base, PROBE_PIECE, Probe},
    score::Scored,
    search::Search,
    sequence::Sequence,
    setup::{LayerSetup, Setup},
    snapshot::Snapshot,
    step::Stretch,
};
use crate::{
    cache::{Chain, Format, Move, move_rows},
    ggml::Type,
    lazy::DEFAULT_KL,
};

/// Last tokens that are run again: few tokens' divergences are far from their mean, for it is single ones that are large.
pub(super) const N_LAST: usize = 64;

/// As many are run again where recurrent layers' states are known before them and not between.
const MOST_LAST: usize = 2 * N_LAST;

/// Of these, the last ones that the order of layers is found by, with what is repeated.
pub(super) const N_SCORED: usize = 32;

/// Fewer tell nothing.
const FEWEST_LAST: usize = 8;

/// Rows that the order of keys is found by, of each layer.
const KEY_ROWS: usize = 256;

/// Elements of keys and values that are converted in a step, of at least one layer.
const STEP_ELEMENTS: usize = 8 << 20;

/// Where among an entry's tokens recurrent layers' states are to be kept, for the look at its end: the number of tokens
/// before. `None` where there is no such look, no such layer, or a place from before serves.
pub(super) fn anchor(sequence: &Sequence, entry: &BatchEntry<'_>, setup: &Setup) -> Option<usize> {
    let (n, n_past, lazy) = (entry.tokens.len(), sequence.n_past(), &setup.params.lazy);
    let looks = setup.looks() && setup.model.hparams().is_recurrent() && setup.scores_end(entry);
    let end = n_past + n;
    if !looks || end <= lazy.n_kept() || sequence.is_early(end) {
        return None;
    }
    let n_ubatch = setup.params.n_ubatch;
    let serves = |known: &Snapshot| end - known.n_past <= MOST_LAST.min(n_ubatch);
    let cut = n.saturating_sub(N_LAST.max(lazy.n_queries).min(n_ubatch));
    (!sequence.anchor.as_ref().is_some_and(serves)).then_some(cut)
}

impl Setup {
    /// Whether prompts' ends are looked at before anything is dropped.
    pub(super) fn looks(&self) -> bool {
        self.params.lazy.policy.most_foretold().is_some() || self.params.lazy.narrow_keys
    }
}

impl Sequence {
    /// Whether a sequence of `n_past` tokens has not grown to twice its length since the last look.
    fn is_early(&self, n_past: usize) -> bool {
        self.looked.is_some_and(|looked| n_past < looked.n_past.saturating_mul(2))
    }

    /// How many of its last tokens a look can run again, if any: recurrent layers' states must be known before them.
    fn n_last(&self, setup: &Setup) -> Option<usize> {
        let n_past = self.n_past();
        let held = n_past.saturating_sub(resumable(&self.layers, |_, layer| layer.held_from));
        let most = held.min(setup.params.n_ubatch);
        let n_last = match &self.anchor {
            _ if !self.is_recurrent() => N_LAST.min(most),
            Some(anchor) => n_past - anchor.n_past,
            None => 0,
        };
        // What was given as rows of embeddings is not known any more.
        let of_text = self.tokens.iter().rev().take_while(|&&token| token != NO_TOKEN).count();
        let n_last = if self.is_recurrent() { n_last } else { n_last.min(of_text) };
        (FEWEST_LAST..=most.min(of_text)).contains(&n_last).then_some(n_last)
    }

    /// Begins to look where the policy goes by looks, or keys are to be narrow where they can be. Of a sequence that has not
    /// grown to twice its length since the last look, none; else [`Sequence::look_step`] follows.
    pub fn begin_look(&mut self, setup: &Setup) {
        self.looking = None;
        let params = &setup.params;
        if !setup.looks() {
            return;
        }
        let n_past = self.n_past();
        let is_lazy = self.layers.iter().all(|layer| !layer.is_active());
        let n_last = self.n_last(setup);
        let anchor = self.anchor.take();
        let Some(n_last) = n_last.filter(|_| !self.is_early(n_past) && !is_lazy && n_past > params.lazy.n_kept())
        else {
            return;
        };
        // The repeated pieces lie in the context for a moment.
        let n_room = params.n_ubatch.min(n_last + params.n_ctx - n_past);
        let mut probe = Probe::new(&self.tokens, n_last, n_room, &params.lazy);
        probe.states = anchor;
        let looking = Looking { probe, base: None, stage: Stage::Begin(Ran::default()), kl: 0.0, prompt_end: None };
        self.looking = Some(Box::new(looking));
    }

    /// Looks before dropping, in one piece.
    pub fn look_before_dropping(&mut self, setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        self.begin_look(setup);
        self.finish_look(setup, executor)
    }

    /// Does what is left of a look, if one is under way.
    pub fn finish_look(&mut self, setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        while self.look_step(PROBE_PIECE, setup, executor)? {}
        Ok(())
    }

    /// A step of the look that is under way, in which no more than about `n_tokens` of the probe are run; false when there is
    /// none, or it was the last one. Makes layers lazy, and keys narrow: the largest beginning of the proposed order whose look
    /// diverges by no more than is allowed. After an error the look is over.
    pub fn look_step(&mut self, n_tokens: usize, setup: &Setup, executor: &mut Executor) -> Result<bool, Error> {
        let Some(mut looking) = self.looking.take() else { return Ok(false) };
        looking.probe.piece = n_tokens.clamp(1, PROBE_PIECE);
        executor.scheduler.set_threads(setup.params.n_threads_batch)?;
        let stage = mem::replace(&mut looking.stage, Stage::Done);
        let stage = match stage {
            Stage::Begin(mut ran) => {
                self.look(&[], &mut [], &looking.probe, &mut ran, setup, executor)?;
                if ran.n < looking.probe.tokens.len() { Stage::Begin(ran) } else { Stage::Ordering(ran) }
            }
            Stage::Ordering(ran) => self.begin_trying(&mut looking, ran, setup),
            Stage::Trying(trial) => self.try_once(&looking, trial, setup, executor)?,
            Stage::Changing(change, layers) => self.change_some(change, layers, setup, executor)?,
            Stage::Measuring { next, losses } => self.measure_some(next, losses, setup, executor)?,
            Stage::Done => Stage::Done,
        };
        looking.stage = next_with_work(&mut looking.kl, stage, setup);
        if let Stage::Done = looking.stage {
            self.looked = Some(Looked { n_past: self.n_past(), kl: looking.kl });
            if let Some(logits) = &looking.prompt_end {
                self.note_prompt_end(logits, setup);
            }
            self.prune(true, setup, executor)?;
            return Ok(false);
        }
        self.looking = Some(looking);
        Ok(true)
    }

    /// Finds the order in which layers are tried, from the probe's logits as they are and layers' scores.
    fn begin_trying(&mut self, looking: &mut Looking, ran: Ran, setup: &Setup) -> Stage {
        let scores = &ran.scores;
        let params = &setup.params;
        let n_vocab = setup.model.hparams().n_vocab;
        looking.base = Some(Base::new(ran.logits, looking.probe.n_last, n_vocab, params.n_threads_batch));
        let policy = &params.lazy.policy;
        let Some(most) = policy.most_foretold() else { return Stage::Changing(Change::Lazy, Vec::new()) };
        for scored in scores {
            self.layers[scored.layer].score = Some(scored.value);
        }
        let mut order = self.proposed(setup, scores);
        let n_lazy = self.layers.iter().filter(|layer| layer.lazy).count();
        let (n_first, n_all) = (order.len().div_ceil(2), order.len() + n_lazy);
        order.truncate(((policy.most_by_looks() * n_all as f32) as usize).saturating_sub(n_lazy));
        let search = Search::new(order.len(), n_first, n_all, most);
        Stage::Trying(Trial { change: Change::Lazy, order, search, changed: Vec::new(), ran: Ran::default() })
    }

    /// One of three steps: makes the layers that are to be tried next, as many as there is time for; runs a piece of the probe with
    /// them when all are there; or compares what that gave.
    fn try_once(
        &mut self,
        looking: &Looking,
        mut trial: Trial,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<Stage, Error> {
        let (Some(n), Some(base)) = (trial.search.next(), &looking.base) else { return Ok(Stage::Trying(trial)) };
        if trial.ran.n == looking.probe.tokens.len() {
            let ran = mem::take(&mut trial.ran);
            trial.search.note(n, base.divergence(&ran.logits));
            return Ok(Stage::Trying(trial));
        }
        let (start, end) = (looking.probe.start, looking.probe.end());
        let at = At { n_past: start, exact_from: self.exact_from(start, self.n_past()) };
        let mut converted = 0;
        while trial.changed.len() < n && converted < STEP_ELEMENTS {
            let index = trial.order[trial.changed.len()];
            let (layer, scheduler) = (&setup.layers[index], &mut executor.scheduler);
            let (is_lazy, format) = trial.change.to(layer);
            let mut cache = self.layers[index].copy(at, is_lazy, format, layer, scheduler)?;
            cache.reserve(start..end, layer, scheduler)?;
            converted += cache.used_rows(start) * layer.row_elements();
            trial.changed.push(cache);
        }
        if converted == 0 {
            let (order, changed) = (&trial.order[..n], &mut trial.changed[..n]);
            self.look(order, changed, &looking.probe, &mut trial.ran, setup, executor)?;
        }
        Ok(Stage::Trying(trial))
    }

    /// Changes as many of the layers as a step has time for.
    fn change_some(
        &mut self,
        change: Change,
        mut layers: Vec<usize>,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<Stage, Error> {
        let (at, mut converted) = (self.at(), 0);
        // The old stores go only when no graph refers to them any more.
        executor.forget();
        // The mark knows nothing of the new stores, which have no rows after the last token.
        self.forget_cut_off();
        while converted < STEP_ELEMENTS
            && let Some(index) = layers.pop()
        {
            let (layer, setup) = (&mut self.layers[index], &setup.layers[index]);
            match change {
                Change::Lazy => layer.make_lazy(at, setup, &mut executor.scheduler)?,
                Change::Narrow => {
                    *layer = layer.copy(at, false, setup.plan.narrow, setup, &mut executor.scheduler)?;
                }
            }
            converted += layer.used_rows(at.n_past) * setup.row_elements();
        }
        executor.forget();
        Ok(Stage::Changing(change, layers))
    }

    /// Measures what keys lose of as many layers as a step has time for: of those that can have narrow ones.
    fn measure_some(
        &self,
        mut next: usize,
        mut losses: Vec<(f64, usize)>,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<Stage, Error> {
        let (n_past, mut converted) = (self.n_past(), 0);
        while next < self.layers.len() && converted < STEP_ELEMENTS {
            let (layer, setup) = (&self.layers[next], &setup.layers[next]);
            if let Some(narrow) = setup.plan.narrow.filter(|&narrow| layer.is_active() && layer.format != narrow) {
                losses.push((key_loss(layer, n_past, narrow, setup, executor)?, next));
                // There and back.
                converted += 3 * KEY_ROWS * setup.row_elements();
            }
            next += 1;
        }
        Ok(Stage::Measuring { next, losses })
    }

    /// The layers that may become lazy, the most promising first: in the order of a profile where one is named,
    /// else by how little the probe's hidden states change when a layer alone is lazy.
    fn proposed(&self, setup: &Setup, scores: &[Scored]) -> Vec<usize> {
        if let Some(order) = &setup.order {
            return order.iter().copied().filter(|&layer| self.layers[layer].is_active()).collect();
        }
        // Only active layers have scores.
        let mut scores: Vec<&Scored> = scores.iter().collect();
        scores.sort_by(|a, b| b.value.total_cmp(&a.value));
        scores.into_iter().map(|scored| scored.layer).collect()
    }

    /// Runs the next piece of the probe with these layers in place of those that they would come from; without any, takes
    /// layers' scores as well where they are wanted for an order. Everything is then as it was.
    fn look(
        &mut self,
        order: &[usize],
        changed: &mut [LayerCache],
        probe: &Probe,
        ran: &mut Ran,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(), Error> {
        let written = probe.start..probe.end();
        self.reserve(written.clone(), setup, executor)?;
        // Both rows of a state are written: what the sequence has is put back afterwards.
        let row = self.place.state_row;
        let now = probe.states.as_ref().map(|_| Snapshot::of(self.n_past(), &self.layers, row, &setup.meter));
        let mut exchange = |layers: &mut [LayerCache]| {
            order.iter().zip(&mut *changed).for_each(|(&index, cache)| mem::swap(&mut layers[index], cache));
        };
        exchange(&mut self.layers);
        let rows = |layer: &LayerCache| (layer.rows(written.clone()), layer.exact_rows());
        let put = |layers: &[LayerCache], all: &[(ScoredRows, Vec<u8>)]| {
            for (layer, (rows, exact)) in layers.iter().zip(all) {
                layer.put_rows(written.clone(), rows);
                layer.put_exact_rows(exact);
            }
        };
        let saved: Vec<(ScoredRows, Vec<u8>)> = self.layers.iter().map(rows).collect();
        put(&self.layers, &ran.rows);
        if let Some(states) = &probe.states {
            states.put_back(&self.layers, row);
        }
        let is_scored = order.is_empty() && setup.order.is_none() && setup.params.lazy.policy.most_foretold().is_some();
        let ended = self.run_piece(probe, is_scored, ran, setup, executor);
        // The graph refers to caches that may go.
        executor.forget();
        ran.rows = if ran.n < probe.tokens.len() { self.layers.iter().map(rows).collect() } else { Vec::new() };
        put(&self.layers, &saved);
        exchange(&mut self.layers);
        if let Some(states) = now {
            states.put_back(&self.layers, row);
        }
        // Rows that the probe's tokens have within their windows were given up for it.
        self.rescue(setup)?;
        ended
    }

    /// Runs the next piece of the probe over whatever the layers hold now.
    fn run_piece(
        &self,
        probe: &Probe,
        is_scored: bool,
        ran: &mut Ran,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(), Error> {
        let n_all = probe.tokens.len();
        // Recurrent layers' states are known before the first token alone.
        let is_cut = setup.params.look_in_steps && probe.states.is_none();
        // Each layer's attention is computed twice where layers are scored.
        let n_most = if is_scored { probe.piece.div_ceil(2) } else { probe.piece };
        let piece = ran.n..if is_cut { n_all.min(ran.n + n_most) } else { n_all };
        let n_scored = if is_scored { n_all - probe.n_last + probe.n_last.min(N_SCORED) } else { 0 };
        let n_score = piece.end.saturating_sub(piece.start.max(n_all - n_scored));
        let n_past = probe.start + piece.start;
        // The exact stores hold the newest tokens, and the probe goes back before them.
        let exact_from = self.exact_from(probe.start, self.n_past());
        let (state_row, shift) = (self.place.state_row, self.positions.shift(n_past));
        let part =
            Part { first: 0, n: piece.len(), n_past, n_score, exact_from, state_row, shift, see_each_other: false };
        let parts = [part];
        let caches: [&[LayerCache]; 1] = [&self.layers];
        let counts = (0..probe.n_last).chain(probe.repeated.iter().copied()).filter(|row| piece.contains(row));
        let rows: Vec<i32> = counts.map(|row| (row - piece.start) as i32).collect();
        let stretch = Stretch {
            layers: 0..setup.layers.len(),
            parts: &parts,
            caches: &caches,
            entering: None,
            has_embeddings: false,
            n_wanted: rows.len(),
        };
        let results = executor.take_results();
        let step = executor.step(setup, &stretch);
        let tokens = probe.tokens[piece.clone()].into();
        let scores = step.and_then(|mut ready| executor.run(&mut ready.step, &parts, tokens, &rows));
        let logits = executor.put_results(results);
        ran.add(piece.len(), &logits, (scores?, n_score));
        Ok(())
    }
}

impl Change {
    /// What a layer is made of: whether it becomes lazy, and its other format.
    fn to(self, layer: &LayerSetup) -> (bool, Option<Format>) {
        match self {
            Change::Lazy => (true, None),
            Change::Narrow => (false, layer.plan.narrow),
        }
    }
}

/// The stage itself while something is to be done in it, else the next one in which something is. `kl` becomes what was measured
/// with the layers that change.
fn next_with_work(kl: &mut f64, mut stage: Stage, setup: &Setup) -> Stage {
    loop {
        stage = match stage {
            Stage::Trying(trial) if trial.search.next().is_none() => {
                let (n, found) = trial.search.found();
                if n > 0 {
                    *kl = found;
                }
                let first = trial.order[..n].iter().rev().copied().collect();
                Stage::Changing(trial.change, first)
            }
            Stage::Changing(Change::Lazy, layers) if layers.is_empty() && setup.params.lazy.narrow_keys => {
                Stage::Measuring { next: 0, losses: Vec::new() }
            }
            Stage::Changing(_, layers) if layers.is_empty() => Stage::Done,
            Stage::Measuring { next, mut losses } if next == setup.layers.len() => {
                losses.sort_by(|a, b| a.0.total_cmp(&b.0));
                let order: Vec<usize> = losses.into_iter().map(|(_, layer)| layer).collect();
                let n = order.len();
                let most = *kl + setup.params.lazy.policy.most_foretold().unwrap_or(DEFAULT_KL);
                let search = Search::new(n, n, n, most);
                Stage::Trying(Trial { change: Change::Narrow, order, search, changed: Vec::new(), ran: Ran::default() })
            }
            stage => return stage,
        };
    }
}

/// How much of what tells a layer's keys from each other is lost in another format: the keys' mean is in every product
/// of a query, and changes no weight. Of the first rows.
fn key_loss(
    layer: &LayerCache,
    n_past: usize,
    format: Format,
    setup: &LayerSetup,
    executor: &mut Executor,
) -> Result<f64, Error> {
    let Some(store) = &layer.store else { return Ok(0.0) };
    let (n_rows, width) = (layer.used_rows(n_past).min(KEY_ROWS), setup.plan.rows.key_width());
    let mut first_rows = |from: &Chain, format: Format| {
        let to = setup.make(n_rows, None, format)?;
        let all = [Move { from: 0..n_rows, to: 0 }];
        move_rows(&mut executor.scheduler, &[(from, &all)], &to, setup.moving())?;
        Ok::<_, Error>(setup.chain(to))
    };
    let narrow = first_rows(store, format)?;
    // Both with the wider store's rotation.
    let exact = Format { k: Type::F32, v: Type::F32, ..store.format() };
    let [before, after] = [first_rows(store, exact)?, first_rows(&narrow, exact)?].map(|store| {
        let mut keys = store.single().k.to_f32();
        keys.truncate(n_rows * width);
        keys
    });
    let square = |x: f64| x * x;
    let lost: f64 = before.iter().zip(&after).map(|(a, b)| square(f64::from(a - b))).sum();
    let spread = |channel: usize| {
        let values = || before.iter().skip(channel).step_by(width).map(|&x| f64::from(x));
        let mean = values().sum::<f64>() / n_rows.max(1) as f64;
        values().map(|x| square(x - mean)).sum::<f64>()
    };
    let told: f64 = (0..width).map(spread).sum();
    Ok(if told > 0.0 { lost / told } else { f64::INFINITY })
}
