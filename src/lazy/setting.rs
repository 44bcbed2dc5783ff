//! All that makes a cache smaller, as a calibration chose it for a target.

use std::{fmt::Display, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::Target;
use crate::ggml::Type;

/// What a calibration chose for a target, among layers, windows, types, pruned and rescued rows; and what that costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// What was asked for: a divergence, or how many times smaller.
    #[serde(serialize_with = "as_text", deserialize_with = "of_text")]
    pub target: Target,
    /// How many layers are lazy, from the order's beginning on.
    pub lazy: usize,
    /// Recent tokens that these keep, and other rows for each KV head.
    pub n_window: usize,
    pub n_rescued: usize,
    /// Types of keys and values in the other layers.
    #[serde(serialize_with = "as_text", deserialize_with = "cache_type")]
    pub type_k: Type,
    #[serde(serialize_with = "as_text", deserialize_with = "cache_type")]
    pub type_v: Type,
    /// Whether the other layers' rows are pruned, by the bound of the model's map.
    pub prune: bool,
    /// Tokens of the prompt behind which it was measured: what a cache of another length saves is another number.
    pub n_prompt: usize,
    /// The mean divergence of the texts' tokens, in nats.
    pub kl_mean: f64,
    /// The mean rise of an answer token's negative log-likelihood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll_mean: Option<f64>,
    /// Uncompressed f16 cache over this one.
    pub compression: f64,
}

fn as_text<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

fn of_text<'de, D: Deserializer<'de>>(from: D) -> Result<Target, D::Error> {
    Target::from_str(&String::deserialize(from)?).map_err(D::Error::custom)
}

fn cache_type<'de, D: Deserializer<'de>>(from: D) -> Result<Type, D::Error> {
    let name = String::deserialize(from)?;
    let wrong = || D::Error::custom(format!("\"{name}\" is no cache type: {} are", Type::cache_type_names()));
    Type::cache_type_from_name(&name).ok_or_else(wrong)
}
