//! `gemma2`: soft-capped attention and logits, and a window in every other layer.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

/// Layers of the 27B model, whose scale differs from the others' although no key says so.
const LAYERS_27B: usize = 46;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    let window = b.keys.optional_count("attention.sliding_window")?.unwrap_or(4096);
    b.hparams.windows = b.keys.windows(n_layer, window, 2)?;
    let softcap = Some(b.keys.optional_f32("attn_logit_softcapping")?.unwrap_or(50.0));
    let logit_softcap = Some(b.keys.optional_f32("final_logit_softcapping")?.unwrap_or(30.0));
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(b.hparams.rope.freq_base);

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention { softcap, ..SelfAttention::load(b, i)? };
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(Rope { freq_base, ..b.hparams.rope.clone() });
        }
        if n_layer == LAYERS_27B {
            attention.scale = scale_by_width(b);
        }
        let feed_forward = Gated::load(b, i, Activation::Gelu)?;
        Block::sandwich(b, i, attention, feed_forward)
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    Ok(Decoder { embedding_scale, logit_softcap, ..Decoder::load(b, layers)? })
}

/// The scale of the largest Gemmas: by their width over their heads, not by the size of a head.
pub(super) fn scale_by_width(b: &Builder<'_>) -> f32 {
    1.0 / ((b.hparams.n_embd / b.hparams.n_head) as f32).sqrt()
}
