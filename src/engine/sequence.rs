use serde::Serialize;

use crate::{
    cache::{Format, Meter, Move, Rotations, Span, Store, move_rows},
    ggml::{BufferType, Error, Scheduler},
};

/// One sequence's cache.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Tokens in the cache; the next one's position.
    pub n_past: usize,
    pub layers: Vec<LayerCache>,
    /// Whether the next token's attention is to be scored (`--lazy-at decode`).
    pub score_next: bool,
}

/// One layer's cache in a sequence.
#[derive(Debug)]
pub(super) struct LayerCache {
    store: Option<Store>,
    /// `None` keeps every position.
    span: Option<Span>,
    /// Whether the policy made it lazy; a layer that is sliding-window by design has a span and is not lazy.
    pub lazy: bool,
    pub score: Option<f32>,
    format: Format,
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
    /// Bytes of its buffers.
    pub kv_bytes: usize,
}

/// What stores are made of and from: the same for all layers of a session.
#[derive(Debug)]
pub(super) struct StoreMaker {
    /// Elements of a token's keys in one layer: head size × KV heads.
    pub width: usize,
    pub memory: BufferType,
    pub meter: Meter,
    pub rotations: Rotations,
    /// Rows that a store never needs to exceed.
    pub n_ctx: usize,
}

impl StoreMaker {
    pub fn make(&self, n_rows: usize, span: Option<Span>, format: Format) -> Result<Store, Error> {
        Store::new(self.width, n_rows, span.map(Span::n_rows), format, self.memory, &self.meter)
    }
}

impl LayerCache {
    pub fn new(span: Option<Span>, lazy: bool, format: Format) -> LayerCache {
        LayerCache { store: None, span, lazy, score: None, format }
    }

    pub fn span(&self) -> Option<Span> {
        self.span
    }

    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
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
            let used = self.used_rows(n_past);
            let store = maker.make(used, self.span, self.format)?;
            move_rows(scheduler, &scratch, &store, &[Move { from: 0..used, to: 0 }], &maker.rotations)?;
            self.store = Some(store);
        }
        Ok(())
    }

    fn used_rows(&self, n_past: usize) -> usize {
        self.span.map_or(n_past, |span| span.used_rows(n_past))
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
            None => self.store = Some(maker.make(needed, self.span, self.format)?),
            Some(store) => {
                let rows = Store::rows_with_room(needed).min(maker.n_ctx).max(needed);
                let larger = maker.make(rows, self.span, self.format)?;
                let used = self.used_rows(n_past);
                if used > 0 {
                    // Rows are positions as long as a store grows, whatever its span.
                    let moves = [Move { from: 0..used, to: 0 }];
                    move_rows(scheduler, store, &larger, &moves, &maker.rotations)?;
                }
                self.store = Some(larger);
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
            self.store = Some(shrunk(store, n_past, span, format, maker, scheduler)?);
        }
        (self.span, self.format, self.lazy) = (Some(span), format, true);
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
                let used = self.used_rows(n_past);
                let copy = maker.make(used, self.span, format)?;
                move_rows(scheduler, store, &copy, &[Move { from: 0..used, to: 0 }], &maker.rotations)?;
                Some(copy)
            }
        };
        let lazy = self.lazy || lazy_span.is_some();
        Ok(LayerCache { store, span: lazy_span.or(self.span), lazy, score: self.score, format })
    }

    /// Whether the first `n` of `n_past` tokens can be continued from: nothing that they need was dropped.
    pub fn can_truncate(&self, n: usize, n_past: usize) -> bool {
        n >= n_past || self.span.is_none_or(|span| n_past <= span.n_rows())
    }

    pub fn report(&self, index: usize) -> LayerReport {
        let kind = match (self.lazy, self.span) {
            (true, _) => "lazy",
            (false, Some(_)) => "window",
            (false, None) => "full",
        };
        let kv_bytes = self.store.as_ref().map_or(0, Store::bytes);
        LayerReport { index, score: self.score, lazy: self.lazy, kind, kv_bytes }
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
