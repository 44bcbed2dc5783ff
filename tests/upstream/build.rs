//! Links ggml's CUDA kernels where the feature `cuda` asks for them: the archive that ggml-sys compiled from the same
//! package (`GGML_CUDA_ARCHIVE`), with the runtime in `CUDA_PATH`. Upstream's own build would compile them once more, and
//! does not find the toolkit where it consists of Python packages.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let path = |variable: &str| -> PathBuf {
        println!("cargo:rerun-if-env-changed={variable}");
        let value = env::var_os(variable);
        value.unwrap_or_else(|| panic!("{variable} is not set: `cargo xtask cuda-check` sets it")).into()
    };
    let (archive, cuda) = (path("GGML_CUDA_ARCHIVE"), path("CUDA_PATH"));
    println!("cargo:rerun-if-changed={}", archive.display());
    println!("cargo:rustc-link-search=native={}", archive.parent().expect("a folder").display());
    println!("cargo:rustc-link-lib=static:-bundle=ggml-cuda");
    let dirs = ["lib64", "lib", "targets/x86_64-linux/lib"].map(|dir| cuda.join(dir));
    for dir in dirs.iter().filter(|dir| dir.is_dir()) {
        println!("cargo:rustc-link-search=native={}", dir.display());
    }
    println!("cargo:rustc-link-lib=static:-bundle=cudart_static");
    // Python packages of CUDA lack the name without a version.
    let has = |name: &str| dirs.iter().any(|dir| dir.join(name).is_file());
    match ["13", "12"].map(|version| format!("libcublas.so.{version}")).into_iter().find(|name| has(name)) {
        Some(versioned) if !has("libcublas.so") => println!("cargo:rustc-link-lib=dylib:+verbatim={versioned}"),
        _ => println!("cargo:rustc-link-lib=dylib=cublas"),
    }
    for library in ["dl", "rt", "pthread"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
}
