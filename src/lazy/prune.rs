//! Whether rows are pruned in layers that are not lazy, and by which bound.

use std::{fmt, str::FromStr};

/// Which rows layers that are not lazy drop once they are old: those whose score, as a [`PruneMap`](super::PruneMap) foretells
/// it, is below a bound that is the same for all layers and heads.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Prune {
    /// None.
    #[default]
    Off,
    /// By the bound that the map's calibration found.
    Auto,
    /// By this bound; minus infinity drops nothing.
    Below(f32),
}

/// Why a text says nothing of pruning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither auto, nor off, nor a number")]
pub struct ParsePruneError(String);

impl FromStr for Prune {
    type Err = ParsePruneError;

    fn from_str(text: &str) -> Result<Prune, ParsePruneError> {
        match text {
            "off" => Ok(Prune::Off),
            "auto" => Ok(Prune::Auto),
            _ => match text.parse::<f32>() {
                Ok(bound) if !bound.is_nan() => Ok(Prune::Below(bound)),
                _ => Err(ParsePruneError(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for Prune {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Prune::Off => f.write_str("off"),
            Prune::Auto => f.write_str("auto"),
            Prune::Below(bound) => bound.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_as_it_is_read() {
        for (text, prune) in [("off", Prune::Off), ("auto", Prune::Auto), ("-1.5", Prune::Below(-1.5))] {
            assert_eq!(text.parse(), Ok(prune));
            assert_eq!(prune.to_string(), text);
        }
        assert_eq!("-inf".parse(), Ok(Prune::Below(f32::NEG_INFINITY)));
        for wrong in ["", "nan", "2.5x", "Auto"] {
            assert_eq!(wrong.parse::<Prune>(), Err(ParsePruneError(wrong.to_owned())));
        }
    }
}
