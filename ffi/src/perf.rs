//! Performance counters.

use ggml_sys as sys;

use crate::log;

/// What a context has done, and how long it took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Perf {
    off: bool,
    prompt_us: i64,
    decode_us: i64,
    n_prompt: i32,
    n_decode: i32,
    /// When the counters were set to zero; `None` for the model's start.
    since_us: Option<i64>,
}

impl Perf {
    pub fn new(off: bool) -> Perf {
        Perf { off, ..Perf::default() }
    }

    /// Counts a batch.
    pub fn add(&mut self, n_tokens: usize, us: i64) {
        if self.off {
            return;
        }
        let (time, count) = match n_tokens {
            1 => (&mut self.decode_us, &mut self.n_decode),
            _ => (&mut self.prompt_us, &mut self.n_prompt),
        };
        *time += us;
        *count = count.saturating_add(i32::try_from(n_tokens).unwrap_or(i32::MAX));
    }

    /// Sets the counters to zero at this time.
    pub fn reset(&mut self, now_us: i64) {
        *self = Perf { since_us: Some(now_us), ..Perf::new(self.off) };
    }

    /// The counters in llama.h's form, beside when the model began to be loaded and how long that took.
    pub fn data(&self, start_us: i64, load_us: i64) -> sys::llama_perf_context_data {
        let ms = |us: i64| us as f64 / 1e3;
        sys::llama_perf_context_data {
            t_start_ms: ms(self.since_us.unwrap_or(start_us)),
            t_load_ms: ms(load_us),
            t_p_eval_ms: ms(self.prompt_us),
            t_eval_ms: ms(self.decode_us),
            // As upstream: callers divide by them.
            n_p_eval: self.n_prompt.max(1),
            n_eval: self.n_decode.max(1),
            n_reused: 0,
        }
    }
}

/// What is said of a context that is none.
pub(crate) const NOTHING: sys::llama_perf_context_data = sys::llama_perf_context_data {
    t_start_ms: 0.0,
    t_load_ms: 0.0,
    t_p_eval_ms: 0.0,
    t_eval_ms: 0.0,
    n_p_eval: 0,
    n_eval: 0,
    n_reused: 0,
};

/// Writes the counters to the log, as upstream does.
pub(crate) fn print(data: &sys::llama_perf_context_data, now_us: i64) {
    let total = now_us as f64 / 1e3 - data.t_start_ms;
    let speed = |ms: f64, n: i32| {
        let n = f64::from(n);
        format!("{:8.2} ms per token, {:8.2} tokens per second", ms / n, 1e3 / ms.max(1e-9) * n)
    };
    let print = |text: &str| log::info("llama_perf_context_print", text);
    print(&format!("       load time = {:10.2} ms", data.t_load_ms));
    print(&format!(
        "prompt eval time = {:10.2} ms / {:5} tokens ({})",
        data.t_p_eval_ms,
        data.n_p_eval,
        speed(data.t_p_eval_ms, data.n_p_eval),
    ));
    print(&format!(
        "       eval time = {:10.2} ms / {:5} runs   ({})",
        data.t_eval_ms,
        data.n_eval,
        speed(data.t_eval_ms, data.n_eval),
    ));
    print(&format!("      total time = {total:10.2} ms / {:5} tokens", data.n_p_eval + data.n_eval));
}
