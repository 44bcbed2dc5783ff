//! `granitemoe`: Granite 3 and 4 with experts, with or without a shared one.

use super::{
    Error,
    granite::{self, Scales},
    parts::{Activation, Builder, Decoder, Experts, FeedForward, Routing},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let scales = Scales::of_keys(b)?;
    granite::build_scaled(b, scales, true, experts)
}

/// Experts, and a shared one where the file says its width.
pub(super) fn experts(b: &mut Builder<'_>, layer: usize) -> Result<FeedForward, Error> {
    let n_shared = b.keys.optional_u32("expert_shared_feed_forward_length")?.unwrap_or(0) as usize;
    let n_ff = b.n_ff(layer)?;
    let experts = Experts::load(b, layer, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?;
    Ok(if n_shared > 0 { experts.with_shared(b, layer, n_shared)? } else { experts }.into())
}
