//! `command-r`: Command R and R+: attention and feed-forward beside each other, LayerNorm; R+ norms heads.

use super::{
    Error,
    parts::{Activation, Builder, Decoder, Gated, Norm, Parallel, SelfAttention},
};

/// Models of so many layers and more have norms on heads, although no key says so.
const LAYERS_R_PLUS: usize = 64;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let (n_layer, n_embd) = (b.hparams.n_layer, b.hparams.n_embd);
    let logit_scale = b.keys.factor("logit_scale")?;
    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?;
        Ok(Parallel {
            norm: Norm::centred_of_layer(b, i, "attn_norm")?,
            attention: if n_layer >= LAYERS_R_PLUS { loaded.with_centred_head_norms(b, i)? } else { loaded },
            feed_forward: Gated::load(b, i, Activation::Silu)?.into(),
        })
    })?;
    let output_norm = Norm::centred(b, "output_norm", n_embd)?;
    Ok(Decoder { logit_scale, ..Decoder::load_with_norm(b, layers, output_norm)? })
}
