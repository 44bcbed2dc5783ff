//! A short convolution over the last tokens, gated before and after (LFM2), and the columns that any convolution keeps.

use super::{Builder, Error, Linear};
use crate::{
    ggml::{Graph, Tensor},
    model::{Attention, LayerStep, Mixed, State, StateSize},
};

/// `out × (c · conv(b · x))` of `b`, `c` and `x`, which one product gives.
pub(in crate::model) struct ShortConv {
    input: Linear,
    kernel: Tensor,
    output: Linear,
}

impl ShortConv {
    /// `shortconv.in_proj`, `shortconv.conv` and `shortconv.out_proj` of a layer.
    pub fn load(b: &mut Builder<'_>, layer: usize) -> Result<ShortConv, Error> {
        let n_embd = b.hparams.n_embd;
        let width = b.kernel_width("shortconv.l_cache")?;
        let name = |part: &str| format!("blk.{layer}.shortconv.{part}");
        let conv = ShortConv {
            input: Linear::load(b, &name("in_proj"), [n_embd, 3 * n_embd])?,
            kernel: b.loader.rows(&format!("{}.weight", name("conv")), [width, n_embd])?,
            output: Linear::load(b, &name("out_proj"), [n_embd, n_embd])?,
        };
        b.hparams.states[layer] = Some(StateSize { columns: (width - 1) * n_embd, matrices: 0 });
        Ok(conv)
    }

    /// `input` `[n_embd, n]` → `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, step: &LayerStep<'_>, input: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let all = self.input.apply(graph, input);
        let n_embd = all.shape()[0] / 3;
        let [b, c, x] = [0, 1, 2].map(|part| columns(graph, &all, part * n_embd, n_embd));
        let gated = graph.mul(&b, &x);
        let mixed = attention.recur(graph, step.index, &[&gated], &|inputs, state| {
            let (output, columns) = convolve(graph, &inputs[0], state, &self.kernel);
            Mixed { output, columns, matrices: None }
        });
        self.output.apply(graph, &graph.mul(&c, &mixed))
    }
}

/// A convolution over the tokens' columns `[channels, n]` and the last ones of before. → its output `[channels, n]`, and
/// the columns to keep.
pub(super) fn convolve(graph: &Graph, input: &Tensor, state: &State, kernel: &Tensor) -> (Tensor, Tensor) {
    let [width, channels, ..] = kernel.shape();
    let before = graph.reshape(&state.columns, &[width - 1, channels]);
    let all = graph.concat(&before, &graph.permute(input, [1, 0, 2, 3]), 0);
    let [element_bytes, channel_bytes, ..] = all.strides();
    let n = input.shape()[1];
    let shape = [width - 1, channels, 1];
    let kept = graph.view(&all, shape, [channel_bytes, channel_bytes * channels], n * element_bytes);
    (graph.ssm_conv(&all, kernel), kept)
}

/// Elements `first..first + width` of each row.
pub(super) fn columns(graph: &Graph, rows: &Tensor, first: usize, width: usize) -> Tensor {
    let [element_bytes, row_bytes, ..] = rows.strides();
    let n = rows.shape()[1];
    graph.view(rows, [width, n, 1], [row_bytes, row_bytes * n], first * element_bytes)
}

/// Those elements as heads of `size`, `[size, heads, n]`.
pub(super) fn heads(graph: &Graph, rows: &Tensor, first: usize, size: usize, n_heads: usize) -> Tensor {
    let [element_bytes, row_bytes, ..] = rows.strides();
    let shape = [size, n_heads, rows.shape()[1]];
    graph.view(rows, shape, [size * element_bytes, row_bytes], first * element_bytes)
}
