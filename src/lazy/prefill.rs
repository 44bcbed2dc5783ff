//! What the lazy layers do with a prompt: when it is scored, and what they see of it.

/// When a sequence is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum At {
    /// At the end of the prompt, by its last `n_queries` tokens.
    #[default]
    Prefill,
    /// By the first generated token alone (the paper's first version).
    Decode,
}

/// What the lazy layers attend to while the prompt is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefillMode {
    /// Everything; the cache shrinks when the prompt has been read.
    Full,
    /// Sink and window from the first token on.
    Window,
}
