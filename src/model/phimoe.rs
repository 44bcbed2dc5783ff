//! `phimoe`: Phi 3.5 with experts: LongRoPE, biases of norms and output.

use super::{
    Error,
    parts::{Activation, Builder, Decoder, Experts, Routing},
    phi3,
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    phi3::build_with(
        b,
        |b, i| Ok(Experts::load(b, i, b.n_ff(i)?, Routing::SoftmaxNormalised, Activation::Silu)?.into()),
    )
}
