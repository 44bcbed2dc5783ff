//! One layer's cache in a sequence: its stores, and what it keeps.

use std::{fmt, ops::Range, slice, sync::Arc};

use serde::Serialize;

use super::{
    pruning,
    setup::{LayerSetup, ROWS_STEP},
};
use crate::{
    cache::{Chain, Format, HeadLists, Move, Rescued, RowScores, Span, StateStore, Store, move_rows},
    ggml::{Error, Scheduler, TILE},
};

/// One layer's cache in a sequence.
#[derive(Debug)]
pub(super) struct LayerCache {
    pub store: Option<Chain>,
    /// The sink and the newest tokens in f16, beside a quantised store that holds them as well.
    pub exact: Option<Exact>,
    /// `None` keeps every position.
    pub span: Option<Span>,
    /// After the sink, the ring holds no position before this one; 0 while nothing was dropped. Of a layer whose old rows were
    /// pruned, the position of the store's first row.
    pub held_from: usize,
    /// What is left of older rows, once some were pruned.
    pub pruned: Option<HeadLists>,
    /// Of a lazy layer, older rows that it keeps, once some have left the window.
    pub rescued: Option<Rescued>,
    /// Rows that are being overwritten and have not competed yet for a place among these.
    pub leaving: Option<Leaving>,
    /// How much the store's rows will be asked for, where they may be pruned or rescued later.
    pub scores: Option<RowScores>,
    /// Whether the policy made it lazy; a layer that is sliding-window by design has a span and is not lazy.
    pub lazy: bool,
    pub score: Option<f32>,
    pub format: Format,
    /// Whether it has keys and values of its own: it has no rows otherwise.
    attends: bool,
    /// The layer whose keys and values it reads, where it has none.
    shares: Option<usize>,
    /// Its recurrent state, where it has one.
    pub state: Option<Arc<StateStore>>,
}

/// How many tokens a sequence has, and from where on its exact stores hold them.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub n_past: usize,
    pub exact_from: usize,
}

/// The bytes of rows, and their scores.
pub(super) type ScoredRows = (Vec<u8>, Vec<f32>);

/// Rows that a ring is about to lose before they have competed.
#[derive(Debug)]
pub(super) struct Leaving {
    pub positions: Range<usize>,
    pub rows: ScoredRows,
}

/// What a layer that becomes lazy has of older rows, and the scores of its ring's.
pub(super) struct Begun {
    pub rescued: Option<Rescued>,
    pub scores: Option<RowScores>,
}

/// The sink and the newest tokens of a layer in f16, beside its quantised store.
#[derive(Debug)]
pub(super) struct Exact {
    pub store: Chain,
    pub span: Span,
}

impl Exact {
    /// The exact store beside a store of this format, where one is due.
    pub fn new(format: Format, setup: &LayerSetup) -> Result<Option<Exact>, Error> {
        let Some(span) = setup.plan.exact_span_for(format) else { return Ok(None) };
        let store = setup.make(span.n_rows(), Some(span), format.exact())?;
        Ok(Some(Exact { store: setup.chain(store), span }))
    }

    /// Whether it is what is due beside a store of this format.
    fn fits(&self, format: Format, setup: &LayerSetup) -> bool {
        self.store.format() == format.exact() && Some(self.span) == setup.plan.exact_span_for(format)
    }

    fn share(&self) -> Exact {
        Exact { store: self.store.share(), span: self.span }
    }
}

/// What a layer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Everything.
    Full,
    /// Of old rows those that each KV head will need; everything of the newest.
    Pruned,
    /// Sink and window: the policy made it lazy.
    Lazy,
    /// A window: it is sliding-window by the model's design.
    Window,
    /// The state of a recurrent layer, and no keys and values.
    Recurrent,
    /// The last columns of a convolution.
    Convolution,
    /// Nothing: a feed-forward alone.
    Nothing,
    /// Nothing: it reads the keys and values of another layer, and what is lazy there is lazy here.
    Shared,
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LayerKind::Full => "full",
            LayerKind::Pruned => "pruned",
            LayerKind::Lazy => "lazy",
            LayerKind::Window => "window",
            LayerKind::Recurrent => "recurrent",
            LayerKind::Convolution => "convolution",
            LayerKind::Nothing => "nothing",
            LayerKind::Shared => "shared",
        })
    }
}

/// What is known of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LayerReport {
    pub index: usize,
    /// Its attention mass on sink and window when it was last scored; that of all layers that read its keys and values.
    pub score: Option<f32>,
    pub lazy: bool,
    pub kind: LayerKind,
    /// The layer whose keys and values it reads, where it has none of its own.
    pub shares: Option<usize>,
    /// Recent tokens that it keeps, the newest included; `None` when it keeps all.
    pub window: Option<usize>,
    /// Rows of keys and values that it holds; of a layer with pruned or rescued rows the mean over its KV heads.
    pub rows: usize,
    /// Bytes of its buffers, with those of its state. What a copy shares with the sequence that it is of counts in each.
    pub kv_bytes: usize,
    /// Bytes of its recurrent state; a layer may have one beside keys and values.
    pub state_bytes: usize,
}

impl LayerCache {
    pub fn new(span: Option<Span>, lazy: bool, format: Format, setup: &LayerSetup) -> LayerCache {
        LayerCache {
            store: None,
            exact: None,
            span,
            held_from: 0,
            pruned: None,
            rescued: None,
            leaving: None,
            scores: None,
            lazy,
            score: None,
            format,
            attends: setup.plan.attends,
            shares: setup.plan.shares,
            state: None,
        }
    }

    /// The layer in a sequence without tokens: full, unless it is restricted from the first token on.
    pub fn at_first(setup: &LayerSetup) -> LayerCache {
        let (span, format) = setup.at_first();
        LayerCache::new(span, setup.starts_lazy, format, setup)
    }

    /// Whether the policy may still make it lazy.
    pub fn is_active(&self) -> bool {
        self.attends && self.span.is_none() && self.pruned.is_none()
    }

    /// The row of the store that a position is in, or will be.
    pub fn row(&self, position: usize) -> usize {
        self.span.map_or_else(|| position - self.held_from, |span| span.row(position))
    }

    /// Whether it has keys and values of its own.
    pub fn attends(&self) -> bool {
        self.attends
    }

    /// Takes a store that the prompt is read over; [`LayerCache::keep_scratch`] or [`LayerCache::make_lazy`] follows.
    pub fn put_scratch(&mut self, store: Chain) {
        self.store = Some(store);
    }

    /// Turns the scratch of `n_past` tokens into the layer's store: as it is where the formats agree, else converted.
    pub fn keep_scratch(&mut self, n_past: usize, setup: &LayerSetup, scheduler: &mut Scheduler) -> Result<(), Error> {
        if let Some(scratch) = self.store.take_if(|scratch| scratch.format() != self.format) {
            let at = At { n_past, exact_from: 0 };
            let store = self.refilled(at, &scratch, self.format, setup, scheduler)?;
            self.exact = self.exact_from_store(at, &scratch, self.format, setup, scheduler)?;
            self.convert_rescued(setup, scheduler)?;
            self.store = Some(setup.chain(store));
        }
        self.rescue(n_past, setup)
    }

    /// A store in a format, with the rows that `store` holds.
    fn refilled(
        &self,
        at: At,
        store: &Chain,
        format: Format,
        setup: &LayerSetup,
        scheduler: &mut Scheduler,
    ) -> Result<Store, Error> {
        let used = self.used_rows(at.n_past);
        let refilled = setup.make(used, self.span, format)?;
        if used > 0 {
            let exact = self.exact_moves(at, store, |position| Some(self.row(position)));
            let sources = [(store, &[Move { from: 0..used, to: 0 }][..])];
            move_rows(scheduler, &with(&sources, &exact), &refilled, setup.moving())?;
        }
        Ok(refilled)
    }

    /// From the exact store to the rows that positions have elsewhere: what a store of tiles has not, or less well. Nothing
    /// where `store` has no tiles.
    fn exact_moves(&self, at: At, store: &Chain, to: impl Fn(usize) -> Option<usize>) -> Option<(&Chain, Vec<Move>)> {
        let exact = self.exact.as_ref().filter(|_| store.format().has_tiles())?;
        let held =
            at.exact_from.max(exact.span.held_from(at.n_past)).max(at.n_past.saturating_sub(exact.span.n_window));
        let positions = exact.span.kept_ranges(at.n_past).into_iter().flatten();
        let held = positions.filter(|&position| position < exact.span.n_sink || position >= held);
        let moves = held.filter_map(|position| Some((exact.span.row(position), to(position)?)));
        Some((&exact.store, joined(moves)))
    }

    /// The exact store for a new store's format, filled from the store of before.
    fn exact_from_store(
        &self,
        at: At,
        store: &Chain,
        format: Format,
        setup: &LayerSetup,
        scheduler: &mut Scheduler,
    ) -> Result<Option<Exact>, Error> {
        let n_past = at.n_past;
        let Some(exact) = Exact::new(format, setup)? else { return Ok(None) };
        // What a ring has dropped is outside the layer's own span as well: nobody will look for it.
        let held = |position: &usize| {
            self.span
                .is_none_or(|span| *position < span.n_sink || *position >= self.held_from.max(span.held_from(n_past)))
        };
        let positions = exact.span.kept_ranges(n_past).into_iter().flatten().filter(held);
        let moves = joined(positions.map(|position| (self.row(position), exact.span.row(position))));
        let newest = self.exact_moves(at, store, |position| {
            exact.span.kept_ranges(n_past).iter().any(|kept| kept.contains(&position)).then(|| exact.span.row(position))
        });
        move_rows(scheduler, &with(&[(store, &moves)], &newest), exact.store.single(), setup.moving())?;
        Ok(Some(exact))
    }

    pub fn used_rows(&self, n_past: usize) -> usize {
        match self.span {
            _ if !self.attends => 0,
            Some(span) => span.used_rows(n_past),
            None => n_past.saturating_sub(self.held_from),
        }
    }

    /// Rows that are read when the sequence has `n_past` tokens: those in use and some more, so that a decode graph
    /// serves many steps.
    pub fn rows_read(&self, n_past: usize) -> usize {
        let allocated = self.store.as_ref().map_or(0, Chain::n_rows);
        self.used_rows(n_past).next_multiple_of(ROWS_STEP).min(allocated)
    }

    /// Makes room for the rows of these positions, which are to be written, keeping what is there: none of them is another
    /// sequence's as well then.
    pub fn reserve(
        &mut self,
        positions: Range<usize>,
        setup: &LayerSetup,
        scheduler: &mut Scheduler,
    ) -> Result<(), Error> {
        self.reserve_state(setup)?;
        if !self.attends {
            return Ok(());
        }
        self.rescue(positions.start, setup)?;
        self.keep_leaving(positions.clone(), setup);
        let needed = self.used_rows(positions.end);
        let Some(store) = &mut self.store else {
            self.exact = Exact::new(self.format, setup)?;
            self.store = Some(setup.chain(setup.make(needed, self.span, self.format)?));
            return self.reserve_scores(setup);
        };
        if let Some(Exact { store, .. }) = &mut self.exact {
            store.own(slice::from_ref(&(0..store.n_rows())))?;
        }
        let n_rows = store.n_rows();
        // Rows are as positions as long as a store grows, whatever its span.
        let grows = self.span.is_none() || n_rows < needed;
        let start = if self.span.is_none() { positions.start - self.held_from } else { positions.start };
        if let Some(first) = store.replaced_from(start, needed).filter(|_| grows) {
            let rows = first + Store::rows_with_room(needed - first);
            let rows = rows.min(setup.n_ctx).max(needed);
            let rest = setup.make_rest(first, rows, self.span, self.format)?;
            // What lies after the positions may come back, too.
            let kept = first..n_rows.min(first + rest.n_rows());
            if !kept.is_empty() {
                let moves = [Move { from: kept, to: 0 }];
                move_rows(scheduler, &[(store, &moves)], &rest, setup.moving())?;
            }
            store.replace_from(first, rest);
        }
        store.own(&row_ranges(self.span, self.held_from, positions))?;
        self.reserve_scores(setup)
    }

    /// Makes room for the scores of the store's rows, where they may be pruned or rescued later.
    pub fn reserve_scores(&mut self, setup: &LayerSetup) -> Result<(), Error> {
        let Some(store) = self.store.as_ref().filter(|_| self.span.is_none_or(|span| span.n_rescued > 0)) else {
            return Ok(());
        };
        if setup.pruning.is_none() {
            // New rows have none, and those of old ones do not stay theirs in a ring.
            self.scores.take_if(|_| self.span.is_some());
            return Ok(());
        }
        let n_rows = store.n_rows();
        if self.scores.as_ref().is_none_or(|scores| scores.n_rows() < n_rows) {
            let scores = setup.make_scores(n_rows)?;
            if let Some(before) = &self.scores {
                scores.write(0, &before.read(0..before.n_rows()));
            }
            self.scores = Some(scores);
        }
        Ok(())
    }

    /// Makes room for the layer's state, where it has one: it begins with nothing but zeros.
    pub fn reserve_state(&mut self, setup: &LayerSetup) -> Result<(), Error> {
        if self.state.is_none() {
            self.state = setup.make_state()?.map(Arc::new);
        }
        self.own_state()
    }

    fn own_state(&mut self) -> Result<(), Error> {
        if let Some(state) = self.state.as_mut().filter(|state| Arc::strong_count(state) > 1) {
            *state = Arc::new(state.copied()?);
        }
        Ok(())
    }

    /// Before rows and states of before are put back: what is put back is no other sequence's. Rows of a store that keeps all
    /// never are.
    pub fn own_kept(&mut self) -> Result<(), Error> {
        self.own_state()?;
        let ring = self.store.as_mut().filter(|_| self.span.is_some());
        let stores = ring.into_iter().chain(self.exact.as_mut().map(|exact| &mut exact.store));
        stores.into_iter().try_for_each(|store| store.own(slice::from_ref(&(0..store.n_rows()))))?;
        self.rescued.as_mut().map_or(Ok(()), Rescued::own)
    }

    /// Keeps sink and window only from now on, in the lazy format.
    pub fn make_lazy(&mut self, at: At, setup: &LayerSetup, scheduler: &mut Scheduler) -> Result<(), Error> {
        let (span, format, n_past) = (self.span_when_lazy(setup), setup.plan.lazy, at.n_past);
        let mut begun = Begun { rescued: None, scores: None };
        if let Some(store) = &self.store {
            let shrunk = self.shrunk(at, store, span, format, setup, scheduler)?;
            let exact = match &self.exact {
                Some(exact) if exact.fits(format, setup) => self.exact.take(),
                _ => self.exact_from_store(at, store, format, setup, scheduler)?,
            };
            begun = self.begin_rescuing(at, &shrunk, setup, scheduler)?;
            self.store = Some(setup.chain(shrunk));
            self.exact = exact;
        }
        (self.span, self.format, self.lazy) = (Some(span), format, true);
        (self.rescued, self.scores) = (begun.rescued, begun.scores);
        self.held_from = span.held_from(n_past);
        self.rescue(n_past, setup)
    }

    /// What it keeps if it becomes lazy now. Of rows without scores none can be rescued.
    fn span_when_lazy(&self, setup: &LayerSetup) -> Span {
        let span = setup.plan.lazy_span;
        let has_scores = self.store.is_none() || self.scores.is_some();
        Span { n_rescued: if has_scores { span.n_rescued } else { 0 }, ..span }
    }

    /// A copy of the layer in a sequence of so many tokens, which becomes lazy or keeps what this one keeps, in another
    /// format where one is given. What is alike in both is shared until one of them writes.
    pub fn copy(
        &self,
        at: At,
        becomes_lazy: bool,
        format: Option<Format>,
        setup: &LayerSetup,
        scheduler: &mut Scheduler,
    ) -> Result<LayerCache, Error> {
        let (lazy_span, n_past) = (becomes_lazy.then(|| self.span_when_lazy(setup)), at.n_past);
        let format = match format {
            Some(format) if becomes_lazy || self.pruned.is_none() => format,
            None if becomes_lazy => setup.plan.lazy,
            _ => self.format,
        };
        let store = match (&self.store, lazy_span) {
            (None, _) => None,
            (Some(store), Some(span)) => Some(setup.chain(self.shrunk(at, store, span, format, setup, scheduler)?)),
            (Some(store), None) if store.format() == format => Some(store.share()),
            (Some(store), None) => {
                let refilled = self.refilled(at, store, format, setup, scheduler)?;
                Some(setup.chain(refilled))
            }
        };
        let exact = match (&self.exact, &self.store) {
            (Some(exact), _) if exact.fits(format, setup) => Some(exact.share()),
            (_, Some(store)) => self.exact_from_store(at, store, format, setup, scheduler)?,
            (_, None) => None,
        };
        let (rescued, scores) = match (&self.scores, becomes_lazy, &store) {
            (_, true, Some(ring)) => {
                let Begun { rescued, scores } = self.begin_rescuing(at, ring.single(), setup, scheduler)?;
                (rescued, scores)
            }
            (Some(scores), false, _) => {
                let copied = setup.make_scores(scores.n_rows())?;
                copied.write(0, &scores.read(0..scores.n_rows()));
                (self.rescued.as_ref().map(Rescued::share), Some(copied))
            }
            _ => (self.rescued.as_ref().map(Rescued::share), None),
        };
        let pruned = self.pruned.as_ref().map(HeadLists::share);
        let lazy = self.lazy || becomes_lazy;
        let held_from = lazy_span.map_or(self.held_from, |span| span.held_from(n_past));
        let state = self.state.clone();
        let (span, score) = (lazy_span.or(self.span), self.score);
        let (attends, shares) = (self.attends, self.shares);
        let leaving = None;
        Ok(LayerCache {
            store,
            exact,
            span,
            held_from,
            pruned,
            rescued,
            leaving,
            scores,
            lazy,
            score,
            format,
            attends,
            shares,
            state,
        })
    }

    /// Rows were written up to `end` tokens: a ring has lost what was in them.
    pub fn wrote(&mut self, end: usize) {
        if let Some(span) = self.span {
            self.held_from = self.held_from.max(span.held_from(end));
        }
    }

    /// Its report in a sequence of `n_past` tokens.
    pub fn report(&self, index: usize, n_past: usize) -> LayerReport {
        let kind = match (self.lazy, self.span) {
            _ if !self.attends => match self.state.as_deref() {
                Some(StateStore { matrices: Some(_), .. }) => LayerKind::Recurrent,
                Some(_) => LayerKind::Convolution,
                None if self.shares.is_some() => LayerKind::Shared,
                None => LayerKind::Nothing,
            },
            (true, _) => LayerKind::Lazy,
            (false, Some(_)) => LayerKind::Window,
            (false, None) if self.pruned.is_some() => LayerKind::Pruned,
            (false, None) => LayerKind::Full,
        };
        let stores = self.store.iter().chain(self.exact.as_ref().map(|exact| &exact.store));
        let state_bytes = self.state.as_ref().map_or(0, |state| state.bytes());
        let of_lists =
            self.pruned.as_ref().map_or(0, HeadLists::bytes) + self.rescued.as_ref().map_or(0, Rescued::bytes);
        let of_scores = self.scores.as_ref().map_or(0, RowScores::bytes);
        let kv_bytes = stores.map(Chain::bytes).sum::<usize>() + of_lists + of_scores + state_bytes;
        let window = self.span.map(|span| span.n_window);
        LayerReport {
            index,
            score: self.score,
            lazy: self.lazy,
            kind,
            shares: self.shares,
            window,
            rows: self.used_rows(n_past) + self.lists().map_or(0, HeadLists::mean),
            kv_bytes,
            state_bytes,
        }
    }
}

impl LayerCache {
    /// A row of the layer's state; nothing where it has none.
    pub fn state_row(&self, row: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(state) = &self.state {
            state.read_row(row, &mut bytes);
        }
        bytes
    }

    /// Puts [`LayerCache::state_row`] back.
    pub fn put_state_row(&self, row: usize, bytes: &[u8]) {
        if let Some(state) = &self.state {
            state.write_row(row, bytes);
        }
    }

    pub fn exact_rows(&self) -> Vec<u8> {
        let Some(exact) = &self.exact else { return Vec::new() };
        let mut rows = Vec::new();
        exact.store.read_rows(slice::from_ref(&(0..exact.span.n_rows())), &mut rows);
        rows
    }

    pub fn put_exact_rows(&self, rows: &[u8]) {
        if let Some(exact) = &self.exact {
            exact.store.write_rows(slice::from_ref(&(0..exact.span.n_rows())), rows);
        }
    }

    /// The rows in which positions are, or will be, and their scores.
    pub fn rows(&self, positions: Range<usize>) -> ScoredRows {
        let mut rows = Vec::new();
        if let Some(store) = &self.store {
            let ranges = row_ranges(self.span, self.held_from, positions.clone());
            store.read_rows(&whole(ranges, store.format()), &mut rows);
        }
        (rows, self.scores_of(&row_ranges(self.span, self.held_from, positions)))
    }

    /// The scores of rows, where there are some.
    pub fn scores_of(&self, ranges: &[Range<usize>]) -> Vec<f32> {
        let Some(scores) = &self.scores else { return Vec::new() };
        ranges.iter().flat_map(|range| scores.read(range.clone())).collect()
    }

    /// Puts [`LayerCache::scores_of`] back.
    pub fn put_scores(&self, ranges: &[Range<usize>], scores: &[f32]) {
        let (Some(known), mut rest) = (&self.scores, scores) else { return };
        let n_rows: usize = ranges.iter().map(Range::len).sum();
        for range in ranges {
            let (own, others) = rest.split_at(range.len() * (scores.len() / n_rows));
            known.write(range.start, own);
            rest = others;
        }
    }

    /// Puts [`LayerCache::rows`] back.
    pub fn put_rows(&self, positions: Range<usize>, (rows, scores): &ScoredRows) {
        if let Some(store) = &self.store {
            let ranges = row_ranges(self.span, self.held_from, positions.clone());
            store.write_rows(&whole(ranges, store.format()), rows);
        }
        self.put_scores(&row_ranges(self.span, self.held_from, positions), scores);
    }
}

/// The fewest tokens of a sequence that can be gone on from: nothing that the next one sees was dropped. `held_from` says
/// from where on a layer's ring is held, by the layer's number.
pub(super) fn resumable(layers: &[LayerCache], held_from: impl Fn(usize, &LayerCache) -> usize) -> usize {
    let of_layer = |(index, layer): (usize, &LayerCache)| match (layer.span, &layer.pruned) {
        (Some(span), _) => span.resumable(held_from(index, layer)),
        // What is younger than this is never pruned.
        (None, Some(_)) => layer.held_from + pruning::WINDOW,
        (None, None) => 0,
    };
    layers.iter().enumerate().map(of_layer).max().unwrap_or(0)
}

/// The same rows, in whole tiles where there are some.
pub(super) fn whole(ranges: Vec<Range<usize>>, format: Format) -> Vec<Range<usize>> {
    if !format.has_tiles() {
        return ranges;
    }
    let mut whole: Vec<Range<usize>> = ranges
        .into_iter()
        .filter(|rows| !rows.is_empty())
        .map(|rows| rows.start / TILE * TILE..rows.end.next_multiple_of(TILE))
        .collect();
    whole.sort_by_key(|rows| rows.start);
    whole.dedup_by(|next, rows| {
        let touches = next.start <= rows.end;
        if touches {
            rows.end = rows.end.max(next.end);
        }
        touches
    });
    whole
}

/// The rows in which positions are, or will be, of a store of this span, or else from this position on.
fn row_ranges(span: Option<Span>, from: usize, positions: Range<usize>) -> Vec<Range<usize>> {
    let Some(span) = span else {
        let rows = positions.start - from..positions.end - from;
        return vec![rows];
    };
    let sink = positions.start.min(span.n_sink)..positions.end.min(span.n_sink);
    // Of more positions than the ring has rows, the last are in it.
    let end = positions.end.max(span.n_sink);
    let first = positions.start.max(span.n_sink).max(end.saturating_sub(span.n_rows() - span.n_sink));
    let ring = span.rows(first..end);
    std::iter::once(sink).chain(ring).filter(|rows| !rows.is_empty()).collect()
}

/// Neighbouring rows that stay neighbours, in one move.
fn joined(rows: impl Iterator<Item = (usize, usize)>) -> Vec<Move> {
    let mut moves: Vec<Move> = Vec::new();
    for (from, to) in rows {
        match moves.last_mut() {
            Some(last) if last.from.end == from && last.to + last.from.len() == to => last.from.end += 1,
            _ => moves.push(Move { from: from..from + 1, to }),
        }
    }
    moves
}

/// The sources of a move, and one more.
fn with<'a>(
    sources: &[(&'a Chain, &'a [Move])],
    more: &'a Option<(&'a Chain, Vec<Move>)>,
) -> Vec<(&'a Chain, &'a [Move])> {
    sources.iter().copied().chain(more.as_ref().map(|(chain, moves)| (*chain, &moves[..]))).collect()
}

impl LayerCache {
    /// A store with the rows of `store` that the span keeps.
    fn shrunk(
        &self,
        at: At,
        store: &Chain,
        span: Span,
        format: Format,
        setup: &LayerSetup,
        scheduler: &mut Scheduler,
    ) -> Result<Store, Error> {
        let n_past = at.n_past;
        let shrunk = setup.make(span.used_rows(n_past), Some(span), format)?;
        // The exact store has what is in the tile that is not finished, and hides it here.
        let finished = n_past / TILE * TILE;
        let is_kept = store.format() == format && format.has_tiles() && at.exact_from <= finished;
        let end = if is_kept { finished } else { n_past };
        let ranges = span.kept_ranges(n_past).into_iter().map(|range| range.start..range.end.min(end));
        let moves: Vec<Move> = ranges
            .filter(|range| !range.is_empty())
            .map(|range| Move { to: span.row(range.start), from: range })
            .collect();
        let exact = self.exact_moves(at, store, |position| {
            let is_kept = span.kept_ranges(n_past).iter().any(|range| range.contains(&position));
            is_kept.then(|| span.row(position))
        });
        let exact = exact.filter(|_| !is_kept);
        move_rows(scheduler, &with(&[(store, &moves)], &exact), &shrunk, setup.moving())?;
        Ok(shrunk)
    }
}
