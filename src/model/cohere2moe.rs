//! `cohere2moe`: Command A with experts: attention and experts beside each other, dense layers in front; a window, and
//! RoPE, in three of four layers, RoPE also in the dense ones.

use super::{
    Error,
    parts::{Builder, Decoder, Experts, FeedForward, Norm, Parallel, Routing, SelfAttention},
};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.ignore_next_token_layers()?;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows_after_global(b.hparams.n_layer, window, 4)?;
    let logit_scale = Some(b.keys.require_factor("logit_scale")?);
    let n_dense = b.keys.optional_count_or_zero("leading_dense_block_count")?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let n_shared = match b.keys.optional_count_or_zero("expert_shared_count")? {
        0 => None,
        count => Some(b.keys.optional_count("expert_shared_feed_forward_length")?.unwrap_or(count * n_ff)),
    };
    let n_embd = b.hparams.n_embd;
    // The norm's kind is told by which ε there is.
    let is_rms = b.keys.factor("attention.layer_norm_rms_epsilon")?.is_some();
    let kind = |norm: Norm| if is_rms { norm } else { norm.with_mean_taken_off() };

    let layers = b.layers(|b, i| {
        let mut attention = SelfAttention::load(b, i)?;
        attention.rope = attention.rope.filter(|_| b.hparams.windows[i].is_some() || i < n_dense);
        let feed_forward = FeedForward::after_leading_dense(b, i, |b, i| {
            let experts = Experts::load_by_keys(b, i, n_ff, Some(Routing::Sigmoid))?;
            let Some(n_shared) = n_shared else { return Ok(experts) };
            let mut experts = experts.with_shared(b, i, n_shared)?;
            // The mean of the shared expert and the others' sum.
            experts.output_scale = Some(0.5);
            Ok(experts)
        })?;
        Ok(Parallel { norm: kind(Norm::of_layer(b, i, "attn_norm")?), attention, feed_forward })
    })?;
    let output_norm = kind(Norm::rms(b, "output_norm", n_embd)?);
    Ok(Decoder { logit_scale, ..Decoder::load_with_norm(b, layers, output_norm)? })
}
