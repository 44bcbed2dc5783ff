//! `llama4`: LLaMA 4: three of four layers see chunks of the text and have RoPE, and norms behind it; the others see all, by
//! queries that grow with their position. An expert's weight multiplies its input.

use super::{
    Error,
    parts::{
        Activation, Block, Builder, Decoder, Experts, FeedForward, Gated, Norm, RopeFactors, Routing, SelfAttention,
        Temperature,
    },
};
use crate::ggml::Rope;

/// Positions of a chunk, whatever the file's key says, and those after which queries grow.
const CHUNK: usize = 8192;
/// Of every so many layers the last has no RoPE. No key says so.
const NO_ROPE_STEP: usize = 4;
/// Experts of Maverick, which has no norms of queries and keys.
const EXPERTS_WITHOUT_NORMS: usize = 128;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    let key = "attention.sliding_window";
    if b.keys.optional_u32(key)? == Some(0) {
        return Err(b.keys.error(key, "models without chunks are not supported".into()));
    }
    b.hparams.windows = b.keys.windows(b.hparams.n_layer, CHUNK, 4)?;
    b.hparams.chunked = true;
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(b.hparams.rope.freq_base);
    let step = b.keys.count("interleave_moe_layer_step")?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let has_norms = b.keys.count("expert_count")? != EXPERTS_WITHOUT_NORMS;
    let rope_factors = RopeFactors::load(b)?;

    let layers = b.layers(|b, i| {
        let loaded = SelfAttention::load(b, i)?;
        let mut attention = SelfAttention { rope_factors: rope_factors.clone(), rope_before_norms: true, ..loaded };
        if b.hparams.windows[i].is_some() {
            attention.rope = Some(Rope { freq_base, ..b.hparams.rope.clone() });
        }
        if (i + 1) % NO_ROPE_STEP == 0 {
            attention.rope = None;
            attention.temperature = Some(Temperature { scale: 0.1, step: CHUNK, offset: 1 });
        } else if has_norms {
            attention.q_norm = Some(Norm::without_weights(b, b.hparams.head_size));
            attention.k_norm = Some(Norm::without_weights(b, b.hparams.head_size));
        }
        let feed_forward: FeedForward = if (i + 1) % step == 0 {
            let experts = Experts::load(b, i, n_ff, Routing::SigmoidOfUsed, Activation::Silu)?;
            let mut experts = experts.with_shared(b, i, n_ff)?;
            experts.weighs_inputs = true;
            experts.into()
        } else {
            Gated::load(b, i, Activation::Silu)?.into()
        };
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}
