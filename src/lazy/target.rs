//! How many layers a profile makes lazy.

use std::fmt;

/// The share of lazy layers in `budget` and `profile` when none is given.
pub(super) const DEFAULT_SHARE: f32 = 0.5;

/// How much of a profile's order becomes lazy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// This share of the layers.
    Share(f32),
    /// The most layers whose measured divergence is at most this.
    Kl(f64),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Share(share) => write!(f, "{share}"),
            Target::Kl(kl) => write!(f, "kl={kl}"),
        }
    }
}

impl Default for Target {
    fn default() -> Self {
        Target::Share(DEFAULT_SHARE)
    }
}
