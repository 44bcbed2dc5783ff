//! Memory of the kernels: each thread's scratch memory, and a graph's split-K partials.

use std::cell::{RefCell, UnsafeCell};

/// Elements of a vector in scratch memory: whole vectors of any instruction set.
#[inline]
pub(super) fn padded(size: usize) -> usize {
    size.next_multiple_of(16)
}

/// Elements of a split-K partial for one query and head: its values, then its online softmax state.
#[inline]
pub(super) fn partial_stride(value_size: usize) -> usize {
    value_size + 16
}

/// Memory for split-K partials, shared by the operations of a graph, of which one runs at a time.
#[derive(Default)]
pub(in crate::ggml) struct Partials(UnsafeCell<Vec<f32>>);

// SAFETY: plain memory; see `Sync` for who uses it.
unsafe impl Send for Partials {}
// SAFETY: it grows through `grow`, whose caller has the graph for itself; threads that run an operation write what is
// theirs, by pointer.
unsafe impl Sync for Partials {}

impl Partials {
    /// # Safety
    /// No operation of the graph is running.
    pub(super) unsafe fn grow(&self, len: usize) {
        // SAFETY: nobody else has access, says the caller.
        let data = unsafe { &mut *self.0.get() };
        if data.len() < len {
            data.resize(len, 0.0);
        }
    }

    #[inline]
    pub(super) fn data(&self) -> *mut f32 {
        // SAFETY: the vector itself is not changed while operations run.
        unsafe { (*self.0.get()).as_ptr().cast_mut() }
    }
}

thread_local! {
    /// Each thread's own memory: it grows to what the largest operation needs and stays.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch(Vec::new())) };
}

/// A cache line: what vectors are aligned to.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Calls `work` with the thread's scratch memory.
pub(super) fn with_scratch(work: impl FnOnce(&mut Scratch)) {
    SCRATCH.with_borrow_mut(work);
}

/// A thread's memory for what it is working on.
pub(super) struct Scratch(Vec<Line>);

impl Scratch {
    /// Memory for `len` elements in a few pieces.
    pub(super) fn room(&mut self, len: usize) -> Room {
        // Each piece is rounded up to whole lines; there are nine at most.
        let lines = len.div_ceil(16) + 9;
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        Room { next: self.0.as_mut_ptr(), left: lines }
    }
}

/// Scratch memory that is not given out yet.
pub(super) struct Room {
    next: *mut Line,
    left: usize,
}

impl Room {
    /// The next `len` elements, from a cache line on.
    pub(super) fn take(&mut self, len: usize) -> *mut f32 {
        let lines = len.div_ceil(16);
        assert!(lines <= self.left, "scratch memory was made too small");
        let taken = self.next.cast::<f32>();
        // SAFETY: the lines exist, as was just checked.
        self.next = unsafe { self.next.add(lines) };
        self.left -= lines;
        taken
    }
}
