//! What C programs are given: `dist/lib` with a drop-in `libllama.so.0`, the ggml libraries that it shares with its
//! frontends and unmodified llama.cpp for what it does not run, `dist/include`, files for pkg-config and CMake, and the terms of all that is in them.
//!
//! A Rust shared library hides the symbols of C++ objects inside it, so Rust's part is built as a static library and
//! linked by the C++ compiler. ggml's objects in it are left out: there is one ggml in the process, in libraries of the
//! names that llama.cpp gives them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::notices;
use crate::prepare::{self, Env};
use crate::root;
use crate::sh;
use crate::upstream_library;

/// The C++ names of llama-ext.h that llama.cpp's own tools import.
pub const EXTENSIONS: [&str; 14] = [
    "llama_get_ctx_other",
    "llama_get_embeddings_layer_inp",
    "llama_get_embeddings_nextn",
    "llama_get_embeddings_nextn_ith",
    "llama_get_memory_breakdown",
    "llama_model_dflash_selector_top_k",
    "llama_model_get_device",
    "llama_model_n_devices",
    "llama_model_n_expert",
    "llama_model_target_layer_ids",
    "llama_model_target_layer_ids_n",
    "llama_set_embeddings_layer_inp",
    "llama_set_embeddings_nextn",
    "llama_set_nextn_layer_offset",
];

/// What runs the models that ours does not.
const UPSTREAM: &str = "libsimlayer-upstream.so";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder to make; default: dist in the repository's root.
    #[arg(long)]
    out: Option<PathBuf>,
    /// For any x86-64-v3 processor (or the architecture's baseline) instead of this one.
    #[arg(long)]
    portable: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    let out = args.out.clone().unwrap_or_else(|| root().join("dist"));
    let dist = build(&env, &out, args.portable)?;
    println!("{}", dist.display());
    Ok(())
}

/// Makes the folder and returns it.
pub fn build(env: &Env, out: &Path, portable: bool) -> Result<PathBuf> {
    let source = source(env)?;
    let built = compile(env, portable)?;
    let lib = out.join("lib");
    let work = env.target_dir()?.join("dist-work");
    for dir in [&lib, &work] {
        remove(dir)?;
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let linker = Linker { env, lib: &lib };

    // llama.cpp keeps the registry of devices, which knows the processor's, in a library of its own.
    let base = unpack(&built.ggml.join("libggml-base.a"), &work.join("base"))?;
    let (registry, base): (Vec<_>, Vec<_>) = base.into_iter().partition(|object| {
        let name = object.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with("ggml-backend-reg.o") || name.ends_with("ggml-backend-dl.o")
    });
    let cpu = unpack(&built.ggml.join("libggml-cpu.a"), &work.join("cpu"))?;
    let rpc = unpack(&built.ggml.join("libggml-rpc.a"), &work.join("rpc"))?;
    linker.link("libggml-base.so", &base, &[], None)?;
    linker.link("libggml-cpu.so", &cpu, &["libggml-base.so"], None)?;
    linker.link("libggml-rpc.so", &rpc, &["libggml-base.so"], None)?;
    linker.link("libggml.so", &registry, &["libggml-cpu.so", "libggml-rpc.so", "libggml-base.so"], None)?;

    let ours = without_ggml(&built, &work)?;
    put_checks_in_front(&built, &source, &ours, env)?;
    let exports = exports(env, &source, &ours)?;
    let script = work.join("exports.map");
    std::fs::write(&script, version_script(&exports))?;
    linker.link("libllama.so", &[ours], &["libggml.so", "libggml-cpu.so", "libggml-base.so"], Some(&script))?;
    check_exports(&lib.join("libllama.so.0"), &exports)?;
    symlink("libllama.so.0", &lib.join("libsimlayer.so"))?;
    unmodified(&linker, &source, &built, &work, exports)?;

    headers(&source, &out.join("include"))?;
    packages(out)?;
    terms(env, &source, out, portable)?;
    Ok(out.to_path_buf())
}

/// The library that runs what ours does not. It has llama.cpp's names, which ours has as well, so that it must call its own
/// functions wherever those of ours are found first; ours finds its functions by name.
fn unmodified(
    linker: &Linker<'_>,
    source: &Path,
    built: &Built,
    work: &Path,
    mut exports: BTreeSet<String>,
) -> Result<()> {
    let objects = upstream_library::objects(linker.env, || linker.compiler(), source, &built.ggml)?;
    exports.retain(|name| !name.starts_with("simlayer_"));
    let script = work.join("upstream.map");
    std::fs::write(&script, version_script(&exports))?;
    let needs = ["libggml.so", "libggml-base.so"];
    let mut link = linker.shared(UPSTREAM, &objects, &needs, Some(&script));
    sh::output(link.arg("-Wl,-Bsymbolic"))?;
    check_exports(&linker.lib.join(UPSTREAM), &exports)
}

/// llama.cpp's folder in the pinned package, or the one that GGML_SOURCE_DIR names.
pub fn source(env: &Env) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("GGML_SOURCE_DIR") {
        return Ok(dir.into());
    }
    Ok(env.package_source("llama-cpp-sys-2")?.join("llama.cpp"))
}

/// What cargo made.
struct Built {
    /// The static library of everything.
    library: PathBuf,
    /// The folder with ggml's static libraries.
    ggml: PathBuf,
}

fn compile(env: &Env, portable: bool) -> Result<Built> {
    let mut cargo = env.cargo();
    cargo.args(["rustc", "--release", "-p", "simlayer-ffi", "--lib", "--crate-type", "staticlib"]);
    cargo.args(["--features", &features(portable).join(",")]);
    cargo.arg("--message-format=json-render-diagnostics").stderr(std::process::Stdio::inherit());
    eprintln!("$ {}", sh::shown(&cargo));
    let output = cargo.output()?;
    if !output.status.success() {
        bail!("`{}` failed: {}", sh::shown(&cargo), output.status);
    }
    let messages: Vec<Value> =
        String::from_utf8(output.stdout)?.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |message: &&Value, reason: &str, package: &str| {
        let id = message["package_id"].as_str().unwrap_or_default();
        message["reason"] == reason && id.contains(package)
    };
    let library = messages
        .iter()
        .filter(|message| of(message, "compiler-artifact", "simlayer-ffi") || of(message, "compiler-artifact", "/ffi#"))
        .flat_map(|message| message["filenames"].as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .find(|name| name.ends_with(".a"))
        .context("cargo named no static library")?;
    let ggml = messages
        .iter()
        .find(|message| of(message, "build-script-executed", "ggml-sys"))
        .and_then(|message| message["out_dir"].as_str())
        .context("cargo named no build folder of ggml-sys")?;
    Ok(Built { library: library.into(), ggml: ggml.into() })
}

struct Linker<'a> {
    env: &'a Env,
    lib: &'a Path,
}

impl Linker<'_> {
    /// Links `name.0` and makes `name` a link to it.
    fn link(&self, name: &str, inputs: &[PathBuf], needs: &[&str], exports: Option<&Path>) -> Result<()> {
        let versioned = format!("{name}.0");
        sh::output(&mut self.shared(&versioned, inputs, needs, exports))?;
        symlink(&versioned, &self.lib.join(name))
    }

    /// The command that links the library `name` of the inputs and the libraries that it needs.
    fn shared(&self, name: &str, inputs: &[PathBuf], needs: &[&str], exports: Option<&Path>) -> Command {
        let mut command = self.compiler();
        command.args(["-shared", "-o"]).arg(self.lib.join(name));
        command.arg(format!("-Wl,-soname,{name}"));
        // A library finds the others beside it, wherever the folder is.
        command.args(["-Wl,-rpath,$ORIGIN", "-Wl,-z,defs", "-Wl,--gc-sections", "-Wl,--strip-debug"]);
        command.arg("-Wl,--whole-archive").args(inputs).arg("-Wl,--no-whole-archive");
        if let Some(script) = exports {
            command.arg(format!("-Wl,--version-script={}", script.display()));
        }
        command.arg("-L").arg(self.lib).args(needs.iter().map(|name| format!("-l:{name}.0")));
        // What waits for its threads by OpenMP needs gcc's library of it; the others get no such dependency.
        command.args(["-Wl,--as-needed", "-lgomp", "-lpthread", "-ldl", "-lm"]);
        command
    }

    fn compiler(&self) -> Command {
        // CXX may name a wrapper with its compiler: "ccache g++".
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let mut words = compiler.split_whitespace();
        let mut command = self.env.command(words.next().unwrap_or("c++"));
        command.args(words);
        command
    }
}

/// The objects of an archive, unpacked into a folder.
fn unpack(archive: &Path, to: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(to)?;
    sh::output(Command::new("ar").arg("x").arg(archive).current_dir(to))?;
    Ok(members(archive)?.into_iter().map(|name| to.join(name)).collect())
}

fn members(archive: &Path) -> Result<BTreeSet<String>> {
    let names = sh::output(Command::new("ar").arg("t").arg(archive))?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// The static library without ggml's objects.
fn without_ggml(built: &Built, work: &Path) -> Result<PathBuf> {
    let ours = work.join("libours.a");
    std::fs::copy(&built.library, &ours)?;
    let mut delete = Command::new("ar");
    delete.arg("d").arg(&ours);
    for archive in ["libggml-base.a", "libggml-cpu.a", "libggml-rpc.a"] {
        delete.args(members(&built.ggml.join(archive))?);
    }
    sh::output(&mut delete)?;
    Ok(ours)
}

/// In ffi/src/reused.cpp, what is checked before llama.cpp's own function of that name runs.
const CHECKED: &str = "simlayer_checked_";

/// Gives the checked functions the names of llama.cpp's own, and those other ones.
fn put_checks_in_front(built: &Built, source: &Path, ours: &Path, env: &Env) -> Result<()> {
    // Functions, but for weak ones, which give way to Rust's.
    let defined = |archive: &Path| -> Result<BTreeSet<String>> {
        let symbols = sh::output(Command::new("nm").args(["--defined-only", "--format=posix"]).arg(archive))?;
        let functions = symbols.lines().filter_map(|line| line.split_once(" T ").map(|(name, _)| name.to_owned()));
        Ok(functions.collect())
    };
    let checked: BTreeSet<String> =
        defined(ours)?.iter().filter_map(|name| name.strip_prefix(CHECKED)).map(str::to_owned).collect();
    let reused = defined(&built.ggml.join("libsimlayer-llama.a"))?;
    let declared = functions(env, &[source.join("include"), source.join("ggml/include")], "llama.h", "llama_")?;
    let unchecked: Vec<_> = declared.intersection(&reused).filter(|name| !checked.contains(*name)).collect();
    if !unchecked.is_empty() {
        bail!("llama.cpp's own {unchecked:?} are not in ffi/src/reused.cpp");
    }
    let mut rename = Command::new("objcopy");
    for name in &checked {
        rename.arg(format!("--redefine-sym={name}=upstream_{name}"));
        rename.arg(format!("--redefine-sym={CHECKED}{name}={name}"));
    }
    sh::output(rename.arg(ours)).map(|_| ())
}

/// Everything that the library exports: llama.h's functions, llama-ext.h's, and simlayer.h's.
fn exports(env: &Env, source: &Path, ours: &Path) -> Result<BTreeSet<String>> {
    let include = [source.join("include"), source.join("ggml/include"), root().join("ffi/include")];
    let mut names = functions(env, &include, "llama.h", "llama_")?;
    names.extend(functions(env, &include, "simlayer.h", "simlayer_")?);
    let symbols = defined(Command::new("nm").arg(ours))?;
    for extension in EXTENSIONS {
        let prefix = format!("_Z{}{extension}", extension.len());
        let mangled = symbols.iter().find(|symbol| symbol.starts_with(&prefix));
        names.insert(mangled.with_context(|| format!("{extension} is not in the library"))?.clone());
    }
    Ok(names)
}

/// The functions that a header declares, as the preprocessor leaves it.
pub fn functions(env: &Env, include: &[PathBuf], header: &str, prefix: &str) -> Result<BTreeSet<String>> {
    let mut preprocess = env.command("cc");
    preprocess.args(["-E", "-P", "-x", "c", "-include", header, "/dev/null"]);
    for dir in include {
        preprocess.arg("-I").arg(dir);
    }
    Ok(declared(&sh::output(&mut preprocess)?, prefix))
}

/// Names with the prefix that an opening parenthesis follows.
fn declared(text: &str, prefix: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        if text[..at].chars().next_back().is_some_and(is_name) {
            continue;
        }
        let name: String = text[at..].chars().take_while(|&c| is_name(c)).collect();
        if text[at + name.len()..].trim_start().starts_with('(') {
            names.insert(name);
        }
    }
    names
}

fn version_script(exports: &BTreeSet<String>) -> String {
    let names: String = exports.iter().map(|name| format!("    {name};\n")).collect();
    format!("{{\n  global:\n{names}  local:\n    *;\n}};\n")
}

/// The linker does not mind when a name in the script is not there.
fn check_exports(library: &Path, expected: &BTreeSet<String>) -> Result<()> {
    let found = exported(library)?;
    let (missing, stray): (Vec<_>, Vec<_>) =
        (expected.difference(&found).collect(), found.difference(expected).collect());
    if !missing.is_empty() || !stray.is_empty() {
        bail!("{}: missing {missing:?}, too many {stray:?}", library.display());
    }
    Ok(())
}

/// The names that a shared library exports.
fn exported(library: &Path) -> Result<BTreeSet<String>> {
    defined(Command::new("nm").arg("-D").arg(library))
}

/// The names that `nm` finds defined, in the format that old ones know as well.
fn defined(nm: &mut Command) -> Result<BTreeSet<String>> {
    let symbols = sh::output(nm.args(["--defined-only", "--format=posix"]))?;
    Ok(symbols.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
}

fn headers(source: &Path, include: &Path) -> Result<()> {
    remove(include)?;
    std::fs::create_dir_all(include)?;
    for dir in [source.join("include"), source.join("ggml/include"), root().join("ffi/include")] {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_ours = ["llama", "gguf.h", "ggml", "simlayer.h"].iter().any(|prefix| name.starts_with(prefix));
            if is_ours && name.ends_with(".h") {
                std::fs::copy(&path, include.join(&name))?;
            }
        }
    }
    Ok(())
}

/// Files by which build systems find the folder; they say where it is by their own place.
fn packages(out: &Path) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let pkgconfig = out.join("lib/pkgconfig");
    std::fs::create_dir_all(&pkgconfig)?;
    for name in ["llama", "simlayer"] {
        let text = format!(
            "prefix=${{pcfiledir}}/../..\nlibdir=${{prefix}}/lib\nincludedir=${{prefix}}/include\n\n\
             Name: {name}\nDescription: simlayer's libllama: GGUF models with a small KV cache\nVersion: {version}\n\
             Cflags: -I${{includedir}}\n\
             Libs: -L${{libdir}} -Wl,-rpath,${{libdir}} -lllama -lggml -lggml-cpu -lggml-rpc -lggml-base\n"
        );
        std::fs::write(pkgconfig.join(format!("{name}.pc")), text)?;
    }
    let cmake = out.join("lib/cmake/simlayer");
    std::fs::create_dir_all(&cmake)?;
    let library = |name: &str| {
        format!(
            "add_library(simlayer::{name} SHARED IMPORTED)\n\
             set_target_properties(simlayer::{name} PROPERTIES IMPORTED_LOCATION \"${{_simlayer}}/lib/lib{name}.so.0\")\n"
        )
    };
    let text = format!(
        "# find_package(simlayer), then link simlayer::llama.\n\
         get_filename_component(_simlayer \"${{CMAKE_CURRENT_LIST_DIR}}/../../..\" ABSOLUTE)\n\
         set(simlayer_VERSION {version})\n\
         if(NOT TARGET simlayer::llama)\n{}{}{}{}{}\
         set_target_properties(simlayer::llama PROPERTIES\n\
         \x20 INTERFACE_INCLUDE_DIRECTORIES \"${{_simlayer}}/include\"\n\
         \x20 INTERFACE_LINK_LIBRARIES \"simlayer::ggml;simlayer::ggml-cpu;simlayer::ggml-rpc;simlayer::ggml-base\")\n\
         endif()\n",
        library("ggml-base"),
        library("ggml-cpu"),
        library("ggml-rpc"),
        library("ggml"),
        library("llama"),
    );
    std::fs::write(cmake.join("simlayer-config.cmake"), text)?;
    Ok(())
}

/// Our license, and the notices of what others have written.
fn terms(env: &Env, source: &Path, out: &Path, portable: bool) -> Result<()> {
    std::fs::copy(root().join("LICENSE"), out.join("LICENSE"))?;
    let notices = notices::text(env, source, "simlayer-ffi", features(portable))?;
    std::fs::write(out.join("THIRD-PARTY"), notices)?;
    Ok(())
}

/// The features of simlayer-ffi that a build asks for.
fn features(portable: bool) -> &'static [&'static str] {
    if portable { &["portable"] } else { &[] }
}

fn symlink(target: &str, link: &Path) -> Result<()> {
    std::os::unix::fs::symlink(target, link).with_context(|| link.display().to_string())
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_functions_are_found() {
        let text =
            "struct llama_a * llama_b(int llama_c); typedef void (*llama_d)(int); xllama_e(); int llama_f (void);";
        assert_eq!(declared(text, "llama_"), ["llama_b", "llama_f"].map(str::to_owned).into());
    }
}
