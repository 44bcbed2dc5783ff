//! `granite`: Granite 3 and 4 without experts: LLaMA's layer with scales for embedding, attention, residual and logits.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, FeedForward, Gated, Mamba2, Mixer, RopeFactors, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let (scales, has_rope) = (Scales::of_keys(b)?, has_rope(b)?);
    build_scaled(b, scales, has_rope, gated)
}

/// What a model multiplies; `None` for nothing.
pub(super) struct Scales {
    pub embedding: Option<f32>,
    pub residual: Option<f32>,
    /// Products of queries and keys, in place of what the head's size gives.
    pub attention: Option<f32>,
    /// Logits are divided by this.
    pub logit_divisor: f32,
}

impl Scales {
    pub fn of_keys(b: &Builder<'_>) -> Result<Scales, Error> {
        Scales::with_divisor(b, b.keys.require_factor("logit_scale")?)
    }

    pub fn with_divisor(b: &Builder<'_>, logit_divisor: f32) -> Result<Scales, Error> {
        Ok(Scales {
            embedding: b.keys.factor("embedding_scale")?,
            residual: b.keys.factor("residual_scale")?,
            attention: b.keys.factor("attention.scale")?,
            logit_divisor,
        })
    }
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
    scales: Scales,
    has_rope: bool,
    feed_forward: impl Fn(&mut Builder<'_>, usize) -> Result<FeedForward, Error>,
) -> Result<Decoder, Error> {
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let mixer: Mixer = if b.hparams.attends[i] {
            let mut attention = SelfAttention { rope_factors: rope_factors.clone(), ..SelfAttention::load(b, i)? };
            attention.scale = scales.attention.unwrap_or(attention.scale);
            attention.rope = attention.rope.filter(|_| has_rope);
            attention.into()
        } else {
            Mamba2::load(b, i)?.into()
        };
        let feed_forward = feed_forward(b, i)?;
        Ok(Block { residual_scale: scales.residual, ..Block::pre_norm(b, i, mixer, feed_forward)? })
    })?;
    let logit_scale = Some(1.0 / scales.logit_divisor);
    Ok(Decoder { embedding_scale: scales.embedding, logit_scale, ..Decoder::load(b, layers)? })
}
