use sha2::{Digest, Sha256};

use super::{Error, Model};
use crate::{ggml::Type, gguf::Gguf, lazy::Identity};

impl Model {
    /// What tells this model from others, whatever its quantisation: for profiles.
    ///
    /// # Errors
    /// When the file cannot be read any more.
    pub fn identity(&self) -> Result<Identity, Error> {
        let file = Gguf::open(self.path())?;
        let mut hash = Sha256::new();
        let hparams = self.hparams();
        for layer in 0..hparams.n_layer {
            for norm in ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"] {
                if let Some(tensor) = file.tensor(&format!("blk.{layer}.{norm}.weight")).filter(|t| t.ty == Type::F32) {
                    hash.update(file.data(tensor));
                }
            }
        }
        Ok(Identity {
            name: self.name().map(str::to_owned),
            architecture: hparams.architecture.clone(),
            n_layer: hparams.n_layer,
            n_embd: hparams.n_embd,
            n_head: hparams.n_head,
            n_head_kv: hparams.n_head_kv,
            norms_sha256: hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}
