//! `gemma`: the first Gemma: LLaMA's layer gated by gelu, wide heads, a scaled embedding.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let scale = attention.scale;
        let feed_forward = Gated::load(b, i, Activation::Gelu)?;
        Block::pre_norm(b, i, attention.with_scaled_queries(scale), feed_forward)
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    Ok(Decoder { embedding_scale, ..Decoder::load(b, layers)? })
}
