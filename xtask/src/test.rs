//! Everything that continuous integration checks, or with `--quick` what takes no longer than one waits for. What runs is
//! built in the release profile, so that ggml is compiled once for it and once for what has the C library's features; what is
//! only looked at needs no ggml, and is checked in one folder of its own (`bindings_only`).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::arm_check;
use crate::dist;
use crate::prepare::{self, Env};
use crate::root;
use crate::sh::{self, step};
use crate::upstream;

/// Integration tests that need neither the reference program nor long texts.
const QUICK: [&str; 2] = ["bad_files", "cli"];

#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Unit and property tests, and the integration tests that need neither llama.cpp nor long texts: under two minutes
    /// on two cores, once it is built.
    #[arg(long)]
    quick: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let start = std::time::Instant::now();
    let mut env = Env::default();
    if args.quick {
        quick(&mut env)?
    } else {
        everything(&mut env)?
    }
    eprintln!("\nAll passed in {:.0} s.", start.elapsed().as_secs_f64());
    Ok(())
}

fn quick(env: &mut Env) -> Result<()> {
    step("prepare", || {
        prepare::libclang(env)?;
        prepare::model().map(|_| ())
    })?;
    let env = &*env;
    step("unit tests", || sh::run(&mut unit_tests(env)))?;
    step("integration tests", || {
        let mut test = env.cargo();
        // The workspace's features, as above: otherwise all would be compiled twice.
        test.args(["test", "--workspace", "--release", "--no-fail-fast"]);
        for name in QUICK {
            test.args(["--test", name]);
        }
        sh::run(test.args(ONE_AT_A_TIME))
    })
}

/// Integration tests that compute in one thread each, or compile: as many at a time as there are cores.
const SIDE_BY_SIDE: [&str; 2] = ["architectures", "c_programs"];

/// Each of the other integration tests uses all cores, and spinning threads of two would wait for each other.
const ONE_AT_A_TIME: [&str; 2] = ["--", "--test-threads=1"];

/// The tests beside what they test, as many at a time as there are cores.
fn unit_tests(env: &Env) -> Command {
    let mut test = env.cargo();
    // Several tests compute at a time: threads that wait at a barrier sleep instead of taking the others' core.
    test.env("OMP_WAIT_POLICY", "passive");
    test.args(["test", "--workspace", "--release", "--no-fail-fast", "--lib", "--bins"]);
    test
}

fn everything(env: &mut Env) -> Result<()> {
    step("prepare", || {
        rust_components(env)?;
        prepare::libclang(env)?;
        prepare::cmake(env)?;
        prepare::model().map(|_| ())
    })?;
    // The package that llama.cpp's source comes from otherwise leaves them out.
    let (jinja2, templates) = step("chat templates, jinja2", || Ok((prepare::jinja2()?, upstream::chat_templates()?)))?;
    let clients = step("openai, ollama", prepare::clients)?;
    let env = &*env;
    let fuzz = Some(root().join("fuzz")).filter(|dir| dir.join("Cargo.toml").is_file());
    let outside = root().join("tests/outside");
    step("format", || {
        sh::run(env.cargo().args(["fmt", "--all", "--check"]))?;
        sh::run(upstream_cargo(env).args(["fmt", "--check"]))?;
        sh::run(env.cargo().current_dir(&outside).args(["fmt", "--check"]))?;
        match &fuzz {
            Some(dir) => sh::run(env.cargo().current_dir(dir).args(["fmt", "--check"])),
            None => Ok(()),
        }
    })?;
    step("clippy", || {
        let args = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        sh::run(bindings_only(env)?.args(args))
    })?;
    step("sets of features, the oldest Rust, docs.rs, fuzz targets", || {
        feature_sets(env)?;
        oldest_rust(env)?;
        docs_rs(env)?;
        packages(env)?;
        // What cargo-fuzz compiles with its coverage is the same code.
        fuzz.iter().try_for_each(|dir| sh::run(bindings_only(env)?.current_dir(dir).args(["check", "--locked"])))
    })?;
    step("documentation", || {
        let mut doc = bindings_only(env)?;
        doc.env("RUSTDOCFLAGS", "-D warnings");
        sh::run(doc.args(["doc", "--workspace", "--no-deps"]))
    })?;
    step("reference (unmodified llama.cpp)", || build_reference(env).map(|_| ()))?;
    step("reference: clippy and tests", || {
        let args = ["clippy", "--all-targets", "--release", "--", "-D", "warnings"];
        sh::run(upstream_cargo(env).args(args))?;
        sh::run(upstream_cargo(env).args(["test", "--release"]))
    })?;
    let dist = step("libllama.so.0", || dist::build(env, &env.target_dir()?.join("dist"), false))?;
    step("a crate outside of the workspace", || {
        let mut test = env.cargo();
        test.current_dir(&outside).env("CARGO_TARGET_DIR", env.target_dir()?);
        sh::run(test.args(["test", "--release", "--locked"]).args(ONE_AT_A_TIME))
    })?;
    let unit_tests = step("unit tests", || sh::run(&mut unit_tests(env)));
    let arm = step("kernels for Arm, emulated", || arm_check::run_if_possible(env));
    let integration = |names: &[&str]| {
        let mut test = env.cargo();
        // Tests fail, and are not skipped, where something of this is missing.
        test.env("CI", "true");
        // The tests of the C ABI look for the library there.
        test.env("SIMLAYER_DIST", &dist);
        test.env("SIMLAYER_CHAT_TEMPLATES", &templates).env("SIMLAYER_JINJA2", &jinja2);
        test.env("SIMLAYER_CLIENTS", &clients);
        test.args(["test", "--workspace", "--release", "--no-fail-fast"]);
        names.iter().for_each(|name| _ = test.args(["--test", name]));
        test
    };
    let side_by_side = step("integration tests in one thread each", || sh::run(&mut integration(&SIDE_BY_SIDE)));
    let others = step("other integration tests, examples", || {
        let names = integration_tests(env)?;
        let others: Vec<&str> = names.iter().map(String::as_str).filter(|name| !SIDE_BY_SIDE.contains(name)).collect();
        sh::run(integration(&others).arg("--examples").args(ONE_AT_A_TIME))
    });
    let documentation = step("tests in the documentation", || {
        sh::run(env.cargo().args(["test", "--workspace", "--release", "--no-fail-fast", "--doc"]))
    });
    unit_tests.and(arm).and(side_by_side).and(others).and(documentation)
}

/// The names of the workspace's integration tests.
fn integration_tests(env: &Env) -> Result<Vec<String>> {
    let metadata = sh::output(env.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.filter_map(|package| package["targets"].as_array()).flatten();
    let tests = targets.filter(|target| target["kind"] == serde_json::json!(["test"]));
    Ok(tests.filter_map(|target| target["name"].as_str()).map(str::to_owned).collect())
}

/// Cargo where only ggml's bindings are made: enough to check our code, and no ggml has to be compiled for each toolchain
/// and set of features. What it builds links with nothing, so that it has a folder of its own.
fn bindings_only(env: &Env) -> Result<Command> {
    let mut cargo = env.cargo();
    cargo.env("GGML_BINDINGS_ONLY", "1").env("CARGO_TARGET_DIR", env.target_dir()?.join("bindings"));
    Ok(cargo)
}

/// The crates that can be published: what they need is in their packages or in the registry. They are not built here.
fn packages(env: &Env) -> Result<()> {
    let mut cargo = env.cargo();
    cargo.args(["package", "--no-verify", "--allow-dirty", "--locked", "--quiet"]);
    cargo.env("CARGO_TARGET_DIR", env.target_dir()?.join("crates"));
    sh::run(cargo.args(["-p", "simlayer-ggml-sys", "-p", "simlayer", "-p", "simlayer-ffi"]))
}

/// Sets of features that nothing else here builds.
fn feature_sets(env: &Env) -> Result<()> {
    let check = |args: &[&str]| {
        let mut cargo = bindings_only(env)?;
        sh::run(cargo.args(["check", "--locked", "--package", "simlayer", "--no-default-features"]).args(args))
    };
    check(&["--lib"])?;
    // Without RPC.
    check(&["--features", "cli,openmp", "--lib", "--bins"])
}

/// The version that Cargo.toml promises, installed by rustup where it is missing.
fn oldest_rust(env: &Env) -> Result<()> {
    let metadata = sh::output(env.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let promised = metadata["packages"][0]["rust_version"].as_str().context("a package says its rust-version")?;
    let toolchain = if promised.matches('.').count() == 1 { format!("{promised}.0") } else { promised.to_owned() };
    let run = |args: &[&str]| {
        let mut command = env.command("rustup");
        command.args(["run", &toolchain]).args(args);
        command
    };
    if !sh::succeeds(&mut run(&["rustc", "--version"])) {
        let mut install = env.command("rustup");
        install.args(["toolchain", "install", &toolchain, "--profile", "minimal", "--no-self-update"]);
        if sh::run(&mut install).is_err() {
            // Rust need not come by rustup, nor need its server be reached from where this runs.
            eprintln!("Rust {toolchain} cannot be fetched: whether it compiles this is not checked here");
            return Ok(());
        }
    }
    let mut check = run(&["cargo", "check", "--locked", "--workspace", "--lib", "--bins"]);
    check.env("GGML_BINDINGS_ONLY", "1").env("CARGO_TARGET_DIR", env.target_dir()?.join("bindings"));
    sh::run(&mut check)
}

/// What docs.rs does, which has no network then, with the features that Cargo.toml tells it.
fn docs_rs(env: &Env) -> Result<()> {
    let mut doc = bindings_only(env)?;
    doc.env_remove("GGML_BINDINGS_ONLY").env("DOCS_RS", "1");
    doc.env("CARGO_NET_OFFLINE", "true").env("RUSTDOCFLAGS", "-D warnings");
    doc.args(["doc", "--locked", "--no-deps", "--package", "simlayer"]);
    sh::run(doc.args(["--no-default-features", "--features", "openmp,rpc"]))
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
