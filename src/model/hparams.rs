use super::Error;
use crate::{
    ggml::{Rope, RopeKind},
    gguf::Gguf,
};

/// Layers beyond this are no model but a damaged file (llama.cpp's own limit).
const MAX_LAYERS: usize = 512;

/// A model's hyper-parameters, checked: counts are not zero and fit each other.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Hparams {
    pub architecture: String,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// The context length that the model was trained for.
    pub n_ctx_train: usize,
    /// Width of the hidden states.
    pub n_embd: usize,
    pub n_layer: usize,
    /// Query heads of a layer.
    pub n_head: usize,
    /// Key and value heads of a layer; each serves `n_head / n_head_kv` query heads.
    pub n_head_kv: usize,
    /// Elements of a head.
    pub head_size: usize,
    /// Width of the feed-forward.
    pub n_ff: usize,
    pub rms_eps: f32,
    pub rope: Rope,
    /// For each layer the tokens that a query sees, its own included, when the layer is sliding-window by design.
    pub windows: Vec<Option<usize>>,
}

impl Hparams {
    /// Reads and checks the keys under the file's architecture.
    pub(super) fn read(file: &Gguf) -> Result<Hparams, Error> {
        let architecture = file.architecture()?.to_owned();
        let keys = Keys { file, architecture: &architecture };

        let n_embd = keys.count("embedding_length")?;
        let n_layer = keys.count("block_count")?;
        if n_layer > MAX_LAYERS {
            return Err(keys.error("block_count", format!("{n_layer} layers; at most {MAX_LAYERS} are supported")));
        }
        let n_head = keys.count("attention.head_count")?;
        let n_head_kv = keys.optional_count("attention.head_count_kv")?.unwrap_or(n_head);
        if n_head % n_head_kv != 0 {
            let why = format!("{n_head_kv} KV heads do not divide the {n_head} heads");
            return Err(keys.error("attention.head_count_kv", why));
        }
        let head_size = match keys.optional_count("attention.key_length")? {
            Some(size) => size,
            None if n_embd % n_head == 0 => n_embd / n_head,
            None => {
                let why = format!("{n_head} heads do not divide the embedding length {n_embd}");
                return Err(keys.error("attention.head_count", why));
            }
        };
        if head_size % 2 != 0 {
            return Err(keys.error("attention.key_length", format!("a head of {head_size} elements is odd")));
        }
        let value_size = keys.optional_count("attention.value_length")?.unwrap_or(head_size);
        if value_size != head_size {
            let why = format!("{value_size}, but keys have {head_size} elements a head; other sizes are unsupported");
            return Err(keys.error("attention.value_length", why));
        }
        let n_rot = keys.optional_count("rope.dimension_count")?.unwrap_or(head_size);
        if n_rot != head_size {
            let why = format!("{n_rot}, expected the head's {head_size} elements");
            return Err(keys.error("rope.dimension_count", why));
        }
        let n_ctx_train = keys.count("context_length")?;
        if let Some(experts) = keys.optional_u32("expert_count")?.filter(|&n| n > 0) {
            return Err(keys.error("expert_count", format!("{experts} experts: mixtures are not supported yet")));
        }
        let rms_eps = file.require_f32(&keys.name("attention.layer_norm_rms_epsilon"))?;
        if !(rms_eps.is_finite() && rms_eps >= 0.0) {
            return Err(keys.error("attention.layer_norm_rms_epsilon", format!("{rms_eps} is no epsilon")));
        }

        let n_vocab = match file.tensor("token_embd.weight") {
            Some(tensor) => tensor.shape[1] as usize,
            None => {
                let (path, tensor) = (file.path().to_owned(), "token_embd.weight".into());
                return Err(Error::MissingTensor { path, tensor });
            }
        };

        Ok(Hparams {
            n_vocab,
            n_ctx_train,
            n_embd,
            n_layer,
            n_head,
            n_head_kv,
            head_size,
            n_ff: keys.count("feed_forward_length")?,
            rms_eps,
            rope: keys.rope(n_rot, n_ctx_train)?,
            windows: vec![keys.window()?; n_layer],
            architecture,
        })
    }

    /// Bytes that one token takes in an uncompressed f16 cache, over all layers.
    pub fn f16_kv_bytes_per_token(&self) -> usize {
        self.n_layer * self.f16_kv_bytes_per_layer()
    }

    /// Bytes that `n` tokens take in an uncompressed f16 cache: layers that are sliding-window by design hold their
    /// window.
    pub fn f16_kv_bytes(&self, n: usize) -> usize {
        let tokens: usize = self.windows.iter().map(|window| window.map_or(n, |window| n.min(window))).sum();
        tokens * self.f16_kv_bytes_per_layer()
    }

    fn f16_kv_bytes_per_layer(&self) -> usize {
        2 * self.n_head_kv * self.head_size * 2
    }
}

/// The keys below an architecture's name.
struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn error(&self, key: &str, why: String) -> Error {
        Error::Key { path: self.file.path().to_owned(), key: self.name(key), why }
    }

    fn optional_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        Ok(self.file.u32(&self.name(key))?)
    }

    /// A count that must be there and not zero.
    fn count(&self, key: &str) -> Result<usize, Error> {
        let count = self.file.require_u32(&self.name(key))?;
        self.nonzero(key, count)
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, Error> {
        self.optional_u32(key)?.map(|count| self.nonzero(key, count)).transpose()
    }

    fn nonzero(&self, key: &str, count: u32) -> Result<usize, Error> {
        match count {
            0 => Err(self.error(key, "is zero".into())),
            // ggml counts in i32 in places; no model comes near.
            count if count > i32::MAX as u32 => Err(self.error(key, format!("{count} is too large"))),
            count => Ok(count as usize),
        }
    }

    /// `attention.sliding_window`, where it is not 0.
    fn window(&self) -> Result<Option<usize>, Error> {
        Ok(self.optional_u32("attention.sliding_window")?.filter(|&n| n > 0).map(|n| n as usize))
    }

    fn optional_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        match self.file.f32(&self.name(key))? {
            Some(value) if !value.is_finite() => Err(self.error(key, format!("{value} is not finite"))),
            value => Ok(value),
        }
    }

    /// RoPE with linear or YaRN scaling, as llama.cpp derives it (its issue #17945 for YaRN's attention factor).
    fn rope(&self, n_rot: usize, n_ctx_train: usize) -> Result<Rope, Error> {
        let factor = match self.optional_f32("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.optional_f32("rope.scale_linear")?,
        };
        let factor = factor.filter(|&factor| factor != 0.0).unwrap_or(1.0);
        if factor < 0.0 {
            return Err(self.error("rope.scaling.factor", format!("{factor} is negative")));
        }
        let (freq_scale, ext_factor) = match self.file.str(&self.name("rope.scaling.type"))? {
            None | Some("linear") => (1.0 / factor, 0.0),
            Some("none") => (1.0, 0.0),
            Some("yarn") => (1.0 / factor, 1.0),
            Some(other) => {
                let why = format!("\"{other}\" is not supported (supported: none, linear, yarn)");
                return Err(self.error("rope.scaling.type", why));
            }
        };
        // ggml multiplies by 1 + 0.1 ln(factor) itself; below a factor of 1 that must be taken back.
        let yarn_attn = |factor: f32| if factor <= 1.0 { 1.0 / (1.0 + 0.1 * factor.ln()) } else { 1.0 };
        let attn_factor = if ext_factor == 0.0 { 1.0 } else { yarn_attn(1.0 / freq_scale) };
        Ok(Rope {
            kind: RopeKind::Norm,
            n_rot,
            n_ctx_orig: self
                .optional_u32("rope.scaling.original_context_length")?
                .filter(|&n| n > 0)
                .map_or(n_ctx_train, |n| n as usize),
            freq_base: self.optional_f32("rope.freq_base")?.unwrap_or(10_000.0),
            freq_scale,
            ext_factor,
            attn_factor: attn_factor * self.optional_f32("rope.scaling.attn_factor")?.unwrap_or(1.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
        })
    }
}
