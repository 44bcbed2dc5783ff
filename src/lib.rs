//! simlayer runs GGUF models on ggml and makes long contexts small: after prefill it finds the layers that look
//! almost only at the first tokens and the recent ones, and shrinks their KV cache to those (SimLayerKV,
//! arXiv 2410.13846).
//!
//! ```no_run
//! use simlayer::{Model, ModelParams, Sampler, SamplerParams, Session, SessionParams};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::load("model.gguf", &ModelParams::default())?;
//! let mut session = Session::new(&model, SessionParams::default())?;
//! let mut sampler = Sampler::new(model.vocab(), &SamplerParams::default())?;
//!
//! let prompt = model.vocab().tokenize("The sea is", true, true)?;
//! let mut token = sampler.sample(session.prefill(&prompt)?)?;
//! let mut text = Vec::new();
//! for _ in 0..32 {
//!     if model.vocab().is_eog(token) {
//!         break;
//!     }
//!     text.extend(model.vocab().piece(token, false));
//!     token = sampler.sample(session.decode(token)?)?;
//! }
//! println!("{}", String::from_utf8_lossy(&text));
//! println!("the cache takes {} bytes", session.kv().allocated_bytes);
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod ggml;

mod cache;
pub mod chat;
mod engine;
pub mod gguf;
pub mod lazy;
pub mod model;
pub mod quality;
pub mod sampling;
pub mod vocab;

pub use cache::{KvReport, KvRotate};
pub use engine::{
    BatchEntry, Checkpoint, DevicePlan, Error, LayerKind, LayerReport, Outputs, Restored, SeqId, Session,
    SessionParams, StateError, plan,
};
pub use model::{Hparams, Model, ModelParams, Progress};
pub use sampling::{Sampler, SamplerParams};
pub use vocab::{Token, Vocab};
