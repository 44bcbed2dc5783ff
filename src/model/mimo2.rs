//! `mimo2`: MiMo V2: values smaller than keys, a scale of what attention gives, learned sinks, experts without shared ones.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, FeedForward, Gated, Routing, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    b.ignore_next_token_layers()?;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(b.hparams.n_layer, window, 0)?;
    // The scaling of longer contexts is the global layers' alone.
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let windowed = Rope { freq_base, freq_scale: 1.0, ..b.hparams.rope.clone() };
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let output_scale = b.keys.factor("attention.value_scale")?.filter(|&scale| scale != 1.0);

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention { output_scale, ..SelfAttention::load_with_own_heads(b, i)? };
        attention.sinks = b.loader.optional_vector(&format!("blk.{i}.attn_sinks.weight"), b.hparams.n_heads[i])?;
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(windowed.clone());
        }
        let feed_forward: FeedForward = if b.loader.has(&format!("blk.{i}.ffn_gate_inp.weight")) {
            Experts::load(b, i, n_ff, Routing::SigmoidNormalised, Activation::Silu)?.into()
        } else {
            Gated::load(b, i, Activation::Silu)?.into()
        };
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
