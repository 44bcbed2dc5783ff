//! `apertus`: Apertus: normed heads and a feed-forward of xIELU, whose constants each layer has of its own.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Plain, RopeFactors, SelfAttention, Unary},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    let constants = |part: &str| b.keys.require_plain_floats_of_layers(&format!("xielu.{part}"), n_layer);
    let [alpha_n, alpha_p] = [constants("alpha_n")?, constants("alpha_p")?];
    let [beta, eps] = [constants("beta")?, constants("eps")?];
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let attention = SelfAttention { rope_factors: rope_factors.clone(), ..loaded };
        let activation = Unary::Xielu { alpha_n: alpha_n[i], alpha_p: alpha_p[i], beta: beta[i], eps: eps[i] };
        let feed_forward = Plain::load(b, i, activation)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
