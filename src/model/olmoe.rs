//! `olmoe`: OLMoE: queries and keys normed over all heads, many small experts.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?.with_row_norms(b, i)?;
        let experts = Experts::load(b, i, b.n_ff(i)?, Routing::Softmax, Activation::Silu)?;
        Block::pre_norm(b, i, attention, experts)
    })?;
    Decoder::load(b, layers)
}
