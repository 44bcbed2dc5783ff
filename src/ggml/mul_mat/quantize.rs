//! Quantises the input, for AVX2 with FMA and F16C.
//!
//! Vectors are kept in arrays that loops with constant bounds index, as in `attention::kernels`.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    input::{BLOCK, Scheme},
    simd::{max_of_lanes, sum_of_lanes},
};

/// See [`super::input::Quantize`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize(scheme: Scheme, from: *const f32, len: usize, to: *mut u8) {
    // SAFETY: the slice has the blocks and groups; a block of numbers is 32 bytes.
    unsafe {
        let scales = to.add(len).cast::<f32>();
        let sums = scales.add(len / BLOCK);
        let starts = sums.add(len / BLOCK * scheme.groups).cast::<i32>();
        for b in 0..len / BLOCK {
            let block = quantize_block(from.add(b * BLOCK));
            _mm256_storeu_si256(to.add(b * BLOCK).cast(), block.numbers);
            *scales.add(b) = block.scale;
            let [low, high] = block.sums;
            if scheme.groups == 1 {
                *sums.add(b) = (low + high) as f32 * block.scale;
                *starts.add(b) = (low + high) * -scheme.offset;
            } else {
                for (i, sum) in block.sums.into_iter().enumerate() {
                    *sums.add(2 * b + i) = sum as f32 * block.scale;
                    *starts.add(2 * b + i) = sum * -scheme.offset;
                }
            }
        }
    }
}

/// 32 elements as 8-bit numbers with a scale.
pub(in crate::ggml) struct QuantizedBlock {
    pub numbers: __m256i,
    pub scale: f32,
    /// Of the first 16 numbers, and of the last.
    pub sums: [i32; 2],
}

/// # Safety
/// 32 elements; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::ggml) unsafe fn quantize_block(from: *const f32) -> QuantizedBlock {
    let sign = _mm256_set1_ps(-0.0);
    let mut x = [_mm256_setzero_ps(); 4];
    let mut largest = _mm256_setzero_ps();
    for i in 0..4 {
        // SAFETY: as the caller says.
        x[i] = unsafe { _mm256_loadu_ps(from.add(8 * i)) };
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, x[i]));
    }
    let largest = max_of_lanes(largest);
    let factor = _mm256_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
    let mut whole = [_mm256_setzero_si256(); 4];
    for i in 0..4 {
        whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], factor));
    }
    let low = _mm256_packs_epi32(whole[0], whole[1]);
    let high = _mm256_packs_epi32(whole[2], whole[3]);
    // Packing works on each half of a register by itself; this puts the fours into their order.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let numbers = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    // Exact: a sum is 16 × 127 at most.
    let low = sum_of_lanes(_mm256_cvtepi32_ps(_mm256_add_epi32(whole[0], whole[1]))) as i32;
    let high = sum_of_lanes(_mm256_cvtepi32_ps(_mm256_add_epi32(whole[2], whole[3]))) as i32;
    QuantizedBlock { numbers, scale: largest / 127.0, sums: [low, high] }
}
