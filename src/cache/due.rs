//! Which tiles of a store tokens finish, and where the rows of these come from.

use std::ops::Range;

use super::Span;
use crate::ggml::{Due, Source, TILE};

/// The tiles that are finished by writing the tokens at `written`, in a store that keeps this span, or everything. Beside it an
/// exact store has a span of its own, after its sink no position before the one that is given.
///
/// A tile is made when its last row is written. Until then its newest rows are in the exact store, whose window is a tile at
/// least; the others still hold, in a ring, what they held one round before. So of what a tile is made of nothing is lost: what
/// the exact store has not, because tokens were taken back, is in the tile as it is.
pub(crate) fn tiles_due(span: Option<Span>, (exact, exact_from): (Span, usize), written: Range<usize>) -> Vec<Due> {
    let row = |position: usize| span.map_or(position, |span| span.row(position));
    let ring = span.map_or(usize::MAX, |span| span.n_window + span.n_slack);
    let held_from = exact_from.max(exact.held_from(written.start));
    let source = |position: usize| match position {
        position if position >= written.start => Source::Own(position - written.start),
        position if position < exact.n_sink || position >= held_from => Source::Exact(exact.row(position)),
        _ => Source::Kept,
    };
    let ends = |position: &usize| {
        let row = row(*position);
        (row + 1).is_multiple_of(TILE) || span.is_some_and(|span| row + 1 == span.n_rows())
    };
    // Of tokens that share a row the last is kept.
    let stays = |position: &usize| position.checked_add(ring).is_none_or(|next| next >= written.end);
    let due = |last: usize| {
        let end = row(last);
        let start = end / TILE * TILE;
        let in_sink = |row: usize| span.is_some_and(|span| row < span.n_sink);
        let rows = std::array::from_fn(|i| match start + i {
            row if row > end => Source::Absent,
            row if in_sink(row) => source(row),
            row => source(last - (end - row)),
        });
        Due { tile: start / TILE, counted: exact.n_sink.saturating_sub(start).min(TILE), rows }
    };
    written.clone().filter(ends).filter(stays).map(due).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is in each row: a store of tiles, and the exact store beside it, written as a sequence grows and is cut.
    struct Stores {
        span: Option<Span>,
        exact: Span,
        tiles: Vec<Option<usize>>,
        newest: Vec<Option<usize>>,
        n_past: usize,
        exact_from: usize,
        /// The most tokens that there were.
        end: usize,
    }

    impl Stores {
        fn write(&mut self, n: usize) {
            let written = self.n_past..self.n_past + n;
            for Due { tile, rows, .. } in tiles_due(self.span, (self.exact, self.exact_from), written.clone()) {
                for (i, row) in rows.into_iter().enumerate() {
                    let at = &mut self.tiles[tile * TILE + i];
                    match row {
                        Source::Own(token) => *at = Some(written.start + token),
                        Source::Exact(row) => *at = self.newest[row],
                        Source::Kept => {}
                        Source::Absent => *at = None,
                    }
                }
            }
            for position in written {
                self.newest[self.exact.row(position)] = Some(position);
            }
            self.n_past += n;
            self.end = self.end.max(self.n_past);
        }

        fn cut(&mut self, n: usize) {
            self.exact_from = self.exact_from.max(self.exact.held_from(self.n_past)).min(n);
            self.n_past = n;
        }

        /// Every position that the next token sees is where attention looks for it.
        fn check(&self) {
            for position in 0..self.n_past {
                if self.span.is_some_and(|span| !span.sees(self.n_past, position)) {
                    continue;
                }
                let is_exact = position < self.exact.n_sink
                    || (position >= self.exact_from && position + self.exact.n_window >= self.n_past);
                let row = self.span.map_or(position, |span| span.row(position));
                let found = if is_exact { self.newest[self.exact.row(position)] } else { self.tiles[row] };
                assert_eq!(found, Some(position), "of {} tokens, exact from {}", self.n_past, self.exact_from);
            }
        }
    }

    proptest! {
        #[test]
        fn every_position_is_found(
            ring in prop::option::of((0usize..6, 1usize..5)),
            (n_sink, more, n_slack, odd) in (0usize..6, 0usize..40, 0usize..10, 0usize..TILE),
            steps in prop::collection::vec((1usize..300, 0usize..60), 1..12),
        ) {
            // `LayerPlan` has slack up to whole tiles, a state may have any.
            let odd = if odd % 2 == 0 { 0 } else { odd };
            let span = ring.map(|(n_sink, n)| Span { n_sink, n_window: n * TILE - 40, n_slack: 40 + odd, chunked: false, n_rescued: 0 });
            let exact = Span { n_sink: span.map_or(n_sink, |span| span.n_sink), n_window: TILE + more, n_slack, chunked: false, n_rescued: 0 };
            let n_rows = span.map_or(4096, |span| span.n_rows().next_multiple_of(TILE));
            let mut stores = Stores {
                span, exact, tiles: vec![None; n_rows], newest: vec![None; exact.n_rows()], n_past: 0, exact_from: 0, end: 0,
            };
            for (n, back) in steps {
                stores.write(n);
                stores.check();
                // As far as a ring lets it be cut.
                let first = span.map_or(0, |span| span.resumable(span.held_from(stores.end)));
                let n = stores.n_past.saturating_sub(back).max(first).max(1);
                if n < stores.n_past {
                    stores.cut(n);
                    stores.check();
                }
            }
        }
    }
}
