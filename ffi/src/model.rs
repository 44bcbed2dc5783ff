//! Models: loading, and what a model says of itself.

use std::{
    collections::BTreeSet,
    ffi::{CStr, CString, c_char, c_void},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    ptr::{self, NonNull},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use ggml_sys as sys;
use simlayer::{
    Hparams, ModelParams, Progress, Vocab,
    ggml::{RopeKind, logging::keep_logs},
    gguf::{Gguf, Override, Value, check_vocab},
    model::{self, check_architecture},
};

use crate::{
    border::{Failure, Result, c_str, slice, text, write_text},
    devices,
    handles::Registry,
    log,
    lora::forget_adapters,
    settings::LazySettings,
    upstream::{self, Library},
};

pub(crate) static MODELS: Registry<Model> = Registry::new("model");

/// Addresses of the vocabularies of living models: unlike other handles these are pointers, to llama.cpp's own objects.
static VOCABS: RwLock<BTreeSet<usize>> = RwLock::new(BTreeSet::new());

/// What a `llama_model` handle stands for.
pub(crate) struct Model {
    /// `None` when only the vocabulary, or only the header, was asked for.
    pub engine: Option<simlayer::Model>,
    vocab: Vocab,
    /// `None` when only the vocabulary was asked for.
    pub hparams: Option<Hparams>,
    pub path: PathBuf,
    /// How to load it once more.
    pub load: ModelParams,
    pub architecture: String,
    /// Keys with scalar values, as text, in alphabetical order.
    meta: Vec<(CString, CString)>,
    description: String,
    ftype: u32,
    pub n_bytes: u64,
    n_params: u64,
    pub start_us: i64,
    pub load_us: i64,
    /// Whether a context has had a policy that makes layers lazy.
    lazy: AtomicBool,
}

/// Why there is no model.
enum LoadError {
    /// simlayer does not run it: what it is, in short, and the error.
    NotOurs {
        what: String,
        why: String,
    },
    Failed(Failure),
}

impl<E> From<E> for LoadError
where
    Failure: From<E>,
{
    fn from(error: E) -> LoadError {
        LoadError::Failed(error.into())
    }
}

/// For errors of the engine, which says what it does not run.
fn engine_error(error: model::Error) -> LoadError {
    let why = error.to_string();
    match error {
        model::Error::Architecture { path, architecture, .. } => {
            LoadError::NotOurs { what: format!("{}: architecture \"{architecture}\"", path.display()), why }
        }
        // A part that may be in another form there.
        model::Error::MissingTensor { .. } => LoadError::NotOurs { what: why.clone(), why },
        error if error.is_unsupported() => LoadError::NotOurs { what: why.clone(), why },
        error => error.into(),
    }
}

/// Refuses models that are not there to say how a text goes on.
fn check_use(file: &Gguf) -> std::result::Result<(), LoadError> {
    let architecture = file.architecture()?;
    let (pooling, causal) = (format!("{architecture}.pooling_type"), format!("{architecture}.attention.causal"));
    let what = match (file.u32(&pooling)?, file.bool(&causal)?) {
        (Some(kind), _) if kind as i32 != sys::LLAMA_POOLING_TYPE_NONE => {
            format!("its embeddings are pooled ({pooling} {kind})")
        }
        (_, Some(false)) => format!("its tokens see those that follow ({causal})"),
        _ => return Ok(()),
    };
    let what = format!("{}: {what}", file.path().display());
    Err(LoadError::NotOurs { why: what.clone(), what })
}

impl Model {
    /// Elements of a row that stands in place of a token; 0 of a model without weights.
    pub fn n_embd_input(&self) -> usize {
        self.hparams.as_ref().map_or(0, Hparams::n_embd_input)
    }

    /// How many positions an embedding has.
    pub fn n_positions(&self) -> usize {
        self.hparams.as_ref().map_or(1, |hparams| hparams.rope.kind.positions_per_token())
    }

    /// Says that layers may become lazy in one of the model's contexts.
    pub fn note_lazy(&self) {
        self.lazy.store(true, Ordering::Relaxed);
    }

    /// By how much a position must be above `llama_memory_seq_pos_min` to be gone on from: the window that layers have by
    /// design, as upstream says it. Where layers may become lazy otherwise it is 1 and not their window, since
    /// `seq_pos_min` is exact here, and llama-server takes no conversation up at a position within the window, however
    /// much is held.
    pub fn n_swa(&self) -> usize {
        let windows = self.hparams.iter().flat_map(|hparams| hparams.windows.iter().flatten().copied());
        let by_design = windows.max().unwrap_or(0);
        let may_be_lazy = || self.lazy.load(Ordering::Relaxed) || LazySettings::from_environment().may_be_lazy();
        by_design.max(usize::from(by_design == 0 && may_be_lazy()))
    }

    /// `any_use` also takes models that embed texts for models that go on with them.
    fn load(path: &Path, params: &sys::llama_model_params, any_use: bool) -> std::result::Result<Model, LoadError> {
        keep_logs();
        // SAFETY: reads a clock.
        let start_us = unsafe { sys::ggml_time_us() };
        // SAFETY: the caller's list, which ends with an empty key.
        let overrides = unsafe { read_overrides(params.kv_overrides) }?;
        let mut file = Gguf::open(path)?;
        for (key, value) in &overrides {
            file.set_override(key, value.clone());
        }
        if !params.vocab_only {
            check_architecture(&file).map_err(engine_error)?;
            if !any_use {
                check_use(&file)?;
            }
        }
        if params.check_tensors {
            check_tensors(&file)?;
        }
        let mut load = ModelParams { repack: params.use_extra_bufts, overrides, ..ModelParams::default() };
        let (engine, vocab, hparams) = if params.vocab_only || params.no_alloc {
            check_vocab(&file)?;
            // The vocabulary of the engine's own loader, without the weights.
            let vocab = Vocab::load_with(path, &load.overrides)?;
            let hparams = if params.vocab_only { None } else { Some(Hparams::of(&file).map_err(engine_error)?) };
            (None, vocab, hparams)
        } else {
            // SAFETY: lists of the caller's, as llama.h describes them.
            unsafe { devices::place(params, &mut load) }?;
            load.progress = progress(params);
            let engine = simlayer::Model::load(path, &load).map_err(engine_error)?;
            load.progress = None;
            let (vocab, hparams) = (engine.vocab().clone(), engine.hparams().clone());
            (Some(engine), vocab, Some(hparams))
        };

        let n_bytes = file.tensors().iter().map(|tensor| tensor.n_bytes as u64).sum();
        let n_params: u64 = file.tensors().iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
        let architecture = file.architecture()?.to_owned();
        let ftype = file.u32("general.file_type")?.unwrap_or(sys::LLAMA_FTYPE_GUESSED);
        let size = match file.str("general.size_label") {
            Ok(Some(label)) => label.to_owned(),
            _ => format!("{:.2}B", n_params as f64 / 1e9),
        };
        // SAFETY: answers with a static string for any number.
        let type_name = unsafe { CStr::from_ptr(sys::llama_ftype_name(ftype)) }.to_string_lossy().into_owned();
        let meta = read_meta(&file);
        // SAFETY: reads a clock.
        let load_us = unsafe { sys::ggml_time_us() } - start_us;
        VOCABS.write().unwrap_or_else(PoisonError::into_inner).insert(vocab.raw().as_ptr().addr());
        Ok(Model {
            engine,
            vocab,
            hparams,
            path: path.to_owned(),
            load,
            description: format!("{architecture} {size} {type_name}"),
            architecture,
            meta,
            ftype,
            lazy: AtomicBool::new(false),
            n_bytes,
            n_params,
            start_us,
            load_us,
        })
    }

    pub fn vocab(&self) -> *const sys::llama_vocab {
        self.vocab.raw().as_ptr()
    }

    pub fn n_vocab(&self) -> usize {
        self.vocab.n_tokens()
    }

    /// A number of the hyper-parameters; 0 when they were not read.
    fn count(&self, get: impl FnOnce(&Hparams) -> usize) -> i32 {
        self.hparams.as_ref().map_or(0, |hparams| i32::try_from(get(hparams)).unwrap_or(i32::MAX))
    }

    fn meta(&self, key: &CStr) -> Option<&CString> {
        let index = self.meta.binary_search_by(|(other, _)| other.as_c_str().cmp(key)).ok()?;
        Some(&self.meta[index].1)
    }

    fn number(&self, key: &str) -> Option<f32> {
        let key = CString::new(format!("{}.{key}", self.architecture)).ok()?;
        self.meta(&key)?.to_str().ok()?.parse().ok()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        VOCABS.write().unwrap_or_else(PoisonError::into_inner).remove(&self.vocab().addr());
    }
}

/// Whether the pointer is a living model's vocabulary, for the checks in C++.
#[unsafe(no_mangle)]
extern "C" fn simlayer_ext_is_vocab(vocab: *const sys::llama_vocab) -> bool {
    VOCABS.read().unwrap_or_else(PoisonError::into_inner).contains(&vocab.addr())
}

/// Takes a model back, and its adapters with it.
fn free(model: *mut sys::llama_model) -> Result<()> {
    forget_adapters(model);
    MODELS.remove(model).map(drop)
}

/// A file's keys with scalar values, as text, in alphabetical order.
pub(crate) fn read_meta(file: &Gguf) -> Vec<(CString, CString)> {
    file.keys().filter_map(|key| Some((c_text(key.as_bytes()), value_text(file.get(key)?)?))).collect()
}

/// A text up to its first NUL.
pub(crate) fn c_text(bytes: &[u8]) -> CString {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    CString::new(&bytes[..end]).unwrap_or_default()
}

/// A scalar as llama.cpp prints it; `None` for arrays, which this interface does not show.
fn value_text(value: Value<'_>) -> Option<CString> {
    let text = match value {
        Value::Array(_) => return None,
        Value::String(bytes) => return Some(c_text(bytes)),
        Value::Bool(value) => value.to_string(),
        Value::F32(value) => format!("{value:.6}"),
        Value::F64(value) => format!("{value:.6}"),
        integer => integer.to_int::<i128>()?.to_string(),
    };
    Some(c_text(text.as_bytes()))
}

/// # Safety
/// A list that is not null ends with an entry whose key is empty.
unsafe fn read_overrides(list: *const sys::llama_model_kv_override) -> Result<Vec<(String, Override)>> {
    let mut overrides = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: the entries before the last one have been passed over one by one.
        let entry = unsafe { &*next };
        if entry.key[0] == 0 {
            break;
        }
        let key = array_text(&entry.key)?;
        // SAFETY: `tag` says which member of the union was set; each of them is plain data.
        let value = unsafe {
            match entry.tag {
                sys::LLAMA_KV_OVERRIDE_TYPE_INT => Override::Int(entry.__bindgen_anon_1.val_i64),
                sys::LLAMA_KV_OVERRIDE_TYPE_FLOAT => Override::Float(entry.__bindgen_anon_1.val_f64),
                // Its lowest byte: a bool that C set carelessly must not be an invalid one of Rust's.
                sys::LLAMA_KV_OVERRIDE_TYPE_BOOL => Override::Bool(entry.__bindgen_anon_1.val_i64 as u8 != 0),
                sys::LLAMA_KV_OVERRIDE_TYPE_STR => Override::Str(array_text(&entry.__bindgen_anon_1.val_str)?),
                tag => fail!("kv_overrides: {key} has the unknown type {tag}"),
            }
        };
        overrides.push((key, value));
        next = next.wrapping_add(1);
    }
    Ok(overrides)
}

fn array_text(chars: &[c_char]) -> Result<String> {
    let bytes: Vec<u8> = chars.iter().map(|&char| char as u8).take_while(|&byte| byte != 0).collect();
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(_) => fail!("kv_overrides: not valid UTF-8"),
    }
}

fn progress(params: &sys::llama_model_params) -> Option<Progress> {
    struct Data(*mut c_void);
    // SAFETY: it is handed back to the caller's function on the thread that loads.
    unsafe impl Send for Data {}
    // SAFETY: as above.
    unsafe impl Sync for Data {}

    let function = params.progress_callback?;
    let data = Data(params.progress_callback_user_data);
    Some(Progress(Arc::new(move |share| {
        let data = &data;
        // SAFETY: the caller's function with the caller's argument, while the call that they were given to lasts.
        unsafe { function(share, data.0) }
    })))
}

fn check_tensors(file: &Gguf) -> Result<()> {
    for tensor in file.tensors() {
        let data = file.data(tensor);
        // SAFETY: the data are as many bytes as given.
        if !unsafe { sys::ggml_validate_row_data(tensor.ty.raw(), data.as_ptr().cast(), data.len()) } {
            fail!("{}: tensor {} has invalid data", file.path().display(), tensor.name);
        }
    }
    Ok(())
}

/// Loads a model, or has unmodified llama.cpp load it by `theirs`, which calls that library's function.
fn load(
    path: &Path,
    params: &sys::llama_model_params,
    theirs: impl FnOnce(&Library) -> Result<*mut sys::llama_model>,
) -> Result<*mut sys::llama_model> {
    let model = match Model::load(path, params, false) {
        Ok(model) => model,
        Err(LoadError::Failed(failure)) => return Err(failure),
        Err(LoadError::NotOurs { what, why }) => match Library::get() {
            Ok(library) => return load_there(library, &what, &why, theirs),
            Err(Failure(missing)) => match Model::load(path, params, true) {
                Ok(model) => {
                    log::warn("simlayer", &format!("{what}, but here it runs as any other: {missing}"));
                    model
                }
                Err(LoadError::Failed(failure)) => return Err(failure),
                Err(LoadError::NotOurs { why, .. }) => fail!("{why}; unmodified llama.cpp may run it, but {missing}"),
            },
        },
    };
    log::info("simlayer", &format!("{}: {}, {} tokens", path.display(), model.description, model.n_vocab()));
    if let Some(engine) = &model.engine {
        for device in engine.devices() {
            let n = (0..engine.hparams().n_layer).filter(|&layer| engine.layer_device(layer) == device).count();
            log::info("simlayer", &format!("{n} layers on {} ({})", device.name(), device.description()));
        }
    }
    Ok(MODELS.insert(model))
}

/// `what` the model is, and `why` it is not ours.
fn load_there(
    library: &Library,
    what: &str,
    why: &str,
    theirs: impl FnOnce(&Library) -> Result<*mut sys::llama_model>,
) -> Result<*mut sys::llama_model> {
    let model = theirs(library)?;
    if model.is_null() {
        fail!("{why}; nor does unmodified llama.cpp load it, which says why in the log");
    }
    log::warn("simlayer", &format!("{what}: it runs in unmodified llama.cpp, and no layer will be lazy"));
    upstream::note(model, None);
    Ok(model)
}

/// Functions of unmodified llama.cpp that load a model from this and with these parameters.
type LoadFunction<From> = unsafe extern "C" fn(From, sys::llama_model_params) -> *mut sys::llama_model;

/// # Safety
/// The library's function of that name has the type of a [`LoadFunction`], and can be called with `from` and `params`.
unsafe fn load_from<From>(
    library: &Library,
    name: &CStr,
    from: From,
    params: sys::llama_model_params,
) -> Result<*mut sys::llama_model> {
    let function = library.symbol(name)?;
    // SAFETY: the caller's promise.
    unsafe { Ok(std::mem::transmute::<NonNull<c_void>, LoadFunction<From>>(function)(from, params)) }
}

/// # Safety
/// As [`c_str`], and `params` as llama.h describes them.
unsafe fn load_file(path_model: *const c_char, params: sys::llama_model_params) -> Result<*mut sys::llama_model> {
    // SAFETY: the caller's promise.
    let path = unsafe { path(path_model) }?;
    load(path, &params, |library| {
        // SAFETY: the function has that type; the rest is the caller's promise.
        unsafe { load_from(library, c"llama_model_load_from_file", path_model, params) }
    })
}

/// # Safety
/// As [`c_str`].
unsafe fn path<'a>(path: *const c_char) -> Result<&'a Path> {
    // SAFETY: the caller's promise.
    let path = unsafe { c_str(path, "path") }?;
    Ok(Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())))
}

/// Writes the text of a key or value, or answers -1 with an empty one.
///
/// # Safety
/// As [`write_text`].
pub(crate) unsafe fn write_meta(buf: *mut c_char, size: usize, text: Option<&CString>) -> Result<i32> {
    match text {
        // SAFETY: the caller's promise.
        Some(text) => unsafe { write_text(buf, size, text.to_bytes()) },
        None => {
            // SAFETY: the caller's promise.
            unsafe { write_text(buf, size, b"") }?;
            Ok(-1)
        }
    }
}

api! {
    fn llama_model_default_params() -> sys::llama_model_params, or default_params(), {
        Ok(default_params())
    }

    fn llama_model_load_from_file(path_model: *const c_char, params: sys::llama_model_params) -> *mut sys::llama_model,
    or ptr::null_mut(), {
        // SAFETY: a C string and parameters of the caller's.
        unsafe { load_file(path_model, params) }
    }

    fn llama_load_model_from_file(path_model: *const c_char, params: sys::llama_model_params) -> *mut sys::llama_model,
    or ptr::null_mut(), {
        // SAFETY: a C string and parameters of the caller's.
        unsafe { load_file(path_model, params) }
    }

    fn llama_model_load_from_splits(paths: *mut *const c_char, n_paths: usize, params: sys::llama_model_params)
    -> *mut sys::llama_model, or ptr::null_mut(), {
        // SAFETY: an array of as many C strings of the caller's.
        let strings = unsafe { slice(paths, n_paths, "paths") }?;
        let Some(&first) = strings.first() else { fail!("no paths were given") };
        check_split_names(strings)?;
        // SAFETY: a C string of the caller's.
        load(unsafe { path(first) }?, &params, |library| {
            type Load = unsafe extern "C" fn(*mut *const c_char, usize, sys::llama_model_params) -> *mut sys::llama_model;
            let function = library.symbol(c"llama_model_load_from_splits")?;
            // SAFETY: the function has that type; its arguments are the caller's.
            unsafe { Ok(std::mem::transmute::<NonNull<c_void>, Load>(function)(paths, n_paths, params)) }
        })
    }

    fn llama_model_load_from_file_ptr(file: *mut sys::FILE, params: sys::llama_model_params) -> *mut sys::llama_model,
    or ptr::null_mut(), {
        if file.is_null() {
            fail!("file: a null pointer");
        }
        // SAFETY: an open file of the caller's.
        let (fd, position) = unsafe { (libc::fileno(file.cast()), libc::ftell(file.cast())) };
        if fd < 0 || position != 0 {
            fail!("the model must begin at the beginning of the file (it is at byte {position})");
        }
        let link = PathBuf::from(format!("/proc/self/fd/{fd}"));
        let named = std::fs::read_link(&link).ok().filter(|path| path.is_file());
        load(&named.unwrap_or(link), &params, |library| {
            // SAFETY: the function has that type; its arguments are the caller's.
            unsafe { load_from(library, c"llama_model_load_from_file_ptr", file, params) }
        })
    }

    // Unmodified llama.cpp does it.
    fn llama_model_init_from_user(
        metadata: *mut sys::gguf_context,
        set_tensor_data: sys::llama_model_set_tensor_data_t,
        data: *mut c_void,
        params: sys::llama_model_params,
    ) -> *mut sys::llama_model, or ptr::null_mut(), {
        type Init = unsafe extern "C" fn(
            *mut sys::gguf_context, sys::llama_model_set_tensor_data_t, *mut c_void, sys::llama_model_params,
        ) -> *mut sys::llama_model;
        if metadata.is_null() {
            fail!("metadata: a null pointer");
        }
        let what = "a model that is no file";
        load_there(Library::get()?, what, what, |library| {
            let function = library.symbol(c"llama_model_init_from_user")?;
            // SAFETY: the function has that type; its arguments are the caller's.
            unsafe {
                let init = std::mem::transmute::<NonNull<c_void>, Init>(function);
                Ok(init(metadata, set_tensor_data, data, params))
            }
        })
    }

    fn llama_model_save_to_file(_model: *const sys::llama_model, _path: *const c_char), or (), {
        fail!("writing models is not supported")
    }

    fn llama_model_free(model: *mut sys::llama_model), or (), {
        free(model)
    }

    fn llama_free_model(model: *mut sys::llama_model), or (), {
        free(model)
    }

    fn llama_model_get_vocab(model: *const sys::llama_model) -> *const sys::llama_vocab, or ptr::null(), {
        Ok(MODELS.get(model)?.vocab())
    }

    fn llama_model_rope_type(model: *const sys::llama_model) -> sys::llama_rope_type, or sys::LLAMA_ROPE_TYPE_NONE, {
        Ok(MODELS.get(model)?.hparams.as_ref().map_or(sys::LLAMA_ROPE_TYPE_NONE, |hparams| match hparams.rope.kind {
            RopeKind::Norm => sys::LLAMA_ROPE_TYPE_NORM,
            RopeKind::Neox => sys::LLAMA_ROPE_TYPE_NEOX,
            RopeKind::Multi(_) => sys::LLAMA_ROPE_TYPE_MROPE,
            RopeKind::Interleaved(_) => sys::LLAMA_ROPE_TYPE_IMROPE,
        }))
    }

    fn llama_model_n_ctx_train(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_ctx_train))
    }

    fn llama_n_ctx_train(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_ctx_train))
    }

    fn llama_model_n_embd(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_embd))
    }

    fn llama_n_embd(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_embd))
    }

    fn llama_model_n_embd_inp(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(Hparams::n_embd_input))
    }

    fn llama_model_n_embd_out(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_embd))
    }

    fn llama_model_n_layer(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_layer))
    }

    fn llama_n_layer(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_layer))
    }

    fn llama_model_n_layer_nextn(model: *const sys::llama_model) -> i32, or 0, {
        MODELS.get(model)?;
        Ok(0)
    }

    fn llama_model_n_head(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_head))
    }

    fn llama_n_head(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_head))
    }

    fn llama_model_n_head_kv(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.count(|hparams| hparams.n_head_kv))
    }

    fn llama_model_n_swa(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.n_swa() as i32)
    }

    fn llama_model_rope_freq_scale_train(model: *const sys::llama_model) -> f32, or 0.0, {
        Ok(MODELS.get(model)?.hparams.as_ref().map_or(0.0, |hparams| hparams.rope.freq_scale))
    }

    fn llama_model_n_cls_out(model: *const sys::llama_model) -> u32, or 0, {
        MODELS.get(model)?;
        Ok(0)
    }

    fn llama_model_cls_label(model: *const sys::llama_model, _i: u32) -> *const c_char, or ptr::null(), {
        MODELS.get(model)?;
        Ok(ptr::null())
    }

    fn llama_model_meta_val_str(model: *const sys::llama_model, key: *const c_char, buf: *mut c_char, size: usize)
    -> i32, or -1, {
        let model = MODELS.get(model)?;
        // SAFETY: a C string and a buffer of the caller's.
        unsafe { write_meta(buf, size, model.meta(c_str(key, "key")?)) }
    }

    fn llama_model_meta_count(model: *const sys::llama_model) -> i32, or 0, {
        Ok(MODELS.get(model)?.meta.len() as i32)
    }

    fn llama_model_meta_key_str(key: sys::llama_model_meta_key) -> *const c_char, or ptr::null(), {
        Ok(match key {
            sys::LLAMA_MODEL_META_KEY_SAMPLING_SEQUENCE => c"general.sampling.sequence".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_TOP_K => c"general.sampling.top_k".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_TOP_P => c"general.sampling.top_p".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_MIN_P => c"general.sampling.min_p".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_XTC_PROBABILITY => c"general.sampling.xtc_probability".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_XTC_THRESHOLD => c"general.sampling.xtc_threshold".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_TEMP => c"general.sampling.temp".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_LAST_N => c"general.sampling.penalty_last_n".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_REPEAT => c"general.sampling.penalty_repeat".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_MIROSTAT => c"general.sampling.mirostat".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_MIROSTAT_TAU => c"general.sampling.mirostat_tau".as_ptr(),
            sys::LLAMA_MODEL_META_KEY_SAMPLING_MIROSTAT_ETA => c"general.sampling.mirostat_eta".as_ptr(),
            _ => ptr::null(),
        })
    }

    fn llama_model_meta_key_by_index(model: *const sys::llama_model, i: i32, buf: *mut c_char, size: usize) -> i32,
    or -1, {
        let model = MODELS.get(model)?;
        let key = usize::try_from(i).ok().and_then(|i| model.meta.get(i)).map(|(key, _)| key);
        // SAFETY: a buffer of the caller's.
        unsafe { write_meta(buf, size, key) }
    }

    fn llama_model_meta_val_str_by_index(model: *const sys::llama_model, i: i32, buf: *mut c_char, size: usize) -> i32,
    or -1, {
        let model = MODELS.get(model)?;
        let value = usize::try_from(i).ok().and_then(|i| model.meta.get(i)).map(|(_, value)| value);
        // SAFETY: a buffer of the caller's.
        unsafe { write_meta(buf, size, value) }
    }

    fn llama_model_desc(model: *const sys::llama_model, buf: *mut c_char, size: usize) -> i32, or -1, {
        // SAFETY: a buffer of the caller's.
        unsafe { write_text(buf, size, MODELS.get(model)?.description.as_bytes()) }
    }

    fn llama_model_ftype(model: *const sys::llama_model) -> sys::llama_ftype, or sys::LLAMA_FTYPE_GUESSED, {
        Ok(MODELS.get(model)?.ftype)
    }

    fn llama_model_size(model: *const sys::llama_model) -> u64, or 0, {
        Ok(MODELS.get(model)?.n_bytes)
    }

    fn llama_model_chat_template(model: *const sys::llama_model, name: *const c_char) -> *const c_char, or ptr::null(), {
        let model = MODELS.get(model)?;
        let key = match name.is_null() {
            true => "tokenizer.chat_template".to_owned(),
            // SAFETY: a C string of the caller's.
            false => format!("tokenizer.chat_template.{}", unsafe { text(name, "name") }?),
        };
        let key = CString::new(key)?;
        // The text lives as long as the model.
        Ok(model.meta(&key).map_or(ptr::null(), |text| text.as_ptr()))
    }

    fn llama_model_n_params(model: *const sys::llama_model) -> u64, or 0, {
        Ok(MODELS.get(model)?.n_params)
    }

    fn llama_model_has_encoder(model: *const sys::llama_model) -> bool, or false, {
        MODELS.get(model)?;
        Ok(false)
    }

    fn llama_model_has_decoder(model: *const sys::llama_model) -> bool, or false, {
        MODELS.get(model)?;
        Ok(true)
    }

    fn llama_model_decoder_start_token(model: *const sys::llama_model) -> sys::llama_token, or sys::LLAMA_TOKEN_NULL, {
        MODELS.get(model)?;
        Ok(sys::LLAMA_TOKEN_NULL)
    }

    fn llama_model_is_recurrent(model: *const sys::llama_model) -> bool, or false, {
        MODELS.get(model)?;
        Ok(false)
    }

    fn llama_model_is_hybrid(model: *const sys::llama_model) -> bool, or false, {
        Ok(MODELS.get(model)?.hparams.as_ref().is_some_and(Hparams::is_recurrent))
    }

    fn llama_model_is_diffusion(model: *const sys::llama_model) -> bool, or false, {
        MODELS.get(model)?;
        Ok(false)
    }
}

/// Everything null, zero or false.
pub(crate) fn default_params() -> sys::llama_model_params {
    sys::llama_model_params {
        devices: ptr::null_mut(),
        tensor_buft_overrides: ptr::null(),
        n_gpu_layers: -1,
        split_mode: sys::LLAMA_SPLIT_MODE_LAYER,
        load_mode: sys::LLAMA_LOAD_MODE_AUTO,
        lazy_mode: sys::LLAMA_LAZY_MODE_AUTO,
        main_gpu: 0,
        tensor_split: ptr::null(),
        progress_callback: None,
        progress_callback_user_data: ptr::null_mut(),
        kv_overrides: ptr::null(),
        vocab_only: false,
        check_tensors: false,
        use_extra_bufts: true,
        no_host: false,
        no_alloc: false,
        load_mtp: false,
    }
}

/// The engine finds the parts of a split model by their names, so the paths must be those.
fn check_split_names(paths: &[*const c_char]) -> Result<()> {
    if paths.len() < 2 {
        return Ok(());
    }
    let wrong = || Failure("split models must be named <prefix>-00001-of-0000N.gguf, in order: rename them".into());
    let n = i32::try_from(paths.len()).map_err(|_| wrong())?;
    let (mut prefix, mut expected) = (vec![0 as c_char; 4096], vec![0 as c_char; 4096]);
    for (i, &path) in (0..).zip(paths) {
        // SAFETY: C strings of the caller's; the buffers have the given sizes, and what is in them ends with a NUL.
        unsafe {
            let path = c_str(path, "paths")?;
            if i == 0 && sys::llama_split_prefix(prefix.as_mut_ptr(), prefix.len(), path.as_ptr(), 0, n) <= 0 {
                return Err(wrong());
            }
            sys::llama_split_path(expected.as_mut_ptr(), expected.len(), prefix.as_ptr(), i, n);
            if CStr::from_ptr(expected.as_ptr()) != path {
                return Err(wrong());
            }
        }
    }
    Ok(())
}

/// Experts of a layer, for llama-ext.h.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_ext_n_expert(model: *const sys::llama_model) -> i32 {
    crate::border::guard("llama_model_n_expert", 0, || {
        Ok(MODELS.get(model)?.number("expert_count").unwrap_or(0.0) as i32)
    })
}
