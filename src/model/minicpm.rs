//! `minicpm`: MiniCPM 1 to 4: Granite's layer; what its scales are where the file has none.

use super::{
    Error,
    granite::{self, Scales},
    parts::{Activation, Builder, Decoder, Gated},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let (n_layer, n_embd) = (b.hparams.n_layer as f32, b.hparams.n_embd as f32);
    let scales = Scales {
        embedding: Some(b.keys.optional_f32("embedding_scale")?.unwrap_or(12.0)),
        residual: Some(b.keys.optional_f32("residual_scale")?.unwrap_or(1.4 / n_layer.sqrt())).filter(|&x| x != 0.0),
        attention: None,
        // Of files without this key llama.cpp divides as well.
        logit_divisor: b.keys.factor("logit_scale")?.unwrap_or(256.0 / n_embd),
    };
    granite::build_scaled(b, scales, true, |b, layer| Ok(Gated::load(b, layer, Activation::Silu)?.into()))
}
