//! Several rules on one text, each against the uncompressed run.

use serde::Serialize;

use super::{Contender, Reading, Summary, Tally};
use crate::{
    engine::{Error, SessionParams},
    model::Model,
    vocab::Token,
};

/// How one rule did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Compared {
    /// The rule, and the types where they were given, as it was asked for.
    pub lazy: String,
    #[serde(flatten)]
    pub summary: Summary,
    pub lazy_layers: Vec<usize>,
    /// The divergence that a look at the prompt's last tokens foretold, where the rule looks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foretold: Option<f64>,
    /// Bytes of the cache's buffers at the end of the text.
    pub kv_bytes: usize,
    /// What an uncompressed f16 cache of this context takes, over `kv_bytes`.
    pub compression: f64,
}

/// Scores one text under several rules, each against the uncompressed run, which is made once ([`Reading::under`] says how
/// it serves them).
///
/// # Errors
/// As [`Scorer::start`](super::Scorer::start) and [`Session::new`](crate::Session::new).
pub fn compare(
    model: &Model,
    params: &SessionParams,
    contenders: &[Contender],
    (tokens, n_skip, batch): (&[Token], usize, usize),
    progress: &mut dyn FnMut(f32),
) -> Result<Vec<Compared>, Error> {
    if n_skip == 0 || n_skip >= tokens.len() {
        return Err(Error::Empty);
    }
    let total = contenders.len() as f32 + 1.0;
    let mut reading = Reading::new(model, params, &tokens[..n_skip], &mut |share| progress(0.9 * share / total))?;
    let mut base_rows = Vec::new();
    let mut full = reading.full()?;
    let mut scorer = full.scorer(tokens, n_skip, batch);
    while !scorer.remaining().is_empty() {
        base_rows.extend(scorer.rows(64)?);
    }
    drop(full);

    let mut compared = Vec::new();
    for (i, contender) in contenders.iter().enumerate() {
        let at = |share: f32| (1.0 + i as f32 + share) / total;
        progress(at(0.0));
        let mut held = reading.under(contender, &mut |share| progress(at(0.9 * share)))?;
        let mut tally = Tally::default();
        let mut run = held.scorer(tokens, n_skip, batch);
        tally.score_against(&mut run, &base_rows, &mut |share| progress(at(0.9 + 0.1 * share)))?;
        compared.push(Compared {
            lazy: contender.to_string(),
            summary: tally.summary(),
            lazy_layers: held.lazy_layers(),
            foretold: held.foretold(),
            kv_bytes: held.kv_bytes(),
            compression: held.compression(),
        });
    }
    Ok(compared)
}
