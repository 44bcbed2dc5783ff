//! What is kept of a layer's ring beside it, so that one can go back to where it was.

use std::ops::Range;

use super::{
    layer::{LayerCache, whole},
    setup::BACK,
};
use crate::cache::{Format, Listed, Span};

/// What a ring has, for whoever goes back to there.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// The first position after the sink of which there is a row.
    pub from: usize,
    pub rows: Vec<u8>,
    /// Those of the rows, where they have some.
    pub scores: Vec<f32>,
    /// What was rescued of the rows before, if anything.
    pub listed: Option<Listed>,
}

impl Ring {
    pub fn bytes(&self) -> usize {
        self.rows.len() + size_of_val(&self.scores[..]) + self.listed.as_ref().map_or(0, Listed::bytes)
    }
}

impl LayerCache {
    /// The first position after the sink that a checkpoint of `n` tokens has of the ring.
    pub fn ring_from(&self, n: usize) -> usize {
        let Some(span) = self.span else { return 0 };
        self.held_from.max(n.saturating_sub(span.n_window + BACK)).max(span.n_sink).min(n.max(span.n_sink))
    }

    /// The sink's rows of `n` tokens, and those of the ring from a position on.
    pub fn ring_ranges(span: Span, format: Format, n: usize, from: usize) -> Vec<Range<usize>> {
        let sink = 0..span.n_sink.min(n);
        let ranges = std::iter::once(sink).chain(span.rows(from..n.max(from)));
        whole(ranges.filter(|rows| !rows.is_empty()).collect(), format)
    }

    /// What must be kept to go on from `n` tokens later, or from a few before: see [`LayerCache::ring_from`].
    pub fn ring_rows(&self, n: usize) -> Ring {
        let (Some(span), Some(store)) = (self.span, &self.store) else { return Ring::default() };
        let from = self.ring_from(n);
        let mut rows = Vec::new();
        let ranges = LayerCache::ring_ranges(span, store.format(), n, from);
        store.read_rows(&ranges, &mut rows);
        Ring { from, rows, scores: self.scores_of(&ranges), listed: self.listed_at(from) }
    }

    /// Puts the rows of [`LayerCache::ring_ranges`] back, after [`LayerCache::own_kept`].
    pub fn put_ring_rows(&mut self, n: usize, ring: &Ring) {
        let (Some(span), Some(store)) = (self.span, &self.store) else { return };
        let ranges = LayerCache::ring_ranges(span, store.format(), n, ring.from);
        store.write_rows(&ranges, &ring.rows);
        self.put_scores(&ranges, &ring.scores);
        self.put_listed(ring.from, ring.listed.as_ref());
        self.held_from = if ring.from <= span.n_sink { 0 } else { ring.from };
    }
}
