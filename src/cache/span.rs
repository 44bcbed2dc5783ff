//! Which positions a restricted layer attends to, and in which rows it keeps them.

use std::ops::Range;

/// The first `n_sink` positions and the `n_window` most recent ones, the query's own included.
///
/// A lazy layer has the policy's span; a layer that is sliding-window by design has one without a sink. The store keeps
/// `n_slack` positions before the window besides, which no query sees: the newest tokens can be taken back while the rows
/// that an earlier window needs are still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    pub n_sink: usize,
    pub n_window: usize,
    pub n_slack: usize,
    /// Whether positions come in chunks of `n_window`: a query sees of its own chunk what is before it, and nothing of the
    /// chunks before.
    pub chunked: bool,
    /// Rows of each KV head that are kept of what is older, beside the store. The rows that leave the window while several queries
    /// are computed at once become some of them only afterwards: all of these queries see what the first one's window has.
    pub n_rescued: usize,
}

impl Span {
    /// Rows that a store of this span ever needs.
    pub fn n_rows(self) -> usize {
        self.n_sink + self.ring()
    }

    /// Rows of the ring after the sink.
    pub fn ring(self) -> usize {
        self.n_window + self.n_slack
    }

    /// The first position after the sink that a store still has after `n_past` tokens were written one after the other;
    /// 0 while nothing was dropped.
    pub fn held_from(self, n_past: usize) -> usize {
        if n_past > self.n_rows() { n_past - self.ring() } else { 0 }
    }

    /// The fewest tokens that can be gone on from, where positions before `held_from` are lost: the next query sees
    /// nothing that is.
    pub fn resumable(self, held_from: usize) -> usize {
        if held_from <= self.n_sink { 0 } else { held_from + self.n_window - 1 }
    }

    /// The first position after the sink that the query at position `query` attends to.
    pub fn seen_from(self, query: usize) -> usize {
        match self.chunked {
            true => query / self.n_window * self.n_window,
            false => (query + 1).saturating_sub(self.n_window),
        }
    }

    /// The same of a query that is computed together with others, of which the first is at position `first`.
    pub fn seen_together(self, query: usize, first: usize) -> usize {
        self.seen_from(if self.n_rescued > 0 { first } else { query })
    }

    /// The first position after the sink that has not left the window of the query at position `query`: rows before it are the
    /// sink's, or among those that are rescued, or gone.
    pub fn leaves_from(self, query: usize) -> usize {
        self.seen_from(query).max(self.n_sink)
    }

    /// Whether the query at position `query` attends to `key`.
    pub fn sees(self, query: usize, key: usize) -> bool {
        key <= query && (key < self.n_sink || key >= self.seen_from(query))
    }

    /// The row of a position: the sink has rows of its own, the window and the slack are a ring after it. Until the
    /// sequence is longer than all of them, that is the position itself.
    pub fn row(self, position: usize) -> usize {
        if position < self.n_sink { position } else { self.n_sink + (position - self.n_sink) % self.ring() }
    }

    /// The rows of positions after the sink, no more than the ring has, in runs of neighbours.
    pub fn rows(self, positions: Range<usize>) -> Vec<Range<usize>> {
        debug_assert!(positions.start >= self.n_sink && positions.len() <= self.ring());
        if positions.is_empty() {
            return Vec::new();
        }
        let first = self.row(positions.start);
        let before_wrap = (self.n_rows() - first).min(positions.len());
        let wrapped = self.n_sink..self.n_sink + positions.len() - before_wrap;
        [first..first + before_wrap, wrapped].into_iter().filter(|rows| !rows.is_empty()).collect()
    }

    /// The position whose key is in `row` when the sequence has `n_past` tokens.
    pub fn position(self, row: usize, n_past: usize) -> Option<usize> {
        if row < self.n_sink {
            return (row < n_past).then_some(row);
        }
        let offset = row - self.n_sink;
        if offset >= self.ring() || self.n_sink + offset >= n_past {
            return None;
        }
        let rounds = (n_past - 1 - row) / self.ring();
        Some(row + rounds * self.ring())
    }

    /// Rows in use when the sequence has `n_past` tokens.
    pub fn used_rows(self, n_past: usize) -> usize {
        n_past.min(self.n_rows())
    }

    /// The ranges of positions that are kept of `n_past` tokens: sink, slack and window, cut so that each range lies in
    /// neighbouring rows.
    pub fn kept_ranges(self, n_past: usize) -> Vec<Range<usize>> {
        let sink = self.n_sink.min(n_past);
        let first = n_past.saturating_sub(self.ring()).max(sink);
        // The ring starts anew at the next position that falls into its first row.
        let wrap = first + (self.n_rows() - self.row(first.max(self.n_sink))).min(n_past - first);
        [0..sink, first..wrap, wrap..n_past].into_iter().filter(|range| !range.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spans() -> impl Strategy<Value = Span> {
        (0usize..6, 1usize..40, 0usize..20).prop_map(|(n_sink, n_window, n_slack)| Span {
            n_sink,
            n_window,
            n_slack,
            chunked: false,
            n_rescued: 0,
        })
    }

    /// What is held of `n_past` tokens: what a query with a window as long as the ring would see.
    fn held(span: Span, n_past: usize) -> Vec<usize> {
        let wide = Span { n_window: span.n_window + span.n_slack, ..span };
        (0..n_past).filter(|&key| wide.sees(n_past - 1, key)).collect()
    }

    proptest! {
        #[test]
        fn rows_and_positions_are_inverse(span in spans(), n_past in 0usize..200) {
            let mut kept = Vec::new();
            for row in 0..span.n_rows() {
                if let Some(position) = span.position(row, n_past) {
                    prop_assert_eq!(span.row(position), row);
                    kept.push(position);
                }
            }
            kept.sort_unstable();
            prop_assert_eq!(&kept, &held(span, n_past));
            prop_assert_eq!(kept.len(), span.used_rows(n_past));
        }

        #[test]
        fn kept_ranges_are_the_kept_positions_in_neighbouring_rows(span in spans(), n_past in 0usize..200) {
            let ranges = span.kept_ranges(n_past);
            let listed: Vec<usize> = ranges.iter().cloned().flatten().collect();
            prop_assert_eq!(listed, held(span, n_past));
            for range in ranges {
                for position in range.clone() {
                    prop_assert_eq!(span.row(position), span.row(range.start) + position - range.start);
                }
            }
        }

        /// Written to `n_past`, then cut to `n`: exactly from `resumable` on no query from `n` on sees what is lost, and it
        /// finds what it sees.
        #[test]
        fn what_can_be_gone_on_from_is_held(span in spans(), n_past in 1usize..200, n in 0usize..200) {
            prop_assume!(n <= n_past);
            let mut rows = vec![None; span.n_rows()];
            (0..n_past).for_each(|position| rows[span.row(position)] = Some(position));
            let finds_all = (0..n).all(|key| !span.sees(n, key) || rows[span.row(key)] == Some(key));
            let good = n >= span.resumable(span.held_from(n_past));
            prop_assert!(!good || finds_all);
            // A window of the query alone needs nothing of the ring.
            if n > span.n_sink && span.n_window > 1 {
                prop_assert_eq!(good, finds_all);
            }
            // A stale row is never taken for a position that is seen.
            if good {
                for (row, &stale) in rows.iter().enumerate() {
                    if let Some(position) = span.position(row, n).filter(|&position| span.sees(n, position)) {
                        prop_assert_eq!(stale, Some(position));
                    }
                }
            }
        }

        #[test]
        fn rows_of_a_range_are_its_positions_rows(span in spans(), n_past in 0usize..200) {
            let first = n_past.saturating_sub(span.n_window).max(span.n_sink).min(n_past.max(span.n_sink));
            let positions = first..n_past.max(first);
            let listed: Vec<usize> = span.rows(positions.clone()).into_iter().flatten().collect();
            let expected: Vec<usize> = positions.map(|position| span.row(position)).collect();
            prop_assert_eq!(listed, expected);
        }

        #[test]
        fn a_short_sequence_is_seen_whole(span in spans(), query in 0usize..40) {
            prop_assume!(query < span.n_rows());
            // Not longer than sink and window: nothing is dropped, and rows are positions.
            for key in 0..=query {
                prop_assert_eq!(span.row(key), key);
            }
            if query < span.n_window {
                prop_assert!((0..=query).all(|key| span.sees(query, key)));
            }
        }
    }

    #[test]
    fn the_window_counts_the_query() {
        let span = Span { n_sink: 2, n_window: 3, n_slack: 4, chunked: false, n_rescued: 0 };
        let seen: Vec<usize> = (0..12).filter(|&key| span.sees(10, key)).collect();
        assert_eq!(seen, [0, 1, 8, 9, 10]);
    }

    #[test]
    fn chunks_are_seen_up_to_the_query() {
        let span = Span { n_sink: 0, n_window: 4, n_slack: 0, chunked: true, n_rescued: 0 };
        let seen = |query: usize| (0..20).filter(|&key| span.sees(query, key)).collect::<Vec<_>>();
        assert_eq!(seen(3), [0, 1, 2, 3]);
        assert_eq!(seen(4), [4]);
        assert_eq!(seen(6), [4, 5, 6]);
        // A ring of a window holds all of it.
        let window = Span { chunked: false, ..span };
        assert!((0..20).all(|query| seen(query).iter().all(|&key| window.sees(query, key))));
    }
}
