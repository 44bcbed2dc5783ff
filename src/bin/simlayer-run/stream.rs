//! Prefill with a progress bar, then tokens as they come.

use std::{
    io,
    time::{Duration, Instant},
};

use simlayer::{Error, Model, Sampler, Session, Token, generation::StopText};

use crate::{failure::Failure, interrupt, progress::Progress};

/// Why no more tokens came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// The model ended its text.
    Eos,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    Interrupted,
    /// A text that ends it.
    #[serde(rename = "stop")]
    Text,
}

/// What a run of prefill and decoding took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    pub prefill: Duration,
    pub prefilled: usize,
    pub decode: Duration,
    pub decoded: usize,
}

#[derive(Debug)]
pub struct Answer {
    pub tokens: Vec<Token>,
    pub text: String,
    pub stop: Stop,
    pub timings: Timings,
}

/// What ends an answer besides the model: so many tokens, or one of these texts.
#[derive(Debug)]
pub struct Until<'a> {
    pub limit: Option<u64>,
    pub stops: &'a [String],
}

/// Reads `prompt` and generates. `show` gets the text in pieces of whole characters, and
/// nothing from the first text on that ends it. `read` is called when the prompt has been read.
///
/// Ctrl-C is no failure: the answer says that it was interrupted.
pub fn answer(
    model: &Model,
    session: &mut Session,
    sampler: &mut Sampler,
    prompt: &[Token],
    until: &Until<'_>,
    read: impl FnOnce(&Session) -> Result<(), Failure>,
    mut show: impl FnMut(&str) -> io::Result<()>,
) -> Result<Answer, Failure> {
    let vocab = model.vocab();
    let mut answer =
        Answer { tokens: Vec::new(), text: String::new(), stop: Stop::Length, timings: Timings::default() };

    let start = Instant::now();
    let prefilled = prefill(session, prompt);
    answer.timings.prefill = start.elapsed();
    let mut logits = match prefilled {
        Ok(logits) => logits,
        Err(Error::Interrupted) => {
            answer.stop = Stop::Interrupted;
            return Ok(answer);
        }
        Err(error) => return Err(error.into()),
    };
    answer.timings.prefilled = prompt.len();
    read(session)?;

    let mut stream = StopText::new(until.stops);
    let mut add = |answer: &mut Answer, piece: String| {
        answer.text.push_str(&piece);
        if piece.is_empty() { Ok(()) } else { show(&piece) }
    };
    let (n_ctx, limit) = (session.n_ctx(), until.limit);
    loop {
        if interrupt::pressed() {
            answer.stop = Stop::Interrupted;
            break;
        }
        if limit.is_some_and(|limit| answer.tokens.len() as u64 >= limit) {
            break;
        }
        let token = sampler.sample(&logits)?;
        if vocab.is_eog(token) {
            answer.stop = Stop::Eos;
            break;
        }
        answer.tokens.push(token);
        let (piece, stopped) = stream.push(&vocab.piece(token, false));
        add(&mut answer, piece)?;
        if stopped {
            answer.stop = Stop::Text;
            return Ok(answer);
        }
        if limit.is_some_and(|limit| answer.tokens.len() as u64 >= limit) {
            break;
        }
        if session.n_past() >= n_ctx {
            answer.stop = Stop::Context;
            break;
        }
        let start = Instant::now();
        match session.decode(token) {
            Ok(next) => logits = next.to_vec(),
            Err(Error::Interrupted) => {
                answer.stop = Stop::Interrupted;
                break;
            }
            Err(error) => return Err(error.into()),
        }
        answer.timings.decode += start.elapsed();
        answer.timings.decoded += 1;
    }
    add(&mut answer, stream.finish())?;
    Ok(answer)
}

/// Prefill with a bar on the terminal.
pub fn prefill(session: &mut Session, prompt: &[Token]) -> Result<Vec<f32>, Error> {
    let progress = Progress::new(format!("prefill of {} tokens", prompt.len()));
    let logits = session.prefill_with(prompt, &mut |share| progress.set(share));
    drop(progress);
    logits.map(<[f32]>::to_vec)
}
