//! Mixtures of experts: how tokens are routed, and what the chosen experts give.

use super::{Activation, Builder, Error, Gated, Linear, Routing, Unary, linear::ExpertLinear, routing::Groups};
use crate::ggml::{Graph, Tensor};

/// Experts that one token may use: each adds nodes to the graph, and no model comes near.
const MAX_USED: usize = 64;

/// A mixture of experts: each token goes through the few that its router prefers.
pub(in crate::model) struct Experts {
    router: Linear,
    /// Added to the scores by which experts are chosen; their weights do without.
    selection_bias: Option<Tensor>,
    groups: Option<Groups>,
    gate_and_up: GateAndUp,
    down: ExpertLinear,
    n_used: usize,
    routing: Routing,
    /// The used experts' weights are multiplied by this.
    pub weight_scale: Option<f32>,
    /// Whether an expert's weight multiplies its input and not its output.
    pub weighs_inputs: bool,
    /// Of gated experts.
    activation: Activation,
    shared: Option<Shared>,
    /// The sum of used and shared experts is multiplied by this.
    pub output_scale: Option<f32>,
}

enum GateAndUp {
    Separate {
        gate: ExpertLinear,
        up: ExpertLinear,
    },
    /// The gates' rows and after them those of `up`, in one matrix.
    Fused(ExpertLinear),
    /// No gate.
    Up(ExpertLinear, Unary),
}

/// An expert that every token goes through.
struct Shared {
    expert: Gated,
    /// The sigmoid of its product with the input weighs the expert.
    gate: Option<Tensor>,
}

impl Experts {
    /// `ffn_gate_inp`, `ffn_gate_exps`, `ffn_up_exps` (or `ffn_gate_up_exps` for both) and `ffn_down_exps` of a layer,
    /// experts of `n_ff` each; the router's `exp_probs_b` where the file has it.
    pub fn load(
        b: &mut Builder<'_>,
        layer: usize,
        n_ff: usize,
        routing: Routing,
        activation: Activation,
    ) -> Result<Experts, Error> {
        let n_embd = b.hparams.n_embd;
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        let gate_and_up = |b: &mut Builder<'_>, n_expert: usize| {
            if b.loader.has(&format!("{}.weight", name("gate_up_exps"))) {
                let both = ExpertLinear::load(b, &name("gate_up_exps"), [n_embd, 2 * n_ff, n_expert])?;
                return Ok(GateAndUp::Fused(both));
            }
            let gate = ExpertLinear::load(b, &name("gate_exps"), [n_embd, n_ff, n_expert])?;
            Ok(GateAndUp::Separate { gate, up: ExpertLinear::load(b, &name("up_exps"), [n_embd, n_ff, n_expert])? })
        };
        Experts::load_with(b, layer, [n_embd, n_ff], routing, activation, gate_and_up)
    }

    /// As [`Experts::load`] for experts without a gate, of inputs `n_in` wide.
    pub fn load_plain(
        b: &mut Builder<'_>,
        layer: usize,
        [n_in, n_ff]: [usize; 2],
        routing: Routing,
        activation: Unary,
    ) -> Result<Experts, Error> {
        let up = |b: &mut Builder<'_>, n_expert: usize| {
            let up = ExpertLinear::load(b, &format!("blk.{layer}.ffn_up_exps"), [n_in, n_ff, n_expert])?;
            Ok(GateAndUp::Up(up, activation))
        };
        Experts::load_with(b, layer, [n_in, n_ff], routing, Activation::Silu, up)
    }

    fn load_with(
        b: &mut Builder<'_>,
        layer: usize,
        [n_in, n_ff]: [usize; 2],
        routing: Routing,
        activation: Activation,
        gate_and_up: impl FnOnce(&mut Builder<'_>, usize) -> Result<GateAndUp, Error>,
    ) -> Result<Experts, Error> {
        let n_embd = b.hparams.n_embd;
        let (n_expert, n_used) = (b.keys.count("expert_count")?, b.keys.count("expert_used_count")?);
        if n_used > n_expert.min(MAX_USED) {
            let why = format!("{n_used} of {n_expert} experts; at most {} can be used", n_expert.min(MAX_USED));
            return Err(b.keys.error("expert_used_count", why));
        }
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        let router = Linear::load(b, &name("gate_inp"), [n_embd, n_expert])?;
        let gate_and_up = gate_and_up(b, n_expert)?;
        Ok(Experts {
            router,
            selection_bias: b.loader.optional_vector(&format!("blk.{layer}.exp_probs_b.bias"), n_expert)?,
            groups: Groups::of_keys(b, n_expert)?,
            gate_and_up,
            down: ExpertLinear::load(b, &name("down_exps"), [n_ff, n_in, n_expert])?,
            n_used,
            routing,
            weight_scale: None,
            weighs_inputs: false,
            activation,
            shared: None,
            output_scale: None,
        })
    }

    /// As [`Experts::load`], gated by silu, routed as the file's keys say ([`Routing::of_keys`]), with the factor
    /// `expert_weights_scale`.
    pub fn load_by_keys(
        b: &mut Builder<'_>,
        layer: usize,
        n_ff: usize,
        default: Option<Routing>,
    ) -> Result<Experts, Error> {
        let routing = Routing::of_keys(b, default)?;
        let weight_scale = b.keys.factor("expert_weights_scale")?.filter(|&scale| scale != 1.0);
        Ok(Experts { weight_scale, ..Experts::load(b, layer, n_ff, routing, Activation::Silu)? })
    }

    /// Adds a layer's `expert_shared_count` shared experts of width `n_ff` as one, where there are any.
    pub fn with_shared_by_count(self, b: &mut Builder<'_>, layer: usize, n_ff: usize) -> Result<Experts, Error> {
        match b.keys.optional_count_or_zero("expert_shared_count")? {
            0 => Ok(self),
            n_shared => self.with_shared(b, layer, n_shared * n_ff),
        }
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

    /// With other activations: of the experts, and of the shared one.
    pub fn with_activations(self, activation: Activation, of_shared: Activation) -> Experts {
        let with = |shared: Shared| Shared { expert: shared.expert.with_activation(of_shared), ..shared };
        Experts { activation, shared: self.shared.map(with), ..self }
    }

    /// The shared expert's last product summed in f32.
    pub(super) fn with_f32_sums_of_shared(self) -> Experts {
        let shared = self.shared.map(|shared| Shared { expert: shared.expert.with_f32_sums(), ..shared });
        Experts { shared, ..self }
    }

    pub(super) fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        self.apply_routed(graph, input, self.logits(graph, input))
    }

    /// The router's logits `[n_expert, n]` for hidden states `[n_embd, n]`.
    pub fn logits(&self, graph: &Graph, hidden: &Tensor) -> Tensor {
        self.router.apply(graph, hidden)
    }

    /// `input` `[n_embd, n]` through the experts that these logits `[n_expert, n]` prefer.
    pub fn apply_routed(&self, graph: &Graph, input: &Tensor, logits: Tensor) -> Tensor {
        let [n_embd, n, ..] = input.shape();
        let (ids, weights) = self.route(graph, logits);
        let mut rows = graph.reshape(input, &[n_embd, 1, n]);
        if self.weighs_inputs {
            rows = graph.mul(&graph.repeat(&rows, [n_embd, self.n_used, n]), &weights);
        }
        let mut outputs = self.down.apply(graph, &self.activated(graph, &rows, &ids), &ids);
        if !self.weighs_inputs {
            outputs = graph.mul(&outputs, &weights);
        }
        // `[n_embd, n_used, n]`
        let [_, expert_bytes, token_bytes, _] = outputs.strides();
        let output = |i: usize| graph.view(&outputs, [n_embd, n, 1], [token_bytes, token_bytes * n], i * expert_bytes);
        let first = output(0);
        let sum = (1..self.n_used).fold(first, |sum, i| graph.add(&sum, &output(i)));
        let sum = graph.contiguous_if_needed(&sum);
        let sum = match &self.shared {
            None => sum,
            Some(shared) => graph.add(&sum, &shared.apply(graph, input)),
        };
        self.output_scale.map_or_else(|| sum.clone(), |factor| graph.scale(&sum, factor))
    }

    /// What the used experts multiply with `down`.
    fn activated(&self, graph: &Graph, rows: &Tensor, ids: &Tensor) -> Tensor {
        let (gate, up) = match &self.gate_and_up {
            GateAndUp::Up(up, activation) => return activation.apply(graph, &up.apply(graph, rows, ids)),
            GateAndUp::Separate { gate, up } => {
                let up = up.apply(graph, rows, ids);
                (gate.apply(graph, rows, ids), up)
            }
            GateAndUp::Fused(both) => {
                let both = both.apply(graph, rows, ids);
                let [width, n_used, n, _] = both.shape();
                let [element_bytes, expert_bytes, token_bytes, _] = both.strides();
                let half = |first: usize| {
                    let shape = [width / 2, n_used, n];
                    graph.view(&both, shape, [expert_bytes, token_bytes], first * element_bytes)
                };
                (half(0), half(width / 2))
            }
        };
        self.activation.apply(graph, &gate, &up)
    }

    /// The experts of each token `[n_used, n]` (i32) and their weights `[1, n_used, n]`.
    fn route(&self, graph: &Graph, logits: Tensor) -> (Tensor, Tensor) {
        let [n_expert, n, ..] = logits.shape();
        let scores = self.routing.scores(graph, logits);
        let chosen_by = self.selection_bias.iter().fold(scores.clone(), |scores, bias| graph.add(&scores, bias));
        let chosen_by = self.groups.map_or_else(|| chosen_by.clone(), |groups| groups.masked(graph, &chosen_by));
        let ids = graph.top_n(&chosen_by, self.n_used);
        let used = graph.get_rows(&graph.reshape(&scores, &[1, n_expert, n]), &ids);
        let weights = self.routing.weights(graph, graph.reshape(&used, &[self.n_used, n]));
        let weights = self.weight_scale.map_or_else(|| weights.clone(), |factor| graph.scale(&weights, factor));
        (ids, graph.reshape(&weights, &[1, self.n_used, n]))
    }
}

impl Shared {
    fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let output = self.expert.apply(graph, input);
        match &self.gate {
            Some(gate) => graph.mul(&output, &graph.sigmoid(&graph.mul_mat(gate, input))),
            None => output,
        }
    }
}
