//! ggml's Vulkan backend: shaders by glslc, turned into C++ by a program of ggml's own, and the files that drive them.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{Library, files_ending, in_parallel, stop};

/// What Debian calls the packages that a build needs.
const PACKAGES: &str = "Debian: libvulkan-dev, glslc, spirv-headers";

/// GLSL extensions that a glslc may lack, the shader that tries each, and what says that it is there. ggml's shaders
/// and the code that chooses among them depend on these.
const EXTENSIONS: [(&str, &str, &str); 7] = [
    ("GL_KHR_cooperative_matrix", "coopmat", "COOPMAT"),
    ("GL_NV_cooperative_matrix2", "coopmat2", "COOPMAT2"),
    ("GL_NV_cooperative_matrix_decode_vector", "coopmat2_decode_vector", "COOPMAT2_DECODE_VECTOR"),
    ("GL_EXT_integer_dot_product", "integer_dot", "INTEGER_DOT"),
    ("GL_EXT_bfloat16", "bfloat16", "BFLOAT16"),
    ("GL_EXT_float_e2m1", "float_e2m1", "FLOAT_E2M1"),
    ("GL_EXT_float_e4m3", "float_e4m3", "FLOAT_E4M3"),
];

/// The compiler of shaders, and the SDK that holds headers and library where the system does not.
pub struct Vulkan {
    glslc: PathBuf,
    sdk: Option<PathBuf>,
}

impl Vulkan {
    /// `GLSLC`, or glslc in `VULKAN_SDK`, or on the PATH.
    pub fn find() -> Vulkan {
        for variable in ["GLSLC", "VULKAN_SDK"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let sdk = env::var_os("VULKAN_SDK").map(PathBuf::from);
        let path = env::var_os("PATH").unwrap_or_default();
        let in_sdk = sdk.iter().map(|sdk| sdk.join("bin"));
        let found = in_sdk.chain(env::split_paths(&path)).map(|dir| dir.join("glslc")).find(|file| file.is_file());
        let glslc = env::var_os("GLSLC").map(PathBuf::from).filter(|file| file.is_file()).or(found);
        let Some(glslc) = glslc else {
            stop(&format!(
                "the feature `vulkan` needs the compiler of shaders glslc: install it ({PACKAGES}), or set GLSLC to \
                 the program, or VULKAN_SDK to the folder that holds bin/glslc; or build without the feature"
            ));
        };
        Vulkan { glslc, sdk }
    }

    pub fn build(&self, library: &Library<'_>) {
        let dir = library.source.join("ggml/src/ggml-vulkan");
        self.check_headers(library);
        let defines = self.defines(&dir);
        let generated = self.shaders(library, &dir, &defines);

        // Arrays of bytes: there is nothing to optimise.
        let mut arrays = library.cpp();
        arrays.opt_level(0).include(library.out).files(generated);
        let mut build = self.compiler(library);
        for define in &defines {
            build.define(define, None);
        }
        let drivers = ["ggml-vulkan", "ggml-vulkan-buffers", "ggml-vulkan-debug"];
        build.files(drivers.map(|name| dir.join(name).with_extension("cpp")));
        build.objects(arrays.compile_intermediates());
        build.compile("ggml-vulkan");

        if let Some(sdk) = &self.sdk {
            println!("cargo:rustc-link-search=native={}", sdk.join("lib").display());
        }
        println!("cargo:rustc-link-lib=dylib=vulkan");
    }

    fn compiler(&self, library: &Library<'_>) -> cc::Build {
        let mut build = library.cpp();
        build.flag("-include").flag("shim/vulkan.h");
        if let Some(sdk) = &self.sdk {
            build.include(sdk.join("include"));
        }
        build
    }

    fn check_headers(&self, library: &Library<'_>) {
        let file = library.out.join("vulkan-headers.cpp");
        let tried = [
            ("vulkan/vulkan.hpp", &["vulkan/vulkan.hpp"][..]),
            ("spirv/unified1/spirv.hpp", &["spirv/unified1/spirv.hpp", "spirv-headers/spirv.hpp", "spirv.hpp"]),
        ];
        for (name, places) in tried {
            let any: Vec<String> = places.iter().map(|place| format!("__has_include(<{place}>)")).collect();
            let text = format!("#if {}\nthe header is there\n#endif\n", any.join(" || "));
            fs::write(&file, text).expect("OUT_DIR is writable");
            let mut build = library.cpp();
            if let Some(sdk) = &self.sdk {
                build.include(sdk.join("include"));
            }
            let expanded = build.file(&file).try_expand().unwrap_or_default();
            if !String::from_utf8_lossy(&expanded).contains("the header is there") {
                stop(&format!(
                    "the feature `vulkan` needs the header {name}: install it ({PACKAGES}), or set VULKAN_SDK to the \
                     folder that holds include/{name}; or build without the feature"
                ));
            }
        }
    }

    /// What this glslc can compile.
    fn defines(&self, dir: &Path) -> Vec<String> {
        let knows = |extension: &str, shader: &str| {
            let mut command = Command::new(&self.glslc);
            command.args(["-o", "-", "-fshader-stage=compute", "--target-env=vulkan1.3"]);
            command.arg(dir.join(format!("vulkan-shaders/feature-tests/{shader}.comp")));
            let output = command.output().unwrap_or_else(|error| stop(&format!("{command:?}: {error}")));
            let told = String::from_utf8_lossy(&output.stderr);
            !told.contains(&format!("extension not supported: {extension}"))
        };
        let known = EXTENSIONS.into_iter().filter(|(extension, shader, _)| knows(extension, shader));
        known.map(|(.., name)| format!("GGML_VULKAN_{name}_GLSLC_SUPPORT")).collect()
    }

    /// Compiles the shaders and returns the files of C++ that hold them. ggml's generator knows the variants of each.
    fn shaders(&self, library: &Library<'_>, dir: &Path, defines: &[String]) -> Vec<PathBuf> {
        let shaders = dir.join("vulkan-shaders");
        let generator = library.out.join("vulkan-shaders-gen");
        compile_generator(&shaders.join("vulkan-shaders-gen.cpp"), &generator, defines);
        let header = library.out.join("ggml-vulkan-shaders.hpp");
        let generate = |source: Option<(&Path, &Path)>| {
            let mut command = Command::new(&generator);
            command.arg("--output-dir").arg(library.out.join("vulkan-shaders.spv")).arg("--target-hpp").arg(&header);
            if let Some((from, to)) = source {
                command.arg("--glslc").arg(&self.glslc).arg("--source").arg(from).arg("--target-cpp").arg(to);
            }
            run(&mut command);
        };
        generate(None);
        let mut sources = files_ending(&shaders, ".comp");
        // Those with hundreds of variants are the ones to begin with.
        let is_large =
            |name: &str| ["mul_mm", "mul_mat_vec.", "flash_attn."].iter().any(|large| name.starts_with(large));
        sources.sort_by_key(|file| (!is_large(file_name(file)), file.clone()));
        in_parallel(sources, |source| {
            let to = library.out.join(format!("{}.cpp", file_name(&source)));
            generate(Some((&source, &to)));
            vec![to]
        })
    }
}

fn file_name(file: &Path) -> &str {
    file.file_name().and_then(OsStr::to_str).unwrap_or_default()
}

/// The generator runs here, whatever machine the library is for.
fn compile_generator(source: &Path, program: &Path, defines: &[String]) {
    let host = env::var("HOST").expect("cargo sets it");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").target(&host).host(&host).opt_level(0).debug(false).warnings(false);
    for define in defines {
        build.define(define, None);
    }
    let mut command = build.get_compiler().to_command();
    run(command.arg(source).arg("-o").arg(program).arg("-pthread"));
}

fn run(command: &mut Command) {
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            // Cargo takes one line for a message; all of it is in the build's log.
            eprintln!("{command:?}\n{told}");
            let first = told.lines().find(|line| !line.is_empty()).unwrap_or("no message");
            stop(&format!("{:?} failed ({}): {first}", command.get_program(), output.status));
        }
        Err(error) => stop(&format!("{:?} cannot be started: {error}", command.get_program())),
    }
}
