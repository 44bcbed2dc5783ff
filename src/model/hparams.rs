//! A model's hyper-parameters, read from its file's keys and checked against each other.

use super::Error;
use crate::{
    ggml::{Rope, RopeKind},
    gguf::{Gguf, Value},
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
    /// Query heads of the first layer.
    pub n_head: usize,
    /// Query heads of each layer.
    pub n_heads: Vec<usize>,
    /// Key and value heads of the first layer that has any.
    pub n_head_kv: usize,
    /// Key and value heads of each layer; each serves `n_heads[layer] / n_heads_kv[layer]` query heads.
    pub n_heads_kv: Vec<usize>,
    /// Elements of a head's queries and keys, where layers do not differ in them.
    pub head_size: usize,
    /// Elements of a head's queries and keys in each layer.
    pub head_sizes: Vec<usize>,
    /// Elements of a head's values, where layers do not differ in them.
    pub value_size: usize,
    /// Elements of a head's values in each layer.
    pub value_sizes: Vec<usize>,
    /// Whether a head's value is the beginning of its key, so that the cache holds keys alone.
    pub values_in_keys: bool,
    /// First layers to whose output a given embedding adds further rows (DeepStack): it has a row for each besides its own.
    pub n_deepstack: usize,
    /// For each layer the width of its feed-forward.
    pub n_ff: Vec<usize>,
    /// ε of the norms.
    pub norm_eps: f32,
    pub rope: Rope,
    /// For each layer the tokens that a query sees, its own included, when the layer is sliding-window by design.
    pub windows: Vec<Option<usize>>,
    /// Whether these are chunks: a query sees of its own chunk what is before it.
    pub chunked: bool,
    /// For each layer whether it attends to the tokens before.
    pub attends: Vec<bool>,
    /// For each layer that attends without keys and values of its own the earlier one whose it reads.
    pub shares: Vec<Option<usize>>,
    /// For each layer what it carries from token to token besides, where it is recurrent.
    pub states: Vec<Option<StateSize>>,
}

/// What a recurrent layer carries from token to token, in f32: as much after a thousand tokens as after one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSize {
    /// Elements of a convolution's last columns.
    pub columns: usize,
    /// Elements of the state matrices; 0 for a convolution alone.
    pub matrices: usize,
}

impl StateSize {
    /// Bytes of it.
    pub fn bytes(self) -> usize {
        (self.columns + self.matrices) * size_of::<f32>()
    }
}

impl Hparams {
    /// Reads the keys that all architectures have, without the weights: for a look at a file. What a layer of its
    /// architecture has besides (windows, other RoPE) is known once the model is loaded.
    ///
    /// # Errors
    /// When a key is missing or its value makes no sense.
    pub fn of(file: &Gguf) -> Result<Hparams, Error> {
        let architecture = file.architecture()?;
        Hparams::read(&Keys { file, architecture })
    }

    /// Reads and checks the keys that all architectures have. What they have besides is theirs to read and to put in.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Hparams, Error> {
        let n_embd = keys.count("embedding_length")?;
        let n_block = keys.count("block_count")?;
        if n_block > MAX_LAYERS {
            return Err(keys.error("block_count", format!("{n_block} layers; at most {MAX_LAYERS} are supported")));
        }
        // Layers that predict further tokens follow the others; they are not run.
        let n_next = keys.optional_u32("nextn_predict_layers")?.unwrap_or(0) as usize;
        let Some(n_layer) = n_block.checked_sub(n_next).filter(|&n| n > 0) else {
            return Err(keys.error("nextn_predict_layers", format!("{n_next} of {n_block} layers; some must be left")));
        };
        let counts = |key: &str| keys.optional_counts(key, n_block, n_layer);
        let n_heads = keys.require("attention.head_count", counts("attention.head_count")?)?;
        // Layers that do not attend have none.
        let n_heads_kv = counts("attention.head_count_kv")?.unwrap_or_else(|| n_heads.clone());
        let heads = || n_heads.iter().copied().zip(n_heads_kv.iter().copied());
        let attends = heads().map(|(n_head, n_head_kv)| n_head > 0 && n_head_kv > 0).collect();
        let first = |counts: &[usize]| counts.iter().copied().find(|&count| count > 0).unwrap_or_default();
        let (n_head, n_head_kv) = (first(&n_heads), first(&n_heads_kv));
        if let Some((n_head, n_head_kv)) = heads().find(|&(n_head, n_kv)| n_kv > 0 && n_head % n_kv != 0) {
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
        let n_rot = keys.optional_count("rope.dimension_count")?.unwrap_or(head_size);
        if n_rot > head_size || n_rot % 2 != 0 {
            let why = format!("{n_rot}, expected an even number up to the head's {head_size} elements");
            return Err(keys.error("rope.dimension_count", why));
        }
        let n_ctx_train = keys.count("context_length")?;
        let n_vocab = match keys.file.tensor("token_embd.weight") {
            Some(tensor) => tensor.shape[1] as usize,
            None => {
                let (path, tensor) = (keys.file.path().to_owned(), "token_embd.weight".into());
                return Err(Error::MissingTensor { path, tensor });
            }
        };

        Ok(Hparams {
            n_vocab,
            n_ctx_train,
            n_embd,
            n_layer,
            n_head,
            n_heads,
            n_head_kv,
            n_heads_kv,
            head_size,
            head_sizes: vec![head_size; n_layer],
            value_size,
            value_sizes: vec![value_size; n_layer],
            values_in_keys: false,
            n_deepstack: 0,
            n_ff: keys
                .require("feed_forward_length", keys.optional_counts("feed_forward_length", n_block, n_layer)?)?,
            norm_eps: keys.norm_eps()?,
            rope: keys.rope(n_rot, n_ctx_train)?,
            windows: vec![None; n_layer],
            attends,
            shares: vec![None; n_layer],
            states: vec![None; n_layer],
            chunked: false,
            architecture: keys.architecture.to_owned(),
        })
    }

    /// Bytes that one token takes in an uncompressed f16 cache, over all layers with keys and values of their own.
    pub fn f16_kv_bytes_per_token(&self) -> usize {
        self.stores().map(|layer| self.f16_kv_bytes_per_layer(layer)).sum()
    }

    /// Bytes that a sequence of `n` tokens takes uncompressed, with an f16 cache: layers that are sliding-window by design
    /// hold their window, recurrent ones their state.
    pub fn f16_kv_bytes(&self, n: usize) -> usize {
        let held = |layer: usize| self.windows[layer].map_or(n, |window| n.min(window));
        let rows: usize = self.stores().map(|layer| held(layer) * self.f16_kv_bytes_per_layer(layer)).sum();
        let states: usize = self.states.iter().flatten().map(|state| state.bytes()).sum();
        rows + if n > 0 { states } else { 0 }
    }

    fn f16_kv_bytes_per_layer(&self, layer: usize) -> usize {
        (self.key_width(layer) + if self.values_in_keys { 0 } else { self.value_width(layer) }) * 2
    }

    /// Elements of a row that is given in place of a token.
    pub fn n_embd_input(&self) -> usize {
        self.n_embd * (1 + self.n_deepstack)
    }

    /// Elements of a token's keys in one layer.
    pub(crate) fn key_width(&self, layer: usize) -> usize {
        self.head_sizes[layer] * self.n_heads_kv[layer]
    }

    /// Elements of a token's values in one layer.
    pub(crate) fn value_width(&self, layer: usize) -> usize {
        self.value_sizes[layer] * self.n_heads_kv[layer]
    }

    /// The layers with keys and values of their own.
    fn stores(&self) -> impl Iterator<Item = usize> {
        (0..self.n_layer).filter(|&layer| self.has_store(layer))
    }

    /// How many layers have keys and values of their own.
    pub(crate) fn n_stores(&self) -> usize {
        self.stores().count()
    }

    /// Whether a layer has keys and values of its own.
    pub fn has_store(&self, layer: usize) -> bool {
        self.attends.get(layer) == Some(&true) && self.shares[layer].is_none()
    }

    /// The layer whose keys and values a layer attends to: itself, or the one that it shares with.
    pub(crate) fn owner(&self, layer: usize) -> usize {
        self.shares[layer].unwrap_or(layer)
    }

    /// The last layer that reads a layer's keys and values.
    pub(crate) fn last_reader(&self, layer: usize) -> usize {
        self.shares.iter().rposition(|&owner| owner == Some(layer)).unwrap_or(layer)
    }

    /// What attention of a layer is like: elements of a head's keys and of its values, query heads, heads of keys and
    /// values. Of a layer that does not attend, those of the first that does.
    pub(crate) fn heads(&self, layer: usize) -> [usize; 4] {
        match self.attends[layer] {
            true => [self.head_sizes[layer], self.value_sizes[layer], self.n_heads[layer], self.n_heads_kv[layer]],
            false => [self.head_size, self.value_size, self.n_head, self.n_head_kv],
        }
    }

    /// Whether a layer can become lazy: it has keys and values of its own, and is not sliding-window by design. Those that
    /// read them become lazy with it.
    pub fn can_be_lazy(&self, layer: usize) -> bool {
        self.has_store(layer) && self.windows[layer].is_none()
    }

    /// Layers that can become lazy.
    pub(crate) fn n_scorable(&self) -> usize {
        (0..self.n_layer).filter(|&layer| self.can_be_lazy(layer)).count()
    }

    /// Whether a layer carries a state.
    pub fn is_recurrent(&self) -> bool {
        self.states.iter().any(Option::is_some)
    }
}

/// The keys below an architecture's name.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub file: &'a Gguf,
    pub architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub fn error(&self, key: &str, why: String) -> Error {
        Error::Key { path: self.file.path().to_owned(), key: self.name(key), why }
    }

    /// For what may be right and is not run.
    pub fn unsupported(&self, key: &str, why: String) -> Error {
        Error::Unsupported { path: self.file.path().to_owned(), key: self.name(key), why }
    }

    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        Ok(self.file.u32(&self.name(key))?)
    }

    /// A count that must be there and not zero.
    pub fn count(&self, key: &str) -> Result<usize, Error> {
        let count = self.file.require_u32(&self.name(key))?;
        self.nonzero(key, count)
    }

    pub fn optional_count(&self, key: &str) -> Result<Option<usize>, Error> {
        self.optional_u32(key)?.map(|count| self.nonzero(key, count)).transpose()
    }

    /// A count that is 0 where the file does not say.
    pub fn optional_count_or_zero(&self, key: &str) -> Result<usize, Error> {
        match self.optional_u32(key)?.unwrap_or(0) {
            0 => Ok(0),
            count => self.nonzero(key, count),
        }
    }

    /// First layers to whose output given embeddings add rows: fewer than there are layers.
    pub fn deepstack_layers(&self, n_layer: usize) -> Result<usize, Error> {
        let key = "n_deepstack_layers";
        match self.optional_count_or_zero(key)? {
            n if n < n_layer => Ok(n),
            n => Err(self.error(key, format!("{n}, expected fewer than the {n_layer} layers"))),
        }
    }

    fn require<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        Ok(self.file.require(&self.name(key), value)?)
    }

    /// A count for each of the `n_layer` layers that are run: one number for all, or a list with one for each of the
    /// file's `n_block`, of which some may be 0: layers that lack what is counted.
    pub fn optional_counts(&self, key: &str, n_block: usize, n_layer: usize) -> Result<Option<Vec<usize>>, Error> {
        let counts = match self.file.get(&self.name(key)) {
            Some(Value::Array(list)) if list.len() != n_block => {
                return Err(self.error(key, format!("a list of {} for {n_block} layers", list.len())));
            }
            Some(Value::Array(_)) => self.optional_list(key)?.unwrap_or_default(),
            _ => match self.optional_u32(key)? {
                Some(count) => vec![count; n_layer],
                None => return Ok(None),
            },
        };
        let counts: Vec<u32> = counts.into_iter().take(n_layer).collect();
        let some = counts.iter().copied().max().unwrap_or(0);
        self.nonzero(key, some)?;
        Ok(Some(counts.into_iter().map(|count| count as usize).collect()))
    }

    /// That a count, which a layer's may be 0 of in a list, is not.
    pub fn of_layer(&self, key: &str, counts: &[usize], layer: usize) -> Result<usize, Error> {
        match counts.get(layer) {
            Some(&count) if count > 0 => Ok(count),
            _ => Err(self.error(key, format!("is zero for layer {layer}, which has the tensors of what it counts"))),
        }
    }

    /// What all layers have alike, but for those that have none.
    pub fn all_equal(&self, key: &str, counts: &[usize]) -> Result<usize, Error> {
        let first_layer = counts.iter().position(|&count| count > 0).unwrap_or(0);
        let first = counts.get(first_layer).copied().unwrap_or_default();
        match counts.iter().position(|&count| count > 0 && count != first) {
            None => Ok(first),
            Some(layer) => {
                let why = format!(
                    "{first} in layer {first_layer}, but {} in layer {layer}; layers that differ in their heads are \
                     unsupported",
                    counts[layer]
                );
                Err(self.unsupported(key, why))
            }
        }
    }

    fn nonzero(&self, key: &str, count: u32) -> Result<usize, Error> {
        match count {
            0 => Err(self.error(key, "is zero".into())),
            // ggml counts in i32 in places; no model comes near.
            count if count > i32::MAX as u32 => Err(self.error(key, format!("{count} is too large"))),
            count => Ok(count as usize),
        }
    }

    /// `attention.layer_norm_rms_epsilon`, or `attention.layer_norm_epsilon` where the file has that instead.
    fn norm_eps(&self) -> Result<f32, Error> {
        let (key, mean_key) = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon");
        let (key, eps) = match self.file.f32(&self.name(key))? {
            Some(eps) => (key, eps),
            None => match self.file.f32(&self.name(mean_key))? {
                Some(eps) => (mean_key, eps),
                None => (key, self.require(key, None)?),
            },
        };
        if eps >= 0.0 { Ok(eps) } else { Err(self.error(key, format!("{eps} is no epsilon"))) }
    }

    /// `attention.sliding_window`, where it is not 0.
    pub fn window(&self) -> Result<Option<usize>, Error> {
        Ok(self.optional_u32("attention.sliding_window")?.filter(|&n| n > 0).map(|n| n as usize))
    }

    /// The layers' windows when every `pattern`-th layer is global and the others have `window`.
    /// `attention.sliding_window_pattern` overrides the pattern, as a number or as a list of which layers have it.
    pub fn windows(&self, n_layer: usize, window: usize, pattern: u32) -> Result<Vec<Option<usize>>, Error> {
        self.windows_where(n_layer, window, pattern, |layer, pattern| layer % pattern < pattern - 1)
    }

    /// As [`Keys::windows`], of every `pattern` layers the first global.
    pub fn windows_after_global(
        &self,
        n_layer: usize,
        window: usize,
        pattern: u32,
    ) -> Result<Vec<Option<usize>>, Error> {
        self.windows_where(n_layer, window, pattern, |layer, pattern| layer % pattern != 0)
    }

    fn windows_where(
        &self,
        n_layer: usize,
        window: usize,
        pattern: u32,
        has_window: impl Fn(usize, usize) -> bool,
    ) -> Result<Vec<Option<usize>>, Error> {
        let key = "attention.sliding_window_pattern";
        let has_window = match self.flags(key, n_layer)? {
            Some(flags) => flags,
            None => {
                let pattern = self.optional_u32(key)?.unwrap_or(pattern) as usize;
                (0..n_layer).map(|layer| pattern == 0 || has_window(layer, pattern)).collect()
            }
        };
        Ok(has_window.into_iter().map(|has| has.then_some(window)).collect())
    }

    /// A list of which layers have something, where the key is one.
    pub fn flags(&self, key: &str, n_layer: usize) -> Result<Option<Vec<bool>>, Error> {
        let Some(Value::Array(list)) = self.file.get(&self.name(key)) else { return Ok(None) };
        let has = |value: Value<'_>| match value {
            Value::Bool(has) => Some(has),
            value => value.to_int::<u32>().map(|has| has != 0),
        };
        let list: Option<Vec<bool>> = list.iter().map(has).collect();
        match list {
            Some(list) if list.len() >= n_layer => Ok(Some(list.into_iter().take(n_layer).collect())),
            Some(list) => Err(self.error(key, format!("{} entries for {n_layer} layers", list.len()))),
            None => Err(self.error(key, "neither bools nor integers".into())),
        }
    }

    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        Ok(self.file.bool(&self.name(key))?)
    }

    pub fn optional_list(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        Ok(self.file.u32s(&self.name(key))?)
    }

    /// `rope.dimension_sections`: how many of a head's pairs are rotated by each of a token's positions.
    pub fn rope_sections(&self, n_rot: usize) -> Result<Option<[usize; RopeKind::N_POSITIONS]>, Error> {
        let key = "rope.dimension_sections";
        let Some(list) = self.optional_list(key)? else { return Ok(None) };
        match <[u32; RopeKind::N_POSITIONS]>::try_from(list) {
            Ok(sections) if sections.iter().map(|&n| u64::from(n)).sum::<u64>() <= n_rot as u64 => {
                Ok(Some(sections.map(|n| n as usize)))
            }
            Ok(sections) => Err(self.error(key, format!("{sections:?} of {} pairs", n_rot / 2))),
            Err(list) => Err(self.error(key, format!("{} numbers, expected {}", list.len(), RopeKind::N_POSITIONS))),
        }
    }

    /// As [`Keys::rope_sections`], which must be there and rotate some pairs.
    pub fn require_rope_sections(&self, n_rot: usize) -> Result<[usize; RopeKind::N_POSITIONS], Error> {
        let key = "rope.dimension_sections";
        let sections = self.require(key, self.rope_sections(n_rot)?)?;
        if sections[..3].iter().all(|&n| n == 0) {
            return Err(self.error(key, format!("{sections:?} leave no pair to rotate")));
        }
        Ok(sections)
    }

    /// A factor that must be there and not 0.
    pub fn require_factor(&self, key: &str) -> Result<f32, Error> {
        let factor = self.file.require(&self.name(key), self.optional_f32(key)?)?;
        if factor == 0.0 { Err(self.error(key, "is zero".into())) } else { Ok(factor) }
    }

    /// A factor that changes nothing where it is absent or 0.
    pub fn factor(&self, key: &str) -> Result<Option<f32>, Error> {
        Ok(self.optional_f32(key)?.filter(|&factor| factor != 0.0))
    }

    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        match self.file.f32(&self.name(key))? {
            Some(value) if !value.is_finite() => Err(self.error(key, format!("{value} is not finite"))),
            value => Ok(value),
        }
    }

    /// A number for each layer: one for all, or a list.
    pub fn optional_floats_of_layers(&self, key: &str, n_layer: usize) -> Result<Option<Vec<f32>>, Error> {
        self.floats_of_layers(&self.name(key), n_layer)
    }

    /// As [`Keys::optional_floats_of_layers`]; it must be there, and has no architecture in front.
    pub fn require_plain_floats_of_layers(&self, key: &str, n_layer: usize) -> Result<Vec<f32>, Error> {
        Ok(self.file.require(key, self.floats_of_layers(key, n_layer)?)?)
    }

    fn floats_of_layers(&self, name: &str, n_layer: usize) -> Result<Option<Vec<f32>>, Error> {
        let numbers = match self.file.get(name) {
            Some(Value::Array(_)) => self.file.f32s(name)?,
            _ => self.file.f32(name)?.map(|number| vec![number; n_layer]),
        };
        match numbers {
            Some(numbers) if numbers.len() < n_layer => {
                let why = format!("{} numbers for {n_layer} layers", numbers.len());
                Err(Error::Key { path: self.file.path().to_owned(), key: name.to_owned(), why })
            }
            numbers => Ok(numbers),
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
            // What is special about it are frequency factors, which are tensors.
            Some("longrope") => (1.0 / factor, 0.0),
            Some("yarn") => (1.0 / factor, 1.0),
            Some(other) => {
                let why = format!("\"{other}\" is not supported (supported: none, linear, yarn, longrope)");
                return Err(self.unsupported("rope.scaling.type", why));
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
