//! Which layers are lazy: the policy, from attention scores to decisions. It knows nothing of tensors.
//!
//! A layer's score is the share of attention that the last prompt tokens give to the first `n_sink` tokens and to the
//! `n_window` most recent ones (SimLayerKV, arXiv 2410.13846, section 3). A layer only ever moves from active to lazy.

mod known;
mod params;
mod policy;
mod prefill;
mod profile;
mod prune;
mod prune_map;
mod selector;
mod setting;
mod target;
mod windows;

pub use known::{ProfileSource, profile_folder};
pub use params::LazyParams;
pub use policy::{DEFAULT_KL, Measure, ParsePolicyError, Policy, default_threshold};
pub use prefill::{At, PrefillMode};
pub use profile::{CalibrationText, Cut, Identity, Profile, ProfileError, ProfiledLayer};
pub use prune::{ParsePruneError, Prune};
pub use prune_map::{LayerMap, PruneMap, PruneMapError};
pub use selector::Selector;
pub(crate) use selector::n_active;
pub use setting::Setting;
pub use target::{ParseTargetError, Target};
pub use windows::{LayerWindows, ParseWindowsError};
