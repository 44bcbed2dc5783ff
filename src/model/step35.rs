//! `step35`: Step 3.5 Flash: gated heads, activations cut at a limit, dense layers in front, a shared expert; layers with
//! windows have more heads and turn all of them, the global ones half.

use super::{
    Error,
    parts::{Activation, Block, Builder, Decoder, Experts, FeedForward, Gated, RopeFactors, Routing, SelfAttention},
};
use crate::ggml::{Rope, RopeKind};

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    b.ignore_next_token_layers()?;
    let n_layer = b.hparams.n_layer;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(n_layer, window, 4)?;
    let n_ff = b.keys.count("expert_feed_forward_length")?;
    let n_shared = b.keys.count("expert_shared_feed_forward_length")?;
    let limits = b.keys.optional_floats_of_layers("swiglu_clamp_exp", n_layer)?;
    let limits_of_shared = b.keys.optional_floats_of_layers("swiglu_clamp_shexp", n_layer)?;
    let ropes = ropes(b)?;
    let n_rot = (0..n_layer).map(|i| ropes.of(b, i).n_rot).max().unwrap_or(0);
    let rope_factors = RopeFactors::load_of(b, n_rot / 2)?;

    let layers = b.layers(|b, i| {
        let is_global = b.hparams.windows[i].is_none();
        let mut attention = SelfAttention::load_with_own_heads(b, i)?.with_optional_head_norms(b, i)?;
        attention.rope = Some(ropes.of(b, i).clone());
        attention.rope_factors = if is_global { rope_factors.clone() } else { RopeFactors::default() };
        if b.loader.has(&format!("blk.{i}.attn_gate.weight")) {
            attention = attention.with_head_gate(b, i)?;
        }
        let limit = |limits: &Option<Vec<f32>>| limits.as_ref().map(|limits| limits[i]);
        let activation = Activation::silu_within(limit(&limits));
        let activation_of_shared = Activation::silu_within(limit(&limits_of_shared));
        let feed_forward: FeedForward = if b.loader.has(&format!("blk.{i}.ffn_gate_inp.weight")) {
            let experts = Experts::load_by_keys(b, i, n_ff, Some(Routing::Sigmoid))?.with_shared(b, i, n_shared)?;
            experts.with_activations(activation, activation_of_shared).into()
        } else {
            Gated::load(b, i, activation_of_shared)?.into()
        };
        Block::pre_norm(b, i, attention, feed_forward)
    })?;
    Decoder::load(b, layers)
}

/// The RoPE of global layers and of those with windows.
struct Ropes {
    global: Rope,
    windowed: Rope,
}

impl Ropes {
    fn of(&self, b: &Builder<'_>, layer: usize) -> &Rope {
        if b.hparams.windows[layer].is_some() { &self.windowed } else { &self.global }
    }
}

fn ropes(b: &Builder<'_>) -> Result<Ropes, Error> {
    let rope = &b.hparams.rope;
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let n_rot = b.keys.optional_count("rope.dimension_count_swa")?.unwrap_or(rope.n_rot);
    if n_rot > b.hparams.head_size || n_rot % 2 != 0 {
        let why = format!("{n_rot}, expected an even number up to the head's {} elements", b.hparams.head_size);
        return Err(b.keys.error("rope.dimension_count_swa", why));
    }
    if !rope.n_rot.is_multiple_of(4) {
        return Err(b.keys.error("rope.dimension_count", format!("half of {} is odd", rope.n_rot)));
    }
    Ok(Ropes {
        global: Rope { n_rot: rope.n_rot / 2, ..rope.clone() },
        // The scaling of longer contexts is the global layers' alone.
        windowed: Rope { n_rot, freq_base, freq_scale: 1.0, ..rope.clone() },
    })
}
