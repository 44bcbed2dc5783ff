//! `ernie4_5-moe`: ERNIE 4.5 with experts: dense layers in front and, where a step says so, between.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, FeedForward, Gated, Routing, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let n_shared = b.keys.optional_count_or_zero("expert_shared_feed_forward_length")?;
    let step = b.keys.count("interleave_moe_layer_step")?;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let feed_forward = if (i + 1) % step != 0 {
            Gated::load(b, i, Activation::Silu)?.into()
        } else {
            FeedForward::after_leading_dense(b, i, |b, i| {
                let experts = Experts::load(b, i, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?;
                if n_shared > 0 { experts.with_shared(b, i, n_shared) } else { Ok(experts) }
            })?
        };
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
