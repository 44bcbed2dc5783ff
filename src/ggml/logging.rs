//! What ggml and llama.cpp say: their messages, and their last words before they give up.
//!
//! Loading a model keeps their messages off stderr, unless [`set_log`] has asked for them.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    io::Write,
    sync::{
        Once,
        atomic::{AtomicI32, Ordering},
    },
};

use ggml_sys as sys;

pub use super::fatal::on_fatal_error;

/// The least severe level that is shown; above every level at first.
static LOG_LEVEL: AtomicI32 = AtomicI32::new(i32::MAX);
static LOG_HANDLER: Once = Once::new();

/// Which messages of ggml and llama.cpp go to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// None.
    Silent,
    /// Errors and warnings.
    Warnings,
    /// All but debug messages.
    Info,
}

/// Sends the messages of ggml and llama.cpp to stderr, from this level on.
pub fn set_log(level: LogLevel) {
    silence_logs();
    let threshold = match level {
        LogLevel::Silent => i32::MAX,
        LogLevel::Warnings => sys::GGML_LOG_LEVEL_WARN as i32,
        LogLevel::Info => sys::GGML_LOG_LEVEL_INFO as i32,
    };
    LOG_LEVEL.store(threshold, Ordering::Relaxed);
}

/// Keeps the messages of ggml and llama.cpp off stderr, unless [`set_log`] has asked for them. Does nothing the second
/// time, so that a program that sets a log callback of its own after the first call keeps it.
pub(super) fn silence_logs() {
    // SAFETY: `on_log` has the callback's signature and needs no user data. It is installed once, before the first
    // call that logs.
    LOG_HANDLER.call_once(|| unsafe { sys::llama_log_set(Some(on_log), std::ptr::null_mut()) });
}

/// Leaves the messages of ggml and llama.cpp to the callback that the program has set or will set: loading a model does not
/// silence them from now on. For programs that use llama.cpp's own `llama_log_set`.
#[doc(hidden)]
pub fn keep_logs() {
    LOG_HANDLER.call_once(|| ());
}

/// Says something in the log that ggml and llama.cpp write to, wherever that goes.
#[doc(hidden)]
pub fn log(level: sys::ggml_log_level, text: &str) {
    let bytes: Vec<u8> = text.bytes().filter(|&byte| byte != 0).chain([b'\n']).collect();
    let Ok(text) = CString::new(bytes) else { return };
    let (mut callback, mut data) = (None, std::ptr::null_mut());
    // SAFETY: both pointers are to live locals; the callback is one that was set to be called with its data.
    unsafe {
        sys::llama_log_get(&mut callback, &mut data);
        if let Some(callback) = callback {
            callback(level, text.as_ptr(), data);
        }
    }
}

pub(crate) fn warn(text: &str) {
    log(sys::GGML_LOG_LEVEL_WARN, &format!("simlayer: {text}"));
}

pub(crate) fn info(text: &str) {
    log(sys::GGML_LOG_LEVEL_INFO, &format!("simlayer: {text}"));
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    // Continuations (level 5) belong to a message whose level is not known any more; they are dropped unless all is
    // shown.
    let threshold = LOG_LEVEL.load(Ordering::Relaxed);
    let level = if level == sys::GGML_LOG_LEVEL_CONT { sys::GGML_LOG_LEVEL_INFO as i32 } else { level as i32 };
    if level >= threshold && !text.is_null() {
        // SAFETY: upstream passes a C string that lives during the call.
        let text = unsafe { CStr::from_ptr(text) };
        // A closed stderr is no reason to panic inside a callback.
        let _ = std::io::stderr().write_all(text.to_bytes());
    }
}
