//! What every command that runs a model takes: which model, and how it is run.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use simlayer::{ggml::Type, gguf::Override};

use super::{
    cache::{KeyType, LazyFlags, cache_type, key_type},
    placement::PlacementFlags,
    values::{factor, positive},
};

/// Stands for the model where none was given and none is needed.
pub const NO_MODEL: &str = "-";

/// What every command that runs a model takes.
#[derive(Debug, Args)]
pub struct CommonArgs {
    /// Model file (GGUF); of a split model the first file
    #[arg(short, long, value_name = "FILE", default_value = NO_MODEL, hide_default_value = true)]
    pub model: PathBuf,
    #[cfg(feature = "download")]
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Tokens that the context holds; 0: as many as the model was trained for
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub ctx_size: usize,
    /// Tokens that are handed over at once
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    pub batch_size: usize,
    /// Tokens that are computed at once (-ub)
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub ubatch_size: usize,
    /// Threads for decoding [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Threads for reading prompts (-tb) [default: as for decoding]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads_batch: Option<usize>,
    #[command(flatten)]
    pub placement: PlacementFlags,
    /// Flash attention (-fa)
    #[arg(long, value_name = "on|off|auto", num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_parser = flash_attn, hide_possible_values = true)]
    pub flash_attn: FlashAttn,
    /// Type of the keys in the cache, in active layers (-ctk); auto: q8_0, and q4_0 in layers that lose nothing by it, as
    /// found at the prompt's end [default: f16, and auto where the values are quantised]; kvarn4, kvarn3, kvarn2: tiles of
    /// 64 tokens, on the processor
    #[arg(long, value_name = "TYPE", value_parser = key_type)]
    pub cache_type_k: Option<KeyType>,
    /// Type of the values in the cache, in active layers (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: Type,
    /// Give keys of the file other values: KEY=int:N, float:X, bool:true or str:TEXT (may be given several times)
    #[arg(long, value_name = "KEY=TYPE:VALUE,...", value_delimiter = ',', action = ArgAction::Append, value_parser = key_override)]
    pub override_kv: Vec<(String, Override)>,
    /// How RoPE is stretched: none, linear or yarn [default: the file's]
    #[arg(long, value_name = "KIND", value_parser = ["none", "linear", "yarn"])]
    pub rope_scaling: Option<String>,
    /// How far RoPE is stretched [default: the file's]
    #[arg(long, value_name = "N", value_parser = factor)]
    pub rope_scale: Option<f64>,
    /// The same, as 1/N
    #[arg(long, value_name = "N", value_parser = factor, conflicts_with = "rope_scale")]
    pub rope_freq_scale: Option<f64>,
    /// RoPE's base frequency [default: the file's]
    #[arg(long, value_name = "N", value_parser = factor)]
    pub rope_freq_base: Option<f64>,
    /// Context that the model was trained with before YaRN [default: the file's]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub yarn_orig_ctx: Option<usize>,
    /// Leave weights as the file has them, where they would be repacked for ggml's kernels (-nr)
    #[arg(long)]
    pub no_repack: bool,
    /// Where threads run on machines with several memory nodes: spread over all (distribute), on the node of the start
    /// (isolate), or where numactl says
    #[arg(long, value_name = "HOW")]
    pub numa: Option<Numa>,
    /// LoRA adapters of the model (GGUF), several by commas or by repeating the option
    #[arg(long, value_name = "FILE,...", value_delimiter = ',')]
    pub lora: Vec<PathBuf>,
    /// As --lora, each multiplied by a number of one's own
    #[arg(long, value_name = "FILE:SCALE,...", value_delimiter = ',', value_parser = scaled_lora)]
    pub lora_scaled: Vec<(PathBuf, f32)>,
    /// Tell more on stderr
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    pub lazy: LazyFlags,
}

/// A model that is not here yet.
#[cfg(feature = "download")]
#[derive(Debug, Args)]
pub struct DownloadArgs {
    /// Fetch the model from this repository, if it is not in the cache that other programs share (-hf) [default QUANT:
    /// Q4_K_M, or what there is]
    #[arg(long, value_name = "USER/MODEL[:QUANT]", conflicts_with = "model_url")]
    pub hf_repo: Option<String>,
    /// The file's name in that repository (-hff)
    #[arg(long, value_name = "FILE")]
    pub hf_file: Option<String>,
    /// Who fetches (-hft) [default: what other programs have kept]
    #[arg(long, value_name = "TOKEN", hide_default_value = true)]
    pub hf_token: Option<String>,
    /// Fetch the model from this address, into --model or else llama.cpp's cache (-mu)
    #[arg(long, value_name = "URL")]
    pub model_url: Option<String>,
    /// Fetch nothing: take what was fetched before
    #[arg(long)]
    pub offline: bool,
}

/// Where threads run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Numa {
    Distribute,
    Isolate,
    Numactl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlashAttn {
    On,
    Off,
    Auto,
}

fn flash_attn(text: &str) -> Result<FlashAttn, String> {
    match text {
        "on" | "1" | "true" | "enabled" => Ok(FlashAttn::On),
        "off" | "0" | "false" | "disabled" => Ok(FlashAttn::Off),
        "auto" | "-1" => Ok(FlashAttn::Auto),
        _ => Err("it must be on, off or auto".to_owned()),
    }
}

/// `KEY=TYPE:VALUE`, as llama.cpp takes it.
fn key_override(text: &str) -> Result<(String, Override), String> {
    let form = "it must be KEY=int:N, KEY=float:X, KEY=bool:true or KEY=str:TEXT";
    let (key, typed) = text.split_once('=').ok_or(form)?;
    let (ty, value) = typed.split_once(':').ok_or(form)?;
    let value = match ty {
        "int" => Override::Int(value.parse().map_err(|_| format!("{value} is no whole number: {form}"))?),
        "float" => Override::Float(value.parse().map_err(|_| format!("{value} is no number: {form}"))?),
        "bool" => Override::Bool(value.parse().map_err(|_| format!("{value} is neither true nor false: {form}"))?),
        "str" => Override::Str(value.to_owned()),
        _ => return Err(form.to_owned()),
    };
    Ok((key.to_owned(), value))
}

/// `FILE:SCALE`; a path may have colons itself.
fn scaled_lora(text: &str) -> Result<(PathBuf, f32), String> {
    let (path, scale) = text.rsplit_once(':').ok_or("it must be FILE:SCALE")?;
    match scale.parse::<f32>() {
        Ok(scale) if scale.is_finite() => Ok((path.into(), scale)),
        _ => Err(format!("{scale} is no number: it must be FILE:SCALE")),
    }
}
