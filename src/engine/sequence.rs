use std::sync::Arc;

use serde::Serialize;

use super::{
    attention::{Kernel, ROWS_STEP},
    mark::Mark,
};
use crate::{
    cache::{Format, Meter, Move, Rotations, Span, Store, move_rows},
    ggml::{Device, Error, Scheduler},
    vocab::Token,
};

/// One sequence's cache.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Tokens in the cache; the next one's position.
    pub n_past: usize,
    pub layers: Vec<LayerCache>,
    /// Whether the next token's attention is to be scored (`--lazy-at decode`).
    pub score_next: bool,
    /// Behind the sink, exact stores hold no position before this one.
    pub exact_from: usize,
    /// The tokens themselves.
    pub tokens: Vec<Token>,
    /// Tokens behind them that were cut off, and whose rows are still there.
    pub behind: Vec<Token>,
    /// How many queries the layers' scores are means over, and the tokens that there were then.
    pub scored: (usize, usize),
    /// Where the last prompt ended.
    pub mark: Option<Mark>,
}

impl Sequence {
    pub fn new(layers: Vec<LayerCache>) -> Sequence {
        Sequence {
            n_past: 0,
            layers,
            score_next: false,
            exact_from: 0,
            tokens: Vec::new(),
            behind: Vec::new(),
            scored: (0, 0),
            mark: None,
        }
    }

    /// A sequence of the same tokens with these layers, and no mark.
    pub fn with_layers(&self, layers: Vec<LayerCache>) -> Sequence {
        let &Sequence { n_past, score_next, exact_from, scored, .. } = self;
        let (tokens, behind) = (self.tokens.clone(), Vec::new());
        Sequence { n_past, layers, score_next, exact_from, tokens, behind, scored, mark: None }
    }

    /// The mark, for a copy whose layers keep what these do. A copy has no rows behind the last token.
    pub fn mark_of_copy(&self) -> Option<Mark> {
        self.mark.clone().filter(|mark| mark.n_past() <= self.n_past)
    }

    /// Whether the first `n` tokens can be continued from, by cutting or by going back to the last prompt's end.
    pub fn can_truncate(&self, n: usize) -> bool {
        let by_mark = self.mark.as_ref().is_some_and(|mark| mark.brings_back(n, self));
        by_mark || self.layers.iter().all(|layer| layer.can_truncate(n, self.n_past))
    }

    /// The fewest tokens from which on any number can be gone on from exactly.
    pub fn resumable(&self) -> usize {
        let of_rings = self.layers.iter().map(LayerCache::resumable).max().unwrap_or(0);
        if of_rings == 0 {
            return 0;
        }
        let exact = self.layers.iter().filter_map(|layer| layer.exact.as_ref()).map(|exact| {
            let from = self.exact_from.max(exact.span.held_from(self.n_past));
            if from <= exact.span.n_sink { 0 } else { from + exact.span.n_window }
        });
        let of_exact = exact.max().unwrap_or(0).min(self.n_past);
        // What lies behind the last prompt's end is its answer, of which a part is hardly ever taken back; the mark has the
        // exact rows of the whole.
        let of_mark = self.mark.as_ref().map_or(usize::MAX, |mark| mark.first()).max(of_rings);
        of_rings.max(of_exact.min(of_mark))
    }

    /// Keeps the first `n` tokens; false, with nothing changed, where that cannot be.
    pub fn truncate(&mut self, n: usize) -> bool {
        if n >= self.n_past {
            return true;
        }
        if !self.can_truncate(n) {
            return false;
        }
        if self.mark.as_ref().is_some_and(|mark| mark.brings_back(n, self)) {
            self.go_to_mark();
        }
        self.cut(n, self.n_past);
        true
    }

    /// Whether going back and giving the same tokens again needs care: what was computed of them then is not what would be
    /// computed now.
    pub fn is_inexact(&self) -> bool {
        self.layers.iter().any(|layer| layer.span.is_some() || layer.exact.is_some())
    }

    /// Takes the first `n` of the tokens that were cut off back.
    pub fn take_behind(&mut self, n: usize) {
        self.tokens.extend(self.behind.drain(..n));
        self.n_past += n;
    }

    /// Counts tokens in whose rows were written.
    pub fn append(&mut self, tokens: &[Token]) {
        self.n_past += tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.wrote(self.n_past);
    }

    /// Goes back to the first `n` tokens when up to `end` tokens have been written: the exact stores' rings may have
    /// lost what they held before that.
    pub fn cut(&mut self, n: usize, end: usize) {
        self.wrote(end);
        self.n_past = self.n_past.min(n);
        let mut behind = self.tokens.split_off(self.n_past);
        behind.append(&mut self.behind);
        self.behind = behind;
        let exact = self.layers.iter().find_map(|layer| layer.exact.as_ref());
        let lost = exact.map_or(0, |exact| exact.span.held_from(end));
        self.exact_from = self.exact_from.max(lost).min(self.n_past);
        if self.scored.1 > self.n_past {
            self.scored = (0, 0);
        }
    }

    /// Rows were written up to `end` tokens: rings have lost what was in them.
    fn wrote(&mut self, end: usize) {
        for layer in &mut self.layers {
            if let Some(span) = layer.span {
                layer.held_from = layer.held_from.max(span.held_from(end));
            }
        }
    }
}

/// One layer's cache in a sequence.
#[derive(Debug)]
pub(super) struct LayerCache {
    pub(super) store: Option<Store>,
    /// The sink and the newest tokens in f16, beside a quantised store that holds them as well.
    pub(super) exact: Option<Exact>,
    /// `None` keeps every position.
    pub(super) span: Option<Span>,
    /// Behind the sink, the ring holds no position before this one; 0 while nothing was dropped.
    pub(super) held_from: usize,
    /// Whether the policy made it lazy; a layer that is sliding-window by design has a span and is not lazy.
    pub lazy: bool,
    pub score: Option<f32>,
    pub(super) format: Format,
}

/// The sink and the newest tokens of a layer in f16, beside its quantised store.
#[derive(Debug)]
pub(super) struct Exact {
    pub store: Store,
    pub span: Span,
}

impl Exact {
    fn copy(&self, maker: &StoreMaker, scheduler: &mut Scheduler) -> Result<Exact, Error> {
        let store = maker.make(self.span.n_rows(), Some(self.span), self.store.format)?;
        let all = [Move { from: 0..self.span.n_rows(), to: 0 }];
        move_rows(scheduler, &self.store, &store, &all, &maker.rotations)?;
        Ok(Exact { store, span: self.span })
    }
}

/// What is known of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LayerReport {
    pub index: usize,
    /// Its attention mass on sink and window when it was last scored.
    pub score: Option<f32>,
    pub lazy: bool,
    /// `full`, `lazy`, or `window` for one that is sliding-window by design.
    pub kind: &'static str,
    /// Recent tokens that it keeps, the newest included; `None` when it keeps all.
    pub window: Option<usize>,
    /// Bytes of its buffers.
    pub kv_bytes: usize,
}

/// Whether the processor cannot read the device's memory.
fn is_apart(device: Device) -> bool {
    !device.buffer_type().is_host()
}

/// Rows that a layer's store of this span has at most. ggml's flash attention for CUDA takes a slower way where they are
/// no multiple of 256.
pub(super) fn rows_of_span(span: Span, kernel: Kernel, device: Device) -> usize {
    let pads = kernel == Kernel::Flash && is_apart(device);
    if pads { span.n_rows().next_multiple_of(ROWS_STEP) } else { span.n_rows() }
}

/// What stores are made of and from: the same for all layers of a session on one device.
#[derive(Debug, Clone)]
pub(super) struct StoreMaker {
    /// Elements of a token's keys in one layer: head size × KV heads.
    pub width: usize,
    pub device: Device,
    /// What computes attention over the stores.
    pub kernel: Kernel,
    pub meter: Meter,
    pub rotations: Arc<Rotations>,
    /// Rows are allocated in blocks of this many.
    pub block: usize,
    /// Rows that a store never needs to exceed.
    pub n_ctx: usize,
    /// What exact stores keep: KIVI's residual (arXiv 2402.02750), and the sink. `None`: there are none.
    pub exact_span: Option<Span>,
}

impl StoreMaker {
    pub fn make(&self, n_rows: usize, span: Option<Span>, format: Format) -> Result<Store, Error> {
        let memory = self.device.buffer_type();
        let most_rows = span.map(|span| rows_of_span(span, self.kernel, self.device));
        Store::new(self.width, n_rows, self.block, most_rows, format, memory, &self.meter)
    }

    /// The device, unless the processor can read its memory.
    pub fn apart(&self) -> Option<Device> {
        is_apart(self.device).then_some(self.device)
    }

    /// What the exact store beside a store of this format keeps, where one is due.
    pub fn exact_span_for(&self, format: Format) -> Option<Span> {
        self.exact_span.filter(|_| format.k.is_quantized() || format.v.is_quantized())
    }

    /// The exact store beside a store of this format, where one is due.
    pub(super) fn make_exact(&self, format: Format) -> Result<Option<Exact>, Error> {
        let Some(span) = self.exact_span_for(format) else { return Ok(None) };
        let store = self.make(span.n_rows(), Some(span), format.exact())?;
        Ok(Some(Exact { store, span }))
    }
}

impl LayerCache {
    pub fn new(span: Option<Span>, lazy: bool, format: Format) -> LayerCache {
        LayerCache { store: None, exact: None, span, held_from: 0, lazy, score: None, format }
    }

    pub fn span(&self) -> Option<Span> {
        self.span
    }

    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    pub fn exact(&self) -> Option<&Exact> {
        self.exact.as_ref()
    }

    /// Whether the policy may still make it lazy.
    pub fn is_active(&self) -> bool {
        self.span.is_none()
    }

    /// Takes a store that the prompt is read over; [`LayerCache::keep_scratch`] or [`LayerCache::make_lazy`] follows.
    pub fn put_scratch(&mut self, store: Store) {
        self.store = Some(store);
    }

    /// Turns the scratch of `n_past` tokens into the layer's store: as it is where the formats agree, else converted.
    pub fn keep_scratch(&mut self, n_past: usize, maker: &StoreMaker, scheduler: &mut Scheduler) -> Result<(), Error> {
        if let Some(scratch) = self.store.take_if(|scratch| scratch.format != self.format) {
            let store = self.refilled(n_past, &scratch, self.used_rows(n_past), self.format, maker, scheduler)?;
            self.exact = self.exact_from_store(n_past, &scratch, self.format, maker, scheduler)?;
            self.store = Some(store);
        }
        Ok(())
    }

    /// A store of `n_rows` rows in a format, with the rows that `store` holds of `n_past` tokens.
    fn refilled(
        &self,
        n_past: usize,
        store: &Store,
        n_rows: usize,
        format: Format,
        maker: &StoreMaker,
        scheduler: &mut Scheduler,
    ) -> Result<Store, Error> {
        let refilled = maker.make(n_rows, self.span, format)?;
        let used = self.used_rows(n_past);
        if used > 0 {
            move_rows(scheduler, store, &refilled, &[Move { from: 0..used, to: 0 }], &maker.rotations)?;
        }
        Ok(refilled)
    }

    /// The exact store for a new store's format, filled from the store of before.
    fn exact_from_store(
        &self,
        n_past: usize,
        store: &Store,
        format: Format,
        maker: &StoreMaker,
        scheduler: &mut Scheduler,
    ) -> Result<Option<Exact>, Error> {
        let Some(exact) = maker.make_exact(format)? else { return Ok(None) };
        let row = |position| self.span.map_or(position, |span| span.row(position));
        // What a ring has dropped is outside the layer's own span as well: nobody will look for it.
        let held = |position: &usize| {
            self.span
                .is_none_or(|span| *position < span.n_sink || *position >= self.held_from.max(span.held_from(n_past)))
        };
        let mut moves: Vec<Move> = Vec::new();
        for position in exact.span.kept_ranges(n_past).into_iter().flatten().filter(held) {
            let (from, to) = (row(position), exact.span.row(position));
            match moves.last_mut() {
                Some(last) if last.from.end == from && last.to + last.from.len() == to => last.from.end += 1,
                _ => moves.push(Move { from: from..from + 1, to }),
            }
        }
        move_rows(scheduler, store, &exact.store, &moves, &maker.rotations)?;
        Ok(Some(exact))
    }

    pub(super) fn used_rows(&self, n_past: usize) -> usize {
        self.span.map_or(n_past, |span| span.used_rows(n_past))
    }

    /// Rows that are read when the sequence has `n_past` tokens: those in use and some more, so that a decode graph
    /// serves many steps.
    pub fn rows_read(&self, n_past: usize) -> usize {
        let allocated = self.store.as_ref().map_or(0, Store::n_rows);
        self.used_rows(n_past).next_multiple_of(ROWS_STEP).min(allocated)
    }

    /// Makes room for the rows of `n_past + n` tokens, keeping what is there.
    pub fn reserve(
        &mut self,
        n_past: usize,
        n: usize,
        maker: &StoreMaker,
        scheduler: &mut Scheduler,
    ) -> Result<(), Error> {
        let needed = self.used_rows(n_past + n);
        match &self.store {
            Some(store) if store.n_rows() >= needed => return Ok(()),
            None => {
                self.exact = maker.make_exact(self.format)?;
                self.store = Some(maker.make(needed, self.span, self.format)?);
            }
            Some(store) => {
                let rows = Store::rows_with_room(needed).min(maker.n_ctx).max(needed);
                // Rows are positions as long as a store grows, whatever its span.
                self.store = Some(self.refilled(n_past, store, rows, self.format, maker, scheduler)?);
            }
        }
        Ok(())
    }

    /// Keeps sink and window only from now on, in the lazy format.
    pub fn make_lazy(
        &mut self,
        n_past: usize,
        span: Span,
        format: Format,
        maker: &StoreMaker,
        scheduler: &mut Scheduler,
    ) -> Result<(), Error> {
        if let Some(store) = &self.store {
            let exact = match self.exact.take() {
                Some(exact) if exact.store.format == format.exact() => Some(exact),
                _ => self.exact_from_store(n_past, store, format, maker, scheduler)?,
            };
            self.store = Some(shrunk(store, n_past, span, format, maker, scheduler)?);
            self.exact = exact;
        }
        (self.span, self.format, self.lazy) = (Some(span), format, true);
        self.held_from = span.held_from(n_past);
        Ok(())
    }

    /// A copy of the layer; with a span it is lazy. In another format where one is given.
    pub fn copy(
        &self,
        n_past: usize,
        lazy_span: Option<Span>,
        format: Option<Format>,
        maker: &StoreMaker,
        scheduler: &mut Scheduler,
    ) -> Result<LayerCache, Error> {
        let format = format.unwrap_or(self.format);
        let store = match (&self.store, lazy_span) {
            (None, _) => None,
            (Some(store), Some(span)) => Some(shrunk(store, n_past, span, format, maker, scheduler)?),
            (Some(store), None) => {
                Some(self.refilled(n_past, store, self.used_rows(n_past), format, maker, scheduler)?)
            }
        };
        let exact = match (&self.exact, &self.store) {
            (Some(exact), _) if exact.store.format == format.exact() => Some(exact.copy(maker, scheduler)?),
            (_, Some(store)) => self.exact_from_store(n_past, store, format, maker, scheduler)?,
            (_, None) => None,
        };
        let lazy = self.lazy || lazy_span.is_some();
        let held_from = lazy_span.map_or(self.held_from, |span| span.held_from(n_past));
        Ok(LayerCache { store, exact, span: lazy_span.or(self.span), held_from, lazy, score: self.score, format })
    }

    /// Whether the first `n` of `n_past` tokens can be continued from: nothing that they need was dropped.
    pub fn can_truncate(&self, n: usize, n_past: usize) -> bool {
        n >= n_past || n >= self.resumable()
    }

    /// The fewest tokens that can be continued from: nothing that the next one sees was dropped.
    pub fn resumable(&self) -> usize {
        self.span.map_or(0, |span| span.resumable(self.held_from))
    }

    pub fn report(&self, index: usize) -> LayerReport {
        let kind = match (self.lazy, self.span) {
            (true, _) => "lazy",
            (false, Some(_)) => "window",
            (false, None) => "full",
        };
        let stores = self.store.iter().chain(self.exact.as_ref().map(|exact| &exact.store));
        let kv_bytes = stores.map(Store::bytes).sum();
        let window = self.span.map(|span| span.n_window);
        LayerReport { index, score: self.score, lazy: self.lazy, kind, window, kv_bytes }
    }
}

/// A store with the rows of `store` that the span keeps of `n_past` tokens.
fn shrunk(
    store: &Store,
    n_past: usize,
    span: Span,
    format: Format,
    maker: &StoreMaker,
    scheduler: &mut Scheduler,
) -> Result<Store, Error> {
    let shrunk = maker.make(span.used_rows(n_past), Some(span), format)?;
    let moves: Vec<Move> =
        span.kept_ranges(n_past).into_iter().map(|range| Move { to: span.row(range.start), from: range }).collect();
    move_rows(scheduler, store, &shrunk, &moves, &maker.rotations)?;
    Ok(shrunk)
}
