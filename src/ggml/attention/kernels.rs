//! The inner loops, generic over vectors and element types. Scores are in units of log2: queries come multiplied by
//! `scale × log2 e`, so that a softmax is made of powers of two.
//!
//! Vectors are kept in arrays that loops with constant bounds index: iterators and `from_fn` take closures, and a
//! closure that is not inlined would be compiled without the processor's features.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::{
    block::{BLOCK, RowPtr},
    products::{Element, Q4, add_values, scores_of},
    simd::{Portable, Simd, exp2, tanh},
    tiled::{TilePtr, add_values_of_tile, convert_tile, scores_of_tile},
};
#[cfg(target_arch = "x86_64")]
use super::{
    q4,
    x86::{Avx2, Avx512},
};

/// The state of an online softmax: the largest score so far and the sum of powers relative to it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct OnlineSoftmax {
    pub max: f32,
    pub sum: f32,
}

impl OnlineSoftmax {
    pub const EMPTY: OnlineSoftmax = OnlineSoftmax { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// How scores become the softmax's arguments.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// `cap × log2 e` of a soft cap; 0 for none. Scores then come divided by the cap, and not multiplied by log2 e.
    pub cap: f32,
}

/// Turns the scores of `n` rows, of each vector of a group, into weights relative to the new maximum. The factors for what was
/// summed up before.
///
/// A mask hides the elements after the last row; without one `n` is a multiple of the lanes.
#[inline(always)]
unsafe fn weights_of<V: Simd, const G: usize>(
    scores: *mut f32,
    n: usize,
    masks: &[*const f32; 4],
    shape: Shape,
    states: [*mut OnlineSoftmax; G],
) -> [f32; G] {
    // SAFETY: scores have G × BLOCK elements, and each mask where there is one BLOCK; each state is the caller's alone.
    unsafe {
        let padded = n.next_multiple_of(V::LANES);
        let mut max = [V::splat(f32::NEG_INFINITY); G];
        for g in 0..G {
            for r in n..padded {
                *scores.add(g * BLOCK + r) = 0.0;
            }
        }
        for r in (0..padded).step_by(V::LANES) {
            for g in 0..G {
                let at = scores.add(g * BLOCK + r);
                let mut score = V::load(at);
                if shape.cap != 0.0 {
                    score = tanh(score).mul(V::splat(shape.cap));
                }
                if !masks[g].is_null() {
                    score = score.add(V::load(masks[g].add(r)));
                }
                if shape.cap != 0.0 || !masks[g].is_null() {
                    score.store(at);
                }
                max[g] = max[g].max(score);
            }
        }
        let mut changes = [0.0; 16];
        for g in 0..G {
            let before = (*states[g]).max;
            let after = before.max(max[g].h_max());
            (*states[g]).max = after;
            // Where nothing was seen yet there is no finite maximum to subtract.
            let finite = after.max(f32::MIN);
            changes[g] = before - finite;
            max[g] = V::splat(finite);
        }
        exp2(V::load(changes.as_ptr())).store(changes.as_mut_ptr());
        let mut factors = [0.0; G];
        factors.copy_from_slice(&changes[..G]);
        let mut sum = [V::splat(0.0); G];
        for r in (0..padded).step_by(V::LANES) {
            for g in 0..G {
                let at = scores.add(g * BLOCK + r);
                let weight = exp2(V::load(at).sub(max[g]));
                weight.store(at);
                sum[g] = sum[g].add(weight);
            }
        }
        for g in 0..G {
            (*states[g]).sum = (*states[g]).sum * factors[g] + sum[g].h_sum();
        }
        factors
    }
}

/// Adds a split-K partial to another: `size` values, whole vectors, and after them their online softmax state. The values of
/// one that has seen nothing are not read.
#[inline(always)]
unsafe fn add_partial<V: Simd>(to: *mut f32, from: *const f32, size: usize) {
    // SAFETY: the caller's; the partials lie apart.
    unsafe {
        let at = to.add(size).cast::<OnlineSoftmax>();
        let (a, b) = (at.read(), from.add(size).cast::<OnlineSoftmax>().read());
        if b.max == f32::NEG_INFINITY {
            return;
        }
        if a.max == f32::NEG_INFINITY {
            std::ptr::copy_nonoverlapping(from, to, size);
            at.write(b);
            return;
        }
        let max = a.max.max(b.max);
        let factors = [exp2(V::splat(a.max - max)), exp2(V::splat(b.max - max))];
        let sum = V::splat(b.sum).mul_add(factors[1], V::splat(a.sum).mul(factors[0]));
        at.write(OnlineSoftmax { max, sum: sum.h_max() });
        for i in (0..size).step_by(V::LANES) {
            let (to, from) = (to.add(i), V::load(from.add(i)));
            from.mul_add(factors[1], V::load(to).mul(factors[0])).store(to);
        }
    }
}

/// Rows as f32, `to_stride` elements apart.
#[inline(always)]
unsafe fn convert<V: Simd, E: Element>(rows: RowPtr, size: usize, to: *mut f32, to_stride: usize) {
    let step = E::BLOCK.max(V::LANES);
    // SAFETY: rows have `size` elements, and `to` room for as many in each of its rows.
    unsafe {
        for r in 0..rows.n {
            let (row, to) = (rows.at(r), to.add(r * to_stride));
            let mut i = 0;
            while i + step <= size {
                let block = row.add(E::offset(i));
                for c in 0..step / V::LANES {
                    E::load::<V>(block, c * V::LANES).store(to.add(i + c * V::LANES));
                }
                i += step;
            }
            for i in i..size {
                *to.add(i) = E::get(row, i);
            }
        }
    }
}

// Prefill: lanes are queries, so that nothing is ever summed or compared across lanes. Two vectors of queries of
// one head make a lane block.

/// A tile of keys and values as f32, against one lane block.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// `[rows][key size]`; rows after `n` up to a multiple of 8 exist.
    pub keys: *const f32,
    pub key_size: usize,
    /// `[rows][value size]`, the size padded to a multiple of 8.
    pub values: *const f32,
    pub value_size: usize,
    /// Rows, at most `BLOCK`.
    pub n: usize,
    /// `[key size][lane block]`
    pub queries: *const f32,
    /// `[value size][lane block]`
    pub out: *mut f32,
    /// `[rows][lanes]`, `mask_stride` apart; null for none.
    pub mask: *const f32,
    pub mask_stride: usize,
    /// The largest score and the sum so far, of each lane.
    pub max: *mut f32,
    pub sum: *mut f32,
    /// Room for `[BLOCK][lane block]`.
    pub scores: *mut f32,
    pub shape: Shape,
}

/// Adds a tile to a lane block's online softmax. `R` rows are taken at once in the products.
#[inline(always)]
unsafe fn add_tile<V: Simd, const R: usize>(tile: &Tile) {
    // SAFETY: the buffers are as large as `Tile` says, and R divides 8.
    unsafe {
        let lanes = 2 * V::LANES;
        let before = load_two::<V>(tile.max);
        let mut max = before;
        for first in (0..tile.n).step_by(R) {
            let mut sums = [[V::splat(0.0); 2]; R];
            let keys = tile.keys.add(first * tile.key_size);
            for i in 0..tile.key_size {
                let query = load_two::<V>(tile.queries.add(i * lanes));
                for r in 0..R {
                    let key = V::splat(*keys.add(r * tile.key_size + i));
                    sums[r] = [key.mul_add(query[0], sums[r][0]), key.mul_add(query[1], sums[r][1])];
                }
            }
            for r in 0..R {
                if first + r >= tile.n {
                    break;
                }
                let mut score = sums[r];
                if tile.shape.cap != 0.0 {
                    let cap = V::splat(tile.shape.cap);
                    score = [tanh(score[0]).mul(cap), tanh(score[1]).mul(cap)];
                }
                if !tile.mask.is_null() {
                    let mask = load_two::<V>(tile.mask.add((first + r) * tile.mask_stride));
                    score = [score[0].add(mask[0]), score[1].add(mask[1])];
                }
                store_two(score, tile.scores.add((first + r) * lanes));
                max = [max[0].max(score[0]), max[1].max(score[1])];
            }
        }
        store_two(max, tile.max);
        // A lane that has seen nothing yet has no finite maximum to subtract.
        let lowest = V::splat(f32::MIN);
        let max = [max[0].max(lowest), max[1].max(lowest)];
        let factor = [exp2(before[0].sub(max[0])), exp2(before[1].sub(max[1]))];
        let mut sum = load_two::<V>(tile.sum);
        sum = [sum[0].mul(factor[0]), sum[1].mul(factor[1])];
        for r in 0..tile.n {
            let score = load_two::<V>(tile.scores.add(r * lanes));
            let weight = [exp2(score[0].sub(max[0])), exp2(score[1].sub(max[1]))];
            store_two(weight, tile.scores.add(r * lanes));
            sum = [sum[0].add(weight[0]), sum[1].add(weight[1])];
        }
        store_two(sum, tile.sum);

        for first in (0..tile.value_size).step_by(R) {
            let out = tile.out.add(first * lanes);
            let mut sums = [[V::splat(0.0); 2]; R];
            for i in 0..R {
                let out = load_two::<V>(out.add(i * lanes));
                sums[i] = [out[0].mul(factor[0]), out[1].mul(factor[1])];
            }
            for r in 0..tile.n {
                let weight = load_two::<V>(tile.scores.add(r * lanes));
                let values = tile.values.add(r * tile.value_size + first);
                for i in 0..R {
                    let value = V::splat(*values.add(i));
                    sums[i] = [value.mul_add(weight[0], sums[i][0]), value.mul_add(weight[1], sums[i][1])];
                }
            }
            for i in 0..R {
                store_two(sums[i], out.add(i * lanes));
            }
        }
    }
}

#[inline(always)]
unsafe fn load_two<V: Simd>(from: *const f32) -> [V; 2] {
    // SAFETY: good for two vectors, says the caller.
    unsafe { [V::load(from), V::load(from.add(V::LANES))] }
}

#[inline(always)]
unsafe fn store_two<V: Simd>(pair: [V; 2], to: *mut f32) {
    // SAFETY: good for two vectors, says the caller.
    unsafe {
        pair[0].store(to);
        pair[1].store(to.add(V::LANES));
    }
}

/// The kernels as compiled for one set of processor features.
///
/// # Safety
/// The processor has the features. Beyond that each method has the demands of the function it stands for.
pub(super) trait Isa {
    const LANES: usize;
    const MAX_GROUP: usize;

    unsafe fn scores_of<E: Element, const G: usize>(
        q: *const f32,
        q_stride: usize,
        k: RowPtr,
        size: usize,
        s: *mut f32,
    );
    unsafe fn weights_of<const G: usize>(
        scores: *mut f32,
        n: usize,
        masks: &[*const f32; 4],
        shape: Shape,
        states: [*mut OnlineSoftmax; G],
    ) -> [f32; G];
    unsafe fn add_values<E: Element, const G: usize>(
        weights: *const f32,
        values: RowPtr,
        size: usize,
        factors: &[f32; G],
        out: *mut f32,
        out_stride: usize,
    );
    unsafe fn add_partial(to: *mut f32, from: *const f32, size: usize);
    unsafe fn convert<E: Element>(rows: RowPtr, size: usize, to: *mut f32, to_stride: usize);
    unsafe fn add_tile(tile: &Tile);
    unsafe fn scores_of_tile<E: Element, const G: usize>(q: *const f32, q_stride: usize, k: TilePtr, s: *mut f32);
    unsafe fn add_values_of_tile<E: Element, const G: usize>(
        weights: *mut f32,
        values: TilePtr,
        factors: &[f32; G],
        out: *mut f32,
        out_stride: usize,
    );
    unsafe fn convert_tile<E: Element>(tile: TilePtr, to: *mut f32, to_stride: usize);

    /// Elements of what [`Isa::pack_q4`] makes of a query; 0 where [`Q4`] keys have no kernel of their own.
    fn packed_q4(_size: usize) -> usize {
        0
    }

    /// A query as [`Isa::scores_of_q4`] wants it.
    unsafe fn pack_q4(_query: *const f32, _size: usize, _to: *mut f32) {}

    /// `scores_of` for [`Q4`], with packed queries.
    unsafe fn scores_of_q4<const G: usize>(_packed: *const f32, _k: RowPtr, _size: usize, _s: *mut f32) {}

    /// `add_values` for [`Q4`].
    #[inline]
    unsafe fn add_values_q4<const G: usize>(
        weights: *const f32,
        values: RowPtr,
        size: usize,
        factors: &[f32; G],
        out: *mut f32,
        out_stride: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { Self::add_values::<Q4, G>(weights, values, size, factors, out, out_stride) }
    }
}

/// Implements `Isa` for a vector type. The generic kernels are inlined into functions with the features switched on.
macro_rules! isa {
    ($vector:ty, $rows:literal $(, #[$features:meta])? $(, { $($own:item)* })?) => {
        impl Isa for $vector {
            const LANES: usize = <$vector as Simd>::LANES;
            const MAX_GROUP: usize = <$vector as Simd>::MAX_GROUP;

            #[inline]
            unsafe fn scores_of<E: Element, const G: usize>(
                q: *const f32,
                q_stride: usize,
                k: RowPtr,
                size: usize,
                s: *mut f32,
            ) {
                $(#[$features])?
                unsafe fn inner<E: Element, const G: usize>(
                    q: *const f32,
                    q_stride: usize,
                    k: RowPtr,
                    size: usize,
                    s: *mut f32,
                ) {
                    // SAFETY: the caller's.
                    unsafe { scores_of::<$vector, E, G>(q, q_stride, k, size, s) }
                }
                // SAFETY: the caller's.
                unsafe { inner::<E, G>(q, q_stride, k, size, s) }
            }

            #[inline]
            unsafe fn weights_of<const G: usize>(
                scores: *mut f32,
                n: usize,
                masks: &[*const f32; 4],
                shape: Shape,
                states: [*mut OnlineSoftmax; G],
            ) -> [f32; G] {
                $(#[$features])?
                unsafe fn inner<const G: usize>(
                    scores: *mut f32,
                    n: usize,
                    masks: &[*const f32; 4],
                    shape: Shape,
                    states: [*mut OnlineSoftmax; G],
                ) -> [f32; G] {
                    // SAFETY: the caller's.
                    unsafe { weights_of::<$vector, G>(scores, n, masks, shape, states) }
                }
                // SAFETY: the caller's.
                unsafe { inner(scores, n, masks, shape, states) }
            }

            #[inline]
            unsafe fn add_values<E: Element, const G: usize>(
                weights: *const f32,
                values: RowPtr,
                size: usize,
                factors: &[f32; G],
                out: *mut f32,
                out_stride: usize,
            ) {
                $(#[$features])?
                unsafe fn inner<E: Element, const G: usize>(
                    weights: *const f32,
                    values: RowPtr,
                    size: usize,
                    factors: &[f32; G],
                    out: *mut f32,
                    out_stride: usize,
                ) {
                    // SAFETY: the caller's.
                    unsafe { add_values::<$vector, E, G>(weights, values, size, factors, out, out_stride) }
                }
                // SAFETY: the caller's.
                unsafe { inner::<E, G>(weights, values, size, factors, out, out_stride) }
            }

            #[inline]
            unsafe fn add_partial(to: *mut f32, from: *const f32, size: usize) {
                $(#[$features])?
                unsafe fn inner(to: *mut f32, from: *const f32, size: usize) {
                    // SAFETY: the caller's.
                    unsafe { add_partial::<$vector>(to, from, size) }
                }
                // SAFETY: the caller's.
                unsafe { inner(to, from, size) }
            }

            #[inline]
            unsafe fn convert<E: Element>(rows: RowPtr, size: usize, to: *mut f32, to_stride: usize) {
                $(#[$features])?
                unsafe fn inner<E: Element>(rows: RowPtr, size: usize, to: *mut f32, to_stride: usize) {
                    // SAFETY: the caller's.
                    unsafe { convert::<$vector, E>(rows, size, to, to_stride) }
                }
                // SAFETY: the caller's.
                unsafe { inner::<E>(rows, size, to, to_stride) }
            }

            #[inline]
            unsafe fn add_tile(tile: &Tile) {
                $(#[$features])?
                unsafe fn inner(tile: &Tile) {
                    // SAFETY: the caller's.
                    unsafe { add_tile::<$vector, $rows>(tile) }
                }
                // SAFETY: the caller's.
                unsafe { inner(tile) }
            }

            #[inline]
            unsafe fn scores_of_tile<E: Element, const G: usize>(
                q: *const f32,
                q_stride: usize,
                k: TilePtr,
                s: *mut f32,
            ) {
                $(#[$features])?
                unsafe fn inner<E: Element, const G: usize>(
                    q: *const f32,
                    q_stride: usize,
                    k: TilePtr,
                    s: *mut f32,
                ) {
                    // SAFETY: the caller's.
                    unsafe { scores_of_tile::<$vector, E, G>(q, q_stride, k, s) }
                }
                // SAFETY: the caller's.
                unsafe { inner::<E, G>(q, q_stride, k, s) }
            }

            #[inline]
            unsafe fn add_values_of_tile<E: Element, const G: usize>(
                weights: *mut f32,
                values: TilePtr,
                factors: &[f32; G],
                out: *mut f32,
                out_stride: usize,
            ) {
                $(#[$features])?
                unsafe fn inner<E: Element, const G: usize>(
                    weights: *mut f32,
                    values: TilePtr,
                    factors: &[f32; G],
                    out: *mut f32,
                    out_stride: usize,
                ) {
                    // SAFETY: the caller's.
                    unsafe { add_values_of_tile::<$vector, E, G>(weights, values, factors, out, out_stride) }
                }
                // SAFETY: the caller's.
                unsafe { inner::<E, G>(weights, values, factors, out, out_stride) }
            }

            #[inline]
            unsafe fn convert_tile<E: Element>(tile: TilePtr, to: *mut f32, to_stride: usize) {
                $(#[$features])?
                unsafe fn inner<E: Element>(tile: TilePtr, to: *mut f32, to_stride: usize) {
                    // SAFETY: the caller's.
                    unsafe { convert_tile::<$vector, E>(tile, to, to_stride) }
                }
                // SAFETY: the caller's.
                unsafe { inner::<E>(tile, to, to_stride) }
            }

            $($($own)*)?
        }
    };
}

isa!(Portable, 2);
#[cfg(target_arch = "x86_64")]
isa!(Avx2, 4, #[target_feature(enable = "avx2,fma,f16c")], {
    fn packed_q4(size: usize) -> usize {
        q4::packed_len(size)
    }

    unsafe fn pack_q4(query: *const f32, size: usize, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { q4::pack(query, size, to) }
    }

    #[inline]
    unsafe fn scores_of_q4<const G: usize>(packed: *const f32, k: RowPtr, size: usize, s: *mut f32) {
        // SAFETY: the caller's.
        unsafe { q4::scores_of::<G>(packed, k, size, s) }
    }

    #[inline]
    unsafe fn add_values_q4<const G: usize>(
        weights: *const f32,
        values: RowPtr,
        size: usize,
        factors: &[f32; G],
        out: *mut f32,
        out_stride: usize,
    ) {
        // SAFETY: the caller's; weights after the last row are made zero by `weights_of`.
        unsafe { q4::add_values::<G>(weights, values, size, factors, out, out_stride) }
    }
});
#[cfg(target_arch = "x86_64")]
isa!(Avx512, 8, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]);
#[cfg(target_arch = "aarch64")]
isa!(Neon, 8);
