//! Unmodified llama.cpp, a library beside ours (`libsimlayer-upstream.so`), which runs the models that simlayer does not.
//!
//! It is loaded when the first such model is. Its models, contexts and what belongs to them are handed out as they are and
//! noted here, and every function that is given one of them goes to the function of the same name there: in Rust by the
//! macro `api!`, which asks each argument whose it is, in C++ by `DEFINE` of `reused.cpp` and `ext.cpp`. Both libraries
//! share ggml, so that devices, buffers and thread pools are the same in both. Samplers are ours whatever they sample from:
//! they are tables of functions, which either library calls.

use std::{
    collections::HashMap,
    ffi::{CStr, CString, OsStr, OsString, c_char, c_void},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    ptr::{self, NonNull},
    sync::{Mutex, OnceLock, PoisonError, RwLock},
};

use ggml_sys as sys;

use crate::border::{Result, text};

/// The library's name; it lies beside ours.
const FILE: &str = "libsimlayer-upstream.so";

/// Names another one. It must be of our revision of llama.cpp.
const VARIABLE: &str = "SIMLAYER_UPSTREAM_LIB";

/// The library that was loaded. It stays, since nobody knows of the last of its objects.
static LIBRARY: OnceLock<Library> = OnceLock::new();

/// Its living objects, and which of them each ends with.
static LIVING: RwLock<Option<HashMap<usize, Option<usize>>>> = RwLock::new(None);

pub(crate) struct Library {
    handle: NonNull<c_void>,
    path: PathBuf,
}

// SAFETY: the handle is only given to dlsym, which any thread may call.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The library, loaded if it is not yet.
    pub fn get() -> Result<&'static Library> {
        static LOADING: Mutex<()> = Mutex::new(());
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let library = Library::open(path()?)?;
        library.check_revision()?;
        library.take_over_log()?;
        Ok(LIBRARY.get_or_init(|| library))
    }

    fn open(path: PathBuf) -> Result<Library> {
        if !path.is_file() {
            fail!("{} is missing; it belongs beside libllama.so.0, or {VARIABLE} names it", path.display());
        }
        let name = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: a C string. The library's initialisers are those of C++, which may run at any time.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Library { handle, path }),
            None => fail!("{}: {}", path.display(), linker_error()),
        }
    }

    /// Structs and ggml are those of one revision.
    fn check_revision(&self) -> Result<()> {
        type Version = unsafe extern "C" fn() -> *const c_char;
        let version = self.symbol(c"llama_version")?;
        // SAFETY: the function of that name has that type. Both answer with static strings; our build gives ggml and the
        // library the same.
        let (theirs, ours) = unsafe {
            let version: Version = std::mem::transmute::<NonNull<c_void>, Version>(version);
            (CStr::from_ptr(version()), CStr::from_ptr(sys::ggml_version()))
        };
        if theirs != ours {
            fail!(
                "{}: llama.cpp of another revision ({}, but ggml here is {}); `cargo xtask dist` makes the right one",
                self.path.display(),
                theirs.to_string_lossy(),
                ours.to_string_lossy()
            );
        }
        Ok(())
    }

    /// Its messages go where ours go.
    fn take_over_log(&self) -> Result<()> {
        let (mut callback, mut data) = (None, ptr::null_mut());
        // SAFETY: both are live locals; the callback was set with its data.
        unsafe {
            sys::llama_log_get(&mut callback, &mut data);
            self.set_log(callback, data)
        }
    }

    /// # Safety
    /// The callback may be called with `data` until another one is set.
    unsafe fn set_log(&self, callback: sys::ggml_log_callback, data: *mut c_void) -> Result<()> {
        type LogSet = unsafe extern "C" fn(sys::ggml_log_callback, *mut c_void);
        let function = self.symbol(c"llama_log_set")?;
        // SAFETY: the function of that name has that type; the rest is the caller's promise.
        unsafe { std::mem::transmute::<NonNull<c_void>, LogSet>(function)(callback, data) };
        Ok(())
    }

    /// The function of a name.
    pub fn symbol(&self, name: &CStr) -> Result<NonNull<c_void>> {
        // SAFETY: a library that is never closed, and a C string.
        match NonNull::new(unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) }) {
            Some(function) => Ok(function),
            None => fail!("{}: {}", self.path.display(), linker_error()),
        }
    }
}

fn linker_error() -> String {
    // SAFETY: null, or a C string that is this thread's until its next call.
    let error = unsafe { libc::dlerror() };
    match NonNull::new(error) {
        // SAFETY: as above.
        Some(error) => unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy().into_owned(),
        None => "unknown error".to_owned(),
    }
}

/// Where the library should be.
fn path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    let here: *const Library = &raw const LIBRARY as *const Library;
    // SAFETY: any address may be asked about; the struct is a live local.
    if unsafe { libc::dladdr(here.cast(), &raw mut info) } == 0 || info.dli_fname.is_null() {
        fail!("nothing says where this library lies; {VARIABLE} names {FILE}");
    }
    // SAFETY: a C string of the dynamic linker's, which lasts as long as this library.
    let ours = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes()));
    // What was linked for may be a link elsewhere.
    let ours: OsString = std::fs::canonicalize(ours).map_or_else(|_| ours.into(), PathBuf::into_os_string);
    Ok(Path::new(&ours).with_file_name(FILE))
}

/// Whether this is the address of one of the library's living objects.
pub(crate) fn is_upstreams<T>(handle: *const T) -> bool {
    let living = || LIVING.read().unwrap_or_else(PoisonError::into_inner);
    LIBRARY.get().is_some() && living().as_ref().is_some_and(|living| living.contains_key(&handle.addr()))
}

/// Notes an object of the library's, which ends with its owner if it has one.
pub(crate) fn note<T>(handle: *const T, owner: Option<usize>) {
    if handle.is_null() || is_upstreams(handle) {
        return;
    }
    let mut living = LIVING.write().unwrap_or_else(PoisonError::into_inner);
    living.get_or_insert_default().insert(handle.addr(), owner);
}

/// An object of the library's is about to end, and with it what it owns.
fn forget(handle: usize) {
    let mut living = LIVING.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(living) = living.as_mut() {
        living.retain(|&other, owner| other != handle && *owner != Some(handle));
    }
}

/// Whose an argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// A number, a text, a sampler: either library takes it.
    Neither,
    Ours,
    /// With its address.
    Upstream(usize),
}

/// What crosses the ABI, as an argument or as a result. There is no blanket implementation, so that a type that is new in
/// `llama.h` has to say here whether it is a handle.
pub(crate) trait Crossing: Sized {
    /// What it is until it is known to be one: of a struct that another llama.cpp has with other fields, bytes.
    type Raw;

    fn read(raw: Self::Raw) -> Result<Self>;
    fn raw(self) -> Self::Raw;

    fn side(&self) -> Side {
        Side::Neither
    }

    /// What the library is given for it.
    fn given(self) -> Self {
        self
    }

    /// Notes a result of the library's, from a call with this handle.
    fn noted(self, _of: usize) -> Self {
        self
    }
}

/// For what has no other form.
macro_rules! as_it_is {
    () => {
        type Raw = Self;

        fn read(raw: Self) -> Result<Self> {
            Ok(raw)
        }

        fn raw(self) -> Self {
            self
        }
    };
}

/// What a pointer leads to.
pub(crate) trait Target {
    /// `None` where it is no handle.
    const HANDLE: Option<Handle> = None;
}

/// A kind of objects that functions are called with.
pub(crate) struct Handle {
    /// Whether it ends with the object that it was made from.
    owned: bool,
    /// Whether there are objects of the library's that are no object: an encoder's memory.
    nullable: bool,
}

fn side<T: Target>(handle: *const T) -> Side {
    match T::HANDLE {
        None => Side::Neither,
        Some(kind) if handle.is_null() && kind.nullable && LIBRARY.get().is_some() => Side::Upstream(0),
        Some(_) if handle.is_null() => Side::Neither,
        Some(_) if is_upstreams(handle) => Side::Upstream(handle.addr()),
        Some(_) => Side::Ours,
    }
}

impl<T: Target> Crossing for *const T {
    as_it_is!();

    fn side(&self) -> Side {
        side(*self)
    }

    fn noted(self, of: usize) -> Self {
        if let Some(kind) = T::HANDLE {
            note(self, kind.owned.then_some(of));
        }
        self
    }
}

impl<T: Target> Crossing for *mut T {
    as_it_is!();

    fn side(&self) -> Side {
        side(*self)
    }

    fn noted(self, of: usize) -> Self {
        self.cast_const().noted(of).cast_mut()
    }
}

const OBJECT: Option<Handle> = Some(Handle { owned: false, nullable: false });
const PART: Option<Handle> = Some(Handle { owned: true, nullable: false });

impl Target for sys::llama_model {
    const HANDLE: Option<Handle> = OBJECT;
}
impl Target for sys::llama_context {
    const HANDLE: Option<Handle> = OBJECT;
}
impl Target for sys::llama_batch_ext {
    const HANDLE: Option<Handle> = OBJECT;
}
impl Target for sys::llama_vocab {
    const HANDLE: Option<Handle> = PART;
}
impl Target for sys::llama_adapter_lora {
    const HANDLE: Option<Handle> = PART;
}
impl Target for sys::llama_memory_i {
    const HANDLE: Option<Handle> = Some(Handle { owned: true, nullable: true });
}
/// A chain in a context's graph is known by its library's table of functions, and ours have ours.
impl Target for sys::llama_sampler {
    const HANDLE: Option<Handle> = OBJECT;
}

macro_rules! no_handles {
    (Target for $($ty:ty),* $(,)?) => {$(impl Target for $ty {})*};
    (Crossing for $($ty:ty),* $(,)?) => {$(impl Crossing for $ty { as_it_is!(); })*};
}

no_handles!(Target for c_void, c_char, u8, u32, i32, usize, f32, sys::ggml_tensor, sys::gguf_context);
no_handles!(Target for sys::ggml_threadpool, sys::ggml_opt_dataset, sys::ggml_opt_result, sys::llama_chat_message);
no_handles!(Target for sys::llama_model_quantize_params, *const c_char, *mut sys::llama_adapter_lora);
no_handles!(Crossing for (), bool, i8, u32, i32, u64, i64, usize, f32, sys::llama_batch, sys::llama_embd);
no_handles!(Crossing for sys::llama_model_quantize_params, sys::llama_opt_params);
no_handles!(Crossing for sys::llama_sampler_chain_params, sys::llama_perf_context_data);
no_handles!(Crossing for sys::ggml_abort_callback, sys::llama_model_set_tensor_data_t, sys::ggml_opt_epoch_callback);

/// Where a call with arguments of these sides goes: to the library's function, and to which of its objects, or to ours.
pub(crate) fn route(name: &CStr, sides: &[Side]) -> Result<Option<(NonNull<c_void>, usize)>> {
    let upstreams = sides.iter().find_map(|side| match side {
        Side::Upstream(handle) => Some(*handle),
        _ => None,
    });
    let Some(handle) = upstreams else { return Ok(None) };
    let Some(library) = LIBRARY.get() else { return Ok(None) };
    if sides.contains(&Side::Ours) {
        fail!("something of a model that unmodified llama.cpp runs, and something of simlayer's, cannot go together");
    }
    let function = library.symbol(name)?;
    // The functions that end an object have names that say so.
    if name.to_bytes().windows(4).any(|part| part == b"free") {
        forget(handle);
    }
    Ok(Some((function, handle)))
}

/// For the functions in C++: whether the handle is of the library's.
#[unsafe(no_mangle)]
extern "C" fn simlayer_ext_is_upstreams(handle: *const c_void) -> bool {
    is_upstreams(handle)
}

/// For the functions in C++: the library's function of that name, or null.
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_ext_upstream(name: *const c_char) -> *mut c_void {
    crate::border::guard("simlayer", ptr::null_mut(), || {
        // SAFETY: a C string, as said.
        let name = CString::new(unsafe { text(name, "name") }?)?;
        Ok(Library::get()?.symbol(&name)?.as_ptr())
    })
}

/// For `llama_log_set`: the library that is loaded logs where ours does.
///
/// # Safety
/// As [`Library::set_log`].
#[unsafe(no_mangle)]
unsafe extern "C" fn simlayer_ext_log_set(callback: sys::ggml_log_callback, data: *mut c_void) {
    crate::border::guard("llama_log_set", (), || match LIBRARY.get() {
        // SAFETY: the caller's promise is the same.
        Some(library) => unsafe { library.set_log(callback, data) },
        None => Ok(()),
    });
}
