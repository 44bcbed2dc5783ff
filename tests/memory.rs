//! What the cache is said to take against the process's resident memory. A process of its own: other tests would
//! allocate meanwhile.

mod common;

use std::{path::Path, slice, sync::Mutex};

use common::{load, on_another_device, plain, session, smollm2, story};
use simlayer::{
    BatchEntry, Model, Outputs, Session, SessionParams,
    ggml::Type,
    lazy::{Policy, Prune, PruneMap},
    quality::{PRUNING_TEXTS, Repeated, fit_pruning},
};
use simlayer_testkit::smollm2_path;

/// One test after the other: each would count what the other takes.
static ALONE: Mutex<()> = Mutex::new(());

/// Resident memory that is not of files: how much of a mapped model is resident is the system's to decide.
fn resident() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()? * 1024)
}

/// A session that has worked before: what it computes in is allocated already.
fn warm(model: &Model, params: SessionParams) -> Session {
    let mut session = session(model, params);
    session.prefill(&story(model, 1_100)).expect("prefill");
    session.clear();
    session
}

/// Growth of resident memory and the report, with `n` tokens in the cache. What longer graphs need for their
/// intermediate results stays with the session and is not counted.
fn grown(model: &Model, params: SessionParams, n: usize) -> (i64, i64, simlayer::KvReport) {
    let mut session = warm(model, params);
    let (before, computing) = (resident().expect("a figure"), session.compute_bytes());
    session.prefill(&story(model, n)).expect("prefill");
    let kv = session.kv();
    let computing = (session.compute_bytes() - computing) as i64;
    let grown = resident().expect("a figure") - before - computing;
    session.clear();
    let left = resident().expect("a figure") - before - computing;
    println!("{} bytes allocated, {grown} resident; {left} after clearing; {computing} computing", kv.allocated_bytes);
    (grown, left, kv)
}

/// Resident memory of a prompt of 6,000 tokens, of eight copies with it, and once each of these has 64 tokens of its own;
/// without what is computed in. And what is reported at last.
fn forked(model: &Model, params: SessionParams) -> [i64; 4] {
    const N: u32 = 8;
    let mut session = warm(model, params);
    let text = story(model, 6_000 + 64);
    let decode = |session: &mut Session, token| {
        let entry = |seq| BatchEntry { seq, tokens: slice::from_ref(token), outputs: Outputs::Last, prompt_end: false };
        session.run(&(0..N).map(entry).collect::<Vec<_>>()).expect("a token in each");
    };
    decode(&mut session, &text[0]);
    session.clear();
    // Intermediate results and the last graph go with a sequence, also with one that there is not.
    let taken = |session: &mut Session| {
        session.seq_clear(99);
        resident().expect("a figure") - session.compute_bytes() as i64
    };
    let start = taken(&mut session);
    session.prefill(&text[..6_000]).expect("prefill");
    let (one, f16_bytes) = (taken(&mut session) - start, session.kv().f16_bytes);
    for seq in 1..N {
        session.sequence(0).copy_to(seq).expect("a copy");
    }
    let (copies, kv) = (taken(&mut session) - start, session.kv());
    assert_eq!(kv.f16_bytes, f16_bytes, "what is shared is counted once");
    assert_eq!(kv.context_tokens, N as usize * 6_000);
    for token in &text[6_000..] {
        decode(&mut session, token);
    }
    let (grown, reported) = (taken(&mut session) - start, session.kv().allocated_bytes as i64);
    println!("{one} bytes resident, {copies} with the copies, {grown} with 64 tokens in each, {reported} reported");
    assert!((grown - reported).abs() < reported / 20 + (4 << 20), "{grown} resident, {reported} reported");
    [one, copies, grown, reported]
}

/// Full, and with half of the layers lazy.
#[test]
fn copies_take_the_prompt_once() {
    if resident().is_none() {
        return;
    }
    let _alone = ALONE.lock();
    let model = smollm2();
    let mut lazy = plain();
    lazy.lazy.policy = "budget:0.5".parse().expect("a policy");
    for params in [plain(), lazy] {
        let is_full = params.lazy.policy == Policy::Off;
        let [one, copies, grown, reported] = forked(&model, params).map(|bytes| bytes as f64);
        assert!(copies <= 1.15 * one, "{copies} of {one}");
        // Of small caches it counts that ggml's allocator notes each node of the graph, of which eight sequences in pieces have
        // 8,700: 1.32 of it is resident with half of the layers lazy.
        let grown = if is_full { grown } else { reported };
        assert!(grown <= 1.3 * one, "{grown} of {one}");
    }
}

/// Full, and all in four bits, in rows and in tiles, with half of the layers lazy.
#[test]
fn resident_memory_is_what_the_report_says() {
    if resident().is_none() {
        println!("resident memory cannot be read on this system");
        return;
    }
    let _alone = ALONE.lock();
    let model = smollm2();
    let full = grown(&model, plain(), 8_000);
    let mut params = plain();
    params.lazy.policy = "budget:0.5".parse().expect("a policy");
    (params.type_k, params.type_v) = (Type::Q4_0, Type::Q4_0);
    // In tiles, active and lazy.
    let mut tiles = params.clone();
    (tiles.type_k, tiles.type_v) = (Type::KVARN4, Type::KVARN4);
    (tiles.lazy.type_k, tiles.lazy.type_v) = (Some(Type::KVARN4), Some(Type::KVARN4));
    let tiles = grown(&model, tiles, 5_000);
    // With what an answer that is taken back needs, and stores alone.
    let kept = grown(&model, params.clone(), 5_000);
    (params.lazy.n_slack, params.keep_prompt_end) = (0, false);
    let small = grown(&model, params, 8_000);
    for (resident, left, kv) in [&full, &tiles, &kept, &small] {
        assert!(*left < 4 << 20, "{left} bytes stay resident behind a cleared session");
        let allocated = kv.allocated_bytes as i64;
        assert!((resident - allocated).abs() < allocated / 20 + (4 << 20), "{resident} resident, {allocated} reported");
    }
    assert!(small.2.compression >= 6.0, "{:?}", small.2);
    let reported = (full.2.allocated_bytes - small.2.allocated_bytes) as f64;
    assert!((full.0 - small.0) as f64 > 0.85 * reported, "{} falls to {}; {reported} reported", full.0, small.0);
}

/// A model with a map beside it, by which rows are pruned and rescued: fitted on one short piece, since how good it is does
/// not matter.
fn smollm2_with_a_map(folder: &Path) -> Model {
    let path = folder.join("smollm2.gguf");
    std::fs::copy(smollm2_path(), &path).expect("a copy");
    let model = load(&path);
    let texts = [PRUNING_TEXTS[0].as_bytes()];
    let pieces = Repeated::pieces(model.vocab(), &texts, 400, 1).expect("pieces");
    let (map, _) = fit_pruning(&model, &plain(), &pieces, &mut |_| {}).expect("a map");
    map.write(&PruneMap::path_beside(&path)).expect("written");
    model
}

/// Rows that are dropped are memory that is free, and rows that are rescued memory that is reported.
#[test]
fn pruned_and_rescued_rows_take_what_the_report_says() {
    if resident().is_none() || on_another_device() {
        return;
    }
    let _alone = ALONE.lock();
    let folder = tempfile::tempdir().expect("a folder");
    let model = smollm2_with_a_map(folder.path());
    let mut pruned = plain();
    pruned.prune = Prune::Auto;
    let mut rescued = plain();
    rescued.lazy.policy = "layers:0-19".parse().expect("a policy");
    (rescued.lazy.n_window, rescued.lazy.n_rescued) = (768, 256);
    // Both at once, in four bits.
    let mut both = rescued.clone();
    (both.prune, both.type_k, both.type_v) = (Prune::Auto, Type::Q4_0, Type::Q4_0);
    for params in [pruned, rescued, both] {
        let (resident, left, kv) = grown(&model, params, 5_000);
        assert!(left < 4 << 20, "{left} bytes stay resident behind a cleared session");
        let allocated = kv.allocated_bytes as i64;
        assert!((resident - allocated).abs() < allocated / 20 + (4 << 20), "{resident} resident, {allocated} reported");
        assert!(kv.compression > 1.2, "{kv:?}");
    }
}
