//! What the cache is said to take against the process's resident memory. A process of its own: other tests would
//! allocate meanwhile.

mod common;

use common::{plain, session, smollm2, story};
use simlayer::{Session, SessionParams, ggml::Type};

/// Resident memory that is not of files: how much of a mapped model is resident is the system's to decide.
fn resident() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()? * 1024)
}

/// A session that has worked before: what it computes in is allocated already.
fn warm(model: &simlayer::Model, params: SessionParams) -> Session {
    let mut session = session(model, params);
    session.prefill(&story(model, 1_100)).expect("prefill");
    session.clear();
    session
}

/// Resident memory and the report, of 8,000 tokens in the cache less none.
fn grown(model: &simlayer::Model, params: SessionParams) -> (i64, simlayer::KvReport) {
    let mut session = warm(model, params);
    let before = resident().expect("a figure");
    session.prefill(&story(model, 8_000)).expect("prefill");
    let kv = session.kv();
    let grown = resident().expect("a figure") - before;
    session.clear();
    let left = resident().expect("a figure") - before;
    println!("{} bytes allocated, {grown} resident; {left} after clearing", kv.allocated_bytes);
    // What longer graphs need for their intermediate results stays with the session.
    assert!(left < 16 << 20, "{left} bytes stay resident behind a cleared session");
    (grown, kv)
}

#[test]
fn resident_memory_is_what_the_report_says_and_shrinks_with_it() {
    if resident().is_none() {
        println!("resident memory cannot be read on this system");
        return;
    }
    let model = smollm2();
    let (full, full_kv) = grown(&model, plain());
    let mut params = plain();
    params.lazy.policy = "budget:0.5".parse().expect("a policy");
    (params.type_k, params.type_v) = (Type::Q4_0, Type::Q4_0);
    let (small, small_kv) = grown(&model, params);
    assert!(small_kv.compression >= 6.0, "{small_kv:?}");
    for (resident, kv) in [(full, full_kv), (small, small_kv)] {
        let allocated = kv.allocated_bytes as i64;
        // Pages that stay with the allocator, and the intermediate results of larger graphs.
        let slack = allocated / 20 + (6 << 20);
        assert!((resident - allocated).abs() < slack, "{resident} bytes resident, {allocated} reported");
    }
}
