//! The rules that make layers lazy, as `--lazy` writes them.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive, str::FromStr};

use super::target::{DEFAULT_SHARE, ParseTargetError, Target};

/// The rule that makes layers lazy.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum Policy {
    /// No layer is lazy.
    Off,
    /// Every layer whose score is above the threshold; `None` for the model's own (see [`default_threshold`]).
    Threshold(Option<f32>),
    /// The layers with the highest scores, so that at most `⌈(1 − ρ)·L⌉` of L stay active.
    Budget(f32),
    /// As `Budget`, by how little hidden states change when a layer is lazy, instead of attention mass.
    Output(f32),
    /// These layers, whatever their scores.
    Layers(BTreeSet<usize>),
    /// The layers that the model's profile found least harmful.
    Profile(Target),
    /// The largest set that this prompt would not miss: its last logits, measured with the set lazy, diverge by at most so
    /// many nats. Sets are beginnings of an order: of how little a probe's hidden states change with
    /// a layer alone lazy, or of the profile that [`LazyParams::profile`](super::LazyParams::profile) names.
    Kl(f64),
    /// As `Kl` with [`DEFAULT_KL`], and at most half of the layers: what is asked only after a prompt was read its own
    /// tokens foretell badly, and a model with half of its layers active finds nearly all of it.
    #[default]
    Auto,
}

/// The divergence in nats that `kl` allows unless told otherwise.
pub const DEFAULT_KL: f64 = 0.012;

/// The share of layers that `auto` makes lazy at most.
const AUTO_SHARE: f32 = 0.5;

/// What a layer is scored by. Higher scores are lazier either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// The share of attention on what a lazy layer would keep (the paper's).
    Mass,
    /// 1 − the relative change of the last tokens' hidden states after the layer, when they see only that.
    Output,
}

impl Policy {
    /// What this policy goes by.
    pub fn measure(&self) -> Measure {
        if matches!(self, Policy::Output(_)) || self.most_foretold().is_some() {
            Measure::Output
        } else {
            Measure::Mass
        }
    }

    /// The divergence in nats that looks allow, where this policy goes by them.
    pub fn most_foretold(&self) -> Option<f64> {
        match self {
            Policy::Kl(most) => Some(*most),
            Policy::Auto => Some(DEFAULT_KL),
            _ => None,
        }
    }

    /// The share of layers that looks may make lazy.
    pub fn most_by_looks(&self) -> f32 {
        if *self == Policy::Auto { AUTO_SHARE } else { 1.0 }
    }
}

/// Why a `--lazy` argument is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParsePolicyError {
    #[error(
        "\"{0}\" is none of auto, kl[:X], threshold[:τ], budget[:ρ], output[:ρ], profile[:ρ|:kl=X|:12x], layers:1,2,…, off"
    )]
    Unknown(String),
    #[error("\"{value}\" is no number between 0 and 1 in \"{rule}:{value}\"")]
    Share { rule: String, value: String },
    #[error("\"{0}\" is no layer number in a list like layers:3,5,9-12")]
    Layer(String),
    #[error("\"{0}\" is no divergence above 0 in \"kl:{0}\"")]
    Kl(String),
    #[error("{0}, in \"profile:\"")]
    Target(#[from] ParseTargetError),
}

impl FromStr for Policy {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Policy, ParsePolicyError> {
        let (rule, value) = match text.split_once(':') {
            Some((rule, value)) => (rule, Some(value)),
            None => (text, None),
        };
        let share = |value: &str| match value.parse::<f32>() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
            _ => Err(ParsePolicyError::Share { rule: rule.to_owned(), value: value.to_owned() }),
        };
        let kl = |value: &str| match value.parse::<f64>() {
            Ok(most) if most > 0.0 && most.is_finite() => Ok(most),
            _ => Err(ParsePolicyError::Kl(value.to_owned())),
        };
        match (rule, value) {
            ("off", None) => Ok(Policy::Off),
            ("auto", None) => Ok(Policy::Auto),
            ("kl", value) => Ok(Policy::Kl(value.map_or(Ok(DEFAULT_KL), kl)?)),
            ("threshold", value) => Ok(Policy::Threshold(value.map(share).transpose()?)),
            ("budget", value) => Ok(Policy::Budget(value.map_or(Ok(DEFAULT_SHARE), share)?)),
            ("output", value) => Ok(Policy::Output(value.map_or(Ok(DEFAULT_SHARE), share)?)),
            ("layers", Some(list)) => parse_layers(list).map(Policy::Layers),
            ("profile", None) => Ok(Policy::Profile(Target::default())),
            ("profile", Some(target)) => Ok(Policy::Profile(target.parse()?)),
            _ => Err(ParsePolicyError::Unknown(text.to_owned())),
        }
    }
}

/// `3,5,9-12` → the set of these numbers.
fn parse_layers(list: &str) -> Result<BTreeSet<usize>, ParsePolicyError> {
    let mut layers = BTreeSet::new();
    for part in list.split(',') {
        layers.extend(parse_range(part).ok_or_else(|| ParsePolicyError::Layer(part.to_owned()))?);
    }
    Ok(layers)
}

/// `5` or `9-12` → these numbers.
pub(super) fn parse_range(text: &str) -> Option<RangeInclusive<usize>> {
    // No model has more; a typing error must not make a set of billions.
    const MAX: usize = 4096;
    let number = |text: &str| text.trim().parse().ok().filter(|&layer: &usize| layer < MAX);
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => number(first).zip(number(last))?,
        None => number(text).map(|layer| (layer, layer))?,
    };
    (first <= last).then_some(first..=last)
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Off => f.write_str("off"),
            Policy::Auto => f.write_str("auto"),
            Policy::Kl(most) => write!(f, "kl:{most}"),
            Policy::Threshold(None) => f.write_str("threshold"),
            Policy::Threshold(Some(threshold)) => write!(f, "threshold:{threshold}"),
            Policy::Budget(share) => write!(f, "budget:{share}"),
            Policy::Output(share) => write!(f, "output:{share}"),
            Policy::Profile(target) => write!(f, "profile:{target}"),
            Policy::Layers(layers) => {
                let list: Vec<String> = layers.iter().map(usize::to_string).collect();
                write!(f, "layers:{}", list.join(","))
            }
        }
    }
}

/// The threshold τ that the paper uses for a family of models.
///
/// The family is told by the model's name, its architecture and its RoPE base: Mistral and Qwen by name or
/// architecture; of the rest of `llama`, a RoPE base of 10,000 is LLaMA 1 and 2's, LLaMA 3 and later have another.
pub fn default_threshold(architecture: &str, name: Option<&str>, rope_base: f32) -> f32 {
    let name = name.unwrap_or_default().to_lowercase();
    let is = |family: &str| name.contains(family) || architecture.starts_with(family);
    if is("mistral") {
        0.8
    } else if is("qwen") {
        0.85
    } else if architecture == "llama" && rope_base == 10_000.0 {
        0.65
    } else {
        0.9
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax() {
        let parse = |text: &str| text.parse::<Policy>();
        assert_eq!(parse("off"), Ok(Policy::Off));
        assert_eq!(parse("auto"), Ok(Policy::Auto));
        assert_eq!(parse("kl"), Ok(Policy::Kl(DEFAULT_KL)));
        assert_eq!(parse("kl:0.02"), Ok(Policy::Kl(0.02)));
        assert_eq!(parse("threshold"), Ok(Policy::Threshold(None)));
        assert_eq!(parse("threshold:0.75"), Ok(Policy::Threshold(Some(0.75))));
        assert_eq!(parse("budget"), Ok(Policy::Budget(0.5)));
        assert_eq!(parse("budget:0.8"), Ok(Policy::Budget(0.8)));
        assert_eq!(parse("profile"), Ok(Policy::Profile(Target::Share(0.5))));
        assert_eq!(parse("profile:0.8"), Ok(Policy::Profile(Target::Share(0.8))));
        assert_eq!(parse("profile:kl=0.01"), Ok(Policy::Profile(Target::Kl(0.01))));
        assert_eq!(parse("profile:12.5x"), Ok(Policy::Profile(Target::Times(12.5))));
        assert_eq!(parse("layers:3,5,9-11"), Ok(Policy::Layers([3, 5, 9, 10, 11].into())));
    }

    #[test]
    fn wrong_syntax_says_what_is_wrong() {
        for text in [
            "",
            "of",
            "off:1",
            "auto:",
            "kl:",
            "kl:0",
            "kl:-1",
            "kl:inf",
            "threshold:",
            "threshold:2",
            "budget:nan",
            "profile:",
            "profile:1.5",
            "profile:kl=",
            "profile:kl=-1",
            "profile:kl=nan",
            "profile:x",
            "profile:0.5x",
            "profile:infx",
            "layers",
            "layers:",
            "layers:1,,2",
            "layers:5-3",
            "layers:-1",
            "layers:99999999999",
        ] {
            let error = text.parse::<Policy>().unwrap_err().to_string();
            assert!(!error.is_empty(), "{text}");
        }
    }

    #[test]
    fn displays_as_it_is_written() {
        for text in [
            "off",
            "auto",
            "kl:0.02",
            "threshold",
            "threshold:0.75",
            "budget:0.5",
            "profile:0.8",
            "profile:kl=0.01",
            "profile:12.5x",
            "layers:1,2,7",
        ] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn families() {
        assert_eq!(default_threshold("llama", Some("Llama 3.1 8B Instruct"), 500_000.0), 0.9);
        assert_eq!(default_threshold("llama", Some("LLaMA v2"), 10_000.0), 0.65);
        assert_eq!(default_threshold("llama", Some("Mistral-7B-Instruct-v0.1"), 10_000.0), 0.8);
        assert_eq!(default_threshold("mistral3", None, 1e6), 0.8);
        assert_eq!(default_threshold("qwen2", None, 1e6), 0.85);
        assert_eq!(default_threshold("llama", Some("SmolLM2 135M"), 100_000.0), 0.9);
        assert_eq!(default_threshold("gemma2", None, 10_000.0), 0.9);
    }
}
