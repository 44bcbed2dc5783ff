//! `granite`: Granite 3 and 4 without experts: LLaMA's layer with scales for embedding, attention, residual and logits.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, FeedForward, Gated, Mamba2, Mixer, RopeFactors, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let has_rope = has_rope(b)?;
    build_scaled(b, has_rope, gated)
}

/// Models without positions say so by this key.
pub(super) fn has_rope(b: &Builder<'_>) -> Result<bool, Error> {
    Ok(b.keys.optional_bool("rope.scaling.finetuned")?.unwrap_or(true))
}

/// The feed-forward without experts.
pub(super) fn gated(b: &mut Builder<'_>, layer: usize) -> Result<FeedForward, Error> {
    Ok(Gated::load(b, layer, Activation::Silu)?.into())
}

/// Granite with a feed-forward of its own; layers that do not attend are Mamba-2's.
pub(super) fn build_scaled(
    b: &mut Builder<'_>,
    has_rope: bool,
    feed_forward: impl Fn(&mut Builder<'_>, usize) -> Result<FeedForward, Error>,
) -> Result<Decoder, Error> {
    let residual_scale = b.keys.factor("residual_scale")?;
    let attention_scale = b.keys.factor("attention.scale")?;
    let embedding_scale = b.keys.factor("embedding_scale")?;
    let divisor = b.keys.require_factor("logit_scale")?;
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let mixer: Mixer = if b.hparams.attends[i] {
            let mut attention = SelfAttention { rope_factors: rope_factors.clone(), ..SelfAttention::load(b, i)? };
            attention.scale = attention_scale.unwrap_or(attention.scale);
            attention.rope = attention.rope.filter(|_| has_rope);
            attention.into()
        } else {
            Mamba2::load(b, i)?.into()
        };
        let feed_forward = feed_forward(b, i)?;
        Ok(Block { residual_scale, ..Block::pre_norm(b, i, mixer, feed_forward)? })
    })?;
    Ok(Decoder { embedding_scale, logit_scale: Some(1.0 / divisor), ..Decoder::load(b, layers)? })
}
