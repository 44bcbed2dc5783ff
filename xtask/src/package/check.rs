//! That the packages install and run in fresh Debians without Rust, and llama-cpp-python on the wheel's library.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{VERSION, debian, inside};
use crate::prepare;
use crate::root;
use crate::sh::{self, step};

/// Where the packages are tried.
const TRIED_IN: [&str; 2] = ["bullseye", "bookworm"];

/// Whose Python is the one that llama-cpp-python is fetched for (xtask/pip/frontends.txt).
const PYTHONS: &str = "bookworm";

const PACKAGES: &str = "ca-certificates,python3,python3-venv,python3-pip,libgomp1,libstdc++6";

/// Releases of llama-cpp-python that are made for other revisions (xtask/pip/versions.txt).
const OTHERS: [&str; 2] = ["0.3.30", "0.3.35"];

pub fn check(out: &Path) -> Result<()> {
    let model = prepare::model()?;
    let wheels = step("llama-cpp-python and what it needs, as wheels", python_wheels)?;
    for suite in TRIED_IN {
        // One that stands is what packages are built in.
        let root = prepare::tools_dir().join(format!("debian-{suite}-tried"));
        step(&format!("a fresh Debian {suite}"), || {
            if root.exists() {
                fs::remove_dir_all(&root).with_context(|| root.display().to_string())?;
            }
            debian(suite, &root, PACKAGES)
        })?;
        let tried = Tried { suite, root, out, model: &model, wheels: &wheels };
        tried.packages()?;
        if suite == PYTHONS {
            tried.python()?;
        }
    }
    Ok(())
}

/// A fresh Debian.
struct Tried<'a> {
    suite: &'a str,
    root: PathBuf,
    out: &'a Path,
    model: &'a Path,
    wheels: &'a Path,
}

impl Tried<'_> {
    /// Runs a shell script in there; what it says.
    fn run(&self, name: &str, script: &str) -> Result<String> {
        let models = self.model.parent().context("a folder")?.canonicalize()?;
        let scripts = root().join("xtask/package");
        let mounts: [(&Path, &str); 4] =
            [(self.out, "/packages"), (&models, "/models"), (self.wheels, "/wheels"), (&scripts, "/scripts")];
        step(&format!("{}: {name}", self.suite), || {
            let text = sh::output(&mut inside(&self.root, &mounts, script))?;
            println!("{}", text.trim_end());
            Ok(text)
        })
    }

    /// The model's place in there.
    fn model(&self) -> Result<String> {
        Ok(format!("/models/{}", self.model.file_name().context("a name")?.display()))
    }

    /// Each package installs and generates the same.
    fn packages(&self) -> Result<()> {
        self.run(
            "no Rust, no compiler",
            "! command -v cargo; ! command -v rustc; ! command -v gcc; ldd --version | head -n 1",
        )?;
        let model = self.model()?;
        let generate = |program: &str| {
            format!("{program} --version; {program} -m {model} -p 'The sea is' -n 16 --temp 0 --json 2>/dev/null")
        };
        let tarball = only(self.out, ".tar.gz")?;
        let inner = tarball.trim_end_matches(".tar.gz");
        let unpacked = format!("mkdir -p /opt; tar -xzf /packages/{tarball} -C /opt; ");
        let from_tarball = self.run("tarball", &(unpacked + &generate(&format!("/opt/{inner}/bin/simlayer-run"))))?;
        let deb = only(self.out, ".deb")?;
        let installed = format!("dpkg -i /packages/{deb} >&2; ");
        let from_deb = self.run("deb", &(installed + &generate("simlayer-run")))?;
        self.run("deb, removed", "dpkg -r simlayer >&2; ! command -v simlayer-run")?;
        let wheel = only(self.out, ".whl")?;
        let installed = format!("python3 -m venv /venv; /venv/bin/pip install -q --no-index /packages/{wheel} >&2; ");
        let from_wheel = self.run("wheel", &(installed + &generate("/venv/bin/simlayer-run")))?;
        let texts =
            [from_tarball, from_deb, from_wheel].iter().map(|said| generated(said)).collect::<Result<Vec<_>>>()?;
        ensure!(texts.iter().all(|text| *text == texts[0]), "the packages' programs say different texts: {texts:?}");
        Ok(())
    }

    /// The release of llama-cpp-python that the wheel is for runs, with lazy layers, and others are told so in a line.
    fn python(&self) -> Result<()> {
        let (model, wheel) = (self.model()?, only(self.out, ".whl")?);
        let install = "/venv/bin/pip install -q --no-index --find-links /wheels";
        self.run(
            "llama-cpp-python after `import simlayer`",
            &format!(
                "{install} '/packages/{wheel}[llama-cpp-python]' >&2
                 cp /scripts/check.py /tmp; /venv/bin/python /tmp/check.py {model}"
            ),
        )?;
        for version in OTHERS {
            let said = self.run(
                &format!("llama-cpp-python {version}, which is for another revision"),
                &format!(
                    "{install} llama-cpp-python=={version} >&2
                     /venv/bin/python /tmp/check.py {model} other 2>&1"
                ),
            )?;
            let lines: Vec<&str> = said.lines().filter(|line| line.contains("is built for")).collect();
            ensure!(lines.len() == 2, "llama-cpp-python {version}: a line on import and one on loading, not {lines:?}");
        }
        Ok(())
    }
}

/// The text of a run of 16 tokens, from its JSON.
fn generated(said: &str) -> Result<String> {
    let line = said.lines().rfind(|line| line.starts_with('{')).context("no JSON")?;
    let json: Value = serde_json::from_str(line)?;
    ensure!(json["generated_tokens"] == 16, "16 tokens were asked for: {json}");
    Ok(json["text"].as_str().context("no text")?.to_owned())
}

/// The one file of a folder whose name ends so.
fn only(folder: &Path, suffix: &str) -> Result<String> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found: Vec<String> = names.filter(|name| name.contains(VERSION) && name.ends_with(suffix)).collect();
    match &found[..] {
        [file] => Ok(file.clone()),
        _ => bail!("{}: expected one *{suffix}, found {found:?}; `cargo xtask package` makes it", folder.display()),
    }
}

/// Releases of llama-cpp-python without libraries of their own, and what they import, as files for pip.
fn python_wheels() -> Result<PathBuf> {
    let dir = prepare::tools_dir().join("package-wheels");
    let pins: Vec<String> = ["upstream", "frontends"]
        .into_iter()
        .map(|name| Ok(fs::read_to_string(prepare::requirements(name))?))
        .collect::<Result<_>>()?;
    let versions = fs::read_to_string(prepare::requirements("versions"))?;
    let others = OTHERS.map(|version| versions.lines().find(|pin| pin.contains(&format!("=={version} "))));
    let others =
        others.into_iter().zip(OTHERS).map(|(pin, version)| pin.with_context(|| format!("no pin of {version}")));
    let others: Vec<&str> = others.collect::<Result<_>>()?;
    // Written last.
    let stamp = dir.join("pins.txt");
    let wanted = format!("{}{}\n", pins.concat(), others.join("\n"));
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(dir);
    }
    prepare::pip_install("build-backend")?;
    let source = ["--no-build-isolation", "--no-binary", ":all:"];
    wheel(&dir, &prepare::requirements("frontends"), &[])?;
    wheel(&dir, &prepare::requirements("upstream"), &source)?;
    for pin in others {
        let requirements = dir.join("other.txt");
        fs::write(&requirements, pin)?;
        wheel(&dir, &requirements, &source)?;
    }
    fs::write(&stamp, wanted)?;
    Ok(dir)
}

fn wheel(dir: &Path, requirements: &Path, arguments: &[&str]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut pip = prepare::pip()?;
    pip.args(["wheel", "--quiet", "--no-deps", "--require-hashes"]).args(arguments);
    sh::run(pip.env("CMAKE_ARGS", "-DLLAMA_BUILD=OFF").arg("-w").arg(dir).arg("-r").arg(requirements))
}
