//! `afmoe`: Trinity: gated attention, norms on both sides and on heads, dense layers in front, shared experts; a window
//! in three of four layers, RoPE in the same.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Experts, FeedForward, Routing, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

/// Of every so many layers the last has no RoPE, whether others have windows or not. No key says so.
const NO_ROPE_STEP: usize = 4;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    if let Some(window) = b.keys.window()? {
        b.hparams.windows = b.keys.windows(b.hparams.n_layer, window, 4)?;
    }
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(b.hparams.rope.freq_base);
    let n_ff = b.keys.count("expert_feed_forward_length")?;

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?.with_head_norms(b, i)?.with_gate(b, i)?;
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(Rope { freq_base, ..b.hparams.rope.clone() });
        }
        attention.rope = attention.rope.filter(|_| (i + 1) % NO_ROPE_STEP != 0);
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            Experts::load_by_keys(b, i, n_ff, Some(Routing::Sigmoid))?.with_shared_by_count(b, i, n_ff)
        })?;
        Block::sandwich(b, i, attention, feed_forward)
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    Ok(Decoder { embedding_scale, ..Decoder::load(b, layers)? })
}
