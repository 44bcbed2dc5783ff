//! How a model is loaded: what a caller may set, and who is told how far loading is.

use std::{fmt, sync::Arc};

use crate::{ggml::Device, gguf::Override};

/// How to load a model.
#[derive(Debug, Clone)]
pub struct ModelParams {
    /// Repack weights for ggml's matrix kernels where it has any for their type (llama.cpp's `--repack`) and our own do not
    /// want them as they are. Repacked weights are a copy; ggml's prefill is much faster with them.
    pub repack: bool,
    /// Sessions will run ggml's kernels in place of our own ([`SessionParams::fused_attention`](crate::SessionParams) off):
    /// weights are repacked as llama.cpp does.
    pub ggml_kernels: bool,
    /// Values that take the place of the file's keys.
    pub overrides: Vec<(String, Override)>,
    /// Told how far loading is.
    pub progress: Option<Progress>,
    /// Devices that layers can be on besides the processor; `None` for all that there are.
    pub devices: Option<Vec<Device>>,
    /// Last layers that go to devices, the output counting as one after them; `None` for all.
    pub gpu_layers: Option<usize>,
    /// How the layers are shared out over the devices, in proportions. Empty, or all zero: by their free memory.
    pub tensor_split: Vec<f32>,
    /// Tensors that are elsewhere than their layer: a tensor is where the first of these says whose pattern its name matches.
    pub tensor_overrides: Vec<TensorOverride>,
}

impl Default for ModelParams {
    fn default() -> Self {
        ModelParams {
            repack: true,
            ggml_kernels: false,
            overrides: Vec::new(),
            progress: None,
            devices: None,
            gpu_layers: None,
            tensor_split: Vec::new(),
            tensor_overrides: Vec::new(),
        }
    }
}

/// Where tensors of certain names are: llama.cpp's `--override-tensor`.
///
/// Weights are multiplied where they are, and activations go there and back. Tables of embeddings stay with the processor
/// whatever is said of them, and caches are with their layers ([`ModelParams::gpu_layers`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorOverride {
    /// A regular expression of C++'s library (ECMAScript), which is searched for in the name.
    pub pattern: String,
    pub device: Device,
}

impl TensorOverride {
    /// All experts with the processor: llama.cpp's `--cpu-moe`.
    pub fn experts() -> TensorOverride {
        TensorOverride { pattern: EXPERTS.to_owned(), device: Device::cpu() }
    }

    /// The experts of the first `n` layers with the processor: llama.cpp's `--n-cpu-moe`.
    pub fn experts_of_first(n: usize) -> Vec<TensorOverride> {
        of_first(n, EXPERTS)
    }

    /// The feed-forward matrices of the first `n` layers that have no experts with the processor: llama.cpp's `--n-cpu-ffn`.
    pub fn feed_forward_of_first(n: usize) -> Vec<TensorOverride> {
        of_first(n, FEED_FORWARD)
    }
}

const EXPERTS: &str = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps";
const FEED_FORWARD: &str = r"\.ffn_(up|down|gate)\.";

fn of_first(n: usize, what: &str) -> Vec<TensorOverride> {
    let layer = |i| TensorOverride { pattern: format!(r"blk\.{i}{what}"), device: Device::cpu() };
    (0..n).map(layer).collect()
}

/// A function that is told the share of the weights that is loaded, from 0 to 1, and answers whether to go on.
#[derive(Clone)]
pub struct Progress(pub Arc<dyn Fn(f32) -> bool + Send + Sync>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}
