//! The cache: its types, and which layers become lazy.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use simlayer::{
    ggml::Type,
    lazy::{LayerWindows, Policy, Prune},
};

use super::values::positive;

/// Which layers become lazy, and what they keep.
#[derive(Debug, Args)]
#[command(next_help_heading = "Lazy layers")]
pub struct LazyFlags {
    /// Which layers become lazy: auto, `kl[:X]`, `threshold[:τ]`, `budget[:ρ]`, `output[:ρ]`, `profile[:ρ|:kl=X|:12x]`, layers:1,2,... or off
    #[arg(long, value_name = "RULE", default_value = "auto")]
    pub lazy: Policy,
    /// A profile of the model, made by calibrate [default: MODEL.simlayer.toml beside the model, else the model's in the
    /// user's folder of profiles, which $SIMLAYER_PROFILES names, else the one built in]
    #[arg(long, value_name = "FILE")]
    pub lazy_profile: Option<PathBuf>,
    /// First tokens that a lazy layer keeps
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub lazy_sink: usize,
    /// Recent tokens that a lazy layer keeps
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = positive)]
    pub lazy_window: usize,
    /// Tokens that layers with a window keep beyond it: as many of the newest can be taken back without reading again
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub lazy_slack: usize,
    /// Older rows that a lazy layer keeps for each KV head beside sink and window: those that later tokens will most look for; needs a map
    /// of the model, made by calibrate --fit-prune
    #[arg(long, value_name = "M", default_value_t = 0)]
    pub lazy_rescue: usize,
    /// Other windows for single layers, as 3=256,9-12=2048 [default: those of the profile, with its --lazy-window]
    #[arg(long, value_name = "LAYERS=N,...")]
    pub lazy_windows: Option<LayerWindows>,
    /// Last prompt tokens whose attention is scored
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive)]
    pub lazy_queries: usize,
    /// Score the prompt's last tokens, or the first generated one
    #[arg(long, value_name = "WHEN", default_value = "prefill")]
    pub lazy_at: LazyAt,
    /// What lazy layers see while the prompt is read [default: as the profile says; window where the layers are named; else full]
    #[arg(long, value_name = "WHAT")]
    pub lazy_prefill: Option<LazyPrefill>,
    /// Types of a lazy layer's keys and values: one for both, or K/V [default: keys q8_0, or as -ctk where that is smaller, values q4_0; f16 where heads are too small]
    #[arg(long, value_name = "T|K/V", value_parser = lazy_types)]
    pub lazy_type: Option<(Type, Type)>,
    /// Drop old rows of layers that are not lazy which no later token will look for: those scored below T, or auto; needs a map
    /// of the model, made by calibrate --fit-prune
    #[arg(long, value_name = "auto|T", default_value = "off", allow_hyphen_values = true)]
    pub prune: Prune,
    /// Do not rotate the keys and values of quantised caches
    #[arg(long)]
    pub no_kv_rotate: bool,
    /// Compute with ggml's kernels only: slower, and llama.cpp's own logits bit for bit
    #[arg(long)]
    pub ggml_kernels: bool,
    /// Newest tokens that are kept in f16 as well, with the sink, beside a quantised cache; 0: none, as llama.cpp
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub kv_exact: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LazyAt {
    Prefill,
    Decode,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LazyPrefill {
    Full,
    Window,
}

/// What the keys are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyType {
    Auto,
    Of(Type),
}

pub(super) fn key_type(text: &str) -> Result<KeyType, String> {
    if text == "auto" { Ok(KeyType::Auto) } else { cache_type(text).map(KeyType::Of) }
}

pub(super) fn cache_type(text: &str) -> Result<Type, String> {
    Type::cache_type_from_name(text).ok_or_else(no_cache_type)
}

fn lazy_types(text: &str) -> Result<(Type, Type), String> {
    Type::cache_types_from_name(text).ok_or_else(no_cache_type)
}

fn no_cache_type() -> String {
    format!("it must be one of {}", Type::cache_type_names())
}
