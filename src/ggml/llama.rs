//! llama.cpp's vocabularies, samplers, grammars and built-in chat templates behind safe wrappers.

use std::{
    ffi::{CStr, CString, c_char},
    fmt,
    path::Path,
    ptr::NonNull,
    sync::Arc,
};

use ggml_sys as sys;

use super::logging::silence_logs;

/// Room for the message of a failed call.
const ERROR_BYTES: usize = 1024;

/// Runs `call` with a message buffer; whatever message it leaves comes back beside its result.
pub(super) fn with_message<T>(call: impl FnOnce(*mut c_char, usize) -> T) -> (T, String) {
    let mut buffer = [0u8; ERROR_BYTES];
    let result = call(buffer.as_mut_ptr().cast(), buffer.len());
    let length = buffer.iter().position(|&byte| byte == 0).unwrap_or(buffer.len());
    // Messages may quote a whole grammar; one line is what a caller can show.
    let message = String::from_utf8_lossy(&buffer[..length]);
    (result, message.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn c_string(text: &str, what: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| format!("{what} contains a NUL character"))
}

fn to_i32(n: usize, what: &str) -> Result<i32, String> {
    i32::try_from(n).map_err(|_| format!("{what} is too long ({n})"))
}

/// Calls `fill` with a buffer, and once more with a larger one when it answers minus the size that it needs.
fn fill_buffer<T: Default + Clone>(
    guess: usize,
    what: &str,
    mut fill: impl FnMut(*mut T, i32, *mut c_char, usize) -> i32,
) -> Result<Vec<T>, String> {
    let mut size = to_i32(guess, what)?;
    loop {
        let mut buffer = vec![T::default(); size as usize];
        match with_message(|message, message_size| fill(buffer.as_mut_ptr(), size, message, message_size)) {
            (i32::MIN, message) => return Err(message),
            (needed, _) if needed < 0 => {
                if -needed <= size {
                    return Err(format!("{what} changed its size"));
                }
                size = -needed;
            }
            (written, _) => {
                buffer.truncate(written as usize);
                return Ok(buffer);
            }
        }
    }
}

/// The kind of algorithm that a vocabulary tokenizes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VocabKind {
    /// The model has no tokenizer.
    None,
    /// SentencePiece with byte fallback (LLaMA-2).
    Spm,
    /// Byte-level BPE (GPT-2, LLaMA-3, Qwen).
    Bpe,
    /// WordPiece (BERT).
    Wpm,
    /// Unigram (T5).
    Ugm,
    /// RWKV's greedy tokenizer.
    Rwkv,
    /// PLaMo-2's tokenizer.
    Plamo2,
}

/// Tokens with a meaning of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialToken {
    Bos,
    Eos,
    Eot,
    Sep,
    Newline,
    Pad,
    Mask,
    FimPrefix,
    FimSuffix,
    FimMiddle,
}

/// A vocabulary of llama.cpp.
pub struct RawVocab {
    ptr: NonNull<sys::llama_vocab>,
}

// SAFETY: a loaded `llama_vocab` is never changed; every call on it here is const and keeps its state on the stack or
// in thread-local storage.
unsafe impl Send for RawVocab {}
// SAFETY: as above.
unsafe impl Sync for RawVocab {}

/// A value that takes the place of a key's, whatever the file says.
#[derive(Debug, Clone, PartialEq)]
pub enum Override {
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
}

const EMPTY_OVERRIDE: sys::llama_model_kv_override = sys::llama_model_kv_override {
    tag: sys::LLAMA_KV_OVERRIDE_TYPE_INT,
    key: [0; 128],
    __bindgen_anon_1: sys::llama_model_kv_override__bindgen_ty_1 { val_str: [0; 128] },
};

fn raw_override((key, value): &(String, Override)) -> Result<sys::llama_model_kv_override, String> {
    let text = |text: &str| {
        let mut chars = [0 as c_char; 128];
        if text.len() >= chars.len() || text.contains('\0') {
            return Err(format!("the override of {key} is longer than 127 bytes or contains a NUL character"));
        }
        for (to, from) in chars.iter_mut().zip(text.bytes()) {
            *to = from as c_char;
        }
        Ok(chars)
    };
    let mut raw = sys::llama_model_kv_override { key: text(key)?, ..EMPTY_OVERRIDE };
    match value {
        &Override::Int(value) => {
            (raw.tag, raw.__bindgen_anon_1.val_i64) = (sys::LLAMA_KV_OVERRIDE_TYPE_INT, value);
        }
        &Override::Float(value) => {
            (raw.tag, raw.__bindgen_anon_1.val_f64) = (sys::LLAMA_KV_OVERRIDE_TYPE_FLOAT, value);
        }
        &Override::Bool(value) => {
            (raw.tag, raw.__bindgen_anon_1.val_bool) = (sys::LLAMA_KV_OVERRIDE_TYPE_BOOL, value);
        }
        Override::Str(value) => {
            (raw.tag, raw.__bindgen_anon_1.val_str) = (sys::LLAMA_KV_OVERRIDE_TYPE_STR, text(value)?);
        }
    }
    Ok(raw)
}

impl RawVocab {
    /// Reads the vocabulary of a GGUF file (of a split model, its first file). `overrides` take the place of the
    /// file's keys; names and texts longer than llama.cpp's 127 bytes are errors.
    pub fn load(path: &Path, overrides: &[(String, Override)]) -> Result<RawVocab, String> {
        silence_logs();
        let path = path.to_str().ok_or("the path is not valid UTF-8")?;
        let path = c_string(path, "the path")?;
        let mut overrides = overrides.iter().map(raw_override).collect::<Result<Vec<_>, String>>()?;
        // llama.cpp's list ends with an entry without a name.
        overrides.push(EMPTY_OVERRIDE);
        // SAFETY: the path is a C string, the list ends as said, and the buffer has the given size; all outlive the call.
        let (ptr, message) = with_message(|message, size| unsafe {
            sys::simlayer_vocab_load(path.as_ptr(), overrides.as_ptr(), message, size)
        });
        NonNull::new(ptr).map(|ptr| RawVocab { ptr }).ok_or(message)
    }

    /// The vocabulary, for calls of llama.cpp that this module does not wrap. Valid as long as `self`.
    pub fn as_ptr(&self) -> *const sys::llama_vocab {
        self.ptr.as_ptr()
    }

    pub fn kind(&self) -> VocabKind {
        // SAFETY: reads a field of a live vocabulary.
        match unsafe { sys::llama_vocab_type(self.as_ptr()) } {
            sys::LLAMA_VOCAB_TYPE_SPM => VocabKind::Spm,
            sys::LLAMA_VOCAB_TYPE_BPE => VocabKind::Bpe,
            sys::LLAMA_VOCAB_TYPE_WPM => VocabKind::Wpm,
            sys::LLAMA_VOCAB_TYPE_UGM => VocabKind::Ugm,
            sys::LLAMA_VOCAB_TYPE_RWKV => VocabKind::Rwkv,
            sys::LLAMA_VOCAB_TYPE_PLAMO2 => VocabKind::Plamo2,
            _ => VocabKind::None,
        }
    }

    /// The tokenizer's name as the file gives it ("llama", "gpt2", …).
    pub fn model(&self) -> String {
        // SAFETY: the vocabulary is live; the string lives until this thread's next such call and is copied before.
        let name = unsafe { CStr::from_ptr(sys::simlayer_vocab_model(self.as_ptr())) };
        name.to_string_lossy().into_owned()
    }

    pub fn n_tokens(&self) -> usize {
        // SAFETY: reads a field of a live vocabulary.
        usize::try_from(unsafe { sys::llama_vocab_n_tokens(self.as_ptr()) }).unwrap_or(0)
    }

    fn contains(&self, token: i32) -> bool {
        usize::try_from(token).is_ok_and(|token| token < self.n_tokens())
    }

    /// The special token's id; `None` where the vocabulary has no such token.
    pub fn special(&self, token: SpecialToken) -> Option<i32> {
        let get = match token {
            SpecialToken::Bos => sys::llama_vocab_bos,
            SpecialToken::Eos => sys::llama_vocab_eos,
            SpecialToken::Eot => sys::llama_vocab_eot,
            SpecialToken::Sep => sys::llama_vocab_sep,
            SpecialToken::Newline => sys::llama_vocab_nl,
            SpecialToken::Pad => sys::llama_vocab_pad,
            SpecialToken::Mask => sys::llama_vocab_mask,
            SpecialToken::FimPrefix => sys::llama_vocab_fim_pre,
            SpecialToken::FimSuffix => sys::llama_vocab_fim_suf,
            SpecialToken::FimMiddle => sys::llama_vocab_fim_mid,
        };
        // SAFETY: reads a field of a live vocabulary.
        let id = unsafe { get(self.as_ptr()) };
        self.contains(id).then_some(id)
    }

    /// Whether a text starts with the BOS token, as the model asks.
    pub fn adds_bos(&self) -> bool {
        // SAFETY: reads a field of a live vocabulary.
        unsafe { sys::llama_vocab_get_add_bos(self.as_ptr()) }
    }

    /// Whether a text ends with the EOS token, as the model asks.
    pub fn adds_eos(&self) -> bool {
        // SAFETY: reads a field of a live vocabulary.
        unsafe { sys::llama_vocab_get_add_eos(self.as_ptr()) }
    }

    /// Whether the token ends a generation.
    pub fn is_eog(&self, token: i32) -> bool {
        // SAFETY: looks the number up in a set of a live vocabulary; any number may be asked for.
        unsafe { sys::llama_vocab_is_eog(self.as_ptr(), token) }
    }

    /// The `LLAMA_TOKEN_ATTR_*` bits of a token; 0 for a number that is no token.
    pub fn attr(&self, token: i32) -> u32 {
        if self.kind() == VocabKind::None || !self.contains(token) {
            return 0;
        }
        // SAFETY: the vocabulary is live, has a tokenizer, and the token is one of its own.
        unsafe { sys::llama_vocab_get_attr(self.as_ptr(), token) }
    }

    /// Whether the token is a control token, which no text stands for.
    pub fn is_control(&self, token: i32) -> bool {
        self.attr(token) & sys::LLAMA_TOKEN_ATTR_CONTROL != 0
    }

    /// Tokens that the model asks never to sample.
    pub fn suppressed(&self) -> Vec<i32> {
        let mut n = 0;
        // SAFETY: the vocabulary is live and `n` is writable.
        let tokens = unsafe { sys::llama_vocab_get_suppress_tokens(self.as_ptr(), &mut n) };
        match usize::try_from(n) {
            // SAFETY: upstream answers with `n` tokens that live as long as the vocabulary.
            Ok(n) if n > 0 && !tokens.is_null() => unsafe { std::slice::from_raw_parts(tokens, n) }.to_vec(),
            _ => Vec::new(),
        }
    }

    /// The tokens of a text. `add_special` puts BOS and EOS as the model asks; with `parse_special` the names of
    /// special tokens in the text become those tokens.
    pub fn tokenize(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<i32>, String> {
        if self.kind() == VocabKind::None {
            return Err("the model has no tokenizer".to_owned());
        }
        let length = to_i32(text.len(), "the text")?;
        fill_buffer(text.len() + 4, "the text", |tokens, max, message, size| {
            // SAFETY: text, tokens and message are buffers of the given sizes.
            unsafe {
                sys::simlayer_tokenize(
                    self.as_ptr(),
                    text.as_ptr().cast(),
                    length,
                    tokens,
                    max,
                    add_special,
                    parse_special,
                    message,
                    size,
                )
            }
        })
    }

    /// The bytes that a token stands for, which need not be whole UTF-8 characters. With `special`, control tokens
    /// give their names.
    pub fn piece(&self, token: i32, special: bool) -> Result<Vec<u8>, String> {
        if self.kind() == VocabKind::None || !self.contains(token) {
            return Err(format!("{token} is no token of the vocabulary"));
        }
        fill_buffer(32, "the token", |piece: *mut u8, max, message, size| {
            // SAFETY: piece and message are buffers of the given sizes.
            unsafe { sys::simlayer_token_to_piece(self.as_ptr(), token, piece.cast(), max, special, message, size) }
        })
    }

    /// The text of several tokens. `remove_special` leaves out BOS and EOS where the model adds them;
    /// `unparse_special` writes the names of special tokens.
    pub fn detokenize(&self, tokens: &[i32], remove_special: bool, unparse_special: bool) -> Result<Vec<u8>, String> {
        if let Some(token) = tokens.iter().find(|&&token| self.kind() == VocabKind::None || !self.contains(token)) {
            return Err(format!("{token} is no token of the vocabulary"));
        }
        let n = to_i32(tokens.len(), "the list of tokens")?;
        fill_buffer(8 * tokens.len() + 16, "the text", |text: *mut u8, max, message, size| {
            // SAFETY: tokens, text and message are buffers of the given sizes, and every token is in the vocabulary.
            unsafe {
                sys::simlayer_detokenize(
                    self.as_ptr(),
                    tokens.as_ptr(),
                    n,
                    text.cast(),
                    max,
                    remove_special,
                    unparse_special,
                    message,
                    size,
                )
            }
        })
    }
}

impl Drop for RawVocab {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `simlayer_vocab_load`, and samplers keep the vocabulary by an Arc.
        unsafe { sys::simlayer_vocab_free(self.ptr.as_ptr()) }
    }
}

impl fmt::Debug for RawVocab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawVocab").field("kind", &self.kind()).field("n_tokens", &self.n_tokens()).finish()
    }
}

/// One link of a sampler chain, with upstream's parameters.
#[derive(Debug, Clone, PartialEq)]
pub enum SamplerKind {
    LogitBias(Vec<(i32, f32)>),
    Penalties { last_n: i32, repeat: f32, frequency: f32, presence: f32 },
    Dry { multiplier: f32, base: f32, allowed_length: i32, last_n: i32, breakers: Vec<String> },
    TopNSigma(f32),
    TopK(i32),
    Typical(f32),
    TopP(f32),
    MinP(f32),
    Xtc { probability: f32, threshold: f32, seed: u32 },
    Temperature { temperature: f32, range: f32, exponent: f32 },
    Dist { seed: u32 },
    Mirostat { seed: u32, tau: f32, eta: f32 },
    MirostatV2 { seed: u32, tau: f32, eta: f32 },
    Infill,
    AdaptiveP { target: f32, decay: f32, seed: u32 },
}

/// Tokens to choose from, with their logits.
#[derive(Default)]
pub struct Candidates {
    data: Vec<sys::llama_token_data>,
    selected: i64,
    sorted: bool,
}

impl Candidates {
    /// Makes every token a candidate: token `i` has `logits[i]`.
    pub fn fill(&mut self, logits: &[f32]) {
        self.data.clear();
        self.data.extend((0i32..).zip(logits).map(|(id, &logit)| sys::llama_token_data { id, logit, p: 0.0 }));
        self.selected = -1;
        self.sorted = false;
    }

    /// Makes one token the only candidate.
    pub fn fill_one(&mut self, token: i32) {
        self.data.clear();
        self.data.push(sys::llama_token_data { id: token, logit: 1.0, p: 0.0 });
        self.selected = -1;
        self.sorted = false;
    }

    /// The token that the last sampler chose.
    pub fn selected(&self) -> Option<i32> {
        Some(self.data.get(usize::try_from(self.selected).ok()?)?.id)
    }

    /// The logit of the first candidate.
    pub fn first_logit(&self) -> Option<f32> {
        self.data.first().map(|candidate| candidate.logit)
    }
}

impl fmt::Debug for Candidates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Candidates").field("n", &self.data.len()).field("selected", &self.selected()).finish()
    }
}

/// A sampler of llama.cpp: a chain, or a grammar.
pub struct RawSampler {
    ptr: NonNull<sys::llama_sampler>,
    // Grammars read the vocabulary while they run.
    vocab: Arc<RawVocab>,
}

// SAFETY: a sampler owns its state and reads nothing else than the vocabulary, which is `Sync`.
unsafe impl Send for RawSampler {}

impl RawSampler {
    /// A chain of samplers, applied in this order.
    pub fn chain(vocab: &Arc<RawVocab>, links: &[SamplerKind]) -> Result<RawSampler, String> {
        let params = sys::llama_sampler_chain_params { no_perf: true };
        // SAFETY: the chain is new and owned by the wrapper.
        let chain = unsafe { RawSampler::own(sys::llama_sampler_chain_init(params), vocab) }
            .ok_or("the sampler chain could not be made")?;
        for link in links {
            let link = RawSampler::link(vocab, link)?;
            // SAFETY: both are live; the chain takes ownership of the link, which is therefore forgotten here.
            unsafe { sys::llama_sampler_chain_add(chain.ptr.as_ptr(), link.ptr.as_ptr()) };
            std::mem::forget(link);
        }
        Ok(chain)
    }

    /// A GBNF grammar that begins with the rule named `root`.
    pub fn grammar(vocab: &Arc<RawVocab>, grammar: &str, root: &str) -> Result<RawSampler, String> {
        let grammar = c_string(grammar, "the grammar")?;
        let root = c_string(root, "the rule's name")?;
        // SAFETY: the strings and the buffer outlive the call; the sampler is new.
        let (sampler, message) = with_message(|message, size| unsafe {
            let ptr =
                sys::simlayer_sampler_init_grammar(vocab.as_ptr(), grammar.as_ptr(), root.as_ptr(), message, size);
            RawSampler::own(ptr, vocab)
        });
        sampler.ok_or(message)
    }

    /// As [`RawSampler::grammar`], of which nothing holds before one of the tokens comes, or a match of one of the patterns:
    /// regular expressions (ECMAScript's) over the text so far. The grammar begins at the pattern's first group.
    pub fn lazy_grammar(
        vocab: &Arc<RawVocab>,
        grammar: &str,
        root: &str,
        patterns: &[String],
        tokens: &[i32],
    ) -> Result<RawSampler, String> {
        if let Some(token) = tokens.iter().find(|&&token| !vocab.contains(token)) {
            return Err(format!("{token} is no token of the vocabulary"));
        }
        let grammar = c_string(grammar, "the grammar")?;
        let root = c_string(root, "the rule's name")?;
        let texts =
            patterns.iter().map(|pattern| c_string(pattern, "a trigger pattern")).collect::<Result<Vec<_>, _>>()?;
        let mut patterns: Vec<_> = texts.iter().map(|pattern| pattern.as_ptr()).collect();
        // SAFETY: the strings, the arrays and the buffer outlive the call, which copies them; the sampler is new.
        let (sampler, message) = with_message(|message, size| unsafe {
            let ptr = sys::simlayer_sampler_init_lazy_grammar(
                vocab.as_ptr(),
                grammar.as_ptr(),
                root.as_ptr(),
                patterns.as_mut_ptr(),
                patterns.len(),
                tokens.as_ptr(),
                tokens.len(),
                message,
                size,
            );
            RawSampler::own(ptr, vocab)
        });
        sampler.ok_or(message)
    }

    /// # Safety
    /// `ptr` is null or a sampler that nobody else frees, and that reads no other vocabulary than `vocab`.
    unsafe fn own(ptr: *mut sys::llama_sampler, vocab: &Arc<RawVocab>) -> Option<RawSampler> {
        NonNull::new(ptr).map(|ptr| RawSampler { ptr, vocab: vocab.clone() })
    }

    fn link(vocab: &Arc<RawVocab>, kind: &SamplerKind) -> Result<RawSampler, String> {
        // Chains keep the best candidate at least, as upstream's tools do.
        const MIN_KEEP: usize = 0;
        let n_vocab = to_i32(vocab.n_tokens(), "the vocabulary")?;
        let mut message = String::new();
        // SAFETY: each call gets plain values, or arrays of the given length that it copies; the sampler it makes is
        // new. DRY reads the vocabulary during the call, infill as long as it lives, which is no longer than the wrapper's.
        let ptr = unsafe {
            match kind {
                SamplerKind::LogitBias(biases) => {
                    let biases: Vec<_> =
                        biases.iter().map(|&(token, bias)| sys::llama_logit_bias { token, bias }).collect();
                    sys::llama_sampler_init_logit_bias(
                        n_vocab,
                        to_i32(biases.len(), "the list of logit biases")?,
                        biases.as_ptr(),
                    )
                }
                &SamplerKind::Penalties { last_n, repeat, frequency, presence } => {
                    sys::llama_sampler_init_penalties(n_vocab, last_n, repeat, frequency, presence)
                }
                SamplerKind::Dry { multiplier, base, allowed_length, last_n, breakers } => {
                    let breakers =
                        breakers.iter().map(|text| c_string(text, "a DRY breaker")).collect::<Result<Vec<_>, _>>()?;
                    let mut breakers: Vec<_> = breakers.iter().map(|text| text.as_ptr()).collect();
                    let (ptr, text) = with_message(|message, size| {
                        sys::simlayer_sampler_init_dry(
                            vocab.as_ptr(),
                            *multiplier,
                            *base,
                            *allowed_length,
                            *last_n,
                            breakers.as_mut_ptr(),
                            breakers.len(),
                            message,
                            size,
                        )
                    });
                    message = text;
                    ptr
                }
                &SamplerKind::TopNSigma(n) => sys::llama_sampler_init_top_n_sigma(n),
                &SamplerKind::TopK(k) => sys::llama_sampler_init_top_k(k),
                &SamplerKind::Typical(p) => sys::llama_sampler_init_typical(p, MIN_KEEP),
                &SamplerKind::TopP(p) => sys::llama_sampler_init_top_p(p, MIN_KEEP),
                &SamplerKind::MinP(p) => sys::llama_sampler_init_min_p(p, MIN_KEEP),
                &SamplerKind::Xtc { probability, threshold, seed } => {
                    sys::llama_sampler_init_xtc(probability, threshold, MIN_KEEP, seed)
                }
                &SamplerKind::Temperature { temperature, range, exponent } => {
                    sys::llama_sampler_init_temp_ext(temperature, range, exponent)
                }
                &SamplerKind::Dist { seed } => sys::llama_sampler_init_dist(seed),
                &SamplerKind::Mirostat { seed, tau, eta } => {
                    sys::llama_sampler_init_mirostat(n_vocab, seed, tau, eta, 100)
                }
                &SamplerKind::MirostatV2 { seed, tau, eta } => sys::llama_sampler_init_mirostat_v2(seed, tau, eta),
                SamplerKind::Infill => sys::llama_sampler_init_infill(vocab.as_ptr()),
                &SamplerKind::AdaptiveP { target, decay, seed } => {
                    sys::llama_sampler_init_adaptive_p(target, decay, seed)
                }
            }
        };
        // SAFETY: as said above.
        unsafe { RawSampler::own(ptr, vocab) }.ok_or(message)
    }

    /// Filters, sorts and selects among the candidates.
    pub fn apply(&mut self, candidates: &mut Candidates) -> Result<(), String> {
        if candidates.data.is_empty() {
            return Err("there are no tokens to sample from".to_owned());
        }
        let n_vocab = self.vocab.n_tokens();
        if candidates.data.len() > n_vocab {
            return Err(format!("{} logits for a vocabulary of {n_vocab} tokens", candidates.data.len()));
        }
        let mut array = sys::llama_token_data_array {
            data: candidates.data.as_mut_ptr(),
            size: candidates.data.len(),
            selected: candidates.selected,
            sorted: candidates.sorted,
        };
        // SAFETY: the array is that of `candidates`, with tokens of the vocabulary; samplers write within it and only
        // make it shorter.
        let (done, message) = with_message(|message, size| unsafe {
            sys::simlayer_sampler_apply(self.ptr.as_ptr(), &mut array, message, size)
        });
        candidates.data.truncate(array.size);
        candidates.selected = array.selected;
        candidates.sorted = array.sorted;
        if done { Ok(()) } else { Err(message) }
    }

    /// Tells the sampler of a token that was chosen.
    pub fn accept(&mut self, token: i32) -> Result<(), String> {
        if !self.vocab.contains(token) {
            return Err(format!("{token} is no token of the vocabulary"));
        }
        // SAFETY: the sampler is live and the token one of its vocabulary.
        let (done, message) = with_message(|message, size| unsafe {
            sys::simlayer_sampler_accept(self.ptr.as_ptr(), token, message, size)
        });
        if done { Ok(()) } else { Err(message) }
    }

    /// Puts the sampler back to its beginning.
    pub fn reset(&mut self) -> Result<(), String> {
        // SAFETY: the sampler is live.
        let (done, message) =
            with_message(|message, size| unsafe { sys::simlayer_sampler_reset(self.ptr.as_ptr(), message, size) });
        if done { Ok(()) } else { Err(message) }
    }

    /// A copy with the same state.
    pub fn try_clone(&self) -> Result<RawSampler, String> {
        // SAFETY: the sampler is live; the copy is new and reads the same vocabulary.
        let (copy, message) = with_message(|message, size| unsafe {
            RawSampler::own(sys::simlayer_sampler_clone(self.ptr.as_ptr(), message, size), &self.vocab)
        });
        copy.ok_or(message)
    }
}

impl Drop for RawSampler {
    fn drop(&mut self) {
        // SAFETY: the pointer is owned; a chain frees its links.
        unsafe { sys::llama_sampler_free(self.ptr.as_ptr()) }
    }
}

impl fmt::Debug for RawSampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: the sampler is live; its name is a C string that lives as long.
        let name = unsafe { CStr::from_ptr(sys::llama_sampler_name(self.ptr.as_ptr())) };
        f.debug_tuple("RawSampler").field(&name).finish()
    }
}

/// The names of llama.cpp's built-in chat templates.
pub fn builtin_chat_templates() -> Vec<String> {
    // SAFETY: with no room for names it only answers how many there are.
    let n = unsafe { sys::llama_chat_builtin_templates(std::ptr::null_mut(), 0) };
    let mut names = vec![std::ptr::null(); usize::try_from(n).unwrap_or(0)];
    // SAFETY: the array has room for as many names as given.
    unsafe { sys::llama_chat_builtin_templates(names.as_mut_ptr(), names.len()) };
    // SAFETY: each name is a C string in a static table.
    names.iter().map(|&name| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()).collect()
}

/// Formats `(role, content)` messages by a built-in chat template: `template` is its name, or a Jinja text that
/// llama.cpp recognises it by.
pub fn builtin_chat_template(template: &str, messages: &[(&str, &str)], add_assistant: bool) -> Result<String, String> {
    let template = c_string(template, "the template")?;
    let texts = messages
        .iter()
        .map(|(role, content)| Ok((c_string(role, "a role")?, c_string(content, "a message")?)))
        .collect::<Result<Vec<_>, String>>()?;
    let chat: Vec<_> = texts
        .iter()
        .map(|(role, content)| sys::llama_chat_message { role: role.as_ptr(), content: content.as_ptr() })
        .collect();
    let format = |buffer: *mut u8, size: i32| {
        // SAFETY: the strings, the array and the buffers have the given sizes and outlive the call.
        with_message(|message, message_size| unsafe {
            sys::simlayer_chat_apply_template(
                template.as_ptr(),
                chat.as_ptr(),
                chat.len(),
                add_assistant,
                buffer.cast(),
                size,
                message,
                message_size,
            )
        })
    };
    let size = match format(std::ptr::null_mut(), 0) {
        (-1, _) => return Err("none of llama.cpp's built-in chat templates fits".to_owned()),
        (size, message) => usize::try_from(size).map_err(|_| message)?,
    };
    let mut text = vec![0u8; size];
    format(text.as_mut_ptr(), to_i32(size, "the conversation")?);
    String::from_utf8(text).map_err(|_| "the formatted conversation is not valid UTF-8".to_owned())
}
