//! What tells a model from others: for the states and profiles that belong to it.

use sha2::{Digest, Sha256};

use super::Hparams;
use crate::{ggml::Type, gguf::Gguf, lazy::Identity};

/// Bytes of a [`fingerprint`].
pub(crate) const FINGERPRINT_BYTES: usize = 32;

/// Tensors whose data a fingerprint looks at, and bytes of each: enough to tell weights apart without reading a file that
/// is mapped.
const SAMPLES: usize = 64;
const SAMPLE_BYTES: usize = 64;

/// What tells a file's weights from any others, also from other quantisations of the same model, and RoPE settings that
/// keys depend on: for states.
pub(super) fn fingerprint(file: &Gguf, hparams: &Hparams) -> [u8; FINGERPRINT_BYTES] {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}", hparams.rope));
    let tensors = file.tensors();
    let step = tensors.len().div_ceil(SAMPLES).max(1);
    for (index, tensor) in tensors.iter().enumerate() {
        hash.update(format!("{} {} {:?}", tensor.name, tensor.ty, tensor.shape));
        if index % step == 0 {
            let data = file.data(tensor);
            hash.update(&data[..data.len().min(SAMPLE_BYTES)]);
        }
    }
    hash.finalize().into()
}

/// What tells a model from others, whatever its quantisation: for profiles.
pub(super) fn identity(file: &Gguf, hparams: &Hparams, name: Option<&str>) -> Identity {
    let mut hash = Sha256::new();
    for layer in 0..hparams.n_layer {
        for norm in ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"] {
            if let Some(tensor) = file.tensor(&format!("blk.{layer}.{norm}.weight")).filter(|t| t.ty == Type::F32) {
                hash.update(file.data(tensor));
            }
        }
    }
    Identity {
        name: name.map(str::to_owned),
        architecture: hparams.architecture.clone(),
        n_layer: hparams.n_layer,
        n_embd: hparams.n_embd,
        n_head: hparams.n_head,
        n_head_kv: hparams.n_head_kv,
        norms_sha256: hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}
