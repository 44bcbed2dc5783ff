//! Finds out how to foretell which rows of keys and values will be asked for: a model's [`PruneMap`].
//!
//! After KVzap (arXiv 2601.07891): the model reads a text and repeats it, so that it looks back at whatever tells how the text
//! goes on. The largest attention that a row receives meanwhile, over the queries of its KV head, times the mean length of its
//! value behind the output matrix, says how much it was asked for; a linear map from the layer's normed input to the logarithm
//! is fitted by ridge regression. All texts go through a layer before the next one.

mod capture;
mod repeated;
mod ridge;

use std::collections::BTreeMap;

use capture::{Reading, Seen};
pub use repeated::Repeated;
use ridge::Ridge;

use crate::{
    engine::{Error, SessionParams},
    ggml::Device,
    lazy::{LayerMap, PruneMap},
    model::Model,
};

/// Texts of several kinds for those who bring none.
pub const PRUNING_TEXTS: [&str; 3] =
    [include_str!("../calibration.txt"), include_str!("../handbook.txt"), include_str!("../metrics.rs")];

/// The share of the rows that the map's own bound keeps in the calibration.
const KEPT: f32 = 0.4;

/// How well a layer's map foretells what its rows were asked for.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Fitted {
    pub index: usize,
    /// The share of the variance that it explains, of all KV heads together.
    pub r2: f64,
    /// The share of its rows that the bound keeps.
    pub kept: f64,
}

/// Fits a model's map. `progress` is told the share that is done, from 0 to 1.
///
/// # Errors
/// When the model cannot be pruned, is not on the processor, or there is nothing to read; [`Error::Interrupted`] when
/// `params.abort` is set.
pub fn fit_pruning(
    model: &Model,
    params: &SessionParams,
    texts: &[Repeated],
    progress: &mut dyn FnMut(f32),
) -> Result<(PruneMap, Vec<Fitted>), Error> {
    let hparams = model.hparams();
    let wrong = |why: &str| Err(Error::Prune(why.to_owned()));
    if texts.is_empty() {
        return wrong("there is no text to fit a map on, or it is too short");
    }
    if hparams.is_recurrent() || hparams.values_in_keys || hparams.shares.iter().any(Option::is_some) {
        return wrong("this model has recurrent layers, latent vectors, or layers that read others' keys and values");
    }
    if (0..hparams.n_layer).any(|layer| model.layer_device(layer) != Device::cpu()) {
        return wrong("a map is fitted on the processor alone: load the model there (-ngl 0)");
    }
    let can_prune = |layer: usize| hparams.attends[layer] && hparams.windows[layer].is_none();
    if !(0..hparams.n_layer).any(can_prune) {
        return wrong("all layers of this model are sliding-window by design");
    }
    let mut reading = Reading::new(model, params, texts)?;
    let (mut layers, mut of_rows) = (BTreeMap::new(), BTreeMap::new());
    let n_steps = (hparams.n_layer * texts.len()) as f32;
    for layer in 0..hparams.n_layer {
        let mut seen: Vec<Seen> = Vec::new();
        for text in 0..texts.len() {
            seen.extend(reading.read(layer, text, can_prune(layer))?);
            progress((layer * texts.len() + text + 1) as f32 / n_steps);
        }
        if seen.is_empty() {
            continue;
        }
        let mut ridge = Ridge::new(hparams.n_embd, hparams.n_heads_kv[layer]);
        seen.iter().for_each(|seen| ridge.add(&seen.inputs, &seen.asked, params.n_threads));
        let (weights, biases) = ridge.solve().ok_or_else(|| {
            Error::Prune(format!("what layer {layer} takes in does not determine a map: give a longer text"))
        })?;
        let map = LayerMap { weights, biases };
        let foretold: Vec<Vec<f32>> = seen.iter().map(|seen| product(&map, &seen.inputs)).collect();
        of_rows.insert(layer, (r2(&seen, &foretold), foretold.concat()));
        layers.insert(layer, map);
    }
    let mut all: Vec<f32> = of_rows.values().flat_map(|(_, scores)| scores.iter().copied()).collect();
    all.sort_by(f32::total_cmp);
    let bound = all[((1.0 - KEPT) * all.len() as f32) as usize];
    let share = |scores: &[f32]| scores.iter().filter(|&&score| score >= bound).count() as f64 / scores.len() as f64;
    let fitted = of_rows.iter().map(|(&index, (r2, scores))| Fitted { index, r2: *r2, kept: share(scores) }).collect();
    Ok((PruneMap { model: model.identity().clone(), bound, kept: KEPT, layers }, fitted))
}

/// What a map makes of inputs, of one after the other for each KV head.
fn product(map: &LayerMap, inputs: &[f32]) -> Vec<f32> {
    let n_embd = map.weights.len() / map.biases.len();
    let heads = || map.weights.chunks_exact(n_embd).zip(&map.biases);
    let of = |input: &[f32]| {
        let dot = |weights: &[f32]| weights.iter().zip(input).map(|(a, b)| a * b).sum::<f32>();
        heads().map(|(weights, bias)| dot(weights) + bias).collect::<Vec<f32>>()
    };
    inputs.chunks_exact(n_embd).flat_map(of).collect()
}

fn r2(seen: &[Seen], foretold: &[Vec<f32>]) -> f64 {
    let pairs = || seen.iter().flat_map(|seen| &seen.asked).zip(foretold.iter().flatten());
    let n = pairs().count().max(1) as f64;
    let mean = pairs().map(|(asked, _)| f64::from(*asked)).sum::<f64>() / n;
    let square = |x: f64| x * x;
    let (mut left, mut all) = (0.0, 0.0);
    for (&asked, &foretold) in pairs() {
        left += square(f64::from(asked - foretold));
        all += square(f64::from(asked) - mean);
    }
    1.0 - left / all.max(f64::MIN_POSITIVE)
}
