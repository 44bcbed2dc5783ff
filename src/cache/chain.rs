//! A layer's rows in one sequence, of which other sequences may read some as well: a copy of a sequence takes no memory until one
//! of the two writes, and then only the blocks of rows that are written.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Format, RowShape, Store};
use crate::ggml::{Error, Graph, Tensor};

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

    /// Bytes of all buffers that rows are in, whoever else reads them.
    pub fn bytes(&self) -> usize {
        let is_new =
            |at: usize| self.pieces[..at].iter().all(|piece| !Arc::ptr_eq(&piece.store, &self.pieces[at].store));
        (0..self.pieces.len()).filter(|&at| is_new(at)).map(|at| self.pieces[at].store.bytes()).sum()
    }

    /// The one store of rows that must be in one.
    pub fn single(&self) -> &Store {
        assert!(self.pieces.len() == 1 && self.pieces[0].first == 0, "rows are in one store");
        &self.pieces[0].store
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
        let keys =
            |run: Run<'_>| shape.keys(graph, &from(graph, &run.store.k, run.first, run.rows.len()), run.rows.len());
        self.runs(0..n).map(keys).collect()
    }

    /// Values `0..n` in pieces, as [`RowShape::values`].
    pub fn values(&self, shape: RowShape, graph: &Graph, n: usize) -> Vec<Tensor> {
        let values = |run: Run<'_>| {
            shape.values(graph, &from(graph, run.store.value_rows(), run.first, run.rows.len()), run.rows.len())
        };
        self.runs(0..n).map(values).collect()
    }

    /// From where on rows must be replaced so that those from `row` on are nobody else's, and `n_rows` there are: `None` where all
    /// is well.
    pub fn replaced_from(&self, row: usize, n_rows: usize) -> Option<usize> {
        let is_shared = self.placed().any(|(start, piece)| start + piece.n > row && !piece.is_own());
        if !is_shared && self.n_rows() >= n_rows {
            return None;
        }
        Some(match self.placed().last() {
            Some((start, last)) if !is_shared && last.is_own() => start,
            _ => self.grain.map_or(0, |grain| row.min(self.n_rows()) / grain * grain),
        })
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
                let [from, to] = [rows.start, rows.end].map(|row| row.clamp(start, start + piece.n) - start);
                let part =
                    |rows: Range<usize>| Piece { first: piece.first + rows.start, n: rows.len(), ..piece.clone() };
                let store = piece.store.copied(piece.first + from..piece.first + to)?;
                let own = Piece { store: Arc::new(store), first: 0, n: to - from };
                pieces.extend([part(0..from), own, part(to..piece.n)].into_iter().filter(|piece| piece.n > 0));
            }
            self.pieces = pieces;
            self.id = new_id();
        }
        Ok(())
    }

    /// Appends the bytes of rows: the keys of all ranges, then the values.
    pub fn read_rows(&self, ranges: &[Range<usize>], to: &mut Vec<u8>) {
        for tensor in 0..self.pieces[0].store.n_tensors() {
            for run in ranges.iter().flat_map(|range| self.runs(range.clone())) {
                run.store.read(tensor, run.first..run.first + run.rows.len(), to);
            }
        }
    }

    /// Writes what [`Chain::read_rows`] read, into rows that are nobody else's.
    pub fn write_rows(&self, ranges: &[Range<usize>], from: &[u8]) {
        let mut from = from;
        for tensor in 0..self.pieces[0].store.n_tensors() {
            for run in ranges.iter().flat_map(|range| self.runs(range.clone())) {
                assert!(self.is_own(&run.rows), "rows that other sequences read are not written");
                from = run.store.write(tensor, run.first..run.first + run.rows.len(), from);
            }
        }
    }

    fn is_own(&self, rows: &Range<usize>) -> bool {
        self.placed().all(|(start, piece)| piece.is_own() || start >= rows.end || start + piece.n <= rows.start)
    }

    /// The rows `0..n` by where they are: a number of their store, and the rows there.
    pub fn places(&self, n: usize) -> impl Iterator<Item = (*const Store, Range<usize>)> {
        self.runs(0..n).map(|run| (std::ptr::from_ref(run.store), run.first..run.first + run.rows.len()))
    }
}

/// Rows from `first` on.
fn from(graph: &Graph, rows: &Tensor, first: usize, n: usize) -> Tensor {
    if first == 0 { rows.clone() } else { graph.rows(rows, first, n) }
}

fn new_id() -> u64 {
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}
