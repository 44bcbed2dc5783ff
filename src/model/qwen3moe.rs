//! `qwen3moe`: Qwen 3 with experts.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, Routing, SelfAttention},
    qwen2moe::expert_width,
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    build_with_rope(b, RopeKind::Neox)
}

/// The same layers with another RoPE.
pub(super) fn build_with_rope(b: &mut Builder<'_>, kind: RopeKind) -> Result<Decoder, Error> {
    b.hparams.rope.kind = kind;
    let layers = b.layers(|b, i| {
        let n_ff = expert_width(b, i)?;
        let attention = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let experts = Experts::load(b, i, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?;
        Block::pre_norm(b, i, attention, experts)
    })?;
    Decoder::load(b, layers)
}
