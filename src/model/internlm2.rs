//! `internlm2`: InternLM 2 to 3: LLaMA's layer.

use super::{
    Error, ernie4_5,
    parts::{Builder, Decoder},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    ernie4_5::build(b)
}
