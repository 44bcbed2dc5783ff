//! What a run took, for people and for programs.

use std::time::Duration;

use indicatif::HumanBytes;
use serde_json::{Value, json};
use simlayer::KvReport;

use crate::stream::Timings;

/// `timings` as the JSON output has it.
pub fn timings_json(load: Duration, timings: &Timings) -> Value {
    json!({
        "load_ms": milliseconds(load),
        "prefill_ms": milliseconds(timings.prefill),
        "decode_ms": milliseconds(timings.decode),
        "prefill_tokens_per_second": rate(timings.prefilled, timings.prefill),
        "decode_tokens_per_second": rate(timings.decoded, timings.decode),
    })
}

/// Speed and cache on stderr.
pub fn print(timings: &Timings, kv: &KvReport) {
    let line = |name: &str, n: usize, time: Duration| {
        eprintln!("{name:<8} {n} tokens in {:.2} s ({:.1} tokens/s)", time.as_secs_f64(), rate(n, time));
    };
    line("prefill", timings.prefilled, timings.prefill);
    line("decode", timings.decoded, timings.decode);
    let bytes = |n: usize| HumanBytes(n as u64);
    eprintln!(
        "KV cache {} for {} tokens, peak {} (full f16: {}, compression {:.2})",
        bytes(kv.allocated_bytes),
        kv.context_tokens,
        bytes(kv.peak_bytes),
        bytes(kv.f16_bytes),
        kv.compression,
    );
    eprintln!("layers   {} lazy, {} active", kv.lazy_layers, kv.active_layers);
}

pub fn rate(n: usize, time: Duration) -> f64 {
    if n == 0 || time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() }
}

pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
