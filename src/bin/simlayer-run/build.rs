//! What this program was built from, as the package's build script found it.

use serde::Serialize;

/// For `--version`, behind the program's name.
pub const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\nrevision:  ",
    env!("SIMLAYER_REVISION"),
    "\nllama.cpp: ",
    env!("SIMLAYER_LLAMA"),
    "\nggml:      ",
    env!("SIMLAYER_GGML"),
    "\nfeatures:  ",
    env!("SIMLAYER_FEATURES"),
    "\ntarget:    ",
    env!("SIMLAYER_TARGET"),
);

/// For JSON.
#[derive(Debug, Serialize)]
pub struct Build {
    pub version: &'static str,
    /// The commit, with `+` where its files had been changed; "unknown" outside of the repository.
    pub revision: &'static str,
    /// llama.cpp's version, and the source that it was compiled from.
    pub llama_cpp: &'static str,
    /// ggml's version, and the source that it was compiled from.
    pub ggml: &'static str,
    pub features: Vec<&'static str>,
    pub target: &'static str,
}

impl Build {
    pub fn this() -> Build {
        Build {
            version: env!("CARGO_PKG_VERSION"),
            revision: env!("SIMLAYER_REVISION"),
            llama_cpp: env!("SIMLAYER_LLAMA"),
            ggml: env!("SIMLAYER_GGML"),
            features: env!("SIMLAYER_FEATURES").split(", ").collect(),
            target: env!("SIMLAYER_TARGET"),
        }
    }
}
