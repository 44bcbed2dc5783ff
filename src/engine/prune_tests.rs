//! Pruned rows: what is kept, what later tokens make of it, and what is done with the sequences that have them.

use std::{collections::BTreeSet, ops::Range, slice};

use simlayer_testkit::{RandomModel, WeightType};
use tempfile::TempDir;

use super::{BatchEntry, Error, LayerKind, Outputs, SeqId, Session, SessionParams, layer::LayerCache, pruning};
use crate::{
    Model, ModelParams,
    ggml::Type,
    lazy::{LayerMap, LazyParams, Policy, Prune, PruneMap},
};

pub(super) const N_EMBD: usize = 64;
pub(super) const HEADS: usize = 2;

/// A model of three layers with a map beside it that does not know the last one.
pub(super) fn model() -> (Model, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let random = RandomModel {
        n_layer: 3,
        n_embd: N_EMBD,
        n_head: 4,
        n_head_kv: HEADS,
        weight_type: WeightType::F32,
        ..RandomModel::tiny()
    };
    random.write(&path);
    let model = Model::load(&path, &ModelParams::default()).unwrap();
    let mut state = 1u64;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    // Heads keep different shares.
    let mut layer = || LayerMap { weights: (0..HEADS * N_EMBD).map(|_| number()).collect(), biases: vec![-3.0, 4.0] };
    let layers = [(0, layer()), (1, layer())].into();
    let map = PruneMap { model: model.identity().clone(), bound: 0.5, kept: 0.5, layers };
    map.write(&PruneMap::path_beside(&path)).unwrap();
    (model, folder)
}

fn params(prune: Prune, policy: &str) -> SessionParams {
    let policy = policy.parse::<Policy>().unwrap();
    let lazy = LazyParams { policy, n_sink: 2, n_window: 70, n_slack: 60, ..LazyParams::default() };
    SessionParams { n_ctx: 1200, n_ubatch: 64, n_threads: 1, lazy, prune, ..SessionParams::default() }
}

pub(super) const TYPES: [(Type, Type); 3] =
    [(Type::F16, Type::F16), (Type::Q8_0, Type::Q8_0), (Type::Q4_0, Type::Q4_0)];

pub(super) fn typed((type_k, type_v): (Type, Type), params: SessionParams) -> SessionParams {
    SessionParams { type_k, type_v, ..params }
}

pub(super) fn session(model: &Model, params: SessionParams) -> Session {
    Session::new(model, params).unwrap()
}

/// Made-up tokens of these positions.
pub(super) fn text(positions: Range<usize>) -> Vec<i32> {
    positions.map(|at| 3 + ((at * 7 + at / 5) % 20) as i32).collect()
}

pub(super) fn read(session: &mut Session, seq: SeqId, positions: Range<usize>, prompt_end: bool) -> Vec<f32> {
    let tokens = text(positions);
    session.run(&[BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end }]).unwrap();
    session.logits().to_vec()
}

/// A token at a time; the logits of each.
pub(super) fn decode(session: &mut Session, seq: SeqId, positions: Range<usize>) -> Vec<Vec<f32>> {
    positions.map(|at| read(session, seq, at..at + 1, false)).collect()
}

pub(super) fn saved(session: &Session, seq: SeqId) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save_seq(seq, &mut bytes).unwrap();
    assert_eq!(bytes.len(), session.seq_state_bytes(seq));
    bytes
}

pub(super) fn caches(session: &Session) -> &[LayerCache] {
    session.internals(0).0
}

pub(super) fn far(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// As [`far`], of rows of logits.
pub(super) fn furthest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().zip(b).map(|(a, b)| far(a, b)).fold(0.0, f32::max)
}

/// Where nothing is below the bound, what was one store is lists and a store: the results are the same to rounding, whatever
/// the types, and whether a prompt is read layer by layer or piece by piece.
#[test]
fn nothing_is_lost_below_no_bound() {
    let (model, _folder) = model();
    let all = |params: SessionParams| {
        let mut session = session(&model, params);
        let mut rows: Vec<_> = [0..500, 500..540, 540..700].map(|range| read(&mut session, 0, range, true)).into();
        rows.extend(decode(&mut session, 0, 700..830));
        (rows, session.layers(0))
    };
    for layer_major in [true, false] {
        let with = |types, prune| all(typed(types, SessionParams { layer_major, ..params(prune, "off") }));
        let (whole, _) = with(TYPES[0], Prune::Off);
        for types in TYPES {
            let dense = if types == TYPES[0] { whole.clone() } else { with(types, Prune::Off).0 };
            let (pruned, layers) = with(types, Prune::Below(f32::NEG_INFINITY));
            // A last bit may be another quantised number: that is less than what quantising loses.
            let bound = if types == TYPES[0] { 2e-3 } else { furthest(&whole, &dense) };
            assert!(furthest(&dense, &pruned) < bound, "{types:?}: {} < {bound}", furthest(&dense, &pruned));
            let kinds = [LayerKind::Pruned, LayerKind::Pruned, LayerKind::Full];
            assert_eq!(layers.iter().map(|layer| layer.kind).collect::<Vec<_>>(), kinds);
            // The exact store has the sink of a quantised one.
            let sink = if types.0.is_quantized() { 2 } else { 0 };
            assert_eq!(layers.iter().map(|layer| layer.rows).collect::<Vec<_>>(), [830 - sink, 830 - sink, 830]);
        }
    }
}

/// Each head has exactly the old rows whose scores are not below the bound, and the first ones, as they were.
#[test]
fn heads_keep_what_scores_say() {
    let (model, _folder) = model();
    for types in TYPES {
        let n = 600;
        // Decides nothing, and so leaves everything as it is until the prompt is long enough.
        let mut scored = session(&model, typed(types, params(Prune::Auto, "threshold:1")));
        read(&mut scored, 0, 0..n, false);
        let mut pruned = session(&model, typed(types, params(Prune::Auto, "off")));
        read(&mut pruned, 0, 0..n, true);
        let end = n - pruning::WINDOW - pruning::BACK;
        let mut kept = Vec::new();
        for index in [0, 1] {
            let (before, after) = (&caches(&scored)[index], &caches(&pruned)[index]);
            let setup = &pruned.internals(0).1.layers[index];
            let least = &setup.pruning.as_ref().unwrap().least;
            let scores = before.scores.as_ref().unwrap().read(0..n);
            assert!(scores.iter().all(|score| score.is_finite()));
            let sink = before.exact.as_ref().map_or(0, |exact| exact.span.n_sink);
            let rows_of = |head: usize| {
                let keeps = |row: &usize| *row < pruning::SINK || scores[row * HEADS + head] >= least[head];
                (sink..end).filter(keeps).collect::<Vec<usize>>()
            };
            let mut expected: Vec<u8> = Vec::new();
            let (k, v) = (after.format.k.row_bytes(32), after.format.v.row_bytes(32));
            let mut all = Vec::new();
            before.store.as_ref().unwrap().read_rows(slice::from_ref(&(0..n)), &mut all);
            for head in 0..HEADS {
                let rows = rows_of(head);
                kept.push(rows.len());
                for (first, bytes) in [(0, k), (n * HEADS * k, v)] {
                    let of_row = |row: &usize| &all[first + (row * HEADS + head) * bytes..][..bytes];
                    expected.extend(rows.iter().flat_map(of_row));
                }
            }
            let mut found = Vec::new();
            let lists = after.pruned.as_ref().unwrap();
            lists.read(&mut found);
            assert_eq!(lists.counts().collect::<Vec<_>>(), kept[kept.len() - HEADS..]);
            assert!(found == expected, "{types:?}, layer {index}");
            let mut tail = Vec::new();
            after.store.as_ref().unwrap().read_rows(slice::from_ref(&(0..n - end)), &mut tail);
            let (keys, values) = all.split_at(n * HEADS * k);
            assert!(tail == [&keys[end * HEADS * k..], &values[end * HEADS * v..]].concat());
        }
        assert!(kept.iter().any(|&n| n < end / 3) && kept.iter().any(|&n| n > end / 2), "{kept:?}");
    }
}

/// Rows are dropped while tokens come one by one, too; the cache is what its layers are, and goes with the sequence.
#[test]
fn memory_is_freed_and_counted() {
    let (model, _folder) = model();
    for types in TYPES {
        let bytes = |prune| {
            let params = SessionParams { keep_prompt_end: false, ..typed(types, params(prune, "off")) };
            let mut session = session(&model, params);
            read(&mut session, 0, 0..100, true);
            decode(&mut session, 0, 100..900);
            let of_layers: usize = session.layers(0).iter().map(|layer| layer.kv_bytes).sum();
            assert_eq!(session.kv().allocated_bytes, of_layers);
            let rows: usize = session.layers(0)[..2].iter().map(|layer| layer.rows).sum();
            let (bytes, n_pruned) = (of_layers, session.kv().pruned_layers);
            session.clear();
            assert_eq!(session.kv().allocated_bytes, 0);
            (bytes, rows, n_pruned)
        };
        let (whole, all_rows, none) = bytes(Prune::Off);
        let (less, rows, n_pruned) = bytes(Prune::Auto);
        assert_eq!((all_rows, none, n_pruned), (1800, 0, 2));
        let (left, right) = (less as f64 / whole as f64, (rows + 900) as f64 / 2700.0);
        // The third layer is whole; scores, and room for rows to come, are what is more.
        assert!(rows < 1500 && left < right + 0.2, "{rows} rows, {left} of the bytes");
    }
}

#[test]
fn what_is_young_can_be_taken_back() {
    let (model, _folder) = model();
    for types in TYPES {
        let mut session = session(&model, typed(types, params(Prune::Auto, "off")));
        read(&mut session, 0, 0..600, true);
        decode(&mut session, 0, 600..650);
        let from = caches(&session)[0].held_from;
        assert_eq!(from, 600 - pruning::WINDOW - pruning::BACK);
        assert_eq!((session.seq_can_truncate(0, from + 127), session.seq_can_truncate(0, from + 128)), (false, true));
        assert!(!session.truncate(from + 127) && session.n_past() == 650);
        let first = decode(&mut session, 0, 650..660);
        assert!(session.truncate(650));
        let again = decode(&mut session, 0, 650..660);
        // Beside quantised stores the newest tokens are not exact any more, as without pruning.
        if types.0 == Type::F16 {
            assert!(first == again);
        }
        // Beyond a few more steps, too.
        decode(&mut session, 0, 660..800);
        assert!(!session.seq_can_truncate(0, 600) && session.seq_resumable(0) > 600);
    }
}

/// A copy shares what is left of old rows, and each is then as one that was read from bytes.
#[test]
fn copies_and_states_go_on_alike() {
    let (model, _folder) = model();
    for types in TYPES {
        let params = SessionParams { keep_prompt_end: false, ..typed(types, params(Prune::Auto, "off")) };
        let mut session = session(&model, params.clone());
        read(&mut session, 0, 0..600, true);
        let before = session.kv().allocated_bytes;
        session.fork(0, 1, &BTreeSet::new()).unwrap();
        let scores = 2 * HEADS * 256 * 4;
        assert!(session.kv().allocated_bytes <= before + scores + 1024, "{types:?}");
        assert_eq!(session.kv().f16_bytes, session.f16_bytes_of(600));
        let bytes = saved(&session, 0);
        session.load_seq(2, &bytes).unwrap();
        assert!(saved(&session, 2) == bytes && saved(&session, 1) == bytes);

        let expected = decode(&mut session, 0, 600..800);
        for seq in [1, 2] {
            assert!(decode(&mut session, seq, 600..800) == expected, "{types:?}, {seq}");
            assert!(saved(&session, seq) == saved(&session, 0));
        }
        // In one batch, too.
        let tokens = text(800..801);
        let entry = |seq| BatchEntry { seq, tokens: &tokens, outputs: Outputs::Last, prompt_end: false };
        session.run(&[entry(0), entry(1)]).unwrap();
        let (a, b) = session.logits().split_at(session.logits().len() / 2);
        assert!(far(a, b) < 1e-4);

        // Without a map what was pruned serves as well, and nothing more is.
        let mut other = super::Session::new(&model, SessionParams { prune: Prune::Off, ..params.clone() }).unwrap();
        other.load_seq(0, &bytes).unwrap();
        assert!(far(&read(&mut other, 0, 600..601, false), &expected[0]) < 1e-4);
        decode(&mut other, 0, 601..760);
        assert_eq!(caches(&other)[0].held_from, 600 - pruning::WINDOW - pruning::BACK);

        // What was saved without scores is kept whole.
        let mut dense = super::Session::new(&model, SessionParams { prune: Prune::Off, ..params.clone() }).unwrap();
        read(&mut dense, 0, 0..400, true);
        other = super::Session::new(&model, params).unwrap();
        other.load_seq(0, &saved(&dense, 0)).unwrap();
        decode(&mut other, 0, 400..500);
        let sink = if types.0.is_quantized() { 2 } else { 0 };
        let from = caches(&other)[0].held_from;
        let lists = caches(&other)[0].pruned.as_ref().unwrap();
        assert!(from > 300 && lists.counts().all(|n| n == from.min(400) - sink));
    }
}

#[test]
fn damaged_states_are_refused() {
    let (model, _folder) = model();
    let mut session = session(&model, params(Prune::Auto, "off"));
    read(&mut session, 0, 0..400, true);
    let good = saved(&session, 0);
    for at in (0..good.len()).step_by(good.len() / 300) {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        session.load_seq(1, &bad).unwrap_err();
        session.load_seq(1, &good[..at]).unwrap_err();
    }
    let mut unpruned =
        super::Session::new(&model, SessionParams { fused_attention: false, ..params(Prune::Off, "off") });
    let error = unpruned.as_mut().unwrap().load_seq(0, &good).unwrap_err().to_string();
    assert!(error.contains("pruned"), "{error}");
}

/// A checkpoint has nothing of old rows: where some were dropped since, its tokens are read anew.
#[test]
fn checkpoints_come_back() {
    let (model, _folder) = model();
    let mut session = session(&model, params(Prune::Auto, "off"));
    read(&mut session, 0, 0..600, true);
    let checkpoint = session.checkpoint(0);
    let expected = decode(&mut session, 0, 600..610);
    let restored = session.restore(0, &checkpoint).unwrap();
    assert_eq!((restored.n_past, restored.n_read, session.n_past()), (600, 0, 600));
    assert!(decode(&mut session, 0, 600..610) == expected);
    decode(&mut session, 0, 610..800);
    let restored = session.restore(0, &checkpoint).unwrap();
    assert_eq!((restored.n_past, restored.n_read), (600, 600));
    assert!(decode(&mut session, 0, 600..610) == expected);
}

/// Layers that are lazy stay lazy, the others are pruned, and a rule that decides at the prompt's end comes first.
#[test]
fn lazy_layers_are_not_pruned() {
    let (model, _folder) = model();
    let kinds = |session: &Session| session.layers(0).iter().map(|layer| layer.kind.to_string()).collect::<Vec<_>>();
    for policy in ["layers:1", "budget:0.34", "kl:1000"] {
        let mut session = session(&model, params(Prune::Auto, policy));
        read(&mut session, 0, 0..600, true);
        let found = kinds(&session);
        let lazy = found.iter().filter(|kind| *kind == "lazy").count();
        assert!(lazy > 0, "{policy}: {found:?}");
        for (index, kind) in found.iter().enumerate() {
            let expected = if index == 2 { "full" } else { "pruned" };
            assert!(kind == "lazy" || kind == expected, "{policy}: {found:?}");
        }
        assert!(policy != "layers:1" || found == ["pruned", "lazy", "full"]);
        // Another turn.
        read(&mut session, 0, 600..900, true);
        decode(&mut session, 0, 900..1000);
        assert!(kinds(&session).iter().zip(&found).all(|(now, then)| now == then || now == "lazy"), "{policy}");
    }
}

#[test]
fn what_cannot_be_pruned_is_said() {
    let (model, folder) = model();
    let error = |model: &Model, params: SessionParams| Session::new(model, params).unwrap_err();
    let ggml = SessionParams { fused_attention: false, ..params(Prune::Auto, "off") };
    let message = error(&model, ggml).to_string();
    assert!(message.contains("rows cannot be pruned") && message.contains("attention kernel"), "{message}");
    let path = folder.path().join("other.gguf");
    RandomModel { n_layer: 2, ..RandomModel::tiny() }.write(&path);
    let other = Model::load(&path, &ModelParams::default()).unwrap();
    let none = error(&other, params(Prune::Auto, "off"));
    assert!(matches!(none, Error::PruneMap(_)) && none.to_string().contains("calibrate --fit-prune"), "{none}");
}
