//! `qwen3next`: Qwen3-Next: as Qwen 3.5 with experts, with the delta nets' projections in one.

use super::{
    Error,
    parts::{Activation, Builder, Decoder, Experts, FeedForward, Routing},
    qwen2moe::expert_width,
    qwen35,
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    qwen35::build_with(b, RopeKind::Neox, experts)
}

/// Experts, and a gated shared one.
pub(super) fn experts(b: &mut Builder<'_>, layer: usize) -> Result<FeedForward, Error> {
    let n_ff = expert_width(b, layer)?;
    let n_shared = match b.keys.optional_u32("expert_shared_feed_forward_length")?.filter(|&n| n > 0) {
        Some(n) => n as usize,
        None => b.n_ff(layer)?,
    };
    let experts = Experts::load(b, layer, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?;
    Ok(experts.with_gated_shared(b, layer, n_shared)?.into())
}
