//! The block of memory that holds a layer's keys and values, and in which format.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Lease, Meter};
use crate::ggml::{BufferType, Context, Error, Graph, Tensor, Type};

/// How a store keeps its rows. Rows of equal formats can be copied as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub k: Type,
    pub v: Type,
    /// Whether keys (and queries with them) are rotated.
    pub rotate_k: bool,
    /// Whether values are rotated, and the attention output back.
    pub rotate_v: bool,
}

/// When keys and values are rotated by a Walsh-Hadamard matrix before they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvRotate {
    Never,
    /// Where the store's type is quantised: four bits then lose less.
    #[default]
    Quantized,
    /// In stores of any type; of use for tests only.
    Always,
}

impl Format {
    pub const F16: Format = Format { k: Type::F16, v: Type::F16, rotate_k: false, rotate_v: false };

    pub fn new(k: Type, v: Type, rotate: KvRotate) -> Format {
        let rotates = |ty: Type| match rotate {
            KvRotate::Never => false,
            KvRotate::Quantized => ty.is_quantized(),
            KvRotate::Always => true,
        };
        Format { k, v, rotate_k: rotates(k), rotate_v: rotates(v) }
    }

    /// Bytes of a token's key and value of `width` elements each.
    pub fn row_bytes(self, width: usize) -> usize {
        self.k.row_bytes(width) + self.v.row_bytes(width)
    }

    /// The same rows in f16, rotated alike: queries can then attend to both.
    pub fn exact(self) -> Format {
        Format { k: Type::F16, v: Type::F16, ..self }
    }
}

/// Key and value rows of one layer in memory of their own. Which position is in which row is the layer's span's to say.
#[derive(Debug)]
pub(crate) struct Store {
    /// `[head size × KV heads, rows]`.
    pub k: Tensor,
    pub v: Tensor,
    pub format: Format,
    n_rows: usize,
    id: u64,
    lease: Lease,
}

impl Store {
    /// A store of at least `n_rows` zeroed rows of `width` elements, in blocks of `block`. With `max_rows` it never gets
    /// more.
    pub fn new(
        width: usize,
        n_rows: usize,
        block: usize,
        max_rows: Option<usize>,
        format: Format,
        memory: BufferType,
        meter: &Meter,
    ) -> Result<Store, Error> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let n_rows = n_rows.max(1).next_multiple_of(block);
        let n_rows = max_rows.map_or(n_rows, |max| n_rows.min(max));
        let context = Context::new(2);
        let k = context.tensor(format.k, &[width, n_rows]).named("cache_k");
        let v = context.tensor(format.v, &[width, n_rows]).named("cache_v");
        let bytes = context.alloc(memory, "the KV cache")?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Store { k, v, format, n_rows, id, lease: meter.lease(bytes) })
    }

    /// Rows allocated.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Rows to allocate when `used` are needed: some room to grow, at most a sixteenth more than is used and one block.
    pub fn rows_with_room(used: usize) -> usize {
        used + used / 16
    }

    /// Bytes of the buffers.
    pub fn bytes(&self) -> usize {
        self.lease.bytes()
    }

    /// A number that no other store ever has: graphs that refer to a store's memory are told apart by it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Appends the bytes of rows: the keys of all ranges, then the values.
    pub fn read_rows(&self, ranges: &[Range<usize>], to: &mut Vec<u8>) {
        for rows in [&self.k, &self.v] {
            let row_bytes = rows.strides()[1];
            for range in ranges {
                let start = to.len();
                to.resize(start + range.len() * row_bytes, 0);
                rows.read(range.start * row_bytes, &mut to[start..]);
            }
        }
    }

    /// Writes what [`Store::read_rows`] read.
    pub fn write_rows(&self, ranges: &[Range<usize>], from: &[u8]) {
        let mut from = from;
        for rows in [&self.k, &self.v] {
            let row_bytes = rows.strides()[1];
            for range in ranges {
                let (bytes, rest) = from.split_at(range.len() * row_bytes);
                rows.write(range.start * row_bytes, bytes);
                from = rest;
            }
        }
    }

    /// Rows `0..n` of a tensor of this store as `[head size, n, KV heads]`, the form in which attention reads them.
    pub fn heads(graph: &Graph, rows: &Tensor, head_size: usize, n: usize) -> Tensor {
        let head_bytes = rows.ty().row_bytes(head_size);
        let [width, ..] = rows.shape();
        let [_, row_bytes, ..] = rows.strides();
        graph.view(rows, [head_size, n, width / head_size], [row_bytes, head_bytes], 0)
    }
}
