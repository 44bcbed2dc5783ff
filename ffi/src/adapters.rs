//! LoRA adapters, control vectors and samplers in the graph: refused.

use std::{
    ffi::{c_char, c_void},
    ptr,
};

use ggml_sys as sys;

use crate::{
    border::{Result, write_text},
    context::CONTEXTS,
    model::MODELS,
    system::not_supported,
};

/// No adapter can exist.
fn no_adapter<T>() -> Result<T> {
    not_supported("a LoRA adapter")
}

api! {
    fn llama_adapter_lora_init(model: *mut sys::llama_model, _path: *const c_char) -> *mut sys::llama_adapter_lora,
    or ptr::null_mut(), {
        MODELS.get(model)?;
        no_adapter()
    }

    fn llama_adapter_lora_init_from_file_ptr(model: *mut sys::llama_model, _file: *mut c_void)
    -> *mut sys::llama_adapter_lora, or ptr::null_mut(), {
        MODELS.get(model)?;
        no_adapter()
    }

    fn llama_adapter_meta_val_str(
        _adapter: *const sys::llama_adapter_lora,
        _key: *const c_char,
        buf: *mut c_char,
        size: usize,
    ) -> i32, or -1, {
        // SAFETY: a buffer of the caller's.
        unsafe { write_text(buf, size, b"") }?;
        no_adapter()
    }

    fn llama_adapter_meta_count(_adapter: *const sys::llama_adapter_lora) -> i32, or 0, {
        no_adapter()
    }

    fn llama_adapter_meta_key_by_index(
        _adapter: *const sys::llama_adapter_lora,
        _i: i32,
        buf: *mut c_char,
        size: usize,
    ) -> i32, or -1, {
        // SAFETY: a buffer of the caller's.
        unsafe { write_text(buf, size, b"") }?;
        no_adapter()
    }

    fn llama_adapter_meta_val_str_by_index(
        _adapter: *const sys::llama_adapter_lora,
        _i: i32,
        buf: *mut c_char,
        size: usize,
    ) -> i32, or -1, {
        // SAFETY: a buffer of the caller's.
        unsafe { write_text(buf, size, b"") }?;
        no_adapter()
    }

    fn llama_adapter_lora_free(adapter: *mut sys::llama_adapter_lora), or (), {
        if adapter.is_null() { Ok(()) } else { no_adapter() }
    }

    fn llama_adapter_get_alora_n_invocation_tokens(_adapter: *const sys::llama_adapter_lora) -> u64, or 0, {
        no_adapter()
    }

    fn llama_adapter_get_alora_invocation_tokens(_adapter: *const sys::llama_adapter_lora) -> *const sys::llama_token,
    or ptr::null(), {
        no_adapter()
    }

    fn llama_set_adapters_lora(
        ctx: *mut sys::llama_context,
        _adapters: *mut *mut sys::llama_adapter_lora,
        n_adapters: usize,
        _scales: *mut f32,
    ) -> i32, or -1, {
        CONTEXTS.get(ctx)?;
        if n_adapters == 0 { Ok(0) } else { no_adapter() }
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

    fn llama_get_sampled_logits_count_ith(ctx: *mut sys::llama_context, _i: i32) -> u32, or 0, {
        CONTEXTS.get(ctx)?;
        Ok(0)
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
