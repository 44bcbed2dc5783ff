//! `glm4moe`: GLM 4.5 to 4.7 and 4.5 Air: a router by sigmoid, dense layers in front, shared experts, partial RoPE.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Experts, FeedForward, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    b.use_rope_sections()?;
    b.ignore_next_token_layers()?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?.with_optional_head_norms(b, i)?;
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            Experts::load_by_keys(b, i, n_ff, Some(Routing::Sigmoid))?.with_shared_by_count(b, i, n_ff)
        })?;
        // Its last products overflow half precision.
        let feed_forward = feed_forward.with_f32_sums();
        Block::pre_norm_named(b, i, attention, feed_forward, "post_attention_norm")
    })?;
    Decoder::load(b, layers)
}
