//! The project's chores, run as `cargo xtask <command>`.

mod abi;
mod arm_check;
mod bump;
mod card_bench;
mod compare;
mod cuda_check;
mod demo;
mod dist;
mod frontends;
mod fuzz;
mod mesa;
mod notices;
mod package;
mod page;
mod parking;
mod plot;
mod prepare;
mod quality;
mod rpc_check;
mod rss;
mod serve_held;
mod serve_load;
mod serving;
mod sh;
mod test;
mod upstream;
mod upstream_library;
mod valgrind;
mod versions;
mod vulkan_check;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fetch a small model, build, and answer a question about a long text.
    Demo,
    /// Everything that continuous integration checks, or the quick part of it.
    Test(test::Args),
    /// Build llama.cpp's own tools, to compare with.
    Upstream(upstream::Args),
    /// Our speed against llama-bench, in alternating runs.
    Compare(compare::Args),
    /// Our resident memory against llama-simple's.
    Rss(rss::Args),
    /// Make dist/: a drop-in libllama.so.0 for llama.cpp's frontends, with headers.
    Dist(dist::Args),
    /// Make what people install, in Debian 11's root: tarball, deb, wheel; or install and run them in a fresh Debian.
    Package(package::Args),
    /// What another version of the package that llama.cpp comes from would change here; with --apply, move there.
    Bump(bump::Args),
    /// Compare releases of llama-cpp-python with our llama.cpp, for the table in docs/c-abi.md.
    Versions,
    /// What lazy layers cost on texts of different kinds.
    Quality(quality::Args),
    /// Run llama.cpp's own frontends and llama-cpp-python, unmodified, on our library.
    Frontends(frontends::Args),
    /// Try the server's page in Chromium, and take pictures of it.
    Page(page::Args),
    /// Many conversations with a server that has memory for few: restoring them against reading them anew.
    Parking(parking::Args),
    /// Many clients of `simlayer-run serve` at once: its memory, and how long running answers wait.
    ServeLoad(serve_load::Args),
    /// How many long conversations a budget of memory holds: `simlayer-run serve` against llama-server.
    ServeHeld(serve_held::Args),
    /// Run the tests of attention and products as compiled for 64-bit Arm, on QEMU's processors.
    ArmCheck,
    /// What a card gains, against llama.cpp on the same card, in ten minutes; --dry-run tries it on the processor.
    CardBench(card_bench::Args),
    /// Compile and link ggml's CUDA kernels with a compiler of its own (no GPU needed; takes long).
    CudaCheck(cuda_check::Args),
    /// Run the tests of logits and lazy layers with weights and caches on two RPC servers.
    RpcCheck(rpc_check::Args),
    /// Compile ggml's Vulkan backend and run the tests on Mesa's software driver (no GPU needed; takes long).
    VulkanCheck(vulkan_check::Args),
    /// Run the C programs of the tests under Valgrind.
    Valgrind,
    /// Run the fuzz targets: files as models, chat templates, grammars.
    Fuzz(fuzz::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo => demo::run(),
        Command::Test(args) => test::run(&args),
        Command::Upstream(args) => upstream::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Rss(args) => rss::run(&args),
        Command::Dist(args) => dist::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Bump(args) => bump::run(&args),
        Command::Versions => versions::run(),
        Command::Quality(args) => quality::run(&args),
        Command::Frontends(args) => frontends::run(&args),
        Command::Page(args) => page::run(&args),
        Command::Parking(args) => parking::run(&args),
        Command::ServeLoad(args) => serve_load::run(&args),
        Command::ServeHeld(args) => serve_held::run(&args),
        Command::ArmCheck => arm_check::run(),
        Command::CardBench(args) => card_bench::run(&args),
        Command::CudaCheck(args) => cuda_check::run(&args),
        Command::RpcCheck(args) => rpc_check::run(&args),
        Command::VulkanCheck(args) => vulkan_check::run(&args),
        Command::Valgrind => valgrind::run(),
        Command::Fuzz(args) => fuzz::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nxtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's root.
fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or(manifest.clone(), |p| p.to_path_buf())
}

#[cfg(test)]
#[path = "../../tests/support/src/markdown.rs"]
mod markdown;

#[cfg(test)]
mod tests {
    use super::*;

    /// The chores that the documentation names, with their options.
    #[test]
    fn documented_chores_are_understood() {
        let mut n = 0;
        for (file, text) in markdown::documents(&root()) {
            for (line, words) in markdown::commands(&text) {
                if words.first().is_some_and(|word| word == "cargo") && words.get(1).is_some_and(|word| word == "xtask")
                {
                    n += 1;
                    let parsed = Cli::try_parse_from(&words[1..]);
                    assert!(parsed.is_ok(), "{file}:{line}: {}", parsed.unwrap_err());
                }
            }
        }
        assert!(n > 5, "{n} commands were found");
    }
}
