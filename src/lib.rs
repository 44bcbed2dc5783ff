//! simlayer runs GGUF models on ggml and makes long contexts small: after prefill it finds the layers that look
//! almost only at the first tokens and the recent ones, and shrinks their KV cache to those (SimLayerKV,
//! arXiv 2410.13846).
//!
//! ```no_run
//! use simlayer::{AddBos, Model, ModelParams, Sampler, SamplerParams, Session, SessionParams, Special};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::load("model.gguf", &ModelParams::default())?;
//! let mut session = Session::new(&model, SessionParams { n_ctx: 4096, ..SessionParams::default() })?;
//! let mut sampler = Sampler::new(model.vocab(), &SamplerParams::default())?;
//!
//! let prompt = model.vocab().tokenize("The sea is", AddBos::Yes, Special::Parse)?;
//! for piece in session.generate(&mut sampler, &prompt)?.limit(32) {
//!     print!("{}", piece?);
//! }
//! println!("\nthe cache takes {} bytes", session.kv().allocated_bytes);
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod ggml;

mod cache;
pub mod chat;
mod engine;
pub mod generation;
pub mod gguf;
pub mod lazy;
pub mod model;
pub mod quality;
pub mod sampling;
pub mod vocab;

pub use cache::{KvReport, KvRotate};
pub use engine::{
    BatchEntry, Checkpoint, DevicePlan, Embeddings, Error, Fit, FitTarget, LayerKind, LayerReport, MAX_ADAPTERS,
    Outputs, PlannedCache, Restored, SeqId, SequenceView, Session, SessionParams, StateError, StepReport, fit, plan,
};
pub use generation::{Generation, GenerationEnd, GenerationError};
pub use model::{Hparams, LoraAdapter, Model, ModelParams, Progress, StateSize, TensorOverride, TensorPlace};
pub use sampling::{Sampler, SamplerParams};
pub use vocab::{AddBos, Special, Token, Vocab};
