//! `llama`: LLaMA 1 to 3, Mistral 7B, Mixtral, SmolLM2 and the many models that share their layer.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, FeedForward, Gated, RopeFactors, Routing, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let (n_rot, head_size) = (b.hparams.rope.n_rot, b.hparams.head_size);
    if n_rot != head_size {
        let why = format!("{n_rot}, expected the head's {head_size} elements");
        return Err(b.keys.error("rope.dimension_count", why));
    }
    // Mistral 7B's; llama.cpp does not know it in this architecture.
    let window = b.keys.window()?;
    b.hparams.windows.fill(window);
    let rope_factors = RopeFactors::load(b)?;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention { rope_factors: rope_factors.clone(), ..SelfAttention::load(b, i)? };
        let feed_forward = feed_forward(b, i)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}

/// Gated by silu; in models with experts these, weighed among those that are used.
pub(super) fn feed_forward(b: &mut Builder<'_>, layer: usize) -> Result<FeedForward, Error> {
    if b.keys.optional_u32("expert_count")?.unwrap_or(0) == 0 {
        return Ok(Gated::load(b, layer, Activation::Silu)?.into());
    }
    let n_ff = b.n_ff(layer)?;
    Ok(Experts::load(b, layer, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?.into())
}
