//! What is left of a layer's old rows once some were dropped: for each KV head a list of rows of its own.

use std::{ops::Range, slice};

use super::{Chain, Format, Lease, Meter, Move, Moving, RowShape, Store, chain::new_id, move_rows};
use crate::ggml::{ATTENTION_BLOCK, BufferType, Context, Error, Graph, HeadRows, Scheduler, Tensor, Type};

/// For each KV head the rows that it keeps, in the order of their positions. Copies of a sequence share them until one appends.
#[derive(Debug)]
pub(crate) struct HeadLists {
    /// What a head's row is made of.
    shape: RowShape,
    format: Format,
    memory: BufferType,
    meter: Meter,
    lists: Vec<List>,
    id: u64,
}

#[derive(Debug)]
struct List {
    /// None while there are no rows.
    chain: Option<Chain>,
    n: usize,
}

impl HeadLists {
    /// Without any rows yet, for a layer whose rows are these.
    pub fn new(layer: RowShape, format: Format, memory: BufferType, meter: &Meter) -> HeadLists {
        let lists = (0..layer.heads).map(|_| List { chain: None, n: 0 }).collect();
        HeadLists { shape: RowShape { heads: 1, ..layer }, format, memory, meter: meter.clone(), lists, id: new_id() }
    }

    /// The same rows for another sequence.
    pub fn share(&self) -> HeadLists {
        let share = |list: &List| List { chain: list.chain.as_ref().map(Chain::share), n: list.n };
        HeadLists { meter: self.meter.clone(), lists: self.lists.iter().map(share).collect(), id: new_id(), ..*self }
    }

    /// A number that no other lists ever have, nor these with other rows or with rows in other memory: what is in the rows may
    /// change meanwhile.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of a row of one head, and how many of them are the key's.
    pub fn bytes_of_row(&self) -> (usize, usize) {
        (self.shape.row_bytes(self.format), self.format.k.row_bytes(self.shape.key_size))
    }

    /// Rows of each head.
    pub fn counts(&self) -> impl Iterator<Item = usize> {
        self.lists.iter().map(|list| list.n)
    }

    /// Rows of a head, in the mean.
    pub fn mean(&self) -> usize {
        self.counts().sum::<usize>().div_ceil(self.lists.len().max(1))
    }

    /// The rows of the head that has most, and how many; `None` where none has any.
    pub fn longest(&self) -> Option<(&Chain, usize)> {
        let longest = self.lists.iter().max_by_key(|list| list.n)?;
        longest.chain.as_ref().map(|chain| (chain, longest.n)).filter(|&(_, n)| n > 0)
    }

    /// Bytes of the buffers, whoever else reads them.
    pub fn bytes(&self) -> usize {
        self.lists.iter().filter_map(|list| list.chain.as_ref()).map(Chain::bytes).sum()
    }

    /// Bytes of the rows alone.
    pub fn row_bytes(&self) -> usize {
        self.counts().sum::<usize>() * self.shape.row_bytes(self.format)
    }

    /// The rows in the form in which attention reads them.
    pub fn rows(&self, graph: &Graph) -> Vec<HeadRows> {
        let rows = |list: &List| match &list.chain {
            Some(chain) => {
                HeadRows { k: chain.keys(self.shape, graph, list.n), v: chain.values(self.shape, graph, list.n) }
            }
            None => HeadRows { k: Vec::new(), v: Vec::new() },
        };
        self.lists.iter().map(rows).collect()
    }

    /// Makes room for this many rows in each head, of lists that have none.
    pub fn allot(&mut self, most: usize) -> Result<(), Error> {
        let make = || Store::new(self.shape, most, ATTENTION_BLOCK, None, self.format, self.memory, &self.meter);
        let stores = self.lists.iter().map(|_| make()).collect::<Result<Vec<_>, _>>()?;
        for (list, store) in self.lists.iter_mut().zip(stores) {
            list.chain = Some(Chain::new(store, Some(ATTENTION_BLOCK)));
        }
        self.id = new_id();
        Ok(())
    }

    /// Makes these rows of a head, for which there is room, no other sequence's.
    pub fn own(&mut self, head: usize, rows: Range<usize>) -> Result<(), Error> {
        let Some(chain) = &mut self.lists[head].chain else { return Ok(()) };
        let before = chain.id();
        chain.own(slice::from_ref(&rows))?;
        if chain.id() != before {
            self.id = new_id();
        }
        Ok(())
    }

    /// Writes a head's row, which is no other sequence's: in place of one, or as the next one.
    pub fn put(&mut self, head: usize, index: usize, row: &[u8]) {
        let list = &mut self.lists[head];
        if let Some(chain) = &list.chain {
            chain.write_rows(slice::from_ref(&(index..index + 1)), row);
        }
        if index == list.n {
            list.n += 1;
            self.id = new_id();
        }
    }

    /// Appends the bytes of a head's row.
    pub fn read_row(&self, head: usize, index: usize, to: &mut Vec<u8>) {
        if let Some(chain) = &self.lists[head].chain {
            chain.read_rows(slice::from_ref(&(index..index + 1)), to);
        }
    }

    /// Keeps a head's first `n` rows.
    pub fn cut(&mut self, head: usize, n: usize) {
        self.lists[head].n = n.min(self.lists[head].n);
        self.id = new_id();
    }

    /// The same rows in another format, with the same room.
    pub fn converted(&self, format: Format, scheduler: &mut Scheduler, moving: Moving<'_>) -> Result<HeadLists, Error> {
        let moving = Moving { shape: self.shape, n_sink: 0, ..moving };
        let convert = |list: &List| {
            let Some(chain) = &list.chain else { return Ok(List { chain: None, n: 0 }) };
            let store =
                Store::new(self.shape, chain.n_rows(), ATTENTION_BLOCK, None, format, self.memory, &self.meter)?;
            if list.n > 0 {
                move_rows(scheduler, &[(chain, &[Move { from: 0..list.n, to: 0 }])], &store, moving)?;
            }
            Ok(List { chain: Some(Chain::new(store, Some(ATTENTION_BLOCK))), n: list.n })
        };
        let lists = self.lists.iter().map(convert).collect::<Result<_, Error>>()?;
        Ok(HeadLists { lists, format, meter: self.meter.clone(), id: new_id(), ..*self })
    }

    /// Makes room for so many rows more in each head. What is there stays, also after an error.
    pub fn reserve(&mut self, more: &[usize]) -> Result<(), Error> {
        self.id = new_id();
        let (shape, format, memory) = (self.shape, self.format, self.memory);
        let make = |rows: usize| {
            let rows = Store::rows_with_room(rows);
            Store::new(shape, rows, ATTENTION_BLOCK, None, format, memory, &self.meter)
        };
        for (list, more) in self.lists.iter_mut().zip(more).filter(|(_, more)| **more > 0) {
            let needed = list.n + more;
            let Some(chain) = &mut list.chain else {
                list.chain = Some(Chain::new(make(needed)?, Some(ATTENTION_BLOCK)));
                continue;
            };
            if let Some(first) = chain.replaced_from(list.n, needed) {
                let rest = make(needed - first)?;
                let mut kept = Vec::new();
                chain.read_rows(slice::from_ref(&(first..list.n)), &mut kept);
                let mut kept = &kept[..];
                for tensor in 0..rest.n_tensors() {
                    kept = rest.write(tensor, 0..list.n - first, kept);
                }
                chain.replace_from(first, rest);
            }
        }
        Ok(())
    }

    /// Appends rows of a head, for which there is room: the keys of all, then the values.
    pub fn push(&mut self, head: usize, n: usize, rows: &[u8]) {
        let list = &mut self.lists[head];
        if let Some(chain) = list.chain.as_ref().filter(|_| n > 0) {
            chain.write_rows(slice::from_ref(&(list.n..list.n + n)), rows);
            list.n += n;
            self.id = new_id();
        }
    }

    /// Appends the bytes of all heads' rows: of each the keys, then the values.
    pub fn read(&self, to: &mut Vec<u8>) {
        for list in &self.lists {
            if let Some(chain) = &list.chain {
                chain.read_rows(slice::from_ref(&(0..list.n)), to);
            }
        }
    }

    /// Appends what [`HeadLists::read`] gave of lists with so many rows.
    pub fn write(&mut self, counts: &[usize], from: &[u8]) -> Result<(), Error> {
        self.reserve(counts)?;
        let (mut from, row_bytes) = (from, self.shape.row_bytes(self.format));
        for (head, &n) in counts.iter().enumerate() {
            let (rows, rest) = from.split_at(n * row_bytes);
            self.push(head, n, rows);
            from = rest;
        }
        Ok(())
    }
}

/// How much each row of a store will be asked for, by KV heads. Of rows that nothing is known of, more than any bound.
#[derive(Debug)]
pub(crate) struct RowScores {
    /// f32 `[KV heads, rows]`.
    pub tensor: Tensor,
    lease: Lease,
}

impl RowScores {
    pub fn new(heads: usize, n_rows: usize, memory: BufferType, meter: &Meter) -> Result<RowScores, Error> {
        let context = Context::new(1);
        let tensor = context.tensor(Type::F32, &[heads, n_rows]).named("row_scores");
        let lease = meter.lease(context.alloc(memory, "the scores of rows")?);
        tensor.write(0, &vec![f32::INFINITY; heads * n_rows]);
        Ok(RowScores { tensor, lease })
    }

    pub fn n_rows(&self) -> usize {
        self.tensor.shape()[1]
    }

    pub fn bytes(&self) -> usize {
        self.lease.bytes()
    }

    /// Of these rows, one after the other.
    pub fn read(&self, rows: Range<usize>) -> Vec<f32> {
        let mut scores = vec![0.0; rows.len() * self.tensor.shape()[0]];
        self.tensor.read(rows.start * self.tensor.strides()[1], &mut scores);
        scores
    }

    /// Of the rows from `first` on.
    pub fn write(&self, first: usize, scores: &[f32]) {
        self.tensor.write(first * self.tensor.strides()[1], scores);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::Device;

    const LAYER: RowShape = RowShape { heads: 3, key_size: 8, value_size: 4, values_in_keys: false };

    #[test]
    fn lists_grow_apart_and_are_shared() {
        let (meter, memory) = (Meter::default(), Device::cpu().buffer_type());
        let row_bytes = RowShape { heads: 1, ..LAYER }.row_bytes(Format::F16);
        let mut one = HeadLists::new(LAYER, Format::F16, memory, &meter);
        let row = |value: u8, n: usize| vec![value; n * row_bytes];
        let append = |lists: &mut HeadLists, value: u8, more: [usize; 3]| {
            lists.reserve(&more).unwrap();
            (0..3).for_each(|head| lists.push(head, more[head], &row(value, more[head])));
        };
        append(&mut one, 1, [100, 0, 70]);
        assert_eq!((one.counts().collect::<Vec<_>>(), one.mean()), (vec![100, 0, 70], 57));
        let whole = meter.now();
        assert_eq!(whole, one.bytes());

        let mut two = one.share();
        assert_eq!(meter.now(), whole);
        append(&mut two, 2, [5, 1, 500]);
        append(&mut one, 3, [1, 0, 0]);
        let read = |lists: &HeadLists| {
            let mut bytes = Vec::new();
            lists.read(&mut bytes);
            bytes
        };
        // A head's keys come before its values.
        let list = |rows: &[(u8, usize)]| {
            let part = |bytes: usize| rows.iter().flat_map(move |&(value, n)| vec![value; n * bytes]);
            part(2 * LAYER.key_size).chain(part(2 * LAYER.value_size)).collect::<Vec<u8>>()
        };
        assert_eq!(read(&one), [list(&[(1, 100), (3, 1)]), list(&[(1, 70)])].concat());
        assert_eq!(read(&two), [list(&[(1, 100), (2, 5)]), list(&[(2, 1)]), list(&[(1, 70), (2, 500)])].concat());

        let mut again = HeadLists::new(LAYER, Format::F16, memory, &meter);
        again.write(&two.counts().collect::<Vec<_>>(), &read(&two)).unwrap();
        assert_eq!((read(&again), again.row_bytes()), (read(&two), 676 * row_bytes));
        drop((one, two, again));
        assert_eq!(meter.now(), 0);
    }
}
