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

use std::{
    collections::{HashMap, HashSet},
    mem,
    ops::Range,
    thread,
};

use super::{
    batch::{BatchEntry, NO_TOKEN, Part},
    error::Error,
    executor::Executor,
    layer::{At, LayerCache, resumable},
    score::Scored,
    sequence::{Looked, Sequence},
    setup::{LayerSetup, Setup},
    snapshot::Snapshot,
    step::Stretch,
};
use crate::{
    cache::{Chain, Format, Move, move_rows},
    ggml::Type,
    lazy::{DEFAULT_KL, LazyParams},
    quality::metrics::{kl_with, log_sum_exp},
    vocab::Token,
};

/// Last tokens that are run again: few tokens' divergences are far from their mean, for it is single ones that are large.
const N_LAST: usize = 64;

/// As many are run again where recurrent layers' states are known before them and not between.
const MOST_LAST: usize = 2 * N_LAST;

/// Of these, the last ones that the order of layers is found by, with what is repeated.
const N_SCORED: usize = 32;

/// Fewer tell nothing.
const FEWEST_LAST: usize = 8;

/// Pieces that are repeated: one from each of so many equal parts of what would be dropped.
const N_PIECES: usize = 2;

/// Tokens of a piece, and the first ones of them that do not count: what follows them is not known from what is repeated.
const PIECE: usize = 16;
const UNCOUNTED: usize = 4;

/// How much more repeated pieces may diverge than the last tokens.
const REPEATED_MORE: f64 = 5.0;

/// Sets that are tried, besides the run that they are compared with.
const MOST_SETS: usize = 4;

/// By how much the logarithm of the divergence is taken to grow from no layer to all: where to look next. On
/// SmolLM2-135M and Qwen2.5-Coder-0.5B it grows by 3.6 and 5.3.
const GROWTH: f64 = 4.5;

/// After a set that cannot go, at least this part of it is left out, of the layers that are not known to be able to.
const STEP_DOWN: usize = 4;

/// Rows that the order of keys is found by, of each layer.
const KEY_ROWS: usize = 256;

/// What is run over other caches.
#[derive(Debug)]
struct Probe {
    /// Position of the first token.
    start: usize,
    tokens: Vec<Token>,
    /// How many of them, the first ones, are the sequence's own last ones: all of these count.
    n_last: usize,
    /// Which of the others count.
    repeated: Vec<usize>,
    /// Recurrent layers' states before the first token.
    states: Option<Snapshot>,
}

impl Probe {
    /// The last `n_last` of these tokens, and what is repeated after them.
    fn new(tokens: &[Token], n_last: usize, n_room: usize, lazy: &LazyParams) -> Probe {
        let start = tokens.len() - n_last;
        let mut probe = Probe { start, tokens: tokens[start..].to_vec(), n_last, repeated: Vec::new(), states: None };
        for piece in telling_pieces(tokens, lazy) {
            if probe.tokens.len() + piece.len() <= n_room {
                let first = probe.tokens.len();
                probe.tokens.extend_from_slice(&tokens[piece]);
                probe.repeated.extend(first + UNCOUNTED..first + PIECE - 1);
            }
        }
        probe
    }

    fn end(&self) -> usize {
        self.start + self.tokens.len()
    }
}

/// Of each part of what would be dropped, the piece that is told least by what is kept.
fn telling_pieces(tokens: &[Token], lazy: &LazyParams) -> Vec<Range<usize>> {
    let mut count: HashMap<Token, usize> = HashMap::new();
    tokens.iter().for_each(|&token| *count.entry(token).or_default() += 1);
    let dropped = lazy.n_sink..tokens.len().saturating_sub(lazy.n_window).max(lazy.n_sink);
    let kept: HashSet<Token> = tokens[..dropped.start].iter().chain(&tokens[dropped.end..]).copied().collect();
    let rarity = |token: &Token| if kept.contains(token) { 0.0 } else { 1.0 / count[token] as f64 };
    let is_text = |from: &usize| !tokens[*from..from + PIECE].contains(&NO_TOKEN);
    let told = |from: usize| tokens[from + UNCOUNTED..from + PIECE].iter().map(rarity).sum::<f64>();
    let part = dropped.len() / N_PIECES;
    let parts = (0..N_PIECES).map(|index| dropped.start + index * part..dropped.start + (index + 1) * part);
    let best = |part: Range<usize>| {
        let mut best: Option<(f64, usize)> = None;
        for from in (part.start..(part.end + 1).saturating_sub(PIECE)).filter(is_text) {
            let told = told(from);
            if best.is_none_or(|(most, _)| told > most) {
                best = Some((told, from));
            }
        }
        best.map(|(_, from)| from..from + PIECE)
    };
    parts.filter_map(best).collect()
}

/// What is tried on layers.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// They become lazy.
    Lazy,
    /// Their keys become narrow.
    Narrow,
}

/// The probe's logits as they are, and how far others are from them.
struct Base<'a> {
    probe: &'a Probe,
    n_vocab: usize,
    n_threads: usize,
    rows: Vec<f32>,
    /// The [`log_sum_exp`] of each row.
    sums: Vec<f64>,
}

impl Base<'_> {
    /// Mean divergence on the last tokens, or on the repeated ones, of which more is bearable: the larger.
    fn divergence(&self, rows: &[f32]) -> f64 {
        let n_each = self.sums.len().div_ceil(self.n_threads.max(1));
        let kls = |(index, rows): (usize, &[f32])| {
            let kl = |(at, row): (usize, &[f32])| {
                kl_with(&self.rows[at * self.n_vocab..(at + 1) * self.n_vocab], self.sums[at], row)
            };
            (index * n_each..).zip(rows.chunks_exact(self.n_vocab)).map(kl).collect()
        };
        let parts = rows.chunks(n_each * self.n_vocab).enumerate();
        let kls: Vec<f64> = thread::scope(|scope| {
            let running: Vec<_> = parts.map(|part| scope.spawn(move || -> Vec<f64> { kls(part) })).collect();
            running.into_iter().flat_map(|part| part.join().unwrap_or_default()).collect()
        });
        let (last, repeated) = kls.split_at(self.probe.n_last.min(kls.len()));
        let mean = |kls: &[f64]| kls.iter().sum::<f64>() / kls.len().max(1) as f64;
        if kls.len() < self.sums.len() { f64::NAN } else { mean(last).max(mean(repeated) / REPEATED_MORE) }
    }
}

/// What is searched for the most layers that can change.
#[derive(Debug)]
struct Candidates<'a> {
    /// The most promising first.
    order: &'a [usize],
    change: Change,
    /// How many are tried first.
    n_first: usize,
    /// Layers that there are, those that may not change included.
    n_all: usize,
}

/// A search for the most layers that can go.
#[derive(Debug, Clone, Copy)]
struct Search {
    /// So many can go, with this divergence; and so many cannot.
    can: (usize, f64),
    cannot: usize,
    /// How many to try next.
    next: usize,
    /// By how much the logarithm of the divergence is taken to grow with a layer.
    growth: f64,
    /// The divergence that is allowed.
    most: f64,
}

impl Search {
    fn new(candidates: &Candidates<'_>, most: f64) -> Search {
        let growth = GROWTH / candidates.n_all as f64;
        Search { can: (0, 0.0), cannot: candidates.order.len() + 1, next: candidates.n_first, growth, most }
    }

    /// How many to try next; `None` when it is known how many can go.
    fn next(&self) -> Option<usize> {
        let (least, most) = (self.can.0 + 1, self.cannot - 1);
        (least <= most).then(|| self.next.clamp(least, most))
    }

    /// Notes how much `n` layers diverge.
    fn note(&mut self, n: usize, kl: f64) {
        let known_before = self.can.0;
        let more = (self.most / kl).ln() / self.growth;
        // A divergence that is no number (a broken model) is none that is small.
        if kl <= self.most {
            self.can = (n, kl);
            // Another look would bring no further layer.
            if more < 1.0 {
                self.cannot = n + 1;
            }
        } else {
            self.cannot = n
        }
        self.next = if kl > 0.0 && kl.is_finite() {
            let next = (n as f64 + more).floor().max(0.0) as usize;
            // Divergences are noisy: a step down is to leave what failed behind.
            if kl > self.most { next.min(n - (n - known_before).div_ceil(STEP_DOWN)) } else { next }
        } else {
            (self.can.0 + self.cannot).div_ceil(2)
        };
    }
}

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
    fn looks(&self) -> bool {
        self.params.lazy.policy.most_foretold().is_some() || self.params.lazy.narrow_keys
    }
}

impl Sequence {
    /// Whether a sequence of `n_past` tokens has not grown to twice its length since the last look.
    fn is_early(&self, n_past: usize) -> bool {
        self.looked.is_some_and(|looked| n_past < 2 * looked.n_past)
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

    /// Makes layers lazy where the policy goes by looks, and keys narrow where that is asked for: the largest beginning of
    /// the proposed order whose look diverges by no more than is allowed. Of a sequence that has not grown to twice its
    /// length since the last look, none.
    pub fn look_before_dropping(&mut self, setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        let params = &setup.params;
        let policy = &params.lazy.policy;
        let most_lazy = policy.most_foretold();
        if !setup.looks() {
            return Ok(());
        }
        let n_past = self.n_past();
        let is_lazy = self.layers.iter().all(|layer| !layer.is_active());
        let n_last = self.n_last(setup);
        let anchor = self.anchor.take();
        let Some(n_last) = n_last.filter(|_| !self.is_early(n_past) && !is_lazy && n_past > params.lazy.n_kept())
        else {
            return Ok(());
        };
        // The repeated pieces lie in the context for a moment.
        let n_room = params.n_ubatch.min(n_last + params.n_ctx - n_past);
        let mut probe = Probe::new(&self.tokens, n_last, n_room, &params.lazy);
        probe.states = anchor;
        let (rows, scores) = self.look(&[], Change::Lazy, &probe, setup, executor)?;
        let n_vocab = setup.model.hparams().n_vocab;
        let sums = rows.chunks_exact(n_vocab).map(log_sum_exp).collect();
        let base = Base { probe: &probe, n_vocab, n_threads: params.n_threads_batch, rows, sums };
        let mut kl = 0.0;
        if let Some(most) = most_lazy {
            for scored in &scores {
                self.layers[scored.layer].score = Some(scored.value);
            }
            let mut order = self.proposed(setup, &scores);
            let n_lazy = self.layers.iter().filter(|layer| layer.lazy).count();
            let n_all = order.len() + n_lazy;
            let n_first = order.len().div_ceil(2);
            order.truncate(((policy.most_by_looks() * n_all as f32) as usize).saturating_sub(n_lazy));
            let candidates = Candidates { order: &order, change: Change::Lazy, n_first, n_all };
            let found = self.largest(&candidates, &base, most, setup, executor)?;
            for &layer in &order[..found.0] {
                self.make_lazy(layer, n_past, setup, executor)?;
            }
            kl = found.1;
        }
        if params.lazy.narrow_keys {
            kl = self.narrow_keys(&base, kl + most_lazy.unwrap_or(DEFAULT_KL), setup, executor)?;
        }
        self.looked = Some(Looked { n_past, kl });
        Ok(())
    }

    /// Narrows the keys of the active layers that can have it, and says how far the logits are from the base then.
    fn narrow_keys(
        &mut self,
        base: &Base<'_>,
        most: f64,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<f64, Error> {
        let n_past = self.n_past();
        let mut losses = Vec::new();
        for (index, (layer, setup)) in self.layers.iter().zip(&setup.layers).enumerate() {
            if let Some(narrow) = setup.plan.narrow.filter(|&narrow| layer.is_active() && layer.format != narrow) {
                losses.push((key_loss(layer, n_past, narrow, setup, executor)?, index));
            }
        }
        losses.sort_by(|a, b| a.0.total_cmp(&b.0));
        let order: Vec<usize> = losses.into_iter().map(|(_, layer)| layer).collect();
        let n_all = order.len();
        let candidates = Candidates { order: &order, change: Change::Narrow, n_first: n_all, n_all };
        let (n, kl) = self.largest(&candidates, base, most, setup, executor)?;
        if n == 0 {
            return Ok(kl);
        }
        // No rows after the last token are copied, and the mark's are of another format.
        self.forget_cut_off();
        executor.forget();
        for &index in &order[..n] {
            let setup = &setup.layers[index];
            let narrow =
                self.layers[index].copy(self.at(), false, setup.plan.narrow, setup, &mut executor.scheduler)?;
            self.layers[index] = narrow;
        }
        executor.forget();
        Ok(kl)
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

    /// How many of these layers, the first ones, can change, and the divergence that was measured with them.
    fn largest(
        &mut self,
        candidates: &Candidates<'_>,
        base: &Base<'_>,
        most: f64,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(usize, f64), Error> {
        let Candidates { order, change, .. } = *candidates;
        let mut search = Search::new(candidates, most);
        for _ in 0..MOST_SETS {
            let Some(n) = search.next() else { break };
            let (rows, _) = self.look(&order[..n], change, base.probe, setup, executor)?;
            search.note(n, base.divergence(&rows));
        }
        Ok(search.can)
    }

    /// Rows of logits of the probe as they would be with these layers changed; without any, layers' scores as well where
    /// they are wanted for an order.
    fn look(
        &mut self,
        changed: &[usize],
        change: Change,
        probe: &Probe,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(Vec<f32>, Vec<Scored>), Error> {
        let (start, n) = (probe.start, probe.tokens.len());
        self.reserve(start..probe.end(), setup, executor)?;
        let at = At { n_past: start, exact_from: self.exact_from(start, self.n_past()) };
        let mut others = Vec::new();
        for &index in changed {
            let (layer, scheduler) = (&setup.layers[index], &mut executor.scheduler);
            let (is_lazy, format) = match change {
                Change::Lazy => (true, None),
                Change::Narrow => (false, layer.plan.narrow),
            };
            let mut cache = self.layers[index].copy(at, is_lazy, format, layer, scheduler)?;
            cache.reserve(start..start + n, layer, scheduler)?;
            others.push(cache);
        }
        let written = start..probe.end();
        // Of the others: the candidates' own caches are put aside.
        let stays = (0..self.layers.len()).filter(|index| !changed.contains(index));
        let save = |index: usize| (index, self.layers[index].rows(written.clone()), self.layers[index].exact_rows());
        let saved: Vec<(usize, Vec<u8>, Vec<u8>)> = stays.map(save).collect();
        let mut exchange = |layers: &mut [LayerCache]| {
            changed.iter().zip(&mut others).for_each(|(&index, cache)| mem::swap(&mut layers[index], cache));
        };
        // Both rows of a state are written: what the sequence has is put back afterwards.
        let row = self.place.state_row;
        let now = probe.states.as_ref().map(|_| Snapshot::of(self.n_past(), &self.layers, row, &setup.meter));
        exchange(&mut self.layers);
        if let Some(states) = &probe.states {
            states.put_back(&self.layers, row);
        }
        let is_scored =
            changed.is_empty() && setup.order.is_none() && setup.params.lazy.policy.most_foretold().is_some();
        let n_scored = n - probe.n_last + probe.n_last.min(N_SCORED);
        let found = self.run_probe(probe, if is_scored { n_scored } else { 0 }, setup, executor);
        // The graph refers to caches that go.
        executor.forget();
        exchange(&mut self.layers);
        if let Some(states) = now {
            states.put_back(&self.layers, row);
        }
        for (index, rows, exact) in &saved {
            self.layers[*index].put_rows(written.clone(), rows);
            self.layers[*index].put_exact_rows(exact);
        }
        found
    }

    /// Runs the probe over whatever the layers hold now: the logits of the tokens that count, and scores of the last
    /// `n_score`.
    fn run_probe(
        &self,
        probe: &Probe,
        n_score: usize,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(Vec<f32>, Vec<Scored>), Error> {
        let (n_past, n) = (probe.start, probe.tokens.len());
        // The exact stores hold the newest tokens, and the probe goes back before them.
        let exact_from = self.exact_from(n_past, self.n_past());
        let (state_row, shift) = (self.place.state_row, self.positions.shift(n_past));
        let parts = [Part { first: 0, n, n_past, n_score, exact_from, state_row, shift, see_each_other: false }];
        let caches: [&[LayerCache]; 1] = [&self.layers];
        let layers = 0..setup.layers.len();
        let rows: Vec<i32> = (0..probe.n_last).chain(probe.repeated.iter().copied()).map(|row| row as i32).collect();
        let stretch = Stretch {
            layers,
            parts: &parts,
            caches: &caches,
            entering: None,
            has_embeddings: false,
            n_wanted: rows.len(),
        };
        let results = executor.take_results();
        let step = executor.step(setup, &stretch);
        let ran = step.and_then(|mut ready| executor.run(&mut ready.step, &parts, probe.tokens[..].into(), &rows));
        let found = executor.put_results(results);
        Ok((found, ran?))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `n` can go where so many diverge by as much, and which were tried.
    fn search(n: usize, kl: impl Fn(usize) -> f64, most: f64) -> (usize, Vec<usize>) {
        let order: Vec<usize> = (0..n).collect();
        let candidates = Candidates { order: &order, change: Change::Lazy, n_first: n.div_ceil(2), n_all: n };
        let (mut search, mut all) = (Search::new(&candidates, most), Vec::new());
        while let Some(next) = search.next().filter(|_| all.len() < MOST_SETS) {
            search.note(next, kl(next));
            all.push(next);
        }
        (search.can.0, all)
    }

    #[test]
    fn a_search_goes_where_the_bound_is() {
        assert_eq!(search(30, |_| 1e-9, 0.01).0, 30);
        assert_eq!(search(30, |_| 0.0, 0.01), (29, vec![15, 23, 27, 29]));
        assert_eq!(search(30, |_| f64::NAN, 0.01).0, 0);
        assert_eq!(search(1, |_| 1.0, 0.01), (0, vec![1]));
        for sharp in 1..24 {
            let (can, tried) = search(24, |n| if n <= sharp { 1e-3 } else { 1e-1 }, 0.01);
            assert!(can <= sharp && tried.len() <= MOST_SETS, "{sharp}: {can} of {tried:?}");
            assert!(can > 0 || sharp < 4, "{sharp}: {can} of {tried:?}");
        }
        // As the divergence grows on real models: near the bound after four looks.
        for slope in [3.6, 5.3] {
            for at in 6..20 {
                let kl = |n: usize| 0.01 * (slope * (n as f64 - f64::from(at)) / 24.0).exp();
                let (can, tried) = search(24, kl, 0.01);
                assert!(can <= at as usize && can + 2 >= at as usize, "{slope}, {at}: {can} of {tried:?}");
            }
        }
    }

    fn lazy() -> LazyParams {
        LazyParams { n_sink: 4, n_window: 100, ..LazyParams::default() }
    }

    /// Where a number stands once among words that come again and again, the piece has it, after its first tokens.
    #[test]
    fn pieces_have_what_is_told_nowhere_else() {
        let mut tokens: Vec<Token> = (0..600).map(|at| at % 7).collect();
        tokens[90..96].copy_from_slice(&[50, 51, 52, 53, 54, 55]);
        tokens[400..406].copy_from_slice(&[60, 61, 62, 63, 64, 65]);
        let pieces = telling_pieces(&tokens, &lazy());
        assert_eq!(pieces.len(), 2);
        for (piece, told) in pieces.iter().zip([90..96, 400..406]) {
            assert!(
                piece.len() == PIECE && piece.start + UNCOUNTED <= told.start && told.end <= piece.end,
                "{piece:?}"
            );
        }
        // The newest tokens have it as well: there is nothing to be lost.
        tokens[590..596].copy_from_slice(&[50, 51, 52, 53, 54, 55]);
        assert_ne!(telling_pieces(&tokens, &lazy())[0], pieces[0]);
    }

    #[test]
    fn a_probe_is_the_last_tokens_and_what_is_repeated() {
        let tokens: Vec<Token> = (0..300).collect();
        let probe = Probe::new(&tokens, 32, 512, &lazy());
        assert_eq!((probe.start, probe.n_last, probe.end()), (268, 32, 268 + 32 + 2 * PIECE));
        assert_eq!(probe.tokens[..32], tokens[268..]);
        assert_eq!(probe.repeated.len(), 2 * (PIECE - UNCOUNTED - 1));
        for &at in &probe.repeated {
            // Followed by what follows it in the text, within what would be dropped.
            assert_eq!(probe.tokens[at] + 1, probe.tokens[at + 1]);
            assert!((4..200).contains(&probe.tokens[at]));
        }
        // Less room, or too little that would be dropped, leaves pieces out.
        assert_eq!(Probe::new(&tokens, 32, 32 + PIECE, &lazy()).tokens.len(), 32 + PIECE);
        assert!(Probe::new(&tokens[..110], 32, 512, &lazy()).repeated.is_empty());
    }
}
