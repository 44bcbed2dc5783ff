//! What a program does with simlayer, in functions as its author would write them.

use std::{
    error::Error,
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use simlayer::{
    AddBos, BatchEntry, GenerationEnd, Model, Outputs, Sampler, SamplerParams, SeqId, Session, SessionParams, Special,
    Token,
    lazy::{LazyParams, Policy},
};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Half of the layers become lazy after a prompt, and keep `n_window` tokens.
pub fn budget(n_window: usize, abort: Option<Arc<AtomicBool>>) -> SessionParams {
    let lazy = LazyParams { policy: Policy::Budget(0.5), n_window, ..LazyParams::default() };
    SessionParams { n_ctx: 4096, n_threads: 2, lazy, abort, ..SessionParams::default() }
}

/// Nothing is ever lazy.
pub fn plain() -> SessionParams {
    let lazy = LazyParams { policy: Policy::Off, ..LazyParams::default() };
    SessionParams { n_threads: 2, lazy, ..SessionParams::default() }
}

/// The most probable token, always.
pub fn greedy(model: &Model) -> Result<Sampler> {
    Ok(Sampler::new(model.vocab(), &SamplerParams::greedy())?)
}

/// Gives the text that follows a prompt to `show` as it comes, up to `stop`, which is not shown.
pub fn stream(
    session: &mut Session,
    prompt: &str,
    stop: &str,
    limit: usize,
    mut show: impl FnMut(&str),
) -> Result<Option<GenerationEnd>> {
    let model = session.model().clone();
    let prompt = model.vocab().tokenize(prompt, AddBos::Yes, Special::Text)?;
    let mut sampler = greedy(&model)?;
    let mut text = session.generate(&mut sampler, &prompt)?.limit(limit).stop_at([stop]);
    for piece in &mut text {
        show(&piece?);
    }
    Ok(text.end())
}

/// Reads several prompts in one batch, and continues them together by `n` tokens each.
pub fn continue_together(session: &mut Session, prompts: &[Vec<Token>], n: usize) -> Result<Vec<Vec<Token>>> {
    let mut given = prompts.to_vec();
    let mut answers = vec![Vec::new(); prompts.len()];
    for step in 0..n {
        let batch: Vec<BatchEntry<'_>> = (0..)
            .zip(&given)
            .map(|(seq, tokens)| BatchEntry { seq, tokens, outputs: Outputs::Last, prompt_end: step == 0 })
            .collect();
        session.run(&batch)?;
        given = rows(session).map(|row| vec![best(row)]).collect();
        answers.iter_mut().zip(&given).for_each(|(answer, token)| answer.extend(token));
    }
    Ok(answers)
}

/// One row of logits for each entry of the last batch.
fn rows(session: &Session) -> impl Iterator<Item = &[f32]> {
    session.logits().chunks_exact(session.model().hparams().n_vocab)
}

pub fn best(logits: &[f32]) -> Token {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(token, _)| Token::try_from(token).unwrap_or(0))
}

/// A table of a sequence's layers.
pub fn report(session: &mut Session, seq: SeqId) -> String {
    let mut text = String::new();
    for layer in session.sequence(seq).report() {
        let score = layer.score.map_or("–".to_owned(), |score| format!("{score:.3}"));
        let _ = writeln!(text, "{:>3} {:6} {score:>5} {:>9} bytes", layer.index, layer.kind, layer.kv_bytes);
    }
    let kv = session.kv();
    let _ = writeln!(text, "{} lazy, {:.1} times less than in f16", kv.lazy_layers, kv.compression);
    text
}

/// The model that the project's tests use.
pub fn model_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/SmolLM2-135M-Instruct.Q4_1.gguf")
}
