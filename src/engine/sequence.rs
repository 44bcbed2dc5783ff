//! One sequence: its tokens, its layers' caches, and how it grows, is cut, becomes lazy and is copied.

use std::{collections::BTreeSet, ops::Range};

use super::{
    batch::{BatchEntry, Outputs},
    error::Error,
    executor::Executor,
    layer::{At, LayerCache, LayerReport, resumable},
    looking::{Looked, Looking},
    mark::{Mark, Place},
    positions::Positions,
    setup::{BACK, Setup},
    snapshot::Snapshot,
};
use crate::{
    cache::{Format, Meter},
    lazy::Selector,
    vocab::Token,
};

/// One sequence's cache.
#[derive(Debug)]
pub(super) struct Sequence {
    pub place: Place,
    pub layers: Vec<LayerCache>,
    /// The tokens in the cache.
    pub tokens: Vec<Token>,
    /// Where they stand for RoPE.
    pub positions: Positions,
    /// Tokens after them that were cut off, and whose rows are still there.
    cut_off: Vec<Token>,
    /// Where the last prompt ended.
    mark: Option<Mark>,
    /// What was found when the last tokens were last looked at, before layers became lazy.
    pub looked: Option<Looked>,
    /// Recurrent layers' states before the last tokens, which a look before dropping runs again.
    pub anchor: Option<Snapshot>,
    /// A look before dropping that is under way.
    pub looking: Option<Box<Looking>>,
}

impl Sequence {
    /// A sequence without tokens: its layers are full, but for those that are restricted from the first token on.
    pub fn new(setup: &Setup) -> Sequence {
        Sequence::of(Place::default(), Vec::new(), setup.layers.iter().map(LayerCache::at_first).collect())
    }

    /// A sequence of these tokens, whose rows the layers hold.
    pub fn of(place: Place, tokens: Vec<Token>, layers: Vec<LayerCache>) -> Sequence {
        let positions = Positions::default();
        Sequence {
            place,
            layers,
            tokens,
            positions,
            cut_off: Vec::new(),
            mark: None,
            looked: None,
            anchor: None,
            looking: None,
        }
    }

    pub fn n_past(&self) -> usize {
        self.place.n_past
    }

    /// Where layers' caches are.
    pub fn at(&self) -> At {
        At { n_past: self.place.n_past, exact_from: self.place.exact_from }
    }

    /// Whether a layer has a state, from which nothing can be taken back.
    pub fn is_recurrent(&self) -> bool {
        self.layers.iter().any(|layer| layer.state.is_some())
    }

    /// Each layer's score, whether it is lazy, its bytes.
    pub fn report(&self) -> Vec<LayerReport> {
        self.layers.iter().enumerate().map(|(index, layer)| layer.report(index, self.n_past())).collect()
    }

    /// A copy, in which the layers `lazy` become lazy, as far as they are active. Where formats are given, a layer that stays
    /// active has the first of its two, and one that becomes lazy the second. What stays as it is both share, until one of them
    /// writes. Tokens that were cut off are not in it.
    pub fn copy(
        &self,
        setup: &Setup,
        executor: &mut Executor,
        lazy: &BTreeSet<usize>,
        formats: Option<&[[Format; 2]]>,
    ) -> Result<Sequence, Error> {
        let n_past = self.n_past();
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, (layer, setup)) in self.layers.iter().zip(&setup.layers).enumerate() {
            let becomes_lazy = lazy.contains(&index) && layer.is_active();
            let format = formats.map(|formats| formats[index][usize::from(becomes_lazy)]).filter(|_| !layer.lazy);
            layers.push(layer.copy(self.at(), becomes_lazy, format, setup, &mut executor.scheduler)?);
        }
        let mut copy = Sequence::of(self.place, self.tokens.clone(), layers);
        // A mark's rows fit layers that keep what these keep; and a copy has no rows after its last token.
        let is_alike = lazy.is_empty() && formats.is_none();
        copy.looked = self.looked;
        copy.positions = self.positions.clone();
        copy.mark = self.mark.clone().filter(|mark| is_alike && mark.place().n_past <= n_past);
        Ok(copy)
    }

    /// Makes room for tokens at these positions, so that they can be written.
    pub fn reserve(&mut self, positions: Range<usize>, setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        for (layer, setup) in self.layers.iter_mut().zip(&setup.layers) {
            layer.reserve(positions.clone(), setup, &mut executor.scheduler)?;
        }
        Ok(())
    }

    /// Called before rows are written up to `end` tokens.
    pub fn before_writing(&mut self, end: usize, meter: &Meter) {
        self.cut_off.clear();
        if self.mark.as_ref().is_some_and(|mark| self.place.n_past < mark.place().n_past) {
            self.mark = None;
        }
        if let Some(mark) = &mut self.mark {
            mark.keep_rings(&self.layers, end, meter);
        }
    }

    /// What was noted of the last prompt's end does not hold any more.
    pub fn forget_prompt_end(&mut self) {
        self.mark = None;
    }

    /// Notes where the next `n` tokens stand: after those before, unless positions are given.
    pub fn place_tokens(&mut self, n: usize, positions: &[i32]) {
        match positions {
            [] => self.positions.append_text(self.place.n_past, n),
            given => self.positions.append(self.place.n_past, n, given),
        }
    }

    /// Counts tokens in whose rows were written.
    pub fn append(&mut self, tokens: &[Token]) {
        self.place.n_past += tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.wrote(self.place.n_past);
    }

    /// Lets rows that have left the windows of lazy layers compete for a place among those that are rescued.
    pub fn rescue(&mut self, setup: &Setup) -> Result<(), Error> {
        let n_past = self.n_past();
        let mut layers = self.layers.iter_mut().zip(&setup.layers);
        Ok(layers.try_for_each(|(layer, setup)| layer.rescue(n_past, setup))?)
    }

    /// Rows were written up to `end` tokens: rings have lost what was in them.
    fn wrote(&mut self, end: usize) {
        self.layers.iter_mut().for_each(|layer| layer.wrote(end));
    }
}

/// What is taken back.
impl Sequence {
    /// Whether any number of tokens from `n` on can be gone on from, whatever was cut off.
    fn is_held_from(&self, n: usize) -> bool {
        resumable(&self.layers, |_, layer| layer.held_from) <= n
    }

    /// Whether the first `n` tokens can be continued from, by cutting or by going back to the last prompt's end.
    pub fn can_truncate(&self, n: usize) -> bool {
        n >= self.n_past() || (!self.is_recurrent() && self.is_held_from(n)) || self.mark_for(n).is_some()
    }

    /// The mark, where going back to it brings the first `n` tokens back.
    fn mark_for(&self, n: usize) -> Option<&Mark> {
        self.mark.as_ref().filter(|mark| mark.brings_back(n, self.n_past(), &self.layers))
    }

    /// The fewest tokens from which on any number can be gone on from exactly.
    pub fn resumable(&self) -> usize {
        if self.is_recurrent() {
            return self.n_past();
        }
        let of_rings = resumable(&self.layers, |_, layer| layer.held_from);
        if of_rings == 0 {
            return 0;
        }
        let exact = self.layers.iter().filter_map(|layer| layer.exact.as_ref()).map(|exact| {
            let from = self.place.exact_from.max(exact.span.held_from(self.n_past()));
            if from <= exact.span.n_sink { 0 } else { from + exact.span.n_window }
        });
        let of_exact = exact.max().unwrap_or(0).min(self.n_past());
        // What lies after the last prompt's end is its answer, of which a part is hardly ever taken back; the mark has the
        // exact rows of the whole.
        let of_mark = self.mark.as_ref().map_or(usize::MAX, Mark::first).max(of_rings);
        of_rings.max(of_exact.min(of_mark))
    }

    /// Keeps the first `n` tokens; false, with nothing changed, where that cannot be.
    pub fn truncate(&mut self, n: usize) -> bool {
        if n >= self.n_past() {
            return true;
        }
        if !self.can_truncate(n) {
            return false;
        }
        if let Some(mark) = self.mark_for(n).cloned() {
            // Without memory for rows that are shared nothing can be put back.
            if self.own_kept().is_err() {
                return false;
            }
            self.go_to(&mark);
        }
        self.cut(n, self.n_past());
        true
    }

    /// Goes back to the first `n` tokens when up to `end` tokens have been written: the exact stores' rings may have
    /// lost what they held before that.
    fn cut(&mut self, n: usize, end: usize) {
        self.wrote(end);
        self.looking.take_if(|_| n < self.place.n_past);
        self.place.n_past = self.place.n_past.min(n);
        let n_past = self.place.n_past;
        self.anchor.take_if(|anchor| anchor.n_past > n_past);
        let mut cut_off = self.tokens.split_off(n_past);
        cut_off.append(&mut self.cut_off);
        self.cut_off = cut_off;
        self.place.exact_from = self.exact_from(n_past, end);
        if self.place.scored.1 > n_past {
            self.place.scored = (0, 0);
        }
    }

    /// From where on exact stores hold positions for whoever goes on from the first `n` tokens, when rows were written up to
    /// `end`: their rings have lost what was before.
    pub fn exact_from(&self, n: usize, end: usize) -> usize {
        let exact = self.layers.iter().find_map(|layer| layer.exact.as_ref());
        let lost = exact.map_or(0, |exact| exact.span.held_from(end));
        self.place.exact_from.max(lost).min(n)
    }

    /// After a failure while `n` tokens were run: what was written after the last token is never read, but a ring may have
    /// lost rows that are still needed. False when it has.
    pub fn recover(&mut self, n: usize) -> bool {
        let n_past = self.n_past();
        self.cut(n_past, n_past + n);
        self.is_held_from(n_past)
    }

    /// See [`LayerCache::own_kept`].
    fn own_kept(&mut self) -> Result<(), Error> {
        Ok(self.layers.iter_mut().try_for_each(LayerCache::own_kept)?)
    }

    /// Makes everything as it was at the mark, after [`Sequence::own_kept`].
    fn go_to(&mut self, mark: &Mark) {
        mark.put_rows_back(&mut self.layers);
        let place = mark.place();
        self.cut_off.clear();
        let n_tail = place.n_past.saturating_sub(self.tokens.len());
        let tail = mark.tail();
        self.tokens.extend_from_slice(&tail[tail.len() - n_tail.min(tail.len())..]);
        self.tokens.truncate(place.n_past);
        self.place = place;
        (self.anchor, self.looking) = (None, None);
    }

    /// Makes the sequence as it was where a state of its first tokens was taken, whose rows the layers have again.
    pub fn settle(&mut self, place: Place) {
        // Without slack the rows came to lie where the mark's newest are.
        let slack = self.layers.iter().filter_map(|layer| layer.span).map(|span| span.n_slack).min();
        self.mark.take_if(|mark| !mark.has_rings() && slack.is_some_and(|n_slack| n_slack < 2 * BACK));
        self.tokens.truncate(place.n_past);
        self.cut_off.clear();
        self.place = place;
        (self.anchor, self.looking) = (None, None);
    }

    /// Whether going back and giving the same tokens again needs care: what was computed of them then is not what would be
    /// computed now.
    fn is_inexact(&self) -> bool {
        self.layers.iter().any(|layer| layer.span.is_some() || layer.exact.is_some() || layer.state.is_some())
    }

    /// Whether the sequence was cut, so that [`Sequence::replay`] may serve its next tokens.
    pub fn may_replay(&self) -> bool {
        let is_cut = self.mark.as_ref().is_some_and(|mark| self.n_past() < mark.place().n_past);
        is_cut || (!self.cut_off.is_empty() && self.is_inexact())
    }

    /// How many of the entry's first tokens are those that the sequence was cut before: their rows are there still, and are
    /// not computed again. Where they reach the mark the sequence is then as it was there, and the last one's logits are
    /// those of then.
    pub fn replay(&mut self, entry: &BatchEntry<'_>, executor: &mut Executor) -> usize {
        if executor.wants_embeddings || !self.may_replay() {
            return 0;
        }
        let n_tokens = entry.tokens.len();
        let n_wanted = entry.outputs.rows(n_tokens).len();
        if let Some(mark) = self.mark.clone() {
            let tail = mark.tail();
            let n = mark.place().n_past.saturating_sub(self.n_past());
            let is_known = (1..=tail.len().min(n_tokens)).contains(&n)
                && entry.tokens[..n] == tail[tail.len() - n..]
                && mark.reaches(self.n_past(), &self.layers);
            // Of the tokens before the mark only the last one's logits are known.
            let n_wanted = n_wanted.saturating_sub(n_tokens - n.min(n_tokens));
            if is_known && n_wanted <= 1 && self.own_kept().is_ok() {
                if n_wanted == 1 {
                    executor.logits.extend_from_slice(mark.logits());
                }
                self.go_to(&mark);
                return n;
            }
        }
        // A state has not seen them.
        if self.is_recurrent() {
            return 0;
        }
        // What has outputs, or ends a prompt, is computed.
        let most = n_tokens - n_wanted.max(usize::from(entry.prompt_end));
        let known = entry.tokens[..most].iter().zip(&self.cut_off).take_while(|(given, cut)| given == cut);
        let n = known.count();
        self.tokens.extend(self.cut_off.drain(..n));
        self.place.n_past += n;
        n
    }

    /// Notes that the entry's prompt has ended, where going back to here would need more than cutting. The logits of its
    /// last token, if it wants any, are the last of the executor's first `n_rows`.
    pub fn set_mark(&mut self, entry: &BatchEntry<'_>, n_rows: usize, setup: &Setup, executor: &Executor) {
        self.mark = None;
        let has_row = entry.outputs != Outputs::None && !executor.wants_embeddings;
        if has_row && setup.params.keep_prompt_end {
            let n_vocab = setup.model.hparams().n_vocab;
            let logits = &executor.logits[(n_rows - 1) * n_vocab..n_rows * n_vocab];
            self.note_prompt_end(logits, setup);
            if let Some(looking) = &mut self.looking {
                looking.prompt_end = Some(logits.to_vec());
            }
        }
    }

    /// Notes the prompt that has ended here, whose last token has these logits, where [`Sequence::set_mark`] would.
    pub fn note_prompt_end(&mut self, logits: &[f32], setup: &Setup) {
        let mark = self.is_inexact().then(|| Mark::new(self.place, &self.tokens, &self.layers, logits, &setup.meter));
        self.mark = mark;
    }
}

/// How layers become lazy.
impl Sequence {
    /// Notes scores of the last `n` queries. Where these are fewer than the policy asks for, and the ones before them were
    /// scored, too, the scores become means over both.
    pub fn note_scores(&mut self, n: usize, scores: &mut [(usize, f32)], n_queries: usize) {
        if scores.is_empty() {
            return;
        }
        let (n_before, end) = self.place.scored;
        let n_past = self.n_past();
        let n_before = if end + n == n_past { n_before.min(n_queries.saturating_sub(n)) } else { 0 };
        for (layer, score) in scores {
            let known = &mut self.layers[*layer].score;
            if let Some(before) = known.filter(|_| n_before > 0) {
                *score = (*score * n as f32 + before * n_before as f32) / (n + n_before) as f32;
            }
            *known = Some(*score);
        }
        self.place.scored = (n + n_before, n_past);
    }

    /// Makes lazy what the rule names, given all layers' scores.
    pub fn decide_all(&mut self, scores: &[(usize, f32)], setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        let mut selector = setup.selector();
        let mut any = false;
        for index in 0..self.layers.len() {
            let score = scores.iter().find(|(layer, _)| *layer == index).map(|&(_, score)| score);
            any |= self.decide(index, score, self.n_past(), &mut selector, setup, executor)?;
        }
        if any || !scores.is_empty() {
            executor.forget();
        }
        Ok(())
    }

    /// Applies the rule now: to the scores that were taken last, or as its fixed set says. False when the rule needs scores
    /// and none were taken yet.
    pub fn decide_now(&mut self, setup: &Setup, executor: &mut Executor) -> Result<bool, Error> {
        let active = || self.layers.iter().enumerate().filter(|(_, layer)| layer.is_active());
        let scores: Vec<(usize, f32)> = active().filter_map(|(index, layer)| Some((index, layer.score?))).collect();
        if setup.selector().needs_scores() && scores.is_empty() && active().next().is_some() {
            return Ok(false);
        }
        self.decide_all(&scores, setup, executor)?;
        Ok(true)
    }

    /// The one way to a lazy layer: tells the rule of a layer's score, or that it has none, and shrinks the layer that the
    /// rule names then, if it names any, to what it keeps of `n_past` tokens. It may be an earlier one. Whether one became
    /// lazy.
    pub fn decide(
        &mut self,
        layer: usize,
        score: Option<f32>,
        n_past: usize,
        selector: &mut Selector,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<bool, Error> {
        let Some(lazy) = selector.decide(layer, score).filter(|&lazy| self.layers[lazy].is_active()) else {
            return Ok(false);
        };
        self.make_lazy(lazy, n_past, setup, executor)?;
        Ok(true)
    }

    /// Where a layer's store is another from now on: neither can the last prompt's end be gone back to, nor have tokens
    /// that were cut off their rows.
    pub fn forget_cut_off(&mut self) {
        self.mark = None;
        self.cut_off.clear();
    }

    /// Shrinks a layer to what it keeps of `n_past` tokens.
    pub fn make_lazy(
        &mut self,
        layer: usize,
        n_past: usize,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(), Error> {
        // The old store goes only when no graph refers to it any more.
        executor.forget();
        // The mark knows nothing of the new ring, which has no rows after the last token.
        self.forget_cut_off();
        let at = At { n_past, ..self.at() };
        self.layers[layer].make_lazy(at, &setup.layers[layer], &mut executor.scheduler)?;
        Ok(())
    }
}
