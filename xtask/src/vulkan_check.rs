//! That the feature `vulkan` compiles and links, and that the tests of logits and lazy layers pass with weights and
//! caches on a Vulkan device: Mesa's software driver, so that no GPU is needed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::mesa;
use crate::prepare::{self, Env};
use crate::sh::{self, step};
use crate::test::build_reference;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Use the drivers that the machine has in place of Mesa's software driver.
    #[arg(long)]
    own_driver: bool,
    /// Build, list devices and generate; no tests.
    #[arg(long)]
    no_tests: bool,
    /// Divide lengths of texts and windows of the tests on SmolLM2 by this: the software driver reads 25 tokens a second.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    shorter: u32,
}

/// The device that all is tried on.
const DEVICE: &str = "Vulkan0";

pub fn run(args: &Args) -> Result<()> {
    let mut env = Env::default();
    step("packages", || {
        prepare::libclang(&mut env)?;
        prepare::cmake(&mut env)?;
        prepare::vulkan(!args.own_driver)?;
        if args.own_driver { Ok(()) } else { driver_is_new_enough() }
    })?;
    let model = step("model", prepare::model)?;
    let vulkan = Vulkan { driver: if args.own_driver { None } else { Some(software_driver()?) } };
    let env = &env;
    let cargo = |arguments: &[&str]| {
        let mut cargo = env.cargo();
        cargo.args(arguments).args(["--release", "--features", "vulkan", "--package", "simlayer"]);
        cargo.env("CARGO_TARGET_DIR", target_dir());
        cargo
    };
    step("shaders and library", || sh::run(cargo(&["build"]).arg("--lib")))?;
    step("program", || sh::run(cargo(&["build"]).args(["--bin", "simlayer-run"])))?;
    step("devices", || devices(&vulkan))?;
    step("a run", || generate(&vulkan, &model))?;
    if args.no_tests {
        return Ok(());
    }
    step("reference (unmodified llama.cpp)", || build_reference(env).map(|_| ()))?;
    let tests = ["--test", "logits", "--test", "lazy"];
    step("tests: build", || sh::run(cargo(&["test"]).args(tests).arg("--no-run")))?;
    step("tests", || {
        let mut test = cargo(&["test"]);
        test.args(tests).arg("--no-fail-fast").args(["--", "--test-threads=1", "--nocapture"]);
        test.env("SIMLAYER_TEST_DEVICE", DEVICE).env("SIMLAYER_TEST_SHORTER", args.shorter.to_string());
        sh::run(vulkan.visible(&mut test))
    })
}

fn target_dir() -> PathBuf {
    prepare::tools_dir().join("vulkan/target")
}

/// Where Vulkan's loader finds the software driver.
fn software_driver() -> Result<PathBuf> {
    let dirs = ["/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let files = dirs.iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
    let named = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("lvp_icd.") && name.ends_with(".json")
    };
    let found = files.map(|entry| entry.path()).find(named);
    found.with_context(|| format!("no lvp_icd.*.json in {}: is Mesa's lavapipe missing?", dirs.join(", ")))
}

/// Refuses a driver that is there and does not do.
fn driver_is_new_enough() -> Result<()> {
    let mut query = Command::new("dpkg-query");
    // Another system's package manager is not asked.
    let Ok(output) = query.args(["-W", "-f", "${Version}", mesa::PACKAGE]).output() else { return Ok(()) };
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        mesa::does(&version),
        "Mesa {version} writes to freed memory when a cache was freed; 25.0.7 does not. Remove it (apt-get remove {}), and \
         this command installs one that does",
        mesa::PACKAGE
    );
    Ok(())
}

struct Vulkan {
    /// The only driver to use; `None` for all that there are.
    driver: Option<PathBuf>,
}

impl Vulkan {
    /// Lets the command see the device. By itself ggml passes over Vulkan devices that are processors.
    fn visible<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if let Some(driver) = &self.driver {
            // The second name is for loaders before 1.3.207.
            command.env("VK_DRIVER_FILES", driver).env("VK_ICD_FILENAMES", driver);
            command.env("GGML_VK_VISIBLE_DEVICES", "0");
            // Sums in f16 are not what the tests' bounds are about.
            command.env("GGML_VK_DISABLE_F16", "1");
            // The driver takes and frees large blocks for each group of threads; keeping them makes it 1.6 times as fast.
            for variable in ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"] {
                command.env(variable, (64 << 20).to_string());
            }
        }
        command
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = sh::command(target_dir().join("release/simlayer-run"));
        command.args(arguments);
        self.visible(&mut command);
        command
    }
}

fn devices(vulkan: &Vulkan) -> Result<()> {
    println!("{}", sh::output(&mut vulkan.program(&["devices"]))?.trim_end());
    let listed: Value = serde_json::from_str(&sh::output(&mut vulkan.program(&["devices", "--json"]))?)?;
    let backends = listed["backends"].as_array().context("no list of backends")?;
    ensure!(backends.iter().any(|name| name == "Vulkan"), "the Vulkan backend is not registered: {listed}");
    let devices = listed["devices"].as_array().context("no list of devices")?;
    ensure!(devices.iter().any(|device| device["name"] == DEVICE), "there is no {DEVICE}: {listed}");
    Ok(())
}

/// Greedily, with all layers on the device; and without the device, on the processor, which a line says.
fn generate(vulkan: &Vulkan, model: &Path) -> Result<()> {
    let run = |mut command: Command| -> Result<[String; 2]> {
        command.arg("-m").arg(model).args(["-p", "The sea is", "-n", "16", "--temp", "0", "--verbose"]);
        let output = command.output().with_context(|| sh::shown(&command))?;
        let [text, told] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        ensure!(output.status.success(), "`{}` failed: {told}", sh::shown(&command));
        println!("$ {}\n{}", sh::shown(&command), text.trim_end());
        Ok([text, told])
    };
    let [_, told] = run(vulkan.program(&["--device", DEVICE]))?;
    let placed = told.lines().find(|line| line.starts_with("layers: ")).unwrap_or_default();
    println!("{placed}");
    ensure!(placed.contains(DEVICE), "the layers are elsewhere: {told}");
    // No driver: no device.
    let mut alone = sh::command(target_dir().join("release/simlayer-run"));
    alone.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
    let [_, told] = run(alone)?;
    let fallen_back = "no device of Vulkan was found: running on the processor";
    if !told.contains(fallen_back) {
        bail!("a run without a driver does not say `{fallen_back}`: {told}");
    }
    println!("{fallen_back}");
    Ok(())
}
