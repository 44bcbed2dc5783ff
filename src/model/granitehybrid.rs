//! `granitehybrid`: Granite 4 H: Granite's layer with Mamba-2 in place of attention in most layers, with or without experts.

use super::{
    Error,
    granite::{self, Scales},
    granitemoe,
    parts::{Builder, Decoder},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let has_rope = granite::has_rope(b)?;
    let scales = Scales::with_divisor(b, b.keys.factor("logit_scale")?.unwrap_or(1.0))?;
    match b.keys.optional_u32("expert_count")?.filter(|&n| n > 0) {
        Some(_) => granite::build_scaled(b, scales, has_rope, granitemoe::experts),
        None => granite::build_scaled(b, scales, has_rope, granite::gated),
    }
}
