//! GGUF files: checked metadata and tensor directory, and the weights in place in the memory map.
//!
//! # Why this reader is ours
//!
//! Two readers were tried first, on files that lie (crate `gguf-rs` 0.1.8; ggml's `gguf_init_from_file`).
//!
//! `gguf-rs` is unfit. A file of 32 bytes makes it allocate 1 GiB (a string's length is believed before the file's
//! size is looked at); tensor type 40, which ggml knows as NVFP4, panics in `unreachable!`, and a `general.file_type`
//! that is a string in `unwrap`. It gives BF16 tensors 1/256 and IQ4_NL tensors 1/8 of their size, accepts offsets
//! outside the file, rows that do not fill their blocks, an alignment of 24 and duplicate keys and tensors, turns
//! tokens that are not UTF-8 into other ones, and takes 50 times an array's size to hold it.
//!
//! ggml's reader checks lengths against the file's size and survives the same files, and since llama.cpp's
//! vocabulary code uses it, it does read every model, after us. But it does not look whether tensors lie inside
//! the file, says what is wrong only in the log and without the file's name, often without the key's, and holds
//! every string of the vocabulary in memory of its own, next to llama.cpp's copy.
//!
//! So one small pass over the mapped bytes (`parse.rs`) accepts a file or says what is wrong with it. It is at
//! least as strict as ggml's reader, so that nothing of upstream sees a header that it has not passed.

mod error;
mod file;
mod parse;
mod split;
mod value;
mod vocab_check;

pub use error::Error;
pub(crate) use error::shown;
pub use file::Gguf;
pub use parse::TensorInfo;
pub use value::{Array, Elements, Value, ValueType};
pub use vocab_check::check_vocab;

#[doc(inline)]
pub use crate::ggml::Override;
