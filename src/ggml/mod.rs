//! ggml's types and devices, what it says, and devices of other machines.
//!
//! Beneath lies the safe tier over ggml, which the rest of this crate is built on: tensors, graphs, the scheduler, and
//! llama.cpp's vocabulary and samplers. It is hidden here, being no part of what this crate promises to others.
//!
//! All of the library's `unsafe` lives in this folder. The rules that make the rest safe:
//!
//! * A `Tensor` keeps the `Context` that holds its header alive, and the context its buffer. A graph keeps the contexts
//!   of every tensor that its nodes read.
//! * A `Context` is one thread's: tensors are added to it without a lock.
//! * Tensor data is reached only by `Tensor::write` and `Tensor::read`, which check sizes and that memory is behind the
//!   tensor now: a graph's tensors have memory from `Scheduler::alloc` until the next graph's. Both are this crate's alone.
//! * A view lies within the tensor that it is of.
//! * Shapes that ggml would abort on are the graph builder's to get right; the model loader has checked every
//!   weight's shape and type before a graph is built. An abort is a bug, never memory corruption.
//! * Weights are written while loading only. Other tensors belong to one session, which is used through `&mut`.

mod attention;
#[cfg(feature = "serve")]
mod chat;
mod context;
mod device;
mod error;
mod fatal;
mod graph;
mod llama;
pub mod logging;
mod low_rank;
mod memory;
mod mmap;
mod mul_mat;
mod numa;
mod pattern;
mod processor;
#[cfg(feature = "rpc")]
pub mod rpc;
mod scheduler;
mod supports;
mod tiles;
mod types;

pub use device::{Device, DeviceKind};
pub use error::Error;
pub use numa::{Numa, spread_threads};
pub use types::Type;

// Public elsewhere in the crate.
#[doc(hidden)]
pub use graph::{Rope, RopeKind};
#[doc(hidden)]
pub use llama::{Override, SpecialToken, VocabKind};

// For the C ABI, the command-line tool and the benchmarks: no part of what this crate promises.
#[doc(hidden)]
pub use attention::{FusedAttention, HeadRows, KvSegment};
#[doc(hidden)]
pub use context::{Context, Tensor};
#[doc(hidden)]
pub use device::BufferType;
#[doc(hidden)]
pub use fatal::exit_now;
#[doc(hidden)]
pub use graph::Graph;
#[doc(hidden)]
pub use llama::RawVocab;
#[doc(hidden)]
pub use low_rank::{Adapted, LowRank};
#[doc(hidden)]
pub use scheduler::{AbortCallback, Scheduler};

pub(crate) use attention::ATTENTION_BLOCK;
#[cfg(feature = "serve")]
pub(crate) use chat::{RawChat, RawPrepared, json_schema_to_grammar, message_diff};
#[cfg(test)]
pub(crate) use context::Plain;
pub(crate) use llama::{Candidates, RawSampler, SamplerKind, builtin_chat_template, builtin_chat_templates};
pub(crate) use memory::{map_large_blocks, release_free_memory};
pub(crate) use mmap::{map_file, release_pages};
pub(crate) use mul_mat::multiplies_as_stored;
pub(crate) use pattern::Pattern;
pub(crate) use tiles::{Due, Packing, Source, TILE};
