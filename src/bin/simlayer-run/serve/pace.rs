//! How much of the prompts is read in a step, so that those who are being answered do not wait for long.

use std::time::Duration;

/// No step that reads prompts while others are answered should take longer than this, or three steps without prompts.
const PATIENCE: Duration = Duration::from_millis(100);
/// Fewer tokens at once cost nearly as much.
const LEAST: usize = 32;

/// How long steps took.
#[derive(Debug)]
pub struct Pace {
    n_ubatch: usize,
    /// Tokens of prompts for a step in which others are answered.
    piece: f64,
    /// Seconds of a step that reads no prompts.
    decode: f64,
}

impl Pace {
    pub fn new(n_ubatch: usize) -> Pace {
        Pace { n_ubatch, piece: (n_ubatch as f64 / 8.0).max(LEAST as f64), decode: 0.0 }
    }

    /// Tokens of prompts to read in a step in which so many answers go on.
    pub fn piece(&self, answers: usize) -> usize {
        let room = self.n_ubatch.saturating_sub(answers).max(1);
        if answers == 0 { room } else { (self.piece as usize).max(1).min(room) }
    }

    /// Notes that a step with so many tokens of prompts, and of answers, took so long.
    pub fn took(&mut self, read: usize, answers: usize, time: Duration) {
        let time = time.as_secs_f64().max(1e-6);
        if read == 0 {
            self.decode = if self.decode == 0.0 { time } else { 0.8 * self.decode + 0.2 * time };
        } else if answers > 0 {
            let wanted = (3.0 * self.decode).max(PATIENCE.as_secs_f64());
            // As many tokens more or less as the time was shorter or longer than wanted; a piece that was smaller than it
            // might have been says little of larger ones.
            let factor = (wanted / time).clamp(0.5, 1.25);
            if factor < 1.0 || read as f64 >= 0.75 * self.piece {
                let least = LEAST.min(self.n_ubatch) as f64;
                self.piece = (self.piece * factor).clamp(least, self.n_ubatch as f64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that reads 1,000 tokens a second and has 16 answers to give in 20 ms.
    #[test]
    fn a_step_takes_about_as_long_as_it_may() {
        let mut pace = Pace::new(512);
        assert_eq!(pace.piece(0), 512);
        pace.took(0, 16, Duration::from_millis(20));
        for _ in 0..30 {
            let read = pace.piece(16);
            pace.took(read, 16, Duration::from_millis(20 + read as u64));
        }
        assert!((60..=100).contains(&pace.piece(16)), "{}", pace.piece(16));
        // A slow one is not made slower by reading more than it must.
        for _ in 0..30 {
            pace.took(0, 1, Duration::from_secs(1));
            pace.took(pace.piece(1), 1, Duration::from_secs(9));
        }
        assert_eq!(pace.piece(1), LEAST);
    }
}
