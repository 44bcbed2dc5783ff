//! The inner loops over stored rows, generic over vectors and element types: see `kernels`.
#![allow(clippy::needless_range_loop)]

use super::{
    block::{BLOCK, RowPtr},
    simd::{Simd, f16_to_f32},
};

/// How a stored row's elements are read.
pub(super) trait Element {
    /// Elements that share a scale: a row is a whole number of these.
    const BLOCK: usize;
    /// Bytes up to element `i`, a multiple of `BLOCK`.
    fn offset(i: usize) -> usize;
    /// # Safety
    /// Elements `i..i + LANES` of the row exist, and lie in one block where `BLOCK > 1`; the features are there.
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V;
    /// # Safety
    /// As `load`, for element `i`; only called where `BLOCK` is 1.
    unsafe fn get(_row: *const u8, _i: usize) -> f32 {
        unreachable!("rows are whole blocks")
    }
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q8;
pub(super) struct Q4;

impl Element for F32 {
    const BLOCK: usize = 1;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        4 * i
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the elements exist.
        unsafe { V::load(row.cast::<f32>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(row: *const u8, i: usize) -> f32 {
        // SAFETY: the element exists.
        unsafe { row.cast::<f32>().add(i).read_unaligned() }
    }
}

impl Element for F16 {
    const BLOCK: usize = 1;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        2 * i
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the elements exist.
        unsafe { V::load_f16(row.cast::<u16>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(row: *const u8, i: usize) -> f32 {
        // SAFETY: the element exists.
        f16_to_f32(unsafe { row.cast::<u16>().add(i).read_unaligned() })
    }
}

impl Element for Bf16 {
    const BLOCK: usize = 1;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        2 * i
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the elements exist.
        unsafe { V::load_bf16(row.cast::<u16>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(row: *const u8, i: usize) -> f32 {
        // SAFETY: the element exists.
        f32::from_bits(u32::from(unsafe { row.cast::<u16>().add(i).read_unaligned() }) << 16)
    }
}

impl Element for Q8 {
    const BLOCK: usize = 32;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        34 * (i / 32)
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // A block is its scale, an f16, and 32 bytes.
        // SAFETY: the block exists.
        unsafe {
            let block = row.add(Self::offset(i));
            V::load_i8(block.add(2 + i % 32).cast()).mul(V::splat_f16(block.cast()))
        }
    }
}

impl Element for Q4 {
    const BLOCK: usize = 32;
    #[inline(always)]
    fn offset(i: usize) -> usize {
        18 * (i / 32)
    }
    #[inline(always)]
    unsafe fn load<V: Simd>(row: *const u8, i: usize) -> V {
        // SAFETY: the block exists.
        unsafe { V::load_q4(row.add(Self::offset(i)), i % 32) }
    }
}

// Decode: a key row is read into registers once for a group of G query vectors.

/// `scores[g × BLOCK + r] = queries[g] · keys[r]`. At most `BLOCK` rows; scores after the last row are undefined.
#[inline(always)]
pub(super) unsafe fn scores_of<V: Simd, E: Element, const G: usize>(
    queries: *const f32,
    query_stride: usize,
    keys: RowPtr,
    size: usize,
    scores: *mut f32,
) {
    let step = E::BLOCK.max(V::LANES);
    // SAFETY: `row` is at most the last one; queries have `size` elements, and scores room for BLOCK × G.
    unsafe {
        for first in (0..keys.n).step_by(4) {
            let last = keys.n - 1;
            let rows = [
                keys.at(first),
                keys.at((first + 1).min(last)),
                keys.at((first + 2).min(last)),
                keys.at((first + 3).min(last)),
            ];
            keys.prefetch.issue::<4>(first);
            let mut sums = [[V::splat(0.0); 4]; G];
            let mut i = 0;
            while i < size {
                let offset = E::offset(i);
                for c in 0..step / V::LANES {
                    let c = c * V::LANES;
                    // Queries first, then one key at a time: with AVX2 that is all the registers there are.
                    let mut query = [V::splat(0.0); G];
                    for g in 0..G {
                        query[g] = V::load(queries.add(g * query_stride + i + c));
                    }
                    for r in 0..4 {
                        let key = E::load::<V>(rows[r].add(offset), c);
                        for g in 0..G {
                            sums[g][r] = key.mul_add(query[g], sums[g][r]);
                        }
                    }
                }
                i += step;
            }
            for (g, sums) in sums.into_iter().enumerate() {
                V::sum_each(sums, scores.add(g * BLOCK + first));
            }
        }
    }
}

/// `out[g] = factors[g] × out[g] + Σ weights[g × BLOCK + r] × values[r]`
#[inline(always)]
pub(super) unsafe fn add_values<V: Simd, E: Element, const G: usize>(
    weights: *const f32,
    values: RowPtr,
    size: usize,
    factors: &[f32; G],
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: rows have `size` elements, out G × size, weights G × BLOCK.
    unsafe {
        let mut i = 0;
        while i + 4 * V::LANES <= size {
            add_values_at::<V, E, G, 4>(weights, values, i, factors, out.add(i), out_stride);
            i += 4 * V::LANES;
        }
        while i + 2 * V::LANES <= size {
            add_values_at::<V, E, G, 2>(weights, values, i, factors, out.add(i), out_stride);
            i += 2 * V::LANES;
        }
        while i < size {
            add_values_at::<V, E, G, 1>(weights, values, i, factors, out.add(i), out_stride);
            i += V::LANES;
        }
    }
}

/// `add_values` for the `C` vectors from element `i` on.
#[inline(always)]
unsafe fn add_values_at<V: Simd, E: Element, const G: usize, const C: usize>(
    weights: *const f32,
    values: RowPtr,
    i: usize,
    factors: &[f32; G],
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: as in `add_values`.
    unsafe {
        let mut sums = [[V::splat(0.0); C]; G];
        for g in 0..G {
            let factor = V::splat(factors[g]);
            for c in 0..C {
                sums[g][c] = V::load(out.add(g * out_stride + c * V::LANES)).mul(factor);
            }
        }
        for r in 0..values.n {
            let row = values.at(r);
            if i == 0 {
                values.prefetch.issue::<1>(r);
            }
            let row = row.add(E::offset(i));
            let mut value = [V::splat(0.0); C];
            for c in 0..C {
                // Narrow vectors may begin within a block.
                value[c] = E::load::<V>(row, i % E::BLOCK + c * V::LANES);
            }
            for g in 0..G {
                let weight = V::splat(*weights.add(g * BLOCK + r));
                for c in 0..C {
                    sums[g][c] = value[c].mul_add(weight, sums[g][c]);
                }
            }
        }
        for g in 0..G {
            for c in 0..C {
                sums[g][c].store(out.add(g * out_stride + c * V::LANES));
            }
        }
    }
}
