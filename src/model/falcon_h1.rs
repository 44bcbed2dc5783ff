//! `falcon-h1`: Falcon H1: attention and Mamba-2 beside each other in every layer.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, Mamba2, Mixer, Norm, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_embd = b.hparams.n_embd;
    let layers = b.layers(|b, i| {
        let mixer = Mixer::Both(Box::new((SelfAttention::load(b, i)?, Mamba2::load(b, i)?)));
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Ok(Block {
            attn_norm: Some(Norm::of_layer(b, i, "attn_norm")?),
            // Its files leave the usual ending out.
            ffn_norm: Some(Norm::of_tensor(b, &format!("blk.{i}.ffn_norm"), n_embd)?),
            ..Block::without_norms(mixer, feed_forward)
        })
    })?;
    Decoder::load(b, layers)
}
