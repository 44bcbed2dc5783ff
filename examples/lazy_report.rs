//! Reads a text, makes half of the layers lazy, and reports what each layer keeps.
//!
//! ```sh
//! cargo run --release --example lazy_report -- model.gguf xtask/demo/story.txt
//! ```

use std::error::Error;

use simlayer::{
    AddBos, Model, ModelParams, Session, SessionParams, Special,
    lazy::{LazyParams, Policy},
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(text)) = (args.next(), args.next()) else {
        return Err("usage: lazy_report MODEL FILE".into());
    };
    let model = Model::load(path, &ModelParams::default())?;
    let lazy = LazyParams { policy: "budget:0.5".parse::<Policy>()?, n_window: 256, ..LazyParams::default() };
    let mut session = Session::new(&model, SessionParams { lazy, ..SessionParams::default() })?;

    let mut tokens = model.vocab().tokenize(&std::fs::read_to_string(text)?, AddBos::Yes, Special::Text)?;
    tokens.truncate(session.n_ctx());
    session.prefill(&tokens)?;

    println!("layer  score  kind    bytes");
    for layer in session.sequence(0).report() {
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
