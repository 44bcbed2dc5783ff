//! `hunyuan-moe`: Hunyuan A13B: norms on heads, behind RoPE; a shared expert.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_shared = b.keys.optional_count_or_zero("expert_shared_feed_forward_length")?;
    let layers = b.layers(|b, i| {
        let n_ff = b.n_ff(i)?;
        let loaded = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let attention = SelfAttention { rope_before_norms: true, ..loaded };
        let experts = Experts::load(b, i, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?;
        let experts = experts.with_shared(b, i, if n_shared > 0 { n_shared } else { n_ff })?;
        Block::pre_norm(b, i, attention, experts)
    })?;
    Decoder::load(b, layers)
}
