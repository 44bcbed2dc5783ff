//! `starcoder2`: StarCoder 2: LayerNorm, biases everywhere, a feed-forward of gelu without a gate.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Norm, Plain, SelfAttention, Unary},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    build_with(b, Unary::Gelu)
}

/// LayerNorm everywhere, and a feed-forward without a gate.
pub(super) fn build_with(b: &mut Builder<'_>, activation: Unary) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_embd = b.hparams.n_embd;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let feed_forward = Plain::load(b, i, activation)?;
        Block::pre_norm_centred(b, i, attention, feed_forward)
    })?;
    let output_norm = Norm::centred(b, "output_norm", n_embd)?;
    Decoder::load_with_norm(b, layers, output_norm)
}
