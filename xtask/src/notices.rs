//! `THIRD-PARTY`: whose work is in the libraries of `dist/`, and under which terms. It is written from the sources that
//! were compiled, so that it cannot tell of another version than theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::prepare::Env;
use crate::sh;

/// Where in llama.cpp's folder the compiled files lie.
const COMPILED: [&str; 7] =
    ["src", "src/models", "include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu", "ggml/src/ggml-rpc"];
/// And what is in the program alone, which reads chat templates and answers: llama.cpp's common files and JSON's.
const OF_CHAT: [&str; 4] = ["common", "common/jinja", "common/parsers", "vendor/nlohmann"];

/// Text for everything that the libraries contain: ggml and llama.cpp in `source`, and the crates of `package`.
pub fn text(env: &Env, source: &Path, package: &str, features: &[&str]) -> Result<String> {
    let mut text = String::from(
        "The libraries in this folder contain work of others, whose notices follow: ggml and llama.cpp, these Rust\n\
         crates, and Rust's standard library (MIT or Apache-2.0, The Rust Project Contributors).\n",
    );
    let license = source.join("LICENSE");
    let terms = std::fs::read_to_string(&license).with_context(|| license.display().to_string())?;
    section(&mut text, "ggml and llama.cpp (MIT)", &terms);
    let chat: &[&str] = if package == "simlayer" { &OF_CHAT } else { &[] };
    for (file, notice) in own_notices(source, chat)? {
        section(&mut text, &format!("{file}, of ggml or llama.cpp"), &notice);
    }
    for (terms, crates) in crates(env, package, features)? {
        section(&mut text, &crates.into_iter().collect::<Vec<_>>().join("\n"), &terms);
    }
    Ok(text)
}

fn section(text: &mut String, title: &str, body: &str) {
    let line = "-".repeat(100);
    let _ = write!(text, "\n{line}\n{title}\n{line}\n\n{}\n", body.trim());
}

/// Files of ggml and llama.cpp that name other authors: the comments that do.
fn own_notices(source: &Path, more: &[&str]) -> Result<BTreeMap<String, String>> {
    let mut notices = BTreeMap::new();
    for file in sources(source, more)? {
        let name = file.strip_prefix(source).unwrap_or(&file).display().to_string();
        let code = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let notice = comments(&code, |comment| {
            let comment = comment.to_lowercase();
            let names = ["copyright 2", "copyright (c)", "filecopyrighttext", "mit license"]
                .iter()
                .any(|words| comment.contains(words));
            names && !comment.contains("the ggml authors")
        });
        if !notice.is_empty() {
            notices.insert(name, notice);
        }
    }
    Ok(notices)
}

/// C and C++ files of the compiled folders, and of those for processors.
fn sources(source: &Path, more: &[&str]) -> Result<BTreeSet<PathBuf>> {
    let mut folders: Vec<PathBuf> = COMPILED.iter().chain(more).map(|folder| source.join(folder)).collect();
    let mut files = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let extension = path.extension().unwrap_or_default();
            if path.is_dir() && path.starts_with(source.join("ggml/src/ggml-cpu")) {
                folders.push(path);
            } else if ["c", "cpp", "h", "hpp"].iter().any(|known| extension == *known) {
                files.insert(path);
            }
        }
    }
    Ok(files)
}

/// Runs of comment lines that `wanted` accepts, each once.
fn comments(code: &str, wanted: impl Fn(&str) -> bool) -> String {
    let mut found = String::new();
    let mut comment = String::new();
    for line in code.lines().chain([""]) {
        let line = line.trim();
        if let Some(words) = line.strip_prefix("//") {
            comment.push_str(words.strip_prefix(' ').unwrap_or(words));
            comment.push('\n');
        } else if !comment.is_empty() {
            if wanted(&comment) && !found.contains(&comment) {
                found.push_str(&comment);
            }
            comment.clear();
        }
    }
    found
}

/// The crates that are linked into `package`, by the texts of their terms.
fn crates(env: &Env, package: &str, features: &[&str]) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let metadata = sh::output(env.cargo().args(["metadata", "--locked", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    // Metadata are of the whole workspace; the tree says what is in this package with these features.
    let mut tree = env.cargo();
    tree.args(["tree", "--locked", "--package", package, "--edges", "normal,no-proc-macro", "--prefix", "none"]);
    tree.args(["--features", &features.join(",")]);
    let tree = sh::output(tree.args(["--format", "{p}"]))?;
    let linked: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .collect();
    let mut by_terms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for found in metadata["packages"].as_array().into_iter().flatten() {
        let of = |key: &str| found[key].as_str();
        let (name, version) = of("name").zip(of("version")).context("a package has a name and a version")?;
        // What has no source is of this workspace.
        if !linked.contains(&(name, version)) || of("source").is_none() {
            continue;
        }
        let license = of("license").with_context(|| format!("{name} {version} does not say its license"))?;
        let manifest = of("manifest_path").context("a package has a manifest")?;
        let folder = Path::new(manifest).parent().context("a manifest has a folder")?;
        let terms = terms(folder, license)?;
        let authors: Vec<&str> = found["authors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let authors = if authors.is_empty() { String::new() } else { format!(", {}", authors.join(", ")) };
        by_terms.entry(terms).or_default().insert(format!("{name} {version} ({license}){authors}"));
    }
    if by_terms.is_empty() {
        bail!("cargo names no crates in {package}");
    }
    Ok(by_terms)
}

/// The texts of a crate's terms, as its authors put them into its folder. Where there is a choice that has MIT, MIT's.
fn terms(folder: &Path, license: &str) -> Result<String> {
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_file() && ["LICENSE", "LICENCE", "COPYING", "NOTICE"].iter().any(|known| name.starts_with(known)) {
            files.insert(path);
        }
    }
    let is_mit = |path: &PathBuf| path.to_string_lossy().to_uppercase().ends_with("MIT");
    if license.contains("MIT") && !license.contains("AND") && files.iter().any(is_mit) {
        files.retain(is_mit);
    }
    let texts: Result<Vec<String>> =
        files.iter().map(|path| std::fs::read_to_string(path).with_context(|| path.display().to_string())).collect();
    let texts = texts?;
    if texts.is_empty() {
        // Nothing is made up: the name of the terms is what the package says.
        return Ok(format!("The package has no text of its terms but the name of them: {license}."));
    }
    Ok(texts.iter().map(|text| text.trim()).collect::<Vec<_>>().join("\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_that_name_authors_are_found() {
        let code = "// Copyright 2024 Somebody\n//\n// Terms.\n\nint x; // Copyright 2023\n// another comment\nint y;";
        let found = comments(code, |comment| comment.to_lowercase().contains("copyright 2"));
        assert_eq!(found, "Copyright 2024 Somebody\n\nTerms.\n");
    }

    #[test]
    fn everyone_whose_work_is_inside_is_named() {
        let env = Env::default();
        let source = crate::dist::source(&env).unwrap();
        let text = text(&env, &source, "simlayer-ffi", &[]).unwrap();
        for words in ["The ggml authors", "Mozilla Foundation", "\nminijinja 3.", "\nfoldhash ", "Permission is hereby"]
        {
            assert!(text.contains(words), "no {words:?}");
        }
        assert!(!text.contains("Niels Lohmann"), "the library has no JSON of his");
        let program = super::text(&env, &source, "simlayer", &[]).unwrap();
        for words in ["Niels Lohmann", "Florian Loitsch", "\nclap ", "\nrustls ", "\nring "] {
            assert!(program.contains(words), "no {words:?}");
        }
        // Not linked into the library: the command line's, tests' and build scripts' crates.
        for words in ["\nclap ", "\nproptest ", "\nbindgen ", "\nsimlayer "] {
            assert!(!text.contains(words), "{words:?}");
        }
        assert!(!text.contains("has no text of its terms"), "a crate without its terms: {text}");
    }

    #[test]
    fn where_there_is_a_choice_it_is_mit() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("LICENSE-MIT", "mit"), ("LICENSE-APACHE", "apache"), ("src.rs", "no terms")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(terms(folder.path(), "MIT OR Apache-2.0").unwrap(), "mit");
        assert_eq!(terms(folder.path(), "MIT AND Apache-2.0").unwrap(), "apache\n\nmit");
    }
}
