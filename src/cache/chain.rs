//! A layer's rows in one sequence, of which other sequences may read some as well: a copy of a sequence takes no memory until one
//! of the two writes, and then only the blocks of rows that are written.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Format, RowShape, Store, slab::Slab};
use crate::ggml::{Error, Graph, Tensor};

/// Pieces that a chain has at most: each takes a few nodes of a graph.
const MAX_PIECES: usize = 8;

/// Rows of a store that are neighbours, for one or more sequences.
#[derive(Debug, Clone)]
struct Piece {
    store: Arc<Store>,
    /// The first of them in the store.
    first: usize,
    n: usize,
}

impl Piece {
    /// Whether nobody else reads the store.
    fn is_own(&self) -> bool {
        Arc::strong_count(&self.store) == 1
    }
}

/// Neighbouring rows within one piece.
#[derive(Debug, Clone)]
pub(crate) struct Run<'a> {
    pub store: &'a Store,
    /// The rows' numbers in the chain.
    pub rows: Range<usize>,
    /// The first of them in the store.
    pub first: usize,
    /// The numbers of all rows of the piece, and the first of those in the store.
    pub piece: Range<usize>,
    pub piece_first: usize,
}

impl Run<'_> {
    /// The rows' numbers in the store.
    pub fn in_store(&self) -> Range<usize> {
        self.first..self.first + self.rows.len()
    }
}

/// Rows of one layer in pieces one after the other. Rows are numbered as if they were in one store.
#[derive(Debug)]
pub(crate) struct Chain {
    /// One at least. All but the last have a multiple of `grain` rows.
    pieces: Vec<Piece>,
    /// Rows that are shared or not together; `None` where all rows must be in one store.
    grain: Option<usize>,
    id: u64,
}

impl Chain {
    pub fn new(store: Store, grain: Option<usize>) -> Chain {
        let n = store.n_rows();
        Chain::of(vec![Piece { store: Arc::new(store), first: 0, n }], grain)
    }

    fn of(pieces: Vec<Piece>, grain: Option<usize>) -> Chain {
        Chain { pieces, grain, id: new_id() }
    }

    /// The same rows for another sequence.
    pub fn share(&self) -> Chain {
        Chain::of(self.pieces.clone(), self.grain)
    }

    /// A number that no other chain ever has, nor this one with other pieces: graphs that refer to its memory are told apart by
    /// it.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn format(&self) -> Format {
        self.pieces[0].store.format
    }

    /// Rows that there is memory for.
    pub fn n_rows(&self) -> usize {
        self.pieces.iter().map(|piece| piece.n).sum()
    }

    /// Bytes of the buffers, of each as much as is these rows', whoever else reads them.
    pub fn bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.store.bytes() * piece.n / piece.store.n_rows()).sum()
    }

    /// The one store of rows that must be in one.
    pub fn single(&self) -> &Store {
        assert!(self.pieces.len() == 1 && self.pieces[0].first == 0, "rows are in one store");
        &self.pieces[0].store
    }

    /// Whether no other sequence reads any of the rows.
    pub fn is_unshared(&self) -> bool {
        self.pieces.iter().all(Piece::is_own)
    }

    /// The slab that the rows are in, with those of other sequences, and their place there.
    pub fn slot(&self) -> Option<(&Arc<Slab>, usize)> {
        match &self.pieces[..] {
            [piece] if piece.first == 0 => piece.store.slot(),
            _ => None,
        }
    }

    /// Whether it is in a slab that others have gone from.
    pub fn is_left(&self) -> bool {
        self.slot().is_some_and(|(slab, _)| Slab::has_gaps(slab))
    }

    /// The pieces of these rows, as far as they exist.
    pub fn runs(&self, rows: Range<usize>) -> impl Iterator<Item = Run<'_>> {
        self.placed().filter_map(move |(start, piece)| {
            let within = rows.start.max(start)..rows.end.min(start + piece.n);
            let first = piece.first + within.start.saturating_sub(start);
            (!within.is_empty()).then_some(Run {
                store: &piece.store,
                rows: within,
                first,
                piece: start..start + piece.n,
                piece_first: piece.first,
            })
        })
    }

    /// Which piece a row is in.
    pub fn piece_of(&self, row: usize) -> usize {
        self.placed().take_while(|(start, _)| *start <= row).count().saturating_sub(1)
    }

    /// The pieces, with the number of their first rows.
    fn placed(&self) -> impl Iterator<Item = (usize, &Piece)> {
        self.pieces.iter().scan(0, |start, piece| {
            let at = *start;
            *start += piece.n;
            Some((at, piece))
        })
    }

    /// Keys `0..n` in pieces, as [`RowShape::keys`].
    pub fn keys(&self, shape: RowShape, graph: &Graph, n: usize) -> Vec<Tensor> {
        self.runs(0..n).map(|run| shape.keys(graph, &run.store.k, run.in_store())).collect()
    }

    /// Values `0..n` in pieces, as [`RowShape::values`].
    pub fn values(&self, shape: RowShape, graph: &Graph, n: usize) -> Vec<Tensor> {
        self.runs(0..n).map(|run| shape.values(graph, run.store.value_rows(), run.in_store())).collect()
    }

    /// From where on rows must be replaced so that those from `row` on are nobody else's, and `n_rows` there are: `None` where all
    /// is well.
    pub fn replaced_from(&self, row: usize, n_rows: usize) -> Option<usize> {
        let is_shared = self.placed().any(|(start, piece)| start + piece.n > row && !piece.is_own());
        if !is_shared && self.n_rows() >= n_rows {
            return None;
        }
        let first = match self.placed().last() {
            Some((start, last)) if !is_shared && last.is_own() => start,
            _ => self.grain.map_or(0, |grain| row.min(self.n_rows()) / grain * grain),
        };
        // Where there would be too many pieces some are copied, too.
        let half = self.placed().nth(MAX_PIECES / 2).filter(|_| self.piece_of(first) + 1 >= MAX_PIECES);
        Some(half.map_or(first, |(start, _)| start.min(first)))
    }

    /// Puts a store in place of the rows from `row` on, which is one of [`Chain::replaced_from`].
    pub fn replace_from(&mut self, row: usize, store: Store) {
        let mut start = 0;
        self.pieces.retain_mut(|piece| {
            let at = start;
            start += piece.n;
            piece.n = piece.n.min(row.saturating_sub(at));
            piece.n > 0
        });
        let n = store.n_rows();
        self.pieces.push(Piece { store: Arc::new(store), first: 0, n });
        self.id = new_id();
    }

    /// Makes these rows nobody else's, with what is in them.
    pub fn own(&mut self, ranges: &[Range<usize>]) -> Result<(), Error> {
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let rows = match self.grain {
                Some(grain) => range.start / grain * grain..range.end.next_multiple_of(grain),
                None => 0..usize::MAX,
            };
            let is_meant =
                |start: usize, piece: &Piece| start < rows.end && rows.start < start + piece.n && !piece.is_own();
            if !self.placed().any(|(start, piece)| is_meant(start, piece)) {
                continue;
            }
            let mut pieces = Vec::with_capacity(self.pieces.len() + 2);
            for (start, piece) in self.placed() {
                if !is_meant(start, piece) {
                    pieces.push(piece.clone());
                    continue;
                }
                let end = start + piece.n;
                let own = rows.start.clamp(start, end)..rows.end.clamp(start, end);
                let part = |rows: Range<usize>| Piece {
                    first: piece.first + rows.start - start,
                    n: rows.len(),
                    ..piece.clone()
                };
                let copy = Piece { store: Arc::new(self.copied(own.clone())?), first: 0, n: own.len() };
                pieces
                    .extend([part(start..own.start), copy, part(own.end..end)].into_iter().filter(|piece| piece.n > 0));
            }
            if pieces.len() > MAX_PIECES {
                let n = self.n_rows();
                pieces = vec![Piece { store: Arc::new(self.copied(0..n)?), first: 0, n }];
            }
            self.pieces = pieces;
            self.id = new_id();
        }
        Ok(())
    }

    /// A store of these rows alone.
    fn copied(&self, rows: Range<usize>) -> Result<Store, Error> {
        let store = self.pieces[0].store.like(rows.len())?;
        let mut bytes = Vec::new();
        for tensor in 0..store.n_tensors() {
            for run in self.runs(rows.clone()) {
                bytes.clear();
                run.store.read(tensor, run.in_store(), &mut bytes);
                store.write(tensor, run.rows.start - rows.start..run.rows.end - rows.start, &bytes);
            }
        }
        Ok(store)
    }

    /// Appends the bytes of rows: the keys of all ranges, then the values.
    pub fn read_rows(&self, ranges: &[Range<usize>], to: &mut Vec<u8>) {
        for tensor in 0..self.pieces[0].store.n_tensors() {
            for run in ranges.iter().flat_map(|range| self.runs(range.clone())) {
                run.store.read(tensor, run.in_store(), to);
            }
        }
    }

    /// Writes what [`Chain::read_rows`] read, into rows that are nobody else's.
    pub fn write_rows(&self, ranges: &[Range<usize>], from: &[u8]) {
        let mut from = from;
        for tensor in 0..self.pieces[0].store.n_tensors() {
            for run in ranges.iter().flat_map(|range| self.runs(range.clone())) {
                assert!(self.is_own(&run.rows), "rows that other sequences read are not written");
                from = run.store.write(tensor, run.in_store(), from);
            }
        }
    }

    fn is_own(&self, rows: &Range<usize>) -> bool {
        self.placed().all(|(start, piece)| piece.is_own() || start >= rows.end || start + piece.n <= rows.start)
    }

    /// Where the rows `0..n` are: stores, told apart by their addresses, and rows of them.
    pub fn places(&self, n: usize) -> impl Iterator<Item = (*const Store, Range<usize>)> {
        self.runs(0..n).map(|run| (std::ptr::from_ref(run.store), run.in_store()))
    }
}

/// A number that was never given before.
pub(super) fn new_id() -> u64 {
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;
    use crate::{cache::Meter, ggml::Device};

    const SHAPE: RowShape = RowShape { heads: 2, key_size: 8, value_size: 4, values_in_keys: false };

    fn store(n: usize, meter: &Meter) -> Store {
        Store::new(SHAPE, n, 64, None, Format::F16, Device::cpu().buffer_type(), meter).unwrap()
    }

    fn rows(chain: &Chain, rows: Range<usize>) -> Vec<u8> {
        let mut bytes = Vec::new();
        chain.read_rows(from_ref(&rows), &mut bytes);
        bytes
    }

    fn write(chain: &Chain, rows: Range<usize>, value: u8) {
        chain.write_rows(from_ref(&rows), &vec![value; rows.len() * SHAPE.row_bytes(Format::F16)]);
    }

    #[test]
    fn a_copy_takes_what_is_written() {
        let (meter, row_bytes) = (Meter::default(), SHAPE.row_bytes(Format::F16));
        let mut one = Chain::new(store(640, &meter), Some(64));
        write(&one, 0..640, 1);
        let whole = meter.now();
        let mut two = one.share();
        assert_eq!((meter.now(), two.bytes()), (whole, one.bytes()));
        assert_ne!(one.id(), two.id());

        two.own(&[100..130, 600..601]).unwrap();
        write(&two, 100..130, 2);
        write(&two, 600..601, 3);
        assert!(rows(&one, 0..640).iter().all(|&byte| byte == 1));
        assert!(rows(&two, 100..130).iter().all(|&byte| byte == 2));
        assert_eq!(rows(&two, 40..100), rows(&one, 40..100));
        // Blocks 1, 2 and 9.
        assert!(meter.now() <= whole + 3 * 64 * row_bytes + 4096, "{} after {whole}", meter.now());
        assert_eq!((two.piece_of(63), two.piece_of(64), two.piece_of(191), two.piece_of(192)), (0, 1, 1, 2));

        // What is nobody else's is written where it is.
        let (id, now) = (two.id(), meter.now());
        two.own(from_ref(&(64..192))).unwrap();
        assert_eq!((two.id(), meter.now()), (id, now));
        drop(two);
        assert_eq!(meter.now(), whole);
        let id = one.id();
        one.own(from_ref(&(0..640))).unwrap();
        assert_eq!(one.id(), id);
    }

    #[test]
    fn a_sequence_grows_behind_what_it_shares() {
        let meter = Meter::default();
        let mut one = Chain::new(store(256, &meter), Some(64));
        write(&one, 0..256, 1);
        assert_eq!((one.replaced_from(200, 256), one.replaced_from(200, 257)), (None, Some(0)));
        let other = one.share();
        // From the block of the first row that is written; none of it, where that is a new one.
        assert_eq!((one.replaced_from(200, 201), one.replaced_from(256, 257)), (Some(192), Some(256)));
        one.replace_from(192, store(128, &meter));
        assert_eq!((one.n_rows(), one.piece_of(191), one.piece_of(192)), (320, 0, 1));
        assert_eq!((one.replaced_from(200, 320), one.replaced_from(320, 321)), (None, Some(192)));
        // Back into what is shared.
        assert_eq!(one.replaced_from(70, 71), Some(64));
        drop(other);
        assert_eq!(one.replaced_from(70, 71), None);

        // Copies of copies: some of the pieces are copied then.
        let mut all = vec![one];
        for _ in 0..40 {
            let mut next = all[all.len() - 1].share();
            let (n, first) = (next.n_rows(), next.replaced_from(next.n_rows(), next.n_rows() + 1).unwrap());
            next.replace_from(first, store(n + 64 - first, &meter));
            assert!(next.pieces.len() <= MAX_PIECES && next.n_rows() == n + 64);
            all.push(next);
        }
    }

    #[test]
    fn rows_in_one_store_are_copied_whole() {
        let meter = Meter::default();
        let one = Chain::new(store(256, &meter), None);
        write(&one, 0..256, 5);
        let mut two = one.share();
        assert_eq!(two.replaced_from(200, 201), Some(0));
        two.own(from_ref(&(3..4))).unwrap();
        assert_eq!((two.single().n_rows(), rows(&two, 0..256)), (256, rows(&one, 0..256)));
        assert_eq!(two.replaced_from(200, 201), None);
    }
}
