//! What people install: a tarball, a Debian package and a Python wheel, of one build in Debian 11, so that they run wherever
//! its C library or a later one is. ggml is compiled for x86-64-v3; our own kernels, which do nearly all of the work, use
//! what the processor has besides.
//!
//! `--check` installs each in fresh Debians without Rust, and generates.

mod check;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::abi;
use crate::dist;
use crate::notices;
use crate::prepare::{self, Env};
use crate::root;
use crate::sh::{self, step};

/// Where it is built, and the least versions of what it then needs.
const BUILT_IN: &str = "bullseye";
const GLIBC: [u32; 2] = [2, 31];
const GLIBCXX: [u32; 3] = [3, 4, 28];

/// What a build needs there besides Rust, which is this machine's.
const BUILD_TOOLS: &str = "g++,make,libclang-dev,git,ca-certificates";

/// What the wheel was checked with (xtask/pip/upstream.txt).
const LLAMA_CPP_PYTHON: &str = "0.3.36";

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder for the packages; default: target/packages.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Debian 11's root, in which it is built; made where it is missing. Default: .tools/debian-bullseye.
    #[arg(long)]
    build_root: Option<PathBuf>,
    /// Put together what the last build made, in target/portable.
    #[arg(long, conflicts_with = "check")]
    built: bool,
    /// Install what is in the folder in fresh Debians and run it, in place of building.
    #[arg(long)]
    check: bool,
}

pub fn run(args: &Args) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "packages are made on x86-64 only");
    let env = Env::default();
    let out = args.out.clone().unwrap_or(env.target_dir()?.join("packages"));
    let out = std::path::absolute(out)?;
    if args.check {
        return check::check(&out);
    }
    let debian = match &args.build_root {
        Some(root) => std::path::absolute(root)?,
        None => prepare::tools_dir().join(format!("debian-{BUILT_IN}")),
    };
    let target = env.target_dir()?.join("portable");
    if !args.built {
        step("build", || build(&env, &debian, &target))?;
    }
    let built = Built { program: target.join("release/simlayer-run"), dist: target.join("dist") };
    oldest(&built.program)?;
    for library in libraries(&built.dist.join("lib"))? {
        oldest(&library)?;
    }
    let packages = Packages { env: &env, built: &built, debian: &debian, out: &out };
    for package in
        [step("tarball", || packages.tarball())?, step("deb", || packages.deb())?, step("wheel", || packages.wheel())?]
    {
        println!("{}", package.display());
    }
    Ok(())
}

/// A Debian of that name in the folder, made where it is missing; written last is what it was made with.
fn debian(suite: &str, folder: &Path, packages: &str) -> Result<()> {
    let stamp = folder.join("etc/made-for-simlayer");
    let made = format!("{suite} {packages}\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == made) {
        return Ok(());
    }
    prepare::debootstrap()?;
    // Debian's archive is debootstrap's own default.
    let mut bootstrap = Command::new("debootstrap");
    bootstrap.args(["--variant=minbase", &format!("--include={packages}"), suite]);
    sh::run(bootstrap.arg(folder))?;
    std::fs::write(stamp, made)?;
    Ok(())
}

/// Runs a shell script in a root, with folders of ours at the places named, which are mounted for that command alone.
fn inside(debian: &Path, mounts: &[(&Path, &str)], script: &str) -> Command {
    let mut before = String::from("set -e; mount -t proc proc \"$0/proc\"; ");
    // With processes of its own, which end with it.
    let mut unshare = sh::command("unshare");
    for (i, (_, at)) in mounts.iter().enumerate() {
        let _ = write!(before, "mkdir -p \"$0{at}\"; mount --bind \"${{{}}}\" \"$0{at}\"; ", i + 2);
    }
    before.push_str("exec chroot \"$0\" /usr/bin/env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 sh -ec \"$1\"");
    unshare.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", &before]);
    unshare.arg(debian).arg(script).args(mounts.iter().map(|(from, _)| from));
    unshare
}

/// What the build made.
struct Built {
    program: PathBuf,
    dist: PathBuf,
}

fn build(env: &Env, debian_root: &Path, target: &Path) -> Result<()> {
    debian(BUILT_IN, debian_root, BUILD_TOOLS)?;
    // Everything is fetched here: nothing is, in there.
    sh::run(env.cargo().args(["fetch", "--locked"]))?;
    let home = std::env::var_os("HOME").map(PathBuf::from).context("HOME is not set")?;
    let of = |variable: &str, usual: &str| std::env::var_os(variable).map_or(home.join(usual), PathBuf::from);
    let (cargo, rustup) = (of("CARGO_HOME", ".cargo"), of("RUSTUP_HOME", ".rustup"));
    std::fs::create_dir_all(target)?;
    // This root is in .tools itself, and cargo looks for a package's files in all of its folders.
    let nothing = target.join("nothing");
    std::fs::create_dir_all(&nothing)?;
    let mounts = [
        (root(), "/src"),
        (nothing, "/src/.tools"),
        (cargo, "/cargo"),
        (rustup, "/rustup"),
        (target.to_owned(), "/target"),
    ];
    let mounts: Vec<(&Path, &str)> = mounts.iter().map(|(from, at)| (from.as_path(), *at)).collect();
    let script = "export PATH=/cargo/bin:$PATH CARGO_HOME=/cargo RUSTUP_HOME=/rustup CARGO_TARGET_DIR=/target CARGO_NET_OFFLINE=true
        git config --global --add safe.directory /src
        cd /src
        cargo rustc --release --locked --bin simlayer-run --features portable -- -C link-arg=-Wl,-rpath,'$ORIGIN/../lib'
        cargo xtask dist --portable --out /target/dist";
    sh::run(&mut inside(debian_root, &mounts, script))
}

/// The shared libraries of a folder, without the links to them.
fn libraries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// That a file asks for no newer C and C++ library than the oldest system has.
fn oldest(file: &Path) -> Result<()> {
    let symbols = sh::output(Command::new("objdump").arg("-T").arg(file))?;
    for (prefix, most) in [("GLIBC_", &GLIBC[..]), ("GLIBCXX_", &GLIBCXX[..])] {
        let newest = versions(&symbols, prefix).max();
        if let Some(newest) = newest.filter(|newest| newest.as_slice() > most) {
            bail!("{}: needs {prefix}{newest:?}; the oldest system has {most:?}", file.display());
        }
    }
    Ok(())
}

/// The versions that `objdump -T` names with the prefix.
fn versions<'a>(symbols: &'a str, prefix: &'a str) -> impl Iterator<Item = Vec<u32>> + 'a {
    let words = symbols.split_whitespace().map(|word| word.trim_matches(['(', ')']));
    words.filter_map(move |word| word.strip_prefix(prefix)?.split('.').map(|part| part.parse().ok()).collect())
}

struct Packages<'a> {
    env: &'a Env,
    built: &'a Built,
    debian: &'a Path,
    out: &'a Path,
}

impl Packages<'_> {
    /// An empty folder to put a package together in.
    fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.built.dist.with_file_name("packages").join(name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        std::fs::create_dir_all(&folder)?;
        std::fs::create_dir_all(self.out)?;
        Ok(folder)
    }

    fn program(&self, to: &Path) -> Result<()> {
        std::fs::create_dir_all(to.parent().context("a folder")?)?;
        std::fs::copy(&self.built.program, to).with_context(|| self.built.program.display().to_string())?;
        sh::output(Command::new("strip").arg(to)).map(|_| ())
    }

    /// gcc's OpenMP library, which not every system has.
    fn openmp(&self, lib: &Path) -> Result<()> {
        let file = self.debian.join("usr/lib/x86_64-linux-gnu/libgomp.so.1");
        // A link within the root.
        let file = file.with_file_name(std::fs::read_link(&file).with_context(|| file.display().to_string())?);
        std::fs::copy(&file, lib.join("libgomp.so.1")).with_context(|| file.display().to_string())?;
        Ok(())
    }

    /// License, notices of all that is inside, and what to read.
    fn terms(&self, to: &Path, openmp: bool) -> Result<()> {
        std::fs::create_dir_all(to)?;
        for name in ["LICENSE", "README.md"] {
            std::fs::copy(root().join(name), to.join(name))?;
        }
        let source = dist::source(self.env)?;
        let mut text = std::fs::read_to_string(self.built.dist.join("THIRD-PARTY"))?;
        text.push_str("\n\nThe program simlayer-run:\n\n");
        text.push_str(&notices::text(self.env, &source, "simlayer", &["portable"])?);
        if openmp {
            let terms = self.debian.join("usr/share/doc/libgomp1/copyright");
            text.push_str("\n\nlib/libgomp.so.1 is gcc's, of Debian 11:\n\n");
            text.push_str(&std::fs::read_to_string(&terms).with_context(|| terms.display().to_string())?);
        }
        std::fs::write(to.join("THIRD-PARTY"), text)?;
        Ok(())
    }

    fn tarball(&self) -> Result<PathBuf> {
        let name = format!("simlayer-{VERSION}-x86_64-linux");
        let folder = self.folder("tarball")?;
        let inner = folder.join(&name);
        self.program(&inner.join("bin/simlayer-run"))?;
        for part in ["lib", "include"] {
            copy(&self.built.dist.join(part), &inner.join(part))?;
        }
        self.openmp(&inner.join("lib"))?;
        copy(&root().join("profiles"), &inner.join("profiles"))?;
        self.terms(&inner, true)?;
        let file = self.out.join(format!("{name}.tar.gz"));
        sh::output(
            Command::new("tar").args(["--owner=0", "--group=0", "-czf"]).arg(&file).arg("-C").arg(&folder).arg(&name),
        )?;
        Ok(file)
    }

    fn deb(&self) -> Result<PathBuf> {
        let folder = self.folder("deb")?;
        let program = folder.join("usr/bin/simlayer-run");
        self.program(&program)?;
        let lib = folder.join("usr/lib/simlayer");
        copy(&self.built.dist.join("lib"), &lib)?;
        // These say where headers are by their own place, which is another here.
        for build_files in ["pkgconfig", "cmake"] {
            std::fs::remove_dir_all(lib.join(build_files))?;
        }
        copy(&self.built.dist.join("include"), &folder.join("usr/include/simlayer"))?;
        copy(&root().join("profiles"), &folder.join("usr/share/simlayer/profiles"))?;
        let doc = folder.join("usr/share/doc/simlayer");
        self.terms(&doc, false)?;
        std::fs::rename(doc.join("LICENSE"), doc.join("copyright"))?;
        for (shell, file) in [
            ("bash", "usr/share/bash-completion/completions/simlayer-run"),
            ("zsh", "usr/share/zsh/vendor-completions/_simlayer-run"),
            ("fish", "usr/share/fish/vendor_completions.d/simlayer-run.fish"),
        ] {
            let file = folder.join(file);
            std::fs::create_dir_all(file.parent().context("a folder")?)?;
            std::fs::write(&file, sh::output(Command::new(&program).args(["completions", shell]))?)?;
        }
        let kilobytes = sh::output(Command::new("du").arg("-sk").arg(&folder))?;
        let kilobytes = kilobytes.split_whitespace().next().context("du says a size")?.to_owned();
        let control = folder.join("DEBIAN");
        std::fs::create_dir_all(&control)?;
        std::fs::write(
            control.join("control"),
            format!(
                "Package: simlayer\nVersion: {VERSION}\nArchitecture: amd64\nSection: science\nPriority: optional\n\
                 Maintainer: simlayer\nInstalled-Size: {kilobytes}\n\
                 Depends: libc6 (>= {}.{}), libgomp1, libstdc++6 (>= 10), libgcc-s1\n\
                 Description: GGUF models with a KV cache that shrinks where it can\n\
                 \x20The program simlayer-run, and in /usr/lib/simlayer a libllama.so.0 that llama.cpp's frontends use in\n\
                 \x20place of their own.\n",
                GLIBC[0], GLIBC[1]
            ),
        )?;
        let file = self.out.join(format!("simlayer_{VERSION}_amd64.deb"));
        sh::output(Command::new("dpkg-deb").args(["--root-owner-group", "-z3", "--build"]).arg(&folder).arg(&file))?;
        Ok(file)
    }

    fn wheel(&self) -> Result<PathBuf> {
        let folder = self.folder("wheel")?;
        let module = folder.join("simlayer");
        std::fs::create_dir_all(module.join("lib"))?;
        std::fs::copy(root().join("xtask/package/simlayer/__init__.py"), module.join("__init__.py"))?;
        std::fs::write(
            module.join("_checked.py"),
            format!(
                "VERSION = {VERSION:?}\nLLAMA_CPP = {:?}\nCHECKED = [{LLAMA_CPP_PYTHON:?}]\n",
                abi::revision(&dist::source(self.env)?)
            ),
        )?;
        self.program(&module.join("bin/simlayer-run"))?;
        for library in libraries(&self.built.dist.join("lib"))? {
            let name = library.file_name().context("a name")?.to_string_lossy().into_owned();
            // A wheel has no links; llama-cpp-python looks for this name, and the others are found by theirs.
            let name = if name == "libllama.so.0" { "libllama.so".to_owned() } else { name };
            std::fs::copy(&library, module.join("lib").join(name))?;
        }
        self.openmp(&module.join("lib"))?;
        copy(&self.built.dist.join("include"), &module.join("include"))?;
        copy(&root().join("profiles"), &module.join("profiles"))?;
        self.terms(&folder, true)?;
        let tag = format!("py3-none-manylinux_{}_{}_x86_64", GLIBC[0], GLIBC[1]);
        let mut write = Command::new("python3");
        write.arg(root().join("xtask/package/wheel.py")).arg(&folder).arg(self.out).args(["simlayer", VERSION, &tag]);
        let wheel = sh::output(write.arg(format!("llama-cpp-python:llama-cpp-python=={LLAMA_CPP_PYTHON}")))?;
        Ok(PathBuf::from(wheel.trim()))
    }
}

/// Copies a folder with its links.
fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    sh::output(Command::new("cp").arg("-a").arg(from.join(".")).arg(to)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_symbols() {
        let text =
            "0000 g DF .text 0001 Base x\n0000 DF *UND* 0000 (GLIBC_2.2.5) memcpy\n0000 DF *UND* 0 GLIBC_2.31 y\n";
        assert_eq!(versions(text, "GLIBC_").max(), Some(vec![2, 31]));
        assert_eq!(versions(text, "GLIBCXX_").max(), None);
        assert!(vec![2, 34] > GLIBC.to_vec() && vec![2, 2, 5] < GLIBC.to_vec());
    }
}
