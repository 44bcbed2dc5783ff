//! `gpt-oss`: experts with biases, a learned sink for each head, a window in every other layer.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, Routing, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(n_layer, window, 2)?;
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(b.hparams.rope.freq_base);
    let n_ff = b.keys.count("expert_feed_forward_length")?;

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?;
        let n_head = b.hparams.n_heads[i];
        attention.sinks = Some(b.loader.vector(&format!("blk.{i}.attn_sinks.weight"), n_head)?);
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(Rope { freq_base, ..b.hparams.rope.clone() });
        }
        let experts = Experts::load(b, i, n_ff, Routing::SoftmaxOfUsed, Activation::SiluClamped)?;
        // Its place is before the feed-forward, whatever its name.
        Block::pre_norm_named(b, i, attention, experts, "post_attention_norm")
    })?;
    Decoder::load(b, layers)
}
