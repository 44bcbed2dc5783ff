//! `qwen2moe`: Qwen 1.5 and 2 with experts, a gated shared one among them.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_shared = b.keys.optional_u32("expert_shared_feed_forward_length")?.filter(|&n| n > 0);
    let layers = b.layers(|b, i| {
        let n_ff = expert_width(b, i)?;
        let n_shared = n_shared.map_or_else(|| b.n_ff(i), |n| Ok(n as usize))?;
        let attention = SelfAttention::load(b, i)?;
        let experts =
            Experts::load(b, i, n_ff, Routing::Softmax, Activation::Silu)?.with_gated_shared(b, i, n_shared)?;
        Block::pre_norm(b, i, attention, experts)
    })?;
    Decoder::load(b, layers)
}

/// `expert_feed_forward_length`, or the feed-forward's width spread over the experts that are used.
pub(super) fn expert_width(b: &Builder<'_>, layer: usize) -> Result<usize, Error> {
    match b.keys.optional_u32("expert_feed_forward_length")?.filter(|&n| n > 0) {
        Some(n) => Ok(n as usize),
        None => Ok(b.n_ff(layer)? / b.keys.count("expert_used_count")?),
    }
}
