//! A model from its file to what sessions share: the order in which it is read, checked, placed and given memory.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Architecture, Error, Hparams, ModelParams, Placement, TensorPlace,
    hparams::Keys,
    identity::{self, FINGERPRINT_BYTES},
    parts::{Builder, Decoder},
    registry,
    weights::Loader,
};
use crate::{
    ggml::{self, Device, Tensor},
    gguf::{self, Gguf, Value},
    lazy::Identity,
    sampling::SamplerParams,
    vocab::Vocab,
};

const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

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
    weights: HashMap<String, Tensor>,
    weight_bytes: usize,
    tensors: Vec<TensorPlace>,
    placement: Placement,
    fingerprint: [u8; FINGERPRINT_BYTES],
    identity: Identity,
    sampler_params: SamplerParams,
}

impl Model {
    /// Loads a GGUF file; of a split model the first file (`…-00001-of-0000N.gguf`).
    ///
    /// Weights stay in the mapped file, except those that kernels for the processor want repacked and those of layers on
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
        let tensors = loader.places();
        let (weights, weight_bytes) = loader.finish(params.progress.as_ref())?;
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
        let identity = identity::identity(&file, &hparams, name.as_deref());
        let inner = Inner {
            path,
            hparams,
            architecture,
            vocab,
            name,
            chat_template,
            sampler_params: SamplerParams::recommended(&file),
            weights,
            weight_bytes,
            tensors,
            placement,
            fingerprint,
            identity,
        };
        Ok(Model { inner: Arc::new(inner) })
    }

    /// Where each tensor of a model would be if it was loaded so, in the file's order. No weights are read.
    ///
    /// # Errors
    /// When the file's header or one of its tensors is wrong.
    pub fn tensors_of(path: impl AsRef<Path>, params: &ModelParams) -> Result<Vec<TensorPlace>, Error> {
        Model::plan(path.as_ref(), params).map(|planned| planned.tensors)
    }

    /// Where a model would be, from the file's header.
    pub(crate) fn plan(path: &Path, params: &ModelParams) -> Result<Planned, Error> {
        let file = open(path, params)?;
        let (_, Builder { hparams, loader, .. }, placement) = build(&file, path, params)?;
        let tensors = loader.places();
        let name = file.text("general.name")?;
        let identity = identity::identity(&file, &hparams, name.as_deref());
        Ok(Planned { hparams, placement, tensors, identity })
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

    /// llama-cli's settings, with what the file recommends in their place (`general.sampling.…`).
    pub fn sampler_params(&self) -> &SamplerParams {
        &self.inner.sampler_params
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        self.inner.weight_bytes
    }

    /// Where each tensor is, in the file's order.
    pub fn tensors(&self) -> &[TensorPlace] {
        &self.inner.tensors
    }

    /// The weight of this name that layers multiply with, or the embedding table.
    pub(super) fn weight(&self, name: &str) -> Option<&Tensor> {
        self.inner.weights.get(name)
    }

    /// Whether both are the same model in memory.
    pub(crate) fn is_same(&self, other: &Model) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(super) fn placement(&self) -> &Placement {
        &self.inner.placement
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

    /// What tells this model from others, whatever its quantisation: for profiles.
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
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
    /// Where each tensor would be.
    pub tensors: Vec<TensorPlace>,
    pub identity: Identity,
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
    let build = registry::find(architecture, path)?;
    let keys = Keys { file, architecture };
    let hparams = Hparams::read(&keys)?;
    gguf::check_vocab(file)?;
    let placement = Placement::new(hparams.n_layer, params).map_err(Error::TensorOverride)?;
    let loader = Loader::new(file, params, placement.clone());
    let mut builder = Builder { keys, hparams, loader };
    let decoder = build(&mut builder)?;
    Ok((decoder, builder, placement))
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("path", &self.inner.path).field("hparams", &self.inner.hparams).finish()
    }
}
