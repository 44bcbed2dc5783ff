//! `hunyuan-dense`: Hunyuan without experts: norms on heads, behind RoPE, whose base a factor stretches.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Gated, SelfAttention},
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    if let Some(alpha) = b.keys.optional_f32("rope.scaling.alpha")?.filter(|&alpha| alpha > 0.0) {
        let size = b.hparams.head_size as f32;
        b.hparams.rope.freq_base *= alpha.powf(size / (size - 2.0));
        if !b.hparams.rope.freq_base.is_finite() {
            return Err(b
                .keys
                .error("rope.scaling.alpha", format!("{alpha} stretches heads of {size} elements too far")));
        }
    }
    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let attention = SelfAttention { rope_before_norms: true, ..loaded };
        let feed_forward = Gated::load(b, i, Activation::Silu)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
