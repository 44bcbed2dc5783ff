//! `gemma3`: a window in five of six layers, which have a RoPE of their own.

use super::{
    Error,
    gemma2::attention_scale,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

/// Layers of the 27B model, whose scale differs from the others' although no key says so.
const LAYERS_27B: usize = 62;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    if let Some(window) = b.keys.window()? {
        b.hparams.windows = b.keys.windows(n_layer, window, 6)?;
    }
    let logit_softcap = b.keys.factor("final_logit_softcapping")?;
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(10_000.0);

    let layers = b.layers(|b, i| {
        let scale = attention_scale(b, LAYERS_27B);
        let mut attention = SelfAttention::load(b, i)?.with_head_norms(b, i)?.with_scaled_queries(scale);
        if b.hparams.windows[i].is_some() {
            // The scaling of longer contexts is the global layers' alone.
            attention.rope = Some(Rope { freq_base, freq_scale: 1.0, ..b.hparams.rope.clone() });
        }
        let feed_forward = Gated::load(b, i, Activation::Gelu)?;
        Block::sandwich(b, i, attention, feed_forward)
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    Ok(Decoder { embedding_scale, scales_tokens_alone: true, logit_softcap, ..Decoder::load(b, layers)? })
}
