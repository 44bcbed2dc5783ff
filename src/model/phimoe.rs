//! `phimoe`: Phi 3.5 with experts: LongRoPE, biases of norms and output.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, RopeFactors, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let rope_factors = RopeFactors::load(b)?;
    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?;
        let scale = loaded.scale;
        let attention = SelfAttention { rope_factors: rope_factors.clone(), ..loaded.with_scaled_queries(scale) };
        let experts = Experts::load(b, i, b.n_ff(i)?, Routing::SoftmaxNormalised, Activation::Silu)?;
        Block::pre_norm(b, i, attention, experts)
    })?;
    Decoder::load(b, layers)
}
