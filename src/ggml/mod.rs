//! The safe tier over ggml: tensors, graphs, devices, the scheduler, and llama.cpp's vocabulary and samplers.
//!
//! All of the library's `unsafe` lives in this folder. The rules that make the rest safe:
//!
//! * A [`Tensor`] keeps the [`Context`] that holds its header alive, and the context its buffer. A graph keeps
//!   the contexts of every tensor that its nodes read.
//! * Tensor data is reached only by [`Tensor::write`] and [`Tensor::read`], which check sizes and that memory is
//!   behind the tensor now: a graph's tensors have memory from [`Scheduler::alloc`] until the next graph's.
//! * Shapes that ggml would abort on are the graph builder's to get right; the model loader has checked every
//!   weight's shape and type before a graph is built. An abort is a bug, never memory corruption.
//! * Weights are written while loading only. Other tensors belong to one session, which is used through `&mut`.

mod attention;
mod context;
mod device;
mod fatal;
mod graph;
mod llama;
mod memory;
mod mmap;
mod mul_mat;
mod processor;
#[cfg(feature = "rpc")]
pub mod rpc;
mod scheduler;
mod types;

pub use attention::{FusedAttention, KvSegment, MAX_SEGMENTS};
pub use context::{Context, Plain, Tensor};
pub use device::{BufferType, Device, DeviceKind, backends};
pub use fatal::{exit_now, on_fatal_error};
pub use graph::{Graph, Rope, RopeKind};
pub use llama::{
    Candidates, LogLevel, RawSampler, RawVocab, SamplerKind, SpecialToken, VocabKind, builtin_chat_template,
    builtin_chat_templates, keep_logs, set_log, silence_logs,
};
pub use memory::{map_large_blocks, release_free_memory, resident_bytes};
pub use mmap::{map_file, release_pages};
pub use scheduler::{AbortCallback, Scheduler};
pub use types::Type;

/// What can go wrong below the graphs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The device had no room for a buffer.
    #[error("out of memory: {device} could not give {bytes} bytes for {what}")]
    OutOfMemory { device: String, bytes: usize, what: String },
    /// A device could not be started.
    #[error("device {0} could not be started")]
    Device(String),
    /// ggml refused to run a graph.
    #[error("the graph failed to run on the device (ggml status {0})")]
    Compute(i32),
    /// A server for remote devices cannot be used, or cannot be started.
    #[error("remote server {endpoint}: {why}")]
    Remote { endpoint: String, why: String },
    /// The run was interrupted by the abort callback.
    #[error("interrupted")]
    Aborted,
}
