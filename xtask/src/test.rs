//! Everything that continuous integration checks. All of it is built in the release profile, so
//! that ggml is compiled once.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::dist;
use crate::prepare::{self, Env};
use crate::root;
use crate::sh::{self, step};
use crate::upstream;

pub fn run() -> Result<()> {
    let start = std::time::Instant::now();
    let mut env = Env::default();
    step("prepare", || {
        rust_components(&env)?;
        prepare::libclang(&mut env)?;
        prepare::cmake(&mut env)?;
        prepare::model().map(|_| ())
    })?;
    // The package that llama.cpp's source comes from otherwise leaves them out.
    let (jinja2, templates) = step("chat templates, jinja2", || Ok((prepare::jinja2()?, upstream::chat_templates()?)))?;
    let env = &env;
    let fuzz = Some(root().join("fuzz")).filter(|dir| dir.join("Cargo.toml").is_file());
    step("format", || {
        sh::run(env.cargo().args(["fmt", "--all", "--check"]))?;
        sh::run(upstream_cargo(env).args(["fmt", "--check"]))?;
        match &fuzz {
            Some(dir) => sh::run(env.cargo().current_dir(dir).args(["fmt", "--check"])),
            None => Ok(()),
        }
    })?;
    step("clippy", || {
        let args = ["clippy", "--workspace", "--all-targets", "--release", "--", "-D", "warnings"];
        sh::run(env.cargo().args(args))
    })?;
    if let Some(dir) = &fuzz {
        step("fuzz targets compile", || {
            // In the workspace's target folder, where ggml is built already.
            let mut check = env.cargo();
            check.current_dir(dir).env("CARGO_TARGET_DIR", env.target_dir()?);
            sh::run(check.args(["check", "--release", "--locked"]))
        })?;
    }
    step("documentation", || {
        let mut doc = env.cargo();
        doc.env("RUSTDOCFLAGS", "-D warnings");
        sh::run(doc.args(["doc", "--workspace", "--no-deps", "--release"]))
    })?;
    step("reference (unmodified llama.cpp)", || build_reference(env).map(|_| ()))?;
    step("reference: clippy and tests", || {
        let args = ["clippy", "--all-targets", "--release", "--", "-D", "warnings"];
        sh::run(upstream_cargo(env).args(args))?;
        sh::run(upstream_cargo(env).args(["test", "--release"]))
    })?;
    let dist = step("libllama.so.0", || dist::build(env, &env.target_dir()?.join("dist"), false))?;
    // One test at a time: each uses all cores, and spinning threads of two would wait for each other.
    step("tests", || {
        let mut test = env.cargo();
        // The tests of the C ABI look for the library there.
        test.env("SIMLAYER_DIST", &dist);
        test.env("SIMLAYER_CHAT_TEMPLATES", &templates).env("SIMLAYER_JINJA2", &jinja2);
        sh::run(test.args(["test", "--workspace", "--release", "--no-fail-fast", "--", "--test-threads=1"]))
    })?;
    eprintln!("\nAll passed in {:.0} s.", start.elapsed().as_secs_f64());
    Ok(())
}

/// rustup's minimal profile lacks these two.
fn rust_components(env: &Env) -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !sh::succeeds(env.cargo().args([subcommand, "--version"])) {
            eprintln!("{component} is missing");
            sh::run(env.command("rustup").args(["component", "add", component]))
                .with_context(|| format!("please install {component}"))?;
        }
    }
    Ok(())
}

fn upstream_dir() -> PathBuf {
    root().join("tests/upstream")
}

/// Cargo in the folder of the reference, whose `.cargo/config.toml` turns native CPU flags on.
fn upstream_cargo(env: &Env) -> Command {
    let mut cargo = env.cargo();
    cargo.current_dir(upstream_dir());
    // The tests look for the program here, and these variables would override the folder's config.
    cargo.env("CARGO_TARGET_DIR", upstream_dir().join("target"));
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo
}

/// The same program with ggml's CUDA kernels, in a folder of its own: those of an archive that ggml-sys has compiled.
pub fn build_cuda_reference(env: &Env, archive: &Path, toolkit: &Path, target: &Path) -> Result<PathBuf> {
    let mut cargo = upstream_cargo(env);
    cargo.args(["build", "--release", "--locked", "--features", "cuda"]).env("CARGO_TARGET_DIR", target);
    sh::run(cargo.env("GGML_CUDA_ARCHIVE", archive).env("CUDA_PATH", toolkit))?;
    Ok(target.join("release/upstream-ref"))
}

/// Builds the program that runs unmodified llama.cpp for the tests to compare with.
pub fn build_reference(env: &Env) -> Result<PathBuf> {
    sh::run(upstream_cargo(env).args(["build", "--release", "--locked"]))?;
    Ok(Path::new(&upstream_dir()).join("target/release/upstream-ref"))
}
