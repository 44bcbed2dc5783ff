//! Why no token was chosen.

/// What can go wrong while a token is chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A parameter is outside its range.
    #[error("{name} is {value}: it must be {must}")]
    Parameter { name: &'static str, value: f64, must: &'static str },
    /// There is no sampler of this name or letter.
    #[error("{name} is no sampler: there are {known}")]
    NoSampler { name: String, known: String },
    /// The grammar does not parse.
    #[error("the grammar cannot be used: {0}")]
    Grammar(String),
    /// No token could be chosen, for instance because the grammar allows none.
    #[error("no token can be sampled: {0}")]
    Sample(String),
}
