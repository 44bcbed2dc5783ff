//! A loaded model: hyper-parameters, weights, vocabulary, and the graph of each architecture's layer.

mod hparams;
mod identity;
mod llama;
mod weights;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use hparams::Hparams;

use crate::{
    ggml::{self, Graph, Tensor},
    gguf::{self, Gguf},
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
    #[error("{path}: {source}")]
    Ggml { path: PathBuf, source: ggml::Error },
}

/// How to load a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelParams {
    /// Repack weights for the processor's matrix kernels where it has any for their type (llama.cpp's `--repack`).
    /// Repacked weights are a copy; prefill is much faster with them.
    pub repack: bool,
}

impl Default for ModelParams {
    fn default() -> Self {
        ModelParams { repack: true }
    }
}

/// An architecture: how its layers' graphs are built. It knows nothing of sequences or caches.
pub(crate) trait Architecture: Send + Sync {
    /// Token ids `[n]` (i32) → hidden states `[n_embd, n]`.
    fn embed(&self, graph: &Graph, ids: &Tensor) -> Tensor;

    /// Hidden states `[n_embd, n]` through one layer. With `keep` (i32 row numbers) only those tokens are carried on
    /// behind the attention: they are all that the output needs of the last layer.
    fn layer(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor;

    /// Hidden states `[n_embd, n]` → logits `[n_vocab, n]`.
    fn output(&self, graph: &Graph, hidden: &Tensor) -> Tensor;
}

/// What a layer's graph is built from.
pub(crate) struct LayerStep<'a> {
    pub index: usize,
    pub hidden: &'a Tensor,
    /// Positions of the tokens `[n]` (i32).
    pub positions: &'a Tensor,
    pub keep: Option<&'a Tensor>,
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

impl AttentionOptions<'_> {
    /// Scaled by `1/√head size`, and nothing else.
    pub fn plain(head_size: usize) -> Self {
        AttentionOptions { scale: 1.0 / (head_size as f32).sqrt(), softcap: None, sinks: None }
    }
}

type Build = fn(&Hparams, &mut weights::Loader<'_>) -> Result<Box<dyn Architecture>, Error>;

/// The architectures that can be run: a new one is a file of its own and a line here.
const ARCHITECTURES: &[(&str, Build)] = &[("llama", llama::build)];

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
    chat_template: Option<String>,
    weight_bytes: usize,
}

impl Model {
    /// Loads a GGUF file; of a split model the first file (`…-00001-of-0000N.gguf`).
    ///
    /// Weights stay in the mapped file, except those that the processor's kernels want repacked.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, is of an unknown architecture, or does not fit into memory.
    pub fn load(path: impl AsRef<Path>, params: &ModelParams) -> Result<Model, Error> {
        let path = path.as_ref();
        let file = Gguf::open(path)?;
        let architecture = file.architecture()?;
        let Some((_, build)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
            return Err(Error::Architecture {
                path: path.to_owned(),
                architecture: gguf::shown(architecture.as_bytes()),
                supported: ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
            });
        };
        let hparams = Hparams::read(&file)?;
        gguf::check_vocab(&file)?;
        let mut loader = weights::Loader::new(&file, params.repack);
        let architecture = build(&hparams, &mut loader)?;
        let weight_bytes = loader.finish()?;
        let vocab = Vocab::load_checked(path).map_err(|source| Error::Vocab { path: path.to_owned(), source })?;
        if vocab.n_tokens() != hparams.n_vocab {
            return Err(Error::Key {
                path: path.to_owned(),
                key: "tokenizer.ggml.tokens".into(),
                why: format!("{} tokens, but token_embd.weight has {} rows", vocab.n_tokens(), hparams.n_vocab),
            });
        }
        let text = |key: &str| file.str(key).map(|text| text.map(str::to_owned));
        let (name, chat_template) = (text("general.name")?, text("tokenizer.chat_template")?);
        let inner = Inner { path: path.to_owned(), hparams, architecture, vocab, name, chat_template, weight_bytes };
        Ok(Model { inner: Arc::new(inner) })
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
    pub fn chat_template(&self) -> Option<&str> {
        self.inner.chat_template.as_deref()
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        self.inner.weight_bytes
    }

    pub(crate) fn architecture(&self) -> &dyn Architecture {
        &*self.inner.architecture
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("path", &self.inner.path).field("hparams", &self.inner.hparams).finish()
    }
}
