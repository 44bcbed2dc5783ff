//! Continues a text, token by token.
//!
//! ```sh
//! cargo run --release --example generate -- model.gguf "The sea is"
//! ```

use std::{error::Error, io::Write};

use simlayer::{AddBos, Model, ModelParams, Sampler, SamplerParams, Session, SessionParams, Special};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: generate MODEL PROMPT".into());
    };
    let model = Model::load(path, &ModelParams::default())?;
    let mut session = Session::new(&model, SessionParams::default())?;
    let mut sampler = Sampler::new(model.vocab(), &SamplerParams::default())?;

    print!("{prompt}");
    let prompt = model.vocab().tokenize(&prompt, AddBos::Yes, Special::Parse)?;
    for piece in session.generate(&mut sampler, &prompt)?.limit(64) {
        print!("{}", piece?);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
