use std::fs;

/// From now on blocks of `bytes` and more go back to the system as soon as they are freed, in the whole process.
///
/// glibc raises the size from which blocks are mapped on their own up to 32 MiB as such blocks are freed. Smaller ones
/// then come from heaps, of which each thread but the first keeps up to 64 MiB of free memory at its end, which
/// [`release_free_memory`] does not reach. Setting the size ends that.
#[cfg_attr(not(all(target_os = "linux", target_env = "gnu")), expect(unused_variables, reason = "glibc's only"))]
pub fn map_large_blocks(bytes: i32) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// glibc's number for the option.
        const M_MMAP_THRESHOLD: i32 = -3;
        unsafe extern "C" {
            fn mallopt(option: i32, value: i32) -> i32;
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
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: glibc's function; it takes its own locks and touches free blocks only.
        unsafe { malloc_trim(0) };
    }
}

/// Asks the system for huge pages in memory that is about to be filled, where it covers whole ones. What is read from one
/// end to the other, as caches are, then needs fewer look-ups of addresses; on a virtual machine each costs much.
///
/// # Safety
/// The memory is the caller's, from `base` on for `len` bytes.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables, reason = "Linux's only"))]
pub(super) unsafe fn advise_huge_pages(base: *mut std::ffi::c_void, len: usize) {
    #[cfg(target_os = "linux")]
    {
        const HUGE_PAGE: usize = 2 << 20;
        /// Linux's number for the advice.
        const MADV_HUGEPAGE: i32 = 14;
        unsafe extern "C" {
            fn madvise(address: *mut std::ffi::c_void, len: usize, advice: i32) -> i32;
        }
        let skipped = (base as usize).next_multiple_of(HUGE_PAGE) - base as usize;
        let whole = len.saturating_sub(skipped) / HUGE_PAGE * HUGE_PAGE;
        if whole > 0 {
            // SAFETY: the range lies within the caller's memory, and the advice changes nothing in it. Where it is not
            // taken pages are small, as before.
            unsafe { madvise(base.wrapping_byte_add(skipped), whole, MADV_HUGEPAGE) };
        }
    }
}

/// The process's resident memory in bytes; `None` where the system does not tell.
pub fn resident_bytes() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
