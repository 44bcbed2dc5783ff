//! A feed-forward without a gate, and the activations of it.

use super::{Builder, Error, Linear};
use crate::ggml::{Graph, Tensor};

/// What is done with each element `x` of a feed-forward without a gate.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Unary {
    Gelu,
    /// `max(x, 0)²`
    ReluSquared,
    /// Apertus's own; see [`Graph::xielu`].
    Xielu {
        alpha_n: f32,
        alpha_p: f32,
        beta: f32,
        eps: f32,
    },
}

impl Unary {
    pub(super) fn apply(self, graph: &Graph, input: &Tensor) -> Tensor {
        match self {
            Unary::Gelu => graph.gelu(input),
            Unary::ReluSquared => graph.square(&graph.relu(input)),
            Unary::Xielu { alpha_n, alpha_p, beta, eps } => graph.xielu(input, alpha_n, alpha_p, beta, eps),
        }
    }
}

/// `down × activation(up × x)`.
pub(in crate::model) struct Plain {
    up: Linear,
    down: Linear,
    activation: Unary,
}

impl Plain {
    /// `ffn_up` and `ffn_down` of a layer.
    pub fn load(b: &mut Builder<'_>, layer: usize, activation: Unary) -> Result<Plain, Error> {
        let n_ff = b.n_ff(layer)?;
        Plain::load_named(b, layer, "", n_ff, activation)
    }

    /// As [`Plain::load`] for names that end in `suffix`.
    pub fn load_named(
        b: &mut Builder<'_>,
        layer: usize,
        suffix: &str,
        n_ff: usize,
        activation: Unary,
    ) -> Result<Plain, Error> {
        let n_embd = b.hparams.n_embd;
        let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}");
        Ok(Plain {
            up: Linear::load(b, &name("up"), [n_embd, n_ff])?,
            down: Linear::load(b, &name("down"), [n_ff, n_embd])?,
            activation,
        })
    }

    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        self.down.apply(graph, &self.activation.apply(graph, &self.up.apply(graph, input)))
    }
}
