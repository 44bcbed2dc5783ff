//! `cohere2`: Command R7B, Command A: attention and feed-forward beside each other; a window, and RoPE, in three of
//! four layers.

use super::{
    Attention, Error, LayerStep,
    parts::{Activation, Builder, Decoder, Gated, Layer, Norm, SelfAttention},
};
use crate::ggml::{Graph, Tensor};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let n_layer = b.hparams.n_layer;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(n_layer, window, 4)?;
    let logit_scale = b.keys.require_factor("logit_scale")?;
    let n_embd = b.hparams.n_embd;

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?;
        attention.rope = attention.rope.filter(|_| b.hparams.windows[i].is_some());
        Ok(Parallel {
            norm: Norm::centred(b, &format!("blk.{i}.attn_norm"), n_embd)?,
            attention,
            feed_forward: Gated::load(b, i, Activation::Silu)?,
        })
    })?;
    let output_norm = Norm::centred(b, "output_norm", n_embd)?;
    Ok(Decoder { logit_scale: Some(logit_scale), ..Decoder::load_with_norm(b, layers, output_norm)? })
}

/// Attention and feed-forward of the same normed input, both added to the residual stream.
struct Parallel {
    norm: Norm,
    attention: SelfAttention,
    feed_forward: Gated,
}

impl Layer for Parallel {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let input = self.norm.apply(graph, step.hidden);
        let attended = self.attention.apply(graph, step, &input, attention);
        let attended = step.kept(graph, &attended);
        let output = self.feed_forward.apply(graph, &step.kept(graph, &input));
        graph.add(&graph.add(&output, &step.kept(graph, step.hidden)), &attended)
    }
}
