//! What a type of weights is to kernels, and what some types have in common.

use std::arch::x86_64::*;

use super::super::input::{BLOCK, Scheme};

/// What kernels must know of a type whose weights they have unpacked.
pub trait Layout {
    /// Elements of a step: 64, where blocks are 32 elements, or 256.
    const STEP: usize;
    /// Elements that share a scale: 32, or 16.
    const GROUP: usize = 32;
    /// Bits of a number, 8 at most. They have no sign.
    const BITS: u32;
    /// What numbers are larger by than what they stand for.
    const OFFSET: i32 = 0;
    /// Whether groups have a minimum beside the scale.
    const HAS_MIN: bool = false;
    /// How the input is quantised.
    const SCHEME: Scheme = Scheme::quantized(BLOCK / Self::GROUP, Self::OFFSET);
}

/// A type of weights that are stored row by row. Its functions need AVX2 with FMA and F16C, those with 512 bits AVX-512 F,
/// BW, DQ and VL too.
pub trait Format: Layout {
    /// Bytes of a step.
    const BYTES: usize;

    /// The 32 numbers of part `part` of a step, in their order.
    ///
    /// # Safety
    /// The step exists and has the part; the processor has the features.
    unsafe fn unpack(step: *const u8, part: usize) -> __m256i;

    /// The 64 numbers of the parts `2 × pair` and the next.
    ///
    /// # Safety
    /// As [`Format::unpack`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn unpack_pair(step: *const u8, pair: usize) -> __m512i {
        // SAFETY: as the caller says.
        let [low, high] = unsafe { [Self::unpack(step, 2 * pair), Self::unpack(step, 2 * pair + 1)] };
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }

    /// The scales and minima of a step's groups.
    ///
    /// # Safety
    /// As [`Format::unpack`].
    unsafe fn scales(step: *const u8) -> Scales;

    /// The scales of a step of four rows, row by row, each with its minimum behind it where there is one: then those of two
    /// rows are in a register, else those of all, and the second has zeros. As it stands it is for steps of two blocks that
    /// begin with them.
    ///
    /// # Safety
    /// As [`Format::unpack`], for each of the steps.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales_of_four_rows(steps: [*const u8; 4]) -> [__m256; 2] {
        // SAFETY: as the caller says.
        let [first, second] = unsafe { halves_of_four_rows::<Self>(steps) };
        let second = if Self::HAS_MIN { _mm256_cvtph_ps(second) } else { _mm256_setzero_ps() };
        [_mm256_cvtph_ps(first), second]
    }

    /// The same in one register.
    ///
    /// # Safety
    /// As [`Format::unpack`], for each of the steps.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
    unsafe fn scales_of_four_rows_512(steps: [*const u8; 4]) -> __m512 {
        // SAFETY: as the caller says.
        let [first, second] = unsafe { halves_of_four_rows::<Self>(steps) };
        if Self::HAS_MIN {
            _mm512_cvtph_ps(_mm256_set_m128i(second, first))
        } else {
            _mm512_zextps256_ps512(_mm256_cvtph_ps(first))
        }
    }
}

/// What [`Format::scales_of_four_rows`] has, as it is stored.
///
/// # Safety
/// As [`Format::unpack`], for each of the steps, which are two blocks that begin with them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves_of_four_rows<F: Format + ?Sized>(steps: [*const u8; 4]) -> [__m128i; 2] {
    // SAFETY: as the caller says.
    unsafe {
        if F::HAS_MIN {
            let both = |step: *const u8| two_words(step, step.add(F::BYTES / 2)) as i64;
            [0, 2].map(|r| _mm_set_epi64x(both(steps[r + 1]), both(steps[r])))
        } else {
            let both = |step: *const u8| u64::from(two_halves(step, step.add(F::BYTES / 2)));
            let [first, second] = [0, 2].map(|r| both(steps[r]) | both(steps[r + 1]) << 32);
            [_mm_set_epi64x(second as i64, first as i64), _mm_setzero_si128()]
        }
    }
}

/// Scales of a step's groups in their order, zeros behind them; minima likewise.
#[derive(Clone, Copy)]
pub struct Scales {
    pub scales: [__m256; 2],
    pub minima: [__m256; 2],
}

impl Scales {
    /// Of a type that has no minima, or of groups of 32, of which there are eight at most.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn of_eight(scales: __m256, minima: __m256) -> Scales {
        Scales { scales: [scales, _mm256_setzero_ps()], minima: [minima, _mm256_setzero_ps()] }
    }

    /// What the vector's sums of groups are multiplied by: minima, else what the offset is.
    #[inline]
    pub fn of_sums<F: Layout>(&self) -> [__m256; 2] {
        if F::HAS_MIN { self.minima } else { self.scales }
    }
}

/// The scales of two blocks, in f16.
///
/// # Safety
/// Both are good for two bytes; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn two_scales(first: *const u8, second: *const u8) -> Scales {
    // SAFETY: as the caller says.
    let halves = _mm_cvtsi32_si128(unsafe { two_halves(first, second) } as i32);
    Scales::of_eight(_mm256_zextps128_ps256(_mm_cvtph_ps(halves)), _mm256_setzero_ps())
}

/// The half words at `first` and, in the upper half, `second`.
///
/// # Safety
/// Both are good for two bytes.
#[inline(always)]
pub(super) unsafe fn two_halves(first: *const u8, second: *const u8) -> u32 {
    // SAFETY: as the caller says.
    let (first, second) = unsafe { (first.cast::<u16>().read_unaligned(), second.cast::<u16>().read_unaligned()) };
    u32::from(first) | u32::from(second) << 16
}

/// The words at `first` and, in the upper half, `second`.
///
/// # Safety
/// Both are good for four bytes.
#[inline(always)]
pub(super) unsafe fn two_words(first: *const u8, second: *const u8) -> u64 {
    // SAFETY: as the caller says.
    let (first, second) = unsafe { (first.cast::<u32>().read_unaligned(), second.cast::<u32>().read_unaligned()) };
    u64::from(first) | u64::from(second) << 32
}

/// 16 bytes → 32 numbers of half a byte: the lower halves, then the upper ones.
///
/// # Safety
/// Good for 16 bytes; the processor has the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn half_bytes(from: *const u8) -> __m256i {
    // SAFETY: as the caller says.
    let low = unsafe { _mm_loadu_si128(from.cast()) };
    let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), _mm_srli_epi16::<4>(low));
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// As [`half_bytes`] for two blocks: their numbers one after the other.
///
/// # Safety
/// Both are good for 16 bytes; the processor has the features.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
pub(super) unsafe fn half_bytes_of_two(first: *const u8, second: *const u8) -> __m512i {
    // SAFETY: as the caller says.
    let (first, second) = unsafe { (_mm_loadu_si128(first.cast()), _mm_loadu_si128(second.cast())) };
    let both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(first), 0xff00, second);
    let shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15))
}

/// The numbers of a table that numbers of half a byte stand for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn look_up(table: &[u8; 16], numbers: __m256i) -> __m256i {
    // SAFETY: 16 bytes.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), numbers)
}

/// As [`look_up`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
pub(super) fn look_up_64(table: &[u8; 16], numbers: __m512i) -> __m512i {
    // SAFETY: 16 bytes.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), numbers)
}
