//! LoRA adapters; control vectors and samplers in the graph, which are refused.

use std::{
    ffi::{c_char, c_int, c_void},
    path::Path,
    ptr,
};

use ggml_sys as sys;
use simlayer::{LoraAdapter, gguf::Gguf};

use crate::{
    border::{Result, c_str, slice, text},
    context::{CONTEXTS, session},
    log,
    lora::{ADAPTERS, Adapter},
    model::{MODELS, read_meta, write_meta},
    system::not_supported,
};

fn load(model: *mut sys::llama_model, path: &Path) -> Result<*mut sys::llama_adapter_lora> {
    let Some(engine) = &MODELS.get(model)?.engine else { fail!("the model was loaded without its weights") };
    let engine = LoraAdapter::load(engine, path)?;
    log::info("simlayer", &format!("{}: a LoRA adapter", path.display()));
    let meta = read_meta(&Gguf::open(path)?);
    Ok(ADAPTERS.insert(Adapter::new(model, engine, meta)))
}

unsafe extern "C" {
    /// POSIX's.
    fn fileno(file: *mut c_void) -> c_int;
}

api! {
    fn llama_adapter_lora_init(model: *mut sys::llama_model, path: *const c_char) -> *mut sys::llama_adapter_lora,
    or ptr::null_mut(), {
        // SAFETY: a C string.
        load(model, Path::new(unsafe { text(path, "path") }?))
    }

    fn llama_adapter_lora_init_from_file_ptr(model: *mut sys::llama_model, file: *mut c_void)
    -> *mut sys::llama_adapter_lora, or ptr::null_mut(), {
        if file.is_null() {
            fail!("file: a null pointer");
        }
        // SAFETY: an open file of the caller's.
        let number = unsafe { fileno(file) };
        // The file is mapped, by its path: that of the open one, even where its name is gone.
        load(model, Path::new(&format!("/proc/self/fd/{number}")))
    }

    fn llama_adapter_meta_val_str(
        adapter: *const sys::llama_adapter_lora,
        key: *const c_char,
        buf: *mut c_char,
        size: usize,
    ) -> i32, or -1, {
        let adapter = ADAPTERS.get(adapter)?;
        // SAFETY: a C string and a buffer of the caller's.
        unsafe { write_meta(buf, size, adapter.value(c_str(key, "key")?)) }
    }

    fn llama_adapter_meta_count(adapter: *const sys::llama_adapter_lora) -> i32, or 0, {
        Ok(ADAPTERS.get(adapter)?.meta.len() as i32)
    }

    fn llama_adapter_meta_key_by_index(
        adapter: *const sys::llama_adapter_lora,
        i: i32,
        buf: *mut c_char,
        size: usize,
    ) -> i32, or -1, {
        // SAFETY: a buffer of the caller's.
        unsafe { write_meta(buf, size, ADAPTERS.get(adapter)?.at(i).map(|(key, _)| key)) }
    }

    fn llama_adapter_meta_val_str_by_index(
        adapter: *const sys::llama_adapter_lora,
        i: i32,
        buf: *mut c_char,
        size: usize,
    ) -> i32, or -1, {
        // SAFETY: a buffer of the caller's.
        unsafe { write_meta(buf, size, ADAPTERS.get(adapter)?.at(i).map(|(_, value)| value)) }
    }

    fn llama_adapter_lora_free(adapter: *mut sys::llama_adapter_lora), or (), {
        ADAPTERS.remove(adapter).map(drop)
    }

    fn llama_adapter_get_alora_n_invocation_tokens(adapter: *const sys::llama_adapter_lora) -> u64, or 0, {
        Ok(ADAPTERS.get(adapter)?.engine.invocation_tokens().len() as u64)
    }

    fn llama_adapter_get_alora_invocation_tokens(adapter: *const sys::llama_adapter_lora) -> *const sys::llama_token,
    or ptr::null(), {
        // Valid while the adapter is: the tokens do not move.
        Ok(ADAPTERS.get(adapter)?.engine.invocation_tokens().as_ptr())
    }

    fn llama_set_adapters_lora(
        ctx: *mut sys::llama_context,
        adapters: *mut *mut sys::llama_adapter_lora,
        n_adapters: usize,
        scales: *mut f32,
    ) -> i32, or -1, {
        // SAFETY: two lists of the caller's, of that many entries.
        let (handles, scales) =
            unsafe { (slice(adapters, n_adapters, "adapters")?, slice(scales, n_adapters, "scales")?) };
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        let session = session(&mut state)?;
        let adapter = |(&handle, &scale): (&*mut sys::llama_adapter_lora, &f32)| Ok((ADAPTERS.get(handle)?.of(session.model())?, scale));
        let adapters: Result<Vec<(LoraAdapter, f32)>> = handles.iter().zip(scales).map(adapter).collect();
        session.set_adapters(adapters?)?;
        Ok(0)
    }

    fn llama_set_adapter_cvec(
        ctx: *mut sys::llama_context,
        data: *const f32,
        _len: usize,
        _n_embd: i32,
        _first: i32,
        _last: i32,
    ) -> i32, or -1, {
        CONTEXTS.get(ctx)?;
        if data.is_null() { Ok(0) } else { not_supported("a control vector") }
    }

    // Sampling in the graph: the frontend then samples on the processor, as it does where a device lacks operations.
    fn llama_set_sampler(ctx: *mut sys::llama_context, _seq: sys::llama_seq_id, sampler: *mut sys::llama_sampler)
    -> bool, or false, {
        CONTEXTS.get(ctx)?;
        Ok(sampler.is_null())
    }

    fn llama_get_sampled_token_ith(ctx: *mut sys::llama_context, _i: i32) -> sys::llama_token,
    or sys::LLAMA_TOKEN_NULL, {
        CONTEXTS.get(ctx)?;
        Ok(sys::LLAMA_TOKEN_NULL)
    }

    fn llama_get_sampled_probs_ith(ctx: *mut sys::llama_context, _i: i32) -> *mut f32, or ptr::null_mut(), {
        CONTEXTS.get(ctx)?;
        Ok(ptr::null_mut())
    }

    fn llama_get_sampled_probs_count_ith(ctx: *mut sys::llama_context, _i: i32) -> u32, or 0, {
        CONTEXTS.get(ctx)?;
        Ok(0)
    }

    fn llama_get_sampled_logits_ith(ctx: *mut sys::llama_context, _i: i32) -> *mut f32, or ptr::null_mut(), {
        CONTEXTS.get(ctx)?;
        Ok(ptr::null_mut())
    }

    // Those of `llama_get_logits_ith` stand: llama-server takes `logprobs` from so many.
    fn llama_get_sampled_logits_count_ith(ctx: *mut sys::llama_context, _i: i32) -> u32, or 0, {
        Ok(CONTEXTS.get(ctx)?.model.n_vocab() as u32)
    }

    fn llama_get_sampled_candidates_ith(ctx: *mut sys::llama_context, _i: i32) -> *mut sys::llama_token,
    or ptr::null_mut(), {
        CONTEXTS.get(ctx)?;
        Ok(ptr::null_mut())
    }

    fn llama_get_sampled_candidates_count_ith(ctx: *mut sys::llama_context, _i: i32) -> u32, or 0, {
        CONTEXTS.get(ctx)?;
        Ok(0)
    }
}
