//! A gated delta net: a matrix for each head that forgets by a gate, and into which each token writes what its key does not
//! yet bring back (Qwen3-Next).

use super::{
    Builder, Error, Linear, Norm,
    short_conv::{convolve, heads},
};
use crate::{
    ggml::{Graph, Tensor},
    model::{Attention, LayerStep, Mixed, StateSize},
};

/// A gated delta net over keys, queries and values that went through a convolution, with a gated norm behind it.
pub(in crate::model) struct DeltaNet {
    mixed: Projection,
    rates: Rates,
    kernel: Tensor,
    dt_bias: Tensor,
    /// What the decay is multiplied by, negative.
    a: Tensor,
    norm: Norm,
    output: Linear,
    sizes: Sizes,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Elements of a head, of keys and of values.
    head: usize,
    key_heads: usize,
    heads: usize,
    eps: f32,
}

/// Where keys, queries, values and the gate of the output come from.
enum Projection {
    Separate {
        qkv: Linear,
        gate: Linear,
    },
    /// For each key head its query, its key, and the values and gates of the heads that it serves.
    Joint(Linear),
}

/// Where each head's rates of writing (beta) and of forgetting (alpha) come from.
enum Rates {
    Separate {
        beta: Linear,
        alpha: Linear,
    },
    /// For each key head the betas, then the alphas of the heads that it serves. Neighbouring heads share keys here.
    Joint(Linear),
}

impl Sizes {
    fn of(b: &Builder<'_>) -> Result<Sizes, Error> {
        let head = b.keys.count("ssm.state_size")?;
        let (key_heads, heads) = (b.keys.count("ssm.group_count")?, b.keys.count("ssm.time_step_rank")?);
        if heads % key_heads != 0 {
            let why = format!("{heads}, which the {key_heads} heads of keys do not divide");
            return Err(b.keys.error("ssm.time_step_rank", why));
        }
        let inner = b.keys.count("ssm.inner_size")?;
        if inner != head * heads {
            let why = format!("{inner}, expected {heads} heads of {head}");
            return Err(b.keys.error("ssm.inner_size", why));
        }
        Ok(Sizes { head, key_heads, heads, eps: b.hparams.norm_eps })
    }

    fn key_width(self) -> usize {
        self.head * self.key_heads
    }

    fn value_width(self) -> usize {
        self.head * self.heads
    }

    /// Heads that share keys.
    fn shared(self) -> usize {
        self.heads / self.key_heads
    }
}

impl DeltaNet {
    /// `attn_qkv` and `attn_gate` (or `ssm_in` for both), `ssm_beta` and `ssm_alpha` (or `ssm_ba`), `ssm_conv1d`, `ssm_dt`,
    /// `ssm_a`, `ssm_norm` and `ssm_out` of a layer.
    pub fn load(b: &mut Builder<'_>, layer: usize) -> Result<DeltaNet, Error> {
        let sizes = Sizes::of(b)?;
        let (n_embd, n_values) = (b.hparams.n_embd, sizes.value_width());
        let channels = 2 * sizes.key_width() + n_values;
        let width = b.kernel_width("ssm.conv_kernel")?;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mixed = if b.loader.has(&name("ssm_in.weight")) {
            Projection::Joint(Linear::load(b, &name("ssm_in"), [n_embd, channels + n_values])?)
        } else {
            let qkv = Linear::load(b, &name("attn_qkv"), [n_embd, channels])?;
            Projection::Separate { qkv, gate: Linear::load(b, &name("attn_gate"), [n_embd, n_values])? }
        };
        let rates = if b.loader.has(&name("ssm_ba.weight")) {
            Rates::Joint(Linear::load(b, &name("ssm_ba"), [n_embd, 2 * sizes.heads])?)
        } else {
            let beta = Linear::load(b, &name("ssm_beta"), [n_embd, sizes.heads])?;
            Rates::Separate { beta, alpha: Linear::load(b, &name("ssm_alpha"), [n_embd, sizes.heads])? }
        };
        let net = DeltaNet {
            mixed,
            rates,
            kernel: b.loader.rows(&name("ssm_conv1d.weight"), [width, channels])?,
            dt_bias: b.loader.vector(&name("ssm_dt.bias"), sizes.heads)?,
            a: b.loader.vector(&name("ssm_a"), sizes.heads)?,
            norm: Norm::rms(b, &name("ssm_norm"), sizes.head)?,
            output: Linear::load(b, &name("ssm_out"), [n_values, n_embd])?,
            sizes,
        };
        // Tensors have these sizes, so that they are none that a file only claims.
        let matrices = sizes.head * n_values;
        b.hparams.states[layer] = Some(StateSize { columns: (width - 1) * channels, matrices });
        Ok(net)
    }

    /// `input` `[n_embd, n]` → `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, step: &LayerStep<'_>, input: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let Sizes { head, heads, .. } = self.sizes;
        let n = input.shape()[1];
        let (mixed, z) = self.project(graph, input);
        let (beta, alpha) = self.rates(graph, input);
        let beta = graph.sigmoid(&beta);
        let gate = graph.mul(&graph.softplus(&graph.add(&alpha, &self.dt_bias)), &self.a);
        let attended = attention.recur(graph, step.index, &[&mixed, &gate, &beta], &|inputs, state| {
            let [mixed, gate, beta] = inputs else { unreachable!("as many as were given") };
            let (convolved, columns) = convolve(graph, mixed, state, &self.kernel);
            let matrices = state.matrices.as_ref().map(|matrices| graph.get_rows(matrices, &state.row));
            let matrices = matrices.expect("the layer's state has matrices");
            let (output, matrices) = self.deltas(graph, &graph.silu(&convolved), [gate, beta], &matrices);
            Mixed { output, columns, matrices: Some(matrices) }
        });
        let attended = self.norm.apply(graph, &graph.reshape(&attended, &[head, heads, n]));
        let gated = graph.mul(&attended, &graph.silu(&graph.reshape(&z, &[head, heads, n])));
        self.output.apply(graph, &graph.reshape(&gated, &[head * heads, n]))
    }

    /// Queries, keys and values as rows `[channels, n]`, and the output's gate `[value width, n]`.
    fn project(&self, graph: &Graph, input: &Tensor) -> (Tensor, Tensor) {
        let joint = match &self.mixed {
            Projection::Separate { qkv, gate } => return (qkv.apply(graph, input), gate.apply(graph, input)),
            Projection::Joint(joint) => joint.apply(graph, input),
        };
        let Sizes { head, key_heads, .. } = self.sizes;
        let n_values = head * self.sizes.shared();
        let [_, n, ..] = joint.shape();
        let group = 2 * head + 2 * n_values;
        let grouped = graph.reshape(&joint, &[group, key_heads, n]);
        let part = |first: usize, width: usize| {
            let [element_bytes, group_bytes, token_bytes, _] = grouped.strides();
            let shape = [width, key_heads, n];
            let part = graph.view(&grouped, shape, [group_bytes, token_bytes], first * element_bytes);
            graph.reshape(&graph.contiguous(&part), &[width * key_heads, n])
        };
        let (q, k, v) = (part(0, head), part(head, head), part(2 * head, n_values));
        (graph.concat(&graph.concat(&q, &k, 0), &v, 0), part(2 * head + n_values, n_values))
    }

    /// Each head's beta and alpha `[heads, n]`, as products give them.
    fn rates(&self, graph: &Graph, input: &Tensor) -> (Tensor, Tensor) {
        let joint = match &self.rates {
            Rates::Separate { beta, alpha } => return (beta.apply(graph, input), alpha.apply(graph, input)),
            Rates::Joint(joint) => joint.apply(graph, input),
        };
        let Sizes { key_heads, heads, .. } = self.sizes;
        let (shared, n) = (self.sizes.shared(), joint.shape()[1]);
        let grouped = graph.reshape(&joint, &[2 * shared, key_heads, n]);
        let [element_bytes, group_bytes, token_bytes, _] = grouped.strides();
        let part = |first: usize| {
            let shape = [shared, key_heads, n];
            let part = graph.view(&grouped, shape, [group_bytes, token_bytes], first * element_bytes);
            graph.reshape(&graph.contiguous(&part), &[heads, n])
        };
        (part(0), part(shared))
    }

    /// The net itself for tokens of one sequence. → outputs `[value width, n]`, and the matrices after them.
    fn deltas(&self, graph: &Graph, qkv: &Tensor, rates: [&Tensor; 2], matrices: &Tensor) -> (Tensor, Tensor) {
        let sizes @ Sizes { head, key_heads, heads: n_heads, .. } = self.sizes;
        let n = qkv.shape()[1];
        let keys = |first: usize| self.keys(graph, &heads(graph, qkv, first, head, key_heads));
        let (q, k) = (keys(0), keys(sizes.key_width()));
        let v = heads(graph, qkv, 2 * sizes.key_width(), head, n_heads);
        let [gate, beta] = rates.map(|rates| graph.reshape(rates, &[1, n_heads, n]));
        let before = graph.reshape(matrices, &[head, head, n_heads]);
        let result = graph.gated_delta_net([&q, &k, &v], &gate, &beta, &before);
        let output = graph.rows(&result, 0, n);
        (output, graph.rows(&result, n, head))
    }

    /// Queries or keys of length 1; where neighbouring heads share them, one for each head.
    fn keys(&self, graph: &Graph, keys: &Tensor) -> Tensor {
        let Sizes { head, key_heads, heads, eps } = self.sizes;
        let size = head as f32;
        let unit = graph.scale(&graph.rms_norm(keys, eps / size), 1.0 / size.sqrt());
        let n = keys.shape()[2];
        match self.rates {
            Rates::Joint(_) if heads > key_heads => {
                let apart = graph.reshape(&unit, &[head, 1, key_heads * n]);
                let repeated = graph.repeat(&apart, [head, self.sizes.shared(), key_heads * n]);
                graph.reshape(&repeated, &[head, heads, n])
            }
            _ => unit,
        }
    }
}

/// Layers that attend, in a model of which the others are delta nets: `attention.recurrent_layers` names these, else every
/// `full_attention_interval`-th (4) attends.
pub(in crate::model) fn attending_layers(b: &Builder<'_>) -> Result<Vec<bool>, Error> {
    let n_layer = b.hparams.n_layer;
    if let Some(recurrent) = b.keys.flags("attention.recurrent_layers", n_layer)? {
        return Ok(recurrent.into_iter().map(|recurrent| !recurrent).collect());
    }
    let interval = b.keys.optional_count("full_attention_interval")?.unwrap_or(4);
    Ok((1..=n_layer).map(|layer| layer % interval == 0).collect())
}
