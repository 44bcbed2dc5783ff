//! Looks before dropping in steps: bit for bit the same whatever other sequences do meanwhile, the same layers as in one
//! piece, and in a defined state whatever becomes of the sequence.

use simlayer_testkit::RandomModel;

use super::{BatchEntry, Outputs, SeqId, Session, SessionParams};
use crate::{
    Model, ModelParams,
    ggml::Type,
    lazy::{LazyParams, Policy},
};

/// With sinks and windows so short that prompts of these tests are longer, and rings that the probe goes round.
fn session(policy: &str, narrow_keys: bool, look_in_steps: bool) -> Session {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    RandomModel { n_layer: 3, ..RandomModel::tiny() }.write(&path);
    let model = Model::load(&path, &ModelParams::default()).unwrap();
    let policy = policy.parse::<Policy>().unwrap();
    let lazy = LazyParams { policy, n_sink: 2, n_window: 16, narrow_keys, ..LazyParams::default() };
    let (type_k, type_v) = if narrow_keys { (Type::Q8_0, Type::Q4_0) } else { (Type::F16, Type::F16) };
    let params =
        SessionParams { n_ctx: 400, n_threads: 1, type_k, type_v, lazy, look_in_steps, ..SessionParams::default() };
    Session::new(&model, params).unwrap()
}

fn read(session: &mut Session, seq: SeqId, positions: std::ops::Range<i32>) -> Vec<f32> {
    let tokens: Vec<i32> = positions.map(|token| 3 + (token * 7 + token / 5 + seq as i32) % 20).collect();
    let entry = BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end: tokens.len() > 1 };
    session.run(&[entry]).unwrap();
    session.logits().to_vec()
}

fn saved(session: &Session, seq: SeqId) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save_seq(seq, &mut bytes).unwrap();
    bytes
}

/// Steps of the look, between which a token of another sequence is read.
fn look(session: &mut Session, other: SeqId) -> usize {
    let mut steps = 1;
    while session.look_step(0, 48).unwrap() {
        let at = session.seq_n_past(other) as i32;
        read(session, other, at..at + 1);
        steps += 1;
    }
    steps
}

/// The whole look, with nothing between its steps. It takes no more memory than it says, but for what buffers are rounded to.
fn finish(session: &mut Session) {
    let most = session.kv().allocated_bytes + session.look_bytes_of(session.seq_n_past(0)) + 4096;
    while session.look_step(0, 48).unwrap() {
        assert!(session.kv().allocated_bytes <= most, "{} bytes, at most {most}", session.kv().allocated_bytes);
    }
}

const POLICIES: [(&str, bool); 6] = [
    ("kl:1000", false),
    ("kl:1e-30", false),
    ("kl:1000", true),
    ("kl:0.001", true),
    ("auto", true),
    ("layers:1", true),
];

#[test]
fn steps_find_the_same_whatever_is_between() {
    for (policy, narrow_keys) in POLICIES {
        let [mut whole, mut stepped] = [(); 2].map(|()| session(policy, narrow_keys, true));
        let mut n = 0;
        // The second prompt is not looked at, the third one is; its answer goes round the rings.
        for end in [120, 150, 330] {
            let expected = read(&mut whole, 0, n..end);
            finish(&mut whole);
            assert_eq!(read(&mut stepped, 0, n..end), expected, "{policy}");
            assert!(end != 150 || !stepped.is_looking(0), "{policy}");
            if end == 120 {
                assert!(stepped.is_looking(0), "{policy}");
                read(&mut stepped, 5, 0..30);
            }
            let other = stepped.seq_n_past(5);
            let steps = look(&mut stepped, 5);
            assert!(!stepped.is_looking(0));
            assert_eq!(stepped.seq_n_past(5), other + steps - 1);
            assert!(saved(&stepped, 0) == saved(&whole, 0), "{policy}, {end}");
            assert_eq!((stepped.foretold(0), stepped.layers(0)), (whole.foretold(0), whole.layers(0)), "{policy}");
            n = end;
        }
        // The answer, and once more from the prompt's end.
        for _ in 0..2 {
            for at in n..n + 30 {
                assert_eq!(read(&mut stepped, 0, at..at + 1), read(&mut whole, 0, at..at + 1), "{policy}, {at}");
            }
            assert!(saved(&stepped, 0) == saved(&whole, 0), "{policy}");
            assert_eq!(stepped.truncate(n as usize), whole.truncate(n as usize), "{policy}");
        }
    }
}

/// A probe in pieces finds what it finds whole, but for what rounding does.
#[test]
fn steps_find_what_one_piece_finds() {
    for (policy, narrow_keys) in POLICIES.into_iter().filter(|(policy, _)| !matches!(*policy, "kl:0.001" | "auto")) {
        let mut whole = session(policy, narrow_keys, false);
        let logits = read(&mut whole, 0, 0..150);
        assert!(!whole.is_looking(0), "{policy}");
        let mut n_steps = [usize::MAX, 48, 9].map(|n_tokens| {
            let mut stepped = session(policy, narrow_keys, true);
            assert_eq!(read(&mut stepped, 0, 0..150), logits, "{policy}");
            assert!(stepped.is_looking(0), "{policy}");
            let mut n_steps = 1;
            while stepped.look_step(0, n_tokens).unwrap() {
                n_steps += 1;
            }
            let lazy = |session: &Session| -> Vec<bool> { session.layers(0).iter().map(|layer| layer.lazy).collect() };
            assert_eq!(lazy(&stepped), lazy(&whole), "{policy}");
            let [found, expected] = [&stepped, &whole].map(|session| session.foretold(0).unwrap_or(0.0));
            assert!((found - expected).abs() <= 0.02 * expected, "{policy}: {found}, {expected}");
            n_steps
        });
        // The fewer tokens at once, the more steps; never more tokens than a short piece has.
        n_steps.sort_unstable();
        assert!(n_steps[0] == n_steps[1] && n_steps[1] < n_steps[2], "{policy}: {n_steps:?}");
    }
}

/// The other sequence's tokens are those that it has alone.
#[test]
fn looks_leave_others_alone() {
    let (mut alone, mut beside) = (session("kl:1000", true, true), session("kl:1000", true, true));
    for session in [&mut alone, &mut beside] {
        read(session, 5, 0..20);
        session.stop_look(5);
    }
    read(&mut beside, 0, 0..200);
    assert!(look(&mut beside, 5) > 2);
    (20..beside.seq_n_past(5) as i32).for_each(|at| drop(read(&mut alone, 5, at..at + 1)));
    assert!(saved(&alone, 5) == saved(&beside, 5));
}

/// Tokens that come while a sequence is looked at wait for the rest of it.
#[test]
fn what_is_appended_waits_for_the_look() {
    for steps in 0..3 {
        let [mut whole, mut stepped] = [(); 2].map(|()| session("kl:1000", true, true));
        for session in [&mut whole, &mut stepped] {
            read(session, 0, 0..200);
        }
        finish(&mut whole);
        (0..steps).for_each(|_| assert!(stepped.look_step(0, 48).unwrap()));
        assert_eq!(read(&mut stepped, 0, 200..201), read(&mut whole, 0, 200..201));
        assert!(!stepped.is_looking(0) && saved(&stepped, 0) == saved(&whole, 0));
    }
}

/// Copies and states of a sequence that is looked at are as it is, and are not looked at; it can be cut, given up and cleared.
#[test]
fn what_is_looked_at_can_be_copied_saved_cut_and_cleared() {
    for steps in 0..4 {
        let begun = || {
            let mut session = session("kl:1000", true, true);
            read(&mut session, 0, 0..200);
            (0..steps).for_each(|_| assert!(session.look_step(0, 48).unwrap()));
            session
        };
        let mut session = begun();
        let before = saved(&session, 0);
        assert!(session.seq_copy(0, 1, 200).unwrap());
        session.load_seq(2, &before).unwrap();
        assert!(session.is_looking(0) && !session.is_looking(1) && !session.is_looking(2));
        assert!(saved(&session, 1) == before && saved(&session, 2) == before, "{steps}");
        // Copies go on as they are.
        let rows = [1, 2].map(|seq| {
            let tokens = [7];
            let entry = BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end: false };
            session.run(&[entry]).unwrap();
            session.logits().to_vec()
        });
        assert_eq!(rows[0], rows[1], "{steps}");
        assert!(saved(&session, 0) == before);
        finish(&mut session);
        let mut alone = begun();
        finish(&mut alone);
        assert!(saved(&session, 0) == saved(&alone, 0), "{steps}");

        // Given up: the next prompt's end is looked at.
        let mut session = begun();
        session.stop_look(0);
        assert!(!session.is_looking(0) && !session.look_step(0, 48).unwrap());
        assert!(saved(&session, 0) == before && session.foretold(0).is_none());
        read(&mut session, 0, 200..230);
        assert!(session.is_looking(0));
        assert!(session.truncate(229) && !session.is_looking(0));
        session.seq_clear(0);
        assert!(!session.look_step(0, 48).unwrap() && session.seq_n_past(0) == 0);
        let mut session = begun();
        session.seq_clear(0);
        read(&mut session, 0, 0..200);
        finish(&mut session);
        assert!(saved(&session, 0) == saved(&alone, 0), "{steps}");
    }
}

/// A state says when its sequence was looked at; one of before looks were part of states can still be read.
#[test]
fn states_know_of_looks() {
    use super::state::{CHECKSUM_BYTES, HEADER_BYTES};
    use xxhash_rust::xxh3::xxh3_64;

    let mut session = session("kl:1000", false, false);
    read(&mut session, 0, 0..200);
    let state = saved(&session, 0);
    session.load_seq(1, &state).unwrap();
    assert!(session.foretold(0).is_some());
    assert_eq!(session.foretold(1), session.foretold(0));

    // What stands before it: the flag of its kind, the model, its sizes, where the sequence is.
    let architecture = u32::from_le_bytes(state[HEADER_BYTES + 1 + 32..][..4].try_into().unwrap()) as usize;
    let at = HEADER_BYTES + 1 + 32 + 4 + architecture + 4 * 4 + 8 + 8 + 1 + 8 + 8;
    assert_eq!(state[at..at + 8], 200u64.to_le_bytes());
    let mut old = [&state[..at], &state[at + 16..state.len() - CHECKSUM_BYTES]].concat();
    let length = (old.len() + CHECKSUM_BYTES) as u64;
    old[8..12].copy_from_slice(&3u32.to_le_bytes());
    old[12..20].copy_from_slice(&length.to_le_bytes());
    old.extend(xxh3_64(&old).to_le_bytes());
    session.load_seq(2, &old).unwrap();
    assert_eq!(session.foretold(2), None);
    assert_eq!(read(&mut session, 2, 200..201).len(), read(&mut session, 1, 200..201).len());
}
