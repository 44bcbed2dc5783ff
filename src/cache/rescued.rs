//! Older rows that a lazy layer keeps beside sink and window: for each KV head those with the highest scores.
//!
//! Each row competes once, when it has left the window: it takes the place of its head's weakest row, if its own score is higher. What is
//! listed is then the best of all that have competed, in whatever pieces they came. What was displaced by rows that the ring still
//! has is noted, so that these can be taken back.

use std::{collections::VecDeque, ops::Range};

use super::{Format, HeadLists, Lease, Meter, Moving};
use crate::ggml::{Error, Scheduler};

/// For each KV head the rows with the highest scores of all that have competed.
#[derive(Debug)]
pub(crate) struct Rescued {
    lists: HeadLists,
    /// Those of each head's rows.
    scores: Vec<Vec<f32>>,
    /// The row of each head that has the lowest one.
    weakest: Vec<usize>,
    /// Rows of each head at most.
    most: usize,
    /// The position of the next row that competes.
    end: usize,
    undo: Undo,
    /// Of what is not in the lists' buffers.
    lease: Lease,
}

/// What rows took the place of, in the order in which they did.
#[derive(Debug, Clone, Default)]
struct Undo {
    entries: VecDeque<Entry>,
    /// The bytes of the rows that were displaced.
    rows: VecDeque<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Of the row that came.
    position: usize,
    head: usize,
    index: usize,
    /// Of the row that went; `None` where the place was empty.
    score: Option<f32>,
}

/// What [`Rescued`] lists, as bytes.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Listed {
    /// Of each head's rows.
    pub scores: Vec<Vec<f32>>,
    /// Of each head the keys, then the values.
    pub rows: Vec<u8>,
}

impl Listed {
    pub fn counts(&self) -> impl Iterator<Item = usize> {
        self.scores.iter().map(Vec::len)
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> usize {
        self.rows.len() + self.counts().sum::<usize>() * size_of::<f32>()
    }
}

impl Rescued {
    /// Nothing yet of `most` rows a head, in lists that are empty; the row of position `first` is the next that competes.
    pub fn new(mut lists: HeadLists, most: usize, first: usize, meter: &Meter) -> Result<Rescued, Error> {
        lists.allot(most)?;
        let scores: Vec<Vec<f32>> = lists.counts().map(|_| Vec::with_capacity(most)).collect();
        let lease = meter.lease(scores.len() * most * size_of::<f32>());
        let weakest = vec![0; scores.len()];
        Ok(Rescued { lists, scores, weakest, most, end: first, undo: Undo::default(), lease })
    }

    /// The same rows for another sequence.
    pub fn share(&self) -> Rescued {
        let (scores, weakest) = (self.scores.clone(), self.weakest.clone());
        let (lists, undo, lease) = (self.lists.share(), self.undo.clone(), self.lease.another(self.lease.bytes()));
        Rescued { lists, scores, weakest, undo, lease, ..*self }
    }

    pub fn lists(&self) -> &HeadLists {
        &self.lists
    }

    /// The position of the next row that competes.
    pub fn end(&self) -> usize {
        self.end
    }

    /// Bytes of the buffers, whoever else reads them, and of what is noted beside them.
    pub fn bytes(&self) -> usize {
        self.lists.bytes() + self.lease.bytes()
    }

    /// Lets the rows of these positions compete, as far as they have not yet: their keys, then their values, of all heads, and their
    /// scores `[KV heads, positions]`. What rows from `undo_from` on displace is noted.
    pub fn compete(
        &mut self,
        positions: Range<usize>,
        rows: &[u8],
        scores: &[f32],
        undo_from: usize,
    ) -> Result<(), Error> {
        let (heads, n) = (self.scores.len(), positions.len());
        let (row_bytes, key_bytes) = self.lists.bytes_of_row();
        let (keys, values) = rows.split_at(n * heads * key_bytes);
        for position in self.end.max(positions.start)..positions.end {
            let row = position - positions.start;
            let score = |head: usize| known(scores[row * heads + head]);
            let places: Vec<Option<usize>> = (0..heads).map(|head| self.place(head, score(head))).collect();
            // All before any is written: no row competes twice.
            for (head, index) in places.iter().enumerate().filter_map(|(head, place)| Some((head, (*place)?))) {
                self.lists.own(head, index..index + 1)?;
            }
            for (head, index) in places.iter().enumerate().filter_map(|(head, place)| Some((head, (*place)?))) {
                let part = |all: &'_ [u8], bytes: usize| all[(row * heads + head) * bytes..][..bytes].to_vec();
                let bytes = [part(keys, key_bytes), part(values, row_bytes - key_bytes)].concat();
                let before = self.scores[head].get(index).copied();
                if position >= undo_from {
                    self.undo.note(Entry { position, head, index, score: before }, &self.lists);
                }
                self.lists.put(head, index, &bytes);
                match before {
                    Some(_) => self.scores[head][index] = score(head),
                    None => self.scores[head].push(score(head)),
                }
                self.find_weakest(head);
            }
            self.end = position + 1;
        }
        self.end = self.end.max(positions.end);
        Ok(())
    }

    /// The place that a row of this score takes in its head's list, if any.
    fn place(&self, head: usize, score: f32) -> Option<usize> {
        let (scores, weakest) = (&self.scores[head], self.weakest[head]);
        match scores.len() < self.most {
            true => Some(scores.len()),
            false => (score > *scores.get(weakest)?).then_some(weakest),
        }
    }

    fn find_weakest(&mut self, head: usize) {
        let scores = &self.scores[head];
        self.weakest[head] = (0..scores.len()).min_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0);
    }

    /// Makes it as it was when the row of position `end` was the next that competes; none from there on must have been forgotten
    /// ([`Rescued::forget`]).
    pub fn back_to(&mut self, end: usize) -> Result<(), Error> {
        let is_later = |entry: &&Entry| entry.position >= end;
        for entry in self.undo.entries.iter().rev().take_while(is_later).filter(|entry| entry.score.is_some()) {
            self.lists.own(entry.head, entry.index..entry.index + 1)?;
        }
        let row_bytes = self.lists.bytes_of_row().0;
        while let Some(Entry { head, index, score, .. }) =
            self.undo.entries.back().copied().filter(|last| is_later(&last))
        {
            self.undo.entries.pop_back();
            match score {
                Some(score) => {
                    let row = self.undo.rows.split_off(self.undo.rows.len() - row_bytes);
                    self.lists.put(head, index, &Vec::from(row));
                    self.scores[head][index] = score;
                }
                None => {
                    self.lists.cut(head, index);
                    self.scores[head].truncate(index);
                }
            }
        }
        (0..self.scores.len()).for_each(|head| self.find_weakest(head));
        self.end = self.end.min(end);
        Ok(())
    }

    /// Rows before this position do not go back any more.
    pub fn forget(&mut self, position: usize) {
        let row_bytes = self.lists.bytes_of_row().0;
        while let Some(entry) = self.undo.entries.front().copied().filter(|first| first.position < position) {
            self.undo.entries.pop_front();
            if entry.score.is_some() {
                self.undo.rows.drain(..row_bytes);
            }
        }
        if self.undo.rows.capacity() > 2 * (self.undo.rows.len() + row_bytes) {
            self.undo.rows.shrink_to_fit();
            self.undo.entries.shrink_to_fit();
        }
        let of_entries = self.undo.entries.capacity() * size_of::<Entry>() + self.undo.rows.capacity();
        let bytes = self.scores.len() * self.most * size_of::<f32>() + of_entries;
        if bytes != self.lease.bytes() {
            self.lease = self.lease.another(bytes);
        }
    }

    /// The same in another format; nothing goes back then.
    pub fn converted(&self, format: Format, scheduler: &mut Scheduler, moving: Moving<'_>) -> Result<Rescued, Error> {
        let lists = self.lists.converted(format, scheduler, moving)?;
        let lease = self.lease.another(self.scores.len() * self.most * size_of::<f32>());
        let (scores, weakest) = (self.scores.clone(), self.weakest.clone());
        Ok(Rescued { lists, scores, weakest, undo: Undo::default(), lease, ..*self })
    }

    /// Rows of each head when the row of position `end` was the next that competes: see [`Rescued::back_to`].
    pub fn counts_at(&self, end: usize) -> Vec<usize> {
        let mut counts: Vec<usize> = self.scores.iter().map(Vec::len).collect();
        for entry in self.undo.entries.iter().filter(|entry| entry.position >= end && entry.score.is_none()) {
            counts[entry.head] = counts[entry.head].min(entry.index);
        }
        counts
    }

    /// What was listed when the row of position `end` was the next that competes: see [`Rescued::back_to`].
    pub fn at(&self, end: usize) -> Listed {
        let (row_bytes, key_bytes) = self.lists.bytes_of_row();
        let mut scores = self.scores.clone();
        let mut rows: Vec<Vec<u8>> = vec![Vec::new(); scores.len()];
        for (head, rows) in rows.iter_mut().enumerate() {
            (0..scores[head].len()).for_each(|index| self.lists.read_row(head, index, rows));
        }
        let mut displaced = self.undo.rows.len();
        for entry in self.undo.entries.iter().rev().take_while(|entry| entry.position >= end) {
            match entry.score {
                Some(score) => {
                    displaced -= row_bytes;
                    let row = self.undo.rows.range(displaced..displaced + row_bytes);
                    let place = &mut rows[entry.head][entry.index * row_bytes..][..row_bytes];
                    place.iter_mut().zip(row).for_each(|(to, from)| *to = *from);
                    scores[entry.head][entry.index] = score;
                }
                None => scores[entry.head].truncate(entry.index),
            }
        }
        let mut listed = Vec::new();
        for (rows, scores) in rows.iter().zip(&scores) {
            let of_row = |index: usize| rows[index * row_bytes..][..row_bytes].split_at(key_bytes);
            listed.extend((0..scores.len()).flat_map(|index| of_row(index).0));
            listed.extend((0..scores.len()).flat_map(|index| of_row(index).1));
        }
        Listed { scores, rows: listed }
    }

    /// Makes all of its rows no other sequence's, so that [`Rescued::put`] needs no memory.
    pub fn own(&mut self) -> Result<(), Error> {
        (0..self.scores.len()).try_for_each(|head| self.lists.own(head, 0..self.most))
    }

    /// Lists what [`Rescued::at`] gave of the same layer and position, in rows that are no other sequence's.
    pub fn put(&mut self, end: usize, listed: &Listed) {
        let (row_bytes, _) = self.lists.bytes_of_row();
        let mut rows = &listed.rows[..];
        for (head, scores) in listed.scores.iter().enumerate() {
            let (own, rest) = rows.split_at(scores.len() * row_bytes);
            self.lists.cut(head, 0);
            self.lists.push(head, scores.len(), own);
            self.scores[head].clear();
            self.scores[head].extend_from_slice(scores);
            self.find_weakest(head);
            rows = rest;
        }
        (self.end, self.undo) = (end, Undo::default());
        self.forget(end);
    }
}

impl Undo {
    /// Notes what is in the place that a row is about to take.
    fn note(&mut self, entry: Entry, lists: &HeadLists) {
        if entry.score.is_some() {
            let mut row = Vec::new();
            lists.read_row(entry.head, entry.index, &mut row);
            self.rows.extend(row);
        }
        self.entries.push_back(entry);
    }
}

/// A score to compare by: a row that nothing is known of is weaker than any other.
fn known(score: f32) -> f32 {
    if score.is_finite() { score } else { f32::NEG_INFINITY }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{cache::RowShape, ggml::Device};

    const LAYER: RowShape = RowShape { heads: 2, key_size: 4, value_size: 2, values_in_keys: false };
    const MOST: usize = 5;
    const SINK: usize = 3;

    fn empty(meter: &Meter) -> Rescued {
        let lists = HeadLists::new(LAYER, Format::F16, Device::cpu().buffer_type(), meter);
        Rescued::new(lists, MOST, SINK, meter).unwrap()
    }

    /// Lets positions compete whose rows are made of their numbers.
    fn compete(rescued: &mut Rescued, positions: Range<usize>, scores: &[[f32; 2]], undo_from: usize) {
        let part = |size: usize| {
            let of_row = move |at: usize| (0..2).flat_map(move |head| vec![(2 * at + head) as u8; 2 * size]);
            positions.clone().flat_map(of_row)
        };
        let rows: Vec<u8> = part(LAYER.key_size).chain(part(LAYER.value_size)).collect();
        let scores = scores[positions.clone()].as_flattened();
        rescued.compete(positions, &rows, scores, undo_from).unwrap();
        rescued.forget(undo_from);
    }

    /// The positions that each head has, told from keys and from values, in order.
    fn found(rescued: &Rescued, end: usize) -> [Vec<usize>; 2] {
        let Listed { scores, rows } = rescued.at(end);
        let mut rows = &rows[..];
        std::array::from_fn(|head| {
            let n = scores[head].len();
            let (keys, rest) = rows.split_at(n * 2 * LAYER.key_size);
            let (values, rest) = rest.split_at(n * 2 * LAYER.value_size);
            rows = rest;
            let of = |all: &[u8], bytes: usize| -> Vec<usize> {
                all.chunks(bytes).map(|row| (usize::from(row[0]) - head) / 2).collect()
            };
            let (mut keys, values) = (of(keys, 2 * LAYER.key_size), of(values, 2 * LAYER.value_size));
            assert_eq!(keys, values);
            keys.sort_unstable();
            keys
        })
    }

    /// The best of all that have competed.
    fn best(scores: &[[f32; 2]], end: usize) -> [Vec<usize>; 2] {
        std::array::from_fn(|head| {
            let mut all: Vec<usize> = (SINK..end).collect();
            all.sort_by(|&a, &b| scores[b][head].total_cmp(&scores[a][head]));
            all.truncate(MOST);
            all.sort_unstable();
            all
        })
    }

    proptest! {
        /// In whatever pieces rows come, the best are listed; some are taken back and come again, and copies do not mind.
        #[test]
        fn the_best_are_listed(
            order in Just((0..120).collect::<Vec<usize>>()).prop_shuffle(),
            pieces in prop::collection::vec((1usize..30, 0usize..20), 1..8),
        ) {
            let scores: Vec<[f32; 2]> = order[..60].iter().zip(&order[60..]).map(|(&a, &b)| [a as f32, b as f32]).collect();
            let meter = Meter::default();
            let mut rescued = empty(&meter);
            let (mut end, mut undo_from) = (SINK, 0);
            for (n, back) in pieces {
                let next = (end + n).min(60);
                undo_from = undo_from.max(next.saturating_sub(20));
                compete(&mut rescued, end..next, &scores, undo_from);
                prop_assert_eq!(found(&rescued, next), best(&scores, next));
                let earlier = next.saturating_sub(back).max(undo_from).max(SINK);
                prop_assert_eq!(found(&rescued, earlier), best(&scores, earlier));
                prop_assert_eq!(rescued.counts_at(earlier), rescued.at(earlier).counts().collect::<Vec<_>>());
                let (copy, listed) = (rescued.share(), rescued.at(earlier));
                rescued.back_to(earlier).unwrap();
                prop_assert_eq!(&rescued.at(earlier), &listed);
                prop_assert_eq!((found(&copy, next), copy.end()), (best(&scores, next), next));

                let mut read = empty(&meter);
                read.put(earlier, &listed);
                prop_assert_eq!(&read.at(earlier), &listed);
                drop((copy, read));
                end = earlier;
            }
            prop_assert_eq!(meter.now(), rescued.bytes());
            drop(rescued);
            prop_assert_eq!(meter.now(), 0);
        }
    }

    #[test]
    fn a_copy_keeps_what_it_shares() {
        let meter = Meter::default();
        let mut one = empty(&meter);
        let scores: Vec<[f32; 2]> = (0..40).map(|at| [at as f32, -(at as f32)]).collect();
        compete(&mut one, SINK..30, &scores, 20);
        let before = meter.now();
        let mut two = one.share();
        assert!(meter.now() - before < 2048 && two.lists().id() != one.lists().id());
        compete(&mut two, 30..40, &scores, 20);
        assert_eq!((found(&one, 30), found(&two, 40)), (best(&scores, 30), best(&scores, 40)));
        two.back_to(25).unwrap();
        assert_eq!((found(&one, 30), found(&two, 25)), (best(&scores, 30), best(&scores, 25)));
    }

    #[test]
    fn rows_without_scores_are_the_weakest() {
        let meter = Meter::default();
        let mut rescued = empty(&meter);
        let scores: Vec<[f32; 2]> = (0..20).map(|at| [if at < 12 { f32::INFINITY } else { at as f32 }; 2]).collect();
        compete(&mut rescued, SINK..12, &scores, 0);
        assert_eq!(found(&rescued, 12), [[3, 4, 5, 6, 7], [3, 4, 5, 6, 7]].map(Vec::from));
        let id = rescued.lists().id();
        compete(&mut rescued, 12..20, &scores, 0);
        assert_eq!(found(&rescued, 20), [[15, 16, 17, 18, 19], [15, 16, 17, 18, 19]].map(Vec::from));
        // A graph that reads the lists serves again.
        assert_eq!(rescued.lists().id(), id);
        rescued.back_to(6).unwrap();
        assert_eq!(found(&rescued, 6), [[3, 4, 5], [3, 4, 5]].map(Vec::from));
    }
}
