//! `seed_oss`: Seed-OSS: Qwen 2's layer under other names.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, Norm, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Ok(Block {
            attn_norm: Some(Norm::of_layer(b, i, "attn_norm")?),
            // Its place is before the feed-forward, whatever its name.
            ffn_norm: Some(Norm::of_layer(b, i, "post_attention_norm")?),
            ..Block::without_norms(attention, feed_forward)
        })
    })?;
    Decoder::load(b, layers)
}
