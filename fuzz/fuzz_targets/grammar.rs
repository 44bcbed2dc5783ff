//! Whatever text a grammar is: reading it, and sampling by what is read, never panics, aborts, or takes time without end.
//!
//! `cargo xtask fuzz` runs it for ten minutes.
#![no_main]

use std::{fs, path::Path, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use simlayer::{Sampler, SamplerParams, Vocab};
use simlayer_testkit::{RandomModel, Vocabulary};

fuzz_target!(init: write_seeds(), |text: &str| {
    let params = SamplerParams { grammar: Some(text.to_owned()), ..SamplerParams::greedy() };
    let Ok(mut sampler) = Sampler::new(vocab(), &params) else { return };
    for step in 0..8 {
        // Each step prefers other tokens.
        let logits: Vec<f32> = (0..vocab().n_tokens()).map(|token| ((token * 31 + step * 17) % 97) as f32).collect();
        if sampler.sample(&logits).is_err() {
            break;
        }
    }
    let Ok(mut copy) = sampler.try_clone() else { return };
    let _ = copy.accept(3);
    let _ = copy.reset();
});

/// A small vocabulary of byte pairs: every text has tokens.
fn vocab() -> &'static Vocab {
    static VOCAB: OnceLock<Vocab> = OnceLock::new();
    VOCAB.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("vocabulary.gguf");
        RandomModel { vocabulary: Vocabulary::Bpe, ..RandomModel::tiny() }.write(&path);
        Vocab::load(&path).expect("the vocabulary loads")
    })
}

/// Writes small grammars to the folder that `cargo fuzz` reads first.
fn write_seeds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/grammar");
    fs::create_dir_all(&corpus).expect("fuzz/corpus can be made");
    let seeds = [
        ("choice", "root ::= \"yes\" | \"no\" | maybe\nmaybe ::= [a-z]+ # a comment\n"),
        ("list", "root ::= \"[\" ws item (\",\" ws item){0,3} \"]\"\nitem ::= [^\\]\\x22]{1,4}\nws ::= \" \"?\n"),
        ("nested", "root ::= ((\"a\" | (\"b\" (\"c\" root?)*)) .)+\n"),
        ("tokens", "root ::= <[1]> !<[2]> <|im_end|> \"\\u00e9\\U0001F600\\n\"\n"),
        ("empty", "root ::= a a | \na ::= b b |\nb ::= \"x\" |\n"),
    ];
    for (name, text) in seeds {
        fs::write(corpus.join(name), text).expect("fuzz/corpus can be written");
    }
}
