//! A loaded model: hyper-parameters, weights, vocabulary, and the graph of each architecture's layer.

mod architecture;
mod cohere2;
mod error;
mod exaone4;
mod gemma;
mod gemma2;
mod gemma3;
mod glm4;
mod gpt_oss;
mod granite;
mod granitemoe;
mod hparams;
mod identity;
mod llama;
mod loaded;
mod mistral3;
mod olmo2;
mod olmoe;
mod params;
mod parts;
mod phi3;
mod placement;
mod qwen2;
mod qwen2moe;
mod qwen3;
mod qwen3moe;
mod registry;
mod seed_oss;
mod smollm3;
mod weights;

pub(crate) use architecture::{Architecture, Attention, AttentionOptions, LayerStep};
pub use error::Error;
pub use hparams::Hparams;
pub(crate) use identity::FINGERPRINT_BYTES;
pub use loaded::Model;
pub(crate) use loaded::Planned;
pub use params::{ModelParams, Progress};
pub(crate) use placement::Placement;
pub use registry::check_architecture;

#[doc(inline)]
pub use crate::ggml::{Rope, RopeKind};
