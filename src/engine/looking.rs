//! A look before dropping that is under way: what it has found so far, and what is to be done next.

use super::{
    layer::{LayerCache, ScoredRows},
    probe::{Base, Probe},
    score::Scored,
    search::Search,
};

/// A look between two of its steps. The sequence is as if there were none but for what has changed already.
#[derive(Debug)]
pub(super) struct Looking {
    pub probe: Probe,
    /// The probe's logits as they were, once they are known.
    pub base: Option<Base>,
    pub stage: Stage,
    /// The divergence that was measured with what changes.
    pub kl: f64,
    /// The logits of the prompt's last token, where its end is to be noted once more afterwards.
    pub prompt_end: Option<Vec<f32>>,
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Stage {
    /// The probe is run over everything as it is.
    Begin(Ran),
    /// Layers are put in order by what that gave.
    Ordering(Ran),
    /// Sets of layers are tried.
    Trying(Trial),
    /// These layers change, the last one first.
    Changing(Change, Vec<usize>),
    /// What their keys would lose is measured of the layers from this one on; of those before it is known.
    Measuring {
        next: usize,
        losses: Vec<(f64, usize)>,
    },
    Done,
}

/// What is tried on layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// They become lazy.
    Lazy,
    /// Their keys become narrow.
    Narrow,
}

/// Layers of which the most are looked for that can change.
#[derive(Debug)]
pub(super) struct Trial {
    pub change: Change,
    /// The most promising first.
    pub order: Vec<usize>,
    pub search: Search,
    /// The first ones of the order as they would be.
    pub changed: Vec<LayerCache>,
    /// The probe with these.
    pub ran: Ran,
}

/// How far a probe has run, and what that gave.
#[derive(Debug, Default)]
pub(super) struct Ran {
    /// Tokens.
    pub n: usize,
    /// A row for each of them that counts.
    pub logits: Vec<f32>,
    /// Of each layer, the mean over the tokens that are scored, and their number.
    pub scores: Vec<Scored>,
    pub n_scored: usize,
    /// The rows that each layer's stores have of these tokens, the exact one's second.
    pub rows: Vec<(ScoredRows, Vec<u8>)>,
}

impl Ran {
    /// Adds what the next `n` tokens gave, of which `n_scored` were scored.
    pub fn add(&mut self, n: usize, logits: &[f32], (scores, n_scored): (Vec<Scored>, usize)) {
        self.n += n;
        self.logits.extend_from_slice(logits);
        self.n_scored += n_scored;
        if self.n_scored == n_scored {
            self.scores = scores;
        } else if n_scored > 0 {
            let part = n_scored as f32 / self.n_scored as f32;
            for (mean, more) in self.scores.iter_mut().zip(&scores) {
                mean.value += part * (more.value - mean.value);
            }
        }
    }
}

/// What a look before dropping found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Looked {
    /// Tokens in the sequence then.
    pub n_past: usize,
    /// Mean divergence of the last tokens' logits with the layers that became lazy then, in nats.
    pub kl: f64,
}
