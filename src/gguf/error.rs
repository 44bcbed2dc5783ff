//! What can be wrong with a file, in words that name the place and say what to do.

use std::{io, path::PathBuf};

/// Why a GGUF file was refused: names the file and the key or tensor, and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened or mapped.
    #[error("cannot read {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// The first four bytes are not "GGUF".
    #[error("{path} is not a GGUF file (it begins with \"{}\"): convert the model to GGUF first", found.escape_ascii())]
    BadMagic { path: PathBuf, found: [u8; 4] },
    /// A version that this library does not read.
    #[error(
        "{path} is GGUF version {version}, but only versions 2 and 3 can be read: convert the model again with a \
        current converter"
    )]
    BadVersion { path: PathBuf, version: u32 },
    /// Every number in the file has its bytes in the other order.
    #[error("{path} is a big-endian GGUF file: convert the model again for little-endian machines")]
    BigEndian { path: PathBuf },
    /// The file ends too early, or a length in it is too large: the two cannot be told apart.
    #[error("{path} ends inside {what}: the file is incomplete or damaged, fetch it again")]
    Truncated { path: PathBuf, what: String },
    /// A count that a file of this size cannot hold.
    #[error("{path} claims {count} {what}, more than its {size} bytes can hold: the file is damaged, fetch it again")]
    BadCount { path: PathBuf, what: &'static str, count: u64, size: usize },
    /// A key that the model needs is not there.
    #[error("{path} has no key '{}': it is not a complete model, convert it again", shown(key))]
    MissingKey { path: PathBuf, key: String },
    /// A key holds a value of another type than the one needed.
    #[error("{path}: key '{}' is {found}, but {expected} is needed: convert the model again", shown(key))]
    WrongType { path: PathBuf, key: String, expected: &'static str, found: String },
    /// A key's value makes no sense.
    #[error("{path}: key '{}' {problem}", shown(key))]
    BadKey { path: PathBuf, key: String, problem: String },
    /// A tensor that the model needs is not there.
    #[error("{path} has no tensor '{}': it is not a complete model, convert it again", shown(tensor))]
    MissingTensor { path: PathBuf, tensor: String },
    /// A tensor's entry makes no sense.
    #[error("{path}: tensor '{}' {problem}", shown(tensor))]
    BadTensor { path: PathBuf, tensor: String, problem: String },
    /// The parts of a split model do not fit together.
    #[error("{path}: {problem}")]
    BadSplit { path: PathBuf, problem: String },
}

/// Text from a file as a message can show it: on one line, and not longer than a line.
pub(crate) fn shown(text: impl AsRef<[u8]>) -> String {
    const MOST: usize = 80;
    let text = text.as_ref();
    let start = String::from_utf8_lossy(&text[..text.len().min(MOST)]);
    let more = if text.len() > MOST { "…" } else { "" };
    start.chars().flat_map(char::escape_debug).chain(more.chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_stays_on_a_line() {
        assert_eq!(shown("blk.0.attn_q"), "blk.0.attn_q");
        assert_eq!(shown("é\n"), "é\\n");
        assert_eq!(shown([b'a'; 1000]), "a".repeat(80) + "…");
        assert_eq!(shown([b'a', 0xff]), "a\u{fffd}");
        let key = "k\n".repeat(1000);
        let message = Error::MissingKey { path: "x".into(), key }.to_string();
        assert!(message.len() < 300 && !message.contains('\n'), "{message}");
    }
}
