//! Looking before dropping: what lazy layers drop is dropped only where this prompt, on this model, would not miss it.
//!
//! A sequence's last tokens are run once more, the layers in question over what they would keep, in the types in which
//! they would keep it. How far the logits move by that foretells how far those of the next tokens will
//! (docs/quality.md), whoever proposed the layers. Everything is then as it was before.
//!
//! The last tokens need not be those that ask for what came first: a question may follow in another turn. So pieces of
//! what would be dropped are run after them, as if the text repeated them. Whoever still finds a piece far back knows how
//! it goes on; the logits move where that is lost. Pieces are chosen that cannot be known otherwise: with tokens that are
//! rare in the text, and not among those that are kept.

use std::{
    collections::{HashMap, HashSet},
    mem,
    ops::Range,
};

use super::{
    batch::Part,
    error::Error,
    executor::{Executor, Scored},
    layer::{LayerCache, resumable},
    sequence::{Looked, Sequence},
    setup::Setup,
    step::Stretch,
};
use crate::{
    lazy::{LazyParams, Policy},
    quality::metrics::{kl_with, log_sum_exp},
    vocab::Token,
};

/// Last tokens that are run again.
const N_LAST: usize = 24;

/// Fewer tell nothing.
const FEWEST_LAST: usize = 8;

/// Pieces that are repeated: one from each of so many equal parts of what would be dropped.
const N_PIECES: usize = 2;

/// Tokens of a piece, and the first ones of them that do not count: what follows them is not known from what is repeated.
const PIECE: usize = 16;
const UNCOUNTED: usize = 4;

/// How much more repeated pieces may diverge than the last tokens.
const REPEATED_MORE: f64 = 5.0;

/// Sets that are tried, besides the run that they are compared with. All of it takes 7 % of the time of a prompt of 7,500
/// tokens.
const MOST_SETS: usize = 4;

/// What is run over other caches.
#[derive(Debug)]
struct Probe {
    /// Position of the first token.
    start: usize,
    tokens: Vec<Token>,
    /// Which of them are the sequence's own last ones.
    last: Range<usize>,
    /// Which of the others count.
    repeated: Vec<usize>,
}

impl Probe {
    /// The last `n_last` of these tokens, and what is repeated after them.
    fn new(tokens: &[Token], n_last: usize, n_room: usize, lazy: &LazyParams) -> Probe {
        let start = tokens.len() - n_last;
        let mut probe = Probe { start, tokens: tokens[start..].to_vec(), last: 0..n_last, repeated: Vec::new() };
        for piece in telling_pieces(tokens, lazy) {
            if probe.tokens.len() + piece.len() <= n_room {
                let first = probe.tokens.len();
                probe.tokens.extend_from_slice(&tokens[piece]);
                probe.repeated.extend(first + UNCOUNTED..first + PIECE - 1);
            }
        }
        probe
    }

    fn end(&self) -> usize {
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
    let told = |from: usize| tokens[from + UNCOUNTED..from + PIECE].iter().map(rarity).sum::<f64>();
    let part = dropped.len() / N_PIECES;
    let parts = (0..N_PIECES).map(|index| dropped.start + index * part..dropped.start + (index + 1) * part);
    let best = |part: Range<usize>| {
        let mut best: Option<(f64, usize)> = None;
        for from in part.start..(part.end + 1).saturating_sub(PIECE) {
            let told = told(from);
            if best.is_none_or(|(most, _)| told > most) {
                best = Some((told, from));
            }
        }
        best.map(|(_, from)| from..from + PIECE)
    };
    parts.filter_map(best).collect()
}

impl Sequence {
    /// Makes layers lazy where the policy goes by looks: the largest beginning of the proposed order whose look diverges
    /// by no more than the policy allows. Of a sequence that has not grown to twice its length since the last look, none.
    pub fn look_before_dropping(&mut self, setup: &Setup, executor: &mut Executor) -> Result<(), Error> {
        let Policy::Kl(most) = setup.params.lazy.policy else { return Ok(()) };
        let n_past = self.n_past();
        let is_early = self.looked.is_some_and(|looked| n_past < 2 * looked.n_past);
        let is_lazy = self.layers.iter().all(|layer| !layer.is_active());
        let held = n_past.saturating_sub(resumable(&self.layers, |_, layer| layer.held_from));
        let n_room = setup.params.n_ubatch;
        let n_last = N_LAST.min(held).min(n_room);
        if is_early || is_lazy || n_last < FEWEST_LAST || n_past <= setup.params.lazy.n_kept() {
            return Ok(());
        }
        // The repeated pieces lie in the context for a moment.
        let n_room = n_room.min(n_last + setup.params.n_ctx - n_past);
        let probe = Probe::new(&self.tokens, n_last, n_room, &setup.params.lazy);
        let (lazy, kl) = self.largest(&probe, most, setup, executor)?;
        for layer in lazy {
            self.make_lazy(layer, n_past, setup, executor)?;
        }
        self.looked = Some(Looked { n_past, kl });
        Ok(())
    }

    /// The layers that may become lazy, the most promising first: in the order of a profile where one is named,
    /// else by how little the probe's hidden states change when a layer alone is lazy.
    fn proposed(&self, setup: &Setup, scores: &[Scored]) -> Vec<usize> {
        if let Some(order) = &setup.order {
            return order.iter().copied().filter(|&layer| self.layers[layer].is_active()).collect();
        }
        // Only active layers have scores.
        let mut scores: Vec<&Scored> = scores.iter().collect();
        scores.sort_by(|a, b| b.value.total_cmp(&a.value));
        scores.into_iter().map(|scored| scored.layer).collect()
    }

    /// The layers that can go, and the divergence that was measured with them.
    fn largest(
        &mut self,
        probe: &Probe,
        most: f64,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(Vec<usize>, f64), Error> {
        let n_vocab = setup.model.hparams().n_vocab;
        let (base, scores) = self.look(&[], probe, setup, executor)?;
        for scored in &scores {
            self.layers[scored.layer].score = Some(scored.value);
        }
        let mut order = self.proposed(setup, &scores);
        let sums: Vec<f64> = base.chunks_exact(n_vocab).map(log_sum_exp).collect();
        let divergence = |rows: &[f32]| {
            let row = |at: usize| at * n_vocab..(at + 1) * n_vocab;
            let kl = |at: usize| kl_with(&base[row(at)], sums[at], &rows[row(at)]);
            let mean = |at: &[usize]| at.iter().map(|&at| kl(at)).sum::<f64>() / at.len().max(1) as f64;
            let last: Vec<usize> = probe.last.clone().collect();
            mean(&last).max(mean(&probe.repeated) / REPEATED_MORE)
        };
        // Those that can go, and those that cannot.
        let (mut can, mut cannot, mut kl) = (0_usize, order.len() + 1, 0.0);
        for _ in 0..MOST_SETS {
            let middle = can.midpoint(cannot);
            if middle == can {
                break;
            }
            let (rows, _) = self.look(&order[..middle], probe, setup, executor)?;
            let found = divergence(&rows);
            // A divergence that is no number (a broken model) is none that is small.
            if found <= most { (can, kl) = (middle, found) } else { cannot = middle }
        }
        order.truncate(can);
        Ok((order, kl))
    }

    /// Rows of logits of the probe as they would be with these layers lazy; without any, layers' scores as well where they
    /// are wanted for an order.
    fn look(
        &mut self,
        lazy: &[usize],
        probe: &Probe,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(Vec<f32>, Vec<Scored>), Error> {
        let (start, n) = (probe.start, probe.tokens.len());
        self.reserve(probe.end() - self.n_past(), setup, executor)?;
        let mut restricted = Vec::new();
        for &index in lazy {
            let (layer, scheduler) = (&setup.layers[index], &mut executor.scheduler);
            let mut cache = self.layers[index].copy(start, true, None, layer, scheduler)?;
            cache.reserve(start, n, layer, scheduler)?;
            restricted.push(cache);
        }
        let written = start..probe.end();
        // Of the others: the candidates' own caches are put aside.
        let stays = (0..self.layers.len()).filter(|index| !lazy.contains(index));
        let save = |index: usize| (index, self.layers[index].rows(written.clone()), self.layers[index].exact_rows());
        let saved: Vec<(usize, Vec<u8>, Vec<u8>)> = stays.map(save).collect();
        let mut exchange = |layers: &mut [LayerCache]| {
            lazy.iter().zip(&mut restricted).for_each(|(&index, cache)| mem::swap(&mut layers[index], cache));
        };
        exchange(&mut self.layers);
        let n_score = if lazy.is_empty() && setup.order.is_none() { n } else { 0 };
        let found = self.run_probe(probe, n_score, setup, executor);
        // The graph refers to caches that go.
        executor.forget();
        exchange(&mut self.layers);
        for (index, rows, exact) in &saved {
            self.layers[*index].put_rows(written.clone(), rows);
            self.layers[*index].put_exact_rows(exact);
        }
        found
    }

    /// Runs the probe over whatever the layers hold now: the logits of all its tokens, and scores of the last `n_score`.
    fn run_probe(
        &self,
        probe: &Probe,
        n_score: usize,
        setup: &Setup,
        executor: &mut Executor,
    ) -> Result<(Vec<f32>, Vec<Scored>), Error> {
        let (n_past, n) = (probe.start, probe.tokens.len());
        // The exact stores hold the newest tokens, and the probe goes back before them.
        let exact_from = self.exact_from(n_past, self.n_past());
        let parts = [Part { first: 0, n, n_past, n_score, exact_from }];
        let caches: [&[LayerCache]; 1] = [&self.layers];
        let layers = 0..setup.layers.len();
        let stretch = Stretch { layers, parts: &parts, caches: &caches, entering: None, n_wanted: n };
        let rows: Vec<i32> = (0..n as i32).collect();
        let results = executor.take_results();
        let step = executor.step(setup, &stretch);
        let ran = step.and_then(|mut ready| executor.run(&mut ready.step, &parts, &probe.tokens, &rows));
        let found = executor.put_results(results);
        Ok((found, ran?))
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
        assert_eq!((probe.start, probe.last.clone(), probe.end()), (268, 0..32, 268 + 32 + 2 * PIECE));
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
