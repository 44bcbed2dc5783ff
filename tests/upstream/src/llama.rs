//! The few calls of llama.cpp's C API that the reference needs. All of this crate's `unsafe` is here.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};

use llama_cpp_sys_2 as sys;

pub type Token = i32;

/// Passes llama.cpp's warnings and errors on to stderr; with `verbose`, everything.
pub fn init_logging(verbose: bool) {
    unsafe extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, user: *mut c_void) {
        let verbose = !user.is_null();
        // GGML_LOG_LEVEL_CONT continues the line before, whose level is not known here.
        let wanted = level == sys::GGML_LOG_LEVEL_WARN || level == sys::GGML_LOG_LEVEL_ERROR;
        if verbose || wanted {
            // SAFETY: llama.cpp passes a NUL-terminated string that lives for this call.
            eprint!("{}", unsafe { CStr::from_ptr(text) }.to_string_lossy());
        }
    }
    static VERBOSE: u8 = 1;
    let user = if verbose { &raw const VERBOSE } else { ptr::null() };
    // SAFETY: `log` has the expected signature and only compares `user` with null; CUDA's registration lives as long as
    // the process.
    unsafe {
        sys::llama_log_set(Some(log), user.cast_mut().cast());
        #[cfg(feature = "cuda")]
        sys::ggml_backend_register(ggml_backend_cuda_reg());
        sys::llama_backend_init();
    }
}

#[cfg(feature = "cuda")]
unsafe extern "C" {
    /// ggml-cuda.h's; upstream's registry was compiled without it.
    fn ggml_backend_cuda_reg() -> sys::ggml_backend_reg_t;
}

/// The ggml type that `name` names, as `-ctk` and `-ctv` take it.
pub fn type_by_name(name: &str) -> Result<sys::ggml_type, String> {
    (0..sys::GGML_TYPE_COUNT)
        .find(|&t| {
            // SAFETY: every value below GGML_TYPE_COUNT has an entry; removed types have a null or
            // a placeholder name.
            let found = unsafe { sys::ggml_type_name(t) };
            // SAFETY: a non-null name is a static NUL-terminated string.
            !found.is_null() && unsafe { CStr::from_ptr(found) }.to_bytes() == name.as_bytes()
        })
        .ok_or_else(|| format!("{name}: ggml has no type of this name"))
}

/// Whether there is a device that models are put on.
pub fn offloads() -> bool {
    // SAFETY: it takes nothing, and looks devices up in ggml's registry.
    unsafe { sys::llama_supports_gpu_offload() }
}

/// A loaded model, with upstream's default parameters (mapped, weights repacked where that helps).
pub struct Model {
    ptr: NonNull<sys::llama_model>,
    vocab: *const sys::llama_vocab,
}

impl Model {
    /// `repack`: the processor may lay weights out anew for its matrix products.
    pub fn load(path: &Path, repack: bool) -> Result<Self, String> {
        let c_path = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| format!("{}: the path has a NUL byte", path.display()))?;
        // SAFETY: the path is NUL-terminated and outlives the call.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.use_extra_bufts = repack;
            sys::llama_model_load_from_file(c_path.as_ptr(), params)
        };
        let ptr = NonNull::new(model).ok_or_else(|| format!("{}: llama.cpp cannot load this model", path.display()))?;
        // SAFETY: the model was loaded just now.
        let vocab = unsafe { sys::llama_model_get_vocab(ptr.as_ptr()) };
        Ok(Self { ptr, vocab })
    }

    pub fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_n_tokens(self.vocab) as usize }
    }

    /// Elements of a row that stands in place of a token.
    pub fn n_embd_input(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_embd_inp(self.ptr.as_ptr()) as usize }
    }

    pub fn n_layer(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_layer(self.ptr.as_ptr()) as usize }
    }

    pub fn n_ctx_train(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_ctx_train(self.ptr.as_ptr()) as usize }
    }

    /// The ids of the special tokens, -1 where the model has none.
    pub fn special_tokens(&self) -> Vec<(&'static str, Token)> {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe {
            vec![
                ("bos", sys::llama_vocab_bos(self.vocab)),
                ("eos", sys::llama_vocab_eos(self.vocab)),
                ("eot", sys::llama_vocab_eot(self.vocab)),
                ("pad", sys::llama_vocab_pad(self.vocab)),
            ]
        }
    }

    pub fn adds_bos(&self) -> bool {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab) }
    }

    pub fn is_eog(&self, token: Token) -> bool {
        // SAFETY: the vocabulary lives as long as the model; callers check the id.
        unsafe { sys::llama_vocab_is_eog(self.vocab, token) }
    }

    pub fn tokenize(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<Token>, String> {
        let len = i32::try_from(text.len()).map_err(|_| "a text is longer than 2 GiB")?;
        let call = |out: &mut [Token]| {
            // SAFETY: text and out are valid for the lengths given with them.
            unsafe {
                sys::llama_tokenize(
                    self.vocab,
                    text.as_ptr().cast(),
                    len,
                    out.as_mut_ptr(),
                    out.len() as i32,
                    add_special,
                    parse_special,
                )
            }
        };
        grow(text.len() + 8, call)
    }

    pub fn detokenize(&self, tokens: &[Token], remove_special: bool, unparse_special: bool) -> Result<Vec<u8>, String> {
        self.check_tokens(tokens)?;
        let call = |out: &mut [u8]| {
            // SAFETY: tokens and out are valid for the lengths given with them.
            unsafe {
                sys::llama_detokenize(
                    self.vocab,
                    tokens.as_ptr(),
                    tokens.len() as i32,
                    out.as_mut_ptr().cast(),
                    out.len() as i32,
                    remove_special,
                    unparse_special,
                )
            }
        };
        grow(tokens.len() * 8 + 8, call)
    }

    pub fn token_to_piece(&self, token: Token, special: bool) -> Result<Vec<u8>, String> {
        self.check_tokens(&[token])?;
        let call = |out: &mut [u8]| {
            // SAFETY: out is valid for the length given with it.
            unsafe {
                sys::llama_token_to_piece(self.vocab, token, out.as_mut_ptr().cast(), out.len() as i32, 0, special)
            }
        };
        grow(32, call)
    }

    /// llama.cpp indexes its tables with these unchecked in places.
    pub fn check_tokens(&self, tokens: &[Token]) -> Result<(), String> {
        let n_vocab = self.n_vocab();
        match tokens.iter().find(|&&t| t < 0 || t as usize >= n_vocab) {
            Some(t) => Err(format!("token {t}: the vocabulary has ids 0 to {}", n_vocab - 1)),
            None => Ok(()),
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts borrow the model, so none is left.
        unsafe { sys::llama_model_free(self.ptr.as_ptr()) }
    }
}

/// Calls `fill` with a buffer, and once more with a larger one when it answers with a negative
/// length, as llama.cpp does for a buffer that is too small.
fn grow<T: Clone + Default>(first: usize, fill: impl Fn(&mut [T]) -> i32) -> Result<Vec<T>, String> {
    let mut out = vec![T::default(); first];
    let mut n = fill(&mut out);
    if n < 0 && n != i32::MIN {
        out.resize(-n as usize, T::default());
        n = fill(&mut out);
    }
    if n < 0 {
        return Err("llama.cpp failed to convert text or tokens".into());
    }
    out.truncate(n as usize);
    Ok(out)
}

/// What of a context differs from upstream's defaults.
#[derive(Clone)]
pub struct ContextOptions {
    pub n_ctx: usize,
    pub n_batch: Option<usize>,
    pub n_ubatch: Option<usize>,
    pub n_threads: Option<usize>,
    pub flash_attn: Option<bool>,
    pub type_k: sys::ggml_type,
    pub type_v: sys::ggml_type,
    /// LoRA adapters, each with what it is multiplied by.
    pub adapters: Vec<(PathBuf, f32)>,
}

impl ContextOptions {
    pub fn new(n_ctx: usize) -> Self {
        // SAFETY: takes nothing and returns a plain value.
        let params = unsafe { sys::llama_context_default_params() };
        Self {
            n_ctx,
            n_batch: None,
            n_ubatch: None,
            n_threads: None,
            flash_attn: None,
            type_k: params.type_k,
            type_v: params.type_v,
            adapters: Vec::new(),
        }
    }
}

/// One layer's attention probabilities for the queries of one ubatch.
///
/// llama.cpp stores them as `[n_kv, n_queries, n_head]`, f32, where `n_kv` is the number of used
/// cells, padded. In a fresh context with one sequence, cell `j` holds position `j`.
pub struct SoftMax<'a> {
    data: &'a mut [f32],
    n_kv: usize,
    n_queries: usize,
    first_pos: usize,
}

impl SoftMax<'_> {
    pub fn n_head(&self) -> usize {
        self.data.len() / (self.n_kv * self.n_queries)
    }

    /// The positions of the queries.
    pub fn positions(&self) -> Range<usize> {
        self.first_pos..self.first_pos + self.n_queries
    }

    /// The probabilities of `head` for the query at position `pos`, for keys 0 to `pos`.
    pub fn row(&mut self, head: usize, pos: usize) -> &mut [f32] {
        let start = (head * self.n_queries + (pos - self.first_pos)) * self.n_kv;
        &mut self.data[start..=start + pos]
    }

    /// Checks that cells are positions: a causal query gives no weight to what lies after it.
    fn check(&self) -> Result<(), String> {
        if self.positions().end > self.n_kv {
            return Err(format!("{} cells for {} positions", self.n_kv, self.positions().end));
        }
        for (i, row) in self.data.chunks_exact(self.n_kv).enumerate() {
            let pos = self.first_pos + i % self.n_queries;
            if row[pos + 1..].iter().any(|&w| w != 0.0) {
                return Err(format!("the query at {pos} attends a cell after it"));
            }
        }
        Ok(())
    }
}

/// Reads, and may change, attention probabilities while a graph runs.
pub trait AttentionHook {
    /// Whether `attend` shall be called for this layer and the queries at these positions.
    fn wants(&self, layer: usize, positions: Range<usize>) -> bool;
    /// Returns true when it changed the probabilities.
    fn attend(&mut self, layer: usize, softmax: &mut SoftMax) -> bool;
}

/// No hook: the context runs without an evaluation callback.
pub struct NoHook;

impl AttentionHook for NoHook {
    fn wants(&self, _: usize, _: Range<usize>) -> bool {
        false
    }
    fn attend(&mut self, _: usize, _: &mut SoftMax) -> bool {
        false
    }
}

struct HookState<H> {
    hook: H,
    /// The positions of the ubatch that runs now.
    positions: Range<usize>,
    buffer: Vec<f32>,
    layers_seen: usize,
    error: Option<String>,
}

impl<H: AttentionHook> HookState<H> {
    fn attend(&mut self, layer: usize, tensor: *mut sys::ggml_tensor) -> Result<(), String> {
        // SAFETY: llama.cpp passes a tensor of the running graph.
        let t = unsafe { &*tensor };
        let [n_kv, n_queries, n_head, n_stream] = t.ne.map(|n| n as usize);
        // SAFETY: as above.
        let contiguous = unsafe { sys::ggml_is_contiguous(tensor) };
        let expected = self.positions.len();
        if t.type_ != sys::GGML_TYPE_F32 || !contiguous || n_stream != 1 || n_queries != expected {
            return Err(format!(
                "kq_soft_max-{layer} has type {} and shape {:?}, expected contiguous f32 for \
                 {expected} queries of one stream",
                t.type_, t.ne
            ));
        }
        self.buffer.resize(n_kv * n_queries * n_head, 0.0);
        let bytes = self.buffer.len() * size_of::<f32>();
        // SAFETY: the tensor is computed, and the buffer has exactly its size.
        unsafe { sys::ggml_backend_tensor_get(tensor, self.buffer.as_mut_ptr().cast(), 0, bytes) };
        let mut softmax = SoftMax { data: &mut self.buffer, n_kv, n_queries, first_pos: self.positions.start };
        softmax.check().map_err(|e| format!("kq_soft_max-{layer}: {e}"))?;
        self.layers_seen += 1;
        if self.hook.attend(layer, &mut softmax) {
            // SAFETY: as for the read; the nodes that use this tensor have not run yet.
            unsafe { sys::ggml_backend_tensor_set(tensor, self.buffer.as_ptr().cast(), 0, bytes) };
        }
        Ok(())
    }

    /// llama.cpp's `cb_eval`: with `ask`, whether it shall stop after this node; else, the node is
    /// computed, and the answer says whether to go on.
    unsafe extern "C" fn callback(tensor: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
        // SAFETY: `user` is the HookState that Context::new made; nothing else uses it while
        // llama_decode runs.
        let state = unsafe { &mut *user.cast::<Self>() };
        // SAFETY: a tensor's name is NUL-terminated within the tensor.
        let name = unsafe { CStr::from_ptr(sys::ggml_get_name(tensor)) };
        let layer = name
            .to_str()
            .ok()
            .and_then(|name| name.strip_prefix("kq_soft_max-"))
            .and_then(|layer| layer.parse::<usize>().ok());
        let Some(layer) = layer else { return !ask };
        if ask {
            return state.hook.wants(layer, state.positions.clone());
        }
        match state.attend(layer, tensor) {
            Ok(()) => true,
            Err(e) => {
                state.error.get_or_insert(e);
                false
            }
        }
    }
}

/// Which tokens of a call get logits.
#[derive(Clone, Copy, PartialEq)]
pub enum Outputs {
    Last,
    All,
}

/// A context with one sequence.
pub struct Context<'m, H: AttentionHook = NoHook> {
    ptr: NonNull<sys::llama_context>,
    model: &'m Model,
    /// Owned; a raw pointer because llama.cpp holds the same one.
    hook: NonNull<HookState<H>>,
    hooked: bool,
    batch: sys::llama_batch,
    chunk: usize,
    n_past: usize,
}

impl<'m> Context<'m> {
    pub fn new(model: &'m Model, options: &ContextOptions) -> Result<Self, String> {
        Self::create(model, options, NoHook, false)
    }
}

impl<'m, H: AttentionHook> Context<'m, H> {
    pub fn with_hook(model: &'m Model, options: &ContextOptions, hook: H) -> Result<Self, String> {
        Self::create(model, options, hook, true)
    }

    fn create(model: &'m Model, options: &ContextOptions, hook: H, hooked: bool) -> Result<Self, String> {
        let hook = Box::new(HookState { hook, positions: 0..0, buffer: Vec::new(), layers_seen: 0, error: None });
        let hook = NonNull::from(Box::leak(hook));
        // SAFETY: takes nothing and returns a plain value.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = options.n_ctx as u32;
        if let Some(n) = options.n_batch {
            params.n_batch = n as u32;
        }
        if let Some(n) = options.n_ubatch {
            params.n_ubatch = n as u32;
        }
        if let Some(n) = options.n_threads {
            params.n_threads = n as i32;
            params.n_threads_batch = n as i32;
        }
        params.flash_attn_type = match options.flash_attn {
            None => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
            Some(false) => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            Some(true) => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
        };
        params.type_k = options.type_k;
        params.type_v = options.type_v;
        if hooked {
            params.cb_eval = Some(HookState::<H>::callback);
            params.cb_eval_user_data = hook.as_ptr().cast();
        }
        // SAFETY: the model is alive, and the hook lives until the context is dropped.
        let ptr = unsafe { sys::llama_init_from_model(model.ptr.as_ptr(), params) };
        let Some(ptr) = NonNull::new(ptr) else {
            // SAFETY: the box was leaked above and no context holds it.
            drop(unsafe { Box::from_raw(hook.as_ptr()) });
            return Err("llama.cpp cannot make a context with these options".into());
        };
        // SAFETY: the context was made just now.
        let (n_batch, n_ubatch) =
            unsafe { (sys::llama_n_batch(ptr.as_ptr()) as usize, sys::llama_n_ubatch(ptr.as_ptr()) as usize) };
        // The hook must know the positions of each ubatch, so it gets one at a time.
        let chunk = if hooked { n_batch.min(n_ubatch) } else { n_batch };
        // SAFETY: allocates arrays for `chunk` tokens with one sequence each.
        let batch = unsafe { sys::llama_batch_init(chunk as i32, 0, 1) };
        let context = Self { ptr, model, hook, hooked, batch, chunk, n_past: 0 };
        context.set_adapters(&options.adapters)?;
        Ok(context)
    }

    /// Loads LoRA adapters, which go with the model, and sets them.
    fn set_adapters(&self, adapters: &[(PathBuf, f32)]) -> Result<(), String> {
        if adapters.is_empty() {
            return Ok(());
        }
        let (mut handles, mut scales) = (Vec::new(), Vec::new());
        for (path, scale) in adapters {
            let failed = || format!("{}: llama.cpp cannot load this adapter", path.display());
            let c_path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| failed())?;
            // SAFETY: the model is alive, and the path a C string.
            let adapter = unsafe { sys::llama_adapter_lora_init(self.model.ptr.as_ptr(), c_path.as_ptr()) };
            handles.push(NonNull::new(adapter).ok_or_else(failed)?.as_ptr());
            scales.push(*scale);
        }
        // SAFETY: the context is alive, and both lists have as many entries as said.
        let status = unsafe {
            let (handles, scales) = (handles.as_mut_ptr(), scales.as_mut_ptr());
            sys::llama_set_adapters_lora(self.ptr.as_ptr(), handles, adapters.len(), scales)
        };
        if status == 0 { Ok(()) } else { Err("llama.cpp cannot set these adapters".to_owned()) }
    }

    /// Forgets the sequence.
    pub fn clear(&mut self) {
        // SAFETY: the context is alive.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.ptr.as_ptr()), true) };
        self.n_past = 0;
    }

    /// Appends `tokens` to the sequence, in batches of at most `n_batch` (one ubatch with a hook),
    /// and calls `each` with the logits of every token that `outputs` names, in order.
    pub fn decode(&mut self, tokens: &[Token], outputs: Outputs, mut each: impl FnMut(&[f32])) -> Result<(), String> {
        self.model.check_tokens(tokens)?;
        let n_vocab = self.model.n_vocab();
        for (c, chunk) in tokens.chunks(self.chunk).enumerate() {
            let last = (c * self.chunk + chunk.len()) == tokens.len();
            let wants = |i: usize| match outputs {
                Outputs::Last => last && i + 1 == chunk.len(),
                Outputs::All => true,
            };
            for (i, &token) in chunk.iter().enumerate() {
                // SAFETY: the batch has room for self.chunk tokens with one sequence each.
                unsafe {
                    *self.batch.token.add(i) = token;
                    *self.batch.pos.add(i) = (self.n_past + i) as sys::llama_pos;
                    *self.batch.n_seq_id.add(i) = 1;
                    **self.batch.seq_id.add(i) = 0;
                    *self.batch.logits.add(i) = wants(i) as i8;
                }
            }
            self.batch.n_tokens = chunk.len() as i32;
            let positions = self.n_past..self.n_past + chunk.len();
            // SAFETY: nothing else refers to the hook's state between calls of llama_decode.
            unsafe { (*self.hook.as_ptr()).positions = positions };
            // SAFETY: the context is alive and the batch filled.
            let status = unsafe { sys::llama_decode(self.ptr.as_ptr(), self.batch) };
            // The computation may still run when llama_decode returns.
            // SAFETY: the context is alive.
            unsafe { sys::llama_synchronize(self.ptr.as_ptr()) };
            // SAFETY: llama_decode has returned, so the callback does not run.
            if let Some(e) = unsafe { (*self.hook.as_ptr()).error.take() } {
                return Err(e);
            }
            if status != 0 {
                return Err(format!("llama_decode returned {status} at position {}", self.n_past));
            }
            for i in (0..chunk.len()).filter(|&i| wants(i)) {
                // SAFETY: token i has logits; the row stays valid until the next decode.
                let row = unsafe {
                    let row = sys::llama_get_logits_ith(self.ptr.as_ptr(), i as i32);
                    if row.is_null() {
                        return Err(format!("no logits for token {i} of the batch"));
                    }
                    std::slice::from_raw_parts(row, n_vocab)
                };
                each(row);
            }
            self.n_past += chunk.len();
        }
        Ok(())
    }

    /// Where the next token stands.
    pub fn go_on_at(&mut self, position: usize) {
        self.n_past = position;
    }

    /// Appends rows of embeddings to the sequence in one batch, `positions` all first ones before all second ones, and calls
    /// `each` with the last one's logits.
    pub fn decode_rows(
        &mut self,
        rows: &[f32],
        positions: &[i32],
        non_causal: bool,
        mut each: impl FnMut(&[f32]),
    ) -> Result<(), String> {
        let n = rows.len() / self.model.n_embd_input();
        if n == 0 || !positions.len().is_multiple_of(n) || positions.is_empty() {
            return Err(format!("{n} rows of embeddings and {} positions", positions.len()));
        }
        let (mut rows, mut positions) = (rows.to_vec(), positions.to_vec());
        let (mut n_seq_id, mut id, mut logits) = (vec![1; n], 0, vec![0; n]);
        let mut seq_id = vec![&raw mut id; n];
        logits[n - 1] = 1;
        let batch = sys::llama_batch {
            n_tokens: n as i32,
            token: ptr::null_mut(),
            embd: rows.as_mut_ptr(),
            pos: positions.as_mut_ptr(),
            n_seq_id: n_seq_id.as_mut_ptr(),
            seq_id: seq_id.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        // SAFETY: the context is alive, and the arrays have what llama.h says and outlive the call; the last row has logits.
        let row = unsafe {
            sys::llama_set_causal_attn(self.ptr.as_ptr(), !non_causal);
            let status = sys::llama_decode(self.ptr.as_ptr(), batch);
            sys::llama_synchronize(self.ptr.as_ptr());
            sys::llama_set_causal_attn(self.ptr.as_ptr(), true);
            if status != 0 {
                return Err(format!("llama_decode returned {status} for {n} rows of embeddings"));
            }
            let row = sys::llama_get_logits_ith(self.ptr.as_ptr(), n as i32 - 1);
            if row.is_null() {
                return Err("no logits for the last row of embeddings".into());
            }
            std::slice::from_raw_parts(row, self.model.n_vocab())
        };
        each(row);
        Ok(())
    }

    /// The token that upstream's own greedy sampler picks after the last decode.
    pub fn sample_greedy(&mut self, sampler: &Sampler) -> Token {
        // SAFETY: both are alive, and the last token of the last batch has logits.
        unsafe { sys::llama_sampler_sample(sampler.0, self.ptr.as_ptr(), -1) }
    }

    /// How often the hook saw a layer; 0 means that the model has no such tensors.
    pub fn layers_seen(&self) -> usize {
        // SAFETY: the callback does not run between decodes.
        unsafe { (*self.hook.as_ptr()).layers_seen }
    }

    pub fn hook(&self) -> &H {
        // SAFETY: the callback does not run between decodes, and decode needs `&mut self`.
        unsafe { &(*self.hook.as_ptr()).hook }
    }

    pub fn is_hooked(&self) -> bool {
        self.hooked
    }
}

impl<H: AttentionHook> Drop for Context<'_, H> {
    fn drop(&mut self) {
        // SAFETY: all three were made in `create` and are freed once, the hook after the context
        // that points to it.
        unsafe {
            sys::llama_batch_free(self.batch);
            sys::llama_free(self.ptr.as_ptr());
            drop(Box::from_raw(self.hook.as_ptr()));
        }
    }
}

/// A sampler chain that holds upstream's greedy sampler, as in llama-simple.
pub struct Sampler(*mut sys::llama_sampler);

impl Sampler {
    pub fn greedy() -> Self {
        // SAFETY: the chain takes the greedy sampler over.
        unsafe {
            let chain = sys::llama_sampler_chain_init(sys::llama_sampler_chain_default_params());
            sys::llama_sampler_chain_add(chain, sys::llama_sampler_init_greedy());
            Self(chain)
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: made in `greedy`, freed once.
        unsafe { sys::llama_sampler_free(self.0) }
    }
}
