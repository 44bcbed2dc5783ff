//! What goes wrong, and what the log should have.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use super::file::MAX_SETTINGS;

/// Why a folder cannot be used, or a conversation not be restored. It then has to be read anew.
#[derive(Debug, thiserror::Error)]
pub enum ParkingError {
    #[error("cannot {what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("another server parks conversations in {}: give each a folder of its own (--kv-disk)", .0.display())]
    InUse(PathBuf),
    #[error("the settings that tell parked conversations apart take {0} bytes, more than {MAX_SETTINGS}")]
    Settings(usize),
    #[error("the parked conversation {} is damaged: {why}; it was removed", path.display())]
    Damaged { path: PathBuf, why: &'static str },
    #[error("the conversation is no longer parked")]
    Gone,
}

pub(super) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ParkingError {
    move |source| ParkingError::Io { what, path: path.to_owned(), source }
}

/// What the log should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A file that a killed program had not finished was removed.
    Unfinished { name: String },
    /// A damaged file was removed.
    Damaged { name: String, why: &'static str },
    /// A file could not be read, or not be removed; it is passed over.
    Unreadable { name: String, why: String },
    /// At the start there were files of another model, of other settings of the cache, or of another version.
    Others { entries: usize, bytes: u64 },
    /// At the start the folder held more than the limit: the files longest unused were removed.
    OverLimit { entries: usize, bytes: u64 },
    /// A conversation could not be written. Said once, until one can be.
    NotWritten { why: String },
    /// There were more notices than anybody asked for.
    More(usize),
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::Unfinished { name } => write!(f, "{name}: removed, it was not written to its end"),
            Notice::Damaged { name, why } => write!(f, "{name}: removed, it is damaged: {why}"),
            Notice::Unreadable { name, why } => write!(f, "{name}: passed over: {why}"),
            Notice::Others { entries, bytes } => write!(
                f,
                "{entries} parked conversations ({bytes} bytes) are of another model or other cache settings: left for those"
            ),
            Notice::OverLimit { entries, bytes } => {
                write!(
                    f,
                    "{entries} parked conversations ({bytes} bytes) removed, the longest unused: the limit is lower"
                )
            }
            Notice::NotWritten { why } => {
                write!(f, "conversations are not parked, and will be read again: {why} (said once)")
            }
            Notice::More(n) => write!(f, "{n} more about parked conversations"),
        }
    }
}
