//! `qwen3vl`: Qwen 3 VL without its eyes: Qwen 3's layer, RoPE by several positions in turn. What its eyes see is also added to the first layers' output; a text adds nothing.

use super::{
    Error,
    parts::{Builder, Decoder},
    qwen3,
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let sections = b.keys.require_rope_sections(b.hparams.rope.n_rot)?;
    b.hparams.n_deepstack = b.keys.deepstack_layers(b.hparams.n_layer)?;
    qwen3::build_with_rope(b, RopeKind::Interleaved(sections))
}
