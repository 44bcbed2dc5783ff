//! What ggml can compute on, and its kinds of memory.

use std::{
    ffi::{CStr, c_char, c_void},
    fmt,
};

use ggml_sys as sys;

/// A device that ggml can compute on. Devices are registered once and never go away.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Device(sys::ggml_backend_dev_t);

// SAFETY: a handle to a registry entry that lives as long as the process and is read-only.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What kind of device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Gpu,
    Accelerator,
}

impl Device {
    /// The processor.
    pub fn cpu() -> Device {
        // SAFETY: the CPU backend is always compiled in, so the handle is not null.
        Device(unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) })
    }

    /// All devices, in ggml's order.
    pub fn all() -> Vec<Device> {
        // SAFETY: the index is below the count.
        unsafe { (0..sys::ggml_backend_dev_count()).map(|i| Device(sys::ggml_backend_dev_get(i))).collect() }
    }

    /// The devices that layers can be on besides the processor.
    pub fn all_but_processor() -> Vec<Device> {
        Device::all().into_iter().filter(|device| device.kind() == DeviceKind::Gpu).collect()
    }

    pub(super) fn raw(self) -> sys::ggml_backend_dev_t {
        self.0
    }

    /// A handle that a registry gave.
    #[cfg(feature = "rpc")]
    pub(super) fn from_raw(raw: sys::ggml_backend_dev_t) -> Device {
        Device(raw)
    }

    /// The device's short name, such as `CPU` or `CUDA0`.
    pub fn name(self) -> String {
        // SAFETY: a static string of the device.
        text(unsafe { sys::ggml_backend_dev_name(self.0) })
    }

    /// The hardware's own name.
    pub fn description(self) -> String {
        // SAFETY: a static string of the device.
        text(unsafe { sys::ggml_backend_dev_description(self.0) })
    }

    pub fn kind(self) -> DeviceKind {
        // SAFETY: a query on a live handle.
        match unsafe { sys::ggml_backend_dev_type(self.0) } {
            sys::GGML_BACKEND_DEVICE_TYPE_CPU => DeviceKind::Cpu,
            sys::GGML_BACKEND_DEVICE_TYPE_ACCEL => DeviceKind::Accelerator,
            _ => DeviceKind::Gpu,
        }
    }

    /// Free and total memory in bytes.
    pub fn memory(self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are to live locals.
        unsafe { sys::ggml_backend_dev_memory(self.0, &mut free, &mut total) };
        (free, total)
    }

    /// The memory that tensors of this device usually live in.
    #[doc(hidden)]
    pub fn buffer_type(self) -> BufferType {
        // SAFETY: every device has a default buffer type.
        BufferType(unsafe { sys::ggml_backend_dev_buffer_type(self.0) })
    }

    /// Kinds of memory that repack weights for faster matrix products, best first.
    pub(crate) fn repacking_buffer_types(self) -> Vec<BufferType> {
        type GetExtra = unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
        // SAFETY: the name is NUL-terminated; the registry belongs to a live device.
        let address = unsafe {
            let registry = sys::ggml_backend_dev_backend_reg(self.0);
            sys::ggml_backend_reg_get_proc_address(registry, c"ggml_backend_dev_get_extra_bufts".as_ptr())
        };
        if address.is_null() {
            return Vec::new();
        }
        // SAFETY: ggml documents that this name has the type `ggml_backend_dev_get_extra_bufts_t`, and that the list
        // ends with a null pointer.
        unsafe {
            let get = std::mem::transmute::<*mut c_void, GetExtra>(address);
            let mut list = get(self.0);
            let mut found = Vec::new();
            while !list.is_null() && !(*list).is_null() {
                found.push(BufferType(*list));
                list = list.add(1);
            }
            found
        }
    }

    /// The name of the backend that drives it.
    pub fn backend(self) -> String {
        // SAFETY: a device's registry entry lives as long as the device; the name is a static string.
        text(unsafe { sys::ggml_backend_reg_name(sys::ggml_backend_dev_backend_reg(self.0)) })
    }

    /// The names of the backends that this build has, such as `CPU`, `CUDA` and `RPC`, with or without devices here.
    pub fn backends() -> Vec<String> {
        // SAFETY: the index is below the count; names are static strings.
        unsafe {
            let registry = |i| text(sys::ggml_backend_reg_name(sys::ggml_backend_reg_get(i)));
            (0..sys::ggml_backend_reg_count()).map(registry).collect()
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// A kind of memory. Lives as long as the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferType(sys::ggml_backend_buffer_type_t);

// SAFETY: a handle to a static description.
unsafe impl Send for BufferType {}
// SAFETY: as above.
unsafe impl Sync for BufferType {}

impl BufferType {
    pub(super) fn raw(self) -> sys::ggml_backend_buffer_type_t {
        self.0
    }

    pub fn name(self) -> String {
        // SAFETY: a static string of the buffer type.
        text(unsafe { sys::ggml_backend_buft_name(self.0) })
    }

    /// Whether the processor can read this memory by pointer.
    pub fn is_host(self) -> bool {
        // SAFETY: a query on a live handle.
        unsafe { sys::ggml_backend_buft_is_host(self.0) }
    }
}

impl fmt::Debug for BufferType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferType({})", self.name())
    }
}

pub(super) fn text(c_string: *const c_char) -> String {
    if c_string.is_null() {
        return String::new();
    }
    // SAFETY: the callers pass static NUL-terminated strings of ggml.
    unsafe { CStr::from_ptr(c_string) }.to_string_lossy().into_owned()
}
