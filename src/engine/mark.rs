//! Where a sequence's last prompt ended, so that its answer can be taken back and asked for again exactly.
//!
//! Going back by cutting alone is not exact: the newest tokens' rows in f16 are those of the answer by then, a long
//! answer has overwritten the ring's window, and the prompt's last token would be computed anew by layers that have
//! become lazy at it. So the exact rows and the logits are kept beside the sequence, and the rings' windows as soon as
//! the answer is about to overwrite them.

use std::sync::Arc;

use super::{
    layer::{LayerCache, resumable},
    ring::Ring,
    setup::BACK,
    snapshot::Snapshot,
};
use crate::{
    cache::{Lease, Meter, Span},
    vocab::Token,
};

/// Where a sequence is, in numbers: what a copy, a mark and a state keep of it besides its tokens and its layers' rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    /// Tokens in the cache; the next one's position.
    pub n_past: usize,
    /// After the sink, exact stores hold no position before this one.
    pub exact_from: usize,
    /// How many queries the layers' scores are means over, and the tokens that there were then.
    pub scored: (usize, usize),
    /// Whether the next token's attention is to be scored ([`At::Decode`](crate::lazy::At::Decode)).
    pub score_next: bool,
    /// The row of recurrent layers' states that is these tokens'.
    pub state_row: usize,
}

/// The end of a prompt.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    end: Arc<PromptEnd>,
    /// The rings as they were, once they are not so any more.
    rings: Option<Arc<Rings>>,
}

#[derive(Debug)]
struct PromptEnd {
    place: Place,
    /// The last tokens, [`BACK`] at most.
    tail: Vec<Token>,
    /// Those of the last token.
    logits: Vec<f32>,
    /// The rows of each layer's exact store; none where it has none.
    exact: Vec<Vec<u8>>,
    /// Recurrent layers' states, where there are any: to tokens before the last one there is no way back then.
    states: Option<Snapshot>,
    _lease: Lease,
}

#[derive(Debug)]
struct Rings {
    /// Those of each layer; empty where it has no ring.
    layers: Vec<Ring>,
    _lease: Lease,
}

impl Mark {
    /// The end of a prompt after these tokens, whose last one has these logits.
    pub fn new(place: Place, tokens: &[Token], layers: &[LayerCache], logits: &[f32], meter: &Meter) -> Mark {
        let exact: Vec<Vec<u8>> = layers.iter().map(LayerCache::exact_rows).collect();
        let bytes = exact.iter().map(Vec::len).sum::<usize>() + size_of_val(logits);
        let tail = tokens[tokens.len().saturating_sub(BACK)..].to_vec();
        let is_recurrent = layers.iter().any(|layer| layer.state.is_some());
        let states = is_recurrent.then(|| Snapshot::of(place.n_past, layers, place.state_row, meter));
        let end = PromptEnd { place, tail, logits: logits.to_vec(), exact, states, _lease: meter.lease(bytes) };
        Mark { end: Arc::new(end), rings: None }
    }

    /// Where the sequence was when the prompt had ended.
    pub fn place(&self) -> Place {
        self.end.place
    }

    /// The fewest tokens that one can go back to here.
    pub fn first(&self) -> usize {
        self.end.place.n_past.saturating_sub(if self.end.states.is_some() { 0 } else { BACK })
    }

    /// The prompt's last tokens, [`BACK`] at most.
    pub fn tail(&self) -> &[Token] {
        &self.end.tail
    }

    /// The logits of the prompt's last token.
    pub fn logits(&self) -> &[f32] {
        &self.end.logits
    }

    /// Whether the rings' rows are kept here.
    pub fn has_rings(&self) -> bool {
        self.rings.is_some()
    }

    /// Whether a sequence of `n_past` tokens, which has gone beyond the mark, can be cut to `n` by going back to it.
    pub fn brings_back(&self, n: usize, n_past: usize, layers: &[LayerCache]) -> bool {
        let end = self.end.place.n_past;
        (self.first().max(1)..=end).contains(&n) && n_past > end && self.reaches(n, layers)
    }

    /// Whether the rings can be as they were when the sequence had `n` tokens, near the mark.
    pub fn reaches(&self, n: usize, layers: &[LayerCache]) -> bool {
        resumable(layers, |index, layer| self.rings.as_ref().map_or(layer.held_from, |rings| rings.layers[index].from))
            <= n
    }

    /// Keeps the rings as they are where they are about to lose what the mark needs by being written up to `end` tokens.
    pub fn keep_rings(&mut self, layers: &[LayerCache], end: usize, meter: &Meter) {
        let n_past = self.end.place.n_past;
        let loses = |layer: &LayerCache| {
            let needed = |span: Span| layer.held_from.max(n_past.saturating_sub(span.n_window + BACK));
            layer.span.is_some_and(|span| span.n_slack > 0 && span.held_from(end) > needed(span).max(span.n_sink))
        };
        if self.rings.is_some() || !layers.iter().any(loses) {
            return;
        }
        let layers: Vec<Ring> = layers.iter().map(|layer| layer.ring_rows(n_past)).collect();
        let bytes = layers.iter().map(Ring::bytes).sum();
        self.rings = Some(Arc::new(Rings { layers, _lease: meter.lease(bytes) }));
    }

    /// Puts the rows back that the layers had at the mark, after [`LayerCache::own_kept`]. Their rows before it must not have been
    /// written since.
    pub fn put_rows_back(&self, layers: &mut [LayerCache]) {
        if let Some(states) = &self.end.states {
            states.put_back(layers, self.end.place.state_row);
        }
        for (index, layer) in layers.iter_mut().enumerate() {
            layer.put_exact_rows(&self.end.exact[index]);
            if let Some(rings) = &self.rings {
                layer.put_ring_rows(self.end.place.n_past, &rings.layers[index]);
            }
        }
    }
}
