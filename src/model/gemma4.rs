//! `gemma4`: windows in most layers, whose heads are of another size; the last layers read an earlier one's keys and values;
//! values are normed, and in some layers made of the keys; embeddings for each layer; experts beside a feed-forward.

use super::{
    Attention, Error, LayerStep,
    parts::{
        Activation, Block, Builder, Decoder, Experts, Gated, Layer, LayerEmbeddings, Norm, OwnInput, RopeFactors,
        Routing, SelfAttention,
    },
};
use crate::ggml::{Graph, Rope, RopeKind, Tensor};

const OWN_WIDTH: &str = "embedding_length_per_layer_input";

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(n_layer, window, 6)?;
    let windowed_rope = use_sizes_of_windowed(b)?;
    let n_shared = b.keys.optional_count_or_zero("attention.shared_kv_layers")?;
    b.share_stores(n_layer.saturating_sub(n_shared), "attention.shared_kv_layers")?;
    let rope_factors = RopeFactors::load_of(b, b.hparams.head_size / 2)?;
    let own_width = b.keys.optional_count_or_zero(OWN_WIDTH)?;

    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load_with_values_from_keys(b, i)?.with_head_norms(b, i)?;
        let v_norm = Some(Norm::without_weights(b, attention.value_size));
        let mut attention = SelfAttention { scale: 1.0, v_norm, ..attention };
        match b.hparams.windows[i] {
            Some(_) => attention.rope = Some(windowed_rope.clone()),
            None => attention.rope_factors = rope_factors.clone(),
        }
        let feed_forward = Gated::load(b, i, Activation::Gelu)?;
        Ok(Gemma4Layer {
            block: Block::sandwich(b, i, attention, feed_forward)?,
            experts: match b.loader.has(&format!("blk.{i}.ffn_gate_inp.weight")) {
                true => Some(Beside::load(b, i)?),
                false => None,
            },
            own: (own_width > 0).then(|| OwnInput::load(b, i, own_width)).transpose()?,
            scale: b.loader.optional_vector(&format!("blk.{i}.layer_output_scale.weight"), 1)?,
        })
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    let logit_softcap = b.keys.optional_f32("final_logit_softcapping")?.unwrap_or(30.0);
    let logit_softcap = Some(logit_softcap).filter(|&cap| cap != 0.0);
    let layer_embeddings = (own_width > 0).then(|| LayerEmbeddings::load(b, own_width, OWN_WIDTH)).transpose()?;
    Ok(Decoder {
        embedding_scale,
        scales_tokens_alone: true,
        logit_softcap,
        layer_embeddings,
        ..Decoder::load(b, layers)?
    })
}

/// Heads of layers with windows are of another size; their RoPE.
fn use_sizes_of_windowed(b: &mut Builder<'_>) -> Result<Rope, Error> {
    let key = "attention.key_length_swa";
    let size = b.keys.optional_count(key)?.unwrap_or(b.hparams.head_size);
    if size % 2 != 0 {
        return Err(b.keys.error(key, format!("a head of {size} elements is odd")));
    }
    let value_size = b.keys.optional_count("attention.value_length_swa")?.unwrap_or(b.hparams.value_size);
    let key = "rope.dimension_count_swa";
    let n_rot = b.keys.optional_count(key)?.unwrap_or(b.hparams.rope.n_rot);
    if n_rot > size || n_rot % 2 != 0 {
        let why = format!("{n_rot}, expected an even number up to the head's {size} elements");
        return Err(b.keys.error(key, why));
    }
    let hparams = &mut b.hparams;
    for layer in (0..hparams.n_layer).filter(|&layer| hparams.windows[layer].is_some()) {
        (hparams.head_sizes[layer], hparams.value_sizes[layer]) = (size, value_size);
    }
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(10_000.0);
    // The scaling of longer contexts is the global layers' alone.
    Ok(Rope { n_rot, freq_base, freq_scale: 1.0, ..hparams.rope.clone() })
}

/// A layer with norms on both sides, and what some of these models have besides.
struct Gemma4Layer {
    block: Block,
    experts: Option<Beside>,
    own: Option<OwnInput>,
    /// What leaves the layer is multiplied by this.
    scale: Option<Tensor>,
}

impl Layer for Gemma4Layer {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let hidden = self.block.attend(graph, step, attention);
        let output = self.block.feed(graph, &hidden);
        let output = self.experts.as_ref().map_or_else(|| output.clone(), |beside| beside.add(graph, &hidden, &output));
        let mut hidden = self.block.add_fed(graph, &hidden, &output);
        if let (Some(own), Some(input)) = (&self.own, step.own_input) {
            hidden = graph.add(&hidden, &own.apply(graph, &hidden, &step.kept(graph, input)));
        }
        self.scale.iter().fold(hidden, |hidden, scale| graph.mul(&hidden, scale))
    }
}

/// Experts beside a feed-forward that every token goes through.
struct Beside {
    /// Of what the feed-forward gives.
    dense_post_norm: Norm,
    router_norm: Norm,
    /// What the router's input is multiplied by.
    router_scale: Tensor,
    norm: Norm,
    experts: Experts,
    post_norm: Norm,
    n_embd: usize,
}

impl Beside {
    fn load(b: &mut Builder<'_>, layer: usize) -> Result<Beside, Error> {
        let (n_embd, n_layer) = (b.hparams.n_embd, b.hparams.n_layer);
        let key = "expert_feed_forward_length";
        let n_ff = b.keys.optional_counts(key, n_layer, n_layer)?.unwrap_or_default();
        let n_ff = b.keys.of_layer(key, &n_ff, layer)?;
        Ok(Beside {
            dense_post_norm: Norm::of_layer(b, layer, "post_ffw_norm_1")?,
            router_norm: Norm::without_weights(b, n_embd),
            router_scale: b.loader.vector(&format!("blk.{layer}.ffn_gate_inp.scale"), n_embd)?,
            norm: Norm::of_layer(b, layer, "pre_ffw_norm_2")?,
            experts: Experts::load(b, layer, n_ff, Routing::SoftmaxNormalised, Activation::Gelu)?,
            post_norm: Norm::of_layer(b, layer, "post_ffw_norm_2")?,
            n_embd,
        })
    }

    /// What the experts give for the hidden states, with the feed-forward's `output`.
    fn add(&self, graph: &Graph, hidden: &Tensor, output: &Tensor) -> Tensor {
        let routed = graph.scale(&self.router_norm.apply(graph, hidden), 1.0 / (self.n_embd as f32).sqrt());
        let logits = self.experts.logits(graph, &graph.mul(&routed, &self.router_scale));
        let output = self.dense_post_norm.apply(graph, output);
        let chosen = self.experts.apply_routed(graph, &self.norm.apply(graph, hidden), logits);
        graph.add(&output, &self.post_norm.apply(graph, &chosen))
    }
}
