//! Writes a model of random weights that sees pictures, for a text model whose tokens have so many elements:
//! `cargo run -p simlayer-testkit --example random_clip -- 576 mmproj.gguf`

use std::process::ExitCode;

use simlayer_testkit::RandomClip;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [width, path] = &arguments[..] else {
        eprintln!("usage: random_clip ELEMENTS FILE");
        return ExitCode::FAILURE;
    };
    let Ok(n_embd_out) = width.parse() else {
        eprintln!("{width} is no number of elements");
        return ExitCode::FAILURE;
    };
    let (n_embd, n_head, n_ff, n_layer) = (64, 4, 128, 3);
    // 64 rows, about as large as embeddings of tokens are.
    let (image_size, patch_size, gain) = (56, 7, 0.1);
    RandomClip { n_embd_out, n_embd, n_head, n_ff, n_layer, image_size, patch_size, gain, seed: 5 }.write(path);
    ExitCode::SUCCESS
}
