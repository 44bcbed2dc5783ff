//! Performance counters.

use ggml_sys as sys;

use crate::{
    context::{CONTEXTS, Context},
    log,
};

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
}

const NOTHING: sys::llama_perf_context_data = sys::llama_perf_context_data {
    t_start_ms: 0.0,
    t_load_ms: 0.0,
    t_p_eval_ms: 0.0,
    t_eval_ms: 0.0,
    n_p_eval: 0,
    n_eval: 0,
    n_reused: 0,
};

fn data(context: &Context) -> sys::llama_perf_context_data {
    let perf = context.lock().perf;
    let ms = |us: i64| us as f64 / 1e3;
    sys::llama_perf_context_data {
        t_start_ms: ms(perf.since_us.unwrap_or(context.model.start_us)),
        t_load_ms: ms(context.model.load_us),
        t_p_eval_ms: ms(perf.prompt_us),
        t_eval_ms: ms(perf.decode_us),
        // As upstream: callers divide by them.
        n_p_eval: perf.n_prompt.max(1),
        n_eval: perf.n_decode.max(1),
        n_reused: 0,
    }
}

api! {
    fn llama_perf_context(ctx: *const sys::llama_context) -> sys::llama_perf_context_data, or NOTHING, {
        Ok(data(&*CONTEXTS.get(ctx)?))
    }

    fn llama_perf_context_print(ctx: *const sys::llama_context), or (), {
        let data = data(&*CONTEXTS.get(ctx)?);
        // SAFETY: reads a clock.
        let total = unsafe { sys::ggml_time_us() } as f64 / 1e3 - data.t_start_ms;
        let speed = |ms: f64, n: i32| {
            let n = f64::from(n);
            format!("{:8.2} ms per token, {:8.2} tokens per second", ms / n, 1e3 / ms.max(1e-9) * n)
        };
        let print = |text: &str| log::info("llama_perf_context_print", text);
        print(&format!("       load time = {:10.2} ms", data.t_load_ms));
        print(&format!(
            "prompt eval time = {:10.2} ms / {:5} tokens ({})",
            data.t_p_eval_ms, data.n_p_eval, speed(data.t_p_eval_ms, data.n_p_eval),
        ));
        print(&format!(
            "       eval time = {:10.2} ms / {:5} runs   ({})",
            data.t_eval_ms, data.n_eval, speed(data.t_eval_ms, data.n_eval),
        ));
        print(&format!("      total time = {total:10.2} ms / {:5} tokens", data.n_p_eval + data.n_eval));
        Ok(())
    }

    fn llama_perf_context_reset(ctx: *mut sys::llama_context), or (), {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        let off = state.perf.off;
        // SAFETY: reads a clock.
        state.perf = Perf { since_us: Some(unsafe { sys::ggml_time_us() }), ..Perf::new(off) };
        Ok(())
    }
}
