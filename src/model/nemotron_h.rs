//! `nemotron_h`, `nemotron_h_moe`: Nemotron H and 3 Nano: each layer is Mamba-2, attention, or a feed-forward (experts in
//! a narrower space, or none), without positions.

use super::{
    Attention, Error, LayerStep,
    parts::{Builder, Decoder, Experts, Layer, Linear, Mamba2, Mixer, Norm, Plain, Routing, SelfAttention, Unary},
    qwen2moe::expert_width,
};
use crate::ggml::{Graph, Tensor};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.ignore_next_token_layers()?;
    let has_experts = b.keys.optional_u32("expert_count")?.unwrap_or(0) > 0;
    let layers = b.layers(|b, i| {
        let norm = Norm::of_layer(b, i, "attn_norm")?;
        b.hparams.attends[i] &= b.hparams.n_ff[i] == 0;
        let part = match (b.hparams.n_ff[i], b.hparams.attends[i]) {
            (0, true) => Part::Mixer(Box::new(SelfAttention { rope: None, ..SelfAttention::load(b, i)? }.into())),
            (0, false) => Part::Mixer(Box::new(Mamba2::load(b, i)?.into())),
            _ if has_experts => Part::Experts(Box::new(Mixture::load(b, i)?)),
            _ => Part::Plain(Plain::load(b, i, Unary::ReluSquared)?),
        };
        Ok(Single { norm, part })
    })?;
    Decoder::load(b, layers)
}

/// One part with a norm before it and a residual.
struct Single {
    norm: Norm,
    part: Part,
}

enum Part {
    Mixer(Box<Mixer>),
    Plain(Plain),
    Experts(Box<Mixture>),
}

/// Experts of a projection of the input where the file has one, and a shared expert of the input itself.
struct Mixture {
    narrowed: Option<[Linear; 2]>,
    experts: Experts,
    shared: Plain,
}

impl Mixture {
    fn load(b: &mut Builder<'_>, layer: usize) -> Result<Mixture, Error> {
        let n_embd = b.hparams.n_embd;
        let (n_ff, n_shared) = (expert_width(b, layer)?, b.keys.count("expert_shared_feed_forward_length")?);
        let n_in = match b.keys.optional_count_or_zero("moe_latent_size")? {
            0 => n_embd,
            n_latent => n_latent,
        };
        let name = |part: &str| format!("blk.{layer}.ffn_latent_{part}");
        let narrowed = match b.loader.has(&format!("{}.weight", name("down"))) {
            true => {
                Some([Linear::load(b, &name("down"), [n_embd, n_in])?, Linear::load(b, &name("up"), [n_in, n_embd])?])
            }
            false => None,
        };
        let is_normalised = b.keys.optional_bool("expert_weights_norm")?.unwrap_or(false);
        let routing = if is_normalised { Routing::SigmoidNormalised } else { Routing::Sigmoid };
        let mut experts = Experts::load_plain(b, layer, [n_in, n_ff], routing, Unary::ReluSquared)?;
        experts.weight_scale = b.keys.factor("expert_weights_scale")?.filter(|&scale| scale != 1.0);
        let shared = Plain::load_named(b, layer, "_shexp", n_shared, Unary::ReluSquared)?;
        Ok(Mixture { narrowed, experts, shared })
    }

    fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let logits = self.experts.logits(graph, input);
        let output = match &self.narrowed {
            Some([down, up]) => up.apply(graph, &self.experts.apply_routed(graph, &down.apply(graph, input), logits)),
            None => self.experts.apply_routed(graph, input, logits),
        };
        graph.add(&output, &self.shared.apply(graph, input))
    }
}

impl Layer for Single {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let input = self.norm.apply(graph, step.hidden);
        let output = match &self.part {
            Part::Mixer(mixer) => step.kept(graph, &mixer.apply(graph, step, &input, attention)),
            Part::Plain(plain) => plain.apply(graph, &step.kept(graph, &input)),
            Part::Experts(mixture) => mixture.apply(graph, &step.kept(graph, &input)),
        };
        graph.add(&output, &step.kept(graph, step.hidden))
    }
}
