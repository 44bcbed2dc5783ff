//! A prompt that is read once, uncompressed, and is then tried under one rule after the other.

use std::{collections::BTreeSet, fmt};

use super::{Contender, Scorer, uncompressed};
use crate::{
    engine::{Error, LayerReport, SeqId, Session, SessionParams},
    ggml::Type,
    lazy::{At, Measure, Policy, Prune, Target},
    model::Model,
    vocab::Token,
};

/// The copy of the uncompressed sequence that a rule is tried on.
const COPY: SeqId = SeqId::MAX;

/// A prompt read with full attention into an f16 cache, from which other caches are made.
#[derive(Debug)]
pub struct Reading<'a> {
    model: &'a Model,
    params: &'a SessionParams,
    prompt: &'a [Token],
    base: Session,
    /// Logits behind the prompt.
    row: Vec<f32>,
    /// The layers' scores by change of output, once a rule asked for them.
    by_output: Option<Vec<LayerReport>>,
}

/// The prompt as one rule keeps it.
pub struct Held<'a> {
    session: Kept<'a>,
    seq: SeqId,
    row: Vec<f32>,
}

/// Where it is kept: in a session of its own, or as a copy in the uncompressed one.
enum Kept<'a> {
    Own(Box<Session>),
    Copy(&'a mut Session),
}

impl<'a> Reading<'a> {
    /// Reads the prompt. `progress` gets the share that is read, from 0 to 1.
    ///
    /// # Errors
    /// As [`Session::new`] and [`Session::prefill`].
    pub fn new(
        model: &'a Model,
        params: &'a SessionParams,
        prompt: &'a [Token],
        progress: &mut dyn FnMut(f32),
    ) -> Result<Reading<'a>, Error> {
        let mut base_params = uncompressed(params);
        // No mass is above 1: the layers are scored, and all stay active.
        base_params.lazy.policy = Policy::Threshold(Some(1.0));
        let mut base = Session::new(model, base_params)?;
        let row = base.prefill_with(prompt, progress)?.to_vec();
        Ok(Reading { model, params, prompt, base, row, by_output: None })
    }

    /// The prompt with nothing compressed.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn full(&mut self) -> Result<Held<'_>, Error> {
        self.base.fork(0, COPY, &BTreeSet::new())?;
        Ok(Held { session: Kept::Copy(&mut self.base), seq: COPY, row: self.row.clone() })
    }

    /// The prompt as it is kept under a rule, which is what a run of its own would keep. `progress` gets the share that is
    /// done, from 0 to 1.
    ///
    /// A rule that reads its prompt with full attention and goes by scores, or is a fixed set, gets a copy of the
    /// uncompressed cache, shrunk as it says. Any other reads the prompt itself, and so does a budget with types of its own:
    /// a layer that it gives up later than the next ones is quantised twice then.
    ///
    /// # Errors
    /// As [`Session::new`] and [`Session::prefill`].
    pub fn under(&mut self, contender: &Contender, progress: &mut dyn FnMut(f32)) -> Result<Held<'_>, Error> {
        let params = contender.params(self.params);
        let mut own = Session::new(self.model, params.clone())?;
        let is_f16 = (params.type_k, params.type_v) == (Type::F16, Type::F16);
        // The uncompressed session has no exact store that would do for tiles, and other lazy layers.
        if [params.type_k, params.type_v].into_iter().any(Type::is_tiles)
            || (contender.lazy_types, contender.n_window) != (None, None)
            || params.lazy.narrow_keys
            || params.prune != Prune::Off
            || params.lazy.n_rescued > 0
            || !is_copied(&contender.policy, is_f16)
            || own.reads_windowed()
            || params.lazy.at != At::Prefill
        {
            let row = own.prefill_with(self.prompt, progress)?.to_vec();
            return Ok(Held { session: Kept::Own(Box::new(own)), seq: 0, row });
        }
        let lazy = match contender.policy.measure() {
            Measure::Mass => own.choose(&self.base.layers(0)),
            Measure::Output => {
                // Read once more at most: the first run's scores are masses.
                if self.by_output.is_none() {
                    self.by_output = Some(output_scores(self.model, &params, self.prompt, progress)?);
                }
                own.choose(self.by_output.as_deref().unwrap_or_default())
            }
        };
        self.base.set_windows(own.lazy_params().windows.clone())?;
        drop(own);
        self.base.fork_with(0, COPY, &lazy, Some((params.type_k, params.type_v)))?;
        Ok(Held { session: Kept::Copy(&mut self.base), seq: COPY, row: self.row.clone() })
    }
}

/// Whether [`Session::choose`] says of a rule all that it does at a prompt's end.
fn is_copied(policy: &Policy, is_f16: bool) -> bool {
    match policy {
        Policy::Off | Policy::Threshold(_) | Policy::Layers(_) | Policy::Profile(Target::Share(_)) => true,
        Policy::Budget(_) | Policy::Output(_) => is_f16,
        _ => false,
    }
}

/// A prompt's layers with the scores that the policy `output` goes by, read uncompressed.
fn output_scores(
    model: &Model,
    params: &SessionParams,
    prompt: &[Token],
    progress: &mut dyn FnMut(f32),
) -> Result<Vec<LayerReport>, Error> {
    let mut params = uncompressed(params);
    // A budget of nothing: the layers are scored, and all stay active.
    params.lazy.policy = Policy::Output(0.0);
    let mut session = Session::new(model, params)?;
    session.prefill_with(prompt, progress)?;
    Ok(session.layers(0))
}

impl Held<'_> {
    /// The session and the sequence that hold the prompt.
    pub fn parts(&mut self) -> (&mut Session, SeqId) {
        let session = match &mut self.session {
            Kept::Own(session) => &mut **session,
            Kept::Copy(session) => session,
        };
        (session, self.seq)
    }

    fn session(&self) -> &Session {
        match &self.session {
            Kept::Own(session) => session,
            Kept::Copy(session) => session,
        }
    }

    /// The logits behind the prompt.
    pub fn row(&self) -> &[f32] {
        &self.row
    }

    /// Scores a text that begins with the prompt's `n` tokens; `batch` as in [`Scorer::start`].
    pub fn scorer<'s>(&'s mut self, tokens: &'s [Token], n: usize, batch: usize) -> Scorer<'s> {
        let row = self.row.clone();
        let (session, seq) = self.parts();
        Scorer::resume(session, seq, tokens, n, batch, row)
    }

    pub fn lazy_layers(&self) -> Vec<usize> {
        self.session().layers(self.seq).iter().filter(|layer| layer.lazy).map(|layer| layer.index).collect()
    }

    /// The divergence that a look foretold ([`SequenceView::foretold`](crate::SequenceView::foretold)).
    pub fn foretold(&self) -> Option<f64> {
        self.session().foretold(self.seq)
    }

    /// Bytes of the sequence's buffers as it is now.
    pub fn kv_bytes(&self) -> usize {
        self.session().layers(self.seq).iter().map(|layer| layer.kv_bytes).sum()
    }

    /// What an uncompressed f16 cache of the same tokens takes, over [`Held::kv_bytes`].
    pub fn compression(&self) -> f64 {
        let session = self.session();
        let f16_bytes = session.seq_n_past(self.seq) * session.model().hparams().f16_kv_bytes_per_token();
        f16_bytes as f64 / self.kv_bytes().max(1) as f64
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Kept::Copy(session) = &mut self.session {
            session.seq_clear(self.seq);
        }
    }
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("session", self.session()).field("seq", &self.seq).finish_non_exhaustive()
    }
}
