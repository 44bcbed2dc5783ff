//! Keys and values in tiles: the inner loops read nothing but codes. A channel's scale goes into the query, and a token's
//! multiplies the score; of values a token's goes into the softmax's weight, and a channel's into what the tile sums up to.
#![allow(clippy::needless_range_loop)]

use super::{
    block::{BLOCK, RowPtr},
    products::{Element, add_values, scores_of},
    simd::{Simd, f16_to_f32},
};
use crate::ggml::tiles::{Layout, channels};

/// Codes of four bits.
pub(super) struct Codes4;
/// Codes of three: of 32 the lower two bits, then the upper ones.
pub(super) struct Codes3;
/// Codes of two.
pub(super) struct Codes2;

impl Element for Codes4 {
    const BLOCK: usize = 32;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        16 * (i / 32)
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the block exists.
        unsafe { V::load_nibbles(row.add(Self::offset(i)), i % 32) }
    }
}

impl Element for Codes3 {
    const BLOCK: usize = 32;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        12 * (i / 32)
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the block exists.
        unsafe {
            let block = row.add(Self::offset(i));
            V::load_twos(block, i % 32).add(V::load_fours(block.add(8), i % 32))
        }
    }
}

impl Element for Codes2 {
    const BLOCK: usize = 32;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        8 * (i / 32)
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the block exists.
        unsafe { V::load_twos(row.add(Self::offset(i)), i % 32) }
    }
}

/// A KV head's tile, of which the first `codes.n` rows are looked at.
#[derive(Clone, Copy)]
pub(super) struct TilePtr {
    pub codes: RowPtr,
    pub layout: Layout,
    /// Room for 2 rows of elements and one for each query vector of a group.
    pub room: *mut f32,
}

impl TilePtr {
    /// Elements of [`TilePtr::room`].
    pub const fn room(size: usize, group: usize) -> usize {
        (2 + group) * size
    }

    /// The channels' scales and means.
    #[inline(always)]
    unsafe fn channels(&self) -> [*mut f32; 2] {
        let Layout { size, .. } = self.layout;
        // SAFETY: a tile has this layout; there is room.
        unsafe {
            let tile = std::slice::from_raw_parts(self.codes.data, self.layout.bytes());
            let (scales, means) = std::slice::from_raw_parts_mut(self.room, 2 * size).split_at_mut(size);
            channels(self.layout, tile, scales, means);
        }
        [self.room, self.room.wrapping_add(size)]
    }

    /// Where a vector of a group lies.
    #[inline(always)]
    fn vector(&self, g: usize) -> *mut f32 {
        self.room.wrapping_add((2 + g) * self.layout.size)
    }

    /// The scales of the tokens from `r` on, as many as a vector has lanes.
    #[inline(always)]
    unsafe fn tokens<V: Simd>(&self, r: usize) -> V {
        // SAFETY: a tile has scales of BLOCK tokens.
        unsafe { V::load_f16(self.codes.data.add(self.layout.tokens()).cast::<u16>().add(r)) }
    }
}

/// `scores[g × BLOCK + r] = queries[g] · keys[r]`, as `kernels::scores_of`.
#[inline(always)]
pub(super) unsafe fn scores_of_tile<V: Simd, E: Element, const G: usize>(
    queries: *const f32,
    query_stride: usize,
    tile: TilePtr,
    scores: *mut f32,
) {
    let Layout { size, .. } = tile.layout;
    // SAFETY: the caller's, as for `scores_of`; the tile and its room are as large as they say.
    unsafe {
        let [scales, means] = tile.channels();
        let (mut of_scales, mut of_means) = ([0.0; G], [0.0; G]);
        for g in 0..G {
            let (mut scaled, mut offset) = (V::splat(0.0), V::splat(0.0));
            for j in (0..size).step_by(V::LANES) {
                let query = V::load(queries.add(g * query_stride + j));
                let product = query.mul(V::load(scales.add(j)));
                product.store(tile.vector(g).add(j));
                scaled = scaled.add(product);
                offset = query.mul_add(V::load(means.add(j)), offset);
            }
            of_scales[g] = scaled.h_sum() * tile.layout.middle();
            of_means[g] = offset.h_sum();
        }
        scores_of::<V, E, G>(tile.vector(0), size, tile.codes, size, scores);
        for r in (0..tile.codes.n).step_by(V::LANES) {
            let token = tile.tokens::<V>(r);
            for g in 0..G {
                let at = scores.add(g * BLOCK + r);
                let score = V::load(at).sub(V::splat(of_scales[g]));
                score.mul_add(token, V::splat(of_means[g])).store(at);
            }
        }
    }
}

/// `out[g] = factors[g] × out[g] + Σ weights[g × BLOCK + r] × values[r]`, as `kernels::add_values`. The weights become those
/// of the codes.
#[inline(always)]
pub(super) unsafe fn add_values_of_tile<V: Simd, E: Element, const G: usize>(
    weights: *mut f32,
    tile: TilePtr,
    factors: &[f32; G],
    out: *mut f32,
    out_stride: usize,
) {
    let Layout { size, .. } = tile.layout;
    // SAFETY: as above; weights behind the last row, up to a whole vector, are zero.
    unsafe {
        let [scales, means] = tile.channels();
        let (mut of_codes, mut of_means) = ([0.0; G], [0.0; G]);
        for g in 0..G {
            let (mut scaled, mut whole) = (V::splat(0.0), V::splat(0.0));
            for r in (0..tile.codes.n).step_by(V::LANES) {
                let at = weights.add(g * BLOCK + r);
                let weight = V::load(at);
                let product = weight.mul(tile.tokens::<V>(r));
                product.store(at);
                scaled = scaled.add(product);
                whole = whole.add(weight);
            }
            of_codes[g] = scaled.h_sum() * tile.layout.middle();
            of_means[g] = whole.h_sum();
            for j in (0..size).step_by(V::LANES) {
                V::splat(0.0).store(tile.vector(g).add(j));
            }
        }
        add_values::<V, E, G>(weights, tile.codes, size, &[0.0; G], tile.vector(0), size);
        for g in 0..G {
            for j in (0..size).step_by(V::LANES) {
                let at = out.add(g * out_stride + j);
                let sum = V::load(tile.vector(g).add(j)).sub(V::splat(of_codes[g]));
                let before = V::load(at).mul(V::splat(factors[g]));
                let with_mean = V::load(means.add(j)).mul_add(V::splat(of_means[g]), before);
                sum.mul_add(V::load(scales.add(j)), with_mean).store(at);
            }
        }
    }
}

/// A tile's rows as f32, `to_stride` elements apart.
#[inline(always)]
pub(super) unsafe fn convert_tile<V: Simd, E: Element>(tile: TilePtr, to: *mut f32, to_stride: usize) {
    let Layout { size, .. } = tile.layout;
    // SAFETY: as above; `to` has room for the rows.
    unsafe {
        let [scales, means] = tile.channels();
        for r in 0..tile.codes.n {
            let (row, to) = (tile.codes.at(r), to.add(r * to_stride));
            let token = tile.codes.data.add(tile.layout.tokens()).cast::<u16>().add(r).read_unaligned();
            let token = V::splat(f16_to_f32(token));
            for j in (0..size).step_by(V::LANES) {
                let code = E::load::<V>(row.add(E::offset(j)), j % E::BLOCK).sub(V::splat(tile.layout.middle()));
                code.mul(token).mul_add(V::load(scales.add(j)), V::load(means.add(j))).store(to.add(j));
            }
        }
    }
}
