//! Continues a text, token by token.
//!
//! ```sh
//! cargo run --release --example generate -- model.gguf "The sea is"
//! ```

use std::{error::Error, io::Write};

use simlayer::{Model, ModelParams, Sampler, SamplerParams, Session, SessionParams, vocab::Utf8Stream};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: generate MODEL PROMPT".into());
    };
    let model = Model::load(path, &ModelParams::default())?;
    let mut session = Session::new(&model, SessionParams::default())?;
    let mut sampler = Sampler::new(model.vocab(), &SamplerParams::default())?;

    print!("{prompt}");
    let prompt = model.vocab().tokenize(&prompt, true, true)?;
    let mut token = sampler.sample(session.prefill(&prompt)?)?;
    // A character may be spread over several tokens.
    let mut text = Utf8Stream::default();
    for _ in 0..64 {
        if model.vocab().is_eog(token) {
            break;
        }
        print!("{}", text.push(&model.vocab().piece(token, false)));
        std::io::stdout().flush()?;
        token = sampler.sample(session.decode(token)?)?;
    }
    println!("{}", text.finish());
    Ok(())
}
