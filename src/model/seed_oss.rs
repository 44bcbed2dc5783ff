//! `seed_oss`: Seed-OSS: Qwen 2's layer under other names.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        // Its place is before the feed-forward, whatever its name.
        Block::pre_norm_named(b, i, attention, feed_forward, "post_attention_norm")
    })?;
    Decoder::load(b, layers)
}
