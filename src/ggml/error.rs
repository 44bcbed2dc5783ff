//! Errors.

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
