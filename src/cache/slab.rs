//! Stores of several sequences one after the other, so that one operation writes to all of them and one reads all: on devices, where
//! every operation is a kernel to launch.

use std::sync::Arc;

use super::Lease;
use crate::ggml::{BufferType, Context, Error, Graph, Tensor, Type};

/// A tensor of keys, and one of values where they have rows of their own.
type Rows = (Tensor, Option<Tensor>);

/// Memory for stores of one size and format. It is freed when the last of them is gone.
#[derive(Debug)]
pub(crate) struct Slab {
    /// `[key size × KV heads, rows of all stores]`.
    k: Tensor,
    /// `[value size × KV heads, rows of all stores]`; none where values are in the keys.
    v: Option<Tensor>,
    n_rows: usize,
    n_slots: usize,
    lease: Lease,
}

/// Slots of a slab that lie equally far apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slots {
    pub first: usize,
    pub step: usize,
    pub n: usize,
}

impl Slab {
    /// Zeroed memory for `n_slots` stores of `n_rows` rows, and the rows of each.
    pub(super) fn new(
        (k, key_width): (Type, usize),
        values: Option<(Type, usize)>,
        n_rows: usize,
        n_slots: usize,
        memory: BufferType,
        beside: &Lease,
    ) -> Result<(Slab, Vec<Rows>), Error> {
        let context = Context::new(2 * (n_slots + 1));
        let all = |ty, width| context.tensor(ty, &[width, n_slots * n_rows]).named("cache_slab");
        let (k, v) = (all(k, key_width), values.map(|(v, width)| all(v, width)));
        let of_slot = |rows: &Tensor, slot: usize, name| context.rows(rows, slot * n_rows, n_rows).named(name);
        let slots =
            (0..n_slots).map(|slot| (of_slot(&k, slot, "cache_k"), v.as_ref().map(|v| of_slot(v, slot, "cache_v"))));
        let slots: Vec<Rows> = slots.collect();
        let bytes = context.alloc(memory, "the KV caches of several sequences")?;
        Ok((Slab { k, v, n_rows, n_slots, lease: beside.another(bytes) }, slots))
    }

    pub(super) fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Whether stores that were in it are gone.
    pub(super) fn has_gaps(this: &Arc<Slab>) -> bool {
        Arc::strong_count(this) < this.n_slots
    }

    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Rows of each store.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The tensors of all stores' rows: keys, and values where they have some of their own.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.k).chain(&self.v)
    }

    /// The first `n` keys of some stores, `[size, n, heads, stores]`.
    pub(super) fn keys(&self, graph: &Graph, [size, n, heads]: [usize; 3], slots: Slots) -> Tensor {
        self.of_heads(graph, &self.k, [size, n, heads, slots.n], slots)
    }

    /// The first `n` values of some stores, `[size, n, heads, stores]`.
    pub(super) fn values(&self, graph: &Graph, [size, n, heads]: [usize; 3], slots: Slots) -> Tensor {
        self.of_heads(graph, self.v.as_ref().unwrap_or(&self.k), [size, n, heads, slots.n], slots)
    }

    fn of_heads(&self, graph: &Graph, rows: &Tensor, shape: [usize; 4], slots: Slots) -> Tensor {
        let ([width, ..], [_, row_bytes, ..]) = (rows.shape(), rows.strides());
        let head_bytes = rows.ty().row_bytes(width / shape[2]);
        let store_bytes = self.n_rows * row_bytes;
        graph.view_4d(rows, shape, [row_bytes, head_bytes, slots.step * store_bytes], slots.first * store_bytes)
    }
}

impl Slots {
    /// The number of one of them in the slab.
    pub fn at(self, index: usize) -> usize {
        self.first + index * self.step
    }
}
