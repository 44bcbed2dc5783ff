//! How much of the prompts is read in a step, so that those who are being answered do not wait for long.

use std::time::Duration;

/// No step that reads prompts while others are answered should take longer than this, or three steps without prompts.
const PATIENCE: Duration = Duration::from_millis(100);
/// Fewer tokens at once cost nearly as much.
const LEAST: usize = 32;
/// As few of those that are run once more in a look at a prompt's end.
const LEAST_PROBE: usize = 16;
/// What a step counts that came one before another.
const FADING: f64 = 0.85;
/// Depths at which a token takes twice as long to read as at a prompt's beginning: one of them is the model's.
const DOUBLING: [f64; 7] = [500.0, 1_000.0, 2_000.0, 4_000.0, 8_000.0, 16_000.0, f64::INFINITY];

/// A piece of a prompt: its tokens, and those before it.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub n: usize,
    pub depth: usize,
}

/// How long steps took.
#[derive(Debug)]
pub struct Pace {
    n_ubatch: usize,
    /// Seconds of a step that reads no prompts.
    decode: f64,
    /// For each of [`DOUBLING`] how well it explains the steps that were.
    fits: [Fit; DOUBLING.len()],
}

/// Seconds as a multiple of work, by least squares of the relative error over the steps that were.
#[derive(Debug, Clone, Copy, Default)]
struct Fit {
    /// Sums of work a second, of its square, and of 1.
    sums: [f64; 3],
}

impl Fit {
    fn note(&mut self, work: f64, seconds: f64) {
        let x = work / seconds;
        for (sum, new) in self.sums.iter_mut().zip([x, x * x, 1.0]) {
            *sum = FADING * *sum + new;
        }
    }

    /// Seconds for a unit of work, and the square of the error that is left.
    fn solved(&self) -> Option<(f64, f64)> {
        let [x, square, n] = self.sums;
        (square > 0.0).then(|| (x / square, n - x * x / square))
    }
}

/// Work of a token after so many others, where it is twice as much at depth `doubling`.
fn work(depth: f64, doubling: f64) -> f64 {
    1.0 + depth / doubling
}

impl Pace {
    pub fn new(n_ubatch: usize) -> Pace {
        Pace { n_ubatch, decode: 0.0, fits: Default::default() }
    }

    /// Seconds that there are for prompts in a step in which so many answers go on.
    pub fn seconds(&self, answers: usize) -> f64 {
        if answers == 0 { f64::INFINITY } else { (2.0 * self.decode).max(PATIENCE.as_secs_f64() - self.decode) }
    }

    /// Tokens of prompts that are read at least and at most in a step in which so many answers go on.
    pub fn bounds(&self, answers: usize) -> (usize, usize) {
        let most = self.n_ubatch.saturating_sub(answers).max(1);
        (LEAST.min(most), most)
    }

    /// Seconds that a token of a prompt takes of which so many have been read.
    pub fn cost(&self, depth: usize) -> f64 {
        let fits = self.fits.iter().zip(DOUBLING).filter_map(|(fit, doubling)| Some((fit.solved()?, doubling)));
        match fits.min_by(|((_, one), _), ((_, other), _)| one.total_cmp(other)) {
            Some(((unit, _), doubling)) => unit * work(depth as f64, doubling),
            None => PATIENCE.as_secs_f64() * 8.0 / self.n_ubatch as f64,
        }
    }

    /// Tokens to read of a prompt of which so many have been read, in a step in which so many answers go on.
    pub fn tokens(&self, answers: usize, depth: usize) -> usize {
        let (least, most) = self.bounds(answers);
        self.affordable(answers, depth).clamp(least, most)
    }

    /// Tokens that are run once more at once in a look at the end of a prompt of so many tokens, while so many answers wait for it.
    /// A few at least: besides them such a step is as long as one without prompts.
    pub fn probe_tokens(&self, answers: usize, depth: usize) -> usize {
        self.affordable(answers, depth).clamp(LEAST_PROBE, self.n_ubatch)
    }

    /// Tokens at a depth for which there is time.
    fn affordable(&self, answers: usize, depth: usize) -> usize {
        (self.seconds(answers) / self.cost(depth)) as usize
    }

    /// Notes that a step with these pieces of prompts, and with so many answers, took so long.
    pub fn took(&mut self, read: &[Piece], answers: usize, time: Duration) {
        let time = time.as_secs_f64().max(1e-6);
        let n: usize = read.iter().map(|piece| piece.n).sum();
        if n == 0 {
            self.decode = if self.decode == 0.0 { time } else { 0.8 * self.decode + 0.2 * time };
        } else if n >= LEAST.min(self.n_ubatch) / 2 {
            let decode = if answers > 0 { self.decode } else { 0.0 };
            let seconds = (time - decode).max(0.1 * time);
            for (fit, doubling) in self.fits.iter_mut().zip(DOUBLING) {
                let of_piece =
                    |piece: &Piece| piece.n as f64 * work(piece.depth as f64 + piece.n as f64 / 2.0, doubling);
                fit.note(read.iter().map(of_piece).sum(), seconds);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that reads 1,000 tokens a second at first, and half as many at a depth of 3,000.
    fn reads(n: usize, depth: usize) -> Duration {
        Duration::from_secs_f64(n as f64 * 1e-3 * (1.0 + (depth as f64 + n as f64 / 2.0) / 3_000.0))
    }

    #[test]
    fn a_step_takes_about_as_long_as_it_may() {
        let mut pace = Pace::new(512);
        assert_eq!((pace.tokens(0, 0), pace.tokens(16, 0)), (512, 64));
        let decode = Duration::from_millis(20);
        pace.took(&[], 16, decode);
        for depth in (0..20).map(|i| i * 60) {
            let n = pace.tokens(16, depth);
            pace.took(&[Piece { n, depth }], 16, decode + reads(n, depth));
        }
        for depth in [0, 1_000, 6_000] {
            let took = reads(pace.tokens(16, depth), depth).as_secs_f64();
            assert!((0.05..=0.11).contains(&took), "{took} s at {depth}");
        }
    }

    /// What was learned while nobody waited, of another depth, holds for who does.
    #[test]
    fn a_deep_prompt_is_read_in_small_pieces_at_once() {
        let mut pace = Pace::new(512);
        pace.took(&[], 4, Duration::from_millis(20));
        for depth in (0..6_000).step_by(512) {
            pace.took(&[Piece { n: 512, depth }], 0, reads(512, depth));
        }
        let n = pace.tokens(4, 5_500);
        assert!(reads(n, 5_500).as_secs_f64() < 0.12, "{n}");
        assert!(pace.tokens(4, 0) > n);
    }

    #[test]
    fn a_slow_machine_is_not_made_slower_by_reading_more_than_it_must() {
        let mut pace = Pace::new(512);
        for _ in 0..30 {
            pace.took(&[], 1, Duration::from_secs(1));
            let n = pace.tokens(1, 0);
            pace.took(&[Piece { n, depth: 0 }], 1, Duration::from_secs(9));
        }
        assert!((LEAST..LEAST + 16).contains(&pace.tokens(1, 0)), "{}", pace.tokens(1, 0));
    }
}
