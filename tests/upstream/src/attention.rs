//! The two readings of SimLayerKV's definition that need attention probabilities, in their plainest
//! form: over the full softmax matrix that llama.cpp computes without flash attention.

use std::ops::Range;

use crate::llama::{AttentionHook, SoftMax};

/// The keys that a lazy layer keeps for the query at `pos`: `j < sink` or `j > pos - window`.
/// Returns the two ranges, disjoint, within `0..=pos`.
pub fn kept(pos: usize, sink: usize, window: usize) -> (Range<usize>, Range<usize>) {
    let sink_end = sink.min(pos + 1);
    let window_start = (pos + 1).saturating_sub(window).max(sink_end);
    (0..sink_end, window_start..pos + 1)
}

/// Sums up the attention mass on sink and window of the last prompt tokens.
pub struct MassSums {
    sink: usize,
    windows: Vec<usize>,
    lasts: Vec<usize>,
    n_prompt: usize,
    /// `[window][last][layer]`: sum of the masses, and over how many rows.
    sums: Vec<Vec<Vec<(f64, u64)>>>,
}

impl MassSums {
    pub fn new(n_layer: usize, n_prompt: usize, sink: usize, windows: Vec<usize>, lasts: Vec<usize>) -> Self {
        let sums = vec![vec![vec![(0.0, 0); n_layer]; lasts.len()]; windows.len()];
        Self { sink, windows, lasts, n_prompt, sums }
    }

    /// `(window, last, mean mass per layer)`; a layer without attention has none.
    pub fn means(&self) -> impl Iterator<Item = (usize, usize, Vec<Option<f64>>)> + '_ {
        self.windows.iter().zip(&self.sums).flat_map(move |(&window, by_last)| {
            self.lasts.iter().zip(by_last).map(move |(&last, layers)| {
                let mean = |&(sum, n): &(f64, u64)| (n > 0).then(|| sum / n as f64);
                (window, last, layers.iter().map(mean).collect())
            })
        })
    }
}

impl AttentionHook for MassSums {
    fn wants(&self, _: usize, positions: Range<usize>) -> bool {
        let n_last = self.lasts.iter().max().copied().unwrap_or(0);
        positions.end + n_last > self.n_prompt
    }

    fn attend(&mut self, layer: usize, softmax: &mut SoftMax) -> bool {
        for head in 0..softmax.n_head() {
            for pos in softmax.positions() {
                let row = softmax.row(head, pos);
                for (w, &window) in self.windows.iter().enumerate() {
                    let (sink, recent) = kept(pos, self.sink, window);
                    let sum = |keys: Range<usize>| row[keys].iter().map(|&p| p as f64).sum::<f64>();
                    let mass = sum(sink) + sum(recent);
                    for (l, &last) in self.lasts.iter().enumerate() {
                        if pos + last >= self.n_prompt {
                            let (total, n) = &mut self.sums[w][l][layer];
                            *total += mass;
                            *n += 1;
                        }
                    }
                }
            }
        }
        false
    }
}

/// Restricts some layers to sink and window, by editing the probabilities.
pub struct Restriction {
    /// Indexed by layer.
    pub layers: Vec<bool>,
    pub sink: usize,
    pub window: usize,
    /// Queries before this position stay as they are.
    pub from: usize,
}

impl AttentionHook for Restriction {
    fn wants(&self, layer: usize, positions: Range<usize>) -> bool {
        self.layers.get(layer) == Some(&true) && positions.end > self.from
    }

    fn attend(&mut self, _: usize, softmax: &mut SoftMax) -> bool {
        let positions = softmax.positions();
        for head in 0..softmax.n_head() {
            for pos in positions.start.max(self.from)..positions.end {
                restrict(softmax.row(head, pos), self.sink, self.window);
            }
        }
        true
    }
}

/// What a row may lack of a sum of 1 by rounding. A model with learned sinks lacks more: these get
/// probability as well, and are no keys.
const ROUNDING: f64 = 1e-5;

/// Zeroes what lies outside sink and window and scales the rest, with what learned sinks get, to a
/// sum of 1. `row` holds the probabilities of the keys 0 to the query's own position.
fn restrict(row: &mut [f32], sink: usize, window: usize) {
    let (sink, recent) = kept(row.len() - 1, sink, window);
    if sink.end == recent.start {
        return;
    }
    let sum = |row: &[f32]| row.iter().map(|&p| p as f64).sum::<f64>();
    let learned = Some(1.0 - sum(row)).filter(|&lacking| lacking > ROUNDING).unwrap_or(0.0);
    row[sink.end..recent.start].fill(0.0);
    let sum = sum(row) + learned;
    if sum > 0.0 {
        row.iter_mut().for_each(|p| *p = (*p as f64 / sum) as f32);
    } else {
        // All of it lay outside, beyond f32's range: the softmax over what is kept is not known,
        // and an even one is as good as any.
        let n = (sink.len() + recent.len()) as f32;
        row[sink].fill(1.0 / n);
        row[recent].fill(1.0 / n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_counts_each_key_once() {
        for pos in 0..40 {
            for sink in 0..8 {
                for window in 1..12 {
                    let (a, b) = kept(pos, sink, window);
                    let keys: Vec<usize> = a.chain(b).collect();
                    let expected: Vec<usize> =
                        (0..=pos).filter(|&j| j < sink || j as i64 > pos as i64 - window as i64).collect();
                    assert_eq!(keys, expected, "pos {pos} sink {sink} window {window}");
                }
            }
        }
    }

    #[test]
    fn restrict_zeroes_and_renormalises() {
        let mut row = [0.1, 0.2, 0.3, 0.1, 0.1, 0.2];
        restrict(&mut row, 1, 2);
        let expected = [0.25, 0.0, 0.0, 0.0, 0.25, 0.5];
        for (got, want) in row.iter().zip(expected) {
            assert!((got - want).abs() < 1e-6, "{row:?}");
        }
    }

    #[test]
    fn learned_sinks_keep_their_odds() {
        // A tenth went to a learned sink; with 0.3 of the keys left it is a quarter.
        let mut row = [0.1, 0.2, 0.3, 0.1, 0.1, 0.1];
        restrict(&mut row, 1, 2);
        let expected = [0.25, 0.0, 0.0, 0.0, 0.25, 0.25];
        for (got, want) in row.iter().zip(expected) {
            assert!((got - want).abs() < 1e-6, "{row:?}");
        }
    }

    #[test]
    fn a_short_row_is_left_alone() {
        let mut row = [0.5, 0.25, 0.25];
        restrict(&mut row, 1, 2);
        assert_eq!(row, [0.5, 0.25, 0.25]);
    }
}
