//! What of a model goes to devices so that it fits their free memory: llama.cpp's `--fit`, with lazy caches counted.

use std::path::Path;

use super::{
    error::Error,
    plan::{DevicePlan, plan},
    setup::SessionParams,
};
use crate::{
    ggml::Device,
    model::{Model, ModelParams, TensorOverride},
};

/// Contexts are tried in steps of so many tokens.
const CTX_STEP: usize = 256;

/// What is to fit.
#[derive(Debug, Clone)]
pub struct FitTarget {
    /// Bytes that stay free on each device, in the order of [`ModelParams::devices`], for what is computed with; the last one
    /// counts for all that follow.
    pub margins: Vec<usize>,
    /// The context is not made shorter than this many tokens.
    pub min_ctx: usize,
    /// Whether a context may be made shorter that is as long as the model was trained for (`n_ctx` of 0).
    pub shortens: bool,
    /// Whether layers and experts may be moved to the processor.
    pub moves: bool,
}

impl Default for FitTarget {
    /// llama.cpp's: a GiB stays free, and 4,096 tokens are the least.
    fn default() -> FitTarget {
        FitTarget { margins: vec![1 << 30], min_ctx: 4096, shortens: true, moves: true }
    }
}

/// What was found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Fit {
    pub model: ModelParams,
    pub session: SessionParams,
    /// Whether it fits. Where it does not, these are the parameters that take the least memory of devices.
    pub fits: bool,
    /// Layers from the first on whose experts are with the processor, by this fit.
    pub experts_of_first: usize,
    /// What of the parameters is changed, as options of the command line; empty where all fits as it is.
    pub options: Vec<String>,
}

/// Finds what fits the free memory of a model's devices: first a shorter context, then experts with the processor, those of
/// the first layers first, then fewer layers on devices. No weights are read. The processor's memory is not looked at: weights
/// are read from the file there.
///
/// A full context's caches are counted as [`DevicePlan::lazy_kv_bytes`], and an eighth of what they have more before layers are
/// lazy, for as many layers are read at once.
///
/// # Errors
/// When the file's header or one of its tensors is wrong.
pub fn fit(path: &Path, model: &ModelParams, session: &SessionParams, target: &FitTarget) -> Result<Fit, Error> {
    let asked = Trial { model, session, n_ctx: session.n_ctx, n_experts: 0, gpu_layers: None };
    let fits = |trial: &Trial<'_>| -> Result<bool, Error> {
        let (model, session) = trial.params();
        let devices = devices(&model);
        let plans = plan(path, &model, &session)?;
        Ok(plans.iter().all(|plan| needed(plan) <= available(plan, &devices, target)))
    };
    if fits(&asked)? {
        return Ok(asked.found(true));
    }
    let planned = Model::plan(path, model)?;
    let (n_trained, n_layer) = (planned.hparams.n_ctx_train, planned.hparams.n_layer);
    let mut trial = asked;
    if session.n_ctx == 0 && target.shortens && target.min_ctx < n_trained {
        let with = |n_steps: usize| Trial { n_ctx: (n_steps * CTX_STEP).clamp(target.min_ctx, n_trained), ..trial };
        let [least, most] = [target.min_ctx / CTX_STEP, n_trained.div_ceil(CTX_STEP)];
        if let Some(n_steps) = last(least..most, |n| fits(&with(n)))? {
            return Ok(with(n_steps).found(true));
        }
        trial.n_ctx = target.min_ctx;
    }
    if !target.moves {
        return Ok(trial.found(false));
    }
    if planned.tensors.iter().any(|tensor| tensor.name.contains("exps")) {
        // The fewest that fit: what is left on devices grows as they become fewer.
        let with = |n_left: usize| Trial { n_experts: n_layer - n_left, ..trial };
        if let Some(n_left) = last(0..n_layer, |n| fits(&with(n)))? {
            return Ok(with(n_left).found(true));
        }
        trial.n_experts = n_layer;
    }
    let with = |n: usize| Trial { gpu_layers: Some(n), ..trial };
    match last(0..n_layer + 1, |n| fits(&with(n)))? {
        Some(n) => Ok(with(n).found(true)),
        None => Ok(with(0).found(false)),
    }
}

/// Parameters that are tried.
#[derive(Clone, Copy)]
struct Trial<'a> {
    model: &'a ModelParams,
    session: &'a SessionParams,
    n_ctx: usize,
    /// First layers whose experts are with the processor.
    n_experts: usize,
    /// `None` for what was asked for.
    gpu_layers: Option<usize>,
}

impl Trial<'_> {
    fn params(&self) -> (ModelParams, SessionParams) {
        let mut model = self.model.clone();
        model.tensor_overrides.extend(TensorOverride::experts_of_first(self.n_experts));
        model.gpu_layers = self.gpu_layers.or(model.gpu_layers);
        (model, SessionParams { n_ctx: self.n_ctx, ..self.session.clone() })
    }

    fn found(&self, fits: bool) -> Fit {
        let mut options = Vec::new();
        if self.n_ctx != self.session.n_ctx {
            options.push(format!("-c {}", self.n_ctx));
        }
        if self.n_experts > 0 {
            options.push(format!("-ncmoe {}", self.n_experts));
        }
        if let Some(n) = self.gpu_layers {
            options.push(format!("-ngl {n}"));
        }
        let (model, session) = self.params();
        Fit { model, session, fits, experts_of_first: self.n_experts, options }
    }
}

/// The devices that layers may be on.
fn devices(model: &ModelParams) -> Vec<String> {
    let devices = model.devices.clone().unwrap_or_else(Device::all_but_processor);
    devices.into_iter().map(Device::name).collect()
}

/// What a device needs while a prompt that fills the context is read and after it.
fn needed(plan: &DevicePlan) -> usize {
    let lazy = plan.lazy_kv_bytes.unwrap_or(plan.kv_bytes);
    plan.needed_bytes() + plan.kv_bytes.saturating_sub(lazy) / 8
}

fn available(plan: &DevicePlan, devices: &[String], target: &FitTarget) -> usize {
    match devices.iter().position(|name| *name == plan.device) {
        Some(index) => {
            let margin = target.margins.get(index).or(target.margins.last()).copied().unwrap_or(0);
            plan.free_bytes.saturating_sub(margin)
        }
        // The processor's, or that of single tensors, which the user has put there.
        None => usize::MAX,
    }
}

/// The last number of a range of which `fits` holds, where it holds of the first ones only.
fn last(range: std::ops::Range<usize>, fits: impl Fn(usize) -> Result<bool, Error>) -> Result<Option<usize>, Error> {
    let (mut good, mut bad) = (None, range.end);
    let mut next = range.start;
    while next < bad {
        if fits(next)? {
            good = Some(next);
        } else {
            bad = next;
        }
        next = match good {
            None => break,
            Some(good) => good + (bad - good).div_ceil(2),
        };
    }
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_that_fits_is_found() {
        for end in 0..20_usize {
            for limit in 0..=end {
                let expected = limit.checked_sub(1);
                assert_eq!(last(0..end, |n| Ok(n < limit)).unwrap(), expected, "{limit} of {end}");
            }
        }
        assert_eq!(last(3..9, |n| Ok(n <= 6)).unwrap(), Some(6));
        assert_eq!(last(3..9, |n| Ok(n <= 2)).unwrap(), None);
    }

    #[test]
    fn margins_are_the_devices_own() {
        let plan = |device: &str| DevicePlan {
            device: device.to_owned(),
            layers: Vec::new(),
            caches: Vec::new(),
            output: false,
            weight_bytes: 100,
            kv_bytes: 80,
            lazy_kv_bytes: Some(40),
            free_bytes: 1000,
        };
        let devices = ["A", "B", "C"].map(str::to_owned);
        let target = FitTarget { margins: vec![10, 20], ..FitTarget::default() };
        let of = |name| available(&plan(name), &devices, &target);
        assert_eq!([of("A"), of("B"), of("C"), of("CPU")], [990, 980, 980, usize::MAX]);
        assert_eq!(needed(&plan("A")), 100 + 40 + 5);
        assert_eq!(needed(&DevicePlan { lazy_kv_bytes: None, ..plan("A") }), 180);
    }
}
