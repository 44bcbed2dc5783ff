//! Compiles what has to be C++: the entry points of llama.cpp's llama-ext.h, and the checks in front of the functions of
//! llama.h that are llama.cpp's own.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=src/ext.cpp");
    println!("cargo:rerun-if-changed=src/reused.cpp");
    println!("cargo:rerun-if-changed=src/upstream.h");
    let told = |name: &str| PathBuf::from(env::var_os(name).expect("ggml-sys says where its source and its shim are"));
    let (source, shim) = (told("DEP_GGML_SOURCE"), told("DEP_GGML_SHIM"));
    // For the layout test.
    println!("cargo:rustc-env=LLAMA_SOURCE={}", source.display());
    // For what callers of another revision are told.
    println!("cargo:rustc-env=LLAMA_VERSION={}", env::var("DEP_GGML_LLAMA").unwrap_or_default());
    // Nothing is linked where only the bindings are made.
    if env::var("DEP_GGML_BINDINGS_ONLY").as_deref() == Ok("true") {
        return;
    }
    cc::Build::new()
        .cpp(true)
        .std("gnu++17")
        .opt_level(2)
        .include(source.join("include"))
        .include(source.join("src"))
        .include(source.join("ggml/include"))
        .include(shim)
        // llama.h's old names are checked as well.
        .flag("-Wno-deprecated-declarations")
        .files(["src/ext.cpp", "src/reused.cpp"])
        .compile("simlayer-ext");
}
