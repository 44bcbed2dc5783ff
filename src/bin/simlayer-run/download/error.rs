//! Why a model was not fetched.

use std::{io, path::PathBuf};

/// What keeps a model away, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--hf-repo {0}: it must be USER/MODEL or USER/MODEL:QUANT")]
    Repository(String),
    #[error("--hf-file {0}: say of which repository, with --hf-repo USER/MODEL")]
    FileAlone(String),
    #[error("--model-url {0}: it must be an address of a file, as https://HOST/FILE.gguf")]
    Address(String),
    #[error("{name} of {repository} is not in {cache}, and --offline forbids to fetch it: run once without it")]
    OfflineFile { name: String, repository: String, cache: PathBuf },
    #[error(
        "nothing of {repository} is in {cache}, and --offline forbids to fetch it: run once without it, or name a file \
         that is here with -m"
    )]
    OfflineRepository { repository: String, cache: PathBuf },
    #[error("{path} is not there, and --offline forbids to fetch {url}: run once without it")]
    OfflineAddress { url: String, path: PathBuf },
    #[error("{repository} has no GGUF file {what}; it has {}", list(.has))]
    NoModel { repository: String, what: String, has: Vec<String> },
    #[error("{0}: there is no such file or repository (404), or it is for those with a token only (--hf-token)")]
    Missing(String),
    #[error("{url}: not without a token that allows it ({code}): give one with --hf-token or in HF_TOKEN")]
    Forbidden { url: String, code: u16 },
    #[error("{url}: the server answered {code}; try again later")]
    Status { url: String, code: u16 },
    #[error("{url}: {why}; with the connection back the same command goes on where it stopped")]
    Connection { url: String, why: String },
    #[error("{url}: the server's answer makes no sense: {why}")]
    Answer { url: String, why: String },
    #[error(
        "{name} is damaged: its SHA-256 is {found}, and the repository says {expected}. What was fetched is deleted; try again"
    )]
    Checksum { name: String, found: String, expected: String },
    #[error("another program is fetching {0}: wait until it is done")]
    Busy(PathBuf),
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error("there is no home folder for the cache: set HF_HOME to a folder")]
    NoHome,
}

impl Error {
    /// Whether the same may go well a moment later.
    pub fn may_pass(&self) -> bool {
        match self {
            Error::Connection { .. } => true,
            Error::Status { code, .. } => *code >= 500 || *code == 429,
            _ => false,
        }
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
