//! `smollm3`: LLaMA's layer; every fourth has no RoPE.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};

/// Every so many layers one has no RoPE. No key says so.
const NO_ROPE_STEP: usize = 4;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?;
        attention.rope = attention.rope.filter(|_| (i + 1) % NO_ROPE_STEP != 0);
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
