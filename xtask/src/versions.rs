//! Which releases of llama-cpp-python match our llama.cpp: the headers that they carry, compared with ours, as a table in
//! docs/c-abi.md.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::abi::{Abi, Difference, Kind, revision};
use crate::dist;
use crate::prepare::{self, Env};
use crate::root;
use crate::sh;

/// The table lies between these.
const MARKS: [&str; 2] = ["<!-- versions -->\n", "<!-- /versions -->"];

pub fn run() -> Result<()> {
    let env = Env::default();
    let source = dist::source(&env)?;
    let ours = Abi::of(&env, &source)?;
    let mut table =
        format!("| llama-cpp-python | its llama.cpp | with ours ({}) |\n|---|---|---|\n", revision(&source));
    let pins = ["versions", "upstream"].map(|name| std::fs::read_to_string(prepare::requirements(name)));
    for pin in pins.into_iter().collect::<std::io::Result<String>>()?.lines().filter(|line| !line.starts_with('#')) {
        let (version, headers) = headers(pin)?;
        let theirs = Abi::of(&env, &headers)?;
        let verdict = verdict(&theirs.differences(&ours));
        writeln!(table, "| {version} | {} | {verdict} |", revision(&headers))?;
    }
    print!("{table}");
    let docs = root().join("docs/c-abi.md");
    let text = std::fs::read_to_string(&docs)?;
    let (before, rest) = text.split_once(MARKS[0]).context("docs/c-abi.md has a place for the table")?;
    let (_, after) = rest.split_once(MARKS[1]).context("docs/c-abi.md says where the table ends")?;
    std::fs::write(&docs, format!("{before}{}{table}{}{after}", MARKS[0], MARKS[1]))?;
    Ok(())
}

/// What a program that was built with the earlier headers finds otherwise in our library. Functions that it cannot know are
/// no matter to it.
fn verdict(differences: &[Difference]) -> String {
    let crosses = |found: &&Difference| {
        let types = ["GGML_TYPE_", "GGML_FTYPE_"].iter().any(|prefix| found.name.starts_with(prefix));
        let count = found.name.ends_with("_COUNT") || found.name.ends_with("_MAX_VALUE");
        found.kind != Kind::New && !count && (found.name.to_lowercase().starts_with("llama_") || types)
    };
    let found: Vec<String> = differences.iter().filter(crosses).map(|found| format!("`{}`", found.name)).collect();
    if found.is_empty() { "matches".to_owned() } else { format!("does not match: {}", found.join(", ")) }
}

/// The version and the headers of the release that one pinned line names.
fn headers(pin: &str) -> Result<(String, PathBuf)> {
    let version = pin.split_whitespace().next().and_then(|name| name.split_once("=="));
    let (package, version) = version.with_context(|| format!("no version: {pin}"))?;
    let dir = prepare::tools_dir().join("versions").join(version);
    let stamp = dir.join("pin.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == pin) {
        return Ok((version.to_owned(), dir));
    }
    prepare::pip_install("build-backend")?;
    let download = dir.with_file_name(format!("{version}-download"));
    std::fs::create_dir_all(&download)?;
    let requirements = download.join("requirements.txt");
    std::fs::write(&requirements, pin)?;
    let mut pip = prepare::pip()?;
    pip.args(["download", "--quiet", "--no-deps", "--require-hashes", "--no-binary", ":all:", "--no-build-isolation"]);
    sh::run(pip.arg("--dest").arg(&download).arg("-r").arg(&requirements))?;
    let found = std::fs::read_dir(&download)?.flatten().map(|entry| entry.path());
    let Some(sdist) = found.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "gz")) else {
        bail!("{}: pip has put no source package there", download.display());
    };
    unpack(&sdist, &dir)?;
    std::fs::remove_dir_all(&download)?;
    std::fs::write(&stamp, pin)?;
    if !dir.join("include/llama.h").is_file() {
        bail!("{package} {version} carries no llama.h");
    }
    Ok((version.to_owned(), dir))
}

/// Headers and build files of the llama.cpp in a source package.
fn unpack(sdist: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(sdist).arg("-C").arg(to).args(["--strip-components=3", "--wildcards"]);
    let parts = ["include/*.h", "ggml/include/*.h", "CMakeLists.txt", "ggml/CMakeLists.txt"];
    tar.arg("--no-wildcards-match-slash").args(parts.map(|part| format!("*/vendor/llama.cpp/{part}")));
    sh::output(&mut tar).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_program_can_know_counts() {
        let of = |kind, name: &str| Difference { kind, name: name.to_owned(), what: format!("about {name}") };
        let harmless =
            [of(Kind::New, "llama_process"), of(Kind::Gone, "ggml_backend_old"), of(Kind::Changed, "GGML_TYPE_COUNT")];
        assert_eq!(verdict(&harmless), "matches");
        let found =
            [of(Kind::Changed, "llama_model_params"), of(Kind::Gone, "llama_old"), of(Kind::Changed, "GGML_TYPE_F16")];
        assert_eq!(verdict(&found), "does not match: `llama_model_params`, `llama_old`, `GGML_TYPE_F16`");
    }
}
