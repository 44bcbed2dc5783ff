//! Sequences that share rows: each is, bit for bit, as one with rows of its own, whatever is done with it and with the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use proptest::prelude::*;
use simlayer_testkit::RandomModel;

use super::{BatchEntry, Outputs, SeqId, Session, SessionParams};
use crate::{
    Model, ModelParams,
    cache::KvRotate,
    ggml::Type,
    lazy::{LazyParams, Policy},
};

fn model() -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    RandomModel { n_layer: 3, ..RandomModel::tiny() }.write(&path);
    Model::load(&path, &ModelParams::default()).unwrap()
}

/// A ring of 2 + 70 + 60 rows: a third block that is not full.
fn params(policy: &str) -> SessionParams {
    let policy = policy.parse::<Policy>().unwrap();
    let lazy = LazyParams { policy, n_sink: 2, n_window: 70, n_slack: 60, ..LazyParams::default() };
    SessionParams { n_ctx: 700, n_ubatch: 64, n_threads: 1, lazy, ..SessionParams::default() }
}

fn session(params: &SessionParams) -> Session {
    Session::new(&model(), params.clone()).unwrap()
}

/// Made-up tokens of these positions in a text of this number.
fn text(number: usize, positions: Range<usize>) -> Vec<i32> {
    positions.map(|at| 3 + ((at * 7 + at / 5 + number * 11) % 20) as i32).collect()
}

fn run(session: &mut Session, entries: &[(SeqId, Vec<i32>)]) -> Vec<f32> {
    let batch = entries.iter().map(|(seq, tokens)| BatchEntry {
        seq: *seq,
        tokens,
        outputs: Outputs::Last,
        prompt_end: tokens.len() > 1,
    });
    session.run(&batch.collect::<Vec<_>>()).unwrap();
    session.logits().to_vec()
}

fn saved(session: &Session, seq: SeqId) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save_seq(seq, &mut bytes).unwrap();
    bytes
}

/// A copy in memory of its own.
fn copy_apart(session: &mut Session, from: SeqId, to: SeqId) {
    let bytes = saved(session, from);
    session.load_seq(to, &bytes).unwrap();
}

const N_SEQ: SeqId = 4;

#[derive(Debug, Clone)]
enum Step {
    Read(SeqId, usize),
    /// A token in each sequence, in one batch.
    Decode,
    Fork(SeqId, SeqId),
    /// A copy of the first tokens, in so many 100ths.
    Copy(SeqId, SeqId, usize),
    Truncate(SeqId, usize),
    Clear(SeqId),
    Checkpoint(SeqId),
    Restore(SeqId),
}

fn a_step() -> impl Strategy<Value = Step> {
    let seq = || 0..N_SEQ;
    prop_oneof![
        4 => (seq(), prop_oneof![2usize..40, 40usize..200]).prop_map(|(seq, n)| Step::Read(seq, n)),
        6 => Just(Step::Decode),
        5 => (seq(), seq()).prop_map(|(from, to)| Step::Fork(from, to)),
        2 => (seq(), seq(), 0usize..100).prop_map(|(from, to, part)| Step::Copy(from, to, part)),
        3 => (seq(), 0usize..100).prop_map(|(seq, part)| Step::Truncate(seq, part)),
        1 => seq().prop_map(Step::Clear),
        1 => seq().prop_map(Step::Checkpoint),
        1 => seq().prop_map(Step::Restore),
    ]
}

/// Runs the steps in a session that shares, and in one whose copies are all apart.
fn compare(params: &SessionParams, steps: &[Step]) {
    let (mut shared, mut apart) = (session(params), session(params));
    let mut checkpoints = BTreeMap::new();
    for (number, step) in steps.iter().enumerate() {
        let n_past = |seq| shared.seq_n_past(seq);
        match *step {
            Step::Read(seq, n) if n_past(seq) + n < 600 => {
                let entries = [(seq, text(number, n_past(seq)..n_past(seq) + n))];
                assert_eq!(run(&mut shared, &entries), run(&mut apart, &entries), "step {number}");
            }
            Step::Decode => {
                let entries: Vec<_> =
                    shared.seq_ids().into_iter().map(|seq| (seq, text(number + seq as usize, 0..1))).collect();
                if entries.iter().all(|&(seq, _)| n_past(seq) < 650) && !entries.is_empty() {
                    assert_eq!(run(&mut shared, &entries), run(&mut apart, &entries), "step {number}");
                }
            }
            Step::Fork(from, to) if from != to => {
                shared.fork(from, to, &BTreeSet::new()).unwrap();
                copy_apart(&mut apart, from, to);
            }
            Step::Copy(from, to, part) if from != to => {
                let n = n_past(from) * part / 100;
                let is_copied = shared.seq_copy(from, to, n).unwrap();
                assert_eq!(is_copied, apart.seq_can_truncate(from, n), "step {number}");
                if is_copied {
                    copy_apart(&mut apart, from, to);
                    assert!(apart.seq_truncate(to, n));
                }
            }
            Step::Truncate(seq, part) => {
                // Mostly not far.
                let n = n_past(seq) - (n_past(seq) * part / 100).min(if part % 3 == 0 { 600 } else { 20 });
                assert_eq!(shared.seq_truncate(seq, n), apart.seq_truncate(seq, n), "step {number}");
            }
            Step::Clear(seq) => [&mut shared, &mut apart].into_iter().for_each(|session| session.seq_clear(seq)),
            Step::Checkpoint(seq) => {
                let checkpoint = shared.checkpoint(seq);
                assert_eq!(checkpoint, apart.checkpoint(seq), "step {number}");
                checkpoints.insert(seq, checkpoint);
            }
            Step::Restore(seq) => {
                if let Some(checkpoint) = checkpoints.get(&seq) {
                    let restored = |session: &mut Session| session.restore(seq, checkpoint).unwrap();
                    assert_eq!(restored(&mut shared), restored(&mut apart), "step {number}");
                }
            }
            _ => {}
        }
    }
    for seq in 0..N_SEQ {
        assert!(saved(&shared, seq) == saved(&apart, seq), "sequence {seq}");
    }
    // Nobody holds a store that no sequence reads.
    [&mut shared, &mut apart].into_iter().for_each(Session::clear);
    assert_eq!(shared.kv().allocated_bytes, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whatever_is_done_with_sequences_they_are_as_copies(
        steps in prop::collection::vec(a_step(), 1..40),
        policy in prop::sample::select(vec!["off", "layers:1", "layers:0-2", "budget:0.7"]),
        ty in prop::sample::select(vec![Type::F16, Type::F32, Type::Q8_0]),
        flash_attn in prop::bool::weighted(0.9),
        fused_attention in prop::bool::weighted(0.8),
    ) {
        let types = if flash_attn { ty } else { Type::F16 };
        // What a copy keeps of its source's last prompt a saved state does not.
        let params = SessionParams {
            type_k: types,
            type_v: types,
            flash_attn,
            fused_attention,
            keep_prompt_end: false,
            kv_rotate: KvRotate::default(),
            ..params(policy)
        };
        compare(&params, &steps);
    }
}

/// Going back to a prompt's end puts rows back: those of a copy stay as they are.
#[test]
fn an_answer_that_is_taken_back_is_nobody_elses() {
    for ty in [Type::F16, Type::Q8_0] {
        let mut session = session(&SessionParams { type_k: ty, type_v: ty, ..params("layers:1") });
        let prompt = run(&mut session, &[(0, text(0, 0..200))]);
        let answer = |session: &mut Session, seq| -> Vec<Vec<f32>> {
            (200..330).map(|at| run(session, &[(seq, text(1, at..at + 1))])).collect()
        };
        session.fork(0, 1, &BTreeSet::new()).unwrap();
        let first = answer(&mut session, 0);
        session.fork(0, 2, &BTreeSet::new()).unwrap();
        let [copy, grown] = [1, 2].map(|seq| saved(&session, seq));
        // The ring has lost the prompt's window by now.
        assert!(session.seq_truncate(0, 199));
        assert_eq!(run(&mut session, &[(0, text(0, 199..200))]), prompt);
        assert!(saved(&session, 1) == copy && saved(&session, 2) == grown);
        assert!(answer(&mut session, 0) == first && answer(&mut session, 1) == first);
        assert!(saved(&session, 2) == grown);
    }
}

/// Looks before dropping, and keys that become narrow, in a copy: as in a sequence that was never copied, and the other one
/// stays as it is.
#[test]
fn copies_are_looked_at_alone() {
    for policy in ["kl:1000", "kl:1e-30", "budget:0.4"] {
        let lazy = LazyParams { narrow_keys: true, ..params(policy).lazy };
        let params = SessionParams { type_k: Type::Q8_0, type_v: Type::Q4_0, lazy, ..params(policy) };
        let (mut alone, mut copied) = (session(&params), session(&params));
        let mut seq = 0;
        for (number, n) in [60, 90, 300].into_iter().enumerate() {
            let n_past = alone.seq_n_past(0);
            let tokens = text(number, n_past..n_past + n);
            let expected = run(&mut alone, &[(0, tokens.clone())]);
            copied.fork(seq, seq + 1, &BTreeSet::new()).unwrap();
            let before = saved(&copied, seq);
            assert_eq!(run(&mut copied, &[(seq + 1, tokens)]), expected, "{policy}");
            assert!(saved(&copied, seq) == before, "{policy}");
            seq += 1;
        }
        assert!(saved(&copied, seq) == saved(&alone, 0), "{policy}");
        assert_eq!(copied.foretold(seq), alone.foretold(0));
    }
}
