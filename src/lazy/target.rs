//! How many layers a profile makes lazy.

use std::{fmt, str::FromStr};

/// The share of lazy layers in `budget` and `profile` when none is given.
pub(super) const DEFAULT_SHARE: f32 = 0.5;

/// How much of a profile's order becomes lazy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// This share of the layers.
    Share(f32),
    /// The profile's [`Setting`](super::Setting) for this, or else the most layers whose measured divergence is at most this.
    Kl(f64),
    /// The profile's [`Setting`](super::Setting) that makes the cache so many times smaller than in f16.
    Times(f64),
}

/// Why a text is no target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is neither a share of the layers between 0 and 1, nor kl=X above 0, nor how many times smaller, as in 12x"
)]
pub struct ParseTargetError(String);

impl FromStr for Target {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Target, ParseTargetError> {
        let number = |text: &str, least: f64| text.parse().ok().filter(|x: &f64| *x >= least && x.is_finite());
        let target = if let Some(most) = text.strip_prefix("kl=") {
            number(most, f64::MIN_POSITIVE).map(Target::Kl)
        } else if let Some(times) = text.strip_suffix('x') {
            number(times, 1.0).map(Target::Times)
        } else {
            text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).map(Target::Share)
        };
        target.ok_or_else(|| ParseTargetError(text.to_owned()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Share(share) => write!(f, "{share}"),
            Target::Kl(kl) => write!(f, "kl={kl}"),
            Target::Times(times) => write!(f, "{times}x"),
        }
    }
}

impl Default for Target {
    fn default() -> Self {
        Target::Share(DEFAULT_SHARE)
    }
}
