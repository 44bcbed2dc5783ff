//! Attention on the processor, as one operation of a ggml graph.
//!
//! Keys and values may lie in several segments of different types; the softmax runs over all of them together. Rows
//! are converted to f32 in registers (few queries) or once for a tile of queries (many), and all sums are in f32. Rows
//! that no query of a tile sees are not read.
//!
//! With few queries the threads divide the rows (split-K): a chunk's result is kept in memory that the graph owns, and
//! added to its neighbour's by who finishes later. Chunks, and the order in which they are added, depend on the number of
//! rows only, so that the result does not depend on the number of threads.

mod kernels;
#[cfg(target_arch = "x86_64")]
mod q4;
mod simd;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::{
    cell::{RefCell, UnsafeCell},
    ffi::c_void,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use ggml_sys as sys;

use self::{
    kernels::{Ahead, BLOCK, Bf16, F16, F32, Isa, Q4, Q8, RowPtr, Running, Shape, Tile},
    simd::{Portable, f16_to_f32},
};
use super::{Tensor, Type};

/// Segments that one operation can attend to: ggml gives a node ten sources.
pub const MAX_SEGMENTS: usize = 3;

/// From this many queries on a tile of them is worked on at once.
const MANY: usize = 16;

/// Queries of a tile, at most.
const TILE: usize = 64;

/// Ranges that work is divided into, at most: one for each thread where there are no more.
const MAX_RANGES: usize = 16;

/// Keys, values and what is seen of them.
#[derive(Debug, Clone, Copy)]
pub struct KvSegment<'a> {
    /// `[head size, rows, KV heads]`, of any cache type; rows and heads may be any distance apart.
    pub k: &'a Tensor,
    /// `[value size, rows, KV heads]`, likewise. With one head where the keys have more, all share it.
    pub v: &'a Tensor,
    /// f16 or f32 `[rows, queries]`: what is added to the scores, minus infinity to hide a row. `None` hides nothing.
    pub mask: Option<&'a Tensor>,
}

/// How scores are made.
#[derive(Debug, Clone, Copy)]
pub struct FusedAttention<'a> {
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Scores become `cap × tanh(score / cap)`, before the mask is added.
    pub soft_cap: Option<f32>,
    /// f32 `[heads]`: one more score of each head, whose value is zero. A weight: it has its memory already.
    pub sinks: Option<&'a Tensor>,
}

/// The operation's state: what ggml hands to the callback.
pub(super) struct Op {
    scale: f32,
    soft_cap: Option<f32>,
    /// A tensor that the graph keeps alive, or null.
    sinks: *const sys::ggml_tensor,
    n_segments: usize,
    partials: Arc<Partials>,
    features: Features,
    /// The next piece of work of each range, threads that found no more of it, and for each group of heads and chunk how many
    /// of the two halves that meet where the chunk begins are done (at the first chunk: how many segments). All are zero
    /// between runs.
    next: [Counter; MAX_RANGES],
    finished: Counter,
    halves_done: Vec<AtomicUsize>,
}

/// A counter with cache lines of its own: each thread counts its own range, and would wait for the others' lines.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

// SAFETY: the only pointer is to a header that is not written while graphs run.
unsafe impl Send for Op {}
// SAFETY: as above; the rest is atomic, or (`partials`) divided among the threads by what they take from `next`.
unsafe impl Sync for Op {}

/// Memory for the results of chunks, shared by the operations of a graph, of which one runs at a time.
#[derive(Default)]
pub(super) struct Partials(UnsafeCell<Vec<f32>>);

// SAFETY: see `Op`.
unsafe impl Send for Partials {}
// SAFETY: it grows through `grow`, whose caller has the graph for itself; threads that run an operation write what is
// theirs, by pointer.
unsafe impl Sync for Partials {}

impl Partials {
    /// # Safety
    /// No operation of the graph is running.
    unsafe fn grow(&self, len: usize) {
        // SAFETY: nobody else has access, says the caller.
        let data = unsafe { &mut *self.0.get() };
        if data.len() < len {
            data.resize(len, 0.0);
        }
    }

    fn data(&self) -> *mut f32 {
        // SAFETY: the vector itself is not changed while operations run.
        unsafe { (*self.0.get()).as_ptr().cast_mut() }
    }
}

/// Which kernels the processor can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Features {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Features {
    pub(super) fn detect() -> Features {
        *Features::all().last().expect("the portable kernels run anywhere")
    }

    /// All that this processor can run, the best last.
    fn all() -> Vec<Features> {
        #[allow(unused_mut, reason = "only x86-64 has more than the portable kernels")]
        let mut all = vec![Features::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                all.push(Features::Avx2);
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    all.push(Features::Avx512);
                }
            }
        }
        all
    }
}

impl Op {
    /// Adds the operation's node to the context `raw`. Returns it with the state, which must live as long.
    ///
    /// # Safety
    /// The context is alive, and the tensors live as long as it.
    pub(super) unsafe fn add(
        raw: *mut sys::ggml_context,
        q: &Tensor,
        segments: &[KvSegment<'_>],
        params: &FusedAttention<'_>,
        partials: &Arc<Partials>,
        features: Features,
    ) -> (*mut sys::ggml_tensor, Arc<Op>) {
        check(q, segments, params);
        let [_, n, heads, _] = q.shape();
        let [value_size, ..] = segments[0].v.shape();
        let [_, _, kv_heads, _] = segments[0].k.shape();
        let rows: [usize; MAX_SEGMENTS] =
            std::array::from_fn(|i| segments.get(i).map_or(0, |segment| segment.k.shape()[1]));
        let n_chunks = if n < MANY { Chunks::new(rows).n() } else { 0 };
        let op = Arc::new(Op {
            scale: params.scale,
            soft_cap: params.soft_cap,
            sinks: params.sinks.map_or(std::ptr::null(), |sinks| sinks.raw().cast_const()),
            n_segments: segments.len(),
            partials: Arc::clone(partials),
            features,
            next: Default::default(),
            finished: Counter::default(),
            halves_done: (0..kv_heads * n_chunks).map(|_| AtomicUsize::new(0)).collect(),
        });
        // SAFETY: the graph is being built, so that none of its operations is running.
        unsafe { partials.grow(n_chunks * heads * n * partial_stride(padded(value_size))) };
        // ggml's own function takes nine sources at most, so they are set here.
        // SAFETY: the context is alive; the callback has the type that ggml wants, and its state lives as long as the
        // context, says the caller. Ten sources exist.
        let node = unsafe {
            let node = sys::ggml_custom_4d(
                raw,
                sys::GGML_TYPE_F32,
                value_size as i64,
                heads as i64,
                n as i64,
                1,
                std::ptr::null_mut(),
                0,
                Some(callback),
                sys::GGML_N_TASKS_MAX,
                Arc::as_ptr(&op).cast_mut().cast::<c_void>(),
            );
            (*node).src[0] = q.raw();
            for (i, segment) in segments.iter().enumerate() {
                (*node).src[1 + 3 * i] = segment.k.raw();
                (*node).src[2 + 3 * i] = segment.v.raw();
                (*node).src[3 + 3 * i] = segment.mask.map_or(std::ptr::null_mut(), Tensor::raw);
            }
            node
        };
        (node, op)
    }

    /// # Safety
    /// Called by all threads of a ggml graph's run for the node that `add` made.
    unsafe fn run(&self, node: *mut sys::ggml_tensor, thread: usize, n_threads: usize) {
        // SAFETY: node and sources are alive and have memory while the graph runs; the features were detected.
        unsafe {
            let call = Call::new(self, node, thread, n_threads);
            match self.features {
                Features::Portable => call.run::<Portable>(),
                #[cfg(target_arch = "x86_64")]
                Features::Avx2 => call.run::<x86::Avx2>(),
                #[cfg(target_arch = "x86_64")]
                Features::Avx512 => call.run::<x86::Avx512>(),
            }
        }
        // The last thread makes the state ready for the next run, which begins behind a barrier of ggml's.
        if self.finished.0.fetch_add(1, Ordering::AcqRel) + 1 == n_threads {
            for next in &self.next {
                next.0.store(0, Ordering::Relaxed);
            }
            self.finished.0.store(0, Ordering::Release);
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Op").field("n_segments", &self.n_segments).field("features", &self.features).finish()
    }
}

fn check(q: &Tensor, segments: &[KvSegment<'_>], params: &FusedAttention<'_>) {
    let [key_size, n, heads, _] = q.shape();
    assert!((1..=MAX_SEGMENTS).contains(&segments.len()), "one to {MAX_SEGMENTS} segments");
    assert!(q.ty() == Type::F32 && q.strides()[0] == 4, "queries are rows of f32");
    let [value_size, ..] = segments[0].v.shape();
    let [_, _, kv_heads, _] = segments[0].k.shape();
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads for {kv_heads} KV heads");
    for KvSegment { k, v, mask } in segments {
        let rows = k.shape()[1];
        assert_eq!(k.shape(), [key_size, rows, kv_heads, 1], "keys");
        let value_heads = if v.shape()[2] == 1 { 1 } else { kv_heads };
        assert_eq!(v.shape(), [value_size, rows, value_heads, 1], "values");
        assert!(Type::CACHE.contains(&k.ty()) && Type::CACHE.contains(&v.ty()), "keys and values have cache types");
        for rows in [k, v] {
            assert_eq!(rows.strides()[0], rows.ty().block_bytes(), "rows have no gaps");
        }
        if let Some(mask) = mask {
            assert_eq!(mask.shape(), [rows, n, 1, 1], "the mask");
            assert!(mask.ty() == Type::F16 || mask.ty() == Type::F32, "masks are f16 or f32");
            assert_eq!(mask.strides()[0], mask.ty().block_bytes(), "mask rows have no gaps");
        }
    }
    if let Some(sinks) = params.sinks {
        assert_eq!((sinks.ty(), sinks.shape()), (Type::F32, [heads, 1, 1, 1]), "sinks");
        assert!(sinks.is_allocated(), "sinks are a weight");
    }
}

unsafe extern "C" fn callback(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, state: *mut c_void) {
    // SAFETY: ggml hands back the state that `Op::add` gave it, which lives as long as the graph.
    unsafe { (*state.cast::<Op>().cast_const()).run(node, thread as usize, n_threads as usize) }
}

/// Rows that are read without a break by one thread, where threads divide the rows.
///
/// Few rows are divided at multiples of a fixed number, so that sums, and with them the last bits of a result, do not depend
/// on how many more rows a store has room for. Many are divided into a fixed number of chunks of about as many blocks, so
/// that threads end at about the same time.
struct Chunks {
    rows: [usize; MAX_SEGMENTS],
    /// Chunks of each segment.
    n: [usize; MAX_SEGMENTS],
    are_few: bool,
}

impl Chunks {
    /// Chunks of many rows, but for rounding up.
    const N: usize = 16;
    /// Blocks of a chunk of few rows, and at the least.
    const MIN_BLOCKS: usize = 2;
    /// Blocks, up to which rows are few.
    const FEW_BLOCKS: usize = 64;

    fn new(rows: [usize; MAX_SEGMENTS]) -> Chunks {
        let blocks = rows.map(|rows| rows.div_ceil(BLOCK));
        let total: usize = blocks.iter().sum();
        let are_few = total <= Chunks::FEW_BLOCKS;
        let n = blocks.map(|blocks| {
            let most = blocks.div_ceil(Chunks::MIN_BLOCKS);
            if are_few { most } else { (Chunks::N * blocks).div_ceil(total).min(most) }
        });
        Chunks { rows, n, are_few }
    }

    fn n(&self) -> usize {
        self.n.iter().sum()
    }

    /// The chunks of a chunk's segment.
    fn segment(&self, chunk: usize) -> std::ops::Range<usize> {
        let mut start = 0;
        for n in self.n {
            if chunk < start + n {
                return start..start + n;
            }
            start += n;
        }
        unreachable!("the index is below `n`")
    }

    /// A chunk's segment and rows.
    fn get(&self, mut index: usize) -> (usize, std::ops::Range<usize>) {
        for (segment, (&rows, &n)) in self.rows.iter().zip(&self.n).enumerate() {
            if index < n {
                let block = |i| if self.are_few { i * Chunks::MIN_BLOCKS } else { i * rows.div_ceil(BLOCK) / n };
                return (segment, block(index) * BLOCK..(block(index + 1) * BLOCK).min(rows));
            }
            index -= n;
        }
        unreachable!("the index is below `n`")
    }
}

/// Elements of a vector in scratch memory: whole vectors of any instruction set.
fn padded(size: usize) -> usize {
    size.next_multiple_of(16)
}

/// Elements of a chunk's result for one query and head: its values, its [`Running`].
fn partial_stride(value_size: usize) -> usize {
    value_size + 16
}

/// How a row's elements are stored.
#[derive(Clone, Copy)]
enum Kind {
    F32,
    F16,
    Bf16,
    Q8,
    Q4,
    /// ggml converts a row.
    Other(unsafe extern "C" fn(*const c_void, *mut f32, i64)),
}

/// The rows of all heads of a segment's keys or values.
#[derive(Clone, Copy)]
struct Rows {
    kind: Kind,
    data: *const u8,
    row_bytes: usize,
    head_bytes: usize,
}

#[derive(Clone, Copy)]
struct Segment {
    k: Rows,
    v: Rows,
    mask: Option<Mask>,
    n: usize,
}

#[derive(Clone, Copy)]
struct Mask {
    data: *const u8,
    row_bytes: usize,
    is_f16: bool,
}

/// What queries see of some rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight {
    Nothing,
    Everything,
    Some,
}

impl Sight {
    fn and(self, other: Sight) -> Sight {
        if self == other { self } else { Sight::Some }
    }
}

impl Rows {
    /// # Safety
    /// `tensor` is alive and has memory that the processor can read.
    unsafe fn new(tensor: *const sys::ggml_tensor) -> Rows {
        // SAFETY: as the caller says; the traits' table lives as long as the process.
        unsafe {
            let kind = match (*tensor).type_ {
                sys::GGML_TYPE_F32 => Kind::F32,
                sys::GGML_TYPE_F16 => Kind::F16,
                sys::GGML_TYPE_BF16 => Kind::Bf16,
                sys::GGML_TYPE_Q8_0 => Kind::Q8,
                sys::GGML_TYPE_Q4_0 => Kind::Q4,
                ty => Kind::Other((*sys::ggml_get_type_traits(ty)).to_float.expect("cache types can be converted")),
            };
            let [_, row_bytes, head_bytes, _] = (*tensor).nb;
            // A single head serves all.
            let head_bytes = if (*tensor).ne[2] == 1 { 0 } else { head_bytes };
            Rows { kind, data: (*tensor).data.cast(), row_bytes, head_bytes }
        }
    }

    /// # Safety
    /// The rows and the head exist.
    unsafe fn at(&self, head: usize, first: usize, n: usize) -> RowPtr {
        // SAFETY: as the caller says.
        let data = unsafe { self.data.add(head * self.head_bytes + first * self.row_bytes) };
        RowPtr { data, bytes: self.row_bytes, n, ahead: Ahead::NOTHING }
    }

    /// What to ask for while `head`, one of `heads` that are read one after the other, is read, so that the block of rows from
    /// `first` on is there when it is read.
    fn ahead(&self, head: usize, heads: &std::ops::Range<usize>, n_heads: usize, first: usize) -> Ahead {
        const LINE: usize = 64;
        let rows = self.data.wrapping_add(first * self.row_bytes);
        let is_packed = self.head_bytes * n_heads == self.row_bytes;
        if is_packed && (heads.len() == n_heads || self.head_bytes < LINE) {
            // Whole rows without gaps, of which each head asks for a share: asked for at once they would have to wait for each
            // other. Where heads share lines, those that are read first ask for all.
            if heads.start > 0 {
                return Ahead::NOTHING;
            }
            let bytes = self.row_bytes.div_ceil(heads.len());
            return Ahead { data: rows.wrapping_add((head - heads.start) * BLOCK * bytes), stride: bytes, bytes };
        }
        match self.head_bytes {
            // One head that all share.
            0 if head > heads.start => Ahead::NOTHING,
            0 => Ahead { data: rows, stride: self.row_bytes, bytes: self.row_bytes },
            bytes => Ahead {
                data: rows.wrapping_add(head * bytes),
                stride: self.row_bytes,
                bytes: bytes.min(self.row_bytes),
            },
        }
    }

    /// Whether kernels read the rows as they are stored. Others are converted to padded rows of f32 first.
    fn is_direct<I: Isa>(&self, size: usize) -> bool {
        match self.kind {
            Kind::F32 | Kind::F16 | Kind::Bf16 => size.is_multiple_of(I::LANES),
            Kind::Q8 | Kind::Q4 => true,
            Kind::Other(_) => false,
        }
    }

    /// Rows as f32, `stride` apart.
    ///
    /// # Safety
    /// The rows have `size` elements, `to` has room for `rows.n` strides, and the features are there.
    unsafe fn convert<I: Isa>(&self, rows: RowPtr, size: usize, to: *mut f32, stride: usize) {
        // SAFETY: as the caller says.
        unsafe {
            match self.kind {
                Kind::F32 => I::convert::<F32>(rows, size, to, stride),
                Kind::F16 => I::convert::<F16>(rows, size, to, stride),
                Kind::Bf16 => I::convert::<Bf16>(rows, size, to, stride),
                Kind::Q8 => I::convert::<Q8>(rows, size, to, stride),
                Kind::Q4 => I::convert::<Q4>(rows, size, to, stride),
                Kind::Other(to_float) => {
                    for r in 0..rows.n {
                        to_float(rows.data.add(r * rows.bytes).cast(), to.add(r * stride), size as i64);
                    }
                }
            }
        }
    }
}

impl Mask {
    /// What `queries` see of rows `first..first + n`.
    ///
    /// # Safety
    /// The queries and the rows exist.
    unsafe fn sight(&self, queries: std::ops::Range<usize>, first: usize, n: usize) -> Sight {
        // Differences from "seen" (0) and from "hidden" (minus infinity), over all elements.
        let (mut seen, mut hidden) = (0u32, 0u32);
        for query in queries {
            // SAFETY: as the caller says; ggml aligns tensors, and rows are whole elements.
            unsafe {
                let row = self.data.add(query * self.row_bytes);
                if self.is_f16 {
                    let row = std::slice::from_raw_parts(row.cast::<u16>().add(first), n);
                    let (mut a, mut b) = (0u16, 0u16);
                    for &cell in row {
                        a |= cell;
                        b |= cell ^ 0xfc00;
                    }
                    (seen, hidden) = (seen | u32::from(a), hidden | u32::from(b));
                } else {
                    let row = std::slice::from_raw_parts(row.cast::<u32>().add(first), n);
                    for &cell in row {
                        seen |= cell;
                        hidden |= cell ^ 0xff80_0000;
                    }
                }
            }
            if seen != 0 && hidden != 0 {
                return Sight::Some;
            }
        }
        if hidden == 0 { Sight::Nothing } else { Sight::Everything }
    }

    /// What is added to the query's scores of `n` rows from `first` on, in units of log2.
    ///
    /// # Safety
    /// The query and the rows exist, `to` has room for `n` elements, and the features are there.
    unsafe fn convert<I: Isa>(&self, query: usize, first: usize, n: usize, to: *mut f32) {
        // SAFETY: as the caller says.
        unsafe {
            let cells = self.data.add(query * self.row_bytes);
            let row = |data| RowPtr { data, bytes: 0, n: 1, ahead: Ahead::NOTHING };
            match self.is_f16 {
                true => I::convert::<F16>(row(cells.add(first * size_of::<u16>())), n, to, 0),
                false => I::convert::<F32>(row(cells.add(first * size_of::<f32>())), n, to, 0),
            }
            for cell in std::slice::from_raw_parts_mut(to, n) {
                *cell *= std::f32::consts::LOG2_E;
            }
        }
    }

    /// What is added to the query's score of a row, in units of log2.
    ///
    /// # Safety
    /// The query and the row exist.
    unsafe fn get(&self, query: usize, row: usize) -> f32 {
        // SAFETY: as the caller says.
        unsafe {
            let cells = self.data.add(query * self.row_bytes);
            let cell = match self.is_f16 {
                true => f16_to_f32(*cells.cast::<u16>().add(row)),
                false => *cells.cast::<f32>().add(row),
            };
            cell * std::f32::consts::LOG2_E
        }
    }
}

/// One run of the operation, resolved to pointers.
struct Call<'a> {
    op: &'a Op,
    thread: usize,
    n_threads: usize,
    q: *const u8,
    query_bytes: usize,
    head_bytes: usize,
    /// Queries.
    n: usize,
    heads: usize,
    kv_heads: usize,
    /// Heads that share a KV head.
    group: usize,
    key_size: usize,
    value_size: usize,
    segments: [Option<Segment>; MAX_SEGMENTS],
    sinks: *const f32,
    out: *mut f32,
    /// Factor of the queries.
    factor: f32,
    shape: Shape,
}

impl Call<'_> {
    /// # Safety
    /// As [`Op::run`].
    unsafe fn new(op: &Op, node: *mut sys::ggml_tensor, thread: usize, n_threads: usize) -> Call<'_> {
        // SAFETY: `Op::add` set the sources; all are alive and have memory while the graph runs.
        unsafe {
            let src = &(*node).src;
            let q = src[0];
            let [key_size, n, heads, _] = (*q).ne.map(|n| n as usize);
            let [_, query_bytes, head_bytes, _] = (*q).nb;
            let segments = std::array::from_fn(|i| {
                (i < op.n_segments).then(|| {
                    let (k, v, mask) = (src[1 + 3 * i], src[2 + 3 * i], src[3 + 3 * i]);
                    let mask = (!mask.is_null()).then(|| Mask {
                        data: (*mask).data.cast(),
                        row_bytes: (*mask).nb[1],
                        is_f16: (*mask).type_ == sys::GGML_TYPE_F16,
                    });
                    Segment { k: Rows::new(k), v: Rows::new(v), mask, n: (*k).ne[1] as usize }
                })
            });
            let kv_heads = (*src[1]).ne[2] as usize;
            let log2_e = std::f32::consts::LOG2_E;
            let (factor, cap) = match op.soft_cap {
                Some(cap) => (op.scale / cap, cap * log2_e),
                None => (op.scale * log2_e, 0.0),
            };
            Call {
                op,
                thread,
                n_threads,
                q: (*q).data.cast(),
                query_bytes,
                head_bytes,
                n,
                heads,
                kv_heads,
                group: heads / kv_heads,
                key_size,
                value_size: (*node).ne[0] as usize,
                segments,
                sinks: if op.sinks.is_null() { std::ptr::null() } else { (*op.sinks).data.cast() },
                out: (*node).data.cast(),
                factor,
                shape: Shape { cap },
            }
        }
    }

    /// # Safety
    /// As [`Op::run`]; the processor has the features.
    unsafe fn run<I: Isa>(&self) {
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: as the caller says.
            unsafe { if self.n < MANY { self.few::<I>(scratch) } else { self.many::<I>(scratch) } }
        });
    }

    /// Calls `work` for this thread's share of so many pieces. It takes its range of them in order, so that it reads memory
    /// without a break, then helps with the others'.
    fn share(&self, n_items: usize, n_ranges: usize, mut work: impl FnMut(usize)) {
        for i in 0..n_ranges {
            let range = (self.thread + i) % n_ranges;
            let [first, end] = [range, range + 1].map(|range| range * n_items / n_ranges);
            loop {
                let item = first + self.op.next[range].0.fetch_add(1, Ordering::Relaxed);
                if item >= end {
                    break;
                }
                work(item);
            }
        }
    }

    /// # Safety
    /// The query and the head exist.
    unsafe fn query(&self, query: usize, head: usize) -> *const f32 {
        // SAFETY: as the caller says.
        unsafe { self.q.add(query * self.query_bytes + head * self.head_bytes).cast() }
    }

    fn segment(&self, index: usize) -> &Segment {
        self.segments[index].as_ref().expect("an index below the number of segments")
    }

    /// The softmax's last step for one head: its sink joins in. The maximum, and the factor of the values.
    ///
    /// # Safety
    /// The head exists.
    unsafe fn finish(&self, head: usize, running: Running) -> f32 {
        let Running { mut max, mut sum } = running;
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

    // Few queries.

    /// # Safety
    /// As [`Call::run`].
    unsafe fn few<I: Isa>(&self, scratch: &mut Scratch) {
        let chunks = Chunks::new(self.segments.map(|segment| segment.map_or(0, |segment| segment.n)));
        let n_chunks = chunks.n();
        // All KV heads go together where there is enough to do, so that whole rows are read in order.
        let n_groups = (4 * self.n_threads).div_ceil(n_chunks.max(1)).clamp(1, self.kv_heads);
        let group_size = self.kv_heads.div_ceil(n_groups);
        let n_groups = self.kv_heads.div_ceil(group_size);
        // SAFETY: as the caller says.
        let few = unsafe { self.prepare::<I>(scratch) };
        // The last chunk's segment, and where its rows end.
        let mut last = (MAX_SEGMENTS, 0);
        self.share(n_groups * n_chunks, self.n_threads.min(MAX_RANGES), |item| {
            let (chunk, group) = (item / n_groups, item % n_groups);
            let kv_heads = group * group_size..((group + 1) * group_size).min(self.kv_heads);
            let (segment, rows) = chunks.get(chunk);
            let is_cold = last != (segment, rows.start);
            last = (segment, rows.end);
            // SAFETY: as the caller says. Each chunk and head is one thread's.
            unsafe {
                self.attend_chunk::<I>(&few, chunk, self.segment(segment), rows, kv_heads.clone(), is_cold);
                self.merge::<I>(chunk, &chunks, group, kv_heads);
            }
        });
    }

    /// Scales (and packs) the queries of all heads, which each thread does once for itself.
    ///
    /// # Safety
    /// As [`Call::run`].
    unsafe fn prepare<I: Isa>(&self, scratch: &mut Scratch) -> Few {
        let (key_size, value_size) = (padded(self.key_size), padded(self.value_size));
        let n_vectors = self.heads * self.n;
        // Four-bit keys may have a kernel that wants queries in a form of its own.
        let has_q4 = self.segments.iter().flatten().any(|segment| matches!(segment.k.kind, Kind::Q4));
        let packed_len = if has_q4 { I::packed_q4(self.key_size) } else { 0 };
        let mut room = scratch.room(
            n_vectors * (key_size + packed_len) + self.n * BLOCK + (I::MAX_GROUP + key_size.max(value_size)) * BLOCK,
        );
        let few = Few {
            queries: room.take(n_vectors * key_size),
            packed: room.take(n_vectors * packed_len),
            packed_len,
            mask: room.take(self.n * BLOCK),
            scores: room.take(I::MAX_GROUP * BLOCK),
            converted: room.take(key_size.max(value_size) * BLOCK),
        };
        for head in 0..self.heads {
            for query in 0..self.n {
                let vector = head * self.n + query;
                // SAFETY: the query is there, and room for so many vectors.
                unsafe {
                    let to = few.queries.add(vector * key_size);
                    copy_scaled(self.query(query, head), self.key_size, self.factor, to, key_size);
                    if packed_len > 0 {
                        I::pack_q4(to, self.key_size, few.packed.add(vector * packed_len));
                    }
                }
            }
        }
        few
    }

    /// Where the result of a chunk for a query of a head is kept.
    fn partial(&self, chunk: usize, head: usize, query: usize) -> *mut f32 {
        let index = (chunk * self.heads + head) * self.n + query;
        // SAFETY: `Op::add` made room for all of them.
        unsafe { self.op.partials.data().add(index * partial_stride(padded(self.value_size))) }
    }

    /// # Safety
    /// As [`Call::run`]; the chunk and the heads are this thread's.
    unsafe fn attend_chunk<I: Isa>(
        &self,
        few: &Few,
        chunk: usize,
        segment: &Segment,
        rows: std::ops::Range<usize>,
        kv_heads: std::ops::Range<usize>,
        // Nobody asked for the chunk's first rows yet.
        is_cold: bool,
    ) {
        let (key_size, value_size) = (padded(self.key_size), padded(self.value_size));
        let heads = kv_heads.start * self.group..kv_heads.end * self.group;
        // Vectors of a KV head: all queries of all its heads.
        let per_kv_head = self.group * self.n;
        let packed_len = if matches!(segment.k.kind, Kind::Q4) { few.packed_len } else { 0 };
        // SAFETY: all pointers are into memory of the sizes that `prepare` asked for, or of the tensors whose sizes were
        // checked when the operation was made.
        unsafe {
            // Values are cleared once a row is seen: many of a ring's chunks may be hidden.
            let mut is_empty = true;
            for head in heads.clone() {
                for query in 0..self.n {
                    let partial = self.partial(chunk, head, query);
                    partial.add(value_size).cast::<Running>().write_unaligned(Running::EMPTY);
                }
            }
            // Rows that no query sees are not asked for: a ring has a run of them.
            let sight = |first: usize| match segment.mask {
                Some(mask) if first < rows.end => mask.sight(0..self.n, first, BLOCK.min(rows.end - first)),
                _ => Sight::Everything,
            };
            let mut next = sight(rows.start);
            if is_cold && next != Sight::Nothing {
                for kv_head in kv_heads.clone() {
                    for rows_of in [segment.k, segment.v] {
                        let ahead = rows_of.ahead(kv_head, &kv_heads, self.kv_heads, rows.start);
                        for r in (0..BLOCK.min(rows.len())).step_by(8) {
                            ahead.ask::<8>(r);
                        }
                    }
                }
            }
            for first in rows.clone().step_by(BLOCK) {
                let n = BLOCK.min(rows.end - first);
                let seen = std::mem::replace(&mut next, sight(first + BLOCK));
                if seen == Sight::Nothing {
                    continue;
                }
                if std::mem::take(&mut is_empty) {
                    for head in heads.clone() {
                        for query in 0..self.n {
                            std::slice::from_raw_parts_mut(self.partial(chunk, head, query), value_size).fill(0.0);
                        }
                    }
                }
                let masked = seen == Sight::Some || n < BLOCK;
                if masked {
                    for query in 0..self.n {
                        let to = few.mask.add(query * BLOCK);
                        match segment.mask {
                            Some(mask) => mask.convert::<I>(query, first, n, to),
                            None => std::slice::from_raw_parts_mut(to, n).fill(0.0),
                        }
                        std::slice::from_raw_parts_mut(to.add(n), BLOCK - n).fill(f32::NEG_INFINITY);
                    }
                }
                let ahead = |rows: &Rows, head| rows.ahead(head, &kv_heads, self.kv_heads, first + BLOCK);
                for kv_head in kv_heads.clone() {
                    let mut k = segment.k.at(kv_head, first, n);
                    let mut v = segment.v.at(kv_head, first, n);
                    (k.ahead, v.ahead) = match next {
                        Sight::Nothing => (Ahead::NOTHING, Ahead::NOTHING),
                        _ => (ahead(&segment.k, kv_head), ahead(&segment.v, kv_head)),
                    };
                    let vectors = kv_head * per_kv_head;
                    let mut done = 0;
                    while done < per_kv_head {
                        let left = per_kv_head - done;
                        // Groups of about equal size.
                        let size = left.div_ceil(left.div_ceil(I::MAX_GROUP));
                        let group = Group {
                            queries: few.queries.add((vectors + done) * key_size),
                            packed: (packed_len > 0)
                                .then(|| few.packed.add((vectors + done) * packed_len).cast_const()),
                            masks: std::array::from_fn(|g| match masked {
                                true => few.mask.add((done + g) % self.n * BLOCK).cast_const(),
                                false => std::ptr::null(),
                            }),
                            out: self.partial(chunk, 0, vectors + done),
                            scores: few.scores,
                            converted: few.converted,
                        };
                        match size {
                            1 => self.attend_block::<I, 1>(segment, k, v, &group),
                            2 => self.attend_block::<I, 2>(segment, k, v, &group),
                            3 => self.attend_block::<I, 3>(segment, k, v, &group),
                            _ => self.attend_block::<I, 4>(segment, k, v, &group),
                        }
                        (k.ahead, v.ahead) = (Ahead::NOTHING, Ahead::NOTHING);
                        done += size;
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Call::run`]; the group's memory is this thread's.
    unsafe fn attend_block<I: Isa, const G: usize>(&self, segment: &Segment, k: RowPtr, v: RowPtr, group: &Group) {
        let (key_size, value_size) = (padded(self.key_size), padded(self.value_size));
        let (queries, scores) = (group.queries, group.scores);
        let stride = partial_stride(value_size);
        // SAFETY: as the caller says.
        unsafe {
            if segment.k.is_direct::<I>(self.key_size) {
                let size = self.key_size;
                match segment.k.kind {
                    Kind::F16 => I::scores_of::<F16, G>(queries, key_size, k, size, scores),
                    Kind::Bf16 => I::scores_of::<Bf16, G>(queries, key_size, k, size, scores),
                    Kind::Q8 => I::scores_of::<Q8, G>(queries, key_size, k, size, scores),
                    Kind::Q4 => match group.packed {
                        Some(packed) => I::scores_of_q4::<G>(packed, k, size, scores),
                        None => I::scores_of::<Q4, G>(queries, key_size, k, size, scores),
                    },
                    Kind::F32 | Kind::Other(_) => I::scores_of::<F32, G>(queries, key_size, k, size, scores),
                }
            } else {
                let k = self.converted::<I>(&segment.k, k, self.key_size, group.converted);
                I::scores_of::<F32, G>(queries, key_size, k, key_size, scores);
            }
            let running = std::array::from_fn(|g| group.out.add(g * stride + value_size).cast::<Running>());
            let factors = I::weights_of(scores, k.n, &group.masks, self.shape, running);
            if segment.v.is_direct::<I>(self.value_size) {
                let size = self.value_size;
                match segment.v.kind {
                    Kind::F16 => I::add_values::<F16, G>(scores, v, size, &factors, group.out, stride),
                    Kind::Bf16 => I::add_values::<Bf16, G>(scores, v, size, &factors, group.out, stride),
                    Kind::Q8 => I::add_values::<Q8, G>(scores, v, size, &factors, group.out, stride),
                    Kind::Q4 => I::add_values_q4::<G>(scores, v, size, &factors, group.out, stride),
                    Kind::F32 | Kind::Other(_) => I::add_values::<F32, G>(scores, v, size, &factors, group.out, stride),
                }
            } else {
                let v = self.converted::<I>(&segment.v, v, self.value_size, group.converted);
                I::add_values::<F32, G>(scores, v, value_size, &factors, group.out, stride);
            }
        }
    }

    /// The rows as f32 in `to`, padded with zeros.
    ///
    /// # Safety
    /// As [`Call::run`]; `to` has room for a block of padded rows.
    unsafe fn converted<I: Isa>(&self, rows: &Rows, block: RowPtr, size: usize, to: *mut f32) -> RowPtr {
        let stride = padded(size);
        // SAFETY: as the caller says.
        unsafe {
            rows.convert::<I>(block, size, to, stride);
            for r in 0..block.n {
                std::slice::from_raw_parts_mut(to.add(r * stride + size), stride - size).fill(0.0);
            }
        }
        RowPtr { data: to.cast_const().cast(), bytes: stride * size_of::<f32>(), n: block.n, ahead: Ahead::NOTHING }
    }

    /// Adds a finished chunk's result to those of its segment, for some KV heads: the first chunk's to the second's, the third's
    /// to the fourth's, then these pairs to each other, and so on; then segment to segment. So the result depends neither on
    /// who finishes when nor on empty chunks at a segment's end. Who finishes the second of two adds them: mostly that is who
    /// finished the first, and still has it in its caches.
    ///
    /// # Safety
    /// As [`Call::run`]; the chunk and the heads are this thread's.
    unsafe fn merge<I: Isa>(&self, chunk: usize, chunks: &Chunks, group: usize, kv_heads: std::ops::Range<usize>) {
        let done = |at: usize| &self.op.halves_done[group * chunks.n() + at];
        let segment = chunks.segment(chunk);
        let mut left = chunk - segment.start;
        let mut width = 1;
        while width < segment.len() {
            left -= left % (2 * width);
            let right = left + width;
            if right < segment.len() {
                let done = done(segment.start + right);
                if done.fetch_add(1, Ordering::AcqRel) == 0 {
                    return;
                }
                done.store(0, Ordering::Relaxed);
                // SAFETY: both halves are done; what others wrote is seen by the counter's ordering.
                unsafe { self.merge_two::<I>(segment.start + left, segment.start + right, kv_heads.clone()) };
            }
            width *= 2;
        }
        // No halves meet at the first chunk: there the segments are counted.
        let segments = || chunks.n.iter().filter(|&&n| n > 0);
        if done(0).fetch_add(1, Ordering::AcqRel) + 1 < segments().count() {
            return;
        }
        done(0).store(0, Ordering::Relaxed);
        let mut next = 0;
        for n in segments() {
            if next > 0 {
                // SAFETY: all segments are done; as above.
                unsafe { self.merge_two::<I>(0, next, kv_heads.clone()) };
            }
            next += n;
        }
        for head in kv_heads.start * self.group..kv_heads.end * self.group {
            for query in 0..self.n {
                // SAFETY: the output has `value_size` elements for each head and query, and so has the result.
                unsafe {
                    let values = self.partial(0, head, query);
                    let running = values.add(padded(self.value_size)).cast::<Running>().read();
                    let out = self.out.add((query * self.heads + head) * self.value_size);
                    let out = std::slice::from_raw_parts_mut(out, self.value_size);
                    if running.max == f32::NEG_INFINITY {
                        // It sees nothing: no chunk has cleared the values.
                        out.fill(0.0);
                        continue;
                    }
                    let factor = self.finish(head, running);
                    let values = std::slice::from_raw_parts(values, self.value_size);
                    for (out, value) in out.iter_mut().zip(values) {
                        *out = value * factor;
                    }
                }
            }
        }
    }

    /// Adds the result at chunk `right` to that at chunk `left`, for some KV heads.
    ///
    /// # Safety
    /// Both are this thread's; the processor has the features.
    unsafe fn merge_two<I: Isa>(&self, left: usize, right: usize, kv_heads: std::ops::Range<usize>) {
        let value_size = padded(self.value_size);
        for head in kv_heads.start * self.group..kv_heads.end * self.group {
            for query in 0..self.n {
                let [to, from] = [left, right].map(|chunk| self.partial(chunk, head, query));
                // SAFETY: each result is `value_size` elements and its `Running`; they lie apart.
                unsafe { I::add_result(to, from, value_size) };
            }
        }
    }

    // Many queries.

    /// # Safety
    /// As [`Call::run`].
    unsafe fn many<I: Isa>(&self, scratch: &mut Scratch) {
        let lanes = 2 * I::LANES;
        let enough = 4 * self.n_threads;
        let mut tile = TILE;
        while tile > lanes && self.kv_heads * self.n.div_ceil(tile) < enough {
            tile /= 2;
        }
        let n_tiles = self.n.div_ceil(tile);
        // Heads that share a KV head go together, so that its rows are converted once, unless there are too few of
        // them for the threads.
        let together = if self.kv_heads * n_tiles < enough { 1 } else { self.group };
        let per_tile = self.heads / together;
        self.share(n_tiles * per_tile, 1, |item| {
            // The last queries see the most rows: they come first, so that threads end at about the same time.
            let first = (n_tiles - 1 - item / per_tile) * tile;
            let head = item % per_tile * together;
            // SAFETY: as the caller says.
            unsafe {
                self.attend_tile::<I>(scratch, first..(first + tile).min(self.n), head..head + together);
            }
        });
    }

    /// # Safety
    /// As [`Call::run`]; the heads share a KV head.
    unsafe fn attend_tile<I: Isa>(
        &self,
        scratch: &mut Scratch,
        queries: std::ops::Range<usize>,
        heads: std::ops::Range<usize>,
    ) {
        const MAX_LANE_BLOCKS: usize = TILE / 8;
        let lanes = 2 * I::LANES;
        let value_size = padded(self.value_size);
        let kv_head = heads.start / self.group;
        let lane_blocks = queries.len().div_ceil(lanes);
        // Vectors of lanes: one for each lane block of each head.
        let n_vectors = heads.len() * lane_blocks;
        let mut room = scratch.room(
            n_vectors * lanes * (self.key_size + value_size + 2)
                + BLOCK * (self.key_size + value_size)
                + BLOCK * lanes * (1 + lane_blocks)
                + 8 * 16,
        );
        let packed = room.take(n_vectors * lanes * self.key_size);
        let out = room.take(n_vectors * lanes * value_size);
        let max = room.take(n_vectors * lanes);
        let sum = room.take(n_vectors * lanes);
        let keys = room.take(BLOCK * self.key_size);
        let values = room.take(BLOCK * value_size);
        let scores = room.take(BLOCK * lanes);
        let mask_stride = lane_blocks * lanes;
        let mask_rows = room.take(BLOCK * mask_stride);
        // SAFETY: all pointers are into memory of the sizes just asked for, or of the tensors whose sizes were checked
        // when the operation was made.
        unsafe {
            std::slice::from_raw_parts_mut(out, n_vectors * lanes * value_size).fill(0.0);
            std::slice::from_raw_parts_mut(max, n_vectors * lanes).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(sum, n_vectors * lanes).fill(0.0);
            for (h, head) in heads.clone().enumerate() {
                for lane in 0..mask_stride {
                    let block = packed.add((h * lane_blocks + lane / lanes) * lanes * self.key_size + lane % lanes);
                    // Lanes without a query have zeros; what becomes of them is not looked at.
                    let query = queries.start + lane;
                    let from = (query < queries.end).then(|| self.query(query, head));
                    for i in 0..self.key_size {
                        *block.add(i * lanes) = from.map_or(0.0, |from| *from.add(i) * self.factor);
                    }
                }
            }
            for segment in self.segments.iter().flatten() {
                for first in (0..segment.n).step_by(BLOCK) {
                    let n = BLOCK.min(segment.n - first);
                    let mut sights = [Sight::Everything; MAX_LANE_BLOCKS];
                    if let Some(mask) = segment.mask {
                        for (block, sight) in sights[..lane_blocks].iter_mut().enumerate() {
                            let start = queries.start + block * lanes;
                            *sight = mask.sight(start..(start + lanes).min(queries.end), first, n);
                        }
                        let all = sights[..lane_blocks].iter().copied().reduce(Sight::and);
                        match all {
                            Some(Sight::Nothing) => continue,
                            Some(Sight::Some) => {
                                for lane in 0..queries.len() {
                                    for r in 0..n {
                                        *mask_rows.add(r * mask_stride + lane) =
                                            mask.get(queries.start + lane, first + r);
                                    }
                                }
                                for lane in queries.len()..mask_stride {
                                    for r in 0..n {
                                        *mask_rows.add(r * mask_stride + lane) = 0.0;
                                    }
                                }
                            }
                            _ => {}
                        }
                    }
                    segment.k.convert::<I>(segment.k.at(kv_head, first, n), self.key_size, keys, self.key_size);
                    segment.v.convert::<I>(segment.v.at(kv_head, first, n), self.value_size, values, value_size);
                    for vector in 0..n_vectors {
                        let block = vector % lane_blocks;
                        let mask = match sights[block] {
                            Sight::Nothing => continue,
                            Sight::Everything => std::ptr::null(),
                            Sight::Some => mask_rows.add(block * lanes).cast_const(),
                        };
                        I::add_tile(&Tile {
                            keys,
                            key_size: self.key_size,
                            values,
                            value_size,
                            n,
                            queries: packed.add(vector * lanes * self.key_size),
                            out: out.add(vector * lanes * value_size),
                            mask,
                            mask_stride,
                            max: max.add(vector * lanes),
                            sum: sum.add(vector * lanes),
                            scores,
                            shape: self.shape,
                        });
                    }
                }
            }
            for (h, head) in heads.clone().enumerate() {
                for query in queries.clone() {
                    let lane = query - queries.start;
                    let vector = h * lane_blocks + lane / lanes;
                    let lane = lane % lanes;
                    let running =
                        Running { max: *max.add(vector * lanes + lane), sum: *sum.add(vector * lanes + lane) };
                    let factor = self.finish(head, running);
                    let to = self.out.add((query * self.heads + head) * self.value_size);
                    let from = out.add(vector * lanes * value_size + lane);
                    for i in 0..self.value_size {
                        *to.add(i) = *from.add(i * lanes) * factor;
                    }
                }
            }
        }
    }
}

/// A thread's memory for a few queries.
struct Few {
    /// Vectors of all heads, those of a head behind each other.
    queries: *mut f32,
    /// The same as the kernel for four-bit keys wants them; `packed_len` elements each, 0 where there is none.
    packed: *mut f32,
    packed_len: usize,
    /// `[queries][BLOCK]`
    mask: *mut f32,
    scores: *mut f32,
    /// A block of rows as f32.
    converted: *mut f32,
}

/// A few query vectors of one KV head.
struct Group {
    queries: *const f32,
    /// The same as the kernel for four-bit keys wants them, where there is one.
    packed: Option<*const f32>,
    /// Each vector's mask of the block's rows, or null.
    masks: [*const f32; 4],
    out: *mut f32,
    scores: *mut f32,
    converted: *mut f32,
}

/// # Safety
/// `from` has `size` elements, `to` room for `stride`.
unsafe fn copy_scaled(from: *const f32, size: usize, factor: f32, to: *mut f32, stride: usize) {
    // SAFETY: as the caller says.
    unsafe {
        let from = std::slice::from_raw_parts(from, size);
        let (to, padding) = std::slice::from_raw_parts_mut(to, stride).split_at_mut(size);
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
        padding.fill(0.0);
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

struct Scratch(Vec<Line>);

impl Scratch {
    /// Memory for `len` elements in a few pieces.
    fn room(&mut self, len: usize) -> Room {
        // Each piece is rounded up to whole lines; there are eight at most.
        let lines = len.div_ceil(16) + 8;
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        Room { next: self.0.as_mut_ptr(), left: lines }
    }
}

struct Room {
    next: *mut Line,
    left: usize,
}

impl Room {
    fn take(&mut self, len: usize) -> *mut f32 {
        let lines = len.div_ceil(16);
        assert!(lines <= self.left, "scratch memory was made too small");
        let taken = self.next.cast::<f32>();
        // SAFETY: the lines exist, as was just checked.
        self.next = unsafe { self.next.add(lines) };
        self.left -= lines;
        taken
    }
}
