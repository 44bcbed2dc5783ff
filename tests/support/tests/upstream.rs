//! The random models are good enough to judge by: llama.cpp loads each, tokenises with its vocabulary, and its
//! logits depend on content and position and are neither one-sided nor all alike.

use simlayer_testkit::{Logits, RandomModel, Rng, UpstreamRef, Vocabulary, WeightType, metrics};

fn check(name: &str, model: &RandomModel) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    model.write(&path);
    let upstream = UpstreamRef::new();
    let n_vocab = model.n_vocab();
    assert_eq!(upstream.info(&path)["n_vocab"], n_vocab, "{name}");

    let prompt = Rng::new(7).tokens(40, n_vocab);
    // The same tokens in another order, with the same last ones.
    let mut moved = prompt.clone();
    moved[..30].rotate_left(11);
    let rows = upstream.logits(&path, Logits { prompts: &[prompt, moved], all: true, decode: None });
    assert_eq!((rows.len(), rows[0].len()), (80, n_vocab), "{name}");
    let entropy = rows.iter().map(|row| metrics::entropy(row)).sum::<f64>() / 80.0;
    assert!((2.0..(n_vocab as f64).ln() - 0.5).contains(&entropy), "{name}: mean entropy {entropy}");
    let moved = metrics::kl(&rows[39], &rows[79]);
    assert!(moved > 0.01, "{name}: the order of the tokens changes the logits by {moved} only");
}

#[test]
fn variations() {
    for (name, model) in RandomModel::variations() {
        check(name, &model);
    }
}

#[test]
fn weight_types() {
    for weight_type in WeightType::ALL {
        check(weight_type.name(), &RandomModel { weight_type, ..RandomModel::default() });
    }
}

#[test]
fn vocabularies_tokenize_any_text() {
    let folder = tempfile::tempdir().unwrap();
    for (vocabulary, spm) in [(Vocabulary::Spm, true), (Vocabulary::Bpe, false)] {
        let path = folder.path().join("model.gguf");
        let model = RandomModel { vocabulary, ..RandomModel::tiny() };
        model.write(&path);
        let texts = ["the word that these people know", "Überall\n\t日本 🦀 </s>", "\0\x01"];
        let bytes: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
        let upstream = UpstreamRef::new();
        let tokens = upstream.tokenize(&path, &bytes, false, false);
        // One token for a word that is in the vocabulary: "the" has a space before it in SentencePiece only.
        assert_eq!(tokens[0].len(), if spm { 6 } else { 8 }, "{vocabulary:?}: {:?}", tokens[0]);
        let back = upstream.detokenize(&path, &tokens, true);
        for (text, back) in texts.iter().zip(&back) {
            let back = String::from_utf8_lossy(back);
            assert_eq!(back.strip_prefix(' ').unwrap_or(&back), *text, "{vocabulary:?}");
        }
        let with_bos = upstream.tokenize(&path, &[b"the"], true, false);
        assert_eq!(with_bos[0][0] == 1, spm, "{with_bos:?}");
        assert_eq!(model.n_vocab().is_multiple_of(32), spm);
    }
}

#[test]
fn split_models() {
    let folder = tempfile::tempdir().unwrap();
    let model = RandomModel::tiny();
    let whole = folder.path().join("whole.gguf");
    model.write(&whole);
    let parts = model.gguf().write_split(folder.path(), "split", 3);
    let prompts = [Rng::new(3).tokens(9, model.n_vocab())];
    let logits = |path| UpstreamRef::new().logits(path, Logits { prompts: &prompts, ..Logits::default() });
    assert_eq!(logits(&whole), logits(&parts[0]));
}
