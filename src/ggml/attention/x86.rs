//! AVX2 (with FMA and F16C) and AVX-512 vectors.
//!
//! The methods are inlined into functions that have the features switched on; see `kernels::isa`.

use std::arch::x86_64::*;

use super::simd::Simd;

#[derive(Clone, Copy)]
pub(in crate::ggml) struct Avx2(__m256);

// SAFETY in all blocks: the processor has the features, and the pointers are good for as many elements as the trait
// says.
impl Simd for Avx2 {
    const LANES: usize = 8;
    const MAX_GROUP: usize = 3;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: as said at the top; so below.
        Avx2(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 8 elements.
        Avx2(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 8 elements.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_fmadd_ps(self.0, factor.0, summand.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: features.
        Avx2(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    unsafe fn times_two_to(self, power: Self) -> Self {
        // SAFETY: features.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power.0), _mm256_set1_epi32(127));
            Avx2(_mm256_mul_ps(self.0, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))))
        }
    }
    #[inline(always)]
    unsafe fn h_max(self) -> f32 {
        // SAFETY: features.
        unsafe {
            let m = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
            _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)))
        }
    }
    #[inline(always)]
    unsafe fn h_sum(self) -> f32 {
        // SAFETY: features.
        unsafe {
            let s = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
        }
    }
    #[inline(always)]
    unsafe fn sum_each([a, b, c, d]: [Self; 4], to: *mut f32) {
        // SAFETY: 4 elements are written.
        unsafe {
            let four = _mm256_hadd_ps(_mm256_hadd_ps(a.0, b.0), _mm256_hadd_ps(c.0, d.0));
            _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four)));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: 8 halves, 16 bytes.
        Avx2(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: 8 brain floats, 16 bytes.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: 8 bytes.
        Avx2(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_q4(block: *const u8, first: usize) -> Self {
        // SAFETY: the scale, and 8 bytes within the block's 16.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(2 + first % 16).cast()));
            let numbers =
                if first < 16 { _mm256_and_si256(bytes, _mm256_set1_epi32(15)) } else { _mm256_srli_epi32::<4>(bytes) };
            Avx2(_mm256_cvtepi32_ps(_mm256_sub_epi32(numbers, _mm256_set1_epi32(8)))).mul(Self::splat_f16(block.cast()))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        // SAFETY: one half.
        Avx2(unsafe { _mm256_cvtph_ps(_mm_set1_epi16(from.read_unaligned() as i16)) })
    }
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, first: usize) -> Self {
        // SAFETY: 8 bytes within the block's 16.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(first % 16).cast()));
            let codes =
                if first < 16 { _mm256_and_si256(bytes, _mm256_set1_epi32(15)) } else { _mm256_srli_epi32::<4>(bytes) };
            Avx2(_mm256_cvtepi32_ps(codes))
        }
    }
    #[inline(always)]
    unsafe fn load_twos(block: *const u8, first: usize) -> Self {
        // SAFETY: the block's 8 bytes.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.cast()));
            let codes = _mm256_srl_epi32(bytes, _mm_cvtsi32_si128((first / 8 * 2) as i32));
            Avx2(_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(3))))
        }
    }
    #[inline(always)]
    unsafe fn load_fours(block: *const u8, first: usize) -> Self {
        // SAFETY: a byte within the block's 4.
        unsafe {
            let bits = _mm256_set1_epi32(i32::from(block.add(first / 8).read()));
            let each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let is_set = _mm256_cmpeq_epi32(_mm256_and_si256(bits, each), each);
            Avx2(_mm256_and_ps(_mm256_castsi256_ps(is_set), _mm256_set1_ps(4.0)))
        }
    }
}

#[derive(Clone, Copy)]
pub(in crate::ggml) struct Avx512(__m512);

// SAFETY in all blocks: as for `Avx2`.
impl Simd for Avx512 {
    const LANES: usize = 16;
    const MAX_GROUP: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements.
        Avx512(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 elements.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, factor.0, summand.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: features.
        Avx512(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    unsafe fn times_two_to(self, power: Self) -> Self {
        // SAFETY: features.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(power.0), _mm512_set1_epi32(127));
            Avx512(_mm512_mul_ps(self.0, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))))
        }
    }
    #[inline(always)]
    unsafe fn h_max(self) -> f32 {
        // SAFETY: features.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn h_sum(self) -> f32 {
        // SAFETY: features.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn sum_each([a, b, c, d]: [Self; 4], to: *mut f32) {
        // SAFETY: 4 elements are written.
        unsafe {
            let ab = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a.0, b.0),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a.0, b.0),
            );
            let cd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(c.0, d.0),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(c.0, d.0),
            );
            // One quarter of the register for each of the four.
            let four = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd),
            );
            let four = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
            let four = _mm512_add_ps(four, _mm512_permute_ps::<0b10_11_00_01>(four));
            let firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
            _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, four)));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: 16 halves, 32 bytes.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: 16 brain floats, 32 bytes.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: 16 bytes.
        Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_q4(block: *const u8, first: usize) -> Self {
        // SAFETY: the scale, and the block's 16 bytes.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.add(2).cast()));
            let index = if first < 16 { bytes } else { _mm512_srli_epi32::<4>(bytes) };
            // A table look-up by the low four bits: masks, subtracts, converts and scales at once. The table serves both
            // halves of a block.
            let numbers = _mm512_set_ps(7., 6., 5., 4., 3., 2., 1., 0., -1., -2., -3., -4., -5., -6., -7., -8.);
            let table = _mm512_mul_ps(numbers, Self::splat_f16(block.cast()).0);
            Avx512(_mm512_permutexvar_ps(index, table))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        // SAFETY: one half.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(from.read_unaligned() as i16)) })
    }
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, first: usize) -> Self {
        // SAFETY: the block's 16 bytes.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.cast()));
            let index = if first < 16 { bytes } else { _mm512_srli_epi32::<4>(bytes) };
            // A table look-up by the low four bits: masks and converts at once.
            let numbers = _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.);
            Avx512(_mm512_permutexvar_ps(index, numbers))
        }
    }
    #[inline(always)]
    unsafe fn load_twos(block: *const u8, first: usize) -> Self {
        // SAFETY: the block's 8 bytes.
        unsafe {
            let bytes = _mm_loadl_epi64(block.cast());
            let bytes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(bytes, bytes));
            let shifts = match first {
                0 => _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0),
                _ => _mm512_set_epi32(6, 6, 6, 6, 6, 6, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4),
            };
            // As above, whatever the two bits are that follow.
            let numbers = _mm512_set_ps(3., 2., 1., 0., 3., 2., 1., 0., 3., 2., 1., 0., 3., 2., 1., 0.);
            Avx512(_mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shifts), numbers))
        }
    }
    #[inline(always)]
    unsafe fn load_fours(block: *const u8, first: usize) -> Self {
        // SAFETY: two bytes within the block's 4.
        unsafe {
            let bits = block.add(first / 8).cast::<u16>().read_unaligned();
            Avx512(_mm512_maskz_mov_ps(bits, _mm512_set1_ps(4.0)))
        }
    }
}
