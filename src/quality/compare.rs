//! Several policies on one text, each against the uncompressed run.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{Scorer, Summary, Tally, uncompressed};
use crate::{
    engine::{Error, LayerReport, SeqId, Session, SessionParams},
    ggml::Type,
    lazy::{At, Measure, Policy},
    model::Model,
    vocab::Token,
};

/// The copy of the uncompressed sequence that a policy is tried on.
const COPY: SeqId = SeqId::MAX;

/// How one policy did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Compared {
    /// The policy, as it was asked for.
    pub lazy: String,
    #[serde(flatten)]
    pub summary: Summary,
    pub lazy_layers: Vec<usize>,
    /// Bytes of the cache's buffers at the end of the text.
    pub kv_bytes: usize,
    /// What an uncompressed f16 cache of this context takes, over `kv_bytes`.
    pub compression: f64,
}

/// Scores one text under several policies, each against the uncompressed run, which is made once.
///
/// A policy that reads its prompt with full attention is tried on a copy of the uncompressed run's cache, shrunk as the
/// policy says: what it gives is what a run of its own gives, without reading the prompt again.
///
/// # Errors
/// As [`Scorer::start`] and [`Session::new`].
pub fn compare(
    model: &Model,
    params: &SessionParams,
    policies: &[Policy],
    (tokens, n_skip, batch): (&[Token], usize, usize),
    progress: &mut dyn FnMut(f32),
) -> Result<Vec<Compared>, Error> {
    let mut base_params = uncompressed(params);
    // No mass is above 1: the layers are scored, and all stay active.
    base_params.lazy.policy = Policy::Threshold(Some(1.0));
    let mut base = Session::new(model, base_params.clone())?;
    let total = policies.len() as f32 + 1.0;
    let mut scorer = Scorer::start(&mut base, tokens, n_skip, batch, &mut |share| progress(0.9 * share / total))?;
    let first_row = scorer.pending().to_vec();
    base.fork(0, COPY, &BTreeSet::new())?;
    scorer = Scorer::resume(&mut base, COPY, tokens, n_skip, batch, first_row.clone());
    let mut base_rows = Vec::new();
    while !scorer.remaining().is_empty() {
        base_rows.extend(scorer.rows(64)?);
    }

    let mut by_output = None;
    let mut compared = Vec::new();
    for (i, policy) in policies.iter().enumerate() {
        let at = |share: f32| (1.0 + i as f32 + share) / total;
        progress(at(0.0));
        let mut params = params.clone();
        params.lazy.policy = policy.clone();
        let own = Session::new(model, params.clone())?;
        let windowed = own.reads_windowed();
        let copies =
            !windowed && params.lazy.at == At::Prefill && (params.type_k, params.type_v) == (Type::F16, Type::F16);
        let mut tally = Tally::default();
        let (layers, n_past) = if copies {
            let lazy = match policy.measure() {
                Measure::Mass => own.choose(&base.layers(0)),
                Measure::Output => {
                    // Read once more at most: the first run's scores are masses.
                    if by_output.is_none() {
                        by_output = Some(output_scores(model, &params, &tokens[..n_skip])?);
                    }
                    own.choose(by_output.as_deref().unwrap_or_default())
                }
            };
            base.set_windows(own.lazy_params().windows.clone())?;
            drop(own);
            base.fork(0, COPY, &lazy)?;
            let mut run = Scorer::resume(&mut base, COPY, tokens, n_skip, batch, first_row.clone());
            tally.score_against(&mut run, &base_rows, &mut |share| progress(at(share)))?;
            (base.layers(COPY), base.seq_n_past(COPY))
        } else {
            let mut own = own;
            let mut run = Scorer::start(&mut own, tokens, n_skip, batch, &mut |share| progress(at(0.9 * share)))?;
            tally.score_against(&mut run, &base_rows, &mut |_| {})?;
            (own.layers(0), own.n_past())
        };
        let kv_bytes: usize = layers.iter().map(|layer| layer.kv_bytes).sum();
        let f16_bytes = n_past * model.hparams().f16_kv_bytes_per_token();
        compared.push(Compared {
            lazy: policy.to_string(),
            summary: tally.summary(),
            lazy_layers: layers.iter().filter(|layer| layer.lazy).map(|layer| layer.index).collect(),
            kv_bytes,
            compression: f16_bytes as f64 / kv_bytes.max(1) as f64,
        });
    }
    Ok(compared)
}

/// A prompt's layers with the scores that the policy `output` goes by, read uncompressed.
///
/// # Errors
/// As [`Session::new`] and [`Session::prefill`].
pub fn output_scores(model: &Model, params: &SessionParams, prompt: &[Token]) -> Result<Vec<LayerReport>, Error> {
    let mut params = uncompressed(params);
    // A budget of nothing: the layers are scored, and all stay active.
    params.lazy.policy = Policy::Output(0.0);
    let mut session = Session::new(model, params)?;
    session.prefill(prompt)?;
    Ok(session.layers(0))
}
