//! Messages, through llama.cpp's log callback, and the last error of each thread.

use std::{cell::RefCell, collections::BTreeSet, ffi::CString, sync::Mutex};

use ggml_sys as sys;
use simlayer::ggml::logging;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

pub(crate) fn error(function: &str, why: &str) {
    let text: Vec<u8> = why.bytes().filter(|&byte| byte != 0).collect();
    if let Ok(text) = CString::new(text) {
        LAST_ERROR.with(|last| *last.borrow_mut() = text);
    }
    logging::log(sys::GGML_LOG_LEVEL_ERROR, &format!("{function}: {why}"));
}

pub(crate) fn warn(function: &str, what: &str) {
    logging::log(sys::GGML_LOG_LEVEL_WARN, &format!("{function}: {what}"));
}

pub(crate) fn info(function: &str, what: &str) {
    logging::log(sys::GGML_LOG_LEVEL_INFO, &format!("{function}: {what}"));
}

/// A warning that is given once in the process's life.
pub(crate) fn warn_once(function: &str, what: &str) {
    static GIVEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let is_new = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(what.to_owned());
    if is_new {
        warn(function, what);
    }
}

/// The text of this thread's last error, empty at first. Valid until the thread's next one.
pub(crate) fn last_error() -> *const std::ffi::c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}
