//! What a smaller cache does to a text's next tokens and to answers about a prompt.

use std::ops::Range;

use super::{Excerpt, Excerpts, journal::Found, metrics};
use crate::{
    engine::{BatchEntry, Error, Outputs, Session, SessionParams},
    model::Model,
};

/// What the uncompressed run says of one excerpt's rest.
pub(super) struct Base {
    /// The rows of logits of the text's tokens, with the [`metrics::log_sum_exp`] of each.
    rows: Vec<f32>,
    sums: Vec<f64>,
    /// The sum of the negative log-likelihoods of its answers' tokens.
    nll: f64,
}

impl Base {
    pub fn new(excerpt: &Excerpt, rows: &[f32]) -> Base {
        let n_vocab = rows.len() / excerpt.rest.len().max(1);
        let text = &rows[..excerpt.n_text * n_vocab];
        let sums = text.chunks_exact(n_vocab).map(metrics::log_sum_exp).collect();
        Base { rows: text.to_vec(), sums, nll: answers_nll(excerpt, rows) }
    }

    /// What other rows than these cost.
    pub fn compare(&self, excerpt: &Excerpt, rows: &[f32], sum: &mut Sum) {
        let n_vocab = rows.len() / excerpt.rest.len().max(1);
        let base = self.rows.chunks_exact(n_vocab).zip(&self.sums);
        let kls = base.zip(rows.chunks_exact(n_vocab)).map(|((base, &sum), row)| metrics::kl_with(base, sum, row));
        sum.kl += kls.sum::<f64>();
        sum.n_kl += self.sums.len();
        sum.nll += answers_nll(excerpt, rows) - self.nll;
        sum.n_nll += excerpt.answers.iter().map(Range::len).sum::<usize>();
    }
}

/// Sum of the negative log-likelihoods of an excerpt's answers; the row of one token predicts the next.
fn answers_nll(excerpt: &Excerpt, rows: &[f32]) -> f64 {
    let n_vocab = rows.len() / excerpt.rest.len().max(1);
    let row = |index: usize| &rows[index * n_vocab..(index + 1) * n_vocab];
    let tokens = excerpt.answers.iter().cloned().flatten();
    tokens.map(|token| metrics::nll(row(token - 1), excerpt.rest[token])).sum()
}

/// The harm of several excerpts.
#[derive(Debug, Default)]
pub(super) struct Sum {
    kl: f64,
    n_kl: usize,
    nll: f64,
    n_nll: usize,
}

impl Sum {
    pub fn found(&self, compression: Option<f64>) -> Found {
        let nll = (self.n_nll > 0).then(|| self.nll / self.n_nll as f64);
        Found { kl: self.kl / self.n_kl as f64, nll, compression }
    }
}

/// A run from an excerpt's prompt on. The rows of its rest are the session's. `progress` gets the share of the prompt that
/// is read, from 0 to 1.
pub(super) fn real_run(
    model: &Model,
    params: SessionParams,
    excerpt: &Excerpt,
    progress: &mut dyn FnMut(f32),
) -> Result<Session, Error> {
    let mut session = Session::new(model, params)?;
    let entry = BatchEntry { seq: 0, tokens: &excerpt.prompt, outputs: Outputs::None, prompt_end: true };
    session.run_with(&[entry], progress)?;
    session.run(&[BatchEntry { seq: 0, tokens: &excerpt.rest, outputs: Outputs::All, prompt_end: false }])?;
    Ok(session)
}

/// That there is something to score, and that lazy layers would drop something.
pub(super) fn check(params: &SessionParams, excerpts: &Excerpts) -> Result<(), Error> {
    let n_kept = params.lazy.n_kept();
    if excerpts.excerpts.is_empty() || excerpts.excerpts.iter().any(|excerpt| excerpt.n_text == 0) {
        return Err(Error::Params("nothing of an excerpt is scored".to_owned()));
    }
    let outside = |excerpt: &Excerpt| {
        let n = excerpt.rest.len();
        excerpt.prompt.is_empty() || excerpt.n_text > n || excerpt.answers.iter().any(|at| at.start == 0 || at.end > n)
    };
    if excerpts.excerpts.iter().any(outside) {
        return Err(Error::Params("an excerpt without a prompt, or with answers outside of it".to_owned()));
    }
    if excerpts.n_prompt <= n_kept {
        return Err(Error::Params(format!(
            "a prompt of {} tokens: lazy layers keep {n_kept}, so they would drop nothing; give a longer text, or a \
             smaller window",
            excerpts.n_prompt
        )));
    }
    Ok(())
}
