//! `gemma2`: soft-capped attention and logits, and a window in every other layer.

use super::{
    Error, Hparams,
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
        let scale = attention_scale(b, LAYERS_27B);
        let mut attention = SelfAttention { softcap, ..SelfAttention::load(b, i)?.with_scaled_queries(scale) };
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(Rope { freq_base, ..b.hparams.rope.clone() });
        }
        let feed_forward = Gated::load(b, i, Activation::Gelu)?;
        Block::sandwich(b, i, attention, feed_forward)
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    Ok(Decoder { embedding_scale, logit_softcap, ..Decoder::load(b, layers)? })
}

/// The scale by the size of a head; in the largest Gemma, told by its layers, by its width over its heads.
pub(super) fn attention_scale(b: &Builder<'_>, layers_27b: usize) -> f32 {
    let Hparams { n_layer, n_embd, n_head, head_size, .. } = b.hparams;
    let size = if n_layer == layers_27b { n_embd / n_head } else { head_size };
    1.0 / (size as f32).sqrt()
}
