//! The samplers of a chain by name, in the order that they are to run.

use std::fmt;

use super::error::SamplingError;

/// A sampler of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SamplerStep {
    Penalties,
    Dry,
    TopNSigma,
    TopK,
    Typical,
    TopP,
    MinP,
    Xtc,
    Temperature,
    /// For text between a beginning and an end: prefers to end it where that is likely.
    Infill,
    /// Draws tokens near a target probability. Wherever it stands it comes last, in place of the draw.
    AdaptiveP,
}

/// With llama.cpp's names and letters.
const STEPS: [(SamplerStep, &str, char); 11] = [
    (SamplerStep::Penalties, "penalties", 'e'),
    (SamplerStep::Dry, "dry", 'd'),
    (SamplerStep::TopNSigma, "top_n_sigma", 's'),
    (SamplerStep::TopK, "top_k", 'k'),
    (SamplerStep::Typical, "typ_p", 'y'),
    (SamplerStep::TopP, "top_p", 'p'),
    (SamplerStep::MinP, "min_p", 'm'),
    (SamplerStep::Xtc, "xtc", 'x'),
    (SamplerStep::Temperature, "temperature", 't'),
    (SamplerStep::Infill, "infill", 'i'),
    (SamplerStep::AdaptiveP, "adaptive_p", 'a'),
];

impl SamplerStep {
    /// llama.cpp's order where nothing else is asked for.
    pub const DEFAULT: [SamplerStep; 9] = [
        SamplerStep::Penalties,
        SamplerStep::Dry,
        SamplerStep::TopNSigma,
        SamplerStep::TopK,
        SamplerStep::Typical,
        SamplerStep::TopP,
        SamplerStep::MinP,
        SamplerStep::Xtc,
        SamplerStep::Temperature,
    ];

    /// A sampler by its name in any of llama.cpp's spellings: `top_k`, `top-k`, `topk`.
    pub fn from_name(name: &str) -> Option<SamplerStep> {
        let plain = |name: &str| name.to_ascii_lowercase().replace(['_', '-'], "");
        let named = match &plain(name)[..] {
            "nucleus" => "topp".to_owned(),
            "temp" => "temperature".to_owned(),
            "typ" => "typp".to_owned(),
            name => name.to_owned(),
        };
        STEPS.iter().find(|(_, name, _)| plain(name) == named).map(|(step, ..)| *step)
    }

    /// Samplers by their names, separated by semicolons, as `--samplers` and `general.sampling.sequence` have them.
    ///
    /// # Errors
    /// [`SamplingError::NoSampler`] with the first name that is none.
    pub fn list(names: &str) -> Result<Vec<SamplerStep>, SamplingError> {
        let names = names.split(';').map(str::trim).filter(|name| !name.is_empty());
        names.map(|name| SamplerStep::from_name(name).ok_or_else(|| no_sampler(name))).collect()
    }

    /// Samplers by their letters, as `--sampler-seq` has them: `edskypmxt` is the default order.
    ///
    /// # Errors
    /// [`SamplingError::NoSampler`] with the first letter that is none.
    pub fn sequence(letters: &str) -> Result<Vec<SamplerStep>, SamplingError> {
        let step = |letter| STEPS.iter().find(|(.., of_step)| *of_step == letter).map(|(step, ..)| *step);
        letters.chars().map(|letter| step(letter).ok_or_else(|| no_sampler(letter))).collect()
    }
}

fn no_sampler(name: impl ToString) -> SamplingError {
    let known = STEPS.map(|(_, name, letter)| format!("{name} ({letter})")).join(", ");
    SamplingError::NoSampler { name: name.to_string(), known }
}

/// llama.cpp's name.
impl fmt::Display for SamplerStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = STEPS.iter().find(|(step, ..)| step == self);
        f.write_str(found.map_or("", |(_, name, _)| name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_letters() {
        for (step, name, letter) in STEPS {
            assert_eq!(step.to_string(), name);
            for spelling in [name.to_owned(), name.replace('_', "-"), name.replace('_', ""), name.to_uppercase()] {
                assert_eq!(SamplerStep::list(&spelling), Ok(vec![step]), "{spelling}");
            }
            assert_eq!(SamplerStep::sequence(&letter.to_string()), Ok(vec![step]));
        }
        assert_eq!(SamplerStep::sequence("edskypmxt"), Ok(SamplerStep::DEFAULT.to_vec()));
        assert_eq!(
            SamplerStep::list("temp; nucleus;typ"),
            Ok(vec![SamplerStep::Temperature, SamplerStep::TopP, SamplerStep::Typical])
        );
        assert_eq!(SamplerStep::list(""), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_sampler_is_named() {
        for error in [SamplerStep::list("top_k;nonsense").unwrap_err(), SamplerStep::sequence("kz").unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("nonsense") || text.contains("z is no sampler"), "{text}");
            assert!(text.contains("top_k (k)") && text.contains("adaptive_p (a)"), "{text}");
        }
    }
}
