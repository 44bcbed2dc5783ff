//! `bailingmoe2`: Ling 2 and Ring 2: a router by sigmoid that chooses groups of experts first, normed heads.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Experts, FeedForward, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    b.ignore_next_token_layers()?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let n_shared = b.keys.optional_count("expert_shared_feed_forward_length")?.unwrap_or(n_ff);
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            Experts::load_by_keys(b, i, n_ff, None)?.with_shared_by_count(b, i, n_shared)
        })?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
