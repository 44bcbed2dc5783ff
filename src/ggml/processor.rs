//! What the processor can do, of what our kernels are compiled for: told here, and nowhere else.

use std::sync::OnceLock;

/// Instruction sets that kernels of ours are compiled for. Each has all of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Features {
    /// What every processor of the target has.
    #[cfg_attr(all(target_arch = "aarch64", not(test)), allow(dead_code, reason = "such processors have NEON"))]
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 VNNI: products of 8-bit numbers, summed in 32 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// NEON, which all 64-bit Arm processors have.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Products of 8-bit numbers, summed in 32 bits (FEAT_DotProd).
    #[cfg(target_arch = "aarch64")]
    DotProd,
    /// Products of matrices of 8-bit numbers (FEAT_I8MM).
    #[cfg(target_arch = "aarch64")]
    I8mm,
}

/// The name of the most that is to be used, for a look at what another processor would do: that of a [`Features`] in small
/// letters. What the processor lacks is not used for it.
const MOST: &str = "SIMLAYER_CPU";

impl Features {
    /// The best that this processor has, of what may be used.
    pub(super) fn detect() -> Features {
        static DETECTED: OnceLock<Features> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let best = Features::best();
            match std::env::var(MOST) {
                Ok(name) => {
                    Features::KNOWN.iter().find(|features| features.name() == name).map_or(best, |&most| best.min(most))
                }
                Err(_) => best,
            }
        })
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// The best that this processor has.
    #[cfg(target_arch = "x86_64")]
    fn best() -> Features {
        use std::arch::is_x86_feature_detected as has;
        if !(has!("avx2") && has!("fma") && has!("f16c")) {
            Features::Portable
        } else if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
            Features::Avx2
        } else if !has!("avx512vnni") {
            Features::Avx512
        } else {
            Features::Avx512Vnni
        }
    }

    /// The best that this processor has.
    #[cfg(target_arch = "aarch64")]
    fn best() -> Features {
        use std::arch::is_aarch64_feature_detected as has;
        if !has!("dotprod") {
            Features::Neon
        } else if !has!("i8mm") {
            Features::DotProd
        } else {
            Features::I8mm
        }
    }

    /// The best that this processor has.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn best() -> Features {
        Features::Portable
    }

    /// All that processors of this target may have, the best last.
    const KNOWN: &[Features] = &[
        Features::Portable,
        #[cfg(target_arch = "x86_64")]
        Features::Avx2,
        #[cfg(target_arch = "x86_64")]
        Features::Avx512,
        #[cfg(target_arch = "x86_64")]
        Features::Avx512Vnni,
        #[cfg(target_arch = "aarch64")]
        Features::Neon,
        #[cfg(target_arch = "aarch64")]
        Features::DotProd,
        #[cfg(target_arch = "aarch64")]
        Features::I8mm,
    ];

    /// All that this processor has, the best last.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Features> {
        Features::KNOWN.iter().copied().filter(|&features| features <= Features::detect()).collect()
    }
}

/// Tests with many cases do each so-manieth (`SIMLAYER_TEST_SHORTER`): an emulated processor is slow.
#[cfg(test)]
pub(super) fn shorter() -> usize {
    std::env::var("SIMLAYER_TEST_SHORTER").map_or(1, |n| n.parse().expect("SIMLAYER_TEST_SHORTER is a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who runs the tests may know what there is to find: an emulator's processor has what its name says.
    #[test]
    fn features_are_found() {
        let found = Features::detect();
        assert_eq!(Features::all().last(), Some(&found));
        match std::env::var("SIMLAYER_TEST_FEATURES") {
            Ok(expected) => assert_eq!(format!("{found:?}"), expected),
            Err(_) => println!("{found:?}"),
        }
    }
}
