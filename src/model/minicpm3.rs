//! `minicpm3`: MiniCPM 3: latent attention with the heads' keys and values in the cache, LongRoPE, and scales that no key has.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, LatentAttention, RopeFactors},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let (n_layer, n_embd) = (b.hparams.n_layer as f32, b.hparams.n_embd as f32);
    let rope_factors = RopeFactors::load(b)?;
    let layers = b.layers(|b, i| {
        let mut attention = LatentAttention::load(b, i)?;
        attention.rope_factors = rope_factors.clone();
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Ok(Block { residual_scale: Some(1.4 / n_layer.sqrt()), ..Block::pre_norm(b, i, attention, feed_forward)? })
    })?;
    Ok(Decoder { embedding_scale: Some(12.0), logit_scale: Some(256.0 / n_embd), ..Decoder::load(b, layers)? })
}
