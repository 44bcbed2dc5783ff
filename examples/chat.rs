//! A conversation: lines from stdin are the user's, and the model answers each. What was said stays in the cache.
//!
//! ```sh
//! cargo run --release --example chat -- model.gguf
//! ```

use std::{
    error::Error,
    io::{BufRead, Write},
};

use simlayer::{
    Model, ModelParams, Sampler, SamplerParams, Session, SessionParams,
    chat::{ChatTemplate, Message},
};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: chat MODEL")?;
    let model = Model::load(path, &ModelParams::default())?;
    let vocab = model.vocab();
    let template = ChatTemplate::new(model.chat_template()?, vocab);
    let mut session = Session::new(&model, SessionParams::default())?;
    let mut sampler = Sampler::new(vocab, &SamplerParams::default())?;

    let mut messages = Vec::new();
    // Text that the cache holds already.
    let mut read = String::new();
    for line in std::io::stdin().lock().lines() {
        messages.push(Message::new("user", line?));
        let prompt = template.render(&messages, true)?;
        // A template may write old messages in another way, once there are newer ones.
        let new = prompt.strip_prefix(&read).unwrap_or_else(|| {
            session.clear();
            &prompt
        });
        let mut answer = String::new();
        for piece in session.generate(&mut sampler, &template.tokenize(vocab, new)?)? {
            let piece = piece?;
            print!("{piece}");
            std::io::stdout().flush()?;
            answer.push_str(&piece);
        }
        println!();
        read = prompt + &answer;
        messages.push(Message::new("assistant", answer));
    }
    Ok(())
}
