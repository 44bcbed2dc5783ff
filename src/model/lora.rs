//! LoRA adapters (arXiv 2106.09685): matrices of low rank beside a model's weights, in a GGUF file of their own.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Error, Model, ModelParams, weights::Loader};
use crate::{
    ggml::{Adapted, LowRank, Tensor},
    gguf::Gguf,
    vocab::Token,
};

const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION_TOKENS: &str = "adapter.alora.invocation_tokens";
const TABLE: &str = "token_embd.weight";

/// A LoRA adapter of a loaded model, in llama.cpp's format (`convert_lora_to_gguf.py`). Cloning shares it.
///
/// It applies where a session is given it ([`SessionParams::adapters`](crate::SessionParams::adapters)), in the graph: the
/// model's weights stay as they are.
#[derive(Clone)]
pub struct LoraAdapter {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    model: Model,
    /// 0 for none: products are then multiplied by the session's scale alone.
    alpha: f32,
    invocation_tokens: Vec<Token>,
    pairs: Vec<Pair>,
}

/// The two matrices beside one weight.
struct Pair {
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    rank: usize,
}

impl LoraAdapter {
    /// Loads an adapter of this model, to the devices that its layers are on.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, no LoRA adapter, one of another architecture, or its matrices do not fit
    /// the model's. Changes to norms are passed over, as llama.cpp does.
    pub fn load(model: &Model, path: impl AsRef<Path>) -> Result<LoraAdapter, Error> {
        let path = path.as_ref();
        let file = Gguf::open(path)?;
        let params = ModelParams { repack: false, ..ModelParams::default() };
        check_kind(&file, model)?;
        let mut loader = Loader::new(&file, &params, model.placement().clone());
        let mut pairs = Vec::new();
        for info in file.tensors() {
            let name = info.name.as_str();
            match name.strip_suffix(".lora_a") {
                Some(weight) => {
                    pairs.push(Pair::load(&mut loader, model, path, weight, info.shape.map(|n| n as usize))?)
                }
                None if name.ends_with(".lora_b") => {}
                None if name.ends_with("_norm.weight") => loader.ignore(name.to_owned()),
                None => return Err(wrong(path, name, "is neither a lora_a nor a lora_b".to_owned())),
            }
        }
        loader.finish(None)?;
        let alpha = file.f32(ALPHA)?.unwrap_or(0.0);
        let invocation_tokens = file.i32s(INVOCATION_TOKENS)?.unwrap_or_default();
        let (path, model) = (path.to_owned(), model.clone());
        Ok(LoraAdapter { inner: Arc::new(Inner { path, model, alpha, invocation_tokens, pairs }) })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The tokens after which the adapter is meant to apply (activated LoRA); none for an ordinary one. Who uses it sees to
    /// that, by the sessions' scales.
    pub fn invocation_tokens(&self) -> &[Token] {
        &self.inner.invocation_tokens
    }

    /// Whether it was loaded for this model.
    #[doc(hidden)]
    pub fn fits(&self, model: &Model) -> bool {
        self.inner.model.is_same(model)
    }

    /// Whether both are the same adapter in memory.
    pub(crate) fn is_same(&self, other: &LoraAdapter) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Adds what it adds to products, `scale` times.
    pub(crate) fn add_to(&self, adapted: &mut Adapted, scale: f32) {
        for Pair { weight, a, b, rank } in &self.inner.pairs {
            let alpha = self.inner.alpha;
            let scale = if alpha == 0.0 { scale } else { scale * alpha / *rank as f32 };
            adapted.add(weight, LowRank { a: a.clone(), b: b.clone(), scale });
        }
    }
}

impl Pair {
    /// `{name}.lora_a`, of `shape`, and `{name}.lora_b`, checked against the model's weight.
    fn load(loader: &mut Loader<'_>, model: &Model, path: &Path, name: &str, shape: [usize; 4]) -> Result<Pair, Error> {
        let (a, b) = (format!("{name}.lora_a"), format!("{name}.lora_b"));
        let Some(weight) = model.weight(name) else {
            let why = format!("the model has no tensor {name}: the adapter is of another model");
            return Err(wrong(path, &a, why));
        };
        let [n_in, n_out, n_expert, _] = weight.shape();
        // The table's first matrix is looked up in, as the table is, so that it lies the other way round.
        if name == TABLE {
            let rank = shape[0];
            let pair = (loader.table(&a, [rank, n_out])?, loader.experts(&b, [rank, n_in, 1])?);
            return Ok(Pair { weight: weight.clone(), a: pair.0, b: pair.1, rank });
        }
        let rank = shape[1];
        let a = loader.experts(&a, [n_in, rank, n_expert])?;
        let b = loader.experts(&b, [rank, n_out, n_expert])?;
        Ok(Pair { weight: weight.clone(), a, b, rank })
    }
}

/// Refuses a file that is no LoRA adapter for this model's architecture.
fn check_kind(file: &Gguf, model: &Model) -> Result<(), Error> {
    let architecture = model.hparams().architecture.as_str();
    for (key, expected) in
        [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", architecture)]
    {
        let found = file.text(key)?.unwrap_or_default();
        if found != expected {
            let why = format!("is \"{found}\", but a LoRA adapter of this model has \"{expected}\"");
            return Err(Error::Key { path: file.path().to_owned(), key: key.to_owned(), why });
        }
    }
    Ok(())
}

fn wrong(path: &Path, tensor: &str, why: String) -> Error {
    Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), why }
}

impl fmt::Debug for LoraAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoraAdapter").field("path", &self.inner.path).finish_non_exhaustive()
    }
}
