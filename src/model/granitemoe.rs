//! `granitemoe`: Granite 3 and 4 with experts, with or without a shared one.

use super::{
    Error,
    granite::{self, Scales},
    parts::{Activation, Builder, Decoder, Experts, Routing},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let n_shared = b.keys.optional_u32("expert_shared_feed_forward_length")?.unwrap_or(0) as usize;
    let scales = Scales::of_keys(b)?;
    granite::build_scaled(b, scales, true, |b, i| {
        let n_ff = b.hparams.n_ff[i];
        let experts = Experts::load(b, i, n_ff, Routing::SoftmaxNormalised, Activation::Silu)?;
        Ok(if n_shared > 0 { experts.with_shared(b, i, n_shared)? } else { experts }.into())
    })
}
