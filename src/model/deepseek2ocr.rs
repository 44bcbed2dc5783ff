//! `deepseek2-ocr`: the text model of DeepSeek OCR: DeepSeek V2's layers with ordinary attention.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Experts, FeedForward, Routing, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            Experts::load_by_keys(b, i, n_ff, Some(Routing::Softmax))?.with_shared_by_count(b, i, n_ff)
        })?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
