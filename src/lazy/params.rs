//! What is asked of a session's lazy layers.

use std::path::PathBuf;

use super::{At, LayerWindows, Policy, PrefillMode};
use crate::ggml::Type;

/// What the lazy layers keep, and how they are found. The defaults are the paper's.
#[derive(Debug, Clone, PartialEq)]
pub struct LazyParams {
    pub policy: Policy,
    /// First tokens that a lazy layer keeps. Without any the model breaks; 2 to 4 are enough.
    pub n_sink: usize,
    /// Recent tokens that a lazy layer keeps, the query's own included.
    pub n_window: usize,
    /// Tokens that a layer with a window keeps beyond it, without looking at them, so that as many of the newest can be
    /// taken back and given anew.
    pub n_slack: usize,
    /// Older rows that a lazy layer keeps for each KV head beside sink and window: those that later tokens will most look for, as a
    /// [`PruneMap`](super::PruneMap) foretells it. It needs that map, and this crate's own attention kernel on the processor.
    pub n_rescued: usize,
    /// Other windows for single layers.
    pub windows: LayerWindows,
    /// Last prompt tokens whose attention is scored.
    pub n_queries: usize,
    /// When the score is taken.
    pub at: At,
    /// How the prompt is read; `None` for the policy's own way: windowed when the set is known beforehand.
    pub prefill: Option<PrefillMode>,
    /// A calibrated profile's file; `None` looks for the model's as [`super::Profile::find`] does.
    pub profile: Option<PathBuf>,
    /// At a prompt's end the keys of those active layers go to `q4_0` that lose nothing by it which this prompt would miss,
    /// as a look foretells ([`Policy::Kl`]; by [`DEFAULT_KL`](super::DEFAULT_KL) under other policies). For keys of more
    /// bits, such as `q8_0`.
    pub narrow_keys: bool,
    /// Types of the lazy layers' keys and values. `None` for keys in `q8_0`, or as in the active layers where those are
    /// smaller, and values in `q4_0`; for `f16` where the head size does not allow that.
    pub type_k: Option<Type>,
    pub type_v: Option<Type>,
}

impl Default for LazyParams {
    fn default() -> Self {
        LazyParams {
            policy: Policy::Auto,
            n_sink: 4,
            n_window: 1024,
            n_slack: 256,
            n_rescued: 0,
            windows: LayerWindows::default(),
            n_queries: 32,
            at: At::Prefill,
            prefill: None,
            profile: None,
            narrow_keys: false,
            type_k: None,
            type_v: None,
        }
    }
}

impl LazyParams {
    /// Recent tokens that a layer keeps while it is lazy.
    pub fn window(&self, layer: usize) -> usize {
        self.windows.get(layer).unwrap_or(self.n_window)
    }

    /// A sequence must be longer than this before every lazy layer drops something.
    pub fn n_kept(&self) -> usize {
        self.n_sink + self.windows.iter().map(|(_, n_window)| n_window).fold(self.n_window, usize::max)
    }

    /// Whether layers that are lazy from the start see only sink and window while the prompt is read.
    pub fn windowed_prefill(&self) -> bool {
        let known = matches!(self.policy, Policy::Layers(_) | Policy::Profile(_));
        match self.prefill {
            Some(PrefillMode::Full) => false,
            // Nothing is known beforehand under the other policies, so their prefill stays full.
            Some(PrefillMode::Window) | None => known,
        }
    }
}
