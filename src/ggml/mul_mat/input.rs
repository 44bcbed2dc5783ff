//! What is multiplied, quantised to eight bits in blocks of 32.
//!
//! Vectors are kept in arrays that loops with constant bounds index, as in `attention::kernels`.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    formats::Layout,
    product::Product,
    simd::{max_of_lanes, sum_of_lanes},
};

/// Elements with a scale in common.
pub(super) const BLOCK: usize = 32;

/// Some vectors, or the same elements of each, quantised for weights of one format.
#[derive(Default)]
pub(super) struct Input {
    /// Elements of a vector.
    len: usize,
    /// Elements of a group of the weights.
    group: usize,
    /// Between −127 and 127.
    numbers: Vec<i8>,
    /// By block.
    scales: Vec<f32>,
    /// Each group's sum of numbers, times its scale.
    sums: Vec<f32>,
    /// Each group's sum of numbers, times minus the offset of the weights: what a sum of products begins with.
    starts: Vec<i32>,
}

/// One vector of an [`Input`].
#[derive(Clone, Copy)]
pub(super) struct Vector {
    pub numbers: *const i8,
    pub scales: *const f32,
    pub sums: *const f32,
    pub starts: *const i32,
}

impl Input {
    /// Takes `n` vectors from number `first` of the product's input on, of each `len` elements from number `from` on.
    ///
    /// # Safety
    /// They exist, `len` is a multiple of a step; the processor has the features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn quantize<F: Layout>(&mut self, product: &Product, first: usize, n: usize, from: usize, len: usize) {
        let (blocks, groups) = (len / BLOCK, len / F::GROUP);
        (self.len, self.group) = (len, F::GROUP);
        if self.numbers.len() < n * len {
            self.numbers.resize(n * len, 0);
        }
        if self.scales.len() < n * blocks {
            self.scales.resize(n * blocks, 0.0);
        }
        if self.sums.len() < n * groups {
            self.sums.resize(n * groups, 0.0);
            self.starts.resize(n * groups, 0);
        }
        for i in 0..n {
            let numbers = &mut self.numbers[i * len..][..len];
            let scales = &mut self.scales[i * blocks..][..blocks];
            let sums = &mut self.sums[i * groups..][..groups];
            let starts = &mut self.starts[i * groups..][..groups];
            // SAFETY: as the caller says.
            let vector = unsafe { product.vector(first + i).add(from) };
            for (b, (numbers, scale)) in numbers.chunks_exact_mut(BLOCK).zip(scales).enumerate() {
                // SAFETY: the vector has the block; a chunk is 32 bytes.
                let block = unsafe {
                    let block = quantize_block(vector.add(b * BLOCK));
                    _mm256_storeu_si256(numbers.as_mut_ptr().cast(), block.numbers);
                    block
                };
                *scale = block.scale;
                let [low, high] = block.sums;
                if F::GROUP == BLOCK {
                    sums[b] = (low + high) as f32 * block.scale;
                    starts[b] = (low + high) * -F::OFFSET;
                } else {
                    for (i, sum) in block.sums.into_iter().enumerate() {
                        sums[2 * b + i] = sum as f32 * block.scale;
                        starts[2 * b + i] = sum * -F::OFFSET;
                    }
                }
            }
        }
    }

    /// # Safety
    /// The vector was quantised.
    pub unsafe fn vector(&self, index: usize) -> Vector {
        let (blocks, groups) = (self.len / BLOCK, self.len / self.group);
        // SAFETY: as the caller says.
        unsafe {
            Vector {
                numbers: self.numbers.as_ptr().add(index * self.len),
                scales: self.scales.as_ptr().add(index * blocks),
                sums: self.sums.as_ptr().add(index * groups),
                starts: self.starts.as_ptr().add(index * groups),
            }
        }
    }
}

impl Vector {
    /// Scales of the blocks of the step that begins with element `at`, zeros behind them.
    ///
    /// # Safety
    /// The vector has the step; the processor has the features.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn scales_of_step<F: Layout>(self, at: usize) -> __m256 {
        // SAFETY: as the caller says.
        unsafe {
            let scales = self.scales.add(at / BLOCK);
            if F::STEP == 64 {
                _mm256_zextps128_ps256(_mm_castpd_ps(_mm_load_sd(scales.cast())))
            } else {
                _mm256_loadu_ps(scales)
            }
        }
    }

    /// Sums of the eight groups from number `8 × part` of the step that begins with element `at`, zeros behind them.
    ///
    /// # Safety
    /// As [`Vector::scales_of_step`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn sums_of_step<F: Layout>(self, at: usize, part: usize) -> __m256 {
        // SAFETY: as the caller says.
        unsafe {
            let sums = self.sums.add(at / F::GROUP + 8 * part);
            if F::STEP == 64 {
                _mm256_zextps128_ps256(_mm_castpd_ps(_mm_load_sd(sums.cast())))
            } else {
                _mm256_loadu_ps(sums)
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
