use std::fs;

/// From now on large blocks go back to the system as soon as they are freed, in the whole process.
///
/// glibc raises the size from which blocks are mapped on their own up to 32 MiB as such blocks are freed. Smaller ones
/// then come from heaps, of which each thread but the first keeps up to 64 MiB of free memory at its end, which
/// [`release_free_memory`] does not reach. Setting the size ends that.
pub fn map_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// glibc's number for the option.
        const M_MMAP_THRESHOLD: i32 = -3;
        const BYTES: i32 = 1 << 20;
        unsafe extern "C" {
            fn mallopt(option: i32, value: i32) -> i32;
        }
        // SAFETY: glibc's function; it takes its own locks.
        unsafe { mallopt(M_MMAP_THRESHOLD, BYTES) };
    }
}

/// Gives memory that was freed, but that the C allocator still holds, back to the system.
///
/// Of blocks below the size that [`map_large_blocks`] sets, glibc keeps what is freed for later.
pub fn release_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: glibc's function; it takes its own locks and touches free blocks only.
        unsafe { malloc_trim(0) };
    }
}

/// Has freed blocks of some size go back to the system at once, in this process from now on. Without it glibc keeps
/// blocks of up to 32 MiB once larger ones were freed.
#[cfg(feature = "rpc")]
pub(super) fn return_freed_memory_at_once() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_MMAP_THRESHOLD: i32 = -3;
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        // SAFETY: glibc's function; it sets a parameter behind a lock of its own.
        unsafe { mallopt(M_MMAP_THRESHOLD, 128 << 10) };
    }
}

/// The process's resident memory in bytes; `None` where the system does not tell.
pub fn resident_bytes() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
