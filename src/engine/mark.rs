//! Where a sequence's last prompt ended, so that its answer can be taken back and asked for again exactly.
//!
//! Going back by cutting alone is not exact: the newest tokens' rows in f16 are those of the answer by then, a long
//! answer has overwritten the ring's window, and the prompt's last token would be computed anew by layers that have
//! become lazy at it. So the exact rows and the logits are kept beside the sequence, and the rings' windows as soon as
//! the answer is about to overwrite them.

use std::{ops::Range, slice, sync::Arc};

use super::{
    sequence::{LayerCache, Sequence},
    session::{BatchEntry, Outputs, SeqId, Session},
};
use crate::{
    cache::{Lease, Meter, Span, Store},
    vocab::Token,
};

/// Tokens before a prompt's end, or before a checkpoint, from which one can go on as well: servers read the last few
/// anew.
pub(super) const BACK: usize = 8;

/// The end of a prompt.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    end: Arc<PromptEnd>,
    /// The rings as they were, once they are not so any more.
    rings: Option<Arc<Rings>>,
}

#[derive(Debug)]
struct PromptEnd {
    n_past: usize,
    /// The last tokens, [`BACK`] at most.
    tail: Vec<Token>,
    /// Those of the last token.
    logits: Vec<f32>,
    exact_from: usize,
    scored: (usize, usize),
    score_next: bool,
    /// The rows of each layer's exact store; none where it has none.
    exact: Vec<Vec<u8>>,
    _lease: Lease,
}

#[derive(Debug)]
struct Rings {
    /// For each layer the first position that it has behind the sink, and the rows; none where it has no ring.
    layers: Vec<(usize, Vec<u8>)>,
    _lease: Lease,
}

impl Mark {
    fn new(sequence: &Sequence, logits: &[f32], meter: &Meter) -> Mark {
        let exact: Vec<Vec<u8>> = sequence.layers.iter().map(LayerCache::exact_rows).collect();
        let bytes = exact.iter().map(Vec::len).sum::<usize>() + size_of_val(logits);
        let end = PromptEnd {
            n_past: sequence.n_past,
            tail: sequence.tokens[sequence.n_past.saturating_sub(BACK)..].to_vec(),
            logits: logits.to_vec(),
            exact_from: sequence.exact_from,
            scored: sequence.scored,
            score_next: sequence.score_next,
            exact,
            _lease: meter.lease(bytes),
        };
        Mark { end: Arc::new(end), rings: None }
    }

    /// Tokens of the sequence when the prompt had ended.
    pub fn n_past(&self) -> usize {
        self.end.n_past
    }

    /// The fewest tokens that one can go back to here.
    pub fn first(&self) -> usize {
        self.end.n_past.saturating_sub(BACK)
    }

    /// Whether the rings' rows are kept here.
    pub fn has_rings(&self) -> bool {
        self.rings.is_some()
    }

    /// Whether a sequence that has gone beyond the mark can be cut to `n` tokens by going back to it.
    pub fn brings_back(&self, n: usize, sequence: &Sequence) -> bool {
        let is_near = (self.first().max(1)..=self.end.n_past).contains(&n);
        is_near && sequence.n_past > self.end.n_past && self.reaches(n, sequence)
    }

    /// Whether the rings can be as they were when the sequence had `n` tokens, near the mark.
    fn reaches(&self, n: usize, sequence: &Sequence) -> bool {
        let resumable = |(index, layer): (usize, &LayerCache)| match (&self.rings, layer.span()) {
            (Some(rings), Some(span)) => span.resumable(rings.layers[index].0),
            _ => layer.resumable(),
        };
        sequence.layers.iter().enumerate().map(resumable).all(|fewest| fewest <= n)
    }
}

impl Sequence {
    /// Keeps the rings as they are where they are about to lose what the mark needs by being written up to `end` tokens.
    pub fn keep_rings(&mut self, end: usize, meter: &Meter) {
        let Some(mark) = self.mark.as_mut().filter(|mark| mark.rings.is_none() && self.n_past >= mark.n_past()) else {
            return;
        };
        let n_past = mark.n_past();
        let loses = |layer: &LayerCache| {
            let needed = |span: Span| layer.held_from.max(n_past.saturating_sub(span.n_window + BACK));
            layer.span().is_some_and(|span| span.n_slack > 0 && span.held_from(end) > needed(span).max(span.n_sink))
        };
        if !self.layers.iter().any(loses) {
            return;
        }
        let layers: Vec<(usize, Vec<u8>)> = self.layers.iter().map(|layer| layer.ring_rows(n_past)).collect();
        let bytes = layers.iter().map(|(_, rows)| rows.len()).sum();
        mark.rings = Some(Arc::new(Rings { layers, _lease: meter.lease(bytes) }));
    }

    /// Makes everything as it was at the mark. The layers' rows before it must not have been written since.
    pub fn go_to_mark(&mut self) {
        let Some(Mark { end, rings }) = self.mark.clone() else { return };
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.put_exact_rows(&end.exact[index]);
            if let Some(rings) = &rings {
                let (from, rows) = &rings.layers[index];
                layer.put_ring_rows(end.n_past, *from, rows);
            }
        }
        self.behind.clear();
        let n_tail = end.n_past.saturating_sub(self.tokens.len());
        self.tokens.extend_from_slice(&end.tail[end.tail.len() - n_tail.min(end.tail.len())..]);
        self.tokens.truncate(end.n_past);
        self.n_past = end.n_past;
        (self.exact_from, self.scored, self.score_next) = (end.exact_from, end.scored, end.score_next);
    }
}

impl Sequence {
    /// Whether the sequence was cut, so that [`Session::replay`] may serve its next tokens.
    pub fn may_replay(&self) -> bool {
        let is_cut = self.mark.as_ref().is_some_and(|mark| self.n_past < mark.n_past());
        is_cut || (!self.behind.is_empty() && self.is_inexact())
    }
}

impl LayerCache {
    pub(super) fn exact_rows(&self) -> Vec<u8> {
        let Some(exact) = self.exact() else { return Vec::new() };
        let mut rows = Vec::new();
        exact.store.read_rows(slice::from_ref(&(0..exact.span.n_rows())), &mut rows);
        rows
    }

    pub(super) fn put_exact_rows(&self, rows: &[u8]) {
        if let Some(exact) = self.exact() {
            exact.store.write_rows(slice::from_ref(&(0..exact.span.n_rows())), rows);
        }
    }

    /// The first position behind the sink that a checkpoint of `n` tokens has of the ring.
    pub(super) fn ring_from(&self, n: usize) -> usize {
        let Some(span) = self.span() else { return 0 };
        self.held_from.max(n.saturating_sub(span.n_window + BACK)).max(span.n_sink).min(n.max(span.n_sink))
    }

    /// The sink's rows of `n` tokens, and those of the ring from a position on.
    pub(super) fn ring_ranges(span: Span, n: usize, from: usize) -> Vec<Range<usize>> {
        let sink = 0..span.n_sink.min(n);
        std::iter::once(sink).chain(span.rows(from..n.max(from))).filter(|rows| !rows.is_empty()).collect()
    }

    /// What must be kept to go on from `n` tokens later, or from a few before: see [`LayerCache::ring_from`].
    fn ring_rows(&self, n: usize) -> (usize, Vec<u8>) {
        let (Some(span), Some(store)) = (self.span(), self.store()) else { return (0, Vec::new()) };
        let from = self.ring_from(n);
        let mut rows = Vec::new();
        store.read_rows(&LayerCache::ring_ranges(span, n, from), &mut rows);
        (from, rows)
    }

    /// Puts rows of [`LayerCache::ring_ranges`] back.
    pub(super) fn put_ring_rows(&mut self, n: usize, from: usize, rows: &[u8]) {
        let (Some(span), Some(store)) = (self.span(), self.store()) else { return };
        store.write_rows(&LayerCache::ring_ranges(span, n, from), rows);
        self.held_from = if from <= span.n_sink { 0 } else { from };
    }
}

impl Store {
    /// Appends the bytes of rows: the keys of all ranges, then the values.
    pub(super) fn read_rows(&self, ranges: &[Range<usize>], to: &mut Vec<u8>) {
        for rows in [&self.k, &self.v] {
            let row_bytes = rows.strides()[1];
            for range in ranges {
                let start = to.len();
                to.resize(start + range.len() * row_bytes, 0);
                rows.read(range.start * row_bytes, &mut to[start..]);
            }
        }
    }

    /// Writes what [`Store::read_rows`] read.
    pub(super) fn write_rows(&self, ranges: &[Range<usize>], from: &[u8]) {
        let mut from = from;
        for rows in [&self.k, &self.v] {
            let row_bytes = rows.strides()[1];
            for range in ranges {
                let (bytes, rest) = from.split_at(range.len() * row_bytes);
                rows.write(range.start * row_bytes, bytes);
                from = rest;
            }
        }
    }
}

impl Session {
    /// Notes that a prompt has ended, where going back to here would need more than cutting. The logits of its last token
    /// are the last of this call's first `n_rows`.
    pub(super) fn set_mark(&mut self, entry: &BatchEntry<'_>, n_rows: usize) {
        let Some(sequence) = self.sequences.get_mut(&entry.seq) else { return };
        sequence.mark = None;
        let n_vocab = self.model.hparams().n_vocab;
        if !sequence.is_inexact()
            || !self.params.keep_prompt_end
            || entry.outputs == Outputs::None
            || self.wants_embeddings
        {
            return;
        }
        let logits = &self.logits[(n_rows - 1) * n_vocab..n_rows * n_vocab];
        sequence.mark = Some(Mark::new(sequence, logits, &self.meter));
    }

    /// How many of the entry's first tokens are those that the sequence was cut before: their rows are there still, and are
    /// not computed again. Where they reach the mark the sequence is then as it was there, and the last one's logits are
    /// those of then.
    pub(super) fn replay(&mut self, entry: &BatchEntry<'_>) -> usize {
        let Some(sequence) = self.sequences.get_mut(&entry.seq) else { return 0 };
        if self.wants_embeddings || !sequence.may_replay() {
            return 0;
        }
        let n_wanted = entry.outputs.n_rows(entry.tokens.len());
        if let Some(mark) = &sequence.mark {
            let PromptEnd { n_past: n_mark, tail, logits, .. } = &*mark.end;
            let n = n_mark.saturating_sub(sequence.n_past);
            let is_known = (1..=tail.len().min(entry.tokens.len())).contains(&n)
                && entry.tokens[..n] == tail[tail.len() - n..]
                && mark.reaches(sequence.n_past, sequence);
            // Of the tokens before the mark only the last one's logits are known.
            let n_wanted = n_wanted.saturating_sub(entry.tokens.len() - n.min(entry.tokens.len()));
            if is_known && n_wanted <= 1 {
                if n_wanted == 1 {
                    self.logits.extend_from_slice(logits);
                }
                sequence.go_to_mark();
                return n;
            }
        }
        // What has outputs, or ends a prompt, is computed.
        let most = entry.tokens.len() - n_wanted.max(usize::from(entry.prompt_end));
        let known = entry.tokens[..most].iter().zip(&sequence.behind).take_while(|(given, cut)| given == cut);
        let n = known.count();
        sequence.take_behind(n);
        n
    }

    /// Called before a sequence's rows are written up to `end` tokens.
    pub(super) fn before_writing(&mut self, seq: SeqId, end: usize) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        sequence.behind.clear();
        if sequence.mark.as_ref().is_some_and(|mark| sequence.n_past < mark.n_past()) {
            sequence.mark = None;
        }
        sequence.keep_rings(end, &self.meter);
    }
}
