//! Contexts: a session of the engine with what llama.h keeps beside it.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ggml_sys as sys;
use simlayer::{
    KvRotate, Model as EngineModel, Session, SessionParams,
    ggml::{AbortCallback, Type},
    gguf::Override,
};

use crate::{
    border::{Failure, Result},
    handles::Registry,
    log,
    model::{MODELS, Model},
    perf::{self, Perf},
    settings::LazySettings,
    system::MAX_SEQUENCES,
};

pub(crate) static CONTEXTS: Registry<Context> = Registry::new("context");

/// What a `llama_context` handle stands for, and its `llama_memory_t`, which is the same address.
pub(crate) struct Context {
    pub model: Arc<Model>,
    pub limits: Limits,
    pub pooling: sys::llama_pooling_type,
    /// Whether the frontend takes it that windows are never dropped, so that `llama_model_n_swa` is nothing to it.
    pub swa_full: bool,
    /// The model's handle, to be given back.
    handle: usize,
    type_bytes: usize,
    state: Mutex<State>,
}

/// What does not change in a context's life.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub n_ctx: usize,
    pub n_ctx_seq: usize,
    pub n_batch: usize,
    pub n_ubatch: usize,
    pub n_seq_max: usize,
    pub kv_unified: bool,
}

impl Limits {
    /// Sequence ids are below this.
    pub fn n_seq_ids(&self) -> usize {
        if self.kv_unified { MAX_SEQUENCES } else { self.n_seq_max }
    }
}

/// What changes.
pub(crate) struct State {
    /// `None` on a model that was opened without its weights.
    pub session: Option<Session>,
    pub embeddings: bool,
    /// Whether tokens see only those before them.
    pub causal: bool,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    pub pools: Pools,
    pub outputs: Outputs,
    /// Of each sequence, whether its layers were scored since it was empty.
    pub scored: BTreeMap<u32, bool>,
    /// Of each sequence, how many of its first tokens are copies, which `n_ctx` does not count.
    pub shared: BTreeMap<u32, usize>,
    /// Sequences whose next tokens are scored, whatever they are.
    pub score_next: Vec<u32>,
    pub perf: Perf,
}

/// Threads that the frontend lends.
#[derive(Clone, Copy, Default)]
pub(crate) struct Pools {
    pub one: Option<NonNull<sys::ggml_threadpool>>,
    pub batch: Option<NonNull<sys::ggml_threadpool>>,
}

// SAFETY: thread pools are used by one computation at a time, from any thread; the frontend keeps them alive until it
// detaches them, as llama.h asks.
unsafe impl Send for Pools {}

/// What the last batch gave.
#[derive(Default)]
pub(crate) struct Outputs {
    /// The row of each of the batch's tokens, -1 for those without.
    pub rows: Vec<i32>,
    pub n_rows: usize,
    pub logits: Vec<f32>,
    pub embeddings: Vec<f32>,
    /// Pooled embeddings of the batch's sequences.
    pub pooled: BTreeMap<u32, Vec<f32>>,
}

impl Outputs {
    pub fn clear(&mut self) {
        self.rows.clear();
        self.n_rows = 0;
        self.logits.clear();
        self.embeddings.clear();
        self.pooled.clear();
    }

    /// Row `i` of `data`: of the batch's token `i`, or counted from the end.
    fn row(&mut self, i: i32, of_logits: bool) -> Result<*mut f32> {
        let row = match usize::try_from(i) {
            Err(_) => self.n_rows.checked_sub(i.unsigned_abs() as usize),
            Ok(i) => match self.rows.get(i) {
                None => fail!("{i} is out of range: the last batch had {} tokens", self.rows.len()),
                Some(&row) => usize::try_from(row).ok(),
            },
        };
        let Some(row) = row else { fail!("token {i} of the last batch has no output: {} have one", self.n_rows) };
        let data = if of_logits { &mut self.logits } else { &mut self.embeddings };
        let width = data.len() / self.n_rows.max(1);
        match data.get_mut(row * width..(row + 1) * width) {
            Some(row) if !row.is_empty() => Ok(row.as_mut_ptr()),
            _ => fail!("the last batch gave no {}", if of_logits { "logits" } else { "embeddings" }),
        }
    }
}

impl Context {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic in the engine its caches are still owned memory; the next call's checks apply to them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new(handle: *mut sys::llama_model, params: &sys::llama_context_params) -> Result<Context> {
        let model = MODELS.get(handle)?;
        // A vocabulary alone has a context as well, which can run nothing.
        let (n_ctx_train, kv_elements) = match &model.hparams {
            Some(hparams) => (hparams.n_ctx_train, hparams.f16_kv_bytes_per_token() / 4),
            None => (512, 0),
        };
        if params.n_batch == 0 && params.n_ubatch == 0 {
            fail!("n_batch and n_ubatch cannot both be zero");
        }
        let n_seq_max = (params.n_seq_max as usize).max(1);
        if n_seq_max > MAX_SEQUENCES {
            fail!("n_seq_max is {n_seq_max}, the most is {MAX_SEQUENCES}");
        }
        let pooling = match params.pooling_type {
            sys::LLAMA_POOLING_TYPE_UNSPECIFIED => sys::LLAMA_POOLING_TYPE_NONE,
            sys::LLAMA_POOLING_TYPE_RANK => fail!("pooling type rank: the model has no classifier"),
            pooling @ 0..sys::LLAMA_POOLING_TYPE_RANK => pooling,
            other => fail!("{other} is no pooling type"),
        };
        if params.attention_type == sys::LLAMA_ATTENTION_TYPE_NON_CAUSAL {
            fail!("non-causal attention is not supported by simlayer");
        }
        if params.ctx_type != sys::LLAMA_CONTEXT_TYPE_DEFAULT || !params.ctx_other.is_null() {
            fail!("contexts for multi-token prediction are not supported by simlayer");
        }

        // As upstream does: sizes of whole blocks, shared evenly unless the cache is unified.
        let n_ctx = if params.n_ctx == 0 { n_ctx_train } else { params.n_ctx as usize };
        let n_batch = n_ctx.min(params.n_batch as usize);
        let n_ubatch = match params.n_ubatch as usize {
            0 => n_batch,
            n => n.min(n_batch),
        };
        let n_ctx = n_ctx.next_multiple_of(256);
        let n_ctx_seq = if params.kv_unified { n_ctx } else { (n_ctx / n_seq_max).next_multiple_of(256) };
        let n_ctx = if params.kv_unified { n_ctx } else { n_ctx_seq * n_seq_max };
        if n_ctx_seq == 0 || n_ubatch == 0 || n_ctx > i32::MAX as usize {
            fail!("n_ctx {n_ctx}, n_batch {n_batch} and n_ubatch {n_ubatch} make no context");
        }
        let limits = Limits { n_ctx, n_ctx_seq, n_batch, n_ubatch, n_seq_max, kv_unified: params.kv_unified };

        let (type_k, type_v) = (cache_type(params.type_k)?, cache_type(params.type_v)?);
        let session_params = SessionParams {
            n_ctx: n_ctx_seq,
            n_ubatch,
            n_threads: threads(params.n_threads),
            n_threads_batch: threads(params.n_threads_batch),
            type_k,
            type_v,
            // llama-server reads a prompt's last few tokens apart, to make a checkpoint before them.
            split_prompts: true,
            op_offload: params.op_offload,
            flash_attn: params.flash_attn_type != sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            ..SessionParams::default()
        };
        let session = match &model.engine {
            Some(engine) => Some(start(&model, engine, params, session_params)?),
            None => None,
        };

        let mut state = State {
            session,
            embeddings: params.embeddings,
            causal: true,
            n_threads: params.n_threads,
            n_threads_batch: params.n_threads_batch,
            pools: Pools::default(),
            outputs: Outputs::default(),
            scored: BTreeMap::new(),
            shared: BTreeMap::new(),
            score_next: Vec::new(),
            perf: Perf::new(params.no_perf),
        };
        if let Some(session) = &mut state.session {
            session.set_embeddings(params.embeddings);
            let scheduler = session.scheduler();
            // SAFETY: the frontend's callbacks with their arguments, which it keeps valid for the context's life.
            unsafe {
                scheduler.set_abort_callback(abort_callback(params.abort_callback, params.abort_callback_data));
                scheduler.set_eval_callback(params.cb_eval, params.cb_eval_user_data);
            }
        }
        let type_bytes = type_k.row_bytes(kv_elements) + type_v.row_bytes(kv_elements);
        Ok(Context {
            model: Arc::clone(&model),
            limits,
            pooling,
            swa_full: params.swa_full,
            handle: handle.addr(),
            type_bytes,
            state: Mutex::new(state),
        })
    }
}

fn abort_callback(function: sys::ggml_abort_callback, data: *mut c_void) -> Option<AbortCallback> {
    function.map(|function| (function, data))
}

/// At least one thread, and no more than there are cores: ggml's threads spin while they wait for each other, so that
/// one without a core of its own stops all. llama.h's default is 4, wherever it runs.
fn threads(asked: i32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    usize::try_from(asked).unwrap_or(0).clamp(1, cores)
}

fn cache_type(raw: sys::ggml_type) -> Result<Type> {
    match Type::from_raw(raw).filter(|ty| Type::CACHE.contains(ty)) {
        Some(ty) => Ok(ty),
        None => fail!("ggml type {raw} is no type of a KV cache"),
    }
}

/// When rows are rotated: as llama.cpp does it, where its variable for turning that off has this value.
fn rotation(disabled: Option<&str>) -> KvRotate {
    let number = disabled.and_then(|text| text.trim().parse::<i32>().ok());
    if number.is_some_and(|number| number != 0) { KvRotate::Never } else { KvRotate::LlamaCpp }
}

/// A session with what the parameters and the environment ask for.
fn start(
    model: &Model,
    engine: &EngineModel,
    params: &sys::llama_context_params,
    session: SessionParams,
) -> Result<Session> {
    let engine = match rope_overrides(model, params)? {
        overrides if overrides.is_empty() => engine.clone(),
        overrides => {
            // RoPE is part of the loaded model, so that another one is another model; weights that need no repacking
            // stay in the mapped file.
            let mut load = model.load.clone();
            load.overrides.extend(overrides);
            EngineModel::load(&model.path, &load)?
        }
    };
    let with = |settings: LazySettings| {
        let mut session = session.clone();
        if settings.lazy.narrow_keys {
            session.type_k = Type::Q8_0;
        }
        if !settings.may_be_lazy() && !settings.lazy.narrow_keys {
            // The answers are llama.cpp's, bit for bit: its kernel, and no exact copies.
            session.fused_attention = false;
            session.kv_exact = 0;
            session.kv_rotate = rotation(std::env::var("LLAMA_ATTN_ROT_DISABLE").ok().as_deref());
        } else {
            // The answers are simlayer-run's, whatever llama.cpp's kernels a frontend asks for (llama-cpp-python's
            // default is the one without flash attention).
            session.flash_attn = true;
            model.note_lazy();
        }
        (session.lazy, session.prune) = (settings.lazy, settings.prune);
        Session::new(&engine, session)
    };
    match with(LazySettings::from_environment()) {
        Ok(session) => Ok(session),
        Err(error) => {
            // When it works without them, the environment's settings were what was wrong.
            let started = with(LazySettings::off())?;
            log::warn_once("simlayer", &format!("the SIMLAYER_ variables are ignored: {error}"));
            Ok(started)
        }
    }
}

/// The file keys that stand for the RoPE settings which differ from the file's.
fn rope_overrides(model: &Model, params: &sys::llama_context_params) -> Result<Vec<(String, Override)>> {
    let mut overrides = Vec::new();
    let mut set = |key: &str, value| overrides.push((format!("{}.rope.{key}", model.architecture), value));
    match params.rope_scaling_type {
        sys::LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED => {}
        sys::LLAMA_ROPE_SCALING_TYPE_NONE => set("scaling.type", Override::Str("none".into())),
        sys::LLAMA_ROPE_SCALING_TYPE_LINEAR => set("scaling.type", Override::Str("linear".into())),
        sys::LLAMA_ROPE_SCALING_TYPE_YARN => set("scaling.type", Override::Str("yarn".into())),
        other => fail!("RoPE scaling type {other} is not supported by simlayer"),
    }
    if params.rope_freq_base != 0.0 {
        set("freq_base", Override::Float(f64::from(params.rope_freq_base)));
    }
    if params.rope_freq_scale != 0.0 {
        set("scaling.factor", Override::Float(1.0 / f64::from(params.rope_freq_scale)));
    }
    if params.yarn_orig_ctx != 0 {
        set("scaling.original_context_length", Override::Int(i64::from(params.yarn_orig_ctx)));
    }
    // The rest has no key in a file; only the usual values can be had.
    let is_yarn = match params.rope_scaling_type {
        sys::LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED => {
            model.hparams.as_ref().is_some_and(|hparams| hparams.rope.ext_factor != 0.0)
        }
        other => other == sys::LLAMA_ROPE_SCALING_TYPE_YARN,
    };
    for (name, value, usual) in [
        ("yarn_ext_factor", params.yarn_ext_factor, if is_yarn { 1.0 } else { 0.0 }),
        ("yarn_attn_factor", params.yarn_attn_factor, 1.0),
        ("yarn_beta_fast", params.yarn_beta_fast, 32.0),
        ("yarn_beta_slow", params.yarn_beta_slow, 1.0),
    ] {
        if value >= 0.0 && value != usual {
            fail!("{name} {value} is not supported by simlayer, only {usual}");
        }
    }
    Ok(overrides)
}

/// The session of a context that has one.
pub(crate) fn session(state: &mut State) -> Result<&mut Session> {
    state.session.as_mut().ok_or_else(|| Failure("the model was loaded without its weights".into()))
}

fn init(model: *mut sys::llama_model, params: &sys::llama_context_params) -> Result<*mut sys::llama_context> {
    let context = Context::new(model, params)?;
    log::info("simlayer", &format!("context: {:?}", context.limits));
    Ok(CONTEXTS.insert(context))
}

api! {
    fn llama_context_default_params() -> sys::llama_context_params, or default_params(), {
        Ok(default_params())
    }

    fn llama_init_from_model(model: *mut sys::llama_model, params: sys::llama_context_params)
    -> *mut sys::llama_context, or ptr::null_mut(), {
        init(model, &params)
    }

    fn llama_new_context_with_model(model: *mut sys::llama_model, params: sys::llama_context_params)
    -> *mut sys::llama_context, or ptr::null_mut(), {
        init(model, &params)
    }

    fn llama_free(ctx: *mut sys::llama_context), or (), {
        CONTEXTS.remove(ctx).map(drop)
    }

    fn llama_n_ctx(ctx: *const sys::llama_context) -> u32, or 0, {
        Ok(CONTEXTS.get(ctx)?.limits.n_ctx as u32)
    }

    fn llama_n_ctx_seq(ctx: *const sys::llama_context) -> u32, or 0, {
        Ok(CONTEXTS.get(ctx)?.limits.n_ctx_seq as u32)
    }

    fn llama_n_batch(ctx: *const sys::llama_context) -> u32, or 0, {
        Ok(CONTEXTS.get(ctx)?.limits.n_batch as u32)
    }

    fn llama_n_ubatch(ctx: *const sys::llama_context) -> u32, or 0, {
        Ok(CONTEXTS.get(ctx)?.limits.n_ubatch as u32)
    }

    fn llama_n_seq_max(ctx: *const sys::llama_context) -> u32, or 0, {
        Ok(CONTEXTS.get(ctx)?.limits.n_seq_max as u32)
    }

    fn llama_n_rs_seq(ctx: *const sys::llama_context) -> u32, or 0, {
        CONTEXTS.get(ctx)?;
        Ok(0)
    }

    fn llama_get_model(ctx: *const sys::llama_context) -> *const sys::llama_model, or ptr::null(), {
        Ok(ptr::without_provenance(CONTEXTS.get(ctx)?.handle))
    }

    fn llama_get_memory(ctx: *const sys::llama_context) -> sys::llama_memory_t, or ptr::null_mut(), {
        CONTEXTS.get(ctx)?;
        Ok(ctx.cast_mut().cast())
    }

    fn llama_pooling_type(ctx: *const sys::llama_context) -> sys::llama_pooling_type,
    or sys::LLAMA_POOLING_TYPE_UNSPECIFIED, {
        Ok(CONTEXTS.get(ctx)?.pooling)
    }

    fn llama_set_n_threads(ctx: *mut sys::llama_context, n_threads: i32, n_threads_batch: i32), or (), {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        (state.n_threads, state.n_threads_batch) = (n_threads, n_threads_batch);
        session(&mut state)?.set_threads(threads(n_threads), threads(n_threads_batch));
        Ok(())
    }

    fn llama_n_threads(ctx: *mut sys::llama_context) -> i32, or 0, {
        Ok(CONTEXTS.get(ctx)?.lock().n_threads)
    }

    fn llama_n_threads_batch(ctx: *mut sys::llama_context) -> i32, or 0, {
        Ok(CONTEXTS.get(ctx)?.lock().n_threads_batch)
    }

    fn llama_attach_threadpool(
        ctx: *mut sys::llama_context,
        threadpool: sys::ggml_threadpool_t,
        threadpool_batch: sys::ggml_threadpool_t,
    ), or (), {
        let one = NonNull::new(threadpool);
        CONTEXTS.get(ctx)?.lock().pools = Pools { one, batch: NonNull::new(threadpool_batch).or(one) };
        Ok(())
    }

    fn llama_detach_threadpool(ctx: *mut sys::llama_context), or (), {
        CONTEXTS.get(ctx)?.lock().pools = Pools::default();
        Ok(())
    }

    fn llama_set_embeddings(ctx: *mut sys::llama_context, embeddings: bool), or (), {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        state.embeddings = embeddings;
        session(&mut state)?.set_embeddings(embeddings);
        Ok(())
    }

    fn llama_set_causal_attn(ctx: *mut sys::llama_context, causal_attn: bool), or (), {
        CONTEXTS.get(ctx)?.lock().causal = causal_attn;
        Ok(())
    }

    fn llama_get_causal_attn(ctx: *const sys::llama_context) -> bool, or true, {
        Ok(CONTEXTS.get(ctx)?.lock().causal)
    }

    fn llama_set_warmup(ctx: *mut sys::llama_context, _warmup: bool), or (), {
        // All weights of the models here are read in any run.
        CONTEXTS.get(ctx).map(drop)
    }

    fn llama_set_abort_callback(ctx: *mut sys::llama_context, function: sys::ggml_abort_callback, data: *mut c_void),
    or (), {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        // SAFETY: the frontend's callback with its argument, which it keeps valid.
        unsafe { session(&mut state)?.scheduler().set_abort_callback(abort_callback(function, data)) };
        Ok(())
    }

    fn llama_synchronize(ctx: *mut sys::llama_context), or (), {
        // Every call here returns when its results are there.
        CONTEXTS.get(ctx).map(drop)
    }

    fn llama_get_logits(ctx: *mut sys::llama_context) -> *mut f32, or ptr::null_mut(), {
        let context = CONTEXTS.get(ctx)?;
        let logits = &mut context.lock().outputs.logits;
        Ok(if logits.is_empty() { ptr::null_mut() } else { logits.as_mut_ptr() })
    }

    fn llama_get_logits_ith(ctx: *mut sys::llama_context, i: i32) -> *mut f32, or ptr::null_mut(), {
        CONTEXTS.get(ctx)?.lock().outputs.row(i, true)
    }

    fn llama_get_embeddings(ctx: *mut sys::llama_context) -> *mut f32, or ptr::null_mut(), {
        let context = CONTEXTS.get(ctx)?;
        let embeddings = &mut context.lock().outputs.embeddings;
        Ok(if embeddings.is_empty() { ptr::null_mut() } else { embeddings.as_mut_ptr() })
    }

    fn llama_get_embeddings_ith(ctx: *mut sys::llama_context, i: i32) -> *mut f32, or ptr::null_mut(), {
        CONTEXTS.get(ctx)?.lock().outputs.row(i, false)
    }

    fn llama_get_embeddings_seq(ctx: *mut sys::llama_context, seq_id: sys::llama_seq_id) -> *mut f32,
    or ptr::null_mut(), {
        let context = CONTEXTS.get(ctx)?;
        let pooled = &mut context.lock().outputs.pooled;
        let of_seq = u32::try_from(seq_id).ok().and_then(|seq| pooled.get_mut(&seq));
        Ok(of_seq.map_or(ptr::null_mut(), |pooled| pooled.as_mut_ptr()))
    }
}

pub(crate) fn default_params() -> sys::llama_context_params {
    let threads = sys::GGML_DEFAULT_N_THREADS as i32;
    sys::llama_context_params {
        n_ctx: 512,
        n_batch: 2048,
        n_ubatch: 512,
        n_seq_max: 1,
        n_rs_seq: 0,
        n_outputs_max: 0,
        n_outputs_max_per_seq: 1,
        n_threads: threads,
        n_threads_batch: threads,
        ctx_type: sys::LLAMA_CONTEXT_TYPE_DEFAULT,
        rope_scaling_type: sys::LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        pooling_type: sys::LLAMA_POOLING_TYPE_UNSPECIFIED,
        attention_type: sys::LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        flash_attn_type: sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
        rope_freq_base: 0.0,
        rope_freq_scale: 0.0,
        yarn_ext_factor: -1.0,
        yarn_attn_factor: -1.0,
        yarn_beta_fast: -1.0,
        yarn_beta_slow: -1.0,
        yarn_orig_ctx: 0,
        defrag_thold: -1.0,
        cb_eval: None,
        cb_eval_user_data: ptr::null_mut(),
        type_k: sys::GGML_TYPE_F16,
        type_v: sys::GGML_TYPE_F16,
        abort_callback: None,
        abort_callback_data: ptr::null_mut(),
        embeddings: false,
        offload_kqv: true,
        no_perf: true,
        op_offload: true,
        swa_full: true,
        kv_unified: false,
        samplers: ptr::null_mut(),
        n_samplers: 0,
        ctx_other: ptr::null_mut(),
    }
}

fn perf_data(context: &Context) -> sys::llama_perf_context_data {
    context.lock().perf.data(context.model.start_us, context.model.load_us)
}

api! {
    fn llama_perf_context(ctx: *const sys::llama_context) -> sys::llama_perf_context_data, or perf::NOTHING, {
        Ok(perf_data(&*CONTEXTS.get(ctx)?))
    }

    fn llama_perf_context_print(ctx: *const sys::llama_context), or (), {
        let data = perf_data(&*CONTEXTS.get(ctx)?);
        // SAFETY: reads a clock.
        perf::print(&data, unsafe { sys::ggml_time_us() });
        Ok(())
    }

    fn llama_perf_context_reset(ctx: *mut sys::llama_context), or (), {
        // SAFETY: reads a clock.
        CONTEXTS.get(ctx)?.lock().perf.reset(unsafe { sys::ggml_time_us() });
        Ok(())
    }
}

/// Bytes of weights, of the cache when it is full, and of intermediate results: for llama-ext.h.
///
/// # Safety
/// `bytes` has room for three numbers.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_ext_memory(ctx: *const sys::llama_context, bytes: *mut usize) -> bool {
    crate::border::guard("llama_get_memory_breakdown", false, || {
        let context = CONTEXTS.get(ctx)?;
        // SAFETY: as said.
        let bytes = unsafe { crate::border::slice_mut(bytes, 3, "bytes") }?;
        let compute = context.lock().session.as_ref().map_or(0, Session::compute_bytes);
        bytes.copy_from_slice(&[context.model.n_bytes as usize, context.limits.n_ctx * context.type_bytes, compute]);
        Ok(true)
    })
}
