//! `qwen3`: Qwen 3 without experts.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    build_with_rope(b, RopeKind::Neox)
}

/// The same layers with another RoPE.
pub(super) fn build_with_rope(b: &mut Builder<'_>, kind: RopeKind) -> Result<Decoder, Error> {
    b.hparams.rope.kind = kind;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
