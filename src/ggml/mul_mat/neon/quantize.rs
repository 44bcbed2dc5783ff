//! Quantises the input.
#![allow(clippy::needless_range_loop)]

use std::arch::aarch64::*;

use super::super::input::{BLOCK, Scheme};

/// See [`super::super::input::Quantize`].
///
/// # Safety
/// As there.
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn quantize(scheme: Scheme, from: *const f32, len: usize, to: *mut u8) {
    // SAFETY: the slice has the blocks and groups.
    unsafe {
        let scales = to.add(len).cast::<f32>();
        let sums = scales.add(len / BLOCK);
        let starts = sums.add(len / BLOCK * scheme.groups).cast::<i32>();
        for b in 0..len / BLOCK {
            let block = quantize_block(from.add(b * BLOCK));
            for (half, numbers) in block.numbers.into_iter().enumerate() {
                vst1q_s8(to.add(b * BLOCK + 16 * half).cast(), numbers);
            }
            *scales.add(b) = block.scale;
            let of_halves = block.numbers.map(|numbers| i32::from(vaddlvq_s8(numbers)));
            if scheme.groups == 1 {
                *sums.add(b) = (of_halves[0] + of_halves[1]) as f32 * block.scale;
                *starts.add(b) = (of_halves[0] + of_halves[1]) * -scheme.offset;
            } else {
                for (half, sum) in of_halves.into_iter().enumerate() {
                    *sums.add(2 * b + half) = sum as f32 * block.scale;
                    *starts.add(2 * b + half) = sum * -scheme.offset;
                }
            }
        }
    }
}

/// 32 elements as 8-bit numbers with a scale.
pub(in crate::ggml) struct QuantizedBlock {
    pub numbers: [int8x16_t; 2],
    pub scale: f32,
}

/// # Safety
/// 32 elements.
#[inline]
#[target_feature(enable = "neon")]
pub(in crate::ggml) unsafe fn quantize_block(from: *const f32) -> QuantizedBlock {
    let mut x = [vdupq_n_f32(0.0); 8];
    let mut largest = vdupq_n_f32(0.0);
    for i in 0..8 {
        // SAFETY: as the caller says.
        x[i] = unsafe { vld1q_f32(from.add(4 * i)) };
        largest = vmaxnmq_f32(largest, vabsq_f32(x[i]));
    }
    let largest = vmaxnmvq_f32(largest);
    let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let mut numbers = [vdupq_n_s8(0); 2];
    for half in 0..2 {
        let whole = |i: usize| vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(x[4 * half + i], factor)));
        let [low, high] = [vcombine_s16(whole(0), whole(1)), vcombine_s16(whole(2), whole(3))];
        numbers[half] = vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
    }
    QuantizedBlock { numbers, scale: largest / 127.0 }
}
