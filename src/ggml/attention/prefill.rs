//! Many queries, as in prefill: threads divide the queries into tiles, and rows are converted once for a tile.

use std::ops::Range;

use super::{
    block::BLOCK,
    call::Call,
    kernels::{Isa, OnlineSoftmax, Tile},
    scratch::{Scratch, padded},
    tiled::TilePtr,
    views::Sight,
};

/// Queries of a tile, at most.
const TILE: usize = 64;

impl Call<'_> {
    /// Attends for many queries.
    ///
    /// # Safety
    /// The tensors have memory, this is one of the threads of the node's run, and the processor has the features.
    pub(super) unsafe fn prefill<I: Isa>(&self, scratch: &mut Scratch) {
        let lanes = 2 * I::LANES;
        let enough = 4 * self.n_threads;
        let mut tile = TILE;
        while tile > lanes && self.kv_heads * self.n.div_ceil(tile) < enough {
            tile /= 2;
        }
        let n_tiles = self.n.div_ceil(tile);
        // Heads that share a KV head go together, so that its rows are converted once, unless there are too few of
        // them for the threads.
        let together = if self.kv_heads * n_tiles < enough { 1 } else { self.group };
        let per_tile = self.heads / together;
        self.share(n_tiles * per_tile, 1, |item| {
            // The last queries see the most rows: they come first, so that threads end at about the same time.
            let first = (n_tiles - 1 - item / per_tile) * tile;
            let head = item % per_tile * together;
            // SAFETY: as the caller says.
            unsafe {
                self.attend_tile::<I>(scratch, first..(first + tile).min(self.n), head..head + together);
            }
        });
    }

    /// # Safety
    /// As [`Call::prefill`]; the heads share a KV head.
    unsafe fn attend_tile<I: Isa>(&self, scratch: &mut Scratch, queries: Range<usize>, heads: Range<usize>) {
        const MAX_LANE_BLOCKS: usize = TILE / 8;
        let lanes = 2 * I::LANES;
        let value_size = padded(self.value_size);
        let kv_head = heads.start / self.group;
        let lane_blocks = queries.len().div_ceil(lanes);
        // Vectors of lanes: one for each lane block of each head.
        let n_vectors = heads.len() * lane_blocks;
        let mut room = scratch.room(
            n_vectors * lanes * (self.key_size + value_size + 2)
                + BLOCK * (self.key_size + value_size)
                + BLOCK * lanes * (1 + lane_blocks)
                + TilePtr::room(self.key_size.max(self.value_size), 0)
                + 8 * 16,
        );
        let packed = room.take(n_vectors * lanes * self.key_size);
        let out = room.take(n_vectors * lanes * value_size);
        let max = room.take(n_vectors * lanes);
        let sum = room.take(n_vectors * lanes);
        let keys = room.take(BLOCK * self.key_size);
        let values = room.take(BLOCK * value_size);
        let scores = room.take(BLOCK * lanes);
        let mask_stride = lane_blocks * lanes;
        let mask_rows = room.take(BLOCK * mask_stride);
        let of_tiles = room.take(TilePtr::room(self.key_size.max(self.value_size), 0));
        // SAFETY: all pointers are into memory of the sizes just asked for, or of the tensors whose sizes were checked
        // when the operation was made.
        unsafe {
            std::slice::from_raw_parts_mut(out, n_vectors * lanes * value_size).fill(0.0);
            std::slice::from_raw_parts_mut(max, n_vectors * lanes).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(sum, n_vectors * lanes).fill(0.0);
            for (h, head) in heads.clone().enumerate() {
                for lane in 0..mask_stride {
                    let block = packed.add((h * lane_blocks + lane / lanes) * lanes * self.key_size + lane % lanes);
                    // Lanes without a query have zeros; what becomes of them is not looked at.
                    let query = queries.start + lane;
                    let from = (query < queries.end).then(|| self.query(query, head));
                    for i in 0..self.key_size {
                        *block.add(i * lanes) = from.map_or(0.0, |from| *from.add(i) * self.factor);
                    }
                }
            }
            for segment in self.segments.iter().flatten() {
                let n_rows = segment.n_of(kv_head);
                for first in (0..n_rows).step_by(BLOCK) {
                    let n = BLOCK.min(n_rows - first);
                    let mut sights = [Sight::Everything; MAX_LANE_BLOCKS];
                    if let Some(mask) = segment.mask {
                        for (block, sight) in sights[..lane_blocks].iter_mut().enumerate() {
                            let start = queries.start + block * lanes;
                            *sight = mask.sight(start..(start + lanes).min(queries.end), first, n);
                        }
                        let all = sights[..lane_blocks].iter().copied().reduce(Sight::and);
                        match all {
                            Some(Sight::Nothing) => continue,
                            Some(Sight::Some) => {
                                for lane in 0..queries.len() {
                                    for r in 0..n {
                                        *mask_rows.add(r * mask_stride + lane) =
                                            mask.get(queries.start + lane, first + r);
                                    }
                                }
                                for lane in queries.len()..mask_stride {
                                    for r in 0..n {
                                        *mask_rows.add(r * mask_stride + lane) = 0.0;
                                    }
                                }
                            }
                            _ => {}
                        }
                    }
                    let k = segment.k.at(kv_head, first, n);
                    segment.k.convert::<I>(k, self.key_size, (keys, self.key_size), of_tiles);
                    let v = segment.v.at(kv_head, first, n);
                    segment.v.convert::<I>(v, self.value_size, (values, value_size), of_tiles);
                    for vector in 0..n_vectors {
                        let block = vector % lane_blocks;
                        let mask = match sights[block] {
                            Sight::Nothing => continue,
                            Sight::Everything => std::ptr::null(),
                            Sight::Some => mask_rows.add(block * lanes).cast_const(),
                        };
                        I::add_tile(&Tile {
                            keys,
                            key_size: self.key_size,
                            values,
                            value_size,
                            n,
                            queries: packed.add(vector * lanes * self.key_size),
                            out: out.add(vector * lanes * value_size),
                            mask,
                            mask_stride,
                            max: max.add(vector * lanes),
                            sum: sum.add(vector * lanes),
                            scores,
                            shape: self.shape,
                        });
                    }
                }
            }
            for (h, head) in heads.clone().enumerate() {
                for query in queries.clone() {
                    let lane = query - queries.start;
                    let vector = h * lane_blocks + lane / lanes;
                    let lane = lane % lanes;
                    let softmax =
                        OnlineSoftmax { max: *max.add(vector * lanes + lane), sum: *sum.add(vector * lanes + lane) };
                    let factor = self.finish(head, softmax);
                    let to = self.out.add((query * self.heads + head) * self.value_size);
                    let from = out.add(vector * lanes * value_size + lane);
                    for i in 0..self.value_size {
                        *to.add(i) = *from.add(i * lanes) * factor;
                    }
                }
            }
        }
    }
}
