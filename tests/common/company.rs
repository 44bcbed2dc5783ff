//! Conversations that decode together.

use std::path::Path;

use simlayer::{BatchEntry, Model, Outputs, SeqId, SessionParams};
use simlayer_testkit::{RandomModel, Rng, metrics::kl};

use super::{logits, session, shorter};

/// Steps that conversations take together, and on slow devices at least: their stores are brought together after 16 with the same ones.
const STEPS: usize = 330;
const LEAST_STEPS: usize = 110;

/// That conversations of these lengths say together what each says alone, whatever comes between: with a random model, to a mean KL of
/// `most`. One layer of three is lazy.
pub fn check_company(load: impl Fn(&Path) -> Model, params: &SessionParams, lengths: &[usize], most: f64) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 3, n_embd: 128, n_ff: 128, n_ctx_train: 8192, ..RandomModel::default() };
    random.write(&path);
    let model = load(&path);
    let mut params = params.clone();
    params.lazy.policy = "layers:1".parse().expect("a policy");
    (params.lazy.n_window, params.lazy.n_slack) = (100, 30);
    let n_steps = shorter(STEPS).max(LEAST_STEPS);
    let texts: Vec<Vec<_>> =
        lengths.iter().zip(3..).map(|(n, seed)| Rng::new(seed).tokens(n + n_steps, random.n_vocab())).collect();
    let alone: Vec<Vec<Vec<f32>>> =
        texts.iter().zip(lengths).map(|(text, &n)| logits(&model, &params, &text[..n], &text[n..])).collect();

    let mut session = session(&model, params);
    for (seq, (text, &n)) in (0..).zip(texts.iter().zip(lengths)) {
        let entry = BatchEntry { seq, tokens: &text[..n], outputs: Outputs::None, prompt_end: true };
        session.run(&[entry]).expect("a prompt");
    }
    let mut there: Vec<SeqId> = (0..lengths.len() as SeqId).collect();
    let mut found = Vec::new();
    for step in 0..n_steps {
        // One goes meanwhile, and the others take other places in the batch.
        if step == n_steps / 3 {
            let before = session.kv().allocated_bytes;
            session.seq_clear(there.remove(1));
            let of_one = before / lengths.len() / 4;
            assert!(session.kv().allocated_bytes + of_one < before, "a cleared conversation's memory is free at once");
        }
        if step == n_steps / 2 {
            there.reverse();
        }
        // And now and then not all are asked.
        let asked: Vec<SeqId> = there.iter().copied().filter(|seq| step % 40 != 39 || *seq != there[0]).collect();
        let entry = |&seq: &SeqId| {
            let (text, n) = (&texts[seq as usize], lengths[seq as usize]);
            let at = session.seq_n_past(seq);
            (seq, &text[at..=at], at - n + 1)
        };
        let entries: Vec<(SeqId, &[_], usize)> = asked.iter().map(entry).collect();
        let batch = |&(seq, tokens, _): &(SeqId, _, usize)| BatchEntry {
            seq,
            tokens,
            outputs: Outputs::Last,
            prompt_end: false,
        };
        session.run(&entries.iter().map(batch).collect::<Vec<_>>()).expect("a step");
        for (row, (seq, _, nth)) in session.logits().chunks_exact(random.n_vocab()).zip(&entries) {
            found.push(kl(&alone[*seq as usize][*nth], row));
        }
    }
    let (worst, mean) = (found.iter().copied().fold(0.0, f64::max), found.iter().sum::<f64>() / found.len() as f64);
    println!("{lengths:?}: KL to a conversation alone {mean:.3e}, at worst {worst:.3e}");
    assert!(mean < most, "{mean}");
    session.clear();
    assert_eq!(session.kv().allocated_bytes, 0);
}
