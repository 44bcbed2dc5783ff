//! The process's memory.

/// From now on blocks of `bytes` and more go back to the system as soon as they are freed, in the whole process.
///
/// glibc raises the size from which blocks are mapped on their own up to 32 MiB as such blocks are freed. Smaller ones
/// then come from heaps, of which each thread but the first keeps up to 64 MiB of free memory at its end, which
/// [`release_free_memory`] does not reach. Setting the size ends that. Who sets `MALLOC_MMAP_THRESHOLD_` for the process
/// has decided otherwise.
#[cfg_attr(not(all(target_os = "linux", target_env = "gnu")), expect(unused_variables, reason = "glibc's only"))]
pub fn map_large_blocks(bytes: i32) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// glibc's number for the option.
        const M_MMAP_THRESHOLD: i32 = -3;
        unsafe extern "C" {
            fn mallopt(option: i32, value: i32) -> i32;
        }
        if std::env::var_os("MALLOC_MMAP_THRESHOLD_").is_some() {
            return;
        }
        // SAFETY: glibc's function; it takes its own locks.
        unsafe { mallopt(M_MMAP_THRESHOLD, bytes) };
    }
}

/// Gives memory that was freed, but that the C allocator still holds, back to the system.
///
/// Of blocks below the size that [`map_large_blocks`] sets, glibc keeps what is freed for later.
pub fn release_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_void;

        /// glibc shortens a thread's heap when a block of 64 KiB or more is freed.
        const SHORTENS: usize = 128 << 10;
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
            fn malloc(bytes: usize) -> *mut c_void;
            fn free(block: *mut c_void);
        }
        // SAFETY: glibc's functions; they take their own locks. `malloc_trim` touches free blocks only; `free` gets what
        // `malloc` gave, or null.
        unsafe {
            malloc_trim(0);
            // It joins small free blocks with larger ones, and so with the end of a thread's heap, which it leaves
            // alone: by chance tens of megabytes.
            free(std::hint::black_box(malloc(SHORTENS)));
        }
    }
}
