//! Reads a text, makes half of the layers lazy, and reports what each layer keeps.
//!
//! ```sh
//! cargo run --release --example lazy_report -- model.gguf xtask/demo/story.txt
//! ```

use std::error::Error;

use simlayer::{Model, ModelParams, Session, SessionParams, lazy::Policy};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(text)) = (args.next(), args.next()) else {
        return Err("usage: lazy_report MODEL FILE".into());
    };
    let model = Model::load(path, &ModelParams::default())?;
    let mut params = SessionParams::default();
    params.lazy.policy = "budget:0.5".parse::<Policy>()?;
    params.lazy.n_window = 256;
    let mut session = Session::new(&model, params)?;

    let mut tokens = model.vocab().tokenize(&std::fs::read_to_string(text)?, true, false)?;
    tokens.truncate(session.n_ctx());
    session.prefill(&tokens)?;

    println!("layer  score  kind    bytes");
    for layer in session.layers(0) {
        let score = layer.score.map_or("–".to_owned(), |score| format!("{score:.3}"));
        println!("{:5}  {score:>5}  {:6}  {}", layer.index, layer.kind, layer.kv_bytes);
    }
    let kv = session.kv();
    println!(
        "{} tokens, {} of {} layers lazy: {} bytes, {:.1} times less than in f16",
        kv.context_tokens,
        kv.lazy_layers,
        kv.lazy_layers + kv.active_layers,
        kv.allocated_bytes,
        kv.compression
    );
    Ok(())
}
