//! Finds the pinned ggml source, compiles it with `cc` and binds it with `bindgen`.
//!
//! The source is the Cargo package `llama-cpp-sys-2`, pinned and checksummed by Cargo.lock.
//! `GGML_SOURCE_DIR` may name another copy of the llama.cpp tree (the folder that holds `ggml/`).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

const PACKAGE: &str = "llama-cpp-sys-2";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-env-changed=GGML_SOURCE_DIR");

    let source = source_dir();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    write_version_headers(&out);

    Library::new(&source, &out).build();
    bind(&source, &out);

    println!("cargo:source={}", source.display());
}

/// The llama.cpp tree to compile: `GGML_SOURCE_DIR`, or the folder where cargo unpacked the package.
fn source_dir() -> PathBuf {
    let source = match env::var_os("GGML_SOURCE_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => package_dir().join("llama.cpp"),
    };
    assert!(
        source.join("ggml/include/ggml.h").is_file(),
        "no ggml source in {}: set GGML_SOURCE_DIR to a llama.cpp tree or unset it to use the pinned one",
        source.display()
    );
    source
}

fn package_dir() -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("Cargo.toml");
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--format-version", "1", "--manifest-path"])
        .arg(&manifest)
        .output()
        .expect("cargo metadata starts");
    assert!(
        output.status.success(),
        "cargo metadata --locked failed for {}: {}",
        manifest.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == PACKAGE)
        .and_then(|package| package["manifest_path"].as_str())
        .and_then(|manifest| Path::new(manifest).parent())
        .unwrap_or_else(|| panic!("{PACKAGE} is not in cargo's metadata: is Cargo.lock the committed one?"))
        .to_path_buf()
}

/// Upstream's build writes these two headers from its git state; we name the package instead.
fn write_version_headers(out: &Path) {
    for (file, prefix) in [("ggml-version.h", "GGML"), ("llama-version.h", "LLAMA")] {
        let text = format!(
            "#pragma once\n#define {prefix}_VERSION \"{PACKAGE}-0.1.161\"\n#define {prefix}_COMMIT \"unknown\"\n"
        );
        fs::write(out.join(file), text).expect("OUT_DIR is writable");
    }
}

struct Library<'a> {
    source: &'a Path,
    out: &'a Path,
    openmp: bool,
}

impl<'a> Library<'a> {
    fn new(source: &'a Path, out: &'a Path) -> Self {
        let openmp = env::var_os("CARGO_FEATURE_OPENMP").is_some();
        Library { source, out, openmp }
    }

    /// Compiles one archive each for llama.cpp's files, ggml-cpu and ggml-base, users before used, since the
    /// linker resolves static archives in order.
    fn build(&self) {
        let llama = [
            "llama-vocab",
            "unicode",
            "unicode-data",
            "llama-sampler",
            "llama-grammar",
            "llama-chat",
            "llama-impl",
            "llama-model-loader",
            "llama-mmap",
            "llama-arch",
            "llama-hparams",
        ];
        let mut build = self.cpp();
        build.files(llama.iter().map(|name| self.source.join(format!("src/{name}.cpp"))));
        build.file("shim/vocab.cpp").include(self.source.join("src"));
        build.compile("simlayer-llama");

        let cpu = self.source.join("ggml/src/ggml-cpu");
        let mut c = vec!["ggml-cpu.c".into(), "quants.c".into()];
        let mut cpp: Vec<String> = [
            "ggml-cpu",
            "repack",
            "hbm",
            "traits",
            "amx/amx",
            "amx/mmq",
            "tiled/tiled",
            "tiled/tiled-kernel",
            "binary-ops",
            "unary-ops",
            "vec",
            "ops",
            "llamafile/sgemm",
        ]
        .map(|name| format!("{name}.cpp"))
        .into();
        match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
            Ok("x86_64") => {
                c.push("arch/x86/quants.c".to_owned());
                cpp.push("arch/x86/repack.cpp".to_owned());
            }
            Ok("aarch64") => {
                c.push("arch/arm/quants.c".to_owned());
                cpp.push("arch/arm/repack.cpp".to_owned());
            }
            // The generic code serves every other processor.
            _ => {}
        }
        self.archive("ggml-cpu", &cpu, &c, &cpp, |build| {
            build.include(&cpu);
            build.define("GGML_USE_CPU_REPACK", None).define("GGML_USE_LLAMAFILE", None);
            self.target_flags(build);
        });

        let base = self.source.join("ggml/src");
        let c = ["ggml.c", "ggml-alloc.c", "ggml-quants.c"].map(str::to_owned);
        let cpp = [
            "ggml.cpp",
            "ggml-backend.cpp",
            "ggml-backend-meta.cpp",
            "ggml-backend-reg.cpp",
            "ggml-backend-dl.cpp",
            "ggml-opt.cpp",
            "ggml-threading.cpp",
            "gguf.cpp",
        ]
        .map(str::to_owned);
        self.archive("ggml-base", &base, &c, &cpp, |build| {
            build.define("GGML_USE_CPU", None);
        });

        if self.openmp {
            println!("cargo:rustc-link-lib=dylib=gomp");
        }
    }

    /// One archive of C and C++ files: cc compiles one language at a time, so the C objects go into the C++ call.
    fn archive(&self, name: &str, dir: &Path, c: &[String], cpp: &[String], extra: impl Fn(&mut cc::Build)) {
        let mut c_build = self.common();
        c_build.std("gnu11").files(c.iter().map(|file| dir.join(file)));
        extra(&mut c_build);
        let mut cpp_build = self.cpp();
        cpp_build.files(cpp.iter().map(|file| dir.join(file))).objects(c_build.compile_intermediates());
        extra(&mut cpp_build);
        cpp_build.compile(name);
    }

    fn cpp(&self) -> cc::Build {
        let mut build = self.common();
        build.cpp(true).std("gnu++17");
        build
    }

    fn common(&self) -> cc::Build {
        let mut build = cc::Build::new();
        build
            // ggml unoptimised is some fifty times slower: cargo's debug profile is about our own code.
            .opt_level(3)
            .debug(false)
            .define("NDEBUG", None)
            .define("_GNU_SOURCE", None)
            .define("GGML_SCHED_MAX_COPIES", "4")
            .include(self.source.join("ggml/include"))
            .include(self.source.join("ggml/src"))
            .include(self.source.join("include"))
            .include(self.out)
            .warnings(false)
            .extra_warnings(false);
        if self.openmp {
            build.define("GGML_USE_OPENMP", None).flag("-fopenmp");
        }
        build
    }

    /// The processor to compile for: this one, or one that any packager's user has.
    fn target_flags(&self, build: &mut cc::Build) {
        let portable = env::var_os("CARGO_FEATURE_PORTABLE").is_some();
        let cross = env::var("HOST") != env::var("TARGET");
        match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
            Ok("x86_64") if portable || cross => build.flag("-march=x86-64-v3"),
            Ok("x86_64") => build.flag("-march=native"),
            Ok("aarch64") if portable || cross => build.flag("-march=armv8.2-a+dotprod+fp16"),
            Ok("aarch64") => build.flag("-mcpu=native"),
            _ => build,
        };
    }
}

fn bind(source: &Path, out: &Path) {
    let include = |dir: &str| format!("-I{}", source.join(dir).display());
    bindgen::Builder::default()
        .header("shim/bindings.h")
        .clang_args([include("ggml/include"), include("include")])
        .allowlist_item("(ggml|gguf|llama|simlayer)_.*")
        .allowlist_item("(GGML|GGUF|LLAMA)_.*")
        .blocklist_type("FILE|_IO_FILE")
        .raw_line("pub type FILE = ::std::os::raw::c_void;")
        .prepend_enum_name(false)
        .layout_tests(false)
        .derive_debug(true)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads ggml's headers (it needs libclang: Debian package libclang-dev)")
        .write_to_file(out.join("bindings.rs"))
        .expect("OUT_DIR is writable");
}
