//! `qwen35moe`: Qwen 3.5 to 3.8 with experts, a gated shared one among them.

use super::{
    Error,
    parts::{Builder, Decoder},
    qwen3next::experts,
    qwen35,
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let sections = b.keys.require_rope_sections(b.hparams.rope.n_rot)?;
    qwen35::build_with(b, RopeKind::Interleaved(sections), experts)
}
