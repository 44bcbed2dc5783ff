//! One run of the operation, resolved to pointers, and how its threads share the work.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{
    kernels::{OnlineSoftmax, Shape},
    scratch::Partials,
    views::{MAX_SEGMENTS, Segment},
};

/// Ranges that work is divided into, at most: one for each thread where there are no more.
pub(super) const MAX_RANGES: usize = 16;

/// How far the threads of a run are. All are zero between runs.
#[derive(Default)]
pub(super) struct Counters {
    /// The next piece of work of each range.
    next: [Counter; MAX_RANGES],
    /// Threads that found no more work.
    finished: Counter,
    /// Of each group of heads and chunk, how many of the two halves that meet where the chunk begins are done (at the first
    /// chunk: how many segments).
    pub halves_done: Vec<AtomicUsize>,
}

/// A counter with cache lines of its own: each thread counts its own range, and would wait for the others' lines.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

impl Counters {
    /// For this many merges of split-K partials.
    pub(super) fn new(n_merges: usize) -> Counters {
        Counters { halves_done: (0..n_merges).map(|_| AtomicUsize::new(0)).collect(), ..Counters::default() }
    }

    /// A thread found no more work. The last makes the counters ready for the next run, which begins after a barrier of
    /// ggml's.
    pub(super) fn finish(&self, n_threads: usize) {
        if self.finished.0.fetch_add(1, Ordering::AcqRel) + 1 == n_threads {
            for next in &self.next {
                next.0.store(0, Ordering::Relaxed);
            }
            self.finished.0.store(0, Ordering::Release);
        }
    }
}

/// One run of the operation, resolved to pointers.
pub(super) struct Call<'a> {
    pub counters: &'a Counters,
    pub partials: &'a Partials,
    pub thread: usize,
    pub n_threads: usize,
    pub q: *const u8,
    pub query_bytes: usize,
    pub head_bytes: usize,
    /// Queries.
    pub n: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Heads that share a KV head.
    pub group: usize,
    pub key_size: usize,
    pub value_size: usize,
    pub segments: [Option<Segment>; MAX_SEGMENTS],
    pub sinks: *const f32,
    pub out: *mut f32,
    /// Factor of the queries.
    pub factor: f32,
    pub shape: Shape,
}

impl Call<'_> {
    /// Calls `work` for this thread's share of so many pieces. It takes its range of them in order, so that it reads memory
    /// without a break, then helps with the others'.
    pub(super) fn share(&self, n_items: usize, n_ranges: usize, mut work: impl FnMut(usize)) {
        for i in 0..n_ranges {
            let range = (self.thread + i) % n_ranges;
            let [first, end] = [range, range + 1].map(|range| range * n_items / n_ranges);
            loop {
                let item = first + self.counters.next[range].0.fetch_add(1, Ordering::Relaxed);
                if item >= end {
                    break;
                }
                work(item);
            }
        }
    }

    /// # Safety
    /// The query and the head exist.
    #[inline]
    pub(super) unsafe fn query(&self, query: usize, head: usize) -> *const f32 {
        // SAFETY: as the caller says.
        unsafe { self.q.add(query * self.query_bytes + head * self.head_bytes).cast() }
    }

    #[inline]
    pub(super) fn segment(&self, index: usize) -> &Segment {
        self.segments[index].as_ref().expect("an index below the number of segments")
    }

    /// The online softmax's last step for one head: its sink joins in. The factor of the values.
    ///
    /// # Safety
    /// The head exists.
    #[inline]
    pub(super) unsafe fn finish(&self, head: usize, softmax: OnlineSoftmax) -> f32 {
        let OnlineSoftmax { mut max, mut sum } = softmax;
        let mut factor = 1.0;
        if !self.sinks.is_null() {
            // SAFETY: sinks has an element for each head.
            let sink = unsafe { *self.sinks.add(head) } * std::f32::consts::LOG2_E;
            let before = max;
            max = max.max(sink);
            factor = (before - max).exp2();
            sum = sum * factor + (sink - max).exp2();
        }
        // A query that sees nothing gets zeros.
        if sum > 0.0 { factor / sum } else { 0.0 }
    }
}
