//! `qwen35`: Qwen 3.5 to 3.8: gated delta nets, and attention whose output is gated in every fourth layer.

use super::{
    Error,
    parts::{
        Activation, Block, Builder, Decoder, DeltaNet, FeedForward, Gated, Mixer, Norm, SelfAttention, attending_layers,
    },
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let sections = b.keys.require_rope_sections(b.hparams.rope.n_rot)?;
    build_with(b, RopeKind::Interleaved(sections), |b, layer| Ok(Gated::load(b, layer, Activation::Silu)?.into()))
}

/// Delta nets and gated attention with any feed-forward.
pub(super) fn build_with(
    b: &mut Builder<'_>,
    rope: RopeKind,
    feed_forward: impl Fn(&mut Builder<'_>, usize) -> Result<FeedForward, Error>,
) -> Result<Decoder, Error> {
    b.hparams.rope.kind = rope;
    b.ignore_next_token_layers()?;
    b.hparams.attends = attending_layers(b)?;
    let layers = b.layers(|b, i| {
        let mixer: Mixer = match b.hparams.attends[i] {
            true => SelfAttention::load_gated(b, i)?.with_head_norms(b, i)?.into(),
            false => DeltaNet::load(b, i)?.into(),
        };
        let feed_forward = feed_forward(b, i)?;
        Ok(Block {
            attn_norm: Some(Norm::of_layer(b, i, "attn_norm")?),
            // Its place is before the feed-forward, whatever its name.
            ffn_norm: Some(Norm::of_layer(b, i, "post_attention_norm")?),
            ..Block::without_norms(mixer, feed_forward)
        })
    })?;
    Decoder::load(b, layers)
}
