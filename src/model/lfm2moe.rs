//! `lfm2moe`: LFM2 with experts after the first layers.

use super::{
    Error, lfm2,
    parts::{Activation, Builder, Decoder, Experts, FeedForward, Routing},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let routing = Routing::of_keys(b, None)?.normalised();
    lfm2::build_with(b, |b, layer| {
        FeedForward::after_leading_dense(b, layer, |b, layer| Experts::load(b, layer, n_ff, routing, Activation::Silu))
    })
}
