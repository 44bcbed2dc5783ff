//! Several texts at once: three prompts are continued in one batch per token, and a copy of the first goes another way.
//!
//! ```sh
//! cargo run --release --example sequences -- model.gguf
//! ```

use std::error::Error;

use simlayer::{AddBos, BatchEntry, Model, ModelParams, Outputs, SeqId, Session, SessionParams, Special, Token};

const PROMPTS: [&str; 3] = ["The sea is", "A good cook", "In the year 1900"];
const N_TOKENS: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: sequences MODEL")?;
    let model = Model::load(path, &ModelParams::default())?;
    let vocab = model.vocab();
    let mut session = Session::new(&model, SessionParams::default())?;

    let mut texts: Vec<Vec<Token>> =
        PROMPTS.iter().map(|prompt| vocab.tokenize(prompt, AddBos::Yes, Special::Parse)).collect::<Result<_, _>>()?;
    let prompts: Vec<BatchEntry<'_>> = (0..).zip(&texts).map(|(seq, tokens)| entry(seq, tokens, true)).collect();
    session.run(&prompts)?;

    // Sequence 3 begins as sequence 0 does: its cache is copied, nothing is computed again. It goes on with the second
    // most probable token.
    session.sequence(0).copy_to(3)?;
    texts.push(texts[0].clone());
    let mut rows: Vec<Vec<f32>> = rows(&session);
    let mut other = rows[0].clone();
    other[best(&rows[0]) as usize] = f32::NEG_INFINITY;
    rows.push(other);

    for _ in 0..N_TOKENS {
        let next: Vec<[Token; 1]> = rows.iter().map(|row| [best(row)]).collect();
        texts.iter_mut().zip(&next).for_each(|(text, token)| text.extend(token));
        let batch: Vec<BatchEntry<'_>> = (0..).zip(&next).map(|(seq, token)| entry(seq, token, false)).collect();
        session.run(&batch)?;
        rows = self::rows(&session);
    }
    for (seq, text) in texts.iter().enumerate() {
        println!("{seq}: {}", vocab.detokenize(text, false)?);
    }
    Ok(())
}

fn entry(seq: SeqId, tokens: &[Token], prompt_end: bool) -> BatchEntry<'_> {
    BatchEntry { seq, tokens, outputs: Outputs::Last, prompt_end }
}

/// One row of logits for each entry of the last batch.
fn rows(session: &Session) -> Vec<Vec<f32>> {
    session.logits().chunks_exact(session.model().hparams().n_vocab).map(<[f32]>::to_vec).collect()
}

/// The most probable token.
fn best(logits: &[f32]) -> Token {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(token, _)| token as Token)
}
