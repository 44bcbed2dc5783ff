//! What would go where, told from the file's header alone.

use std::path::Path;

use serde::Serialize;

use super::{
    Error,
    sequence::rows_of_span,
    session::{SessionParams, kernel, lazy_format, lazy_span},
};
use crate::{
    cache::{Format, Span},
    ggml::Device,
    lazy::{Policy, n_active},
    model::{Hparams, Model, ModelParams, Planned},
};

/// What a model and a full context would take on one device. Intermediate results of the computation come on top.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DevicePlan {
    /// The device's name.
    pub device: String,
    /// Numbers of the layers on it.
    pub layers: Vec<usize>,
    /// Whether the output matrix is on it.
    pub output: bool,
    pub weight_bytes: usize,
    /// Bytes of the caches with no layer lazy.
    pub kv_bytes: usize,
    /// Bytes of the caches behind a prompt that fills the context. Where the rule decides by the prompt which layers are
    /// lazy, those of any device are assumed to be as many as their share; `None` where it decides how many, too.
    pub lazy_kv_bytes: Option<usize>,
    /// Memory of the device that is free now.
    pub free_bytes: usize,
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
/// When the file's header or one of its tensors is wrong.
pub fn plan(path: &Path, model: &ModelParams, session: &SessionParams) -> Result<Vec<DevicePlan>, Error> {
    let Planned { hparams, placement, weights } = Model::plan(path, model)?;
    let n_ctx = if session.n_ctx == 0 { hparams.n_ctx_train } else { session.n_ctx };
    let scorable = hparams.windows.iter().filter(|window| window.is_none()).count();
    let share = lazy_share(&session.lazy.policy, scorable);
    let mut devices = vec![Device::cpu()];
    devices.extend(placement.devices());
    let plans = devices.into_iter().map(|device| {
        let layers: Vec<usize> = (0..hparams.n_layer).filter(|&layer| placement.layer(layer) == device).collect();
        let kernel = kernel(session, &hparams, device);
        let rows = |span: Span| n_ctx.min(rows_of_span(span, kernel, device));
        let caches = layers.iter().map(|&layer| layer_bytes(layer, n_ctx, &rows, &hparams, session));
        let caches: Vec<[usize; 2]> = caches.collect();
        let lazy_bytes = |share: f64| {
            let bytes = layers.iter().zip(&caches).map(|(layer, [full, lazy])| {
                let share = match &session.lazy.policy {
                    Policy::Layers(set) => f64::from(u8::from(set.contains(layer))),
                    _ => share,
                };
                *lazy as f64 * share + *full as f64 * (1.0 - share)
            });
            bytes.sum::<f64>().round() as usize
        };
        DevicePlan {
            weight_bytes: weights.iter().filter(|(on, _)| *on == device).map(|(_, bytes)| bytes).sum(),
            output: placement.output() == device,
            kv_bytes: caches.iter().map(|[full, _]| full).sum(),
            lazy_kv_bytes: share.map(lazy_bytes),
            free_bytes: device.memory().0,
            device: device.name(),
            layers,
        }
    });
    Ok(plans.collect())
}

/// Bytes of a layer's cache of `n_ctx` tokens, full and lazy; `rows` says how many rows a span takes.
fn layer_bytes(
    layer: usize,
    n_ctx: usize,
    rows: &dyn Fn(Span) -> usize,
    hparams: &Hparams,
    session: &SessionParams,
) -> [usize; 2] {
    let width = hparams.head_size * hparams.n_head_kv;
    let bytes = |rows: usize, format: Format| rows * (format.k.row_bytes(width) + format.v.row_bytes(width));
    let active = Format::new(session.type_k, session.type_v, session.kv_rotate);
    if let Some(n_window) = hparams.windows[layer] {
        let span = Span { n_sink: 0, n_window, n_slack: session.lazy.n_slack };
        return [bytes(rows(span), active); 2];
    }
    let span = lazy_span(&session.lazy, layer);
    [bytes(n_ctx, active), bytes(rows(span), lazy_format(session, hparams.head_size))]
}

/// The share of `scorable` layers that becomes lazy, where the rule alone says so.
fn lazy_share(policy: &Policy, scorable: usize) -> Option<f64> {
    match policy {
        Policy::Off => Some(0.0),
        Policy::Budget(share) | Policy::Output(share) => {
            Some(1.0 - n_active(*share, scorable) as f64 / scorable.max(1) as f64)
        }
        Policy::Layers(layers) => Some(layers.len() as f64 / scorable.max(1) as f64),
        Policy::Threshold(_) | Policy::Profile(_) | Policy::Auto => None,
    }
}
