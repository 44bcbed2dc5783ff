//! `nemotron`: Nemotron and Minitron 4: as StarCoder 2 with a feed-forward of squared relu; partial RoPE.

use super::{
    Error,
    parts::{Builder, Decoder, Unary},
    starcoder2,
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    starcoder2::build_with(b, Unary::ReluSquared)
}
