//! What this build is made of, for `simlayer-run --version`, `bench --json` and reports of faults.

use std::{env, path::Path, process::Command};

fn main() {
    // What is compiled here; vendor/ggml-sys says itself when it changes.
    for path in ["build.rs", "src", "Cargo.toml", "Cargo.lock"] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    println!("cargo:rustc-env=SIMLAYER_REVISION={}", revision().unwrap_or_else(|| "unknown".to_owned()));
    println!("cargo:rustc-env=SIMLAYER_GGML={}", env::var("DEP_GGML_REVISION").unwrap_or_default());
    println!("cargo:rustc-env=SIMLAYER_LLAMA={}", env::var("DEP_GGML_LLAMA").unwrap_or_default());
    println!("cargo:rustc-env=SIMLAYER_FEATURES={}", features().join(", "));
    println!("cargo:rustc-env=SIMLAYER_TARGET={}", env::var("TARGET").unwrap_or_default());
}

/// The commit that is compiled, with `+` where something of it was changed since; nothing outside of a repository of ours.
fn revision() -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // A package unpacked inside of somebody else's repository has no commit of its own.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--", "src", "vendor", "build.rs", "Cargo.toml", "Cargo.lock"])?;
    Some(if changed.is_empty() { commit } else { format!("{commit}+") })
}

/// The features that are on, in alphabetical order.
fn features() -> Vec<String> {
    let names = env::vars().filter_map(|(name, _)| Some(name.strip_prefix("CARGO_FEATURE_")?.to_lowercase()));
    let mut features: Vec<String> = names.filter(|name| name != "default").collect();
    features.sort();
    features
}
