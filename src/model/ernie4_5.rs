//! `ernie4_5`: ERNIE 4.5 without experts: LLaMA's layer.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
