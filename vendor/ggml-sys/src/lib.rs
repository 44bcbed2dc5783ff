//! Raw bindings to ggml, gguf and the vocabulary, sampler and grammar parts of llama.cpp.
//!
//! Nothing in the bindings is checked. The safe tier is `simlayer::ggml`; the names and their contracts are those of
//! upstream's headers, and of `shim/vocab.h` for what begins with `simlayer_`.

pub mod checked;

pub use bindings::*;

/// The folder of llama.cpp's sources that this was compiled from, for tests that look into them.
pub const LLAMA_SOURCE: &str = env!("LLAMA_SOURCE");

#[allow(non_upper_case_globals, non_camel_case_types, non_snake_case, missing_debug_implementations)]
#[allow(rustdoc::all, clippy::all, clippy::undocumented_unsafe_blocks)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}
