//! `lfm2`: Liquid's LFM2: short convolutions, and attention with norms on each head in a few layers.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, FeedForward, Gated, Mixer, Norm, SelfAttention, ShortConv},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    if let Some(window) = b.keys.window()? {
        b.hparams.windows = b.hparams.attends.iter().map(|attends| attends.then_some(window)).collect();
    }
    build_with(b, |b, layer| Ok(Gated::load(b, layer, Activation::Silu)?.into()))
}

/// LFM2 with a feed-forward of its own.
pub(super) fn build_with(
    b: &mut Builder<'_>,
    feed_forward: impl Fn(&mut Builder<'_>, usize) -> Result<FeedForward, Error>,
) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let layers = b.layers(|b, i| {
        let mixer: Mixer = match b.hparams.attends[i] {
            true => SelfAttention::load(b, i)?.with_head_norms(b, i)?.into(),
            false => ShortConv::load(b, i)?.into(),
        };
        let feed_forward = feed_forward(b, i)?;
        Block::pre_norm(b, i, mixer, feed_forward)
    })?;
    let output_norm = Norm::rms(b, "token_embd_norm", b.hparams.n_embd)?;
    Decoder::load_with_norm(b, layers, output_norm)
}
