//! What happens when ggml gives up.

use std::{
    ffi::{CStr, c_char},
    sync::OnceLock,
};

use ggml_sys as sys;

static HANDLER: OnceLock<fn(&str)> = OnceLock::new();

/// Has `handler` told what ggml says before it aborts the process: a bug, or a connection to a remote device that was
/// lost. It may be called on any thread, once; others may be waiting for that one. When it returns, the process aborts.
/// The first handler stays.
pub fn on_fatal_error(handler: fn(&str)) {
    if HANDLER.set(handler).is_ok() {
        // SAFETY: the function has the type that ggml wants and lives as long as the process.
        unsafe { sys::ggml_set_abort_callback(Some(tell)) };
    }
}

unsafe extern "C" fn tell(message: *const c_char) {
    // SAFETY: ggml passes a NUL-terminated message that lives during the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    if let Some(handler) = HANDLER.get() {
        // An unwinding panic must not cross C.
        let _ = std::panic::catch_unwind(|| handler(&message));
    }
}

/// Ends the process at once, without destructors: some would wait for threads that never end.
pub fn exit_now(code: i32) -> ! {
    unsafe extern "C" {
        fn _exit(code: i32) -> !;
    }
    // SAFETY: the C library's function takes any number and does not return.
    unsafe { _exit(code) }
}
