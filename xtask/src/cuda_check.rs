//! That the feature `cuda` compiles and links, and that a program with it runs where there is no card: no GPU is needed.
//! Where there is one, the tests of logits and lazy layers run on it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::card_bench;
use crate::prepare::{self, Env};
use crate::sh::{self, step};
use crate::test::build_cuda_reference;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to compile for, as SIMLAYER_CUDA_ARCHS; by default this machine's card, or 80-real where there is none.
    #[arg(long)]
    archs: Option<String>,
    /// No tests where there is a card.
    #[arg(long)]
    no_tests: bool,
    /// Where there is a card, measure what it gains, too: see `cargo xtask card-bench`.
    #[arg(long)]
    bench: bool,
    /// A llama-batched-bench for the card, of the same revision, to compare with.
    #[arg(long, value_name = "FILE", requires = "bench")]
    llama_batched_bench: Option<PathBuf>,
    /// Pairs of cache types to compile flash attention for, as SIMLAYER_CUDA_FLASH_TYPES; `all` for every one, which is
    /// what a build of one's own has and takes 45 files more.
    #[arg(long, default_value = "f16-f16,bf16-bf16,q8_0-q8_0,q4_0-q4_0")]
    flash_types: String,
}

/// The device that the tests run on.
const DEVICE: &str = "CUDA0";

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    prepare::cmake(&mut env)?;
    let model = step("model", prepare::model)?;
    let toolkit = step("toolkit (760 MiB)", toolkit)?;
    let archs = args.archs.clone().unwrap_or_else(|| {
        // A cubin runs on cards of its own generation only.
        let has_card = sh::on_path("nvidia-smi") && sh::succeeds(Command::new("nvidia-smi").arg("-L"));
        if has_card { "native" } else { "80-real" }.to_owned()
    });
    let cargo = |arguments: &[&str]| {
        let mut cargo = env.cargo();
        cargo.args(arguments).args(["--release", "--features", "cuda", "--package", "simlayer"]);
        cargo.env("CARGO_TARGET_DIR", target_dir()).env("CUDA_PATH", &toolkit).env("SIMLAYER_CUDA_ARCHS", &archs);
        match args.flash_types.as_str() {
            "all" => cargo.env_remove("SIMLAYER_CUDA_FLASH_TYPES"),
            types => cargo.env("SIMLAYER_CUDA_FLASH_TYPES", types),
        };
        cargo
    };
    step("kernels and library", || sh::run(&mut cargo(&["build", "--lib"])))?;
    step("program", || sh::run(&mut cargo(&["build", "--bin", "simlayer-run"])))?;
    step("devices", || devices(&toolkit))?;
    let has_card = step("a run", || generate(&toolkit, &model))?;
    if !has_card {
        return Ok(());
    }
    if !args.no_tests {
        tests(&env, &toolkit, &cargo)?;
    }
    if args.bench {
        card_bench::run(&card_bench::Args::of_card(args.llama_batched_bench.clone()))?;
    }
    Ok(())
}

/// The tests of logits and lazy layers on the card.
fn tests(env: &Env, toolkit: &Path, cargo: &dyn Fn(&[&str]) -> Command) -> Result<()> {
    let reference = step("reference (unmodified llama.cpp)", || {
        build_cuda_reference(env, &kernels()?, toolkit, &cuda_dir().join("upstream"))
    })?;
    step("tests", || {
        let mut test = cargo(&["test", "--test", "logits", "--test", "lazy", "--no-fail-fast"]);
        test.args(["--", "--test-threads=1", "--nocapture"]);
        test.env("SIMLAYER_TEST_DEVICE", DEVICE).env("SIMLAYER_UPSTREAM_REF", reference);
        sh::run(test.env("LD_LIBRARY_PATH", toolkit.join("lib")))
    })
}

/// The archive of kernels that was compiled last.
fn kernels() -> Result<PathBuf> {
    let folder = target_dir().join("release/build");
    let builds = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?.flatten();
    let archives = builds.map(|build| build.path().join("out/libggml-cuda.a")).filter(|file| file.is_file());
    let newest = archives.max_by_key(|file| file.metadata().and_then(|metadata| metadata.modified()).ok());
    newest.with_context(|| format!("{}: no libggml-cuda.a", folder.display()))
}

fn cuda_dir() -> PathBuf {
    prepare::tools_dir().join("cuda")
}

fn target_dir() -> PathBuf {
    cuda_dir().join("target")
}

/// The program for a card, once it was built.
pub fn program_path() -> PathBuf {
    target_dir().join("release/simlayer-run")
}

/// Lets a program find cuBLAS beside the compiler that was fetched, where it was.
pub fn finds_libraries(command: &mut Command) {
    let libraries = cuda_dir().join("toolkit/nvidia/cu13/lib");
    if libraries.is_dir() {
        command.env("LD_LIBRARY_PATH", libraries);
    }
}

/// The folder with nvcc, headers and libraries, as pip puts them; fetched when it is not there.
fn toolkit() -> Result<PathBuf> {
    let packages = cuda_dir().join("toolkit");
    let root = packages.join("nvidia/cu13");
    if !root.join("bin/nvcc").is_file() {
        let mut pip = prepare::pip()?;
        pip.args(["install", "--quiet", "--no-deps", "--require-hashes", "--upgrade"]);
        sh::run(pip.arg("--target").arg(&packages).arg("-r").arg(prepare::requirements("cuda")))?;
    }
    eprintln!("{}", sh::output(Command::new(root.join("bin/nvcc")).arg("--version"))?.trim_end());
    Ok(root)
}

/// The program, which finds cuBLAS beside the compiler.
fn program(toolkit: &Path) -> Command {
    let mut command = sh::command(target_dir().join("release/simlayer-run"));
    command.env("LD_LIBRARY_PATH", toolkit.join("lib"));
    command
}

fn devices(toolkit: &Path) -> Result<()> {
    println!("{}", sh::output(program(toolkit).arg("devices"))?.trim_end());
    let listed: Value = serde_json::from_str(&sh::output(program(toolkit).args(["devices", "--json"]))?)?;
    let backends = listed["backends"].as_array().context("no list of backends")?;
    ensure!(backends.iter().any(|name| name == "CUDA"), "the CUDA backend is not registered: {listed}");
    Ok(())
}

/// With a card it runs there, without one on the processor, and says so. Whether there is one.
fn generate(toolkit: &Path, model: &Path) -> Result<bool> {
    let listed: Value = serde_json::from_str(&sh::output(program(toolkit).args(["devices", "--json"]))?)?;
    let devices = listed["devices"].as_array().context("no list of devices")?;
    let has_card = devices.iter().any(|device| device["backend"] == "CUDA");
    let mut command = program(toolkit);
    command.arg("-m").arg(model).args(["-p", "The sea is", "-n", "16", "--temp", "0", "--verbose"]);
    let output = command.output().with_context(|| sh::shown(&command))?;
    let [text, told] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    ensure!(output.status.success(), "`{}` failed: {told}", sh::shown(&command));
    let lines = told.lines().filter(|line| line.starts_with("no device of CUDA") || line.starts_with("layers: "));
    println!("{}\n{}", lines.collect::<Vec<_>>().join("\n"), text.trim_end());
    let falls_back = told.contains("no device of CUDA was found: running on the processor");
    ensure!(
        falls_back != has_card,
        "a run says nothing of the card that is missing, or misses one that is there: {told}"
    );
    if !has_card {
        println!("There is no card here: no kernel has run.");
    }
    Ok(has_card)
}
