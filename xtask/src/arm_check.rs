//! That the kernels of attention and products for 64-bit Arm give what they should: cross-compiled, and run by QEMU on a
//! processor that has all that they know and on ones that lack some of it. How fast they are it cannot tell.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::prepare::{self, Env};
use crate::sh::{self, step};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Where Debian's cross-compiler has its headers and libraries.
const SYSROOT: &str = "/usr/aarch64-linux-gnu";

/// Processors as QEMU names them, the features that kernels are to find there, and the tests that run: attention needs no more
/// than NEON, so that the processor between is for products.
const PROCESSORS: [(&str, &str, &[&str]); 3] = [
    ("max", "I8mm", &["ggml::attention", "ggml::mul_mat", "ggml::processor"]),
    ("neoverse-n1", "DotProd", &["ggml::mul_mat", "ggml::processor"]),
    ("cortex-a72", "Neon", &["ggml::attention", "ggml::mul_mat", "ggml::processor"]),
];

/// Of the tests' many cases each so-manieth runs: QEMU computes with floats some thirty times as slowly as the processor.
const SHORTER: u32 = 16;

pub fn run() -> Result<()> {
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    step("tools", || tools(&env))?;
    check(&env)
}

/// As part of all tests: where the tools cannot be had that is said, and no failure.
pub fn run_if_possible(env: &Env) -> Result<()> {
    if let Err(error) = tools(env) {
        eprintln!("NOT CHECKED: the kernels for Arm, which need a cross-compiler and QEMU: {error:#}");
        return Ok(());
    }
    check(env)
}

/// Installs what is missing.
fn tools(env: &Env) -> Result<()> {
    ensure!(cfg!(all(target_os = "linux", target_arch = "x86_64")), "this is for x86-64 Linux");
    prepare::arm()?;
    let has_target = || -> Result<bool> {
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let libraries = sh::output(env.command(&rustc).args(["--print", "target-libdir", "--target", TARGET]))?;
        Ok(std::path::Path::new(libraries.trim()).is_dir())
    };
    if !has_target()? {
        eprintln!("Rust's standard library for {TARGET} is missing");
        sh::run(env.command("rustup").args(["target", "add", TARGET]))
            .with_context(|| format!("please install Rust's standard library for {TARGET}"))?;
    }
    Ok(())
}

fn check(env: &Env) -> Result<()> {
    sh::run(cargo(env).arg("--no-run"))?;
    PROCESSORS.into_iter().try_for_each(|(processor, features, tests)| {
        eprintln!("on QEMU's {processor}:");
        let mut test = cargo(env);
        let runner = format!("qemu-aarch64 -L {SYSROOT} -cpu {processor}");
        test.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner).env("SIMLAYER_TEST_FEATURES", features);
        // Several tests compute at a time: threads that wait at a barrier sleep instead of taking the others' core.
        test.env("OMP_WAIT_POLICY", "passive").env("SIMLAYER_TEST_SHORTER", SHORTER.to_string());
        sh::run(test.arg("--").args(tests))
    })
}

/// The library's tests for Arm. ggml is compiled for any 64-bit Arm processor, so that the tests run on all of QEMU's:
/// what a processor has more than that is our kernels' to find.
fn cargo(env: &Env) -> Command {
    let mut cargo = env.cargo();
    cargo.args(["test", "--release", "--package", "simlayer", "--lib", "--target", TARGET]);
    cargo.args(["--no-default-features", "--features", "openmp"]);
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
    // A cache of compilations that the machine's own compiler has serves this one, too.
    let launcher = std::env::var("CC").ok().filter(|cc| cc.starts_with("ccache ")).map_or("", |_| "ccache ");
    cargo.env("CC_aarch64_unknown_linux_gnu", format!("{launcher}aarch64-linux-gnu-gcc"));
    cargo.env("CXX_aarch64_unknown_linux_gnu", format!("{launcher}aarch64-linux-gnu-g++"));
    cargo.env("GGML_CPU_FLAGS", "-march=armv8-a");
    cargo
}
