//! Packing and unpacking as nodes of a graph, on the processor.

use std::{ffi::c_void, sync::Arc};

use ggml_sys as sys;

use super::{Layout, TILE, pack, unpack};
use crate::ggml::{
    Tensor, Type,
    attention::{blocks, f16_to_f32},
};

/// Where a row of a tile comes from, as a number of the work list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A row of those that are written.
    Own(usize),
    /// A row of the exact store.
    Exact(usize),
    /// It is in the tile already.
    Kept,
    /// There is none.
    Absent,
}

impl Source {
    fn number(self) -> i32 {
        match self {
            Source::Own(row) => row as i32,
            Source::Exact(row) => -1 - row as i32,
            Source::Kept => i32::MIN,
            Source::Absent => i32::MIN + 1,
        }
    }

    fn of(number: i32) -> Source {
        match number {
            i32::MIN => Source::Kept,
            number if number == i32::MIN + 1 => Source::Absent,
            0.. => Source::Own(number as usize),
            _ => Source::Exact((-1 - number) as usize),
        }
    }
}

/// A tile that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Due {
    /// Its place among the store's tiles.
    pub tile: usize,
    /// The first row that has a say in the channels' scales.
    pub counted: usize,
    pub rows: [Source; TILE],
}

impl Due {
    /// Numbers of one in a work list.
    pub const LEN: usize = 2 + TILE;

    /// A work list of `n` tiles at most.
    pub fn list(due: &[Due], n: usize) -> Vec<i32> {
        assert!(due.len() <= n, "the list has room for all tiles");
        let mut list = vec![-1; n * Due::LEN];
        for (due, to) in due.iter().zip(list.chunks_exact_mut(Due::LEN)) {
            (to[0], to[1]) = (due.tile as i32, due.counted as i32);
            for (to, row) in to[2..].iter_mut().zip(due.rows) {
                *to = row.number();
            }
        }
        list
    }
}

/// What tiles are made of, and where they go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packing<'a> {
    /// f32 `[size × KV heads, n]`: the rows that are written.
    pub own: &'a Tensor,
    /// f16 `[size × KV heads, rows]` in pieces, which have their memory already; none where no row comes from there.
    pub exact: &'a [Tensor],
    /// Rows of tiles in pieces, likewise.
    pub tiles: &'a [Tensor],
    /// i32 `[Due::LEN, n]`: see [`Due::list`].
    pub due: &'a Tensor,
    pub heads: usize,
}

/// State of the node that makes tiles.
pub(in crate::ggml) struct PackOp {
    layout: Layout,
    heads: usize,
    /// Where each tile of the store begins.
    tiles: Vec<*mut u8>,
    /// Where each block of [`TILE`] exact rows begins.
    exact: Vec<*const u8>,
    exact_row_bytes: usize,
}

// SAFETY: the pointers are to memory of stores that the graph keeps.
unsafe impl Send for PackOp {}
// SAFETY: as above; threads write tiles of different heads.
unsafe impl Sync for PackOp {}

impl PackOp {
    /// Adds the node to the context `raw`. Returns it with its state, which must live as long.
    ///
    /// # Safety
    /// The context is alive, and the tensors live as long as it.
    pub unsafe fn add(raw: *mut sys::ggml_context, packing: &Packing<'_>) -> (*mut sys::ggml_tensor, Arc<PackOp>) {
        let Packing { own, exact, tiles, due, heads } = *packing;
        let layout = tiles[0].layout(heads).expect("the store has tiles");
        assert!(own.ty() == Type::F32 && own.shape()[0] == layout.size * heads && own.strides()[0] == 4, "rows");
        assert!(exact.iter().all(|piece| piece.ty() == Type::F16 && piece.shape()[0] == own.shape()[0]), "exact rows");
        assert!(due.ty() == Type::I32 && due.shape()[0] == Due::LEN, "a list of tiles");
        assert!(exact.iter().chain(tiles).all(|piece| !piece.address().is_null()), "stores have their memory");
        let places = |pieces: &[Tensor]| blocks(pieces, 1);
        let op = Arc::new(PackOp {
            layout,
            heads,
            tiles: places(tiles).into_iter().map(<*const u8>::cast_mut).collect(),
            exact: places(exact),
            exact_row_bytes: exact.first().map_or(0, |piece| piece.strides()[1]),
        });
        // SAFETY: the caller's; a node has ten sources.
        let node = unsafe {
            let state = Arc::as_ptr(&op).cast_mut().cast::<c_void>();
            let node = custom(raw, [1, 1], Some(run_pack), state);
            (*node).src[0] = own.raw();
            (*node).src[1] = due.raw();
            (*node).src[2] = tiles[0].raw();
            node
        };
        (node, op)
    }

    /// # Safety
    /// The node's sources and the stores are alive and have memory.
    unsafe fn run(&self, node: *const sys::ggml_tensor, thread: usize, n_threads: usize) {
        let Layout { size, .. } = self.layout;
        // SAFETY: as the caller says; the shapes were checked when the node was made, and a list names rows that exist.
        unsafe {
            let (own, due) = ((*node).src[0], (*node).src[1]);
            let n = (*due).ne[1] as usize;
            for (i, item) in (0..n).flat_map(|i| (0..self.heads).map(move |head| (i, head))).enumerate() {
                let due = std::slice::from_raw_parts((*due).data.cast::<i32>().add(item.0 * Due::LEN), Due::LEN);
                let (Ok(place), true) = (usize::try_from(due[0]), i % n_threads == thread) else { continue };
                let head = item.1;
                let at = *self.tiles.get(place).expect("a tile of the store");
                let tile = std::slice::from_raw_parts_mut(at.add(head * self.layout.bytes()), self.layout.bytes());
                let mut rows = vec![0.0_f32; TILE * size];
                for (r, (to, &number)) in rows.chunks_exact_mut(size).zip(&due[2..]).enumerate() {
                    match Source::of(number) {
                        Source::Own(row) => {
                            assert!(row < (*own).ne[1] as usize, "a row that is written");
                            let from = (*own).data.cast::<u8>().add(row * (*own).nb[1]).cast::<f32>();
                            to.copy_from_slice(std::slice::from_raw_parts(from.add(head * size), size));
                        }
                        Source::Exact(row) => {
                            let block = *self.exact.get(row / TILE).expect("a row of the exact store");
                            let from = block.add(row % TILE * self.exact_row_bytes).cast::<u16>().add(head * size);
                            for (to, half) in to.iter_mut().zip(std::slice::from_raw_parts(from, size)) {
                                *to = f16_to_f32(*half);
                            }
                        }
                        Source::Kept => unpack(self.layout, tile, r..r + 1, to, size),
                        Source::Absent => {}
                    }
                }
                pack(&mut rows, self.layout, due[1].max(0) as usize, tile);
            }
        }
    }
}

/// State of the node that reads tiles.
pub(in crate::ggml) struct UnpackOp {
    layout: Layout,
    heads: usize,
    first: usize,
}

impl UnpackOp {
    /// Adds the node to the context `raw`: rows `first..first + n` of a store of tiles as f32. Returns it with its state, which
    /// must live as long.
    ///
    /// # Safety
    /// The context is alive, and the tensor lives as long as it.
    pub unsafe fn add(
        raw: *mut sys::ggml_context,
        tiles: &Tensor,
        heads: usize,
        first: usize,
        n: usize,
    ) -> (*mut sys::ggml_tensor, Arc<UnpackOp>) {
        let layout = tiles.layout(heads).expect("the store has tiles");
        assert!(first + n <= tiles.shape()[1] && tiles.shape()[1].is_multiple_of(TILE), "rows of the store");
        let op = Arc::new(UnpackOp { layout, heads, first });
        // SAFETY: the caller's.
        let node = unsafe {
            let state = Arc::as_ptr(&op).cast_mut().cast::<c_void>();
            let node = custom(raw, [layout.size * heads, n], Some(run_unpack), state);
            (*node).src[0] = tiles.raw();
            node
        };
        (node, op)
    }

    /// # Safety
    /// The node and the store are alive and have memory.
    unsafe fn run(&self, node: *const sys::ggml_tensor, thread: usize, n_threads: usize) {
        let Layout { size, .. } = self.layout;
        // SAFETY: as the caller says; the shapes were checked when the node was made.
        unsafe {
            let (n, width) = ((*node).ne[1] as usize, size * self.heads);
            let (first, end) = (self.first, self.first + n);
            let store = (*(*node).src[0]).data.cast::<u8>().cast_const();
            let out = (*node).data.cast::<f32>();
            for tile in (first / TILE..end.div_ceil(TILE)).filter(|tile| tile % n_threads == thread) {
                let start = tile * TILE;
                let rows = first.max(start) - start..end.min(start + TILE) - start;
                for head in 0..self.heads {
                    let bytes = self.layout.bytes();
                    let at = store.add((tile * self.heads + head) * bytes);
                    let to = out.add((start + rows.start - first) * width + head * size);
                    let len = (rows.len() - 1) * width + size;
                    let to = std::slice::from_raw_parts_mut(to, len);
                    unpack(self.layout, std::slice::from_raw_parts(at, bytes), rows.clone(), to, width);
                }
            }
        }
    }
}

/// A node of f32 that a function of ours computes.
///
/// # Safety
/// The context is alive; the state is what the function wants, and lives as long as the context.
unsafe fn custom(
    raw: *mut sys::ggml_context,
    [width, n]: [usize; 2],
    function: sys::ggml_custom_op_t,
    state: *mut c_void,
) -> *mut sys::ggml_tensor {
    let (width, n, nobody) = (width as i64, n as i64, std::ptr::null_mut());
    let tasks = sys::GGML_N_TASKS_MAX;
    // SAFETY: the caller's; no sources are given yet.
    unsafe { sys::ggml_custom_4d(raw, sys::GGML_TYPE_F32, width, n, 1, 1, nobody, 0, function, tasks, state) }
}

unsafe extern "C" fn run_pack(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, state: *mut c_void) {
    // SAFETY: ggml hands back the state that `PackOp::add` gave it, which lives as long as the graph.
    unsafe { (*state.cast::<PackOp>().cast_const()).run(node, thread as usize, n_threads as usize) }
}

unsafe extern "C" fn run_unpack(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, state: *mut c_void) {
    // SAFETY: as above, of `UnpackOp::add`.
    unsafe { (*state.cast::<UnpackOp>().cast_const()).run(node, thread as usize, n_threads as usize) }
}
