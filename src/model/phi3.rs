//! `phi3`: Phi 3, 3.5 and 4: fused projections, LongRoPE, partial RoPE in Phi 4 mini.

use super::{
    Error,
    parts::{Block, Builder, Decoder, FeedForward, Gated, RopeFactors, SelfAttention},
};
use crate::ggml::RopeKind;

/// `attention.sliding_window` is not read: files give windows that the models were not trained with (llama.cpp #13676).
pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    build_with(b, |b, i| Ok(Gated::load_fused(b, i)?.into()))
}

/// Phi 3 with a feed-forward of its own.
pub(super) fn build_with(
    b: &mut Builder<'_>,
    feed_forward: impl Fn(&mut Builder<'_>, usize) -> Result<FeedForward, Error>,
) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let rope_factors = RopeFactors::load(b)?;
    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?;
        let scale = loaded.scale;
        let attention = SelfAttention { rope_factors: rope_factors.clone(), ..loaded.with_scaled_queries(scale) };
        let feed_forward = feed_forward(b, i)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
