use std::fs;

/// Gives memory that was freed, but that the C allocator still holds, back to the system.
///
/// glibc keeps freed blocks below a threshold that rises up to 32 MiB as blocks are freed, so that a shrunk cache
/// would not be seen in the process's size without this.
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
