//! A graph's input tensors and what they are filled with before each run.

use std::ops::Range;

use super::batch::{Embeddings, Fed, Part};
use crate::{
    cache::{Slots, Span, tiles_due},
    ggml::{Device, Due, Graph, TILE, Tensor, Type},
};

/// Rows of keys that a part's tokens attend to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Keys {
    /// The first `n_rows` rows of a layer's store, with the part's own tokens in it or not. What the layer's exact
    /// store holds is hidden here.
    ///
    /// Without a span the first row is that of position `from`.
    Stored { span: Option<Span>, from: usize, n_rows: usize, has_own: bool, exact: Option<Span> },
    /// All rows of a layer's exact store.
    Exact { span: Option<Span>, exact: Span, has_own: bool },
    /// The first `n_rows` rows of a store that holds all tokens, of which queries are to see this span. What the layer's exact
    /// store holds is hidden here.
    All { span: Option<Span>, n_rows: usize, exact: Option<Span> },
    /// The part's own tokens.
    Own { span: Option<Span>, n: usize },
}

impl Keys {
    pub fn n_rows(self) -> usize {
        match self {
            Keys::Stored { n_rows, .. } | Keys::All { n_rows, .. } => n_rows,
            Keys::Exact { exact, .. } => exact.n_rows(),
            Keys::Own { n, .. } => n,
        }
    }

    /// What the layer lets a query see; `None` for everything before it.
    fn span(self) -> Option<Span> {
        match self {
            Keys::Stored { span, .. } | Keys::All { span, .. } | Keys::Exact { span, .. } | Keys::Own { span, .. } => {
                span
            }
        }
    }

    /// The position whose key is in a row, unless it is to be found elsewhere.
    fn position(self, row: usize, part: &Part) -> Option<usize> {
        let end = |has_own| part.n_past + if has_own { part.n } else { 0 };
        match self {
            Keys::Stored { span, from, has_own, exact, .. } => {
                let end = end(has_own);
                let position = match span {
                    Some(span) => span.position(row, end),
                    None => (from + row < end).then_some(from + row),
                };
                position.filter(|&position| exact.is_none_or(|exact| !is_exact(exact, position, end, part)))
            }
            Keys::Exact { exact, has_own, .. } => {
                let end = end(has_own);
                exact.position(row, end).filter(|&position| is_exact(exact, position, end, part))
            }
            Keys::All { exact, .. } => {
                let is_here = |row: &usize| exact.is_none_or(|exact| !is_exact(exact, *row, end(true), part));
                (row < end(true)).then_some(row).filter(is_here)
            }
            Keys::Own { .. } => Some(part.n_past + row),
        }
    }
}

/// Whether the exact store holds a position when the sequence has `end` tokens.
fn is_exact(exact: Span, position: usize, end: usize, part: &Part) -> bool {
    position < exact.n_sink || (position >= part.exact_from && position + exact.n_window >= end)
}

/// What an input tensor holds.
#[derive(Debug, Clone, PartialEq)]
enum Fill {
    /// Token ids of the ubatch.
    Tokens,
    /// Rows that are given in place of tokens.
    Embeddings,
    /// Positions of the ubatch's tokens; of models that give each several, all first ones, then all second ones.
    Positions {
        per_token: usize,
    },
    /// Numbers of the rows that outputs are wanted of.
    Outputs,
    /// The rows into which some of a part's tokens are written, numbered from row `first` on.
    Rows {
        part: usize,
        span: Option<Span>,
        tokens: Range<usize>,
        first: usize,
    },
    /// The rows of a slab into which the tokens of parts with one each are written.
    SlabRows {
        parts: Range<usize>,
        span: Option<Span>,
        slots: Slots,
        n_rows: usize,
    },
    /// The tiles that a part's tokens finish: see [`tiles_due`].
    Due {
        part: usize,
        span: Option<Span>,
        exact: Span,
        n: usize,
    },
    /// The row of recurrent layers' states that is read, or written.
    StateRow {
        part: usize,
    },
    NextStateRow {
        part: usize,
    },
    /// Which of the rows each token of a part sees: those of one or more groups, one after the other.
    Mask {
        part: usize,
        keys: Vec<Keys>,
    },
    /// For each of some rows: 1 for the scored queries of a part to which `span` keeps it, else 0.
    Kept {
        part: usize,
        span: Span,
        keys: Keys,
    },
    /// Positions of parts' tokens, as f32: exact below 2^24.
    Queries {
        parts: Range<usize>,
    },
    /// The position in each row of each part, as f32; [`NOWHERE`] where there is none to be seen.
    KeyPositions {
        parts: Range<usize>,
        keys: Vec<Keys>,
    },
}

/// Positions of a token of text that are its place in the text, where it has several.
const TEXT_POSITIONS: usize = 3;

/// After every position.
const NOWHERE: f32 = (1u32 << 30) as f32;

/// What a device computes by itself from positions: of the rows of `keys`, for each query that is not among the first
/// `skipped`, 1 where it is hidden, else 0. Where there are several parts each has one query, and rows of its own.
#[derive(Debug, Clone, PartialEq)]
struct Hidden {
    device: Device,
    parts: Range<usize>,
    span: Option<Span>,
    skipped: usize,
    keys: Vec<Keys>,
}

/// The inputs of a graph under construction, and later of its runs. Each distinct one exists once.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    inputs: Vec<(Tensor, Fill)>,
    /// Masks (f16) and kept keys (f32) that devices compute.
    computed: Vec<(Tensor, Hidden, Type)>,
    mask: Vec<u16>,
    floats: Vec<f32>,
}

const VISIBLE: u16 = 0;
/// Minus infinity in f16.
const HIDDEN: u16 = 0xfc00;

impl Inputs {
    /// As new, for another graph; the memory that they were filled from is kept.
    pub fn clear(&mut self) {
        self.inputs.clear();
        self.computed.clear();
    }

    /// Bytes that [`Inputs::fill`] writes.
    pub fn bytes(&self) -> usize {
        let read = self.inputs.iter().filter(|(tensor, _)| tensor.is_allocated());
        read.map(|(tensor, _)| tensor.n_bytes()).sum()
    }

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

    /// f32 `[width, n]`.
    pub fn embeddings(&mut self, graph: &Graph, n: usize, width: usize) -> Tensor {
        self.input(graph, Type::F32, &[width, n], Fill::Embeddings)
    }

    /// i32 `[n × per_token]`.
    pub fn positions(&mut self, graph: &Graph, n: usize, per_token: usize) -> Tensor {
        self.input(graph, Type::I32, &[n * per_token], Fill::Positions { per_token })
    }

    pub fn outputs(&mut self, graph: &Graph, n: usize) -> Tensor {
        self.input(graph, Type::I32, &[n], Fill::Outputs)
    }

    /// The rows i64 `[tokens]` into which these tokens of a part are written, numbered from row `first` on.
    pub fn rows(
        &mut self,
        graph: &Graph,
        part: usize,
        tokens: Range<usize>,
        span: Option<Span>,
        first: usize,
    ) -> Tensor {
        self.input(graph, Type::I64, &[tokens.len()], Fill::Rows { part, span, tokens, first })
    }

    /// The rows i64 `[parts]` of a slab's stores, `n_rows` each, into which the tokens of parts with one each are written.
    pub fn slab_rows(
        &mut self,
        graph: &Graph,
        parts: Range<usize>,
        span: Option<Span>,
        (slots, n_rows): (Slots, usize),
    ) -> Tensor {
        self.input(graph, Type::I64, &[parts.len()], Fill::SlabRows { parts, span, slots, n_rows })
    }

    /// The list i32 `[Due::LEN, n]` of the tiles that a part's tokens finish in a store of this span, with an exact one.
    pub fn due(&mut self, graph: &Graph, part: &Part, index: usize, span: Option<Span>, exact: Span) -> Tensor {
        // One at each end that others fill as well, and two where a ring begins and ends.
        let n = part.n / TILE + 4;
        self.input(graph, Type::I32, &[Due::LEN, n], Fill::Due { part: index, span, exact, n })
    }

    /// The row of recurrent layers' states `[1]` that the part's sequence has, i32; and the one that it has afterwards, i64.
    pub fn state_rows(&mut self, graph: &Graph, part: usize) -> [Tensor; 2] {
        [
            self.input(graph, Type::I32, &[1], Fill::StateRow { part }),
            self.input(graph, Type::I64, &[1], Fill::NextStateRow { part }),
        ]
    }

    /// f16 `[rows of all groups, n]`: 0 where a token of the part (number `index`) sees a row, else minus infinity. With a
    /// device it is computed there, so that what is sent does not grow with the context.
    pub fn mask(&mut self, graph: &Graph, part: &Part, index: usize, keys: &[Keys], device: Option<Device>) -> Tensor {
        let Some(device) = device.filter(|_| !part.see_each_other) else {
            let n_rows = keys.iter().map(|keys| keys.n_rows()).sum();
            return self.input(graph, Type::F16, &[n_rows, part.n], Fill::Mask { part: index, keys: keys.to_vec() });
        };
        let span = keys.first().and_then(|keys| keys.span());
        self.mask_of(graph, Hidden { device, parts: index..index + 1, span, skipped: 0, keys: keys.to_vec() }, part.n)
    }

    /// f16 `[rows, 1, 1, parts]`: likewise for parts with one token each, of which all have such keys.
    pub fn mask_together(&mut self, graph: &Graph, parts: Range<usize>, keys: Keys, device: Device) -> Tensor {
        let (n, span) = (parts.len(), keys.span());
        let mask = self.mask_of(graph, Hidden { device, parts, span, skipped: 0, keys: vec![keys] }, n);
        graph.reshape(&mask, &[keys.n_rows(), 1, 1, n])
    }

    /// f16 `[rows, n]` of `n` queries, computed on the device.
    fn mask_of(&mut self, graph: &Graph, hidden: Hidden, n: usize) -> Tensor {
        // Beyond f16's numbers: the cast makes it minus infinity.
        self.computed(graph, n, hidden, Type::F16, |hidden| graph.cast(&graph.scale(hidden, -1e9), Type::F16))
    }

    /// f32 `[n_score, rows]`: 1 where `span` keeps a row's key for a scored query, the part's last ones, else 0.
    pub fn kept(
        &mut self,
        graph: &Graph,
        part: &Part,
        index: usize,
        span: Span,
        keys: Keys,
        device: Option<Device>,
    ) -> Tensor {
        let Some(device) = device else {
            let fill = Fill::Kept { part: index, span, keys };
            return self.input(graph, Type::F32, &[part.n_score, keys.n_rows()], fill);
        };
        let keys = vec![keys];
        let skipped = part.n - part.n_score;
        let hidden = Hidden { device, parts: index..index + 1, span: Some(span), skipped, keys };
        let kept = self.computed(graph, part.n, hidden, Type::F32, |hidden| graph.scale_bias(hidden, -1.0, 1.0));
        graph.permute(&kept, [1, 0, 2, 3])
    }

    fn computed(
        &mut self,
        graph: &Graph,
        n: usize,
        hidden: Hidden,
        ty: Type,
        finish: impl Fn(&Tensor) -> Tensor,
    ) -> Tensor {
        let known = |(_, other, other_ty): &&(Tensor, Hidden, Type)| *other == hidden && *other_ty == ty;
        if let Some((tensor, ..)) = self.computed.iter().find(known) {
            return tensor.clone();
        }
        let tensor = finish(&self.hidden(graph, n, &hidden));
        graph.place(&tensor, hidden.device);
        self.computed.push((tensor.clone(), hidden, ty));
        tensor
    }

    /// f32 `[rows, queries]`, of queries that are `n` with those that are skipped.
    fn hidden(&mut self, graph: &Graph, n: usize, hidden: &Hidden) -> Tensor {
        let Hidden { device, ref parts, span, skipped, ref keys } = *hidden;
        let place = |node: Tensor| {
            graph.place(&node, device);
            node
        };
        let n_rows: usize = keys.iter().map(|keys| keys.n_rows()).sum();
        let queries = self.input(graph, Type::F32, &[1, n], Fill::Queries { parts: parts.clone() });
        let n = n - skipped;
        let queries = graph.rows(&queries, skipped, n);
        let alike = |positions: &Tensor| place(graph.repeat_row(positions, n));
        let positions = match keys[..] {
            // A row's number is its position; what was not written yet is after every query.
            [Keys::Stored { span: None, from: 0, exact: None, .. } | Keys::All { exact: None, .. }] => {
                alike(&place(graph.arange(n_rows)))
            }
            _ => {
                let (n_parts, fill) = (parts.len(), Fill::KeyPositions { parts: parts.clone(), keys: keys.clone() });
                let positions = self.input(graph, Type::F32, &[n_rows, n_parts], fill);
                if n_parts > 1 { positions } else { alike(&positions) }
            }
        };
        let ahead = place(graph.sub(&positions, &queries));
        let later = place(graph.step(&ahead));
        let Some(Span { n_sink, n_window, chunked, .. }) = span else { return later };
        let n_window = n_window as f32;
        let old = if chunked {
            // Before the query's chunk. Half a position more, so that a quotient that should be whole is not below it.
            let chunks = place(graph.scale_bias(&queries, 1.0 / n_window, 0.5 / n_window));
            let starts = place(graph.scale(&place(graph.floor(&chunks)), n_window));
            let into_chunk = place(graph.sub(&positions, &starts));
            place(graph.step(&place(graph.scale_bias(&into_chunk, -1.0, -0.5))))
        } else {
            // Not among the newest `n_window`, the query's own counted.
            place(graph.step(&place(graph.scale_bias(&ahead, -1.0, 0.5 - n_window))))
        };
        // And not of the sink.
        let after_sink = place(graph.step(&place(graph.scale_bias(&positions, 1.0, 0.5 - n_sink as f32))));
        place(graph.add(&later, &place(graph.mul(&old, &after_sink))))
    }

    /// Fills every input that the graph really reads.
    pub fn fill(&mut self, parts: &[Part], fed: Fed<'_>, outputs: &[i32]) {
        let Inputs { inputs, mask, floats, .. } = self;
        for (tensor, fill) in inputs.iter().filter(|(tensor, _)| tensor.is_allocated()) {
            match fill {
                // Of a row that is no token's, embeddings of layers are the first token's (as in llama.cpp).
                Fill::Tokens => {
                    tensor.write(0, &fed.tokens.iter().map(|&token| token.max(0)).collect::<Vec<_>>());
                }
                Fill::Embeddings => tensor.write(0, fed.embeddings.map_or(&[][..], |embeddings| embeddings.rows)),
                &Fill::Positions { per_token } => {
                    if let Some(Embeddings { positions: given @ [_, ..], .. }) = fed.embeddings {
                        tensor.write(0, given);
                        continue;
                    }
                    let positions = parts
                        .iter()
                        .flat_map(|part| (part.n_past..part.n_past + part.n).map(|number| number as i32 + part.shift));
                    let positions: Vec<i32> = positions.collect();
                    // A token of text is at the same place in all dimensions but the last, which has none.
                    let mut all = positions.repeat(per_token.min(TEXT_POSITIONS));
                    all.resize(positions.len() * per_token, 0);
                    tensor.write(0, &all);
                }
                Fill::Outputs => tensor.write(0, outputs),
                Fill::Rows { part, span, tokens, first } => {
                    let n_past = parts[*part].n_past;
                    let row = |position| (span.map_or(position, |span| span.row(position)) - first) as i64;
                    let positions = n_past + tokens.start..n_past + tokens.end;
                    tensor.write(0, &positions.map(row).collect::<Vec<_>>());
                }
                &Fill::SlabRows { parts: ref written, span, slots, n_rows } => {
                    let row = |(index, part): (usize, usize)| {
                        let n_past = parts[part].n_past;
                        (slots.at(index) * n_rows + span.map_or(n_past, |span| span.row(n_past))) as i64
                    };
                    tensor.write(0, &written.clone().enumerate().map(row).collect::<Vec<_>>());
                }
                &Fill::Due { part, span, exact, n } => {
                    let Part { n_past, n: more, exact_from, .. } = parts[part];
                    let due = tiles_due(span, (exact, exact_from), n_past..n_past + more);
                    tensor.write(0, &Due::list(&due, n));
                }
                &Fill::StateRow { part } => tensor.write(0, &[parts[part].state_row as i32]),
                &Fill::NextStateRow { part } => tensor.write(0, &[1 - parts[part].state_row as i64]),
                Fill::Mask { part, keys } => {
                    fill_mask(mask, &parts[*part], keys);
                    tensor.write(0, mask);
                }
                &Fill::Kept { part, span, keys } => {
                    fill_kept(floats, &parts[part], span, keys);
                    tensor.write(0, floats);
                }
                Fill::Queries { parts: queries } => {
                    let positions = parts[queries.clone()].iter().flat_map(|part| part.n_past..part.n_past + part.n);
                    tensor.write(0, &positions.map(|position| position as f32).collect::<Vec<_>>());
                }
                Fill::KeyPositions { parts: queries, keys } => {
                    floats.clear();
                    for part in &parts[queries.clone()] {
                        for keys in keys {
                            let positions = (0..keys.n_rows()).map(|row| keys.position(row, part));
                            floats
                                .extend(positions.map(|position| position.map_or(NOWHERE, |position| position as f32)));
                        }
                    }
                    tensor.write(0, floats);
                }
            }
        }
    }
}

fn fill_mask(mask: &mut Vec<u16>, part: &Part, keys: &[Keys]) {
    let n_rows: usize = keys.iter().map(|keys| keys.n_rows()).sum();
    mask.clear();
    mask.resize(n_rows * part.n, HIDDEN);
    let mut first = 0;
    for &keys in keys {
        let span = keys.span();
        // Rows in runs of neighbouring positions: (row, position, length).
        let mut runs: Vec<(usize, usize, usize)> = Vec::new();
        for row in 0..keys.n_rows() {
            let Some(position) = keys.position(row, part) else { continue };
            match runs.last_mut() {
                Some((start, from, len)) if *start + *len == row && *from + *len == position => *len += 1,
                _ => runs.push((row, position, 1)),
            }
        }
        for (cells, query) in mask.chunks_exact_mut(n_rows).zip(part.n_past..) {
            let cells = &mut cells[first..first + keys.n_rows()];
            // What the query sees: the sink, and what is recent.
            let (sink, recent) = span.map_or((0, 0), |span| (span.n_sink, span.seen_together(query, part.n_past)));
            let end = if part.see_each_other { part.n_past + part.n } else { query + 1 };
            for &(row, from, len) in &runs {
                for (low, high) in [(0, sink.min(recent).min(end)), (recent, end)] {
                    let (low, high) = (low.max(from), high.min(from + len));
                    if low < high {
                        cells[row + low - from..row + high - from].fill(VISIBLE);
                    }
                }
            }
        }
        first += keys.n_rows();
    }
}

fn fill_kept(kept: &mut Vec<f32>, part: &Part, span: Span, keys: Keys) {
    kept.clear();
    kept.resize(keys.n_rows() * part.n_score, 0.0);
    let first = part.n_past + part.n - part.n_score;
    let recent = span.seen_from(first);
    for (row, cells) in kept.chunks_exact_mut(part.n_score).enumerate() {
        let Some(key) = keys.position(row, part) else { continue };
        if key < span.n_sink || key >= recent {
            for (cell, query) in cells.iter_mut().zip(first..) {
                *cell = f32::from(u8::from(span.sees(query, key)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ggml::Scheduler;

    /// The positions that each query sees, over all groups of keys.
    fn seen(part: &Part, keys: &[Keys]) -> Vec<Vec<usize>> {
        let positions: Vec<Option<usize>> =
            keys.iter().flat_map(|keys| (0..keys.n_rows()).map(|row| keys.position(row, part))).collect();
        let mut mask = Vec::new();
        fill_mask(&mut mask, part, keys);
        let seen_by = |cells: &[u16]| {
            let visible = cells.iter().zip(&positions).filter(|(cell, _)| **cell == VISIBLE);
            let mut seen: Vec<usize> = visible.map(|(_, position)| position.expect("a key")).collect();
            seen.sort_unstable();
            seen
        };
        mask.chunks_exact(positions.len()).map(seen_by).collect()
    }

    fn expected(part: &Part, span: Option<Span>) -> Vec<Vec<usize>> {
        let sees = |query, key| span.is_none_or(|span| span.sees(query, key));
        let queries = part.n_past..part.n_past + part.n;
        queries.map(|query| (0..=query).filter(|&key| sees(query, key)).collect()).collect()
    }

    fn a_span() -> impl Strategy<Value = Span> {
        (0usize..5, 1usize..20, 0usize..10, any::<bool>()).prop_map(|(n_sink, n_window, n_slack, chunked)| Span {
            n_sink,
            n_window,
            n_slack,
            chunked,
            n_rescued: 0,
        })
    }

    fn spans() -> impl Strategy<Value = Option<Span>> {
        prop::option::of(a_span())
    }

    proptest! {
        #[test]
        fn the_score_counts_what_a_lazy_layer_would_see(
            span in a_span(),
            n_past in 0usize..60,
            (n, n_score) in (1usize..30).prop_flat_map(|n| (Just(n), 1..=n)),
            slack in 0usize..10,
        ) {
            let part = Part { first: 0, n, n_past, n_score, exact_from: 0, state_row: 0, shift: 0, see_each_other: false };
            let mut kept = Vec::new();
            let keys = Keys::Stored { span: None, from: 0, n_rows: n_past + n + slack, has_own: true, exact: None };
            fill_kept(&mut kept, &part, span, keys);
            for (key, cells) in kept.chunks_exact(n_score).enumerate() {
                for (query, &cell) in (n_past + n - n_score..).zip(cells) {
                    prop_assert_eq!(cell == 1.0, span.sees(query, key));
                }
            }
        }

        /// Whatever the batch, however often rings have wrapped, and wherever keys lie: a query sees exactly its span,
        /// each key once.
        #[test]
        fn queries_see_exactly_their_span(
            span in spans(),
            exact in spans(),
            n_past in 0usize..60,
            n in 1usize..30,
            slack in 0usize..10,
            lost in 0usize..60,
        ) {
            // As after a cut from `n_past + lost` tokens, where no ring had lost anything else.
            let exact_from = exact.map_or(0, |exact| exact.held_from(n_past + lost).min(n_past));
            let part = Part { first: 0, n, n_past, n_score: 0, exact_from, state_row: 0, shift: 0, see_each_other: false };
            let stored = |end: usize, has_own| {
                let n_rows = span.map_or(end + slack, |span| span.used_rows(end));
                Keys::Stored { span, from: 0, n_rows, has_own, exact }
            };
            let in_exact = |has_own| exact.map(|exact| Keys::Exact { span, exact, has_own });
            let mut own_apart = vec![stored(n_past, false)];
            own_apart.extend(in_exact(false));
            own_apart.push(Keys::Own { span, n });
            prop_assert_eq!(seen(&part, &own_apart), expected(&part, span));

            // Once their own rows are written, rings serve one token; a store that keeps all serves as many as come.
            let part = Part { n: if span.is_some() || exact.is_some() { 1 } else { n }, ..part };
            let mut written = vec![stored(n_past + part.n, true)];
            written.extend(in_exact(true));
            prop_assert_eq!(seen(&part, &written), expected(&part, span));

            // A store that holds all, looked at as if it did not.
            let part = Part { n, ..part };
            let all = [Keys::All { span, n_rows: n_past + n + slack, exact: None }];
            prop_assert_eq!(seen(&part, &all), expected(&part, span));
            if let Some(exact) = exact {
                let all = Keys::All { span, n_rows: n_past + n + slack, exact: Some(exact) };
                let newest = Keys::Exact { span, exact, has_own: true };
                prop_assert_eq!(seen(&part, &[all, newest]), expected(&part, span));
            }
        }
    }

    /// The tensor's values once the graph has run.
    fn computed<T: crate::ggml::Plain + Default>(
        inputs: &mut Inputs,
        graph: &Graph,
        parts: &[Part],
        out: &Tensor,
    ) -> Vec<T> {
        graph.expand(out);
        let mut scheduler = Scheduler::new(&[Device::cpu()], 1, 64).unwrap();
        scheduler.alloc(graph).unwrap();
        inputs.fill(parts, [][..].into(), &[]);
        scheduler.compute(graph).unwrap();
        let mut values = vec![T::default(); out.shape().iter().product()];
        out.read(0, &mut values);
        values
    }

    /// Zeros of either sign are alike.
    fn unsigned(cells: &[u16]) -> Vec<u16> {
        cells.iter().map(|cell| cell & 0x7fff).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Nor does it matter that parts of one token each are computed together.
        #[test]
        fn masks_of_several_parts_are_those_of_each(
            span in spans(),
            n_past in prop::collection::vec(0usize..60, 2..5),
            slack in 0usize..10,
        ) {
            let part = |(first, &n_past): (usize, &usize)| Part {
                first, n: 1, n_past, n_score: 0, exact_from: 0, state_row: 0, shift: 0, see_each_other: false
            };
            let parts: Vec<Part> = n_past.iter().enumerate().map(part).collect();
            let end = 1 + n_past.iter().max().expect("some");
            let n_rows = span.map_or(end + slack, |span| span.used_rows(end));
            let keys = Keys::Stored { span, from: 0, n_rows, has_own: true, exact: None };
            let (graph, mut inputs) = (Graph::new(64), Inputs::default());
            let mask = inputs.mask_together(&graph, 0..parts.len(), keys, Device::cpu()).as_output();
            prop_assert_eq!(mask.shape(), [n_rows, 1, 1, parts.len()]);
            let found: Vec<u16> = computed(&mut inputs, &graph, &parts, &mask);
            let (mut expected, mut of_part) = (Vec::new(), Vec::new());
            for part in &parts {
                fill_mask(&mut of_part, part, &[keys]);
                expected.append(&mut of_part);
            }
            prop_assert_eq!(unsigned(&found), unsigned(&expected));
        }

        /// What a device computes from positions is what is filled in for the processor.
        #[test]
        fn devices_compute_the_same_masks(
            span in spans(),
            n_past in 0usize..60,
            n in 1usize..30,
            n_score in 1usize..30,
            slack in 0usize..10,
        ) {
            let n_score = n_score.min(n);
            let part = Part { first: 0, n, n_past, n_score, exact_from: 0, state_row: 0, shift: 0, see_each_other: false };
            let stored = |end: usize, has_own| {
                let n_rows = span.map_or(end + slack, |span| span.used_rows(end)).max(1);
                Keys::Stored { span, from: 0, n_rows, has_own, exact: None }
            };
            let cases = [vec![stored(n_past, false), Keys::Own { span, n }], vec![stored(n_past + n, true)]];
            for keys in cases {
                let (graph, mut inputs) = (Graph::new(64), Inputs::default());
                let mask = inputs.mask(&graph, &part, 0, &keys, Some(Device::cpu())).as_output();
                let found: Vec<u16> = computed(&mut inputs, &graph, &[part], &mask);
                let mut expected = Vec::new();
                fill_mask(&mut expected, &part, &keys);
                prop_assert_eq!(unsigned(&found), unsigned(&expected));
                prop_assert!(found.iter().all(|&cell| cell == HIDDEN || cell & 0x7fff == VISIBLE));
            }
            if let Some(span) = span {
                let n_rows = n_past + n + slack;
                let (graph, mut inputs) = (Graph::new(64), Inputs::default());
                let keys = Keys::Stored { span: None, from: 0, n_rows, has_own: true, exact: None };
                let kept = inputs.kept(&graph, &part, 0, span, keys, Some(Device::cpu()));
                let kept = graph.contiguous(&kept).as_output();
                let found: Vec<f32> = computed(&mut inputs, &graph, &[part], &kept);
                let mut expected = Vec::new();
                fill_kept(&mut expected, &part, span, keys);
                prop_assert_eq!(found, expected);
            }
        }
    }
}
