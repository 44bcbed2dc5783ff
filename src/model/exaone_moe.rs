//! `exaone-moe`: K-EXAONE: normed heads, dense layers in front, a shared expert; a window, and RoPE, in three of four
//! layers.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Experts, FeedForward, RopeFactors, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    b.ignore_next_token_layers()?;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(b.hparams.n_layer, window, 4)?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let n_shared = b.keys.optional_count("expert_shared_feed_forward_length")?.unwrap_or(n_ff);
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let mut attention = SelfAttention { rope_factors: rope_factors.clone(), ..loaded };
        attention.rope = attention.rope.filter(|_| b.hparams.windows[i].is_some());
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            Experts::load_by_keys(b, i, n_ff, None)?.with_shared(b, i, n_shared)
        })?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
