//! Arenas of tensor headers, the memory behind them, and handles to tensors.

use std::{
    any::Any,
    cell::Cell,
    ffi::{CStr, CString, c_void},
    fmt,
    marker::PhantomData,
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use ggml_sys as sys;
use memmap2::Mmap;

use super::{BufferType, Device, Error, Type, tiles::Layout};

/// An arena of tensor headers, with the memory behind its tensors.
///
/// Tensors are added through a shared reference, and ggml's arena knows no locks: so this is not `Sync`, and has no clones.
pub struct Context {
    inner: Arc<Inner>,
    not_sync: PhantomData<Cell<()>>,
}

/// What a context owns. Freed when the last tensor or graph that needs it is gone.
pub(super) struct Inner {
    raw: NonNull<sys::ggml_context>,
    /// Whether there is memory behind the tensors. A graph's context loses it when the scheduler takes another graph.
    pub(super) has_memory: AtomicBool,
    owned: Mutex<Owned>,
}

#[derive(Default)]
struct Owned {
    buffers: Vec<Buffer>,
    maps: Vec<Arc<Mmap>>,
    /// Contexts whose tensors this context's nodes read.
    sources: Vec<Arc<Inner>>,
    /// State of our own operations among this context's nodes.
    operations: Vec<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: a ggml context is plain memory without thread affinity. Tensors are added through the one `Context` only, which
// is not `Sync`; the lists are behind a mutex.
unsafe impl Send for Inner {}
// SAFETY: as above. Tensor data is written by loaders before sharing, or through the `&mut` of one session: `Tensor::write`
// is this crate's alone.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: `raw` came from ggml_init and is freed once, here; buffers follow as fields.
        unsafe { sys::ggml_free(self.raw.as_ptr()) }
    }
}

/// A backend buffer, freed on drop.
struct Buffer(NonNull<sys::ggml_backend_buffer>);

// SAFETY: buffers are handles that ggml lets any thread free.
unsafe impl Send for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the handle is owned by this value alone.
        unsafe {
            if !sys::ggml_backend_buffer_is_host(self.0.as_ptr()) {
                note_freed_device_memory();
            }
            sys::ggml_backend_buffer_free(self.0.as_ptr())
        }
    }
}

/// Grows whenever memory of a device is freed.
static FREED: AtomicU64 = AtomicU64::new(0);

/// A server of ggml's RPC forgets its last graph when any buffer is freed, while the client goes on to ask for that
/// graph again, and the connection ends. So a graph runs again only where this number is that of its first run.
pub(super) fn freed_device_memory() -> u64 {
    FREED.load(Ordering::Relaxed)
}

pub(super) fn note_freed_device_memory() {
    FREED.fetch_add(1, Ordering::Relaxed);
}

impl Context {
    /// An arena for `n_tensors` headers, without data.
    pub fn new(n_tensors: usize) -> Context {
        // SAFETY: a query without arguments.
        let overhead = unsafe { sys::ggml_tensor_overhead() };
        Context::with_bytes((n_tensors + 1) * overhead)
    }

    pub(super) fn with_bytes(mem_size: usize) -> Context {
        let params = sys::ggml_init_params { mem_size, mem_buffer: std::ptr::null_mut(), no_alloc: true };
        // SAFETY: ggml allocates the arena itself (mem_buffer is null).
        let raw = unsafe { sys::ggml_init(params) };
        let raw = NonNull::new(raw).unwrap_or_else(|| std::alloc::handle_alloc_error(arena_layout(mem_size)));
        let inner = Arc::new(Inner { raw, has_memory: AtomicBool::new(false), owned: Mutex::default() });
        Context { inner, not_sync: PhantomData }
    }

    pub(super) fn raw(&self) -> *mut sys::ggml_context {
        self.inner.raw.as_ptr()
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// A new tensor of up to four dimensions, the first being a row's length; of tiles, a row's bytes.
    pub fn tensor(&self, ty: Type, shape: &[usize]) -> Tensor {
        let ne: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let stored = if ty.is_tiles() { Type::I8 } else { ty };
        // SAFETY: `ne` has `n_dims` entries; the context is alive.
        let raw = unsafe { sys::ggml_new_tensor(self.raw(), stored.raw(), ne.len() as i32, ne.as_ptr()) };
        self.wrap(raw).with_type(ty)
    }

    /// Rows `first..first + n` of one of this context's two-dimensional tensors, as a tensor that has its memory there once that has
    /// some.
    ///
    /// # Panics
    /// When it has no such rows, or is another context's.
    pub fn rows(&self, a: &Tensor, first: usize, n: usize) -> Tensor {
        assert!(Arc::ptr_eq(&self.inner, &a.context), "the tensor is of another context");
        let (width, stride) = (a.shape()[0], a.strides()[1]);
        let offset = first.saturating_mul(stride);
        check_view(a, [width, n, 1, 1], [stride, 0, 0], offset);
        // SAFETY: context and tensor are alive, and the view lies within the tensor.
        let raw = unsafe { sys::ggml_view_2d(self.raw(), a.raw(), width as i64, n as i64, stride, offset) };
        self.wrap(raw).with_type(a.ty())
    }

    pub(super) fn wrap(&self, raw: *mut sys::ggml_tensor) -> Tensor {
        let raw = NonNull::new(raw).expect("ggml aborts rather than return null for a tensor");
        Tensor { raw, context: Arc::clone(&self.inner), tiles: None }
    }

    /// Notes that this context's nodes read `tensor`, whose context must live as long.
    pub(super) fn uses(&self, tensor: &Tensor) {
        if Arc::ptr_eq(&self.inner, &tensor.context) {
            return;
        }
        let mut owned = self.inner.lock();
        if !owned.sources.iter().any(|source| Arc::ptr_eq(source, &tensor.context)) {
            owned.sources.push(Arc::clone(&tensor.context));
        }
    }

    /// Keeps the state of one of this context's nodes.
    pub(super) fn keep(&self, operation: Arc<dyn Any + Send + Sync>) {
        self.inner.lock().operations.push(operation);
    }

    /// Gives all tensors of this context zeroed memory of one kind and returns how many bytes the buffer holds.
    pub fn alloc(&self, kind: BufferType, what: &str) -> Result<usize, Error> {
        // SAFETY: context and buffer type are alive.
        let buffer = unsafe { sys::ggml_backend_alloc_ctx_tensors_from_buft(self.raw(), kind.raw()) };
        let Some(buffer) = NonNull::new(buffer) else {
            // SAFETY: as above; a computation over the tensors' sizes.
            let bytes = unsafe { sys::ggml_backend_alloc_ctx_tensors_from_buft_size(self.raw(), kind.raw()) };
            return Err(Error::OutOfMemory { device: kind.name(), bytes, what: what.to_owned() });
        };
        // SAFETY: the buffer was just made and is alive.
        let bytes = unsafe {
            sys::ggml_backend_buffer_clear(buffer.as_ptr(), 0);
            sys::ggml_backend_buffer_get_size(buffer.as_ptr())
        };
        self.inner.lock().buffers.push(Buffer(buffer));
        self.inner.has_memory.store(true, Ordering::Release);
        Ok(bytes)
    }

    /// Marks the buffers as weights, so that the scheduler keeps operations on them at their device.
    pub fn set_usage_weights(&self) {
        for buffer in &self.inner.lock().buffers {
            // SAFETY: the buffer is alive, being in the list.
            unsafe {
                sys::ggml_backend_buffer_set_usage(buffer.0.as_ptr(), sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            }
        }
    }

    /// Places this context's tensors inside a mapped file, each at its byte offset. The map is kept alive.
    ///
    /// # Panics
    /// When a tensor does not lie within the map or is not aligned to 32 bytes: the caller has checked the file.
    pub fn place_in_map(&self, device: Device, map: &Arc<Mmap>, tensors: &[(&Tensor, usize)]) -> Result<(), Error> {
        let base = map.as_ptr().cast_mut().cast::<c_void>();
        let largest = tensors.iter().map(|(tensor, _)| tensor.n_bytes()).max().unwrap_or(0);
        // SAFETY: the pointer and length are the map's; it is kept alive below. The memory is read-only: weights are
        // never written.
        let buffer = unsafe { sys::ggml_backend_dev_buffer_from_host_ptr(device.raw(), base, map.len(), largest) };
        let Some(buffer) = NonNull::new(buffer).map(Buffer) else {
            return Err(Error::OutOfMemory {
                device: device.name(),
                bytes: map.len(),
                what: "a view of the mapped file".into(),
            });
        };
        for (tensor, offset) in tensors {
            assert!(Arc::ptr_eq(&tensor.context, &self.inner), "the tensor is of another context");
            assert!(offset % 32 == 0 && offset + tensor.n_bytes() <= map.len(), "tensor outside its file");
            // SAFETY: the range was just checked; the tensor has no buffer yet, as `tensor` made it.
            let status = unsafe {
                let address = base.cast::<u8>().add(*offset).cast::<c_void>();
                sys::ggml_backend_tensor_alloc(buffer.0.as_ptr(), tensor.raw(), address)
            };
            if status != sys::GGML_STATUS_SUCCESS {
                return Err(Error::Compute(status));
            }
        }
        let mut owned = self.inner.lock();
        owned.buffers.push(buffer);
        owned.maps.push(Arc::clone(map));
        drop(owned);
        self.inner.has_memory.store(true, Ordering::Release);
        Ok(())
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, Owned> {
        // The lists stay consistent if a push panics, so a poisoned lock is still good.
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That a view lies within the tensor. ggml looks only whether there are as many bytes as it would have without gaps.
pub(super) fn check_view(a: &Tensor, shape: [usize; 4], strides: [usize; 3], offset: usize) {
    let end = || {
        if shape.contains(&0) {
            return Some(offset);
        }
        let [size, bytes] = match a.ty() {
            ty if ty.is_tiles() => [1, 1],
            ty => [ty.block_size(), ty.block_bytes()],
        };
        let row = shape[0].div_ceil(size).checked_mul(bytes)?;
        let others = shape[1..].iter().zip(strides);
        others
            .map(|(n, stride)| (n - 1).checked_mul(stride))
            .try_fold(offset.checked_add(row)?, |end, n| end.checked_add(n?))
    };
    assert!(
        end().is_some_and(|end| end <= a.n_bytes()),
        "a view {shape:?} with strides {strides:?} from byte {offset} on leaves {a:?} of {} bytes",
        a.n_bytes()
    );
}

fn arena_layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::array::<u8>(bytes).unwrap_or(std::alloc::Layout::new::<u8>())
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// A handle to a tensor. Cloning it copies the handle, not the data.
///
/// Handles of one tensor may be on several threads, so its data is written by this crate alone, which knows whose turn it is:
///
/// ```
/// # use simlayer::ggml::{Context, Device, Type};
/// # let context = Context::new(1);
/// let tensor = context.tensor(Type::F32, &[1]);
/// context.alloc(Device::cpu().buffer_type(), "a test")?;
/// # Ok::<(), simlayer::ggml::Error>(())
/// ```
/// ```compile_fail
/// # use simlayer::ggml::{Context, Device, Type};
/// # let context = Context::new(1);
/// let tensor = context.tensor(Type::F32, &[1]);
/// context.alloc(Device::cpu().buffer_type(), "a test")?;
/// tensor.write(0, &[1.0_f32]);
/// # Ok::<(), simlayer::ggml::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor {
    raw: NonNull<sys::ggml_tensor>,
    context: Arc<Inner>,
    /// The type of tiles that its bytes are, which ggml does not know.
    tiles: Option<Type>,
}

// SAFETY: the header lives in the context, which the handle keeps alive; see `Inner`.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Tensor {
    pub(super) fn raw(&self) -> *mut sys::ggml_tensor {
        self.raw.as_ptr()
    }

    fn header(&self) -> &sys::ggml_tensor {
        // SAFETY: the header lives in the context. ggml writes its fields while a graph is being built or allocated
        // only, which happens behind `&mut Scheduler` or while the builder holds the context alone.
        unsafe { self.raw.as_ref() }
    }

    /// The four dimensions; unused ones are 1.
    pub fn shape(&self) -> [usize; 4] {
        self.header().ne.map(|n| n as usize)
    }

    /// Bytes from one index of each dimension to the next.
    pub fn strides(&self) -> [usize; 4] {
        self.header().nb
    }

    /// The element type.
    pub fn ty(&self) -> Type {
        self.tiles.unwrap_or_else(|| Type::from_raw(self.header().type_).unwrap_or(Type::F32))
    }

    /// The same tensor, whose bytes are tiles where the type says so.
    pub(super) fn with_type(mut self, ty: Type) -> Tensor {
        self.tiles = Some(ty).filter(|ty| ty.is_tiles());
        self
    }

    /// How a tile lies in rows of so many heads; `None` where rows are not in tiles.
    pub(super) fn layout(&self, heads: usize) -> Option<Layout> {
        Some(Layout::of_row(self.ty().tile_bits()?, self.shape()[0] / heads))
    }

    /// Elements of a head's row, of a tensor that has rows of one head.
    pub(super) fn row_size(&self) -> usize {
        self.layout(1).map_or(self.shape()[0], |layout| layout.size)
    }

    /// Bytes from the first element to the end of the last.
    pub fn n_bytes(&self) -> usize {
        // SAFETY: a computation over the header.
        unsafe { sys::ggml_nbytes(self.raw()) }
    }

    /// Names the tensor, for debugging and for looking nodes up. A NUL byte in the name ends it.
    pub fn named(self, name: &str) -> Tensor {
        let bytes: Vec<u8> = name.bytes().take_while(|&byte| byte != 0).collect();
        if let Ok(name) = CString::new(bytes) {
            // SAFETY: ggml copies the string, cut to its limit.
            unsafe { sys::ggml_set_name(self.raw(), name.as_ptr()) };
        }
        self
    }

    /// Keeps the tensor's memory from being reused within its graph, so that it can be read after the run.
    pub fn as_output(self) -> Tensor {
        // SAFETY: sets a flag in the header.
        unsafe { sys::ggml_set_output(self.raw()) };
        self
    }

    /// Whether the tensor has memory of its own or is a view of one that has. An input that nothing in its graph reads
    /// is given none.
    pub fn is_allocated(&self) -> bool {
        self.context.has_memory.load(Ordering::Acquire) && !self.header().data.is_null()
    }

    /// Where its data lies; null while no memory is known for it.
    pub(super) fn address(&self) -> *const u8 {
        self.header().data.cast_const().cast()
    }

    /// Whether the tensor has memory already that the processor can read by pointer, in ggml's own layout.
    pub(super) fn is_host(&self) -> bool {
        let buffer = self.header().buffer;
        // SAFETY: a buffer in a header lives as long as the tensor's context.
        self.is_allocated() && !buffer.is_null() && unsafe { sys::ggml_backend_buffer_is_host(buffer) }
    }

    /// Whether the tensor's data lies as ggml's own kernels for this processor want it, rows together: memory of the
    /// processor that can be read by pointer, too.
    pub(super) fn is_repacked(&self) -> bool {
        let buffer = self.header().buffer;
        if !self.is_allocated() || buffer.is_null() {
            return false;
        }
        // SAFETY: a buffer in a header lives as long as the tensor's context; its type and the name are ggml's for good.
        let name = unsafe { CStr::from_ptr(sys::ggml_backend_buft_name(sys::ggml_backend_buffer_get_type(buffer))) };
        name == c"CPU_REPACK"
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(self.is_allocated(), "the tensor has no memory now");
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.n_bytes()),
            "bytes {offset}..+{len} of a tensor that has {}",
            self.n_bytes()
        );
    }

    /// Copies `data` into the tensor from its byte `offset` on. The caller is the tensor's only user now: a loader before
    /// what it loads is shared, or a session through `&mut`.
    ///
    /// # Panics
    /// When the range is not inside the tensor or no memory is behind it.
    pub(crate) fn write<T: Plain>(&self, offset: usize, data: &[T]) {
        let len = size_of_val(data);
        if len == 0 {
            return;
        }
        self.check(offset, len);
        // SAFETY: the range was checked; `T: Plain` has no padding; ggml copies into the buffer of any device.
        unsafe { sys::ggml_backend_tensor_set(self.raw(), data.as_ptr().cast(), offset, len) }
    }

    /// Copies from the tensor's byte `offset` on into `data`. Nobody writes it now, as said at [`Tensor::write`].
    ///
    /// # Panics
    /// When the range is not inside the tensor or no memory is behind it.
    pub(crate) fn read<T: Plain>(&self, offset: usize, data: &mut [T]) {
        let len = size_of_val(data);
        if len == 0 {
            return;
        }
        self.check(offset, len);
        // SAFETY: as in `write`; any bit pattern is a valid `T`.
        unsafe { sys::ggml_backend_tensor_get(self.raw(), data.as_mut_ptr().cast(), offset, len) }
    }

    /// All elements of a contiguous f32 tensor.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut data = vec![0.0; self.shape().iter().product()];
        self.read(0, &mut data);
        data
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.ty(), self.shape())
    }
}

/// Numbers without padding or invalid bit patterns.
pub trait Plain: Copy + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($ty:ty),*) => { $(impl sealed::Sealed for $ty {} impl Plain for $ty {})* };
}
plain!(u8, u16, i32, i64, f32);

#[cfg(test)]
mod tests {
    use super::Context;

    /// Two threads cannot add tensors to one arena: neither through references nor through clones. Were there a way, it could
    /// not be told which of these implementations is meant, and this would not compile.
    #[test]
    fn a_context_is_one_threads() {
        trait OneMeant<T> {
            fn holds() -> bool {
                true
            }
        }
        impl<C> OneMeant<()> for C {}
        impl<C: Sync> OneMeant<u8> for C {}
        impl<C: Clone> OneMeant<u16> for C {}
        assert!(<Context as OneMeant<_>>::holds());
    }
}
