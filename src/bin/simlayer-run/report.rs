//! What a run took, for people and for programs.

use std::{io::Write, time::Duration};

use indicatif::HumanBytes;
use serde_json::{Value, json};
use simlayer::KvReport;

use crate::{failure::Failure, stream::Timings};

/// One object on one line, which is what `--json` prints.
pub fn write_json(out: &mut impl Write, object: &Value) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, object)?;
    Ok(writeln!(out)?)
}

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
    let line = |name: &str, n: usize, time: Duration| match n {
        // Interrupted, or there was nothing to do: no speed either.
        0 => eprintln!("{name:<8} 0 tokens"),
        n => eprintln!("{name:<8} {n} tokens in {:.2} s ({:.1} tokens/s)", time.as_secs_f64(), rate(n, time)),
    };
    line("prefill", timings.prefilled, timings.prefill);
    line("decode", timings.decoded, timings.decode);
    let bytes = |n: usize| HumanBytes(n as u64);
    eprintln!(
        "KV cache {} for {} tokens, peak {} (full f16: {}, {})",
        bytes(kv.allocated_bytes),
        kv.context_tokens,
        bytes(kv.peak_bytes),
        bytes(kv.f16_bytes),
        compression(kv.compression),
    );
    let pruned = match kv.pruned_layers {
        0 => String::new(),
        n => format!(", {n} of them pruned"),
    };
    eprintln!("layers   {} lazy, {} active{pruned}{}", kv.lazy_layers, kv.active_layers, foretold(kv));
}

/// What was measured before layers became lazy, where it was.
pub fn foretold(kv: &KvReport) -> String {
    match kv.foretold_kl {
        None => String::new(),
        Some(_) if kv.lazy_layers == 0 => {
            " (no set of layers was found whose rows this prompt would not miss)".to_owned()
        }
        Some(kl) => format!(" (foretold divergence {kl:.4})"),
    }
}

/// How many times smaller a cache is, if it is: of a few tokens, it has room for more than they need.
pub fn compression(compression: f64) -> String {
    match compression {
        1.0.. => format!("compression {compression:.2}"),
        _ => "nothing saved yet".to_owned(),
    }
}

/// The same in a column of a table.
pub fn times(compression: f64) -> String {
    match compression {
        1.0.. => format!("{compression:.2}"),
        _ => "–".to_owned(),
    }
}

pub fn rate(n: usize, time: Duration) -> f64 {
    if n == 0 || time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() }
}

pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
