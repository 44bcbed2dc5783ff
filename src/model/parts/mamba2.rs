//! Mamba-2: a state for each head that decays by what the token says, and into which the token writes.

use super::{
    Builder, Error, Linear, Norm,
    short_conv::{columns, convolve, heads},
};
use crate::{
    ggml::{Graph, Tensor},
    model::{Attention, LayerStep, Mixed, State, StateSize},
};

/// A selective state-space layer behind a convolution, gated, with a norm over groups.
pub(in crate::model) struct Mamba2 {
    input: Linear,
    kernel: Tensor,
    kernel_bias: Option<Tensor>,
    dt_bias: Tensor,
    /// `[1, heads]`: what the time step is multiplied by in the decay, negative; and the input's share of the output.
    a: Tensor,
    d: Tensor,
    /// Over each group.
    norm: Option<Norm>,
    output: Linear,
    sizes: Sizes,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Elements of all heads.
    inner: usize,
    heads: usize,
    /// Elements of a head's state for each of its own.
    state: usize,
    /// Groups of heads that share `b` and `c`.
    groups: usize,
}

impl Sizes {
    fn of(b: &Builder<'_>) -> Result<Sizes, Error> {
        let (inner, heads) = (b.keys.count("ssm.inner_size")?, b.keys.count("ssm.time_step_rank")?);
        let (state, groups) = (b.keys.count("ssm.state_size")?, b.keys.count("ssm.group_count")?);
        for (key, parts) in [("ssm.time_step_rank", heads), ("ssm.group_count", groups)] {
            if inner % parts != 0 {
                return Err(b.keys.error(key, format!("{parts}, which does not divide the inner size {inner}")));
            }
        }
        if heads % groups != 0 {
            return Err(b.keys.error("ssm.group_count", format!("{groups}, which does not divide the {heads} heads")));
        }
        Ok(Sizes { inner, heads, state, groups })
    }

    /// What goes through the convolution.
    fn channels(self) -> usize {
        self.inner + 2 * self.groups * self.state
    }

    fn head(self) -> usize {
        self.inner / self.heads
    }
}

impl Mamba2 {
    /// `ssm_in`, `ssm_conv1d`, `ssm_dt`, `ssm_a`, `ssm_d`, `ssm_norm` where the file has it, and `ssm_out` of a layer.
    pub fn load(b: &mut Builder<'_>, layer: usize) -> Result<Mamba2, Error> {
        let sizes @ Sizes { inner, heads, state, groups } = Sizes::of(b)?;
        let (n_embd, channels) = (b.hparams.n_embd, sizes.channels());
        let width = b.kernel_width("ssm.conv_kernel")?;
        let name = |part: &str| format!("blk.{layer}.ssm_{part}");
        let norm = b.loader.has(&name("norm.weight"));
        let mamba = Mamba2 {
            input: Linear::load(b, &name("in"), [n_embd, inner + channels + heads])?,
            kernel: b.loader.rows(&name("conv1d.weight"), [width, channels])?,
            kernel_bias: b.loader.optional_vector(&name("conv1d.bias"), channels)?,
            dt_bias: b.loader.vector(&name("dt.bias"), heads)?,
            a: b.loader.rows(&name("a"), [1, heads])?,
            d: b.loader.rows(&name("d"), [1, heads])?,
            norm: norm.then(|| Norm::of_groups(b, &name("norm"), [inner / groups, groups])).transpose()?,
            output: Linear::load(b, &name("out"), [inner, n_embd])?,
            sizes,
        };
        // Tensors have these sizes, so that they are none that a file only claims.
        b.hparams.states[layer] = Some(StateSize { columns: (width - 1) * channels, matrices: state * inner });
        Ok(mamba)
    }

    /// `input` `[n_embd, n]` → `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, step: &LayerStep<'_>, input: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let Sizes { inner, heads, groups, .. } = self.sizes;
        let (channels, n) = (self.sizes.channels(), input.shape()[1]);
        let all = self.input.apply(graph, input);
        let z = columns(graph, &all, 0, inner);
        let mixed = columns(graph, &all, inner, channels);
        let dt = graph.contiguous(&columns(graph, &all, inner + channels, heads));
        let dt = graph.add(&dt, &self.dt_bias);
        let scanned = attention
            .recur(graph, step.index, &[&mixed, &dt], &|inputs, state| self.scan(graph, &inputs[0], &inputs[1], state));
        let gated = graph.swiglu(&graph.contiguous(&z), &scanned);
        let normed = match &self.norm {
            Some(norm) => norm.apply(graph, &graph.reshape(&gated, &[inner / groups, groups, n])),
            None => gated,
        };
        self.output.apply(graph, &graph.reshape(&normed, &[inner, n]))
    }

    /// Tokens of one sequence: `mixed` `[channels, n]`, `dt` `[heads, n]` → `[inner, n]`.
    fn scan(&self, graph: &Graph, mixed: &Tensor, dt: &Tensor, state: &State) -> Mixed {
        let sizes @ Sizes { inner, heads: n_heads, state: n_state, groups } = self.sizes;
        let (head, n) = (sizes.head(), mixed.shape()[1]);
        let (convolved, columns) = convolve(graph, mixed, state, &self.kernel);
        let convolved = match &self.kernel_bias {
            Some(bias) => graph.add(&convolved, bias),
            None => convolved,
        };
        let convolved = graph.silu(&convolved);
        let x = heads(graph, &convolved, 0, head, n_heads);
        let b = heads(graph, &convolved, inner, n_state, groups);
        let c = heads(graph, &convolved, inner + groups * n_state, n_state, groups);
        let matrices = state.matrices.as_ref().expect("the layer's state has matrices");
        let rows = matrices.shape()[1];
        let states = graph.reshape(matrices, &[n_state, head, n_heads, rows]);
        let result = graph.ssm_scan(&states, &state.row, [&x, dt], &self.a, [&b, &c]);
        let part = |first: usize, width: usize, n: usize| {
            let row_bytes = width * size_of::<f32>();
            graph.view(&result, [width, n, 1], [row_bytes, row_bytes * n], first * size_of::<f32>())
        };
        let y = graph.reshape(&part(0, inner, n), &[head, n_heads, n]);
        let y = graph.add(&y, &graph.mul(&x, &self.d));
        let matrices = Some(part(inner * n, n_state * inner, 1));
        Mixed { output: graph.reshape(&y, &[inner, n]), columns, matrices }
    }
}
