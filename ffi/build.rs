//! Compiles the C++ entry points of llama.cpp's llama-ext.h.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=src/ext.cpp");
    let source = PathBuf::from(env::var_os("DEP_GGML_SOURCE").expect("ggml-sys says where its source is"));
    // For the layout test.
    println!("cargo:rustc-env=LLAMA_SOURCE={}", source.display());
    cc::Build::new()
        .cpp(true)
        .std("gnu++17")
        .opt_level(2)
        .include(source.join("include"))
        .include(source.join("src"))
        .include(source.join("ggml/include"))
        .file("src/ext.cpp")
        .compile("simlayer-ext");
}
