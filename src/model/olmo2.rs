//! `olmo2`: OLMo 2 and 3: norms after attention and feed-forward, queries and keys normed over all heads; OLMo 3 has a
//! window in three of four layers.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    if let Some(window) = b.keys.window()? {
        b.hparams.windows = b.keys.windows(n_layer, window, 4)?;
    }

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?.with_row_norms(b, i)?;
        if b.hparams.windows[i].is_some() {
            // YaRN is the global layers' alone.
            let rope = b.hparams.rope.clone();
            attention.rope = Some(Rope { freq_scale: 1.0, ext_factor: 0.0, attn_factor: 1.0, ..rope });
        }
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Block::post_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
