//! Moves the pin: what another version of the package that llama.cpp comes from would change here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::abi::{Abi, Kind, revision};
use crate::prepare::{self, Env};
use crate::root;
use crate::sh::{self, step};
use crate::test;

const PACKAGE: &str = "llama-cpp-sys-2";

/// Of llama.cpp's `src`, what is compiled into simlayer itself, with or without `.h`: vendor/ggml-sys/build.rs.
const REUSED: [&str; 14] = [
    "llama-arch",
    "llama-chat",
    "llama-grammar",
    "llama-hparams",
    "llama-impl",
    "llama-mmap",
    "llama-model-loader",
    "llama-sampler",
    "llama-vocab",
    "unicode",
    "unicode-data",
    "llama-ext",
    "llama-cparams",
    "llama-model",
];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The package's version.
    version: String,
    /// Move the pin there, build and test; without it only what would change is told.
    #[arg(long)]
    apply: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let env = Env::default();
    let (before, pinned) = (source(&env, &root().join("Cargo.toml"))?, pinned()?);
    let after = step("fetch", || fetch(&env, &args.version))?;
    let report = report(&env, (&pinned, &before), (&args.version, &after))?;
    print!("{report}");
    let file = env.target_dir()?.join(format!("bump-{}.md", args.version));
    std::fs::write(&file, &report)?;
    eprintln!("written to {}", file.display());
    if args.apply && args.version != pinned {
        step("pin", || {
            let manifest = root().join("vendor/ggml-sys/Cargo.toml");
            let text = std::fs::read_to_string(&manifest)?;
            let pin = |version: &str| format!("{PACKAGE} = \"={version}\"");
            ensure!(text.contains(&pin(&pinned)), "{}: no {}", manifest.display(), pin(&pinned));
            std::fs::write(&manifest, text.replace(&pin(&pinned), &pin(&args.version)))?;
            sh::run(env.cargo().args(["update", "-p", PACKAGE, "--precise", &args.version]))
        })?;
        test::run(&test::Args::default())?;
    }
    Ok(())
}

/// The version that Cargo.lock names.
fn pinned() -> Result<String> {
    let lock = std::fs::read_to_string(root().join("Cargo.lock"))?;
    let name = format!("name = \"{PACKAGE}\"\nversion = \"");
    let version = lock.split_once(&name).and_then(|(_, rest)| rest.split('"').next());
    Ok(version.with_context(|| format!("Cargo.lock names no {PACKAGE}"))?.to_owned())
}

/// llama.cpp's folder in the package, as a manifest's dependencies have it.
fn source(env: &Env, manifest: &Path) -> Result<PathBuf> {
    let mut metadata = env.cargo();
    metadata.args(["metadata", "--format-version", "1", "--manifest-path"]).arg(manifest);
    let metadata: serde_json::Value = serde_json::from_str(&sh::output(&mut metadata)?)?;
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let found = packages.find(|package| package["name"] == PACKAGE);
    let manifest = found.and_then(|package| package["manifest_path"].as_str()).context("the package is not there")?;
    Ok(Path::new(manifest).with_file_name("llama.cpp"))
}

/// Fetches a version by cargo, which checks its checksum, as a dependency of nothing.
fn fetch(env: &Env, version: &str) -> Result<PathBuf> {
    let folder = prepare::tools_dir().join("bump").join(version);
    std::fs::create_dir_all(folder.join("src"))?;
    std::fs::write(folder.join("src/lib.rs"), "")?;
    let manifest = folder.join("Cargo.toml");
    let text = format!(
        "[package]\nname = \"bump\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n\
         [target.'cfg(any())'.dependencies]\n{PACKAGE} = \"={version}\"\n"
    );
    std::fs::write(&manifest, text)?;
    source(env, &manifest)
}

fn report(env: &Env, before: (&str, &Path), after: (&str, &Path)) -> Result<String> {
    let mut text =
        format!("# {PACKAGE} {} → {}\n\n{} → {}\n", before.0, after.0, revision(before.1), revision(after.1));
    let differences = Abi::of(env, before.1)?.differences(&Abi::of(env, after.1)?);
    for (kind, title) in [(Kind::Changed, "Changed"), (Kind::Gone, "Gone"), (Kind::New, "New")] {
        let found: Vec<_> = differences.iter().filter(|found| found.kind == kind).collect();
        if !found.is_empty() {
            writeln!(text, "\n## {title} in what crosses the C ABI\n")?;
            found.iter().try_for_each(|found| writeln!(text, "- {}", found.what))?;
        }
    }
    let (before, after) = (files(before.1)?, files(after.1)?);
    let changed: Vec<String> = before
        .keys()
        .chain(after.keys().filter(|name| !before.contains_key(*name)))
        .filter_map(|name| match (before.get(name), after.get(name)) {
            (Some(old), Some(new)) if old == new => None,
            (Some(old), Some(new)) => Some(format!("{name}: {}", lines(old, new))),
            (Some(_), None) => Some(format!("{name} is gone")),
            (None, _) => Some(format!("{name} is new")),
        })
        .collect();
    let (ours, others): (Vec<&String>, Vec<&String>) = changed.iter().partition(|line| is_reused(line));
    for (title, found) in [
        ("Files that simlayer compiles into itself, or reads", ours),
        ("Files of unmodified llama.cpp beside it, and of ggml's devices", others),
    ] {
        if !found.is_empty() {
            writeln!(text, "\n## {title}\n")?;
            found.iter().try_for_each(|line| writeln!(text, "- {line}"))?;
        }
    }
    if differences.is_empty() && changed.is_empty() {
        text.push_str("\nNo difference.\n");
    }
    Ok(text)
}

/// Whether it is one of the files that are not unmodified llama.cpp's alone.
fn is_reused(line: &str) -> bool {
    let name = line.split([':', ' ']).next().unwrap_or_default();
    if let Some(name) = name.strip_prefix("src/") {
        let stem = name.strip_suffix(".cpp").or(name.strip_suffix(".h")).unwrap_or(name);
        return REUSED.contains(&stem);
    }
    let device = name.strip_prefix("ggml/src/ggml-").and_then(|rest| rest.split_once('/')).map(|(device, _)| device);
    device.is_none_or(|device| ["cpu", "rpc"].contains(&device))
}

/// How many lines were taken out and put in, each counted once however often it comes.
fn lines(before: &str, after: &str) -> String {
    let mut count: BTreeMap<&str, i64> = BTreeMap::new();
    before.lines().for_each(|line| *count.entry(line).or_default() -= 1);
    after.lines().for_each(|line| *count.entry(line).or_default() += 1);
    let sum = |sign: i64| count.values().map(|n| (n * sign).max(0)).sum::<i64>();
    format!("{} lines new, {} gone", sum(1), sum(-1))
}

/// Everything of a llama.cpp that this project compiles or reads, by its path.
fn files(source: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for part in [
        "include",
        "src",
        "ggml/include",
        "ggml/src",
        "tools/cli/README.md",
        "tools/completion/README.md",
        "tools/server/README.md",
    ] {
        collect(source, &source.join(part), &mut files)?;
    }
    Ok(files)
}

fn collect(source: &Path, path: &Path, files: &mut BTreeMap<String, String>) -> Result<()> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).with_context(|| path.display().to_string())? {
            collect(source, &entry?.path(), files)?;
        }
    } else if path.is_file() {
        let name = path.strip_prefix(source).unwrap_or(path).display().to_string();
        files.insert(name, String::from_utf8_lossy(&std::fs::read(path)?).into_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart() {
        assert!(is_reused("src/llama-vocab.cpp: 3 lines new, 1 gone") && is_reused("ggml/src/ggml-cpu/ops.cpp is new"));
        assert!(
            is_reused("include/llama.h: x")
                && is_reused("tools/server/README.md: x")
                && is_reused("ggml/src/ggml.c: x")
        );
        assert!(!is_reused("src/llama-context.cpp: x") && !is_reused("ggml/src/ggml-cuda/fattn.cu is gone"));
        assert_eq!(lines("a\nb\nc", "a\nc\nd\ne"), "2 lines new, 1 gone");
    }

    /// Those that ggml-sys compiles, and headers that its shims and the fall-through include.
    #[test]
    fn reused_files_are_those_of_the_build() {
        let build = std::fs::read_to_string(root().join("vendor/ggml-sys/build.rs")).unwrap();
        let (_, rest) = build.split_once("let llama = [").unwrap();
        let (list, _) = rest.split_once(']').unwrap();
        for name in list.split(',').map(|name| name.trim().trim_matches('"')).filter(|name| !name.is_empty()) {
            assert!(REUSED.contains(&name), "{name} is compiled");
        }
        let (_, rest) = build.split_once("let bounds =").unwrap();
        for name in ["llama-vocab", "unicode", "llama-grammar"] {
            assert!(rest.contains(&format!("\"{name}\"")) && REUSED.contains(&name), "{name}");
        }
    }
}
