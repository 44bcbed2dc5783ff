//! A loaded model: hyper-parameters, weights, vocabulary, and the graph of each architecture's layer.

mod cohere2;
mod exaone4;
mod gemma;
mod gemma2;
mod gemma3;
mod glm4;
mod gpt_oss;
mod granite;
mod granitemoe;
mod hparams;
mod identity;
mod llama;
mod mistral3;
mod olmo2;
mod olmoe;
mod parts;
mod phi3;
mod placement;
mod qwen2;
mod qwen2moe;
mod qwen3;
mod qwen3moe;
mod seed_oss;
mod smollm3;
mod weights;

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use hparams::Hparams;
use hparams::Keys;
pub(crate) use identity::FINGERPRINT_BYTES;
use parts::{Builder, Decoder};
pub(crate) use placement::Placement;

#[doc(inline)]
pub use crate::ggml::{Rope, RopeKind};
use crate::{
    ggml::{self, Device, Graph, Tensor},
    gguf::{self, Gguf, Override, Value},
    vocab::{Vocab, VocabError},
};

/// What can go wrong while a model is loaded. Every message names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error("{path}: architecture \"{architecture}\" is not supported (supported: {supported})")]
    Architecture { path: PathBuf, architecture: String, supported: String },
    #[error("{path}: key {key}: {why}")]
    Key { path: PathBuf, key: String, why: String },
    #[error("{path}: tensor {tensor} is missing; the file is incomplete or of another architecture")]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{path}: tensor {tensor}: {why}")]
    Tensor { path: PathBuf, tensor: String, why: String },
    #[error("{path}: vocabulary: {source}")]
    Vocab { path: PathBuf, source: VocabError },
    #[error("{path}: loading was cancelled")]
    Cancelled { path: PathBuf },
    #[error("{path}: {source}")]
    Ggml { path: PathBuf, source: ggml::Error },
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct ModelParams {
    /// Repack weights for the processor's matrix kernels where it has any for their type (llama.cpp's `--repack`).
    /// Repacked weights are a copy; prefill is much faster with them.
    pub repack: bool,
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
}

impl Default for ModelParams {
    fn default() -> Self {
        ModelParams {
            repack: true,
            overrides: Vec::new(),
            progress: None,
            devices: None,
            gpu_layers: None,
            tensor_split: Vec::new(),
        }
    }
}

/// A function that is told the share of the weights that is loaded, from 0 to 1, and answers whether to go on.
#[derive(Clone)]
pub struct Progress(pub Arc<dyn Fn(f32) -> bool + Send + Sync>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// An architecture: how its layers' graphs are built. It knows nothing of sequences or caches.
pub(crate) trait Architecture: Send + Sync {
    /// Token ids `[n]` (i32) → hidden states `[n_embd, n]`.
    fn embed(&self, graph: &Graph, ids: &Tensor) -> Tensor;

    /// Hidden states `[n_embd, n]` through one layer. With `keep` (i32 row numbers) only those tokens are carried on
    /// after the attention: they are all that the output needs of the last layer.
    fn layer(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor;

    /// Hidden states `[n_embd, n]` that leave the last layer → the same after the final norm.
    fn norm(&self, graph: &Graph, hidden: &Tensor) -> Tensor;

    /// Hidden states `[n_embd, n]` after the final norm → logits `[n_vocab, n]`.
    fn logits(&self, graph: &Graph, normed: &Tensor) -> Tensor;
}

/// What a layer's graph is built from.
pub(crate) struct LayerStep<'a> {
    pub index: usize,
    pub hidden: &'a Tensor,
    /// Positions of the tokens `[n]` (i32).
    pub positions: &'a Tensor,
    pub keep: Option<&'a Tensor>,
    /// Tokens that the sequence may grow to.
    pub n_ctx: usize,
}

impl LayerStep<'_> {
    /// The tokens of `[n_embd, n]` that are carried on after the attention.
    fn kept(&self, graph: &Graph, rows: &Tensor) -> Tensor {
        self.keep.map_or_else(|| rows.clone(), |keep| graph.get_rows(rows, keep))
    }
}

/// Attention over a cache, given by the engine.
pub(crate) trait Attention {
    /// `q` `[head size, heads, n]`, `k` and `v` `[head size, KV heads, n]`, RoPE applied → `[head size × heads, n]`.
    fn attend(
        &mut self,
        graph: &Graph,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions<'_>,
    ) -> Tensor;
}

/// How a layer's attention weights come from its queries and keys. Which keys a query sees is the engine's to know
/// ([`Hparams::windows`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionOptions<'a> {
    /// Products of queries and keys are multiplied by this.
    pub scale: f32,
    /// `c` bends the scaled products `x` to `c·tanh(x/c)`.
    pub softcap: Option<f32>,
    /// A learned logit of each head `[heads]`, f32: it counts in the softmax's sum and has no value.
    pub sinks: Option<&'a Tensor>,
}

const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

type Build = fn(&mut Builder<'_>) -> Result<Decoder, Error>;

/// The architectures that can be run, by the name in their files: a new one is a file of its own and a line here.
const ARCHITECTURES: &[(&str, Build)] = &[
    ("cohere2", cohere2::build),
    ("exaone4", exaone4::build),
    ("gemma", gemma::build),
    ("gemma2", gemma2::build),
    ("gemma3", gemma3::build),
    ("glm4", glm4::build),
    ("gpt-oss", gpt_oss::build),
    ("granite", granite::build),
    ("granitemoe", granitemoe::build),
    ("llama", llama::build),
    ("mistral3", mistral3::build),
    ("olmo2", olmo2::build),
    ("olmoe", olmoe::build),
    ("phi3", phi3::build),
    ("qwen2", qwen2::build),
    ("qwen2moe", qwen2moe::build),
    ("qwen3", qwen3::build),
    ("qwen3moe", qwen3moe::build),
    ("seed_oss", seed_oss::build),
    ("smollm3", smollm3::build),
];

/// A model, ready to run. Cloning shares it: weights are never copied for a session.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    hparams: Hparams,
    architecture: Box<dyn Architecture>,
    vocab: Vocab,
    name: Option<String>,
    /// Or why it is none.
    chat_template: Result<Option<String>, String>,
    weight_bytes: usize,
    placement: Placement,
    fingerprint: [u8; FINGERPRINT_BYTES],
}

impl Model {
    /// Loads a GGUF file; of a split model the first file (`…-00001-of-0000N.gguf`).
    ///
    /// Weights stay in the mapped file, except those that the processor's kernels want repacked and those of layers on
    /// other devices.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, is of an unknown architecture, or does not fit into memory.
    pub fn load(path: impl AsRef<Path>, params: &ModelParams) -> Result<Model, Error> {
        // Before the first large block is freed, so that what loading needs meanwhile goes back, too.
        ggml::map_large_blocks(1 << 20);
        let path = path.as_ref();
        let file = open(path, params)?;
        let (architecture, Builder { hparams, loader, .. }, placement) = build(&file, path, params)?;
        let architecture = Box::new(architecture);
        let weight_bytes = loader.finish(params.progress.as_ref())?;
        let vocab = Vocab::load_checked(path, &params.overrides)
            .map_err(|source| Error::Vocab { path: path.to_owned(), source })?;
        if vocab.n_tokens() != hparams.n_vocab {
            return Err(Error::Key {
                path: path.to_owned(),
                key: "tokenizer.ggml.tokens".into(),
                why: format!("{} tokens, but token_embd.weight has {} rows", vocab.n_tokens(), hparams.n_vocab),
            });
        }
        let name = file.text("general.name")?.map(Cow::into_owned);
        // Only those who use it need it.
        let chat_template = match file.get(CHAT_TEMPLATE) {
            None => Ok(None),
            Some(Value::String(text)) => {
                let text = std::str::from_utf8(text).map(|text| Some(text.to_owned()));
                text.map_err(|error| format!("it is no UTF-8 text ({error})"))
            }
            Some(other) => Err(format!("it is {}, but a string is needed", other.describe())),
        };
        let path = path.to_owned();
        let fingerprint = identity::fingerprint(&file, &hparams);
        let inner =
            Inner { path, hparams, architecture, vocab, name, chat_template, weight_bytes, placement, fingerprint };
        Ok(Model { inner: Arc::new(inner) })
    }

    /// Where a model would be, from the file's header.
    pub(crate) fn plan(path: &Path, params: &ModelParams) -> Result<Planned, Error> {
        let file = open(path, params)?;
        let (_, Builder { hparams, loader, .. }, placement) = build(&file, path, params)?;
        let weights = loader.device_bytes();
        Ok(Planned { hparams, placement, weights })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The model's name as the file gives it.
    pub fn name(&self) -> Option<&str> {
        self.inner.name.as_deref()
    }

    pub fn hparams(&self) -> &Hparams {
        &self.inner.hparams
    }

    pub fn vocab(&self) -> &Vocab {
        &self.inner.vocab
    }

    /// The Jinja chat template in the file.
    ///
    /// # Errors
    /// When the file's is no UTF-8 text.
    pub fn chat_template(&self) -> Result<Option<&str>, Error> {
        match &self.inner.chat_template {
            Ok(template) => Ok(template.as_deref()),
            Err(why) => {
                let why = format!("{why}; name another template");
                Err(Error::Key { path: self.inner.path.clone(), key: CHAT_TEMPLATE.to_owned(), why })
            }
        }
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        self.inner.weight_bytes
    }

    /// The device that a layer's weights are on, and its caches with them.
    pub fn layer_device(&self, layer: usize) -> Device {
        self.inner.placement.layer(layer)
    }

    /// The device of the output matrix.
    pub fn output_device(&self) -> Device {
        self.inner.placement.output()
    }

    /// The devices in use besides the processor.
    pub fn devices(&self) -> Vec<Device> {
        self.inner.placement.devices()
    }

    /// What tells these weights from any others.
    pub(crate) fn fingerprint(&self) -> &[u8; FINGERPRINT_BYTES] {
        &self.inner.fingerprint
    }

    pub(crate) fn architecture(&self) -> &dyn Architecture {
        &*self.inner.architecture
    }
}

/// A model that is not loaded.
pub(crate) struct Planned {
    pub hparams: Hparams,
    pub placement: Placement,
    /// Bytes of weights on devices; one may be named more than once.
    pub weights: Vec<(Device, usize)>,
}

fn open(path: &Path, params: &ModelParams) -> Result<Gguf, Error> {
    let mut file = Gguf::open(path)?;
    for (key, value) in &params.overrides {
        file.set_override(key, value.clone());
    }
    Ok(file)
}

/// A model whose tensors are checked and have no memory yet.
fn build<'a>(file: &'a Gguf, path: &Path, params: &ModelParams) -> Result<(Decoder, Builder<'a>, Placement), Error> {
    let architecture = file.architecture()?;
    let Some((_, build)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
        return Err(Error::Architecture {
            path: path.to_owned(),
            architecture: gguf::shown(architecture.as_bytes()),
            supported: ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
        });
    };
    let keys = Keys { file, architecture };
    let hparams = Hparams::read(&keys)?;
    gguf::check_vocab(file)?;
    let placement = Placement::new(hparams.n_layer, params);
    let loader = weights::Loader::new(file, params.repack, placement.clone());
    let mut builder = Builder { keys, hparams, loader };
    let decoder = build(&mut builder)?;
    Ok((decoder, builder, placement))
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("path", &self.inner.path).field("hparams", &self.inner.hparams).finish()
    }
}
