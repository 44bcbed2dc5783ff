//! `qwen3vlmoe`: Qwen 3 VL with experts, without its eyes. What its eyes see is also added to the first layers' output; a text adds nothing.

use super::{
    Error,
    parts::{Builder, Decoder},
    qwen3moe,
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let sections = b.keys.require_rope_sections(b.hparams.rope.n_rot)?;
    b.hparams.n_deepstack = b.keys.deepstack_layers(b.hparams.n_layer)?;
    qwen3moe::build_with_rope(b, RopeKind::Interleaved(sections))
}
