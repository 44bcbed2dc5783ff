//! `smallthinker`: SmallThinker: experts gated by relu, chosen by what enters the layer, before its attention; the larger
//! model has a window, and RoPE, in three of four layers.

use super::{
    Attention, Error, LayerStep,
    parts::{Activation, Builder, Decoder, Experts, Layer, Norm, Routing, SelfAttention},
};
use crate::ggml::{Graph, Rope, RopeKind, Tensor};

/// The window, whatever the file's key says beyond there being one.
const WINDOW: usize = 4096;
/// Of every so many layers the first has no RoPE, in models with windows. No key says so.
const NO_ROPE_STEP: usize = 4;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let has_windows = b.keys.window()?.is_some();
    if has_windows {
        b.hparams.windows = b.keys.windows_after_global(b.hparams.n_layer, WINDOW, 4)?;
    }
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(b.hparams.rope.freq_base);
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let routing = Routing::of_keys(b, None)?.normalised();

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?;
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(Rope { freq_base, ..b.hparams.rope.clone() });
        }
        attention.rope = attention.rope.filter(|_| !has_windows || i % NO_ROPE_STEP != 0);
        Ok(RoutedFirst {
            attn_norm: Norm::of_layer(b, i, "attn_norm")?,
            attention,
            ffn_norm: Norm::of_layer(b, i, "ffn_norm")?,
            experts: Experts::load(b, i, n_ff, routing, Activation::Relu)?,
        })
    })?;
    Decoder::load(b, layers)
}

/// A layer whose experts are chosen by what enters it.
struct RoutedFirst {
    attn_norm: Norm,
    attention: SelfAttention,
    ffn_norm: Norm,
    experts: Experts,
}

impl Layer for RoutedFirst {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let logits = step.kept(graph, &self.experts.logits(graph, step.hidden));
        let input = self.attn_norm.apply(graph, step.hidden);
        let attended = self.attention.apply(graph, step, &input, attention);
        let hidden = graph.add(&step.kept(graph, &attended), &step.kept(graph, step.hidden));
        let output = self.experts.apply_routed(graph, &self.ffn_norm.apply(graph, &hidden), logits);
        graph.add(&output, &hidden)
    }
}
