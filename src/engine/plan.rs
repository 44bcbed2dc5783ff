//! What would go where, told from the file's header alone.

use std::path::Path;

use serde::Serialize;

use super::{
    error::Error,
    guard::{N_LAST, N_SCORED},
    layer::LayerKind,
    setup::{self, LayerPlan, LayerSetup, SessionParams, Setup, kernel},
};
use crate::{
    cache::{Format, Span, StateStore, Store},
    ggml::Device,
    lazy::{Policy, n_active},
    model::{Model, ModelParams, Planned},
};

/// What a model and a full context would take on one device. Intermediate results of the computation come on top.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DevicePlan {
    /// The device's name.
    pub device: String,
    /// Numbers of the layers on it.
    pub layers: Vec<usize>,
    /// What these keep, in the same order.
    pub caches: Vec<PlannedCache>,
    /// Whether the output matrix is on it.
    pub output: bool,
    pub weight_bytes: usize,
    /// Bytes of the caches with no layer lazy.
    pub kv_bytes: usize,
    /// Bytes of the caches after a prompt that fills the context. Where the rule decides by the prompt which layers are
    /// lazy, those of any device are assumed to be as many as their share; `None` where it decides how many, too.
    pub lazy_kv_bytes: Option<usize>,
    /// Memory of the device that is free now.
    pub free_bytes: usize,
}

/// What one layer keeps of a sequence that fills the context.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PlannedCache {
    pub index: usize,
    /// What it is by the model's design, or [`LayerKind::Lazy`] where the rule names it.
    pub kind: LayerKind,
    /// The layer whose keys and values it reads, where it has none of its own.
    pub shares: Option<usize>,
    /// Bytes with no layer lazy, its recurrent state included.
    pub kv_bytes: usize,
    /// Bytes once it is lazy; the same where it cannot become so.
    pub lazy_kv_bytes: usize,
    /// Bytes of its recurrent state; 0 where it has none.
    pub state_bytes: usize,
}

impl DevicePlan {
    /// What must fit into the free memory at the least.
    pub fn needed_bytes(&self) -> usize {
        self.weight_bytes + self.lazy_kv_bytes.unwrap_or(self.kv_bytes)
    }
}

/// What would be on each device, the processor first, if this model were loaded and run so. No weights are read.
///
/// # Errors
/// When the file's header or one of its tensors is wrong, or a profile is asked for and none is known.
pub fn plan(path: &Path, model: &ModelParams, session: &SessionParams) -> Result<Vec<DevicePlan>, Error> {
    let Planned { hparams, placement, tensors, identity } = Model::plan(path, model)?;
    let session = &mut session.clone();
    setup::settle(session, path, &identity)?;
    let session = &*session;
    let n_ctx = if session.n_ctx == 0 { hparams.n_ctx_train } else { session.n_ctx };
    let scorable = hparams.n_scorable();
    let share = lazy_share(&session.lazy.policy, scorable);
    let mut devices = vec![Device::cpu()];
    devices.extend(placement.devices());
    let plans = devices.into_iter().map(|device| {
        let layers: Vec<usize> = (0..hparams.n_layer).filter(|&layer| placement.layer(layer) == device).collect();
        let plan =
            |layer: usize| LayerPlan::new(session, &hparams, layer, device, kernel(session, &hparams, layer, device));
        let cache = |layer: &usize| cache(&plan(*layer), *layer, n_ctx, &session.lazy.policy);
        let caches: Vec<PlannedCache> = layers.iter().map(cache).collect();
        let lazy_bytes = |share: f64| {
            let bytes = caches.iter().map(|cache| {
                let share = match &session.lazy.policy {
                    Policy::Layers(_) => f64::from(u8::from(cache.kind == LayerKind::Lazy)),
                    _ => share,
                };
                cache.lazy_kv_bytes as f64 * share + cache.kv_bytes as f64 * (1.0 - share)
            });
            bytes.sum::<f64>().round() as usize
        };
        DevicePlan {
            weight_bytes: tensors.iter().filter(|place| place.device == device).map(|place| place.bytes).sum(),
            output: placement.output() == device,
            kv_bytes: caches.iter().map(|cache| cache.kv_bytes).sum(),
            lazy_kv_bytes: share.map(lazy_bytes),
            free_bytes: device.memory().0,
            device: device.name(),
            layers,
            caches,
        }
    });
    Ok(plans.collect())
}

/// What a layer keeps of `n_ctx` tokens.
fn cache(plan: &LayerPlan, index: usize, n_ctx: usize, policy: &Policy) -> PlannedCache {
    let [kv_bytes, lazy_kv_bytes] = layer_bytes(plan, n_ctx);
    let is_named = matches!(policy, Policy::Layers(layers) if layers.contains(&index));
    let kind = match (plan.attends, plan.state) {
        (true, _) if is_named => LayerKind::Lazy,
        (true, _) if plan.by_design.is_some() => LayerKind::Window,
        (true, _) => LayerKind::Full,
        (false, Some(state)) if state.matrices > 0 => LayerKind::Recurrent,
        (false, Some(_)) => LayerKind::Convolution,
        (false, None) if plan.shares.is_some() => LayerKind::Shared,
        (false, None) => LayerKind::Nothing,
    };
    PlannedCache { index, kind, shares: plan.shares, kv_bytes, lazy_kv_bytes, state_bytes: state_bytes(plan) }
}

/// Bytes of a sequence of `n` tokens of which no layer has become lazy, read piece by piece, with the room to grow that
/// stores have.
pub(super) fn sequence_bytes(setup: &Setup, n: usize) -> usize {
    let bytes = setup.layers.iter().map(|layer| {
        let plan = &layer.plan;
        if !plan.attends {
            return state_bytes(plan);
        }
        let (span, format) = layer.at_first();
        let rows = Store::rows_with_room(n).min(layer.n_ctx).max(n).next_multiple_of(plan.block);
        let rows = span.map_or(rows, |span| rows.min(plan.most_rows(span, format)));
        let exact = plan.exact_span_for(format).map_or(0, |exact| exact.n_rows() * plan.rows.row_bytes(format.exact()));
        let scores = if layer.pruning.is_some() { rows * plan.rows.heads * size_of::<f32>() } else { 0 };
        let rescued = span.map_or(0, |span| rescued_bytes(plan, span, format, layer.n_ctx));
        rows * plan.rows.row_bytes(format) + exact + scores + rescued + state_bytes(plan)
    });
    bytes.sum()
}

/// Bytes that a look before dropping takes at a prompt's end of `n` tokens, beside the sequence's own: of layers that may change,
/// what they would be, all of them being tried together; and the blocks of rows that the probe writes to.
pub(super) fn look_bytes(setup: &Setup, n: usize) -> usize {
    let bytes = |plan: &LayerPlan, rows: usize, format: Format| {
        let exact = plan.exact_span_for(format).map_or(0, Span::n_rows);
        rows.next_multiple_of(plan.block) * plan.rows.row_bytes(format) + exact * plan.rows.row_bytes(format.exact())
    };
    let of_layer = |layer: &LayerSetup| {
        let (plan, (span, format)) = (&layer.plan, layer.at_first());
        let rows = span.map_or(n, |span| span.used_rows(n));
        let written = if plan.grain.is_some() { rows.min(N_LAST + N_SCORED + 2 * plan.block) } else { rows };
        let lazy = bytes(plan, plan.lazy_span.used_rows(n), plan.lazy);
        let rescued = rescued_bytes(plan, plan.lazy_span, plan.lazy, layer.n_ctx);
        let changed = plan.narrow.map_or(0, |narrow| bytes(plan, n, narrow)).max(lazy + rescued);
        bytes(plan, written, format) + if span.is_none() { changed } else { 0 }
    };
    let attends = |layer: &&LayerSetup| layer.plan.attends;
    // A prompt that lazy layers keep whole is not looked at.
    let is_looked_at = setup.looks() && n > setup.params.lazy.n_kept();
    if is_looked_at { setup.layers.iter().filter(attends).map(of_layer).sum() } else { 0 }
}

/// Bytes of the lists of rescued rows of a layer with this span, and of their scores.
fn rescued_bytes(plan: &LayerPlan, span: Span, format: Format, n_ctx: usize) -> usize {
    let most = span.n_rescued.min(n_ctx);
    let row_bytes = plan.rows.row_bytes(format);
    if most == 0 {
        0
    } else {
        most.next_multiple_of(plan.block) * row_bytes + most * plan.rows.heads * size_of::<f32>()
    }
}

fn state_bytes(plan: &LayerPlan) -> usize {
    plan.state.map_or(0, |size| StateStore::bytes_of(size.columns, size.matrices))
}

/// Bytes of a layer's cache of `n_ctx` tokens, full and lazy.
fn layer_bytes(plan: &LayerPlan, n_ctx: usize) -> [usize; 2] {
    let state = state_bytes(plan);
    if !plan.attends {
        return [state; 2];
    }
    let bytes = |rows: usize, format: Format| rows * plan.rows.row_bytes(format) + state;
    let restricted = |span: Span, format: Format| {
        let n_rows = n_ctx.min(plan.most_rows(span, format));
        let scores = if span.n_rescued > 0 { n_rows * plan.rows.heads * size_of::<f32>() } else { 0 };
        bytes(n_rows, format) + scores + rescued_bytes(plan, span, format, n_ctx)
    };
    match plan.by_design {
        Some(span) => [restricted(span, plan.active); 2],
        None => [bytes(n_ctx, plan.active), restricted(plan.lazy_span, plan.lazy)],
    }
}

/// The share of `scorable` layers that becomes lazy, where the rule alone says so.
fn lazy_share(policy: &Policy, scorable: usize) -> Option<f64> {
    match policy {
        Policy::Off => Some(0.0),
        Policy::Budget(share) | Policy::Output(share) => {
            Some(1.0 - n_active(*share, scorable) as f64 / scorable.max(1) as f64)
        }
        Policy::Layers(layers) => Some(layers.len() as f64 / scorable.max(1) as f64),
        Policy::Threshold(_) | Policy::Profile(_) | Policy::Kl(_) | Policy::Auto => None,
    }
}
