//! What of a model goes to which device.

use clap::{ArgAction, Args};

use super::values::positive;

/// What of a model goes to which device.
#[derive(Debug, Args)]
pub struct PlacementFlags {
    /// Last layers to put on devices, the output counting as one: a number, auto or all (-ngl) [default: all]
    #[arg(long, alias = "n-gpu-layers", value_name = "N", value_parser = gpu_layers, allow_negative_numbers = true)]
    pub gpu_layers: Option<GpuLayers>,
    /// Devices to use besides the processor, or none (-dev) [default: all; see the command devices]
    #[arg(long, value_name = "DEV,...", value_delimiter = ',')]
    pub device: Vec<String>,
    /// How to share the layers out over the devices: 3,1 (-ts) [default: by their free memory]
    #[arg(long, value_name = "N,...", value_parser = tensor_split)]
    pub tensor_split: Option<Split>,
    /// How layers are shared out: layer, or none for all on one device, --main-gpu (-sm)
    #[arg(long, value_name = "none|layer", default_value = "layer", value_parser = split_mode, hide_possible_values = true)]
    pub split_mode: SplitMode,
    /// The device for --split-mode none, by its number among the devices in use (-mg)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub main_gpu: usize,
    /// Have tensors whose names match a pattern on a device, wherever their layers are (-ot): \.ffn_.*_exps=CPU
    #[arg(long, value_name = "PATTERN=DEV,...", value_delimiter = ',', action = ArgAction::Append, value_parser = tensor_override)]
    pub override_tensor: Vec<(String, String)>,
    /// Keep all experts with the processor (-cmoe)
    #[arg(long)]
    pub cpu_moe: bool,
    /// Keep the experts of the first N layers with the processor (-ncmoe)
    #[arg(long, value_name = "N")]
    pub n_cpu_moe: Option<usize>,
    /// Keep the feed-forward matrices of the first N layers that have no experts with the processor (-ncffn)
    #[arg(long, value_name = "N")]
    pub n_cpu_ffn: Option<usize>,
    /// Send no weights of the processor's to devices for products of many tokens
    #[arg(long, overrides_with = "op_offload")]
    pub no_op_offload: bool,
    /// Send them there where the device wants it, the default
    #[arg(long, hide = true)]
    pub op_offload: bool,
    /// Fit what is not given to the devices' free memory: the context, and what of layers and experts is on devices (-fit)
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_value = "on", default_missing_value = "on", value_parser = on_or_off, hide_possible_values = true)]
    pub fit: OnOrOff,
    /// MiB that --fit leaves free on each device, for what is computed with (-fitt)
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', default_value = "1024")]
    pub fit_target: Vec<usize>,
    /// Tokens below which --fit makes no context (-fitc)
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positive)]
    pub fit_ctx: usize,
    /// Servers whose devices to use as well: rpc-server's, here or of llama.cpp
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub rpc: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuLayers {
    Auto,
    All,
    Number(u32),
}

fn gpu_layers(text: &str) -> Result<GpuLayers, String> {
    match text {
        "auto" | "-1" => Ok(GpuLayers::Auto),
        "all" | "-2" => Ok(GpuLayers::All),
        number => number.parse().map(GpuLayers::Number).map_err(|_| "it must be a number, auto or all".to_owned()),
    }
}

/// Proportions of layers on the devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Split(pub Vec<f32>);

fn tensor_split(text: &str) -> Result<Split, String> {
    let share = |part: &str| part.trim().parse().ok().filter(|share: &f32| *share >= 0.0 && share.is_finite());
    let shares: Option<Vec<f32>> = text.split([',', '/']).map(share).collect();
    shares.map(Split).ok_or_else(|| "it must be proportions such as 3,1".to_owned())
}

/// How layers are shared out over devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitMode {
    None,
    Layer,
}

fn split_mode(text: &str) -> Result<SplitMode, String> {
    match text {
        "none" => Ok(SplitMode::None),
        "layer" => Ok(SplitMode::Layer),
        "row" | "tensor" => Err("tensors go to devices whole: it must be none or layer".to_owned()),
        _ => Err("it must be none or layer".to_owned()),
    }
}

/// `PATTERN=DEVICE`, as llama.cpp takes it: the pattern ends at the first `=`.
fn tensor_override(text: &str) -> Result<(String, String), String> {
    let (pattern, device) = text.split_once('=').ok_or("it must be PATTERN=DEVICE, such as exps=CPU")?;
    Ok((pattern.to_owned(), device.to_owned()))
}

/// A switch with words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnOrOff {
    On,
    Off,
}

fn on_or_off(text: &str) -> Result<OnOrOff, String> {
    match text {
        "on" | "1" | "true" | "enabled" => Ok(OnOrOff::On),
        "off" | "0" | "false" | "disabled" => Ok(OnOrOff::Off),
        _ => Err("it must be on or off".to_owned()),
    }
}
