//! `arcee`: AFM 4.5B: LLaMA's layer with a feed-forward of squared relu.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Plain, RopeFactors, SelfAttention, Unary},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let rope_factors = RopeFactors::load(b)?;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention { rope_factors: rope_factors.clone(), ..SelfAttention::load(b, i)? };
        let feed_forward = Plain::load(b, i, Unary::ReluSquared)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
