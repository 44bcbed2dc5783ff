//! Texts of different kinds. None is in the repository: two come from a package of texts in the public domain, three from
//! packages that Cargo.lock pins.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::prepare::{self, Env};
use crate::sh;

/// Bytes of a text that are used at most: enough for 16,000 tokens of any of the models.
const TEXT_BYTES: usize = 120_000;

enum Source {
    /// The package of texts.
    Texts,
    /// A package of Cargo.lock.
    Cargo(&'static str),
}

/// Kinds of text, where they come from, and the file.
const TEXTS: [(&str, Source, &str); 5] = [
    ("prose", Source::Texts, "shksprdata/ancillary/britannica-11th.txt"),
    ("dialogue", Source::Texts, "shksprdata/texts/coriolanus_gut.txt"),
    ("reference", Source::Cargo("llama-cpp-sys-2"), "llama.cpp/tools/server/README.md"),
    ("code", Source::Cargo("llama-cpp-sys-2"), "llama.cpp/src/llama-kv-cache.cpp"),
    ("list", Source::Cargo("cc"), "CHANGELOG.md"),
];

/// The kinds of text that there are.
pub const KINDS: [&str; 5] = [TEXTS[0].0, TEXTS[1].0, TEXTS[2].0, TEXTS[3].0, TEXTS[4].0];

/// The beginning of a text of this kind, in a file.
pub fn text(env: &Env, kind: &str) -> Result<PathBuf> {
    let known = TEXTS.iter().find(|(name, ..)| *name == kind);
    let (_, from, file) = known.with_context(|| format!("there is no text of kind {kind}"))?;
    let folder = prepare::tools_dir().join("texts");
    let path = folder.join(format!("{kind}-{TEXT_BYTES}.txt"));
    if !path.is_file() {
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let source = match from {
            Source::Texts => package_of_texts(&folder)?.join(file),
            Source::Cargo(package) => env.package_source(package)?.join(file),
        };
        let bytes = std::fs::read(&source).with_context(|| source.display().to_string())?;
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        std::fs::write(&path, beginning(&text)).with_context(|| path.display().to_string())?;
    }
    Ok(path)
}

fn beginning(text: &str) -> &str {
    let end = text.char_indices().map(|(at, _)| at).chain([text.len()]).take_while(|&at| at <= TEXT_BYTES).last();
    &text[..end.unwrap_or(0)]
}

/// The unpacked package of texts.
fn package_of_texts(folder: &Path) -> Result<PathBuf> {
    let unpacked = folder.join("package");
    if !unpacked.is_dir() {
        let sdist = prepare::pip_download("texts", ".tar.gz", &["--no-binary", ":all:"])?;
        std::fs::create_dir_all(&unpacked)?;
        sh::run(Command::new("tar").arg("-xzf").arg(sdist).arg("-C").arg(&unpacked).arg("--strip-components=1"))?;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(beginning("short"), "short");
        let long = format!("a{}", "é".repeat(TEXT_BYTES));
        assert_eq!(beginning(&long).len(), TEXT_BYTES - 1);
    }
}
