//! 256 elements in groups, whose scales, and for some minima, are multiples of the block's: q2_K to q6_K.

use std::arch::aarch64::*;

use super::format::{
    Format, Layout, Scales, bytes, float_of_half, floats_of_bytes, floats_of_signed_bytes, half_bytes, less, or,
};

#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q2_K;
#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q3_K;
#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q4_K;
#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q5_K;
#[allow(non_camel_case_types, reason = "the type's name")]
pub struct Q6_K;

/// The scales and minima that a block of q4_K or q5_K begins with: two in f16 and, in twelve bytes, eight of six bits each.
///
/// # Safety
/// Good for 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn six_bit_scales(block: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let ([a, b, c], scale, minimum) = unsafe {
        let six_bits = block.add(4).cast::<[u32; 3]>().read_unaligned();
        (six_bits, float_of_half(block), float_of_half(block.add(2)))
    };
    // Four bytes each: the first four scales, the first four minima, and the last of both, whose upper bits are with
    // the first's.
    let low = |x: u32| u64::from(x & 0x3f3f_3f3f);
    let high = |four: u32, two: u32| u64::from(four & 0x0f0f_0f0f | two >> 2 & 0x3030_3030) << 32;
    let scales = floats_of_bytes(vcreate_u8(low(a) | high(c, a)));
    let minima = floats_of_bytes(vcreate_u8(low(b) | high(c >> 4, b)));
    let zero = vdupq_n_f32(0.0);
    let times =
        |floats: [float32x4_t; 2], factor| [vmulq_n_f32(floats[0], factor), vmulq_n_f32(floats[1], factor), zero, zero];
    Scales { scales: times(scales, scale), minima: times(minima, -minimum) }
}

/// The numbers of part `part`, of four bits, in the lower or upper halves of the 32 bytes that it shares with another.
///
/// # Safety
/// Good for 128 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn four_bits(from: *const u8, part: usize) -> [uint8x16_t; 2] {
    // SAFETY: as the caller says.
    let halves = unsafe {
        let from = from.add(part / 2 * 32);
        [half_bytes(from), half_bytes(from.add(16))]
    };
    [halves[0][part % 2], halves[1][part % 2]]
}

impl Layout for Q4_K {
    const STEP: usize = 256;
    const HAS_MIN: bool = true;
}

impl Format for Q4_K {
    const BYTES: usize = 144;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: after 16 bytes 32 bytes for each two parts.
        less(unsafe { four_bits(step.add(16), part) }, 0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { six_bit_scales(step) }
    }
}

impl Layout for Q5_K {
    const STEP: usize = 256;
    const HAS_MIN: bool = true;
}

impl Format for Q5_K {
    const BYTES: usize = 176;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: after 16 bytes 32 bytes of fifth bits, of which each part has one in each byte, then 32 bytes for each
        // two parts.
        let (fifth, low) = unsafe { ([bytes(step.add(16)), bytes(step.add(32))], four_bits(step.add(48), part)) };
        let bit = vdupq_n_u8(1 << part);
        let sixteen = |fifth| vandq_u8(vtstq_u8(fifth, bit), vdupq_n_u8(16));
        less(or([low, [sixteen(fifth[0]), sixteen(fifth[1])]]), 0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: as above.
        unsafe { six_bit_scales(step) }
    }
}

impl Layout for Q6_K {
    const STEP: usize = 256;
    const GROUP: usize = 16;
}

impl Format for Q6_K {
    const BYTES: usize = 210;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        let (half, quarter) = (part / 4, part % 4);
        // SAFETY: each half of a block has 64 bytes of lower bits, in whose upper halves are the last two quarters, and
        // 32 bytes of upper bits, two for each quarter; those are behind all lower ones.
        let (low, high) = unsafe {
            let (low, high) = (step.add(half * 64 + quarter % 2 * 32), step.add(128 + half * 32));
            ([half_bytes(low), half_bytes(low.add(16))], [bytes(high), bytes(high.add(16))])
        };
        let low = [low[0][quarter / 2], low[1][quarter / 2]];
        // Their two bits go to where lower ones end.
        let shift = vdupq_n_s8(4 - 2 * quarter as i8);
        let upper = |high| vandq_u8(vshlq_u8(high, shift), vdupq_n_u8(48));
        less(or([low, [upper(high[0]), upper(high[1])]]), 32)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: the last 18 bytes are the groups' scales and the block's in f16.
        let (groups, block) = unsafe { (vreinterpretq_s8_u8(bytes(step.add(192))), float_of_half(step.add(208))) };
        Scales::new(sixteen_scales(groups, block))
    }
}

/// The scales of 16 groups, whose factor is the block's.
#[inline]
#[target_feature(enable = "neon")]
fn sixteen_scales(groups: int8x16_t, block: f32) -> [float32x4_t; 4] {
    let [a, b] = floats_of_signed_bytes(vget_low_s8(groups));
    let [c, d] = floats_of_signed_bytes(vget_high_s8(groups));
    [vmulq_n_f32(a, block), vmulq_n_f32(b, block), vmulq_n_f32(c, block), vmulq_n_f32(d, block)]
}

/// The two bits of part `part` in each byte, of 32 for each half of a block.
///
/// # Safety
/// Good for 64 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn two_bits(from: *const u8, part: usize) -> [uint8x16_t; 2] {
    // SAFETY: as the caller says.
    let both = unsafe {
        let from = from.add(part / 4 * 32);
        [bytes(from), bytes(from.add(16))]
    };
    let shift = vdupq_n_s8(-2 * (part % 4) as i8);
    let lowest = |bytes| vandq_u8(vshlq_u8(bytes, shift), vdupq_n_u8(3));
    [lowest(both[0]), lowest(both[1])]
}

impl Layout for Q2_K {
    const STEP: usize = 256;
    const GROUP: usize = 16;
    const HAS_MIN: bool = true;
}

impl Format for Q2_K {
    const BYTES: usize = 84;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: numbers are behind the groups' 16 bytes.
        less(unsafe { two_bits(step.add(16), part) }, 0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: a block begins with a byte for each group, the minimum in its upper half; the last four are the block's
        // scale and minimum in f16.
        let (groups, scale, minimum) =
            unsafe { (half_bytes(step), float_of_half(step.add(80)), float_of_half(step.add(82))) };
        let [scales, minima] = less(groups, 0);
        Scales { scales: sixteen_scales(scales, scale), minima: sixteen_scales(minima, -minimum) }
    }
}

impl Layout for Q3_K {
    const STEP: usize = 256;
    const GROUP: usize = 16;
}

impl Format for Q3_K {
    const BYTES: usize = 110;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn unpack(step: *const u8, part: usize) -> [int8x16_t; 2] {
        // SAFETY: a block begins with 32 bytes of third bits, of which each part has one in each byte; then come the lower
        // two.
        let (third, low) = unsafe { ([bytes(step), bytes(step.add(16))], two_bits(step.add(32), part)) };
        let bit = vdupq_n_u8(1 << part);
        let four = |third| vandq_u8(vtstq_u8(third, bit), vdupq_n_u8(4));
        less(or([low, [four(third[0]), four(third[1])]]), 4)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(step: *const u8) -> Scales {
        // SAFETY: the last 14 bytes are the groups' scales, plus 32, and the block's in f16.
        let (low, high, block) = unsafe {
            let (low, high) = (step.add(96).cast::<u64>(), step.add(104).cast::<u32>());
            (low.read_unaligned(), high.read_unaligned(), float_of_half(step.add(108)))
        };
        // A byte has the lower four bits of a group and, in its upper half, those of the eighth group from it; the upper
        // two bits of the first four groups, the next, … are in each of four bytes.
        let [a, b, c, d] = [0, 2, 4, 6].map(|shift| u64::from(high >> shift & 0x0303_0303) << 4);
        let first = low & 0x0f0f_0f0f_0f0f_0f0f | a | b << 32;
        let last = low >> 4 & 0x0f0f_0f0f_0f0f_0f0f | c | d << 32;
        let groups = vcombine_s8(vcreate_s8(first), vcreate_s8(last));
        Scales::new(sixteen_scales(vsubq_s8(groups, vdupq_n_s8(32)), block))
    }
}
