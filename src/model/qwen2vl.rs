//! `qwen2vl`: Qwen 2 and 2.5 VL without their eyes: Qwen 2's layer, RoPE by several positions.

use super::{
    Error,
    parts::{Builder, Decoder},
    qwen2,
};
use crate::ggml::RopeKind;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let sections = b.keys.require_rope_sections(b.hparams.rope.n_rot)?;
    qwen2::build_with_rope(b, RopeKind::Multi(sections))
}
