//! How decode divides rows among threads (split-K).

use super::{block::BLOCK, views::MAX_SEGMENTS};

/// Rows that are read without a break by one thread, where threads divide the rows.
///
/// Few rows are divided at multiples of a fixed number, so that sums, and with them the last bits of a result, do not depend
/// on how many more rows a store has room for. Many are divided into a fixed number of chunks of about as many blocks, so
/// that threads end at about the same time.
pub(super) struct Chunks {
    rows: [usize; MAX_SEGMENTS],
    /// Chunks of each segment.
    pub n: [usize; MAX_SEGMENTS],
    are_few: bool,
}

impl Chunks {
    /// Chunks of many rows, but for rounding up.
    const N: usize = 16;
    /// Blocks of a chunk of few rows, and at the least.
    const MIN_BLOCKS: usize = 2;
    /// Blocks, up to which rows are few.
    const FEW_BLOCKS: usize = 64;

    pub(super) fn new(rows: [usize; MAX_SEGMENTS]) -> Chunks {
        let blocks = rows.map(|rows| rows.div_ceil(BLOCK));
        let total: usize = blocks.iter().sum();
        let are_few = total <= Chunks::FEW_BLOCKS;
        let n = blocks.map(|blocks| {
            let most = blocks.div_ceil(Chunks::MIN_BLOCKS);
            if are_few { most } else { (Chunks::N * blocks).div_ceil(total).min(most) }
        });
        Chunks { rows, n, are_few }
    }

    /// Chunks of all segments.
    pub(super) fn total(&self) -> usize {
        self.n.iter().sum()
    }

    /// The chunks of a chunk's segment.
    pub(super) fn segment(&self, chunk: usize) -> std::ops::Range<usize> {
        let mut start = 0;
        for n in self.n {
            if chunk < start + n {
                return start..start + n;
            }
            start += n;
        }
        unreachable!("the index is below the total")
    }

    /// A chunk's segment and rows.
    pub(super) fn get(&self, mut index: usize) -> (usize, std::ops::Range<usize>) {
        for (segment, (&rows, &n)) in self.rows.iter().zip(&self.n).enumerate() {
            if index < n {
                let block = |i| if self.are_few { i * Chunks::MIN_BLOCKS } else { i * rows.div_ceil(BLOCK) / n };
                return (segment, block(index) * BLOCK..(block(index + 1) * BLOCK).min(rows));
            }
            index -= n;
        }
        unreachable!("the index is below the total")
    }
}
