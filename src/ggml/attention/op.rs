//! The operation as a node of a ggml graph: its checks, its state, and the choice of kernels.

use std::{ffi::c_void, fmt, sync::Arc};

use ggml_sys as sys;

#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    block::BLOCK,
    call::{Call, Counters},
    chunks::Chunks,
    kernels::{Isa, Shape},
    scratch::{Partials, padded, partial_stride, with_scratch},
    simd::Portable,
    views::{MAX_SEGMENTS, MAX_SOURCES, Mask, Rows, Segment},
};
use crate::ggml::{Tensor, Type, processor::Features, tiles};

/// From this many queries on the prefill kernels run, which take a tile of them at once.
pub(super) const MIN_PREFILL: usize = 16;

/// Keys, values and what is seen of them.
#[derive(Debug, Clone, Copy)]
pub struct KvSegment<'a> {
    /// `[head size, rows, KV heads]`, of any cache type; rows and heads may be any distance apart. Of several pieces the rows
    /// come one after the other: the pieces are alike, have their memory already, and all but the last have a multiple of 64
    /// rows. The results are those of one piece.
    pub k: &'a [Tensor],
    /// `[value size, rows, KV heads]`, likewise, in pieces of its own. With one head where the keys have more, all share it.
    pub v: &'a [Tensor],
    /// f16 or f32 `[rows, queries]`: what is added to the scores, minus infinity to hide a row. `None` hides nothing.
    pub mask: Option<&'a Tensor>,
}

/// Rows that one KV head has for itself, without a mask: every query sees them.
#[derive(Debug, Clone)]
pub struct HeadRows {
    /// `[head size, rows, 1]`, of any cache type, in pieces as those of [`KvSegment::k`], which have their memory already. All heads'
    /// are alike but for the number of their rows; a head may have no pieces.
    pub k: Vec<Tensor>,
    /// `[value size, rows, 1]`, likewise.
    pub v: Vec<Tensor>,
}

impl HeadRows {
    fn n_rows(&self) -> usize {
        self.k.iter().map(|piece| piece.shape()[1]).sum()
    }
}

/// How scores are made, and what is attended to besides the segments.
#[derive(Debug, Clone, Copy)]
pub struct FusedAttention<'a> {
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Scores become `cap × tanh(score / cap)`, before the mask is added.
    pub soft_cap: Option<f32>,
    /// f32 `[heads]`: one more score of each head, whose value is zero. A weight: it has its memory already.
    pub sinks: Option<&'a Tensor>,
    /// Rows that KV heads have for themselves, one entry a head; none where they have none.
    pub of_heads: &'a [HeadRows],
}

impl KvSegment<'_> {
    /// Rows of all pieces.
    fn n_rows(&self) -> usize {
        self.k.iter().map(|piece| piece.shape()[1]).sum()
    }
}

/// A segment's rows, and where the blocks of its keys and of its values begin where they lie in several pieces: see
/// [`blocks`].
struct Layout {
    n_rows: usize,
    k: Vec<*const u8>,
    v: Vec<*const u8>,
    /// How keys and values lie in tiles, where they do.
    tiles: [Option<tiles::Layout>; 2],
}

/// The rows of KV heads that have their own.
struct HeadsLayout {
    n_rows: Vec<usize>,
    k: HeadsBlocks,
    v: HeadsBlocks,
}

/// Where the blocks of each KV head's rows begin.
struct HeadsBlocks {
    ty: sys::ggml_type,
    row_bytes: usize,
    /// `per_head` of each head; after its last block the place where that begins.
    blocks: Vec<*const u8>,
    per_head: usize,
}

impl HeadsLayout {
    /// `None` where no head has any rows.
    fn new(heads: &[HeadRows]) -> Option<HeadsLayout> {
        let n_rows: Vec<usize> = heads.iter().map(HeadRows::n_rows).collect();
        let most = n_rows.iter().copied().max().filter(|&most| most > 0)?;
        let per_head = most.div_ceil(BLOCK) + 1;
        let blocks = |pieces: fn(&HeadRows) -> &Vec<Tensor>| {
            let first = heads.iter().find_map(|head| pieces(head).first())?;
            let mut all = Vec::with_capacity(heads.len() * per_head);
            for head in heads {
                let begun = all.len();
                for piece in pieces(head) {
                    let (rows, row_bytes) = (piece.shape()[1], piece.strides()[1]);
                    all.extend((0..rows).step_by(BLOCK).map(|row| piece.address().wrapping_add(row * row_bytes)));
                }
                let last = all[begun..].last().copied().unwrap_or(first.address());
                all.resize(begun + per_head, last);
            }
            Some(HeadsBlocks { ty: first.ty().raw(), row_bytes: first.strides()[1], blocks: all, per_head })
        };
        Some(HeadsLayout { k: blocks(|head| &head.k)?, v: blocks(|head| &head.v)?, n_rows })
    }

    fn most(&self) -> usize {
        self.n_rows.iter().copied().max().unwrap_or(0)
    }
}

impl HeadsBlocks {
    fn rows(&self) -> Rows {
        Rows::of_heads(self.ty, self.row_bytes, self.blocks.as_ptr(), self.per_head)
    }
}

/// Where each block of rows begins in these pieces, and, at last, the place after them; nothing of fewer pieces than `least`.
pub(in crate::ggml) fn blocks(pieces: &[Tensor], least: usize) -> Vec<*const u8> {
    let mut blocks = Vec::new();
    if pieces.len() < least {
        return blocks;
    }
    for piece in pieces {
        let (rows, row_bytes) = (piece.shape()[1], piece.strides()[1]);
        blocks.extend((0..rows).step_by(BLOCK).map(|row| piece.address().wrapping_add(row * row_bytes)));
    }
    blocks.extend(blocks.last().copied());
    blocks
}

/// The operation's state: what ggml hands to the callback.
pub(in crate::ggml) struct Op {
    scale: f32,
    soft_cap: Option<f32>,
    /// A tensor that the graph keeps alive, or null.
    sinks: *const sys::ggml_tensor,
    segments: Vec<Layout>,
    of_heads: Option<HeadsLayout>,
    partials: Arc<Partials>,
    features: Features,
    counters: Counters,
}

// SAFETY: the pointers are to a header that is not written while graphs run, and to memory of tensors that the graph keeps.
unsafe impl Send for Op {}
// SAFETY: as above; the rest is atomic, or (`partials`) divided among the threads by what they take from `counters`.
unsafe impl Sync for Op {}

impl Op {
    /// Adds the operation's node to the context `raw`. Returns it with the state, which must live as long.
    ///
    /// # Safety
    /// The context is alive, and the tensors live as long as it.
    pub(in crate::ggml) unsafe fn add(
        raw: *mut sys::ggml_context,
        q: &Tensor,
        segments: &[KvSegment<'_>],
        params: &FusedAttention<'_>,
        partials: &Arc<Partials>,
        features: Features,
    ) -> (*mut sys::ggml_tensor, Arc<Op>) {
        check(q, segments, params);
        let [_, n, heads, _] = q.shape();
        let value_size = segments[0].v[0].row_size();
        let [_, _, kv_heads, _] = segments[0].k[0].shape();
        let of_heads = HeadsLayout::new(params.of_heads);
        let mut rows: [usize; MAX_SEGMENTS] = std::array::from_fn(|i| segments.get(i).map_or(0, KvSegment::n_rows));
        rows[MAX_SOURCES] = of_heads.as_ref().map_or(0, HeadsLayout::most);
        let layout = |segment: &KvSegment<'_>| Layout {
            n_rows: segment.n_rows(),
            k: blocks(segment.k, 2),
            v: blocks(segment.v, 2),
            tiles: [segment.k[0].layout(1), segment.v[0].layout(1)],
        };
        let n_chunks = if n < MIN_PREFILL { Chunks::new(rows).total() } else { 0 };
        let op = Arc::new(Op {
            scale: params.scale,
            soft_cap: params.soft_cap,
            sinks: params.sinks.map_or(std::ptr::null(), |sinks| sinks.raw().cast_const()),
            segments: segments.iter().map(layout).collect(),
            of_heads,
            partials: Arc::clone(partials),
            features,
            counters: Counters::new(kv_heads * n_chunks),
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
                (*node).src[1 + 3 * i] = segment.k[0].raw();
                (*node).src[2 + 3 * i] = segment.v[0].raw();
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
            let call = self.call(node, thread, n_threads);
            match self.features {
                Features::Portable => run::<Portable>(&call),
                #[cfg(target_arch = "x86_64")]
                Features::Avx2 | Features::AvxVnni => run::<x86::Avx2>(&call),
                #[cfg(target_arch = "x86_64")]
                Features::Avx512 | Features::Avx512Vnni => run::<x86::Avx512>(&call),
                #[cfg(target_arch = "aarch64")]
                Features::Neon | Features::DotProd | Features::I8mm => run::<Neon>(&call),
            }
        }
        self.counters.finish(n_threads);
    }

    /// # Safety
    /// As [`Op::run`].
    unsafe fn call(&self, node: *mut sys::ggml_tensor, thread: usize, n_threads: usize) -> Call<'_> {
        // SAFETY: `Op::add` set the sources; all are alive and have memory while the graph runs.
        unsafe {
            let src = &(*node).src;
            let q = src[0];
            let [key_size, n, heads, _] = (*q).ne.map(|n| n as usize);
            let [_, query_bytes, head_bytes, _] = (*q).nb;
            let mut segments: [Option<Segment>; MAX_SEGMENTS] = std::array::from_fn(|i| {
                self.segments.get(i).map(|layout| {
                    let (k, v, mask) = (src[1 + 3 * i], src[2 + 3 * i], src[3 + 3 * i]);
                    let mask = (!mask.is_null()).then(|| Mask {
                        data: (*mask).data.cast(),
                        row_bytes: (*mask).nb[1],
                        is_f16: (*mask).type_ == sys::GGML_TYPE_F16,
                    });
                    let table = |blocks: &[*const u8]| match blocks {
                        [] => std::ptr::null(),
                        blocks => blocks.as_ptr(),
                    };
                    Segment {
                        k: Rows::new(k, table(&layout.k), layout.tiles[0]),
                        v: Rows::new(v, table(&layout.v), layout.tiles[1]),
                        mask,
                        n: layout.n_rows,
                        n_of_heads: std::ptr::null(),
                    }
                })
            });
            segments[MAX_SOURCES] = self.of_heads.as_ref().map(|heads| Segment {
                k: heads.k.rows(),
                v: heads.v.rows(),
                mask: None,
                n: heads.most(),
                n_of_heads: heads.n_rows.as_ptr(),
            });
            let kv_heads = (*src[1]).ne[2] as usize;
            let log2_e = std::f32::consts::LOG2_E;
            let (factor, cap) = match self.soft_cap {
                Some(cap) => (self.scale / cap, cap * log2_e),
                None => (self.scale * log2_e, 0.0),
            };
            Call {
                counters: &self.counters,
                partials: &self.partials,
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
                sinks: if self.sinks.is_null() { std::ptr::null() } else { (*self.sinks).data.cast() },
                out: (*node).data.cast(),
                factor,
                shape: Shape { cap },
            }
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Op").field("n_segments", &self.segments.len()).field("features", &self.features).finish()
    }
}

/// # Safety
/// The call's tensors have memory, this is one of the threads of the node's run, and the processor has the features.
unsafe fn run<I: Isa>(call: &Call<'_>) {
    with_scratch(|scratch| {
        // SAFETY: as the caller says.
        unsafe { if call.n < MIN_PREFILL { call.decode::<I>(scratch) } else { call.prefill::<I>(scratch) } }
    });
}

fn check(q: &Tensor, segments: &[KvSegment<'_>], params: &FusedAttention<'_>) {
    let [key_size, n, heads, _] = q.shape();
    assert!((1..=MAX_SOURCES).contains(&segments.len()), "one to {MAX_SOURCES} segments");
    assert!(q.ty() == Type::F32 && q.strides()[0] == 4, "queries are rows of f32");
    let value_size = segments[0].v[0].row_size();
    let [_, _, kv_heads, _] = segments[0].k[0].shape();
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads for {kv_heads} KV heads");
    for segment @ KvSegment { k, v, mask } in segments {
        let rows = segment.n_rows();
        let value_heads = if v[0].shape()[2] == 1 { 1 } else { kv_heads };
        for (pieces, size, heads) in [(k, key_size, kv_heads), (v, value_size, value_heads)] {
            let alike = (pieces[0].ty(), pieces[0].strides());
            let mut n = 0;
            for piece in *pieces {
                assert!(n % BLOCK == 0, "pieces before the last are whole blocks");
                assert_eq!((piece.row_size(), &piece.shape()[2..]), (size, &[heads, 1][..]), "keys or values");
                assert!(Type::CACHE.contains(&piece.ty()), "keys and values have cache types");
                let is_tiles = piece.ty().is_tiles();
                assert!(is_tiles || piece.strides()[0] == piece.ty().block_bytes(), "rows have no gaps");
                let strides = piece.strides();
                assert_eq!((piece.ty(), strides[..3].as_ref()), (alike.0, alike.1[..3].as_ref()), "pieces are alike");
                assert!(pieces.len() == 1 || !piece.address().is_null(), "pieces have their memory");
                n += piece.shape()[1];
            }
            assert_eq!(n, rows, "as many values as keys");
        }
        if let Some(mask) = mask {
            assert_eq!(mask.shape(), [rows, n, 1, 1], "the mask");
            assert!(mask.ty() == Type::F16 || mask.ty() == Type::F32, "masks are f16 or f32");
            assert_eq!(mask.strides()[0], mask.ty().block_bytes(), "mask rows have no gaps");
        }
    }
    check_heads(params.of_heads, [key_size, value_size, kv_heads]);
    if let Some(sinks) = params.sinks {
        assert_eq!((sinks.ty(), sinks.shape()), (Type::F32, [heads, 1, 1, 1]), "sinks");
        assert!(sinks.is_allocated(), "sinks are a weight");
    }
}

fn check_heads(heads: &[HeadRows], [key_size, value_size, kv_heads]: [usize; 3]) {
    assert!(heads.is_empty() || heads.len() == kv_heads, "rows of each of {kv_heads} KV heads");
    for (pieces, size) in [
        (heads.iter().map(|head| &head.k).collect::<Vec<_>>(), key_size),
        (heads.iter().map(|head| &head.v).collect(), value_size),
    ] {
        let first = pieces.iter().find_map(|pieces| pieces.first());
        for (head, pieces) in heads.iter().zip(&pieces) {
            let mut n = 0;
            for piece in *pieces {
                assert!(n % BLOCK == 0, "pieces before the last are whole blocks");
                assert_eq!(piece.shape(), [size, piece.shape()[1], 1, 1], "keys or values of a head");
                assert!(Type::CACHE.contains(&piece.ty()) && !piece.address().is_null(), "stored rows of a cache type");
                let alike = first.map(|first| (first.ty(), first.strides()[..2].to_vec()));
                assert_eq!(Some((piece.ty(), piece.strides()[..2].to_vec())), alike, "heads' rows are alike");
                assert_eq!(piece.strides()[0], piece.ty().block_bytes(), "rows have no gaps");
                n += piece.shape()[1];
            }
            assert_eq!(n, head.n_rows(), "as many values as keys");
        }
    }
}

unsafe extern "C" fn callback(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, state: *mut c_void) {
    // SAFETY: ggml hands back the state that `Op::add` gave it, which lives as long as the graph.
    unsafe { (*state.cast::<Op>().cast_const()).run(node, thread as usize, n_threads as usize) }
}
