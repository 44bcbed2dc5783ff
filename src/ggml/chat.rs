//! llama.cpp's chat templates with tools, its parsers of answers, and JSON schemas as grammars: JSON text in, JSON text
//! out. What the texts hold is said in `shim/chat.cpp`.

use std::{ffi::c_char, fmt, ptr::NonNull, slice};

use ggml_sys as sys;

use super::llama::with_message;

/// Calls `make`, and copies the text that it makes, or gives the message that it leaves.
fn text(make: impl FnOnce(*mut c_char, usize) -> *mut sys::simlayer_text) -> Result<String, String> {
    let (text, message) = with_message(make);
    let Some(text) = NonNull::new(text) else { return Err(message) };
    // SAFETY: the text is live and nobody else's; its data have its size and are copied before it is freed.
    let bytes = unsafe {
        let data = sys::simlayer_text_data(text.as_ptr());
        let bytes = slice::from_raw_parts(data.cast::<u8>(), sys::simlayer_text_size(text.as_ptr())).to_vec();
        sys::simlayer_text_free(text.as_ptr());
        bytes
    };
    String::from_utf8(bytes).map_err(|_| "llama.cpp's answer is not valid UTF-8".to_owned())
}

/// The GBNF grammar of a JSON schema, given as text.
pub fn json_schema_to_grammar(schema: &str) -> Result<String, String> {
    // SAFETY: the schema and the message have the given sizes and outlive the call.
    text(|message, size| unsafe {
        sys::simlayer_json_schema_to_grammar(schema.as_ptr().cast(), schema.len(), message, size)
    })
}

/// What a message has more than an earlier state of it, both as JSON text.
pub fn message_diff(before: &str, after: &str) -> Result<String, String> {
    // SAFETY: the texts and the message have the given sizes and outlive the call.
    text(|message, size| unsafe {
        let (before, before_size) = (before.as_ptr().cast(), before.len());
        sys::simlayer_chat_diff(before, before_size, after.as_ptr().cast(), after.len(), message, size)
    })
}

/// A chat template of llama.cpp.
pub struct RawChat {
    ptr: NonNull<sys::simlayer_chat>,
}

// SAFETY: the template is not changed once it is made; running it only reads it, with counted references that are
// atomic.
unsafe impl Send for RawChat {}
// SAFETY: as above.
unsafe impl Sync for RawChat {}

impl RawChat {
    /// A Jinja template, with the texts of BOS and EOS.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<RawChat, String> {
        // SAFETY: the texts and the message have the given sizes and outlive the call; the template is new.
        let (ptr, message) = with_message(|message, size| unsafe {
            sys::simlayer_chat_new(
                source.as_ptr().cast(),
                source.len(),
                bos.as_ptr().cast(),
                bos.len(),
                eos.as_ptr().cast(),
                eos.len(),
                message,
                size,
            )
        });
        NonNull::new(ptr).map(|ptr| RawChat { ptr }).ok_or(message)
    }

    /// What the template can do, as a JSON object.
    pub fn capabilities(&self) -> Result<String, String> {
        // SAFETY: the template is live, and the message has the given size.
        text(|message, size| unsafe { sys::simlayer_chat_capabilities(self.ptr.as_ptr(), message, size) })
    }

    /// A request, as JSON text, by the template.
    pub fn apply(&self, request: &str) -> Result<RawPrepared, String> {
        // SAFETY: the template is live; the request and the message have the given sizes and outlive the call. What is
        // made is new.
        let (ptr, message) = with_message(|message, size| unsafe {
            sys::simlayer_chat_apply(self.ptr.as_ptr(), request.as_ptr().cast(), request.len(), message, size)
        });
        NonNull::new(ptr).map(|ptr| RawPrepared { ptr }).ok_or(message)
    }
}

impl Drop for RawChat {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `simlayer_chat_new`, and nobody else frees it.
        unsafe { sys::simlayer_chat_free(self.ptr.as_ptr()) }
    }
}

impl fmt::Debug for RawChat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawChat").finish_non_exhaustive()
    }
}

/// What became of a request, and the parser of its answer.
pub struct RawPrepared {
    ptr: NonNull<sys::simlayer_chat_prepared>,
}

// SAFETY: it is not changed once it is made; a parse keeps its state on the stack.
unsafe impl Send for RawPrepared {}
// SAFETY: as above.
unsafe impl Sync for RawPrepared {}

impl RawPrepared {
    /// Prompt, grammar and so on, as a JSON object.
    pub fn json(&self) -> Result<String, String> {
        // SAFETY: it is live, and the message has the given size.
        text(|message, size| unsafe { sys::simlayer_chat_prepared_json(self.ptr.as_ptr(), message, size) })
    }

    /// The message in an answer, as a JSON object. `is_partial` says that the answer goes on.
    pub fn parse(&self, answer: &str, is_partial: bool) -> Result<String, String> {
        // SAFETY: it is live; the answer and the message have the given sizes and outlive the call.
        text(|message, size| unsafe {
            let (answer, answer_size) = (answer.as_ptr().cast(), answer.len());
            sys::simlayer_chat_parse(self.ptr.as_ptr(), answer, answer_size, is_partial, message, size)
        })
    }
}

impl Drop for RawPrepared {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `simlayer_chat_apply`, and nobody else frees it.
        unsafe { sys::simlayer_chat_prepared_free(self.ptr.as_ptr()) }
    }
}

impl fmt::Debug for RawPrepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawPrepared").finish_non_exhaustive()
    }
}
