//! What a look before dropping runs once more: a sequence's last tokens, and pieces of what would be dropped, repeated.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    thread,
};

use super::{batch::NO_TOKEN, snapshot::Snapshot};
use crate::{
    lazy::LazyParams,
    quality::metrics::{kl_with, log_sum_exp},
    vocab::Token,
};

/// Pieces that are repeated: one from each of so many equal parts of what would be dropped.
const N_PIECES: usize = 2;

/// Tokens of a piece, and the first ones of them that do not count: what follows them is not known from what is repeated.
const PIECE: usize = 16;
const UNCOUNTED: usize = 4;

/// How much more repeated pieces may diverge than the last tokens.
const REPEATED_MORE: f64 = 5.0;

/// Tokens of the probe that are run at once in a look in steps, at most and unless fewer are asked for.
pub(super) const PROBE_PIECE: usize = 48;

/// What is run over other caches.
#[derive(Debug)]
pub(super) struct Probe {
    /// Position of the first token.
    pub start: usize,
    pub tokens: Vec<Token>,
    /// How many of them, the first ones, are the sequence's own last ones: all of these count.
    pub n_last: usize,
    /// Which of the others count.
    pub repeated: Vec<usize>,
    /// Recurrent layers' states before the first token.
    pub states: Option<Snapshot>,
    /// Tokens that are run at once in a look in steps.
    pub piece: usize,
}

impl Probe {
    /// The last `n_last` of these tokens, and what is repeated after them.
    pub fn new(tokens: &[Token], n_last: usize, n_room: usize, lazy: &LazyParams) -> Probe {
        let start = tokens.len() - n_last;
        let (last, repeated) = (tokens[start..].to_vec(), Vec::new());
        let mut probe = Probe { start, tokens: last, n_last, repeated, states: None, piece: PROBE_PIECE };
        for piece in telling_pieces(tokens, lazy) {
            if probe.tokens.len() + piece.len() <= n_room {
                let first = probe.tokens.len();
                probe.tokens.extend_from_slice(&tokens[piece]);
                probe.repeated.extend(first + UNCOUNTED..first + PIECE - 1);
            }
        }
        probe
    }

    pub fn end(&self) -> usize {
        self.start + self.tokens.len()
    }
}

/// Of each part of what would be dropped, the piece that is told least by what is kept.
fn telling_pieces(tokens: &[Token], lazy: &LazyParams) -> Vec<Range<usize>> {
    let mut count: HashMap<Token, usize> = HashMap::new();
    tokens.iter().for_each(|&token| *count.entry(token).or_default() += 1);
    let dropped = lazy.n_sink..tokens.len().saturating_sub(lazy.n_window).max(lazy.n_sink);
    let kept: HashSet<Token> = tokens[..dropped.start].iter().chain(&tokens[dropped.end..]).copied().collect();
    let rarity = |token: &Token| if kept.contains(token) { 0.0 } else { 1.0 / count[token] as f64 };
    let is_text = |from: &usize| !tokens[*from..from + PIECE].contains(&NO_TOKEN);
    let told = |from: usize| tokens[from + UNCOUNTED..from + PIECE].iter().map(rarity).sum::<f64>();
    let part = dropped.len() / N_PIECES;
    let parts = (0..N_PIECES).map(|index| dropped.start + index * part..dropped.start + (index + 1) * part);
    let best = |part: Range<usize>| {
        let mut best: Option<(f64, usize)> = None;
        for from in (part.start..(part.end + 1).saturating_sub(PIECE)).filter(is_text) {
            let told = told(from);
            if best.is_none_or(|(most, _)| told > most) {
                best = Some((told, from));
            }
        }
        best.map(|(_, from)| from..from + PIECE)
    };
    parts.filter_map(best).collect()
}

/// The probe's logits as they are, and how far others are from them.
#[derive(Debug)]
pub(super) struct Base {
    /// How many of the rows, the first ones, are the sequence's own last tokens'.
    n_last: usize,
    n_vocab: usize,
    n_threads: usize,
    rows: Vec<f32>,
    /// The [`log_sum_exp`] of each row.
    sums: Vec<f64>,
}

impl Base {
    pub fn new(rows: Vec<f32>, n_last: usize, n_vocab: usize, n_threads: usize) -> Base {
        let sums = rows.chunks_exact(n_vocab).map(log_sum_exp).collect();
        Base { n_last, n_vocab, n_threads, rows, sums }
    }

    /// Mean divergence on the last tokens, or on the repeated ones, of which more is bearable: the larger.
    pub fn divergence(&self, rows: &[f32]) -> f64 {
        let n_each = self.sums.len().div_ceil(self.n_threads.max(1));
        let kls = |(index, rows): (usize, &[f32])| {
            let kl = |(at, row): (usize, &[f32])| {
                kl_with(&self.rows[at * self.n_vocab..(at + 1) * self.n_vocab], self.sums[at], row)
            };
            (index * n_each..).zip(rows.chunks_exact(self.n_vocab)).map(kl).collect()
        };
        let parts = rows.chunks(n_each * self.n_vocab).enumerate();
        let kls: Vec<f64> = thread::scope(|scope| {
            let running: Vec<_> = parts.map(|part| scope.spawn(move || -> Vec<f64> { kls(part) })).collect();
            running.into_iter().flat_map(|part| part.join().unwrap_or_default()).collect()
        });
        let (last, repeated) = kls.split_at(self.n_last.min(kls.len()));
        let mean = |kls: &[f64]| kls.iter().sum::<f64>() / kls.len().max(1) as f64;
        if kls.len() < self.sums.len() { f64::NAN } else { mean(last).max(mean(repeated) / REPEATED_MORE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lazy() -> LazyParams {
        LazyParams { n_sink: 4, n_window: 100, ..LazyParams::default() }
    }

    /// Where a number stands once among words that come again and again, the piece has it, after its first tokens.
    #[test]
    fn pieces_have_what_is_told_nowhere_else() {
        let mut tokens: Vec<Token> = (0..600).map(|at| at % 7).collect();
        tokens[90..96].copy_from_slice(&[50, 51, 52, 53, 54, 55]);
        tokens[400..406].copy_from_slice(&[60, 61, 62, 63, 64, 65]);
        let pieces = telling_pieces(&tokens, &lazy());
        assert_eq!(pieces.len(), 2);
        for (piece, told) in pieces.iter().zip([90..96, 400..406]) {
            assert!(
                piece.len() == PIECE && piece.start + UNCOUNTED <= told.start && told.end <= piece.end,
                "{piece:?}"
            );
        }
        // The newest tokens have it as well: there is nothing to be lost.
        tokens[590..596].copy_from_slice(&[50, 51, 52, 53, 54, 55]);
        assert_ne!(telling_pieces(&tokens, &lazy())[0], pieces[0]);
    }

    #[test]
    fn a_probe_is_the_last_tokens_and_what_is_repeated() {
        let tokens: Vec<Token> = (0..300).collect();
        let probe = Probe::new(&tokens, 32, 512, &lazy());
        assert_eq!((probe.start, probe.n_last, probe.end()), (268, 32, 268 + 32 + 2 * PIECE));
        assert_eq!(probe.tokens[..32], tokens[268..]);
        assert_eq!(probe.repeated.len(), 2 * (PIECE - UNCOUNTED - 1));
        for &at in &probe.repeated {
            // Followed by what follows it in the text, within what would be dropped.
            assert_eq!(probe.tokens[at] + 1, probe.tokens[at + 1]);
            assert!((4..200).contains(&probe.tokens[at]));
        }
        // Less room, or too little that would be dropped, leaves pieces out.
        assert_eq!(Probe::new(&tokens, 32, 32 + PIECE, &lazy()).tokens.len(), 32 + PIECE);
        assert!(Probe::new(&tokens[..110], 32, 512, &lazy()).repeated.is_empty());
    }
}
