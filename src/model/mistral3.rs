//! `mistral3`: Ministral 3 and Mistral Small 3.1 and later: LLaMA's layer, queries that grow with their position.

use super::{
    Error, llama,
    parts::{Block, Builder, Decoder, RopeFactors, SelfAttention, Temperature},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let rope = &mut b.hparams.rope;
    rope.beta_fast = b.keys.optional_f32("rope.scaling.yarn_beta_fast")?.unwrap_or(rope.beta_fast);
    rope.beta_slow = b.keys.optional_f32("rope.scaling.yarn_beta_slow")?.unwrap_or(rope.beta_slow);
    // YaRN's attention factor is over one that belongs to all dimensions; where both are equal nothing is left of it.
    if let Some(all_dims) = b.keys.factor("rope.scaling.yarn_log_multiplier")?.filter(|_| rope.ext_factor != 0.0) {
        let factor = 1.0 / rope.freq_scale;
        if factor > 1.0 {
            rope.attn_factor /= 1.0 + 0.1 * all_dims * factor.ln();
        }
    }
    let step = rope.n_ctx_orig;
    let temperature = b.keys.factor("attention.temperature_scale")?.map(|scale| Temperature { scale, step, offset: 0 });
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let attention = SelfAttention { rope_factors: rope_factors.clone(), temperature, ..SelfAttention::load(b, i)? };
        let feed_forward = llama::feed_forward(b, i)?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
