//! Sessions from the outside: states, settings that change, views of sequences.

use std::collections::BTreeSet;

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
    lazy::{DEFAULT_KL, LazyParams, Policy, PrefillMode},
};

fn session(policy: &str, ty: Type) -> Session {
    session_with(policy, SessionParams { type_k: ty, type_v: ty, ..SessionParams::default() })
}

fn session_with(policy: &str, params: SessionParams) -> Session {
    session_of(&RandomModel { n_layer: 3, ..RandomModel::tiny() }, policy, params)
}

fn session_of(model: &RandomModel, policy: &str, params: SessionParams) -> Session {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    model.write(&path);
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

/// A session in which a layer that is lazy and those that are not have tiles.
fn session_in_tiles() -> Session {
    let lazy = LazyParams { type_k: Some(Type::KVARN4), type_v: Some(Type::KVARN3), ..LazyParams::default() };
    let (type_k, type_v) = (Type::KVARN4, Type::KVARN2);
    let model = RandomModel { n_layer: 3, head_size: 32, ..RandomModel::tiny() };
    session_of(&model, "layers:1", SessionParams { type_k, type_v, lazy, ..SessionParams::default() })
}

fn sign(state: &mut [u8]) {
    let end = state.len() - CHECKSUM_BYTES;
    let checksum = xxh3_64(&state[..end]);
    state[end..].copy_from_slice(&checksum.to_le_bytes());
}

/// States of before there were tiles have none.
#[test]
fn older_states_have_no_tiles() {
    for (mut session, has_tiles) in [(session("layers:1", Type::F16), false), (session_in_tiles(), true)] {
        read(&mut session, 0, 0..150);
        let mut state = saved(&session, 0);
        session.load_seq(1, &state).unwrap();
        assert_eq!(saved(&session, 1), state);
        let mut load = |version: u32| {
            state[8..12].copy_from_slice(&version.to_le_bytes());
            sign(&mut state);
            session.load_seq(2, &state).map_err(|error| error.to_string())
        };
        assert_eq!(load(4).err().map(|why| why.contains("a layer has tiles")), has_tiles.then_some(true));
        assert!(load(8).unwrap_err().contains("version 8"));
        load(5).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Also where the checksum is right, since whoever damages a state may know how to make one.
    #[test]
    fn damaged_states_are_refused_or_harmless(
        changes in prop::collection::vec((0usize..600, any::<u8>()), 1..6),
        cut in prop::option::of(0usize..4000),
        fix_checksum: bool,
        in_tiles: bool,
    ) {
        type Good = std::cell::RefCell<(Session, Vec<u8>)>;
        fn good(mut session: Session, n: i32) -> Good {
            read(&mut session, 0, 0..n);
            let bytes = saved(&session, 0);
            (session, bytes).into()
        }
        thread_local! {
            static GOOD: Good = good(session("layers:1", Type::F16), 50);
            static TILES: Good = good(session_in_tiles(), 70);
        }
        let good = if in_tiles { &TILES } else { &GOOD };
        good.with_borrow_mut(|(session, good)| {
            let mut bad = good.clone();
            for (at, value) in changes {
                // Mostly the headers: of the state, and of the layers after it.
                bad[at] = value;
            }
            bad.truncate(cut.unwrap_or(usize::MAX).max(HEADER_BYTES + CHECKSUM_BYTES));
            if fix_checksum {
                let length = (bad.len() as u64).to_le_bytes();
                bad[12..20].copy_from_slice(&length);
                sign(&mut bad);
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

/// What the next tokens give, the layers' kinds, and the divergence that was foretold.
fn after_a_prompt(policy: &str, params: &SessionParams) -> (Vec<Vec<f32>>, Vec<LayerKind>, Option<f64>) {
    let mut session = session_with(policy, params.clone());
    read(&mut session, 0, 0..150);
    let mut rows = vec![session.logits().to_vec()];
    for token in 150..160 {
        read(&mut session, 0, token..token + 1);
        rows.push(session.logits().to_vec());
    }
    let kinds = session.layers(0).iter().map(|layer| layer.kind).collect();
    (rows, kinds, session.foretold(0))
}

/// A look leaves everything as it was: with a bound that no layer meets the logits are those of a run that only scores, and
/// with one that all meet those of a run with all layers lazy.
#[test]
fn looks_leave_no_trace() {
    for (ty, n_ubatch) in [(Type::F16, 512), (Type::F16, 40), (Type::Q8_0, 512), (Type::Q8_0, 40)] {
        for layer_major in [true, false] {
            let params = SessionParams { type_k: ty, type_v: ty, n_ubatch, layer_major, ..SessionParams::default() };
            let (rows, kinds, foretold) = after_a_prompt("kl:1e-30", &params);
            let (expected, full, none) = after_a_prompt("threshold:1", &params);
            assert!(rows == expected, "{ty}, {n_ubatch}");
            assert_eq!((kinds, foretold, none), (full, Some(0.0), None));

            let (rows, kinds, foretold) = after_a_prompt("kl:1000", &params);
            let mut full = params.clone();
            full.lazy.prefill = Some(PrefillMode::Full);
            let (expected, all, _) = after_a_prompt("layers:0-2", &full);
            assert!(rows == expected, "{ty}, {n_ubatch}");
            assert_eq!(kinds, all);
            assert!(foretold.is_some_and(|kl| kl > 0.0), "{foretold:?}");
        }
    }
}

/// Layers become lazy only as far as the look allows, and a profile's order is tried where there is none of scores.
#[test]
fn looks_bound_what_becomes_lazy() {
    let n_lazy = |bound: f64| {
        let (_, kinds, foretold) = after_a_prompt(&format!("kl:{bound}"), &SessionParams::default());
        let foretold = foretold.unwrap();
        assert!(foretold <= bound, "{foretold} > {bound}");
        (kinds.iter().filter(|&&kind| kind == LayerKind::Lazy).count(), foretold)
    };
    let (all, most) = n_lazy(1000.0);
    assert_eq!(all, 3);
    let (fewer, less) = n_lazy(most * 0.99);
    assert!(fewer < 3 && less < most, "{fewer}: {less} of {most}");
}

/// `auto` leaves half of the layers active, where its bound alone would not.
#[test]
fn auto_leaves_half_of_the_layers_active() {
    let n_lazy = |policy: &str| {
        let mut session = session(policy, Type::F16);
        // Of which sink and window are all but one.
        read(&mut session, 0, 0..19);
        session.layers(0).iter().filter(|layer| layer.lazy).count()
    };
    assert_eq!((n_lazy("kl"), n_lazy("auto")), (3, 1));
}

/// A later prompt is looked at again once the sequence is twice as long, with layers that are lazy already.
#[test]
fn looks_come_again_when_a_sequence_has_doubled() {
    let mut session = session("kl:1000", Type::F16);
    // Within sink and window nothing would be dropped.
    read(&mut session, 0, 0..15);
    assert_eq!(session.foretold(0), None);
    read(&mut session, 0, 15..60);
    let first = session.foretold(0);
    assert!(first.is_some());
    assert!(session.layers(0).iter().all(|layer| layer.lazy));

    // The bound is met by nothing: what is lazy stays so, and a trace of looks would be seen.
    let run = |policy: &str| {
        let mut session = session_with(policy, SessionParams::default());
        [0..60, 60..100, 100..220, 220..221].into_iter().for_each(|tokens| read(&mut session, 0, tokens));
        session.logits().to_vec()
    };
    assert!(run("kl:1e-30") == run("threshold:1"));
}

/// Keys that four bits do not hurt become narrow, and then everything is as in a copy with such keys; where the bound
/// forbids it, everything is as it was. States have them as they are.
#[test]
fn keys_become_narrow_where_they_may() {
    let started = |policy: &str, narrow_keys: bool| {
        let lazy = LazyParams { narrow_keys, ..LazyParams::default() };
        let params = SessionParams { type_k: Type::Q8_0, type_v: Type::Q4_0, lazy, ..SessionParams::default() };
        let mut session = session_with(policy, params);
        read(&mut session, 0, 0..150);
        session
    };
    let go_on = |session: &mut Session, seq| {
        let rows = (150..160).map(|token| {
            read(session, seq, token..token + 1);
            session.logits().to_vec()
        });
        rows.collect::<Vec<_>>()
    };
    // The bound of `kl` is that of keys as well; it is larger than what four bits cost here.
    let policy = "layers:0-1";
    let (mut wide, mut narrow) = (started(policy, false), started(policy, true));
    let bytes = |session: &Session, seq| session.layers(seq).iter().map(|layer| layer.kv_bytes).collect::<Vec<_>>();
    assert!(bytes(&narrow, 0)[2] < bytes(&wide, 0)[2], "{:?} {:?}", bytes(&narrow, 0), bytes(&wide, 0));
    assert!(narrow.foretold(0).is_some_and(|kl| kl > 0.0 && kl < DEFAULT_KL), "{:?}", narrow.foretold(0));
    wide.fork_with(0, 1, &BTreeSet::new(), Some((Type::Q4_0, Type::Q4_0))).unwrap();
    let state = saved(&narrow, 0);
    let rows = go_on(&mut narrow, 0);
    assert!(rows == go_on(&mut wide, 1));
    assert!(rows != go_on(&mut wide, 0));

    assert!(wide.load_seq(2, &state).is_err());
    narrow.load_seq(2, &state).unwrap();
    assert!(rows == go_on(&mut narrow, 2));

    let (mut wide, mut kept) = (started("kl:1e-30", false), started("kl:1e-30", true));
    assert_eq!((bytes(&kept, 0), kept.foretold(0)), (bytes(&wide, 0), Some(0.0)));
    assert!(go_on(&mut kept, 0) == go_on(&mut wide, 0));
}
