//! Rescued rows: a lazy layer keeps, beside sink and window, older rows of each KV head that later tokens will look for.
//!
//! By the map that pruning goes by ([`PruneMap`](crate::lazy::PruneMap)) each row has a score when it is written, beside the ring. A row that
//! has left the window competes with the weakest row of its head ([`Rescued`]). Every later query sees what is listed, so that no
//! mask is needed, and each row is seen once: from the window while it is there, which for tokens that are computed together is that of
//! the first of them, afterwards from the list, or not any more.
//!
//! What is listed follows from the number of tokens: it is settled before rows are written, however far the sequence was cut
//! meanwhile, as far as the ring has the rows that must be given up. States, marks and checkpoints have what was listed when their
//! ring's first row was the next to leave; all behind it competes anew.

use std::{ops::Range, slice};

use super::{
    layer::{At, Begun, LayerCache, Leaving, ScoredRows},
    setup::LayerSetup,
};
use crate::{
    cache::{Format, HeadLists, Listed, Rescued, Span, Store},
    ggml::{self, Scheduler},
};

/// Rows that are looked at together, so that what is copied meanwhile stays small.
const PIECE: usize = 1024;

impl LayerCache {
    /// The rows that each KV head has besides the store, where there are any.
    pub fn lists(&self) -> Option<&HeadLists> {
        self.rescued.as_ref().map(Rescued::lists).or(self.pruned.as_ref())
    }

    /// The span of a layer that rescues rows.
    pub fn rescuing(&self) -> Option<Span> {
        self.span.filter(|span| span.n_rescued > 0)
    }

    /// Lists what is due in a sequence of `n_past` tokens: what has left the window since competes, and what is within it again goes
    /// back. What is listed is right for fewer tokens after an error.
    pub fn rescue(&mut self, n_past: usize, setup: &LayerSetup) -> Result<(), ggml::Error> {
        let (Some(span), Some(store)) = (self.rescuing(), &self.store) else { return Ok(()) };
        let end = span.leaves_from(n_past);
        if self.rescued.is_none() && end > span.n_sink {
            self.rescued = Some(setup.make_rescued(store.format(), span)?);
        }
        let held_from = self.held_from;
        if let Some(mut rescued) = self.rescued.take() {
            let settled = match rescued.end() > end {
                true => rescued.back_to(end),
                false => self.compete(&mut rescued, end),
            };
            rescued.forget(held_from);
            self.rescued = Some(rescued);
            settled?;
        }
        self.leaving = None;
        Ok(())
    }

    /// Lets the rows before `end` compete that have not yet.
    fn compete(&self, rescued: &mut Rescued, end: usize) -> Result<(), ggml::Error> {
        if let Some(Leaving { positions, rows: (rows, scores) }) = &self.leaving
            && positions.contains(&rescued.end())
        {
            rescued.compete(positions.clone(), rows, scores, self.held_from)?;
        }
        if rescued.end() >= end {
            return Ok(());
        }
        let positions = rescued.end()..end;
        let (rows, scores) = self.leaving_rows(positions.clone(), n_heads(rescued));
        rescued.compete(positions, &rows, &scores, self.held_from)
    }

    /// Rows of the ring, with a score for each of the KV heads: of those of which nothing is known, one that is no number.
    fn leaving_rows(&self, positions: Range<usize>, heads: usize) -> ScoredRows {
        let n = positions.len() * heads;
        let (rows, mut scores) = self.rows(positions);
        scores.resize(n, f32::NAN);
        (rows, scores)
    }

    /// Called before rows of these positions are written: keeps those that the ring loses by it before they have competed.
    pub fn keep_leaving(&mut self, positions: Range<usize>, setup: &LayerSetup) {
        self.leaving = None;
        let Some(span) = self.rescuing().filter(|_| self.store.is_some()) else { return };
        let leaving = span.leaves_from(positions.start)..span.held_from(positions.end);
        if !leaving.is_empty() {
            let rows = self.leaving_rows(leaving.clone(), setup.plan.rows.heads);
            self.leaving = Some(Leaving { positions: leaving, rows });
        }
    }

    /// What the layer, which keeps all and becomes lazy with this ring, has of the rows that the ring has not. Nothing where no scores
    /// are known.
    pub fn begin_rescuing(
        &self,
        at: At,
        ring: &Store,
        setup: &LayerSetup,
        scheduler: &mut Scheduler,
    ) -> Result<Begun, ggml::Error> {
        let (span, format) = (setup.plan.lazy_span, setup.plan.lazy);
        let (Some(store), Some(scores), true) = (&self.store, &self.scores, span.n_rescued > 0) else {
            return Ok(Begun { rescued: None, scores: None });
        };
        let end = span.held_from(at.n_past);
        let mut rescued = None;
        if end > span.n_sink {
            let mut found = setup.make_rescued(store.format(), span)?;
            for start in (span.n_sink..end).step_by(PIECE) {
                let piece = start..end.min(start + PIECE);
                let mut rows = Vec::new();
                store.read_rows(slice::from_ref(&piece), &mut rows);
                found.compete(piece.clone(), &rows, &scores.read(piece), usize::MAX)?;
            }
            rescued = Some(converted(found, format, setup, scheduler)?);
        }
        let of_ring = setup.make_scores(ring.n_rows())?;
        for kept in span.kept_ranges(at.n_past) {
            of_ring.write(span.row(kept.start), &scores.read(kept));
        }
        Ok(Begun { rescued, scores: Some(of_ring) })
    }

    /// Brings what is listed into the format that the layer's rows get; it is then what it was when the ring's first row was the next
    /// to leave.
    pub fn convert_rescued(&mut self, setup: &LayerSetup, scheduler: &mut Scheduler) -> Result<(), ggml::Error> {
        let (Some(span), Some(mut rescued)) = (self.span, self.rescued.take()) else { return Ok(()) };
        rescued.back_to(self.held_from.max(span.n_sink))?;
        self.rescued = Some(converted(rescued, self.format, setup, scheduler)?);
        Ok(())
    }

    /// What was listed when the row of this position, which the ring has, was the next to leave.
    pub fn listed_at(&self, position: usize) -> Option<Listed> {
        let (span, rescued) = (self.rescuing()?, self.rescued.as_ref()?);
        Some(rescued.at(position.max(span.n_sink)))
    }

    /// How many rows [`LayerCache::listed_at`] has of each KV head.
    pub fn n_listed_at(&self, position: usize) -> Option<Vec<usize>> {
        let (span, rescued) = (self.rescuing()?, self.rescued.as_ref()?);
        Some(rescued.counts_at(position.max(span.n_sink)))
    }

    /// Puts back what [`LayerCache::listed_at`] gave: into rows that are no other sequence's.
    pub fn put_listed(&mut self, position: usize, listed: Option<&Listed>) {
        let (Some(span), Some(rescued)) = (self.rescuing(), &mut self.rescued) else { return };
        let empty = Listed { scores: vec![Vec::new(); n_heads(rescued)], rows: Vec::new() };
        rescued.put(position.max(span.n_sink), listed.unwrap_or(&empty));
        self.leaving = None;
    }
}

/// KV heads of lists.
fn n_heads(rescued: &Rescued) -> usize {
    rescued.lists().counts().count()
}

/// The same in another format, if it is one.
fn converted(
    rescued: Rescued,
    format: Format,
    setup: &LayerSetup,
    scheduler: &mut Scheduler,
) -> Result<Rescued, ggml::Error> {
    if rescued.lists().format() == format { Ok(rescued) } else { rescued.converted(format, scheduler, setup.moving()) }
}

impl LayerSetup {
    /// Lists of rescued rows, without any yet, for a layer of this span.
    pub fn make_rescued(&self, format: Format, span: Span) -> Result<Rescued, ggml::Error> {
        let most = span.n_rescued.min(self.n_ctx);
        Rescued::new(self.make_lists(format), most, span.n_sink, self.meter())
    }
}
