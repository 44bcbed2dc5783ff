//! Which positions a restricted layer attends to, and in which rows it keeps them.

/// The first `n_sink` positions and the `n_window` most recent ones, the query's own included.
///
/// A lazy layer has the policy's span; a layer that is sliding-window by design has one without a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    pub n_sink: usize,
    pub n_window: usize,
}

impl Span {
    /// Rows that a store of this span ever needs.
    pub fn n_rows(self) -> usize {
        self.n_sink + self.n_window
    }

    /// Whether the query at position `query` attends to `key`.
    pub fn sees(self, query: usize, key: usize) -> bool {
        key <= query && (key < self.n_sink || key + self.n_window > query)
    }

    /// The row of a position: the sink has rows of its own, the window is a ring behind it. Until the sequence is
    /// longer than sink and window, that is the position itself.
    pub fn row(self, position: usize) -> usize {
        if position < self.n_sink { position } else { self.n_sink + (position - self.n_sink) % self.n_window }
    }

    /// The position whose key is in `row` when the sequence has `n_past` tokens.
    pub fn position(self, row: usize, n_past: usize) -> Option<usize> {
        if row < self.n_sink {
            return (row < n_past).then_some(row);
        }
        let offset = row - self.n_sink;
        if offset >= self.n_window || self.n_sink + offset >= n_past {
            return None;
        }
        let rounds = (n_past - 1 - row) / self.n_window;
        Some(row + rounds * self.n_window)
    }

    /// Rows in use when the sequence has `n_past` tokens.
    pub fn used_rows(self, n_past: usize) -> usize {
        n_past.min(self.n_rows())
    }

    /// The ranges of positions that are kept of `n_past` tokens: sink and window, cut so that each range lies in
    /// neighbouring rows.
    pub fn kept_ranges(self, n_past: usize) -> Vec<std::ops::Range<usize>> {
        let sink = self.n_sink.min(n_past);
        let first = n_past.saturating_sub(self.n_window).max(sink);
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
        (0usize..6, 1usize..40).prop_map(|(n_sink, n_window)| Span { n_sink, n_window })
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
            let expected: Vec<usize> = (0..n_past).filter(|&key| span.sees(n_past - 1, key)).collect();
            prop_assert_eq!(&kept, &expected);
            prop_assert_eq!(kept.len(), span.used_rows(n_past));
        }

        #[test]
        fn kept_ranges_are_the_kept_positions_in_neighbouring_rows(span in spans(), n_past in 0usize..200) {
            let ranges = span.kept_ranges(n_past);
            let listed: Vec<usize> = ranges.iter().cloned().flatten().collect();
            let expected: Vec<usize> = (0..n_past).filter(|&key| span.sees(n_past - 1, key)).collect();
            prop_assert_eq!(listed, expected);
            for range in ranges {
                for position in range.clone() {
                    prop_assert_eq!(span.row(position), span.row(range.start) + position - range.start);
                }
            }
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
        let span = Span { n_sink: 2, n_window: 3 };
        let seen: Vec<usize> = (0..12).filter(|&key| span.sees(10, key)).collect();
        assert_eq!(seen, [0, 1, 8, 9, 10]);
    }
}
