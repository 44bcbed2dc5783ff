//! Runs a model over sequences: prefill, decode, batches, and the moment at which layers become lazy.
//!
//! A batch's way: [`Session::run`] → `run` → `prefill` (a long prompt, layer by layer) or `ubatch` → `step` (the graph, by
//! `attention` and `inputs`) → `executor`. Its scores go to `sequence`, where layers become lazy, its rows to the caller.
//! `setup` says what follows from the parameters. Files use those below them only.

mod attention;
mod batch;
mod checkpoint;
mod error;
mod executor;
mod fit;
mod gather;
mod groups;
mod guard;
mod inputs;
mod layer;
mod looking;
mod mark;
mod plan;
mod positions;
mod prefill;
mod probe;
mod profile;
mod prune;
mod pruning;
mod rescue;
mod ring;
mod run;
mod score;
mod search;
mod sequence;
mod sequences;
mod session;
mod setup;
mod snapshot;
mod state;
mod step;
mod together;
mod ubatch;
mod view;

#[cfg(test)]
mod fork_tests;
#[cfg(test)]
mod look_tests;
#[cfg(test)]
mod prune_tests;
#[cfg(test)]
mod rescue_tests;
#[cfg(test)]
mod tests;

pub use batch::{BatchEntry, Embeddings, Outputs, SeqId};
pub use checkpoint::{Checkpoint, Restored};
pub use error::Error;
pub use executor::StepReport;
pub use fit::{Fit, FitTarget, fit};
pub use layer::{LayerKind, LayerReport};
pub use plan::{DevicePlan, PlannedCache, plan};
pub use session::Session;
pub use setup::{MAX_ADAPTERS, SessionParams};
pub use state::StateError;
pub use view::SequenceView;
