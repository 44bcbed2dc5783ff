//! Keys, values and masks as the kernels see them: pointers into tensors' memory, and what is seen of it.

use std::ffi::c_void;

use ggml_sys as sys;

use super::{
    block::{BLOCK, Prefetch, RowPtr},
    kernels::Isa,
    products::{Bf16, F16, F32, Q4, Q8},
    simd::f16_to_f32,
    tiled::{Codes2, Codes3, Codes4, TilePtr},
};
use crate::ggml::tiles::Layout;

/// Segments of tensors that one operation can attend to: ggml gives a node ten sources.
pub(super) const MAX_SOURCES: usize = 3;

/// Segments with the one whose rows each KV head has for itself.
pub(super) const MAX_SEGMENTS: usize = MAX_SOURCES + 1;

/// How a row's elements are stored.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Q8,
    Q4,
    Tiles(Layout),
    /// ggml converts a row.
    Other(unsafe extern "C" fn(*const c_void, *mut f32, i64)),
}

impl Kind {
    fn of(ty: sys::ggml_type) -> Kind {
        match ty {
            sys::GGML_TYPE_F32 => Kind::F32,
            sys::GGML_TYPE_F16 => Kind::F16,
            sys::GGML_TYPE_BF16 => Kind::Bf16,
            sys::GGML_TYPE_Q8_0 => Kind::Q8,
            sys::GGML_TYPE_Q4_0 => Kind::Q4,
            ty => {
                // SAFETY: the traits' table lives as long as the process, and has all types of tensors.
                let traits = unsafe { &*sys::ggml_get_type_traits(ty) };
                Kind::Other(traits.to_float.expect("cache types can be converted"))
            }
        }
    }
}

/// The rows of all heads of a segment's keys or values.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub kind: Kind,
    data: *const u8,
    /// Where each block of rows begins, where they lie in several pieces; else null.
    blocks: *const *const u8,
    /// Entries of `blocks` for each KV head, where heads have rows of their own; else 0, and all heads' rows lie together.
    per_head: usize,
    row_bytes: usize,
    head_bytes: usize,
}

#[derive(Clone, Copy)]
pub(super) struct Segment {
    pub k: Rows,
    pub v: Rows,
    pub mask: Option<Mask>,
    /// Rows; where heads have rows of their own, the most that one has.
    pub n: usize,
    /// How many rows each KV head has, where they have rows of their own: all of them are seen. Else null.
    pub n_of_heads: *const usize,
}

impl Segment {
    /// Rows of a KV head.
    ///
    /// # Safety
    /// The head exists.
    #[inline]
    pub(super) unsafe fn n_of(&self, kv_head: usize) -> usize {
        // SAFETY: as the caller says.
        if self.n_of_heads.is_null() { self.n } else { unsafe { *self.n_of_heads.add(kv_head) } }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Mask {
    pub data: *const u8,
    pub row_bytes: usize,
    pub is_f16: bool,
}

/// What queries see of some rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sight {
    Nothing,
    Everything,
    Some,
}

impl Sight {
    #[inline]
    pub(super) fn and(self, other: Sight) -> Sight {
        if self == other { self } else { Sight::Some }
    }
}

impl Rows {
    /// # Safety
    /// `tensor` is alive and has memory that the processor can read. `blocks` are those of pieces of which it is the first, or
    /// null where there are no others. `tiles`: how rows lie in tiles, where they do.
    pub(super) unsafe fn new(tensor: *const sys::ggml_tensor, blocks: *const *const u8, tiles: Option<Layout>) -> Rows {
        // SAFETY: as the caller says.
        unsafe {
            let [_, row_bytes, head_bytes, _] = (*tensor).nb;
            // A single head serves all.
            let head_bytes = if (*tensor).ne[2] == 1 { 0 } else { head_bytes };
            let kind = tiles.map_or_else(|| Kind::of((*tensor).type_), Kind::Tiles);
            Rows { kind, data: (*tensor).data.cast(), blocks, per_head: 0, row_bytes, head_bytes }
        }
    }

    /// Rows `row_bytes` apart that each KV head has for itself, of ggml's type `ty`. `blocks` has `per_head` entries for each head.
    pub(super) fn of_heads(ty: sys::ggml_type, row_bytes: usize, blocks: *const *const u8, per_head: usize) -> Rows {
        Rows { kind: Kind::of(ty), data: std::ptr::null(), blocks, per_head, row_bytes, head_bytes: 0 }
    }

    /// Where the rows of a block begin, or where those before it end.
    ///
    /// # Safety
    /// The head exists; `first` is a multiple of [`BLOCK`], and a row, or the first such number after all rows.
    #[inline]
    unsafe fn block(&self, head: usize, first: usize) -> *const u8 {
        if self.blocks.is_null() {
            return self.data.wrapping_add(first * self.row_bytes);
        }
        // SAFETY: there is an entry for each block, and one after them.
        unsafe { *self.blocks.add(head * self.per_head + first / BLOCK) }
    }

    /// # Safety
    /// The rows and the head exist, and the rows are within one block.
    #[inline]
    pub(super) unsafe fn at(&self, head: usize, first: usize, n: usize) -> RowPtr {
        // SAFETY: as the caller says.
        let block = unsafe { self.block(head, first) };
        let prefetch = Prefetch::NOTHING;
        match self.kind {
            // A head's rows are together in its tile.
            Kind::Tiles(layout) => {
                let data = block.wrapping_add(head * self.head_bytes * BLOCK);
                RowPtr { data, bytes: layout.code_bytes(), n, prefetch }
            }
            _ => RowPtr { data: block.wrapping_add(head * self.head_bytes), bytes: self.row_bytes, n, prefetch },
        }
    }

    /// What to prefetch while `head`, one of `heads` that are read one after the other, is read, so that the block of rows from
    /// `first` on is there when it is read.
    ///
    /// # Safety
    /// As [`Rows::block`].
    pub(super) unsafe fn prefetch(
        &self,
        head: usize,
        heads: &std::ops::Range<usize>,
        n_heads: usize,
        first: usize,
    ) -> Prefetch {
        const LINE: usize = 64;
        // SAFETY: as the caller says.
        let rows = unsafe { self.block(head, first) };
        if self.per_head > 0 {
            return Prefetch { data: rows, stride: self.row_bytes, bytes: self.row_bytes };
        }
        let is_packed = self.head_bytes * n_heads == self.row_bytes;
        if is_packed && (heads.len() == n_heads || self.head_bytes < LINE) {
            // Whole rows without gaps, of which each head prefetches a share: all at once they would have to wait for each
            // other. Where heads share lines, those that are read first prefetch all.
            if heads.start > 0 {
                return Prefetch::NOTHING;
            }
            let bytes = self.row_bytes.div_ceil(heads.len());
            return Prefetch { data: rows.wrapping_add((head - heads.start) * BLOCK * bytes), stride: bytes, bytes };
        }
        if matches!(self.kind, Kind::Tiles(_)) {
            let bytes = self.head_bytes;
            return Prefetch { data: rows.wrapping_add(head * bytes * BLOCK), stride: bytes, bytes };
        }
        match self.head_bytes {
            // One head that all share.
            0 if head > heads.start => Prefetch::NOTHING,
            0 => Prefetch { data: rows, stride: self.row_bytes, bytes: self.row_bytes },
            bytes => Prefetch {
                data: rows.wrapping_add(head * bytes),
                stride: self.row_bytes,
                bytes: bytes.min(self.row_bytes),
            },
        }
    }

    /// Whether kernels read the rows as they are stored. Others are converted to padded rows of f32 first.
    pub(super) fn is_direct<I: Isa>(&self, size: usize) -> bool {
        match self.kind {
            Kind::F32 | Kind::F16 | Kind::Bf16 => size.is_multiple_of(I::LANES),
            Kind::Q8 | Kind::Q4 | Kind::Tiles(_) => true,
            Kind::Other(_) => false,
        }
    }

    /// Rows as f32, `stride` apart.
    ///
    /// # Safety
    /// The rows have `size` elements, `to` has room for `rows.n` strides, `room` for [`TilePtr::room`] without queries, and the
    /// features are there.
    pub(super) unsafe fn convert<I: Isa>(
        &self,
        rows: RowPtr,
        size: usize,
        (to, stride): (*mut f32, usize),
        room: *mut f32,
    ) {
        // SAFETY: as the caller says.
        unsafe {
            match self.kind {
                Kind::F32 => I::convert::<F32>(rows, size, to, stride),
                Kind::F16 => I::convert::<F16>(rows, size, to, stride),
                Kind::Bf16 => I::convert::<Bf16>(rows, size, to, stride),
                Kind::Q8 => I::convert::<Q8>(rows, size, to, stride),
                Kind::Q4 => I::convert::<Q4>(rows, size, to, stride),
                Kind::Tiles(layout) => {
                    let tile = TilePtr { codes: rows, layout, room };
                    match layout.bits {
                        4 => I::convert_tile::<Codes4>(tile, to, stride),
                        3 => I::convert_tile::<Codes3>(tile, to, stride),
                        _ => I::convert_tile::<Codes2>(tile, to, stride),
                    }
                }
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
    pub(super) unsafe fn sight(&self, queries: std::ops::Range<usize>, first: usize, n: usize) -> Sight {
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
    pub(super) unsafe fn convert<I: Isa>(&self, query: usize, first: usize, n: usize, to: *mut f32) {
        // SAFETY: as the caller says.
        unsafe {
            let cells = self.data.add(query * self.row_bytes);
            let row = |data| RowPtr { data, bytes: 0, n: 1, prefetch: Prefetch::NOTHING };
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
    #[inline]
    pub(super) unsafe fn get(&self, query: usize, row: usize) -> f32 {
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
