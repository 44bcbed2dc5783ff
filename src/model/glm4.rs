//! `glm4`: GLM 4 (0414): norms on both sides, a fused feed-forward, RoPE on half of each head.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Gated, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    if b.keys.optional_list("rope.dimension_sections")?.is_some_and(|sections| sections.iter().any(|&n| n > 0)) {
        return Err(b.keys.unsupported("rope.dimension_sections", "RoPE for images is not supported".into()));
    }
    b.ignore_next_token_layers()?;
    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?;
        // Its last product overflows half precision.
        let feed_forward = Gated::load_fused(b, i)?.with_f32_sums();
        Block::sandwich(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
