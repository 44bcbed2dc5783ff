//! Mixtures of experts: how tokens are routed, and what the chosen experts give.

use super::{Activation, Builder, Error, Gated, Linear, linear::ExpertLinear};
use crate::ggml::{Graph, Tensor};

/// Experts that one token may use: each adds nodes to the graph, and no model comes near.
const MAX_USED: usize = 64;

/// A mixture of experts: each token goes through the few that its router prefers.
pub(in crate::model) struct Experts {
    router: Linear,
    gate: ExpertLinear,
    up: ExpertLinear,
    down: ExpertLinear,
    n_used: usize,
    routing: Routing,
    activation: Activation,
    shared: Option<Shared>,
}

/// How an expert's weight comes from the router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Routing {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over all experts, the used ones' weights then divided by their sum.
    SoftmaxNormalised,
    /// Softmax over the logits of the used experts.
    SoftmaxOfUsed,
}

/// An expert that every token goes through.
struct Shared {
    expert: Gated,
    /// The sigmoid of its product with the input weighs the expert.
    gate: Option<Tensor>,
}

impl Experts {
    /// `ffn_gate_inp`, `ffn_gate_exps`, `ffn_up_exps` and `ffn_down_exps` of a layer, experts of `n_ff` each.
    pub fn load(
        b: &mut Builder<'_>,
        layer: usize,
        n_ff: usize,
        routing: Routing,
        activation: Activation,
    ) -> Result<Experts, Error> {
        let n_embd = b.hparams.n_embd;
        let (n_expert, n_used) = (b.keys.count("expert_count")?, b.keys.count("expert_used_count")?);
        if n_used > n_expert.min(MAX_USED) {
            let why = format!("{n_used} of {n_expert} experts; at most {} can be used", n_expert.min(MAX_USED));
            return Err(b.keys.error("expert_used_count", why));
        }
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        Ok(Experts {
            router: Linear::load(b, &name("gate_inp"), [n_embd, n_expert])?,
            gate: ExpertLinear::load(b, &name("gate_exps"), [n_embd, n_ff, n_expert])?,
            up: ExpertLinear::load(b, &name("up_exps"), [n_embd, n_ff, n_expert])?,
            down: ExpertLinear::load(b, &name("down_exps"), [n_ff, n_embd, n_expert])?,
            n_used,
            routing,
            activation,
            shared: None,
        })
    }

    /// Adds a layer's shared expert of width `n_ff`: `ffn_gate_shexp`, `ffn_up_shexp`, `ffn_down_shexp`.
    pub fn with_shared(mut self, b: &mut Builder<'_>, layer: usize, n_ff: usize) -> Result<Experts, Error> {
        let expert = Gated::load_named(b, layer, "_shexp", n_ff, self.activation)?;
        self.shared = Some(Shared { expert, gate: None });
        Ok(self)
    }

    /// As [`Experts::with_shared`], weighed by the gate `ffn_gate_inp_shexp`.
    pub fn with_gated_shared(mut self, b: &mut Builder<'_>, layer: usize, n_ff: usize) -> Result<Experts, Error> {
        let gate = b.loader.vector(&format!("blk.{layer}.ffn_gate_inp_shexp.weight"), b.hparams.n_embd)?;
        let expert = Gated::load_named(b, layer, "_shexp", n_ff, self.activation)?;
        self.shared = Some(Shared { expert, gate: Some(gate) });
        Ok(self)
    }

    pub(super) fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let [n_embd, n, ..] = input.shape();
        let (ids, weights) = self.route(graph, input);
        let input_rows = graph.reshape(input, &[n_embd, 1, n]);
        let up = self.up.apply(graph, &input_rows, &ids);
        let gate = self.gate.apply(graph, &input_rows, &ids);
        let outputs = self.down.apply(graph, &self.activation.apply(graph, &gate, &up), &ids);
        // `[n_embd, n_used, n]`
        let outputs = graph.mul(&outputs, &weights);
        let [_, expert_bytes, token_bytes, _] = outputs.strides();
        let output = |i: usize| graph.view(&outputs, [n_embd, n, 1], [token_bytes, token_bytes * n], i * expert_bytes);
        let first = output(0);
        let sum = (1..self.n_used).fold(first, |sum, i| graph.add(&sum, &output(i)));
        let sum = graph.contiguous_if_needed(&sum);
        match &self.shared {
            None => sum,
            Some(Shared { expert, gate }) => {
                let shared = expert.apply(graph, input);
                let shared = match gate {
                    Some(gate) => graph.mul(&shared, &graph.sigmoid(&graph.mul_mat(gate, input))),
                    None => shared,
                };
                graph.add(&sum, &shared)
            }
        }
    }

    /// The experts of each token `[n_used, n]` (i32) and their weights `[1, n_used, n]`.
    fn route(&self, graph: &Graph, input: &Tensor) -> (Tensor, Tensor) {
        let logits = self.router.apply(graph, input);
        let [n_expert, n, ..] = logits.shape();
        let scores = match self.routing {
            Routing::Softmax | Routing::SoftmaxNormalised => graph.soft_max_rows(&logits),
            Routing::SoftmaxOfUsed => logits,
        };
        let ids = graph.top_n(&scores, self.n_used);
        let used = graph.get_rows(&graph.reshape(&scores, &[1, n_expert, n]), &ids);
        let used = graph.reshape(&used, &[self.n_used, n]);
        let weights = match self.routing {
            Routing::Softmax => used,
            Routing::SoftmaxOfUsed => graph.soft_max_rows(&used),
            Routing::SoftmaxNormalised => {
                // The smallest f16 that is not subnormal keeps the quotient finite.
                let sum = graph.at_least(&graph.sum_rows(&used), 6.103_515_6e-5);
                graph.div(&used, &sum)
            }
        };
        (ids, graph.reshape(&weights, &[1, self.n_used, n]))
    }
}
