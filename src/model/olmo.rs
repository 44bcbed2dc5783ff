//! `olmo`: OLMo 1: LayerNorms without weights, queries, keys and values cut at a limit.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, Norm, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let n_embd = b.hparams.n_embd;
    let norm = |b: &Builder<'_>| Norm::without_weights(b, n_embd).with_mean_taken_off();
    let clamp = b.keys.factor("attention.clamp_kqv")?.filter(|&limit| limit > 0.0);
    let layers = b.layers(|b, i| {
        let attention = SelfAttention { clamp, ..SelfAttention::load(b, i)? };
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        let (attn_norm, ffn_norm) = (Some(norm(b)), Some(norm(b)));
        Ok(Block { attn_norm, ffn_norm, ..Block::without_norms(attention, feed_forward) })
    })?;
    let output_norm = norm(b);
    Decoder::load_with_norm(b, layers, output_norm)
}
