//! llama.cpp's own tools, built as their authors build them: Release, for this machine, shared
//! libraries, everything else at its default.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::prepare::{self, Env};
use crate::sh;

/// Built by default: what `compare` and `rss` need.
const DEFAULT_TARGETS: [&str; 2] = ["llama-bench", "llama-simple"];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tools to build, by the names of their cmake targets, for instance llama-perplexity,
    /// llama-completion or llama-server.
    #[arg(default_values = DEFAULT_TARGETS)]
    targets: Vec<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let targets: Vec<&str> = args.targets.iter().map(String::as_str).collect();
    let bin = build(&targets)?;
    for target in targets {
        println!("{}", bin.join(target).display());
    }
    Ok(())
}

/// The path of one of upstream's tools, built if it is not there.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = bin_dir().join(name);
    if !path.is_file() {
        build(&[name])?;
    }
    Ok(path)
}

fn dir() -> PathBuf {
    prepare::tools_dir().join("upstream")
}

fn bin_dir() -> PathBuf {
    dir().join("build/bin")
}

/// Builds `targets` and returns the folder they are in.
fn build(targets: &[&str]) -> Result<PathBuf> {
    let mut env = Env::default();
    prepare::cmake(&mut env)?;
    let source = source()?;
    let build = dir().join("build");
    // What cmake knows holds absolute paths, which are wrong once the checkout was moved.
    let home = format!("CMAKE_HOME_DIRECTORY:INTERNAL={}", source.display());
    let is_moved = |cache: String| !cache.lines().any(|line| line == home);
    if std::fs::read_to_string(build.join("CMakeCache.txt")).is_ok_and(is_moved) {
        std::fs::remove_dir_all(&build).with_context(|| build.display().to_string())?;
    }
    let cmake = prepare::cmake_program();
    sh::run(
        env.command(&cmake)
            .arg("-S")
            .arg(&source)
            .arg("-B")
            .arg(&build)
            .args(["-DCMAKE_BUILD_TYPE=Release", "-Wno-dev", "--log-level=WARNING"])
            .arg("-DLLAMA_ALL_WARNINGS=OFF")
            // Never downloads the server's web page.
            .arg("-DLLAMA_USE_PREBUILT_UI=OFF"),
    )?;
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get()).to_string();
    let mut make = env.command(&cmake);
    make.arg("--build").arg(&build).args(["--parallel", &jobs, "--target"]).args(targets);
    sh::run(&mut make)?;
    for target in targets {
        if !bin_dir().join(target).is_file() {
            bail!("{}: was not built", bin_dir().join(target).display());
        }
    }
    Ok(bin_dir())
}

/// llama.cpp's source, unpacked from the package that `xtask/pip/upstream.txt` pins.
fn source() -> Result<PathBuf> {
    let pins = std::fs::read_to_string(prepare::requirements("upstream"))?;
    let source = dir().join("llama.cpp");
    // The pins that the folder was unpacked from; written last.
    let stamp = dir().join("pins.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == pins) {
        return Ok(source);
    }
    if dir().exists() {
        std::fs::remove_dir_all(dir()).with_context(|| dir().display().to_string())?;
    }
    let sdist = download()?;
    unpack(&sdist, "vendor/llama.cpp", &source)?;
    std::fs::remove_file(sdist)?;
    std::fs::write(&stamp, pins)?;
    Ok(source)
}

/// The folder of chat templates that llama.cpp's own tests use.
pub fn chat_templates() -> Result<PathBuf> {
    let folder = source()?.join("models/templates");
    if !folder.is_dir() {
        bail!("{}: llama.cpp's source has no such folder", folder.display());
    }
    Ok(folder)
}

/// llama-cpp-python's own tests, in a folder from which they find llama.cpp where they look for it.
pub fn python_tests() -> Result<PathBuf> {
    let source = source()?;
    let folder = dir().join("python");
    let (tests, link) = (folder.join("tests"), folder.join("vendor/llama.cpp"));
    if !link.exists() {
        let sdist = download()?;
        unpack(&sdist, "tests", &tests)?;
        std::fs::remove_file(sdist)?;
        std::fs::create_dir_all(folder.join("vendor"))?;
        std::os::unix::fs::symlink(&source, &link).with_context(|| link.display().to_string())?;
    }
    Ok(folder)
}

fn download() -> Result<PathBuf> {
    // To name a source package's version, pip asks its build backend, which must be there.
    prepare::pip_install("build-backend")?;
    prepare::pip_download("upstream", ".tar.gz", &["--no-binary", ":all:", "--no-build-isolation"])
}

/// Unpacks the folder `<package>/<inner>` of the source package to `to`.
fn unpack(sdist: &Path, inner: &str, to: &Path) -> Result<()> {
    let name = sdist.file_name().unwrap_or_default().to_string_lossy();
    let package = name.strip_suffix(".tar.gz").unwrap_or(&name);
    std::fs::create_dir_all(to)?;
    let depth = format!("--strip-components={}", inner.split('/').count() + 1);
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(sdist).arg("-C").arg(to).arg(depth).arg(format!("{package}/{inner}"));
    sh::run(&mut tar)
}
