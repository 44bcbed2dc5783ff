//! The block of memory that holds a layer's keys and values, and in which format.

use std::{ops::Range, sync::Arc};

use super::{
    Lease, Meter,
    slab::{Slab, Slots},
};
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
    /// Where llama.cpp does: keys, and values, of a quantised type and of heads whose size is a multiple of 64, but none where
    /// values are in the keys.
    LlamaCpp,
}

impl Format {
    pub const F16: Format = Format { k: Type::F16, v: Type::F16, rotate_k: false, rotate_v: false };

    /// Whether keys or values are in tiles: rows come and go in whole ones then.
    pub fn has_tiles(self) -> bool {
        self.k.is_tiles() || self.v.is_tiles()
    }

    /// The same rows in f16, rotated alike: queries can then attend to both.
    pub fn exact(self) -> Format {
        Format { k: Type::F16, v: Type::F16, ..self }
    }
}

/// What a token's row of keys and its row of values are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowShape {
    /// KV heads.
    pub heads: usize,
    /// Elements of a head's key.
    pub key_size: usize,
    /// Elements of a head's value.
    pub value_size: usize,
    /// Whether a value is the beginning of its key: it then has no row of its own, and the keys' type and rotation.
    pub values_in_keys: bool,
}

impl RowShape {
    /// Elements of a row of keys.
    pub fn key_width(self) -> usize {
        self.heads * self.key_size
    }

    /// Elements of a row of values; 0 where they have none.
    pub fn value_width(self) -> usize {
        if self.values_in_keys { 0 } else { self.heads * self.value_size }
    }

    /// The format of rows with keys and values of these types.
    pub fn format(self, k: Type, v: Type, rotate: KvRotate) -> Format {
        let v = if self.values_in_keys { k } else { v };
        let rotates = |ty: Type, size: usize| match rotate {
            KvRotate::Never => false,
            KvRotate::Quantized => ty.is_quantized(),
            KvRotate::Always => true,
            KvRotate::LlamaCpp => ty.is_quantized() && size.is_multiple_of(64) && !self.values_in_keys,
        };
        Format { k, v, rotate_k: rotates(k, self.key_size), rotate_v: rotates(v, self.value_size) }
    }

    /// Whether each head's key is a whole number of a type's blocks, and its value.
    pub fn fits(self, k: Type, v: Type) -> bool {
        let v = if self.values_in_keys { k } else { v };
        self.key_size.is_multiple_of(k.block_size()) && self.value_size.is_multiple_of(v.block_size())
    }

    /// Bytes of a token's key and value.
    pub fn row_bytes(self, format: Format) -> usize {
        let values = if self.values_in_keys { 0 } else { format.v.row_bytes(self.value_size) };
        self.heads * (format.k.row_bytes(self.key_size) + values)
    }

    /// The first dimension of a tensor of rows whose heads have `size` elements.
    fn width(self, ty: Type, size: usize) -> usize {
        self.heads * if ty.is_tiles() { ty.row_bytes(size) } else { size }
    }

    /// Some of the rows of keys as `[key size, rows, KV heads]`, the form in which attention reads them.
    pub fn keys(self, graph: &Graph, rows: &Tensor, some: Range<usize>) -> Tensor {
        self.of_heads(graph, rows, self.key_size, some)
    }

    /// Some of the rows that values are in, which are the keys' where they have none, as `[value size, rows, KV heads]`.
    pub fn values(self, graph: &Graph, rows: &Tensor, some: Range<usize>) -> Tensor {
        self.of_heads(graph, rows, self.value_size, some)
    }

    /// The first `n` keys of each of some stores in a slab, `[key size, n, KV heads, stores]`.
    pub fn keys_together(self, graph: &Graph, slab: &Slab, slots: Slots, n: usize) -> Tensor {
        slab.keys(graph, [self.key_size, n, self.heads], slots)
    }

    /// The first `n` values of each, likewise.
    pub fn values_together(self, graph: &Graph, slab: &Slab, slots: Slots, n: usize) -> Tensor {
        slab.values(graph, [self.value_size, n, self.heads], slots)
    }

    /// The first `size` elements of each head.
    fn of_heads(self, graph: &Graph, rows: &Tensor, size: usize, some: Range<usize>) -> Tensor {
        let ([width, ..], [_, row_bytes, ..]) = (rows.shape(), rows.strides());
        let of_head = width / self.heads;
        let (size, head_bytes) = match rows.ty() {
            ty if ty.is_tiles() => (of_head, of_head),
            ty => (size, ty.row_bytes(of_head)),
        };
        graph.view(rows, [size, some.len(), self.heads], [row_bytes, head_bytes], some.start * row_bytes)
    }
}

/// Key and value rows of one layer, in memory of their own or in a [`Slab`]. Which position is in which row is the layer's span's
/// to say.
#[derive(Debug)]
pub(crate) struct Store {
    /// `[key size × KV heads, rows]`; of tiles, `[bytes of a row, rows]`.
    pub k: Tensor,
    /// `[value size × KV heads, rows]`, likewise; none where values are in the keys.
    v: Option<Tensor>,
    pub format: Format,
    n_rows: usize,
    memory: BufferType,
    place: Place,
}

/// Whose the memory of a store is.
#[derive(Debug)]
enum Place {
    Own(Lease),
    Slot { slab: Arc<Slab>, index: usize },
}

impl Store {
    /// A store of at least `n_rows` zeroed rows, in blocks of `block`. With `max_rows` it never gets more.
    pub fn new(
        shape: RowShape,
        n_rows: usize,
        block: usize,
        max_rows: Option<usize>,
        format: Format,
        memory: BufferType,
        meter: &Meter,
    ) -> Result<Store, Error> {
        let n_rows = n_rows.max(1).next_multiple_of(block);
        let n_rows = max_rows.map_or(n_rows, |max| n_rows.min(max));
        let value_width = (!shape.values_in_keys).then(|| shape.width(format.v, shape.value_size));
        Store::of_widths((shape.width(format.k, shape.key_size), value_width), n_rows, format, memory, |bytes| {
            meter.lease(bytes)
        })
    }

    fn of_widths(
        (key_width, value_width): (usize, Option<usize>),
        n_rows: usize,
        format: Format,
        memory: BufferType,
        lease: impl FnOnce(usize) -> Lease,
    ) -> Result<Store, Error> {
        let context = Context::new(2);
        let k = context.tensor(format.k, &[key_width, n_rows]).named("cache_k");
        let v = value_width.map(|width| context.tensor(format.v, &[width, n_rows]).named("cache_v"));
        let bytes = context.alloc(memory, "the KV cache")?;
        Ok(Store { k, v, format, n_rows, memory, place: Place::Own(lease(bytes)) })
    }

    /// A store that differs from this one by its number of rows.
    pub fn like(&self, n_rows: usize) -> Result<Store, Error> {
        Store::of_widths(self.widths(), n_rows, self.format, self.memory, |bytes| self.lease().another(bytes))
    }

    /// As many stores as that, which are like this one but for their number of rows, in a slab.
    pub fn slots(&self, n_rows: usize, n: usize) -> Result<Vec<Store>, Error> {
        let (key_width, value_width) = self.widths();
        let (keys, values) = ((self.format.k, key_width), value_width.map(|width| (self.format.v, width)));
        let (slab, rows) = Slab::new(keys, values, n_rows, n, self.memory, self.lease())?;
        let slab = Arc::new(slab);
        let stores = rows.into_iter().enumerate().map(|(index, (k, v))| {
            let place = Place::Slot { slab: Arc::clone(&slab), index };
            Store { k, v, format: self.format, n_rows, memory: self.memory, place }
        });
        Ok(stores.collect())
    }

    /// The slab that it is in, and its place among the stores there.
    pub fn slot(&self) -> Option<(&Arc<Slab>, usize)> {
        match &self.place {
            Place::Own(_) => None,
            Place::Slot { slab, index } => Some((slab, *index)),
        }
    }

    /// Copies the rows of another one of the same format, as many as both have, as nodes of a graph.
    pub fn copy(&self, graph: &Graph, from: &Store) {
        let n = self.n_rows.min(from.n_rows);
        for tensor in 0..self.n_tensors() {
            let [from, to] = [from, self].map(|store| graph.rows(store.tensor(tensor), 0, n));
            graph.expand(&graph.copy(&from, &to));
        }
    }

    fn widths(&self) -> (usize, Option<usize>) {
        (self.k.shape()[0], self.v.as_ref().map(|v| v.shape()[0]))
    }

    fn lease(&self) -> &Lease {
        match &self.place {
            Place::Own(lease) => lease,
            Place::Slot { slab, .. } => slab.lease(),
        }
    }

    /// The rows that values are in: see [`RowShape::values`].
    pub fn value_rows(&self) -> &Tensor {
        self.v.as_ref().unwrap_or(&self.k)
    }

    /// Values' own rows, where they have some.
    pub fn own_value_rows(&self) -> Option<&Tensor> {
        self.v.as_ref()
    }

    /// Rows allocated.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Rows to allocate when `used` are needed: some room to grow, at most a sixteenth more than is used and one block.
    pub fn rows_with_room(used: usize) -> usize {
        used + used / 16
    }

    /// Bytes of the buffers, or of its share of a slab's.
    pub fn bytes(&self) -> usize {
        let n_stores = self.slot().map_or(1, |(slab, _)| slab.n_slots());
        self.lease().bytes() / n_stores
    }

    /// Tensors of rows: keys, and values where they have some of their own.
    pub fn n_tensors(&self) -> usize {
        1 + self.v.iter().len()
    }

    fn tensor(&self, index: usize) -> &Tensor {
        if index == 0 { &self.k } else { self.value_rows() }
    }

    /// Appends the bytes of rows of one of the tensors.
    pub fn read(&self, tensor: usize, rows: Range<usize>, to: &mut Vec<u8>) {
        let tensor = self.tensor(tensor);
        let (start, row_bytes) = (to.len(), tensor.strides()[1]);
        to.resize(start + rows.len() * row_bytes, 0);
        tensor.read(rows.start * row_bytes, &mut to[start..]);
    }

    /// Writes what [`Store::read`] read; the rest of `from`.
    pub fn write<'a>(&self, tensor: usize, rows: Range<usize>, from: &'a [u8]) -> &'a [u8] {
        let tensor = self.tensor(tensor);
        let row_bytes = tensor.strides()[1];
        let (bytes, rest) = from.split_at(rows.len() * row_bytes);
        tensor.write(rows.start * row_bytes, bytes);
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_different_sizes() {
        let shape = RowShape { heads: 2, key_size: 192, value_size: 128, values_in_keys: false };
        assert_eq!((shape.key_width(), shape.value_width()), (384, 256));
        let format = shape.format(Type::Q8_0, Type::F16, KvRotate::Quantized);
        assert_eq!((format.k, format.v, format.rotate_k, format.rotate_v), (Type::Q8_0, Type::F16, true, false));
        assert_eq!(shape.row_bytes(format), 384 / 32 * 34 + 512);
        let odd = RowShape { value_size: 24, ..shape };
        assert!(odd.fits(Type::Q4_0, Type::F16) && !odd.fits(Type::F16, Type::Q4_0));
    }

    #[test]
    fn values_in_keys_take_nothing_and_are_as_the_keys() {
        let shape = RowShape { heads: 1, key_size: 576, value_size: 512, values_in_keys: true };
        let format = shape.format(Type::Q4_0, Type::F32, KvRotate::Quantized);
        assert_eq!((format.v, format.rotate_v, shape.row_bytes(format)), (Type::Q4_0, true, 576 / 32 * 18));
        // The view of the values must be whole blocks as well.
        assert!(!RowShape { key_size: 64, value_size: 48, ..shape }.fits(Type::Q8_0, Type::F16));
    }
}
