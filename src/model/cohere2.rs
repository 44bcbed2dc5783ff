//! `cohere2`: Command R7B, Command A: attention and feed-forward beside each other; a window, and RoPE, in three of
//! four layers.

use super::{
    Error,
    parts::{Activation, Builder, Decoder, Gated, Norm, Parallel, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let n_layer = b.hparams.n_layer;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(n_layer, window, 4)?;
    let logit_scale = b.keys.require_factor("logit_scale")?;
    let n_embd = b.hparams.n_embd;

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?;
        attention.rope = attention.rope.filter(|_| b.hparams.windows[i].is_some());
        Ok(Parallel {
            norm: Norm::centred_of_layer(b, i, "attn_norm")?,
            attention,
            feed_forward: Gated::load(b, i, Activation::Silu)?.into(),
        })
    })?;
    let output_norm = Norm::centred(b, "output_norm", n_embd)?;
    Ok(Decoder { logit_scale: Some(logit_scale), ..Decoder::load_with_norm(b, layers, output_norm)? })
}
