//! Sessions from the outside: states, settings that change, views of sequences.

use proptest::prelude::*;
use simlayer_testkit::RandomModel;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    BatchEntry, LayerKind, Outputs, SeqId, SequenceView, Session, SessionParams,
    state::{CHECKSUM_BYTES, HEADER_BYTES},
};
use crate::{
    Model, ModelParams,
    ggml::Type,
    lazy::{LazyParams, Policy},
};

fn session(policy: &str, ty: Type) -> Session {
    session_with(policy, SessionParams { type_k: ty, type_v: ty, ..SessionParams::default() })
}

fn session_with(policy: &str, params: SessionParams) -> Session {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    RandomModel { n_layer: 3, ..RandomModel::tiny() }.write(&path);
    let model = Model::load(&path, &ModelParams::default()).unwrap();
    let mut params = SessionParams { n_ctx: 256, n_threads: 1, ..params };
    params.lazy.policy = policy.parse::<Policy>().unwrap();
    (params.lazy.n_sink, params.lazy.n_window) = (2, 16);
    Session::new(&model, params).unwrap()
}

fn read(session: &mut Session, seq: SeqId, tokens: std::ops::Range<i32>) {
    let tokens: Vec<i32> = tokens.map(|token| 3 + token % 20).collect();
    let entry = BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end: tokens.len() > 1 };
    session.run(&[entry]).unwrap();
}

fn saved(session: &Session, seq: SeqId) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save_seq(seq, &mut bytes).unwrap();
    assert_eq!(bytes.len(), session.seq_state_bytes(seq));
    bytes
}

/// Whatever the stores are: the same bytes come back, and the next token's logits are the same to the bit.
#[test]
fn what_is_saved_comes_back() {
    // Without flash attention active layers cannot be quantised; lazy ones are all the same.
    for (ty, flash_attn) in [(Type::F16, true), (Type::F32, true), (Type::F16, false)] {
        for policy in ["off", "layers:1", "budget:0.7"] {
            let params = SessionParams { type_k: ty, type_v: ty, flash_attn, ..SessionParams::default() };
            let mut session = session_with(policy, params);
            read(&mut session, 0, 0..50);
            let bytes = saved(&session, 0);
            assert_eq!(session.load_seq(7, &bytes).unwrap(), bytes.len());
            assert_eq!(saved(&session, 7), bytes);
            assert_eq!(session.layers(7), session.layers(0));
            read(&mut session, 0, 50..51);
            let expected = session.logits().to_vec();
            read(&mut session, 7, 50..51);
            assert_eq!(session.logits(), expected);
        }
    }
}

#[test]
fn an_empty_sequence_is_a_state_too() {
    let mut session = session("off", Type::F16);
    let bytes = saved(&session, 0);
    read(&mut session, 0, 0..5);
    session.load_seq(0, &bytes).unwrap();
    assert_eq!(session.seq_n_past(0), 0);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let mut one = session("off", Type::F16);
    read(&mut one, 0, 0..50);
    let bytes = saved(&one, 0);
    let mut other = session("off", Type::F32);
    let error = other.load_seq(0, &bytes).unwrap_err().to_string();
    assert!(error.contains("f16/f16, the context's f32/f32"), "{error}");
    let mut long = bytes.clone();
    long.push(0);
    assert_eq!(one.load_seq(0, &long).unwrap(), bytes.len());
    assert!(one.load_seq(0, &bytes[..bytes.len() - 1]).unwrap_err().to_string().contains("its length"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Also where the checksum is right, since whoever damages a state may know how to make one.
    #[test]
    fn damaged_states_are_refused_or_harmless(
        changes in prop::collection::vec((0usize..600, any::<u8>()), 1..6),
        cut in prop::option::of(0usize..4000),
        fix_checksum: bool,
    ) {
        thread_local! {
            static GOOD: std::cell::RefCell<(Session, Vec<u8>)> = std::cell::RefCell::new({
                let mut session = session("layers:1", Type::F16);
                read(&mut session, 0, 0..50);
                let bytes = saved(&session, 0);
                (session, bytes)
            });
        }
        GOOD.with_borrow_mut(|(session, good)| {
            let mut bad = good.clone();
            for (at, value) in changes {
                // Mostly the headers: of the state, and of the layers after it.
                bad[at] = value;
            }
            bad.truncate(cut.unwrap_or(usize::MAX).max(HEADER_BYTES + CHECKSUM_BYTES));
            if fix_checksum {
                let end = bad.len() - CHECKSUM_BYTES;
                let length = (bad.len() as u64).to_le_bytes();
                bad[12..20].copy_from_slice(&length);
                let checksum = xxh3_64(&bad[..end]);
                bad[end..].copy_from_slice(&checksum.to_le_bytes());
            }
            let n_past = session.seq_n_past(0);
            match session.load_seq(0, &bad) {
                // Then it can be gone on with.
                Ok(_) => if session.seq_n_past(0) < 250 { read(session, 0, 0..1) },
                Err(_) => assert_eq!(session.seq_n_past(0), n_past),
            }
            session.load_seq(0, good).unwrap();
        });
        prop_assert!(true);
    }
}

/// Settings that are changed are those of a session that had them from the beginning, in everything that follows from them.
#[test]
fn changed_settings_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    RandomModel { n_layer: 3, ..RandomModel::tiny() }.write(&path);
    let model = Model::load(&path, &ModelParams::default()).unwrap();
    let lazy = LazyParams { n_sink: 7, n_window: 24, n_slack: 4, type_k: Some(Type::F16), ..LazyParams::default() };
    let lazy = LazyParams { policy: Policy::Layers([0, 2].into()), ..lazy };
    let before = SessionParams { n_threads: 1, type_k: Type::Q4_0, type_v: Type::Q4_0, ..SessionParams::default() };
    let after = SessionParams { lazy: lazy.clone(), ..before.clone() };
    let mut changed = Session::new(&model, before).unwrap();
    read(&mut changed, 1, 0..60);
    changed.clear();
    changed.set_lazy(lazy).unwrap();
    let mut new = Session::new(&model, after).unwrap();
    for session in [&mut changed, &mut new] {
        read(session, 0, 0..60);
        read(session, 0, 60..61);
    }
    assert_eq!(changed.logits(), new.logits());
    assert_eq!(changed.layers(0), new.layers(0));
    assert_eq!(saved(&changed, 0), saved(&new, 0));
}

#[test]
fn a_view_is_of_its_sequence() {
    let mut session = session("layers:1", Type::F16);
    let tokens: Vec<i32> = (0..40).map(|token| 3 + token % 20).collect();
    let logits = session.sequence(5).prefill(&tokens).unwrap().to_vec();
    let view = session.sequence(5);
    assert_eq!((view.id(), view.tokens(), view.len(), view.held()), (5, &tokens[..], 40, Some(0..=39)));
    let kinds = |view: &SequenceView<'_>| view.report().iter().map(|layer| layer.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&view), [LayerKind::Full, LayerKind::Lazy, LayerKind::Full]);

    let mut bytes = Vec::new();
    view.save(&mut bytes).unwrap();
    let mark = view.checkpoint();
    session.sequence(5).copy_to(6).unwrap();
    session.sequence(5).fork(7, &[2].into()).unwrap();
    assert_eq!(kinds(&session.sequence(7)), [LayerKind::Full, LayerKind::Lazy, LayerKind::Lazy]);
    let next = session.sequence(5).decode(9).unwrap().to_vec();
    assert_ne!(next, logits);
    assert_eq!(session.sequence(6).decode(9).unwrap(), next);
    assert_eq!(session.sequence(5).restore(&mark).unwrap().n_read, 0);
    assert_eq!(session.sequence(5).decode(9).unwrap(), next);
    assert_eq!(session.sequence(8).load(&bytes).unwrap(), bytes.len());
    assert_eq!(session.sequence(8).decode(9).unwrap(), next);

    assert!(session.sequence(8).truncate(40) && session.sequence(8).len() == 40);
    session.sequence(8).clear();
    assert!(session.sequence(8).is_empty() && session.sequence(8).tokens().is_empty());
    assert_eq!(session.seq_ids(), [5, 6, 7]);
}
