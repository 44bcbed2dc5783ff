//! The C ABI of simlayer: the functions of llama.cpp's `llama.h`, so that its frontends run on simlayer unchanged, and
//! those of `simlayer.h`, for what `llama.h` cannot say. `cargo xtask dist` links them to `libllama.so.0`.
//!
//! Every function is called through `border::guard`: a failure becomes a line in llama.cpp's log and the function's
//! error value, and so does a panic. Handles are looked up in a table of the living ones, so that a null pointer or one
//! that was freed is an error. The vocabulary, samplers and grammars are llama.cpp's own code behind checks of ours
//! (`reused.cpp`). Calls about models that simlayer does not run go to unmodified llama.cpp in a library of its own
//! (`upstream`).

#[macro_use]
mod border;
#[macro_use]
mod api;

mod adapters;
mod batch;
mod caller;
mod context;
mod decode;
mod devices;
mod handles;
mod log;
mod lora;
mod memory;
mod model;
mod perf;
mod settings;
mod simlayer_api;
mod state;
mod system;
mod upstream;

#[cfg(test)]
mod layout;
