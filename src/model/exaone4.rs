//! `exaone4`: norms after attention and feed-forward and on each head; the 32B model has a window in three of four
//! layers, and RoPE in these alone.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, RopeFactors, SelfAttention},
};
use crate::ggml::RopeKind;

/// Layers of the 32B model, the only one with windows; smaller ones have the key as well.
const LAYERS_32B: usize = 64;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    if n_layer == LAYERS_32B {
        let window = b.keys.optional_count("attention.sliding_window")?.unwrap_or(4096);
        b.hparams.windows = b.keys.windows(n_layer, window, 4)?;
    }
    b.ignore_next_token_layers()?;
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let mut attention = SelfAttention { rope_factors: rope_factors.clone(), ..loaded };
        attention.rope = attention.rope.filter(|_| n_layer != LAYERS_32B || b.hparams.windows[i].is_some());
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Block::post_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
