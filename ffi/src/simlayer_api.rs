//! The functions of simlayer.h.

use std::ffi::c_char;

use ggml_sys as sys;
use simlayer::{
    LayerKind,
    lazy::{At, LayerWindows, LazyParams, Policy, PrefillMode},
};

use crate::{
    batch::sequence,
    border::{Result, guard, slice, slice_mut},
    context::{CONTEXTS, session},
    log,
    settings::{LazySettings, parse_types},
    system,
};

/// `struct simlayer_params`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Params {
    pub size: usize,
    pub lazy: [u8; 2048],
    pub lazy_type: [u8; 64],
    pub n_sink: u32,
    pub n_window: u32,
    pub n_queries: u32,
    pub at: i32,
    pub prefill: i32,
    pub narrow_keys: i32,
}

/// `struct simlayer_layer`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub index: i32,
    pub kind: i32,
    pub has_score: i32,
    pub score: f32,
    pub bytes: u64,
}

/// `struct simlayer_memory`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub size: usize,
    pub tokens: u64,
    pub f16_bytes: u64,
    pub allocated_bytes: u64,
    pub peak_bytes: u64,
    pub lazy_layers: u32,
    pub active_layers: u32,
}

/// The size that a struct with a size member says it has.
///
/// # Safety
/// A pointer that is not null points to a struct that begins with its size.
unsafe fn size_of_struct<T>(ptr: *const T, what: &str) -> Result<usize> {
    // SAFETY: the caller's promise.
    let size = unsafe { slice(ptr.cast::<usize>(), 1, what) }?[0];
    if size < size_of::<usize>() || size > 1 << 20 {
        fail!("{what}: set its size member to sizeof(*{what}); it is {size}");
    }
    Ok(size)
}

/// Writes as much of `value` as the caller's struct has room for; its own size stays.
///
/// # Safety
/// As [`size_of_struct`]; the struct has as many bytes as it says.
unsafe fn write_struct<T: Copy>(to: *mut T, value: &T, what: &str) -> Result<()> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_struct(to, what) }?.min(size_of::<T>());
    // SAFETY: both have at least `size` bytes, and `T` is plain data whose first member is the size, which is put back.
    unsafe {
        let own_size = to.cast::<usize>().read();
        std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), to.cast::<u8>(), size);
        to.cast::<usize>().write(own_size);
    }
    Ok(())
}

fn text_of<'a>(chars: &'a [u8], what: &str) -> Result<&'a str> {
    let Some(end) = chars.iter().position(|&char| char == 0) else { fail!("{what}: it has no NUL at its end") };
    match std::str::from_utf8(&chars[..end]) {
        Ok(text) => Ok(text),
        Err(_) => fail!("{what}: not valid UTF-8"),
    }
}

fn chars<const N: usize>(text: &str) -> Result<[u8; N]> {
    let mut chars = [0; N];
    if text.len() >= N {
        fail!("\"{text}\" is longer than {} bytes", N - 1);
    }
    chars[..text.len()].copy_from_slice(text.as_bytes());
    Ok(chars)
}

fn to_c(lazy: &LazyParams) -> Result<Params> {
    let lazy_type = match (lazy.type_k, lazy.type_v) {
        (None, None) => String::new(),
        (k, v) => format!("{}/{}", k.map_or("q4_0", |ty| ty.name()), v.map_or("q4_0", |ty| ty.name())),
    };
    Ok(Params {
        size: size_of::<Params>(),
        lazy: chars(&lazy.policy.to_string())?,
        lazy_type: chars(&lazy_type)?,
        n_sink: lazy.n_sink as u32,
        n_window: lazy.n_window as u32,
        n_queries: lazy.n_queries as u32,
        at: match lazy.at {
            At::Prefill => 0,
            At::Decode => 1,
        },
        prefill: match lazy.prefill {
            None => 0,
            Some(PrefillMode::Full) => 1,
            Some(PrefillMode::Window) => 2,
        },
        narrow_keys: i32::from(lazy.narrow_keys),
    })
}

/// What the struct cannot say is as it was.
fn from_c(params: &Params, was: &LazyParams) -> Result<LazyParams> {
    let mut lazy = was.clone();
    lazy.policy = text_of(&params.lazy, "lazy")?.parse()?;
    if lazy.policy != was.policy {
        // They may be a profile's, which chose them for its layers.
        lazy.windows = LayerWindows::default();
    }
    (lazy.n_sink, lazy.n_window, lazy.n_queries) =
        (params.n_sink as usize, params.n_window as usize, params.n_queries as usize);
    lazy.at = match params.at {
        0 => At::Prefill,
        1 => At::Decode,
        other => fail!("at: {other} is no enum simlayer_at"),
    };
    lazy.prefill = match params.prefill {
        0 => None,
        1 => Some(PrefillMode::Full),
        2 => Some(PrefillMode::Window),
        other => fail!("prefill: {other} is no enum simlayer_prefill"),
    };
    let types = match text_of(&params.lazy_type, "lazy_type")? {
        "" => None,
        text => match parse_types(text) {
            Ok(types) => Some(types),
            Err(why) => fail!("lazy_type: {why}"),
        },
    };
    (lazy.type_k, lazy.type_v) = types.unzip();
    lazy.narrow_keys = params.narrow_keys != 0;
    Ok(lazy)
}

#[unsafe(no_mangle)]
extern "C" fn simlayer_version() -> *const c_char {
    system::version().as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn simlayer_last_error() -> *const c_char {
    guard("simlayer_last_error", c"".as_ptr(), || Ok(log::last_error()))
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_default_params(params: *mut Params) -> i32 {
    guard("simlayer_default_params", -1, || {
        // SAFETY: the caller's struct.
        unsafe { write_struct(params, &to_c(&LazySettings::off().lazy)?, "params") }?;
        Ok(0)
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_get_params(ctx: *mut sys::llama_context, params: *mut Params) -> i32 {
    guard("simlayer_get_params", -1, || {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        let lazy = session(&mut state)?.lazy_params();
        // SAFETY: the caller's struct.
        unsafe { write_struct(params, &to_c(lazy)?, "params") }?;
        Ok(0)
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_set_params(ctx: *mut sys::llama_context, params: *const Params) -> i32 {
    guard("simlayer_set_params", -1, || {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        let session = session(&mut state)?;
        let was = session.lazy_params().clone();
        // What the caller's struct lacks stays as it is.
        let mut all = to_c(&was)?;
        // SAFETY: the caller's struct; as many bytes are copied as both have.
        unsafe {
            let size = size_of_struct(params, "params")?.min(size_of::<Params>());
            std::ptr::copy_nonoverlapping(params.cast::<u8>(), (&raw mut all).cast::<u8>(), size);
        }
        let lazy = from_c(&all, &was)?;
        let may_be_lazy = lazy.policy != Policy::Off;
        session.set_lazy(lazy)?;
        if may_be_lazy {
            context.model.note_lazy();
        }
        Ok(0)
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_n_layers(ctx: *mut sys::llama_context) -> i32 {
    guard("simlayer_n_layers", -1, || {
        let context = CONTEXTS.get(ctx)?;
        Ok(context.model.hparams.as_ref().map_or(0, |hparams| hparams.n_layer as i32))
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_get_layers(
    ctx: *mut sys::llama_context,
    seq_id: i32,
    layers: *mut Layer,
    n: usize,
    layer_size: usize,
) -> i32 {
    guard("simlayer_get_layers", -1, || {
        let context = CONTEXTS.get(ctx)?;
        let seq = sequence(seq_id, &context.limits)?;
        let mut state = context.lock();
        let reports = session(&mut state)?.layers(seq);
        let n = n.min(reports.len());
        if n == 0 {
            return Ok(0);
        }
        if layer_size == 0 || layer_size > 1 << 20 {
            fail!("layer_size is {layer_size}; give sizeof(struct simlayer_layer)");
        }
        // SAFETY: an array of the caller's, of `n` elements of that size.
        let out = unsafe { slice_mut(layers.cast::<u8>(), n * layer_size, "layers") }?;
        for (to, report) in out.chunks_exact_mut(layer_size).zip(&reports) {
            let kind = match report.kind {
                LayerKind::Full => 0,
                LayerKind::Lazy => 1,
                LayerKind::Window => 2,
                LayerKind::Recurrent => 3,
                LayerKind::Convolution => 4,
                LayerKind::Nothing => 5,
                LayerKind::Shared => 6,
                LayerKind::Pruned => 7,
            };
            let layer = Layer {
                index: report.index as i32,
                kind,
                has_score: i32::from(report.score.is_some()),
                score: report.score.unwrap_or(0.0),
                bytes: report.kv_bytes as u64,
            };
            // SAFETY: `Layer` has no padding: three i32, a f32, a u64 at 16.
            let bytes = unsafe { slice((&raw const layer).cast::<u8>(), size_of::<Layer>(), "layer") }?;
            let size = layer_size.min(bytes.len());
            to[..size].copy_from_slice(&bytes[..size]);
        }
        Ok(n as i32)
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_get_memory(ctx: *mut sys::llama_context, memory: *mut Memory) -> i32 {
    guard("simlayer_get_memory", -1, || {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        let kv = session(&mut state)?.kv();
        let report = Memory {
            size: size_of::<Memory>(),
            tokens: kv.context_tokens as u64,
            f16_bytes: kv.f16_bytes as u64,
            allocated_bytes: kv.allocated_bytes as u64,
            peak_bytes: kv.peak_bytes as u64,
            lazy_layers: kv.lazy_layers as u32,
            active_layers: kv.active_layers as u32,
        };
        // SAFETY: the caller's struct.
        unsafe { write_struct(memory, &report, "memory") }?;
        Ok(0)
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_foretold(ctx: *mut sys::llama_context, seq_id: i32, kl: *mut f64) -> i32 {
    guard("simlayer_foretold", -1, || {
        let context = CONTEXTS.get(ctx)?;
        let seq = sequence(seq_id, &context.limits)?;
        let mut state = context.lock();
        // SAFETY: a number of the caller's.
        let out = unsafe { slice_mut(kl, 1, "kl") }?;
        match session(&mut state)?.foretold(seq) {
            Some(foretold) => {
                out[0] = foretold;
                Ok(1)
            }
            None => Ok(0),
        }
    })
}

/// # Safety
/// As simlayer.h says.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_decide(ctx: *mut sys::llama_context, seq_id: i32) -> i32 {
    guard("simlayer_decide", -1, || {
        let context = CONTEXTS.get(ctx)?;
        let seq = sequence(seq_id, &context.limits)?;
        let mut state = context.lock();
        match session(&mut state)?.decide_now(seq)? {
            Some(lazy) => Ok(lazy as i32),
            None => {
                state.score_next.push(seq);
                Ok(0)
            }
        }
    })
}
