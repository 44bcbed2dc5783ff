//! `stablelm`: StableLM 2 and 3B: LayerNorm with biases, partial RoPE; the 12B model norms heads and has attention and
//! feed-forward beside each other.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, Layer, Norm, Parallel, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_embd = b.hparams.n_embd;
    let layers = b.layers(|b, i| -> Result<Box<dyn Layer>, Error> {
        let loaded = SelfAttention::load(b, i)?;
        let norms_heads = b.loader.has(&format!("blk.{i}.attn_q_norm.weight"));
        let attention = if norms_heads { loaded.with_centred_head_norms(b, i)? } else { loaded };
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        if b.loader.has(&format!("blk.{i}.ffn_norm.weight")) {
            return Ok(Box::new(Block::pre_norm_centred(b, i, attention, feed_forward)?));
        }
        let norm = Norm::centred_of_layer(b, i, "attn_norm")?;
        Ok(Box::new(Parallel { norm, attention, feed_forward: feed_forward.into() }))
    })?;
    let output_norm = Norm::centred(b, "output_norm", n_embd)?;
    Decoder::load_with_norm(b, layers, output_norm)
}
