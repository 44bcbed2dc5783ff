//! Teacher forcing: a text is fed whatever the model would have said, and each token is scored.

use serde::Serialize;

use super::metrics;
use crate::{
    engine::{BatchEntry, Error, Outputs, SeqId, Session, SessionParams},
    ggml::Type,
    lazy::{Policy, Prune},
    vocab::Token,
};

/// Rows that are compared at once: two sessions then take turns, and neither's rows take much memory.
const ROWS: usize = 64;

/// The same session without laziness and with an f16 cache: what a compressed run is compared with.
pub fn uncompressed(params: &SessionParams) -> SessionParams {
    let mut params = params.clone();
    (params.lazy.policy, params.prune) = (Policy::Off, Prune::Off);
    (params.type_k, params.type_v) = (Type::F16, Type::F16);
    params
}

/// Reads the beginning of a text as a prompt, then feeds the rest token by token (teacher-forced) and hands out the
/// logits.
#[derive(Debug)]
pub struct Scorer<'a> {
    session: &'a mut Session,
    seq: SeqId,
    tokens: &'a [Token],
    /// The token that the pending row predicts.
    next: usize,
    pending: Vec<f32>,
    batch: usize,
}

impl<'a> Scorer<'a> {
    /// Empties the session and reads the first `n_skip` of `tokens`; layers become lazy at their end. The rest is to be
    /// scored, fed `batch` tokens at a time: 1 does what decoding does. `progress` gets the share of the prompt that
    /// is read, from 0 to 1.
    ///
    /// # Errors
    /// [`Error::Empty`] when there is nothing to read or nothing to score, else as [`Session::prefill`].
    pub fn start(
        session: &'a mut Session,
        tokens: &'a [Token],
        n_skip: usize,
        batch: usize,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Scorer<'a>, Error> {
        if n_skip == 0 || n_skip >= tokens.len() {
            return Err(Error::Empty);
        }
        session.clear();
        let pending = session.prefill_with(&tokens[..n_skip], progress)?.to_vec();
        Ok(Scorer::resume(session, 0, tokens, n_skip, batch, pending))
    }

    /// Goes on with a sequence that holds the first `next` of `tokens`; `pending` is the row of the last of them.
    pub fn resume(
        session: &'a mut Session,
        seq: SeqId,
        tokens: &'a [Token],
        next: usize,
        batch: usize,
        pending: Vec<f32>,
    ) -> Scorer<'a> {
        Scorer { session, seq, tokens, next, pending, batch: batch.max(1) }
    }

    /// The row that predicts the next token; empty at the end of the text.
    pub fn pending(&self) -> &[f32] {
        &self.pending
    }

    /// Tokens that are still to be scored.
    pub fn remaining(&self) -> &'a [Token] {
        &self.tokens[self.next..]
    }

    /// The rows that predict the next `n` tokens (or as many as remain), one after the other.
    ///
    /// # Errors
    /// As [`Session::decode`].
    pub fn rows(&mut self, n: usize) -> Result<Vec<f32>, Error> {
        let n = n.min(self.remaining().len());
        let end = self.next + n;
        // Nothing follows the last token, so it is not fed.
        let fed_end = if end == self.tokens.len() { end.saturating_sub(1).max(self.next) } else { end };
        let mut rows = std::mem::take(&mut self.pending);
        for fed in self.tokens[self.next..fed_end].chunks(self.batch) {
            self.session.run(&[BatchEntry { seq: self.seq, tokens: fed, outputs: Outputs::All, prompt_end: false }])?;
            rows.extend_from_slice(self.session.logits());
        }
        self.pending = rows.split_off(n * self.session.model().hparams().n_vocab);
        self.next = end;
        Ok(rows)
    }
}

/// Collects the scores of tokens, of one text or several.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    nlls: Vec<f64>,
    base_nlls: Vec<f64>,
    kls: Vec<f64>,
    same_top: usize,
}

/// What was scored. Logarithms are natural.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Summary {
    pub tokens_scored: usize,
    /// Mean negative log-likelihood of a token.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Standard error of the perplexity, as llama-perplexity gives it.
    pub perplexity_stderr: f64,
    /// Of the uncompressed run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_perplexity: Option<f64>,
    /// Mean divergence from the uncompressed run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_mean: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_stderr: Option<f64>,
    /// What 99.9 % of the tokens' divergences do not exceed: of fewer than a thousand tokens, the largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_p999: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_max: Option<f64>,
    /// Share of tokens at which both runs find the same token most probable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_top: Option<f64>,
}

impl Tally {
    /// Scores all that remains of a run; with `base` also its divergence from that run. `progress` gets the share that
    /// is done, from 0 to 1.
    ///
    /// # Errors
    /// As [`Session::decode`].
    pub fn score(
        &mut self,
        run: &mut Scorer<'_>,
        mut base: Option<&mut Scorer<'_>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<(), Error> {
        let total = run.remaining().len();
        let n_vocab = run.session.model().hparams().n_vocab;
        while !run.remaining().is_empty() {
            let tokens = run.remaining();
            let rows = run.rows(ROWS)?;
            let base_rows = base.as_mut().map(|base| base.rows(ROWS)).transpose()?;
            for (i, (row, &token)) in rows.chunks_exact(n_vocab).zip(tokens).enumerate() {
                let base_row = base_rows.as_ref().map(|rows| &rows[i * n_vocab..(i + 1) * n_vocab]);
                self.add(row, base_row, token);
            }
            progress(1.0 - run.remaining().len() as f32 / total as f32);
        }
        Ok(())
    }

    /// As [`Tally::score`], where the uncompressed run's rows are at hand.
    ///
    /// # Errors
    /// As [`Session::decode`].
    pub fn score_against(
        &mut self,
        run: &mut Scorer<'_>,
        base_rows: &[f32],
        progress: &mut dyn FnMut(f32),
    ) -> Result<(), Error> {
        let total = run.remaining().len();
        let n_vocab = run.session.model().hparams().n_vocab;
        let mut base_rows = base_rows.chunks_exact(n_vocab);
        while !run.remaining().is_empty() {
            let tokens = run.remaining();
            let rows = run.rows(ROWS)?;
            for (row, &token) in rows.chunks_exact(n_vocab).zip(tokens) {
                self.add(row, base_rows.next(), token);
            }
            progress(1.0 - run.remaining().len() as f32 / total as f32);
        }
        Ok(())
    }

    /// Counts one row of logits, and that of the uncompressed run, which predict `token`.
    pub fn add(&mut self, row: &[f32], base: Option<&[f32]>, token: Token) {
        self.nlls.push(metrics::nll(row, token));
        if let Some(base) = base {
            self.base_nlls.push(metrics::nll(base, token));
            self.kls.push(metrics::kl(base, row));
            self.same_top += usize::from(metrics::top(base) == metrics::top(row));
        }
    }

    pub fn summary(&self) -> Summary {
        let (nll, nll_stderr) = metrics::mean_and_stderr(&self.nlls);
        let compared = (!self.kls.is_empty()).then(|| metrics::mean_and_stderr(&self.kls));
        Summary {
            tokens_scored: self.nlls.len(),
            nll,
            perplexity: nll.exp(),
            perplexity_stderr: nll.exp() * nll_stderr,
            base_perplexity: compared.map(|_| metrics::mean_and_stderr(&self.base_nlls).0.exp()),
            kl_mean: compared.map(|(mean, _)| mean),
            kl_stderr: compared.map(|(_, stderr)| stderr),
            kl_p999: compared.map(|_| metrics::quantile(&self.kls, 0.999)),
            kl_max: compared.map(|_| self.kls.iter().copied().fold(f64::MIN, f64::max)),
            same_top: compared.map(|_| self.same_top as f64 / self.kls.len() as f64),
        }
    }
}
