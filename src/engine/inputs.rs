//! A graph's input tensors and what they are filled with before each run.

use crate::{
    cache::Span,
    ggml::{Graph, Tensor, Type},
    vocab::Token,
};

/// The tokens of one sequence in a ubatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Index of its first token in the ubatch.
    pub first: usize,
    pub n: usize,
    /// Tokens of the sequence before these.
    pub n_past: usize,
    /// Last tokens of these whose attention is scored; 0 for none.
    pub n_score: usize,
}

/// What an input tensor holds.
#[derive(Debug, Clone, PartialEq)]
enum Fill {
    /// Token ids of the ubatch.
    Tokens,
    /// Positions of the ubatch's tokens.
    Positions,
    /// Numbers of the rows that outputs are wanted of.
    Outputs,
    /// The rows into which a part's tokens are written.
    Rows { part: usize, span: Option<Span> },
    /// Which of a store's `n_rows` rows each token of a part sees.
    Mask { part: usize, span: Option<Span>, n_rows: usize },
    /// As `Mask`, where the part's own keys lie behind the `n_old` rows of a ring that does not hold them yet.
    MaskBehindRing { part: usize, span: Span, n_old: usize },
    /// 1 where the scored queries of a part see a key that `span` keeps, else 0.
    Kept { part: usize, span: Span, n_rows: usize },
}

/// The inputs of a graph under construction, and later of its runs. Each distinct one exists once.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    inputs: Vec<(Tensor, Fill)>,
    mask: Vec<u16>,
    floats: Vec<f32>,
}

const VISIBLE: u16 = 0;
/// Minus infinity in f16.
const HIDDEN: u16 = 0xfc00;

impl Inputs {
    fn input(&mut self, graph: &Graph, ty: Type, shape: &[usize], fill: Fill) -> Tensor {
        if let Some((tensor, _)) = self.inputs.iter().find(|(_, other)| *other == fill) {
            return tensor.clone();
        }
        let tensor = graph.input(ty, shape);
        self.inputs.push((tensor.clone(), fill));
        tensor
    }

    pub fn tokens(&mut self, graph: &Graph, n: usize) -> Tensor {
        self.input(graph, Type::I32, &[n], Fill::Tokens)
    }

    pub fn positions(&mut self, graph: &Graph, n: usize) -> Tensor {
        self.input(graph, Type::I32, &[n], Fill::Positions)
    }

    pub fn outputs(&mut self, graph: &Graph, n: usize) -> Tensor {
        self.input(graph, Type::I32, &[n], Fill::Outputs)
    }

    pub fn rows(&mut self, graph: &Graph, n: usize, part: usize, span: Option<Span>) -> Tensor {
        self.input(graph, Type::I64, &[n], Fill::Rows { part, span })
    }

    pub fn mask(&mut self, graph: &Graph, n: usize, part: usize, span: Option<Span>, n_rows: usize) -> Tensor {
        self.input(graph, Type::F16, &[n_rows, n], Fill::Mask { part, span, n_rows })
    }

    pub fn mask_behind_ring(&mut self, graph: &Graph, n: usize, part: usize, span: Span, n_old: usize) -> Tensor {
        self.input(graph, Type::F16, &[n_old + n, n], Fill::MaskBehindRing { part, span, n_old })
    }

    pub fn kept(&mut self, graph: &Graph, n_score: usize, part: usize, span: Span, n_rows: usize) -> Tensor {
        self.input(graph, Type::F32, &[n_rows, n_score], Fill::Kept { part, span, n_rows })
    }

    /// Fills every input that the graph really reads.
    pub fn fill(&mut self, parts: &[Part], tokens: &[Token], outputs: &[i32]) {
        let Inputs { inputs, mask, floats } = self;
        for (tensor, fill) in inputs.iter().filter(|(tensor, _)| tensor.is_allocated()) {
            match *fill {
                Fill::Tokens => tensor.write(0, tokens),
                Fill::Positions => {
                    let positions = parts.iter().flat_map(|part| part.n_past..part.n_past + part.n);
                    tensor.write(0, &positions.map(|position| position as i32).collect::<Vec<_>>());
                }
                Fill::Outputs => tensor.write(0, outputs),
                Fill::Rows { part, span } => {
                    let Part { n, n_past, .. } = parts[part];
                    let row = |position| span.map_or(position, |span| span.row(position)) as i64;
                    tensor.write(0, &(n_past..n_past + n).map(row).collect::<Vec<_>>());
                }
                Fill::Mask { part, span, n_rows } => {
                    fill_mask(mask, &parts[part], span, n_rows);
                    tensor.write(0, mask);
                }
                Fill::MaskBehindRing { part, span, n_old } => {
                    fill_mask_behind_ring(mask, &parts[part], span, n_old);
                    tensor.write(0, mask);
                }
                Fill::Kept { part, span, n_rows } => {
                    fill_kept(floats, &parts[part], span, n_rows);
                    tensor.write(0, floats);
                }
            }
        }
    }
}

/// Rows hold what they hold once the part's own tokens are written: in a ring only for a part of one token.
fn fill_mask(mask: &mut Vec<u16>, part: &Part, span: Option<Span>, n_rows: usize) {
    mask.clear();
    mask.resize(n_rows * part.n, HIDDEN);
    for (row, query) in mask.chunks_exact_mut(n_rows).zip(part.n_past..) {
        match span {
            None => row[..=query].fill(VISIBLE),
            Some(span) => {
                for (i, cell) in row.iter_mut().enumerate() {
                    if span.position(i, part.n_past + part.n).is_some_and(|key| span.sees(query, key)) {
                        *cell = VISIBLE;
                    }
                }
            }
        }
    }
}

fn fill_mask_behind_ring(mask: &mut Vec<u16>, part: &Part, span: Span, n_old: usize) {
    let n_rows = n_old + part.n;
    mask.clear();
    mask.resize(n_rows * part.n, HIDDEN);
    let old: Vec<Option<usize>> = (0..n_old).map(|row| span.position(row, part.n_past)).collect();
    for (row, query) in mask.chunks_exact_mut(n_rows).zip(part.n_past..) {
        let (ring, own) = row.split_at_mut(n_old);
        for (cell, key) in ring.iter_mut().zip(&old) {
            if key.is_some_and(|key| span.sees(query, key)) {
                *cell = VISIBLE;
            }
        }
        for (cell, key) in own.iter_mut().zip(part.n_past..) {
            if span.sees(query, key) {
                *cell = VISIBLE;
            }
        }
    }
}

fn fill_kept(kept: &mut Vec<f32>, part: &Part, span: Span, n_rows: usize) {
    kept.clear();
    kept.resize(n_rows * part.n_score, 0.0);
    let first = part.n_past + part.n - part.n_score;
    for (row, query) in kept.chunks_exact_mut(n_rows).zip(first..) {
        for (key, cell) in row.iter_mut().enumerate() {
            if span.sees(query, key) {
                *cell = 1.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the batch and however often the ring has wrapped, a query sees exactly its span, each key once.
        #[test]
        fn masks_show_exactly_the_span(n_sink in 0usize..5, n_window in 1usize..20, n_past in 0usize..60, n in 1usize..30) {
            let span = Span { n_sink, n_window };
            let part = Part { first: 0, n, n_past, n_score: 0 };
            let n_old = span.used_rows(n_past);
            let mut mask = Vec::new();
            fill_mask_behind_ring(&mut mask, &part, span, n_old);
            for (row, query) in mask.chunks_exact(n_old + n).zip(n_past..) {
                let keys = |row: usize| if row < n_old { span.position(row, n_past) } else { Some(n_past + row - n_old) };
                let mut seen: Vec<usize> =
                    (0..row.len()).filter(|&i| row[i] == VISIBLE).map(|i| keys(i).expect("a key")).collect();
                seen.sort_unstable();
                let expected: Vec<usize> = (0..=query).filter(|&key| span.sees(query, key)).collect();
                prop_assert_eq!(seen, expected);
            }
        }

        /// A single token reads the ring after it was written.
        #[test]
        fn a_single_token_sees_its_span_in_the_ring(n_sink in 0usize..5, n_window in 1usize..20, n_past in 0usize..80) {
            let span = Span { n_sink, n_window };
            let part = Part { first: 0, n: 1, n_past, n_score: 0 };
            let mut mask = Vec::new();
            fill_mask(&mut mask, &part, Some(span), span.n_rows());
            let mut seen: Vec<usize> = (0..mask.len())
                .filter(|&row| mask[row] == VISIBLE)
                .map(|row| span.position(row, n_past + 1).expect("a key"))
                .collect();
            seen.sort_unstable();
            let expected: Vec<usize> = (0..=n_past).filter(|&key| span.sees(n_past, key)).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn full_masks_are_causal(n_past in 0usize..50, n in 1usize..20, slack in 0usize..40) {
            let n_rows = n_past + n + slack;
            let mut mask = Vec::new();
            fill_mask(&mut mask, &Part { first: 0, n, n_past, n_score: 0 }, None, n_rows);
            for (row, query) in mask.chunks_exact(n_rows).zip(n_past..) {
                for (key, &cell) in row.iter().enumerate() {
                    prop_assert_eq!(cell == VISIBLE, key <= query);
                }
            }
        }
    }
}
