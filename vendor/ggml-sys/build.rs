//! Finds the pinned ggml source, compiles it with `cc` and binds it with `bindgen`.
//!
//! The source is the Cargo package `llama-cpp-sys-2`, pinned and checksummed by Cargo.lock.
//! `GGML_SOURCE_DIR` may name another copy of the llama.cpp tree (the folder that holds `ggml/`).
//!
//! With `GGML_BINDINGS_ONLY` (or `DOCS_RS`, which docs.rs sets) nothing is compiled: the bindings are made from the
//! headers, which is all that `cargo check` and `cargo doc` need. Programs do not link then.

#[path = "build/vulkan.rs"]
mod vulkan;

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

const PACKAGE: &str = "llama-cpp-sys-2";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=shim");
    for variable in ["GGML_SOURCE_DIR", "GGML_CPU_FLAGS", "GGML_BINDINGS_ONLY", "DOCS_RS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }

    let Source { folder, origin } = Source::find();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let bindings_only = ["GGML_BINDINGS_ONLY", "DOCS_RS"].into_iter().any(|name| env::var_os(name).is_some());
    if !bindings_only {
        write_version_headers(&out, &origin);
        Library::new(&folder, &out).build();
    }
    bind(&folder, &out);

    // For the build scripts of packages that use this one.
    println!("cargo:source={}", folder.display());
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:shim={here}/shim");
    println!("cargo:bindings_only={bindings_only}");
    println!("cargo:revision={} of {origin}", version(&folder, "ggml", "GGML"));
    println!("cargo:llama={} ({origin})", version(&folder, "", "LLAMA"));
    println!("cargo:rustc-env=LLAMA_SOURCE={}", folder.display());
}

/// The llama.cpp tree to compile.
struct Source {
    folder: PathBuf,
    /// Where it comes from, in words.
    origin: String,
}

impl Source {
    /// `GGML_SOURCE_DIR`, or the folder where cargo unpacked the package.
    fn find() -> Source {
        let source = match env::var_os("GGML_SOURCE_DIR").map(PathBuf::from) {
            Some(folder) => Source { origin: folder.display().to_string(), folder },
            None => package(),
        };
        assert!(
            source.folder.join("ggml/include/ggml.h").is_file(),
            "no ggml source in {}: set GGML_SOURCE_DIR to a llama.cpp tree or unset it to use the pinned one",
            source.folder.display()
        );
        source
    }
}

/// The version of ggml or of llama.cpp, as its build file says it.
fn version(source: &Path, folder: &str, prefix: &str) -> String {
    let file = fs::read_to_string(source.join(folder).join("CMakeLists.txt")).unwrap_or_default();
    let part = |name: &str| {
        let set = format!("set({prefix}_VERSION_{name} ");
        file.lines().find_map(|line| line.strip_prefix(&set)?.split(')').next()).unwrap_or("?").to_owned()
    };
    ["MAJOR", "MINOR", "PATCH"].map(part).join(".")
}

fn package() -> Source {
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
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let found = packages.find(|package| package["name"] == PACKAGE).and_then(|package| {
        let folder = Path::new(package["manifest_path"].as_str()?).parent()?.join("llama.cpp");
        Some(Source { folder, origin: format!("{PACKAGE}-{}", package["version"].as_str()?) })
    });
    found.unwrap_or_else(|| panic!("{PACKAGE} is not in cargo's metadata: is Cargo.lock the committed one?"))
}

/// Upstream's build writes these two headers from its git state; we name the package instead.
fn write_version_headers(out: &Path, origin: &str) {
    for (file, prefix) in [("ggml-version.h", "GGML"), ("llama-version.h", "LLAMA")] {
        let text = format!("#pragma once\n#define {prefix}_VERSION {origin:?}\n#define {prefix}_COMMIT \"unknown\"\n");
        fs::write(out.join(file), text).expect("OUT_DIR is writable");
    }
}

fn has_feature(name: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{name}")).is_some()
}

struct Library<'a> {
    source: &'a Path,
    out: &'a Path,
    openmp: bool,
}

impl<'a> Library<'a> {
    fn new(source: &'a Path, out: &'a Path) -> Self {
        let openmp = has_feature("OPENMP");
        Library { source, out, openmp }
    }

    /// Compiles one archive each for llama.cpp's files, ggml-cpu and ggml-base, users before used, since the
    /// linker resolves static archives in order.
    fn build(&self) {
        if has_feature("CHAT") {
            self.chat();
        }
        let llama = [
            "unicode-data",
            "llama-sampler",
            "llama-chat",
            "llama-impl",
            "llama-model-loader",
            "llama-mmap",
            "llama-arch",
            "llama-hparams",
        ];
        let mut build = self.cpp();
        build.files(llama.iter().map(|name| self.source.join(format!("src/{name}.cpp"))));
        build
            .files(["stack", "grammar", "pattern", "vocab"].map(|name| format!("shim/{name}.cpp")))
            .include(self.source.join("src"));
        // What recurses in these is bounded, and what is quadratic mended.
        let bounds =
            [("llama-vocab", "shim/fragments.h"), ("unicode", "shim/regex.h"), ("llama-grammar", "shim/grammar.h")];
        for (name, bounds) in bounds {
            let mut bounded = self.cpp();
            bounded.file(self.source.join(format!("src/{name}.cpp"))).include(self.source.join("src"));
            build.objects(bounded.flag("-include").flag(bounds).compile_intermediates());
        }
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
            // Which backends the registry knows.
            for feature in ["RPC", "CUDA", "VULKAN"].into_iter().filter(|feature| has_feature(feature)) {
                build.define(&format!("GGML_USE_{feature}"), None);
            }
        });
        if has_feature("RPC") {
            self.rpc();
        }
        if has_feature("CUDA") {
            Cuda::find().build(self);
        }
        if has_feature("VULKAN") {
            vulkan::Vulkan::find().build(self);
        }

        if self.openmp {
            println!("cargo:rustc-link-lib=dylib=gomp");
        }
    }

    /// llama.cpp's chat files: templates with tools, parsers of answers, JSON schemas to grammars.
    fn chat(&self) {
        let common = self.source.join("common");
        let named = |names: &[&str]| names.iter().map(|name| common.join(format!("{name}.cpp"))).collect();
        let mut parsers = files_ending(&common.join("parsers"), ".cpp");
        parsers.sort();
        // Each of these many files is small, and spends its time on the same headers.
        let units: [(&str, Vec<PathBuf>); 4] = [
            ("parsers", parsers),
            // In this order: the first of them specialises a template that others use.
            (
                "jinja",
                named(&["jinja/value", "jinja/string", "jinja/lexer", "jinja/parser", "jinja/runtime", "jinja/caps"]),
            ),
            (
                "templates",
                named(&[
                    "chat",
                    "chat-peg-parser",
                    "chat-auto-parser-generator",
                    "chat-auto-parser-helpers",
                    "chat-diff-analyzer",
                ]),
            ),
            ("peg", named(&["peg-parser", "json-schema-to-grammar", "json-schema", "trie", "unicode"])),
        ];
        let mut bounded = self.chat_compiler(&common);
        for (name, files) in units {
            let unit = self.out.join(format!("chat-{name}.cpp"));
            let text: String =
                files.iter().map(|file| format!("#include {:?}\n", file.display().to_string())).collect();
            fs::write(&unit, text).expect("OUT_DIR is writable");
            bounded.file(unit);
        }
        bounded.flag("-include").flag("shim/chat_bounds.h");
        // shim/chat.cpp says what for. Only gcc can leave functions out; elsewhere their input's size is what is bounded.
        if bounded.get_compiler().is_like_gnu() {
            bounded
                .flag("-finstrument-functions")
                .flag("-finstrument-functions-exclude-file-list=/c++/,/nlohmann/")
                .flag("-finstrument-functions-exclude-function-list=~,operator=,&&),hash,what");
        }
        let mut build = self.chat_compiler(&common);
        build.file(common.join("json.cpp")).file("shim/chat.cpp").objects(bounded.compile_intermediates());
        build.compile("simlayer-chat");
    }

    /// Nothing of these runs for each token of a prompt: they are to compile fast.
    fn chat_compiler(&self, common: &Path) -> cc::Build {
        let mut build = self.cpp();
        build.opt_level(1).include(self.source).include(common).include(self.source.join("vendor"));
        build
    }

    /// The client and the server of ggml's protocol for remote devices.
    fn rpc(&self) {
        let dir = self.source.join("ggml/src/ggml-rpc");
        let mut transport = self.cpp();
        transport.file(dir.join("transport.cpp"));
        if env::var_os("CARGO_CFG_UNIX").is_some() {
            // Its sockets never notice that the other machine is gone; ours do.
            transport.define("socket", "simlayer_rpc_socket");
        }
        let mut build = self.cpp();
        build.file(dir.join("ggml-rpc.cpp")).file("shim/rpc.cpp").objects(transport.compile_intermediates());
        build.compile("ggml-rpc");
    }

    /// One archive of C and C++ files: cc compiles one language at a time, so the C objects go into the C++ call.
    fn archive(&self, name: &str, dir: &Path, c: &[String], cpp: &[String], extra: impl Fn(&mut cc::Build)) {
        let mut c_build = self.host();
        c_build.std("gnu11").files(c.iter().map(|file| dir.join(file)));
        extra(&mut c_build);
        let mut cpp_build = self.cpp();
        cpp_build.files(cpp.iter().map(|file| dir.join(file))).objects(c_build.compile_intermediates());
        extra(&mut cpp_build);
        cpp_build.compile(name);
    }

    fn cpp(&self) -> cc::Build {
        let mut build = self.host();
        build.cpp(true).std("gnu++17");
        build
    }

    /// For the processor's compiler: nvcc does not know this flag.
    fn host(&self) -> cc::Build {
        let mut build = self.common();
        if self.openmp {
            build.flag("-fopenmp");
        }
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
            build.define("GGML_USE_OPENMP", None);
        }
        build
    }

    /// The processor to compile for: what `GGML_CPU_FLAGS` says to the compiler, or else this one, or one that any
    /// packager's user has.
    fn target_flags(&self, build: &mut cc::Build) {
        if let Ok(flags) = env::var("GGML_CPU_FLAGS") {
            flags.split_whitespace().for_each(|flag| _ = build.flag(flag));
            return;
        }
        let portable = has_feature("PORTABLE");
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

/// nvcc and the folder that it lies in, with CUDA's headers and libraries.
struct Cuda {
    nvcc: PathBuf,
    root: PathBuf,
}

/// Cache types that ggml's flash attention knows on CUDA, for keys and values in any combination.
const CUDA_FLASH_TYPES: [&str; 7] = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "f16"];

/// What `SIMLAYER_CUDA_ARCHS` is when it is not set: code for the cards of the last years, and for others what the
/// driver compiles when it is first run.
const CUDA_ARCHS: &str = "75-virtual;80-virtual;86-real;89-real;90-virtual";

impl Cuda {
    /// `NVCC`, or nvcc in `CUDA_PATH`, or on the PATH, or where NVIDIA's installer puts it.
    fn find() -> Cuda {
        for variable in ["CUDA_PATH", "NVCC", "SIMLAYER_CUDA_ARCHS", "SIMLAYER_CUDA_FLASH_TYPES"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let given = env::var_os("NVCC").map(PathBuf::from);
        let cuda_path = env::var_os("CUDA_PATH").map(PathBuf::from);
        let path = env::var_os("PATH").unwrap_or_default();
        let on_path = env::split_paths(&path).map(|dir| dir.join("nvcc")).find(|file| file.is_file());
        let usual = Some(PathBuf::from("/usr/local/cuda/bin/nvcc")).filter(|file| file.is_file());
        let nvcc = given.or_else(|| cuda_path.as_ref().map(|root| root.join("bin/nvcc"))).or(on_path).or(usual);
        let Some(nvcc) = nvcc.filter(|file| file.is_file()) else {
            stop(
                "the feature `cuda` needs NVIDIA's compiler: set CUDA_PATH to the folder that holds bin/nvcc, or NVCC \
                  to the program itself, or build without the feature (`cargo xtask cuda-check` fetches a compiler)",
            );
        };
        let above = nvcc.canonicalize().ok().and_then(|file| Some(file.parent()?.parent()?.to_owned()));
        let root = cuda_path.or(above).unwrap_or_default();
        Cuda { nvcc, root }
    }

    /// Compiles all kernels. Each file is a compilation of its own: where cc has several, it would compile for a link
    /// step on the device, which ggml is not written for.
    fn build(&self, library: &Library<'_>) {
        let dir = library.source.join("ggml/src/ggml-cuda");
        let flash_types = self.flash_types();
        let mut files = files_ending(&dir, ".cu");
        let mut instances = files_ending(&dir.join("template-instances"), ".cu");
        instances.retain(|file| {
            let name = file.file_stem().and_then(OsStr::to_str).unwrap_or_default();
            match name.strip_prefix("fattn-vec-instance-") {
                Some(types) => flash_types.iter().any(|compiled| compiled == types),
                None => true,
            }
        });
        files.extend(instances);
        files.sort();

        // SAFETY: there are no other threads yet. cc reads the compiler's name from there.
        unsafe { env::set_var("NVCC", &self.nvcc) };
        let objects =
            in_parallel(files, |file| self.compiler(library, &flash_types).file(file).compile_intermediates());
        let mut archive = library.cpp();
        archive.objects(objects);
        archive.compile("ggml-cuda");
        self.link();
    }

    fn compiler(&self, library: &Library<'_>, flash_types: &[String]) -> cc::Build {
        let mut build = library.common();
        build.cuda(true).std("c++17").include(self.root.join("include"));
        build.flag("-use_fast_math").flag("-extended-lambda").flag("-compress-mode=size").flag("-diag-suppress=177");
        build.define("GGML_CUDA_USE_GRAPHS", None);
        // Without it CUDA's driver would have to be there to link, and to start.
        build.define("GGML_CUDA_NO_VMM", None);
        build.define("GGML_CUDA_FA_QUANTS", format!("\"{}\"", flash_types.join(",")).as_str());
        for [k, v] in pairs() {
            let compiled = flash_types.contains(&format!("{k}-{v}"));
            let name = format!("GGML_CUDA_FA_{k}_{v}").to_uppercase();
            build.define(&name, if compiled { "1" } else { "0" });
        }
        let archs = env::var("SIMLAYER_CUDA_ARCHS").unwrap_or_else(|_| CUDA_ARCHS.to_owned());
        for arch in archs.split([';', ',']).filter(|arch| !arch.is_empty()) {
            match arch.split_once('-') {
                _ if arch == "native" => build.flag("-arch=native"),
                Some((arch, "virtual")) => build.flag(format!("-gencode=arch=compute_{arch},code=compute_{arch}")),
                Some((arch, "real")) => build.flag(format!("-gencode=arch=compute_{arch},code=sm_{arch}")),
                None => build.flag(format!("-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]")),
                Some(_) => stop(&format!(
                    "SIMLAYER_CUDA_ARCHS has {arch}: give native, or numbers such as 86, 86-real or 86-virtual"
                )),
            };
        }
        build
    }

    /// The pairs of key and value types to compile flash attention for: all, or those that are asked for.
    fn flash_types(&self) -> Vec<String> {
        let all: Vec<String> = pairs().map(|[k, v]| format!("{k}-{v}")).collect();
        let Ok(asked) = env::var("SIMLAYER_CUDA_FLASH_TYPES") else { return all };
        let asked: Vec<String> = asked.split([';', ',']).map(str::to_owned).collect();
        if let Some(unknown) = asked.iter().find(|pair| !all.contains(pair)) {
            stop(&format!(
                "SIMLAYER_CUDA_FLASH_TYPES has {unknown}: give pairs such as f16-f16 or q8_0-q4_0, of {}",
                CUDA_FLASH_TYPES.join(", ")
            ));
        }
        asked
    }

    /// The runtime goes into the program. cuBLAS, half a gigabyte, stays a shared library.
    fn link(&self) {
        let dirs = ["lib64", "lib", "lib/x64", "targets/x86_64-linux/lib"].map(|dir| self.root.join(dir));
        for dir in dirs.iter().filter(|dir| dir.is_dir()) {
            println!("cargo:rustc-link-search=native={}", dir.display());
        }
        for library in ["cudart_static", "dl", "rt", "pthread"] {
            let kind = if library == "cudart_static" { "static" } else { "dylib" };
            println!("cargo:rustc-link-lib={kind}={library}");
        }
        // Python packages of CUDA lack the names without a version.
        let named = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let names: Vec<_> = dirs.iter().flat_map(|dir| named(dir)).collect();
        let found = |name: &str| names.iter().any(|found| found == OsStr::new(name));
        match ["13", "12", "11"].map(|version| format!("libcublas.so.{version}")).iter().find(|name| found(name)) {
            Some(versioned) if !found("libcublas.so") => {
                println!("cargo:rustc-link-lib=dylib:+verbatim={versioned}");
            }
            _ => println!("cargo:rustc-link-lib=dylib=cublas"),
        }
    }
}

fn pairs() -> impl Iterator<Item = [&'static str; 2]> {
    CUDA_FLASH_TYPES.into_iter().flat_map(|k| CUDA_FLASH_TYPES.map(|v| [k, v]))
}

fn files_ending(dir: &Path, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|file| file.file_name().and_then(OsStr::to_str).is_some_and(|name| name.ends_with(end))).collect()
}

/// Calls `make` for each file, in as many threads as cargo allows, and returns all that it makes.
fn in_parallel(files: Vec<PathBuf>, make: impl Fn(PathBuf) -> Vec<PathBuf> + Sync) -> Vec<PathBuf> {
    let queue = Mutex::new(files.into_iter());
    let made = Mutex::new(Vec::new());
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no thread panics with it").next();
                    let Some(file) = next else { break };
                    let files = make(file);
                    made.lock().expect("no thread panics with it").extend(files);
                }
            });
        }
    });
    let mut made = made.into_inner().expect("the threads have ended");
    // Archives are the same whichever thread was faster.
    made.sort();
    made
}

/// Ends the build with a message, without a panic's noise.
fn stop(why: &str) -> ! {
    println!("cargo:error={why}");
    std::process::exit(1)
}

fn bind(source: &Path, out: &Path) {
    let include = |dir: &str| format!("-I{}", source.join(dir).display());
    let mut clang_args = vec![include("ggml/include"), include("include")];
    for feature in ["RPC", "CHAT"].into_iter().filter(|feature| has_feature(feature)) {
        clang_args.push(format!("-DSIMLAYER_{feature}"));
    }
    bindgen::Builder::default()
        .header("shim/bindings.h")
        .clang_args(clang_args)
        .allowlist_item("(ggml|gguf|llama|simlayer)_.*")
        .allowlist_item("(GGML|GGUF|LLAMA|RPC_PROTO)_.*")
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
