//! A look before dropping that is under way: what it has found so far, and what is to be done next.

use super::{
    layer::LayerCache,
    probe::{Base, Probe},
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
    Begin,
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
}

/// What a look before dropping found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Looked {
    /// Tokens in the sequence then.
    pub n_past: usize,
    /// Mean divergence of the last tokens' logits with the layers that became lazy then, in nats.
    pub kl: f64,
}
