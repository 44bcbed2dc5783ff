//! What the processor can do, of what our kernels are compiled for: told here, and nowhere else.

use std::sync::OnceLock;

/// Instruction sets that kernels of ours are compiled for, later ones preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Features {
    /// What every processor of the target has.
    #[cfg_attr(all(target_arch = "aarch64", not(test)), allow(dead_code, reason = "such processors have NEON"))]
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 and AVX-VNNI: products of 8-bit numbers, summed in 32 bits.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL, and AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// These and AVX-512 VNNI: the same products.
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
        *DETECTED.get_or_init(|| Features::usable().last().unwrap_or(Features::Portable))
    }

    /// All that this processor has, of what may be used, the best last.
    fn usable() -> impl Iterator<Item = Features> {
        let named = |name: String| Features::KNOWN.iter().copied().find(|features| features.name() == name);
        let most = std::env::var(MOST).ok().and_then(named);
        let known = Features::KNOWN.iter().copied();
        known.filter(move |&features| features.is_there() && most.is_none_or(|most| features <= most))
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Whether this processor has them.
    #[cfg(target_arch = "x86_64")]
    fn is_there(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma") && has!("f16c");
        let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
        match self {
            Features::Portable => true,
            Features::Avx2 => avx2,
            Features::AvxVnni => avx2 && has!("avxvnni"),
            Features::Avx512 => avx512,
            Features::Avx512Vnni => avx512 && has!("avx512vnni"),
        }
    }

    /// Whether this processor has them.
    #[cfg(target_arch = "aarch64")]
    fn is_there(self) -> bool {
        use std::arch::is_aarch64_feature_detected as has;
        match self {
            Features::Portable | Features::Neon => true,
            Features::DotProd => has!("dotprod"),
            Features::I8mm => has!("dotprod") && has!("i8mm"),
        }
    }

    /// Whether this processor has them.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_there(self) -> bool {
        true
    }

    /// All that processors of this target may have, the best last.
    const KNOWN: &[Features] = &[
        Features::Portable,
        #[cfg(target_arch = "x86_64")]
        Features::Avx2,
        #[cfg(target_arch = "x86_64")]
        Features::AvxVnni,
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

    /// All that this processor has, of what may be used, the best last.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Features> {
        Features::usable().collect()
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
