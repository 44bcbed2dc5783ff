//! The library and the machine: versions, devices, names of settings, and what is not supported at all.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    ptr::{self, NonNull},
    sync::OnceLock,
};

use ggml_sys as sys;
use simlayer::ggml::logging::keep_logs;

use crate::{
    border::{Failure, Result, c_str, slice, text},
    devices::MAX_DEVICES,
    log,
    upstream::Library,
};

/// As upstream has it: no context has more sequences.
pub(crate) const MAX_SEQUENCES: usize = 256;

/// Whether ggml has the backend for devices of servers.
fn supports_rpc() -> bool {
    // SAFETY: looks a NUL-terminated name up in the registry.
    !unsafe { sys::ggml_backend_reg_by_name(c"RPC".as_ptr()) }.is_null()
}

api! {
    fn llama_version() -> *const c_char, or c"".as_ptr(), {
        Ok(version().as_ptr())
    }

    fn llama_backend_init(), or (), {
        keep_logs();
        // SAFETY: starts ggml's clock and fills its tables; may be called again.
        unsafe {
            sys::ggml_time_init();
            let params = sys::ggml_init_params { mem_size: 0, mem_buffer: ptr::null_mut(), no_alloc: false };
            sys::ggml_free(sys::ggml_init(params));
        }
        Ok(())
    }

    fn llama_backend_free(), or (), {
        // SAFETY: frees ggml's quantisation tables, which are made again when needed.
        unsafe { sys::ggml_quantize_free() };
        Ok(())
    }

    fn llama_numa_init(numa: sys::ggml_numa_strategy), or (), {
        if numa != sys::GGML_NUMA_STRATEGY_DISABLED {
            // SAFETY: any number may be given.
            unsafe { sys::ggml_numa_init(numa) };
        }
        Ok(())
    }

    fn llama_time_us() -> i64, or 0, {
        // SAFETY: reads a clock.
        Ok(unsafe { sys::ggml_time_us() })
    }

    fn llama_max_devices() -> usize, or 0, { Ok(MAX_DEVICES) }
    fn llama_max_parallel_sequences() -> usize, or 0, { Ok(MAX_SEQUENCES) }
    fn llama_max_tensor_buft_overrides() -> usize, or 0, { Ok(crate::devices::MAX_OVERRIDES) }
    fn llama_supports_mmap() -> bool, or false, { Ok(true) }
    fn llama_supports_mlock() -> bool, or false, { Ok(false) }
    fn llama_supports_gpu_offload() -> bool, or false, {
        let kinds = [sys::GGML_BACKEND_DEVICE_TYPE_GPU, sys::GGML_BACKEND_DEVICE_TYPE_IGPU];
        // SAFETY: looks through the registry.
        Ok(supports_rpc() || kinds.into_iter().any(|kind| !unsafe { sys::ggml_backend_dev_by_type(kind) }.is_null()))
    }

    fn llama_supports_rpc() -> bool, or false, { Ok(supports_rpc()) }

    fn llama_flash_attn_type_name(flash_attn: sys::llama_flash_attn_type) -> *const c_char, or c"unknown".as_ptr(), {
        Ok(match flash_attn {
            sys::LLAMA_FLASH_ATTN_TYPE_AUTO => c"auto".as_ptr(),
            sys::LLAMA_FLASH_ATTN_TYPE_DISABLED => c"disabled".as_ptr(),
            sys::LLAMA_FLASH_ATTN_TYPE_ENABLED => c"enabled".as_ptr(),
            other => fail!("{other} is none"),
        })
    }

    fn llama_load_mode_name(load_mode: sys::llama_load_mode) -> *const c_char, or c"unknown".as_ptr(), {
        match LOAD_MODES.iter().find(|(mode, _)| *mode == load_mode) {
            Some((_, name)) => Ok(name.as_ptr()),
            None => fail!("{load_mode} is none"),
        }
    }

    fn llama_load_mode_from_str(name: *const c_char) -> sys::llama_load_mode, or sys::LLAMA_LOAD_MODE_AUTO, {
        // SAFETY: a C string of the caller's.
        let name = unsafe { text(name, "name") }?;
        match LOAD_MODES.iter().find(|(_, other)| other.to_bytes() == name.as_bytes()) {
            Some((mode, _)) => Ok(*mode),
            None => fail!("\"{name}\" is none"),
        }
    }

    fn llama_chat_apply_template(
        tmpl: *const c_char,
        chat: *const sys::llama_chat_message,
        n_msg: usize,
        add_ass: bool,
        buf: *mut c_char,
        length: i32,
    ) -> i32, or -1, {
        // SAFETY: an array of messages, C strings, and a buffer of the caller's.
        unsafe {
            for message in slice(chat, n_msg, "chat")? {
                c_str(message.role, "role")?;
                c_str(message.content, "content")?;
            }
            let template = if tmpl.is_null() { c"chatml" } else { c_str(tmpl, "tmpl")? };
            let mut why = [0 as c_char; 256];
            let length = if buf.is_null() { 0 } else { length.max(0) };
            let n = sys::simlayer_chat_apply_template(
                template.as_ptr(), chat, n_msg, add_ass, buf, length, why.as_mut_ptr(), why.len(),
            );
            match n {
                i32::MIN => fail!("{}", CStr::from_ptr(why.as_ptr()).to_string_lossy()),
                n => {
                    // As upstream's strncpy does, where there is room.
                    if n >= 0 && n < length {
                        *buf.add(n as usize) = 0;
                    }
                    Ok(n)
                }
            }
        }
    }

    fn llama_print_system_info() -> *const c_char, or c"".as_ptr(), {
        static INFO: OnceLock<CString> = OnceLock::new();
        Ok(INFO.get_or_init(system_info).as_ptr())
    }

    fn llama_sampler_chain_default_params() -> sys::llama_sampler_chain_params,
    or sys::llama_sampler_chain_params { no_perf: true }, {
        Ok(sys::llama_sampler_chain_params { no_perf: true })
    }

    fn llama_model_quantize_default_params() -> sys::llama_model_quantize_params, or no_quantize_params(), {
        Ok(no_quantize_params())
    }

    // Unmodified llama.cpp does it.
    fn llama_model_quantize(
        input: *const c_char,
        output: *const c_char,
        params: *const sys::llama_model_quantize_params,
    ) -> u32, or 1, {
        type Quantize = unsafe extern "C" fn(
            *const c_char, *const c_char, *const sys::llama_model_quantize_params,
        ) -> u32;
        // SAFETY: C strings of the caller's, and parameters as llama.h describes them; the function has that type.
        unsafe {
            c_str(input, "input")?;
            c_str(output, "output")?;
            if params.is_null() {
                fail!("params: a null pointer");
            }
            let function = Library::get()?.symbol(c"llama_model_quantize")?;
            Ok(std::mem::transmute::<NonNull<c_void>, Quantize>(function)(input, output, params))
        }
    }

    fn llama_opt_param_filter_all(_tensor: *const sys::ggml_tensor, _data: *mut c_void) -> bool, or true, {
        Ok(true)
    }

    fn llama_opt_init(_ctx: *mut sys::llama_context, _model: *mut sys::llama_model, _params: sys::llama_opt_params),
    or (), {
        not_supported("training")
    }

    fn llama_opt_epoch(
        _ctx: *mut sys::llama_context,
        _dataset: sys::ggml_opt_dataset_t,
        _train: sys::ggml_opt_result_t,
        _eval: sys::ggml_opt_result_t,
        _split: i64,
        _callback_train: sys::ggml_opt_epoch_callback,
        _callback_eval: sys::ggml_opt_epoch_callback,
    ), or (), {
        not_supported("training")
    }
}

const LOAD_MODES: [(sys::llama_load_mode, &CStr); 6] = [
    (sys::LLAMA_LOAD_MODE_AUTO, c"auto"),
    (sys::LLAMA_LOAD_MODE_NONE, c"none"),
    (sys::LLAMA_LOAD_MODE_MMAP, c"mmap"),
    (sys::LLAMA_LOAD_MODE_MLOCK, c"mlock"),
    (sys::LLAMA_LOAD_MODE_MMAP_MLOCK, c"mmap+mlock"),
    (sys::LLAMA_LOAD_MODE_DIRECT_IO, c"dio"),
];

pub(crate) fn not_supported<T>(what: &str) -> Result<T> {
    Err(Failure(format!("{what} is not supported by simlayer; use llama.cpp for it")))
}

/// "simlayer 0.1.0, llama.cpp 0.6.0 (…)".
pub(crate) fn version() -> &'static CStr {
    static VERSION: OnceLock<CString> = OnceLock::new();
    VERSION.get_or_init(|| {
        CString::new(concat!("simlayer ", env!("CARGO_PKG_VERSION"), ", llama.cpp ", env!("LLAMA_VERSION")))
            .unwrap_or_default()
    })
}

/// What the processor can do, as ggml lists it.
fn system_info() -> CString {
    type GetFeatures = unsafe extern "C" fn(sys::ggml_backend_reg_t) -> *mut sys::ggml_backend_feature;
    let mut info = String::new();
    // SAFETY: indices below the count; the function of that name has that type; the list ends with a null name, and its
    // strings are static.
    unsafe {
        for i in 0..sys::ggml_backend_reg_count() {
            let reg = sys::ggml_backend_reg_get(i);
            let function = sys::ggml_backend_reg_get_proc_address(reg, c"ggml_backend_get_features".as_ptr());
            if function.is_null() {
                continue;
            }
            let get: GetFeatures = std::mem::transmute::<*mut c_void, GetFeatures>(function);
            let name = CStr::from_ptr(sys::ggml_backend_reg_name(reg)).to_string_lossy();
            info.push_str(&format!("{name} : "));
            let mut feature = get(reg);
            while !(*feature).name.is_null() {
                let (name, value) = (CStr::from_ptr((*feature).name), CStr::from_ptr((*feature).value));
                info.push_str(&format!("{} = {} | ", name.to_string_lossy(), value.to_string_lossy()));
                feature = feature.add(1);
            }
        }
    }
    CString::new(info).unwrap_or_default()
}

fn no_quantize_params() -> sys::llama_model_quantize_params {
    sys::llama_model_quantize_params {
        nthread: 0,
        ftype: sys::LLAMA_FTYPE_MOSTLY_Q8_0,
        output_tensor_type: sys::GGML_TYPE_COUNT,
        token_embedding_type: sys::GGML_TYPE_COUNT,
        allow_requantize: false,
        quantize_output_tensor: true,
        only_copy: false,
        pure_: false,
        keep_split: false,
        dry_run: false,
        imatrix: ptr::null(),
        kv_overrides: ptr::null(),
        tt_overrides: ptr::null(),
        prune_layers: ptr::null(),
        max_buf_size: 8 << 30,
    }
}

/// A setting of llama-ext.h that does nothing here.
///
/// # Safety
/// `function` is a C string.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_ext_unsupported(function: *const c_char) {
    crate::border::guard("llama-ext", (), || {
        // SAFETY: a C string, as said.
        let function = unsafe { text(function, "function") }?;
        not_supported(function)
    });
}

/// A failure that C++ has noticed.
///
/// # Safety
/// Both are C strings.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_ext_failed(function: *const c_char, why: *const c_char) {
    crate::border::guard("reused", (), || {
        // SAFETY: C strings, as said.
        let (function, why) = unsafe { (text(function, "function")?, c_str(why, "why")?) };
        log::error(function, &why.to_string_lossy());
        Ok(())
    });
}
