//! Blocks of rows: what a kernel gets at once, and what is prefetched meanwhile.

/// Rows of keys and values that are worked on at once: they stay in the first-level cache.
pub(crate) const BLOCK: usize = 64;

/// Rows in memory, `bytes` apart.
#[derive(Clone, Copy)]
pub(super) struct RowPtr {
    pub data: *const u8,
    pub bytes: usize,
    pub n: usize,
    pub prefetch: Prefetch,
}

impl RowPtr {
    /// # Safety
    /// `row` is a row, or lies right after the last one.
    #[inline(always)]
    pub(super) unsafe fn at(self, row: usize) -> *const u8 {
        // SAFETY: inside the rows' memory.
        unsafe { self.data.add(row * self.bytes) }
    }
}

/// Memory to prefetch while a block of rows is read: for each of them `bytes`, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Prefetch {
    pub data: *const u8,
    pub stride: usize,
    pub bytes: usize,
}

impl Prefetch {
    pub const NOTHING: Prefetch = Prefetch { data: std::ptr::null(), stride: 0, bytes: 0 };

    /// Prefetches what `N` rows from `first` on stand for, into the second-level cache: the first holds little more than the
    /// rows that are worked on.
    #[inline(always)]
    pub(super) fn issue<const N: usize>(self, first: usize) {
        const LINE: usize = 64;
        let from = self.data.wrapping_add(first * self.stride);
        // Without gaps, a line that two share is prefetched once, by whom it begins in.
        let is_dense = self.stride == self.bytes;
        let (n, bytes) = if is_dense { (1, N * self.bytes) } else { (N, self.bytes) };
        for r in 0..n {
            let from = from.wrapping_add(r * self.stride);
            let end = from.addr() + bytes;
            let mut line = match is_dense {
                true => from.wrapping_add(from.addr().wrapping_neg() % LINE),
                false => from.wrapping_sub(from.addr() % LINE),
            };
            while line.addr() < end {
                prefetch(line);
                line = line.wrapping_add(LINE);
            }
        }
    }
}

/// Asks for a line in the second-level cache, where the processor can.
#[inline(always)]
fn prefetch(line: *const u8) {
    // SAFETY: a hint that reads nothing, whatever the address.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
    }
    // SAFETY: likewise. Standard Rust has no intrinsic for it yet.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
}
