//! What kernels load of a vector, and sums over all lanes of a register.

use std::arch::x86_64::*;

use super::{
    formats::Layout,
    input::{BLOCK, Vector},
};

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

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum_of_lanes(x: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn max_of_lanes(x: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn floats(x: [__m256; 2]) -> [f32; 16] {
    let mut floats = [0.0; 16];
    // SAFETY: 16 floats.
    unsafe {
        _mm256_storeu_ps(floats.as_mut_ptr(), x[0]);
        _mm256_storeu_ps(floats.as_mut_ptr().add(8), x[1]);
    }
    floats
}
