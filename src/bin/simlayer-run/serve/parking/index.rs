//! What is parked, by what it is found, and what goes where there is no room for more.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry::Occupied},
    fs::{self, File},
    io,
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use super::{
    error::{Notice, ParkingError, failed},
    file::{Header, Key, PARKED, PARTIAL, Unreadable, read_header},
};

/// Notices that are kept until somebody asks.
const MAX_NOTICES: usize = 64;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ParkingStats {
    /// Conversations that can be restored, and bytes of their files, those that wait included.
    pub entries: usize,
    pub bytes: u64,
    /// Files of other settings.
    pub others: usize,
    pub others_bytes: u64,
    pub max_bytes: u64,
    /// States in memory that wait to be written, and what they take there.
    pub queued: usize,
    pub queued_bytes: u64,
    /// Memory of the tokens by which conversations are found.
    pub index_bytes: u64,
    /// Since the start: written, given back, removed to make room, removed as damaged, not written.
    pub stored: u64,
    pub restored: u64,
    pub evicted: u64,
    pub dropped: u64,
    pub failed: u64,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// `None` for those of other settings.
    pub(super) tokens: Option<Arc<[i32]>>,
    /// The file's length.
    pub(super) bytes: u64,
    /// The higher the later.
    pub(super) used: u64,
    pub(super) held: Held,
}

#[derive(Debug, Clone)]
pub(super) enum Held {
    /// It waits to be written.
    Memory(Arc<Vec<u8>>),
    File,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) entries: HashMap<Key, Entry>,
    /// Of all files, those of other settings included. Files with holes have lengths whose sum is beyond 64 bits.
    pub(super) bytes: u128,
    ticks: u64,
    /// States in memory, and their bytes.
    pub(super) queued: (usize, usize),
    /// Only what is counted since the start.
    pub(super) stats: ParkingStats,
    pub(super) notices: VecDeque<Notice>,
    pub(super) more_notices: usize,
    /// The last conversation could not be written, and that was said.
    pub(super) failing: bool,
}

impl Index {
    pub(super) fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        if self.notices.len() < MAX_NOTICES {
            self.notices.push_back(notice);
        } else {
            self.more_notices += 1;
        }
    }

    /// What is in the folder. Only files named as ours are looked at.
    pub(super) fn scan(&mut self, dir: &Path, settings: &str, max_bytes: u64) -> Result<(), ParkingError> {
        let mut found = Vec::new();
        for file in fs::read_dir(dir).map_err(failed("read the folder", dir))? {
            let file = file.map_err(failed("read the folder", dir))?;
            let Ok(name) = file.file_name().into_string() else { continue };
            if Key::of_file(&name, PARTIAL).is_some() {
                self.remove_file(&file.path(), &name);
                self.notice(Notice::Unfinished { name });
            } else if let Some(key) = Key::of_file(&name, PARKED) {
                match scan_file(&file.path(), key, settings) {
                    Ok((entry, modified)) => found.push((modified, key, entry)),
                    Err(Unreadable::Damaged(why)) => {
                        self.stats.dropped += 1;
                        self.remove_file(&file.path(), &name);
                        self.notice(Notice::Damaged { name, why });
                    }
                    Err(Unreadable::Io(error)) => self.notice(Notice::Unreadable { name, why: error.to_string() }),
                }
            }
        }
        found.sort_by_key(|&(modified, key, _)| (modified, key));
        for (_, key, mut entry) in found {
            entry.used = self.tick();
            self.bytes += u128::from(entry.bytes);
            self.entries.insert(key, entry);
        }
        let (evicted, bytes) = self.make_room(dir, max_bytes, 0);
        if evicted > 0 {
            self.notice(Notice::OverLimit { entries: evicted, bytes });
        }
        let others = self.entries.values().filter(|entry| entry.tokens.is_none());
        let (entries, bytes) = others.fold((0, 0), |(n, bytes), entry| (n + 1, bytes + entry.bytes));
        if entries > 0 {
            self.notice(Notice::Others { entries, bytes });
        }
        Ok(())
    }

    /// Removes the files longest unused until `bytes` more fit. How many, and their bytes.
    pub(super) fn make_room(&mut self, dir: &Path, max_bytes: u64, bytes: u64) -> (usize, u64) {
        let (mut n, mut freed) = (0, 0_u64);
        while self.bytes + u128::from(bytes) > u128::from(max_bytes) {
            let files = self.entries.iter().filter(|(_, entry)| matches!(entry.held, Held::File));
            let Some((&key, _)) = files.min_by_key(|(_, entry)| entry.used) else { break };
            freed = freed.saturating_add(self.remove(dir, key));
            n += 1;
        }
        self.stats.evicted += n as u64;
        (n, freed)
    }

    pub(super) fn drop_damaged(&mut self, dir: &Path, key: Key, why: &'static str) {
        self.stats.dropped += 1;
        self.remove(dir, key);
        self.notice(Notice::Damaged { name: key.file(PARKED), why });
    }

    /// Forgets the conversation and removes its file. Its bytes.
    fn remove(&mut self, dir: &Path, key: Key) -> u64 {
        let bytes = self.forget(key);
        let name = key.file(PARKED);
        self.remove_file(&dir.join(&name), &name);
        bytes
    }

    /// Forgets a conversation that is in a file. Its bytes.
    pub(super) fn forget(&mut self, key: Key) -> u64 {
        match self.entries.entry(key) {
            Occupied(entry) if matches!(entry.get().held, Held::File) => {
                let bytes = entry.remove().bytes;
                self.bytes -= u128::from(bytes);
                bytes
            }
            // It went meanwhile, or is being written again.
            _ => 0,
        }
    }

    pub(super) fn remove_file(&mut self, path: &Path, name: &str) {
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.notice(Notice::Unreadable { name: name.to_owned(), why: format!("not removed: {error}") })
            }
        }
    }
}

/// A file of the folder, and when it was last used.
fn scan_file(path: &Path, key: Key, ours: &str) -> Result<(Entry, SystemTime), Unreadable> {
    // Not through links; and opening a pipe would wait.
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_file() {
        return Err(Unreadable::Io(io::Error::other("it is not a file")));
    }
    let bytes = metadata.len();
    let tokens = match read_header(File::open(path)?, bytes)? {
        Header::OtherVersion => None,
        Header::Ours { settings, tokens, .. } => {
            let text = str::from_utf8(&settings).map_err(|_| Unreadable::Damaged("its settings are no text"))?;
            if Key::new(text, &tokens) != key {
                return Err(Unreadable::Damaged("its name is another's"));
            }
            (text == ours).then(|| tokens.into())
        }
    };
    Ok((Entry { tokens, bytes, used: 0, held: Held::File }, metadata.modified()?))
}
