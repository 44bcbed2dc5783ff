//! The thread that writes what was parked.

use std::{
    fs::{self, File},
    io::{self, Write},
    mem,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc::Receiver},
};

use super::{
    error::Notice,
    file::{Key, PARKED, PARTIAL, header},
    folder::Create,
    index::{Entry, Held, Index},
};

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) dir: PathBuf,
    pub(super) max_bytes: u64,
    pub(super) settings: Box<str>,
    pub(super) create: Create,
    pub(super) index: Mutex<Index>,
    /// A conversation was written, or could not be.
    pub(super) written: Condvar,
}

impl Shared {
    pub(super) fn index(&self) -> MutexGuard<'_, Index> {
        // Nothing that is done under the lock panics half-way.
        self.index.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The thread that writes.
    pub(super) fn write_queued(&self, keys: &Receiver<Key>) {
        for key in keys {
            self.write_one(key);
            self.written.notify_all();
        }
    }

    fn write_one(&self, key: Key) {
        let (tokens, state, bytes) = {
            let mut index = self.index();
            let Some(Entry { tokens: Some(tokens), bytes, held: Held::Memory(state), .. }) = index.entries.get(&key)
            else {
                return;
            };
            let found = (Arc::clone(tokens), Arc::clone(state), *bytes);
            index.make_room(&self.dir, self.max_bytes, found.2);
            found
        };
        let (partial, whole) = (key.file(PARTIAL), key.file(PARKED));
        let written = self.write_file(&self.dir.join(&partial), &self.dir.join(&whole), &tokens, &state);
        let mut index = self.index();
        index.queued = (index.queued.0 - 1, index.queued.1 - state.len());
        match written {
            Ok(()) => {
                index.bytes += u128::from(bytes);
                index.stats.stored += 1;
                index.failing = false;
                if let Some(entry) = index.entries.get_mut(&key) {
                    entry.held = Held::File;
                }
            }
            Err(error) => {
                index.entries.remove(&key);
                index.stats.failed += 1;
                for name in [partial, whole] {
                    index.remove_file(&self.dir.join(&name), &name);
                }
                if !mem::replace(&mut index.failing, true) {
                    index.notice(Notice::NotWritten { why: format!("{}: {error}", self.dir.display()) });
                }
            }
        }
    }

    fn write_file(&self, partial: &Path, whole: &Path, tokens: &[i32], state: &[u8]) -> io::Result<()> {
        let mut file = (self.create)(partial)?;
        file.write_all(&header(&self.settings, tokens, state))?;
        file.write_all(state)?;
        // Before the rename, else the name may be on the disk sooner than what it names.
        file.sync_all()?;
        fs::rename(partial, whole)?;
        if cfg!(unix) {
            File::open(&self.dir)?.sync_all()?;
        }
        Ok(())
    }
}
