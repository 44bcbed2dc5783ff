//! `minimax-m2`: MiniMax M2 to M2.5: queries and keys normed over all heads, a router with a bias, partial RoPE.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let routing = Routing::of_keys(b, None)?.normalised();
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?.with_row_norms(b, i)?;
        let experts = Experts::load(b, i, b.n_ff(i)?, routing, Activation::Silu)?;
        Block::pre_norm(b, i, attention, experts)
    })?;
    Decoder::load(b, layers)
}
