//! A feed-forward with a gate, and the activations of it.

use super::{Builder, Error, Linear};
use crate::ggml::{Graph, Tensor};

/// What is done with a gate `g` and `u` beside it.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Activation {
    /// `silu(g) × u`
    Silu,
    /// `gelu(g) × u`
    Gelu,
    /// `relu(g) × u`
    Relu,
    /// `silu(g) × u`, `silu(g)` at most the limit, `u` within ± the limit.
    SiluCut(f32),
    /// gpt-oss's own; see [`Graph::swiglu_clamped`].
    SiluClamped,
}

impl Activation {
    /// Silu, cut where there is a limit.
    pub fn silu_within(limit: Option<f32>) -> Activation {
        limit.filter(|&limit| limit > 1e-6).map_or(Activation::Silu, Activation::SiluCut)
    }

    pub(super) fn apply(self, graph: &Graph, gate: &Tensor, up: &Tensor) -> Tensor {
        match self {
            Activation::Silu => graph.swiglu(gate, up),
            Activation::Gelu => graph.geglu(gate, up),
            Activation::Relu => graph.reglu(gate, up),
            Activation::SiluCut(limit) => {
                let up = graph.within(up, limit);
                graph.mul(&graph.at_most(&graph.silu(gate), limit), &up)
            }
            // The model's constants: no file names them.
            Activation::SiluClamped => graph.swiglu_clamped(gate, up, 1.702, 7.0),
        }
    }
}

/// `down × (activation(gate × x), up × x)`.
pub(in crate::model) struct Gated {
    up: Up,
    down: Linear,
}

enum Up {
    Separate {
        gate: Linear,
        up: Linear,
        activation: Activation,
    },
    /// The gate's rows and after them those of `up`, in one matrix; activated by silu.
    Fused(Linear),
}

impl Gated {
    /// `ffn_gate`, `ffn_up` and `ffn_down` of a layer.
    pub fn load(b: &mut Builder<'_>, layer: usize, activation: Activation) -> Result<Gated, Error> {
        let n_ff = b.n_ff(layer)?;
        Gated::load_named(b, layer, "", n_ff, activation)
    }

    /// As [`Gated::load`] for names that end in `suffix`.
    pub(super) fn load_named(
        b: &mut Builder<'_>,
        layer: usize,
        suffix: &str,
        n_ff: usize,
        activation: Activation,
    ) -> Result<Gated, Error> {
        let n_embd = b.hparams.n_embd;
        let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}");
        let gate = Linear::load(b, &name("gate"), [n_embd, n_ff])?;
        let up = Linear::load(b, &name("up"), [n_embd, n_ff])?;
        Ok(Gated { up: Up::Separate { gate, up, activation }, down: Linear::load(b, &name("down"), [n_ff, n_embd])? })
    }

    /// `ffn_up`, which holds the gate as well, and `ffn_down`.
    pub fn load_fused(b: &mut Builder<'_>, layer: usize) -> Result<Gated, Error> {
        let (n_embd, n_ff) = (b.hparams.n_embd, b.n_ff(layer)?);
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        let up = Linear::load(b, &name("up"), [n_embd, 2 * n_ff])?;
        Ok(Gated { up: Up::Fused(up), down: Linear::load(b, &name("down"), [n_ff, n_embd])? })
    }

    /// With another activation, where gate and up are apart.
    pub fn with_activation(self, activation: Activation) -> Gated {
        let up = match self.up {
            Up::Separate { gate, up, .. } => Up::Separate { gate, up, activation },
            fused @ Up::Fused(_) => fused,
        };
        Gated { up, ..self }
    }

    /// The last product summed in f32.
    pub fn with_f32_sums(self) -> Gated {
        Gated { down: self.down.with_f32_sums(), ..self }
    }

    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let activated = match &self.up {
            Up::Separate { gate, up, activation } => {
                // Up before gate: the order in which llama.cpp computes them.
                let up = up.apply(graph, input);
                activation.apply(graph, &gate.apply(graph, input), &up)
            }
            Up::Fused(both) => graph.swiglu_halves(&both.apply(graph, input)),
        };
        self.down.apply(graph, &activated)
    }
}
