//! Rescued rows: which they are, what later tokens make of them, and what is done with the sequences that have them.

use std::collections::BTreeSet;

use simlayer_testkit::RandomModel;

use super::{
    BatchEntry, Error, LayerKind, Outputs, Session, SessionParams,
    layer::LayerCache,
    prune_tests::{HEADS, N_EMBD, TYPES, caches, decode, far, furthest, model, read, saved, session, text, typed},
};
use crate::{
    Model, ModelParams,
    cache::Listed,
    ggml::Type,
    lazy::{LayerMap, LazyParams, Policy, PrefillMode, Prune, PruneMap},
};

const SINK: usize = 2;
const WINDOW: usize = 70;
const SLACK: usize = 60;

/// With lazy layers' types as `typed` says them.
fn params(n_rescued: usize, policy: &str) -> SessionParams {
    let policy = policy.parse::<Policy>().unwrap();
    let types = (Some(Type::F16), Some(Type::F16));
    let lazy = LazyParams {
        policy,
        n_sink: SINK,
        n_window: WINDOW,
        n_slack: SLACK,
        n_rescued,
        type_k: types.0,
        type_v: types.1,
        ..LazyParams::default()
    };
    SessionParams { n_ctx: 1200, n_ubatch: 64, n_threads: 1, lazy, ..SessionParams::default() }
}

fn of_types(types: (Type, Type), params: SessionParams) -> SessionParams {
    let lazy = LazyParams { type_k: Some(types.0), type_v: Some(types.1), ..params.lazy.clone() };
    typed(types, SessionParams { lazy, ..params })
}

fn reading(prefill: PrefillMode, params: SessionParams) -> SessionParams {
    SessionParams { lazy: LazyParams { prefill: Some(prefill), ..params.lazy.clone() }, ..params }
}

/// The first position that is within a window of the next of `n` tokens.
fn leaves_from(n: usize) -> usize {
    n + 1 - WINDOW
}

/// Every row that leaves the window is rescued: then nothing is lost, however the prompt is read and whatever the types.
#[test]
fn nothing_is_lost_where_all_is_rescued() {
    let (model, _folder) = model();
    let all = |params: SessionParams| {
        let mut session = session(&model, params);
        let mut rows: Vec<_> = [0..400, 400..440, 440..600].map(|range| read(&mut session, 0, range, true)).into();
        rows.extend(decode(&mut session, 0, 600..680));
        (rows, session.layers(0))
    };
    let whole = all(params(0, "off")).0;
    for types in TYPES {
        let dense = all(of_types(types, params(0, "off"))).0;
        // A last bit may be another quantised number: that is less than what quantising loses.
        let bound = if types == TYPES[0] { 2e-3 } else { 1.5 * furthest(&whole, &dense) };
        for (prefill, layer_major) in
            [(PrefillMode::Full, true), (PrefillMode::Window, true), (PrefillMode::Window, false)]
        {
            let params = reading(prefill, SessionParams { layer_major, ..params(1000, "layers:0,1") });
            let (rescued, layers) = all(of_types(types, params));
            let far = furthest(&dense, &rescued);
            assert!(far < bound, "{types:?} {prefill:?} {layer_major}: {far} < {bound}");
            let kinds = [LayerKind::Lazy, LayerKind::Lazy, LayerKind::Full];
            assert_eq!(layers.iter().map(|layer| layer.kind).collect::<Vec<_>>(), kinds);
            // Those of the slack are in the ring as well.
            let rows = leaves_from(680) - SINK + SINK + WINDOW + SLACK;
            assert_eq!(layers.iter().map(|layer| layer.rows).collect::<Vec<_>>(), [rows, rows, 680]);
        }
    }
}

/// Where all rows are asked for alike the oldest stay: a lazy layer with a longer sink sees the same.
#[test]
fn rescued_rows_are_seen_as_a_sink_is() {
    let (model, folder) = model();
    let layer = || LayerMap { weights: vec![0.0; HEADS * N_EMBD], biases: vec![0.5; HEADS] };
    let layers = (0..3).map(|index| (index, layer())).collect();
    let map = PruneMap { model: model.identity().clone(), bound: 0.0, kept: 1.0, layers };
    map.write(&PruneMap::path_beside(&folder.path().join("m.gguf"))).unwrap();
    let run = |params: SessionParams| {
        let mut session = session(&model, reading(PrefillMode::Full, params));
        let mut rows = vec![read(&mut session, 0, 0..300, true)];
        rows.extend(decode(&mut session, 0, 300..400));
        rows
    };
    let rescued = run(params(40, "layers:0,1,2"));
    let longer = params(0, "layers:0,1,2");
    let longer = run(SessionParams { lazy: LazyParams { n_sink: SINK + 40, ..longer.lazy.clone() }, ..longer });
    let neither = run(params(0, "layers:0,1,2"));
    let furthest = furthest(&rescued, &longer);
    assert!(furthest < 1e-3 && far(&rescued[100], &neither[100]) > 1e-2, "{furthest}");
}

/// The rows and scores of layer 0, whose input is the tokens' alone, from a session that keeps all.
struct Whole {
    keys: Vec<u8>,
    values: Vec<u8>,
    scores: Vec<f32>,
    bytes: [usize; 2],
}

impl Whole {
    fn of(model: &Model, n: usize) -> Whole {
        // Decides nothing, and so leaves everything as it is until the prompt is long enough.
        let mut scored = session(model, SessionParams { prune: Prune::Auto, ..params(0, "threshold:1") });
        read(&mut scored, 0, 0..n, false);
        let layer = &caches(&scored)[0];
        let (rows, scores) = layer.rows(0..n);
        // Keys are as long as values.
        let bytes = [rows.len() / n / HEADS / 2; 2];
        let (keys, values) = rows.split_at(n * HEADS * bytes[0]);
        Whole { keys: keys.to_vec(), values: values.to_vec(), scores, bytes }
    }

    /// Whether what a layer had rescued when the row of this position was the next to leave are, of each head, the `most` rows
    /// with the highest scores.
    fn is_best(&self, layer: &LayerCache, position: usize, most: usize) -> bool {
        let Listed { scores, rows } = layer.listed_at(position).unwrap();
        let part =
            |all: &[u8], row: usize, head: usize, bytes: usize| all[(row * HEADS + head) * bytes..][..bytes].to_vec();
        let mut rest = &rows[..];
        let is_best = |(head, found): (usize, &Vec<f32>)| {
            let (keys, others) = rest.split_at(found.len() * self.bytes[0]);
            let (values, others) = others.split_at(found.len() * self.bytes[1]);
            rest = others;
            let score = |row: usize| self.scores[row * HEADS + head];
            // Tokens that come again have equal scores in the first layer.
            let row =
                |row: usize| [part(&self.keys, row, head, self.bytes[0]), part(&self.values, row, head, self.bytes[1])];
            let found_rows = keys.chunks(self.bytes[0]).zip(values.chunks(self.bytes[1]));
            let are_rows = found_rows
                .zip(found)
                .all(|((key, value), &found)| (SINK..position).any(|at| score(at) == found && row(at) == [key, value]));
            let mut best: Vec<f32> = (SINK..position).map(score).collect();
            best.sort_by(|a, b| b.total_cmp(a));
            best.truncate(most);
            let mut found = found.clone();
            found.sort_by(|a, b| b.total_cmp(a));
            let mut rows: Vec<_> = keys.chunks(self.bytes[0]).collect();
            rows.sort_unstable();
            rows.dedup();
            are_rows && found == best && rows.len() == found.len()
        };
        scores.iter().enumerate().all(is_best)
    }
}

/// Each head has the rows that are scored highest of all that have left the window, as they were: at a prompt's end, in pieces
/// while it is read, and token by token.
#[test]
fn the_best_scored_rows_are_kept() {
    let (model, _folder) = model();
    let whole = Whole::of(&model, 500);
    for (prefill, layer_major) in [
        (PrefillMode::Full, true),
        (PrefillMode::Full, false),
        (PrefillMode::Window, true),
        (PrefillMode::Window, false),
    ] {
        let params = SessionParams { layer_major, ..params(50, "layers:0,1") };
        let mut session = session(&model, reading(prefill, params));
        read(&mut session, 0, 0..300, true);
        let check = |session: &Session, n: usize| {
            let layer = &caches(session)[0];
            for position in [leaves_from(n), layer.held_from.max(SINK)] {
                assert!(whole.is_best(layer, position, 50), "{prefill:?} {layer_major}, {n} tokens, before {position}");
            }
        };
        check(&session, 300);
        read(&mut session, 0, 300..310, false);
        check(&session, 310);
        read(&mut session, 0, 310..420, true);
        check(&session, 420);
        decode(&mut session, 0, 420..500);
        check(&session, 500);
    }
}

/// Memory is what the layers say, does not grow with the text, and goes with the sequence.
#[test]
fn memory_is_fixed_and_counted() {
    let (model, _folder) = model();
    for types in TYPES {
        let params = SessionParams { keep_prompt_end: false, ..of_types(types, params(64, "layers:0,1")) };
        let mut session = session(&model, params.clone());
        let mut without = super::Session::new(
            &model,
            SessionParams { lazy: LazyParams { n_rescued: 0, ..params.lazy.clone() }, ..params },
        )
        .unwrap();
        let of_layers = |session: &Session| session.layers(0)[..2].iter().map(|layer| layer.kv_bytes).sum::<usize>();
        let mut seen = Vec::new();
        for range in [0..400, 400..700, 700..900] {
            read(&mut session, 0, range.clone(), true);
            read(&mut without, 0, range, true);
            let all: usize = session.layers(0).iter().map(|layer| layer.kv_bytes).sum();
            assert_eq!(session.kv().allocated_bytes, all);
            seen.push(of_layers(&session));
            let setup = &session.internals(0).1.layers[0];
            let row = setup.plan.rows.row_bytes(caches(&session)[0].format);
            // 64 rows and their scores; the ring's scores, and what can be taken back, with room.
            let (more, at_least) = (of_layers(&session) - of_layers(&without), 2 * 64 * row);
            let scores = 2 * HEADS * 4 * (64 + 192);
            let undo = 2 * 2 * SLACK * (row + HEADS * 64);
            assert!((at_least..=at_least + scores + undo).contains(&more), "{types:?}: {more}");
        }
        assert!(seen[2] < seen[0] + 4 * SLACK * 512, "{seen:?}");
        session.clear();
        assert_eq!(session.kv().allocated_bytes, 0);
    }
}

/// As far as the ring goes back what was given up for newer rows comes back, and what comes again is as it was.
#[test]
fn what_is_young_can_be_taken_back() {
    let (model, _folder) = model();
    for types in TYPES {
        let mut session = session(&model, of_types(types, params(40, "layers:0,1")));
        read(&mut session, 0, 0..400, true);
        let first = decode(&mut session, 0, 400..450);
        let listed = |session: &Session, n: usize| caches(session)[0].listed_at(leaves_from(n)).unwrap();
        let before = listed(&session, 410);
        assert!(before != listed(&session, 450));
        assert!(session.truncate(410) && session.n_past() == 410);
        let again = decode(&mut session, 0, 410..450);
        assert_eq!(listed(&session, 410), before);
        // Beside quantised stores the newest tokens are not exact any more, as without rescued rows.
        if types.0 == Type::F16 {
            assert!(first[10..] == again);
        }
        assert!(!session.seq_can_truncate(0, 450 - SLACK - 2) || types.0 != Type::F16);
    }
}

/// A long answer is taken back to the prompt's end, and so is a checkpoint's.
#[test]
fn prompts_ends_and_checkpoints_come_back() {
    let (model, _folder) = model();
    for types in TYPES {
        let mut session = session(&model, of_types(types, params(40, "layers:0,1")));
        read(&mut session, 0, 0..400, true);
        let checkpoint = session.checkpoint(0);
        let expected = decode(&mut session, 0, 400..600);
        assert!(session.truncate(400));
        assert!(decode(&mut session, 0, 400..600) == expected, "{types:?}");
        let restored = session.restore(0, &checkpoint).unwrap();
        assert_eq!((restored.n_past, restored.n_read), (400, 0));
        assert!(decode(&mut session, 0, 400..600) == expected, "{types:?}");
        // Another turn, and back to its end.
        read(&mut session, 0, 600..700, true);
        let expected = decode(&mut session, 0, 700..850);
        assert!(session.truncate(700));
        assert!(decode(&mut session, 0, 700..850) == expected, "{types:?}");
    }
}

/// A copy shares what is rescued, and each is then as one that was read from bytes.
#[test]
fn copies_and_states_go_on_alike() {
    let (model, _folder) = model();
    for types in TYPES {
        let params = SessionParams { keep_prompt_end: false, ..of_types(types, params(64, "layers:0,1")) };
        let mut session = session(&model, params.clone());
        read(&mut session, 0, 0..400, true);
        decode(&mut session, 0, 400..420);
        let before = session.kv().allocated_bytes;
        session.fork(0, 1, &BTreeSet::new()).unwrap();
        let added = session.kv().allocated_bytes - before;
        let own = |layer: &LayerCache| {
            let beside = layer.rescued.as_ref().map_or(0, |rescued| rescued.bytes() - rescued.lists().bytes());
            beside + layer.scores.as_ref().map_or(0, |scores| scores.bytes())
        };
        assert_eq!(added, caches_of(&session, 1).iter().map(own).sum::<usize>());
        let bytes = saved(&session, 0);
        assert_eq!(bytes[8..12], 7u32.to_le_bytes());
        session.load_seq(2, &bytes).unwrap();
        assert!(saved(&session, 2) == bytes && saved(&session, 1) == bytes);

        let expected = decode(&mut session, 0, 420..600);
        for seq in [1, 2] {
            assert!(decode(&mut session, seq, 420..600) == expected, "{types:?}, {seq}");
            assert!(saved(&session, seq) == saved(&session, 0));
        }
        // What was read from bytes can be cut as far as what was saved.
        session.load_seq(2, &bytes).unwrap();
        session.load_seq(3, &bytes).unwrap();
        decode(&mut session, 2, 420..440);
        for seq in [2, 3] {
            assert!(session.seq_truncate(seq, 410));
        }
        let [a, b] = [2, 3].map(|seq| {
            let logits = decode(&mut session, seq, 410..500);
            (logits, caches_of(&session, seq)[0].listed_at(leaves_from(420)).unwrap())
        });
        // Beside quantised stores the newest tokens of one are not exact any more.
        assert!(a.1 == b.1 && (types.0 != Type::F16 || a.0 == b.0), "{types:?}");
        // In one batch, too.
        let tokens = text(600..601);
        let entry = |seq| BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end: false };
        session.run(&[entry(0), entry(1)]).unwrap();
        let (a, b) = session.logits().split_at(session.logits().len() / 2);
        assert!(far(a, b) < 1e-4);

        // Without a map what was rescued serves as well, and nothing more is.
        let lazy = LazyParams { n_rescued: 0, ..params.lazy.clone() };
        let mut other = super::Session::new(&model, SessionParams { lazy, ..params.clone() }).unwrap();
        other.load_seq(0, &bytes).unwrap();
        assert!(far(&read(&mut other, 0, 420..421, false), &expected[0]) < 1e-4);
        let listed = caches(&other)[0].listed_at(leaves_from(421)).unwrap();
        decode(&mut other, 0, 421..600);
        assert_eq!(caches(&other)[0].listed_at(leaves_from(600)).unwrap(), listed);

        // A lazy layer that was saved without rescued rows stays so.
        let lazy = LazyParams { n_rescued: 0, ..params.lazy.clone() };
        let mut plain = super::Session::new(&model, SessionParams { lazy, ..params.clone() }).unwrap();
        read(&mut plain, 0, 0..400, true);
        let bytes = saved(&plain, 0);
        assert_eq!(bytes[8..12], 5u32.to_le_bytes());
        session.load_seq(2, &bytes).unwrap();
        assert!(decode(&mut session, 2, 400..500) == decode(&mut plain, 0, 400..500));
    }
}

fn caches_of(session: &Session, seq: u32) -> &[LayerCache] {
    session.internals(seq).0
}

#[test]
fn damaged_states_are_refused() {
    let (model, _folder) = model();
    let mut session = session(&model, params(40, "layers:0,1"));
    read(&mut session, 0, 0..400, true);
    let good = saved(&session, 0);
    for at in (0..good.len()).step_by(good.len() / 300) {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        session.load_seq(1, &bad).unwrap_err();
        session.load_seq(1, &good[..at]).unwrap_err();
    }
    let plain = |params: SessionParams| {
        super::Session::new(&model, params).unwrap().load_seq(0, &good).unwrap_err().to_string()
    };
    let error = plain(SessionParams { fused_attention: false, ..params(0, "off") });
    assert!(error.contains("pruned"), "{error}");
    let error = plain(SessionParams { n_ubatch: 512, ..params(0, "off") });
    assert!(error.contains("-ub 130"), "{error}");
}

/// Whatever rule finds the lazy layers, by scores or by looks, and in later turns, they rescue rows; the others may be pruned.
#[test]
fn rules_and_pruning_go_together() {
    let (model, folder) = model();
    let path = PruneMap::path_beside(&folder.path().join("m.gguf"));
    let mut map = PruneMap::read(&path).unwrap();
    map.layers.insert(2, map.layers[&1].clone());
    map.write(&path).unwrap();
    for policy in ["budget:0.5", "output:0.5", "kl:1000", "layers:1"] {
        for prune in [Prune::Off, Prune::Auto] {
            for prefill in [PrefillMode::Full, PrefillMode::Window] {
                let params = reading(prefill, SessionParams { prune, ..params(40, policy) });
                let mut session = session(&model, params);
                read(&mut session, 0, 0..300, true);
                read(&mut session, 0, 300..600, true);
                decode(&mut session, 0, 600..650);
                read(&mut session, 0, 650..800, true);
                let layers = session.layers(0);
                let lazy: Vec<_> = layers.iter().filter(|layer| layer.lazy).collect();
                let rows = SINK + WINDOW + SLACK + 40;
                assert!(!lazy.is_empty() && lazy.iter().all(|layer| layer.rows == rows), "{policy}: {layers:?}");
                let mut others = layers.iter().filter(|layer| !layer.lazy);
                let kind = if prune == Prune::Off { LayerKind::Full } else { LayerKind::Pruned };
                assert!(others.all(|layer| layer.kind == kind), "{policy} {prune}: {layers:?}");
            }
        }
    }
}

#[test]
fn where_rows_cannot_be_rescued_is_said() {
    let (model, folder) = model();
    let error = |model: &Model, params: SessionParams| Session::new(model, params).unwrap_err();
    for (params, part) in [
        (SessionParams { fused_attention: false, ..params(40, "layers:0") }, "attention kernel"),
        (of_types((Type::KVARN4, Type::KVARN4), params(40, "layers:0")), "tiles"),
        // The map does not have the last layer.
        (params(40, "layers:2"), "layer 2"),
        (params(40, "budget:0.5"), "layer 2"),
    ] {
        let message = error(&model, params).to_string();
        assert!(message.contains("rows cannot be rescued") && message.contains(part), "{message}");
    }
    let path = folder.path().join("other.gguf");
    RandomModel { n_layer: 2, ..RandomModel::tiny() }.write(&path);
    let other = Model::load(&path, &ModelParams::default()).unwrap();
    let none = error(&other, params(40, "layers:0"));
    assert!(matches!(none, Error::PruneMap(_)) && none.to_string().contains("calibrate --fit-prune"), "{none}");
    // No layer is lazy.
    Session::new(&other, params(40, "off")).unwrap();
}

/// A ubatch is no longer than a ring: what it overwrites competes before it is gone.
#[test]
fn short_rings_are_written_in_short_ubatches() {
    let (model, _folder) = model();
    let mut params = params(30, "layers:0,1");
    (params.n_ubatch, params.lazy.n_window, params.lazy.n_slack) = (512, 20, 0);
    let whole = Whole::of(&model, 300);
    for layer_major in [true, false] {
        let mut session = session(&model, SessionParams { layer_major, ..params.clone() });
        assert_eq!(session.internals(0).1.params.n_ubatch, 20);
        read(&mut session, 0, 0..300, true);
        assert!(whole.is_best(&caches(&session)[0], 281, 30), "{layer_major}");
    }
}
