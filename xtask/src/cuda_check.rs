//! That the feature `cuda` compiles and links, and that a program with it runs where there is no card: no GPU is needed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::prepare::{self, Env};
use crate::sh::{self, step};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to compile for, as SIMLAYER_CUDA_ARCHS.
    #[arg(long, default_value = "80-real")]
    archs: String,
    /// Pairs of cache types to compile flash attention for, as SIMLAYER_CUDA_FLASH_TYPES; `all` for every one, which is
    /// what a build of one's own has and takes 45 files more.
    #[arg(long, default_value = "f16-f16,bf16-bf16,q8_0-q8_0,q4_0-q4_0")]
    flash_types: String,
}

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    prepare::libclang(&mut env)?;
    let model = step("model", prepare::model)?;
    let toolkit = step("toolkit (800 MB)", toolkit)?;
    let build = |arguments: &[&str]| -> Result<()> {
        let mut cargo = env.cargo();
        cargo.args(["build", "--release", "--features", "cuda"]).args(arguments);
        cargo.env("CARGO_TARGET_DIR", target_dir()).env("CUDA_PATH", &toolkit).env("SIMLAYER_CUDA_ARCHS", &args.archs);
        match args.flash_types.as_str() {
            "all" => cargo.env_remove("SIMLAYER_CUDA_FLASH_TYPES"),
            types => cargo.env("SIMLAYER_CUDA_FLASH_TYPES", types),
        };
        sh::run(&mut cargo)
    };
    step("kernels and library", || build(&["--package", "simlayer", "--lib"]))?;
    step("program", || build(&["--package", "simlayer", "--bin", "simlayer-run"]))?;
    step("devices", || devices(&toolkit))?;
    step("a run", || generate(&toolkit, &model))
}

fn cuda_dir() -> PathBuf {
    prepare::tools_dir().join("cuda")
}

fn target_dir() -> PathBuf {
    cuda_dir().join("target")
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
    let mut command = Command::new(target_dir().join("release/simlayer-run"));
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

/// With a card it runs there, without one on the processor, and says so.
fn generate(toolkit: &Path, model: &Path) -> Result<()> {
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
    Ok(())
}
