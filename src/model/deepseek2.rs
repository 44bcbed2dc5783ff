//! `deepseek2` (DeepSeek V2 and V3, Kimi K2, GLM 4.7 Flash) and `mistral4`: latent attention, dense layers in front, experts in
//! groups with shared ones.

use super::{
    Error,
    parts::{Block, Builder, Decoder, Experts, FeedForward, LatentAttention, Routing, Temperature},
};

/// GLM 4.7 Flash is told by these where the file does not say how experts are weighed.
const GLM_LAYERS: [usize; 2] = [47, 48];
const GLM_VOCABULARY: usize = 154_880;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.ignore_next_token_layers()?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let is_glm = GLM_LAYERS.contains(&b.hparams.n_layer) && b.hparams.n_vocab == GLM_VOCABULARY;
    let routing = if is_glm { Routing::Sigmoid } else { Routing::Softmax };
    let stretch = stretch(b)?;
    let temperature = match b.keys.factor("attention.temperature_scale")? {
        Some(scale) => Some(Temperature { scale, step: b.keys.count("attention.temperature_length")?, offset: 0 }),
        None => None,
    };

    let layers = b.layers(|b, i| {
        let mut attention = LatentAttention::load(b, i)?;
        attention.temperature = temperature;
        attention.scale *= stretch;
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            Experts::load_by_keys(b, i, n_ff, Some(routing))?.with_shared_by_count(b, i, n_ff)
        })?;
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}

/// What products of queries and keys are multiplied by besides: YaRN's factor of all dimensions, squared, as RoPE turns only
/// some. RoPE's own factor loses it.
fn stretch(b: &mut Builder<'_>) -> Result<f32, Error> {
    // Files have a tenth of the multiplier.
    let multiplier = b.keys.factor("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0) * 10.0;
    let is_mistral = b.hparams.architecture == "mistral4";
    let rope = &mut b.hparams.rope;
    let log = (1.0 / rope.freq_scale).ln();
    if rope.ext_factor != 0.0 && multiplier != 0.0 && log > 0.0 {
        // DeepSeek's multiplier is in both factors, so that nothing of it is left in RoPE's.
        rope.attn_factor /= 1.0 + 0.1 * log * if is_mistral { multiplier } else { 1.0 };
    }
    let factor = rope.attn_factor * (1.0 + 0.1 * log) * (1.0 + 0.1 * multiplier * log);
    Ok(factor * factor)
}
