//! What stands between C and Rust: the guard around every function, and checked access to the caller's memory.

use std::{
    any::Any,
    ffi::{CStr, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::log;

/// Why a call failed, in words.
#[derive(Debug)]
pub(crate) struct Failure(pub String);

pub(crate) type Result<T> = std::result::Result<T, Failure>;

// Not an Error itself, so that every Error can become one.
impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.to_string())
    }
}

macro_rules! fail {
    ($($format:tt)*) => { return Err($crate::border::Failure(format!($($format)*))) };
}

/// Runs the body of an exported function. Errors and panics are logged and answered with `failed`.
pub(crate) fn guard<T>(name: &str, failed: T, body: impl FnOnce() -> Result<T>) -> T {
    // The state that a panic may leave behind is behind mutexes, whose poison is looked at, or of this call alone.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(Failure(why))) => {
            log::error(name, &why);
            failed
        }
        Err(panic) => {
            log::error(name, &format!("internal error: {}", panic_text(&*panic)));
            failed
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "panic",
    }
}

/// `n` elements at `ptr`; an empty slice needs no pointer.
///
/// # Safety
/// A `ptr` that is not null points to `n` elements that nobody writes for as long as the slice is used.
pub(crate) unsafe fn slice<'a, T>(ptr: *const T, n: usize, what: &str) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        fail!("{what}: a null pointer");
    }
    if !ptr.is_aligned() || n > isize::MAX as usize / size_of::<T>().max(1) {
        fail!("{what}: not a valid array");
    }
    // SAFETY: not null, aligned, not too long; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(ptr, n) })
}

/// As [`slice`], to be written.
///
/// # Safety
/// A `ptr` that is not null points to `n` elements that nobody else uses for as long as the slice is used.
pub(crate) unsafe fn slice_mut<'a, T>(ptr: *mut T, n: usize, what: &str) -> Result<&'a mut [T]> {
    if n == 0 {
        return Ok(&mut []);
    }
    if ptr.is_null() {
        fail!("{what}: a null pointer");
    }
    if !ptr.is_aligned() || n > isize::MAX as usize / size_of::<T>().max(1) {
        fail!("{what}: not a valid array");
    }
    // SAFETY: not null, aligned, not too long; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(ptr, n) })
}

/// A C string.
///
/// # Safety
/// A `ptr` that is not null points to a string that ends with a NUL and lives as long as the result.
pub(crate) unsafe fn c_str<'a>(ptr: *const c_char, what: &str) -> Result<&'a CStr> {
    if ptr.is_null() {
        fail!("{what}: a null pointer");
    }
    // SAFETY: not null; the rest is the caller's promise.
    Ok(unsafe { CStr::from_ptr(ptr) })
}

/// As [`c_str`], as UTF-8.
///
/// # Safety
/// As [`c_str`].
pub(crate) unsafe fn text<'a>(ptr: *const c_char, what: &str) -> Result<&'a str> {
    // SAFETY: the caller's promise is the same.
    match unsafe { c_str(ptr, what) }?.to_str() {
        Ok(text) => Ok(text),
        Err(_) => fail!("{what}: not valid UTF-8"),
    }
}

/// Writes a text as `snprintf` does: cut to fit, always with a NUL. Returns the text's whole length.
///
/// # Safety
/// A `buf` that is not null has room for `size` bytes.
pub(crate) unsafe fn write_text(buf: *mut c_char, size: usize, text: &[u8]) -> Result<i32> {
    if size > 0 {
        // SAFETY: the caller's promise.
        let buf = unsafe { slice_mut(buf.cast::<u8>(), size, "buffer") }?;
        let n = text.len().min(size - 1);
        buf[..n].copy_from_slice(&text[..n]);
        buf[n] = 0;
    }
    Ok(i32::try_from(text.len()).unwrap_or(i32::MAX))
}
