//! Parked conversations: the states of idle ones in files, so that memory is free and nothing need be read again.
//!
//! A folder belongs to one server at a time (`folder`). A conversation is a file of it (`file` has the format), named by a
//! hash of what it holds, never by what a client sent. It is written under another name, flushed, and renamed (`writer`): a
//! program that is killed leaves a partial file, which the next start removes, or a whole one.
//!
//! At the start every header is read and checked (`index`), a state when it is restored. What is damaged is removed and said
//! ([`Parking::notices`]). Files of other settings, and of other versions of the format, are left for the server that they are
//! for; they count towards the limit and age as ours do. When a file was last used is its modification time.
//!
//! Checksums find accidents, not attacks: who can write to the folder (made for its owner alone) can change answers.

mod error;
mod file;
mod folder;
mod index;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    fs::File,
    io, mem,
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
};

use self::{
    error::failed,
    file::{Key, MAX_SETTINGS, MAX_TOKENS, PARKED, Unreadable, file_bytes, read, touch},
    folder::{Create, create_private, lock, make_private_folder},
    index::{Entry, Held, Index},
    writer::Shared,
};
pub use self::{
    error::{Notice, ParkingError},
    index::ParkingStats,
};

/// States that wait to be written, besides the one that is being written. They take memory.
const QUEUE: usize = 2;

/// What became of a state that was to be parked.
#[derive(Debug, PartialEq, Eq)]
pub enum Stored {
    /// It will be written, and can be found already.
    Queued,
    /// This conversation is parked already.
    Already,
    /// It is larger than all the room there is.
    TooLarge,
    /// As many wait as may: here is the state, to be kept or dropped.
    Busy(Vec<u8>),
}

/// A parked conversation that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    key: Key,
    /// Tokens that its state holds.
    pub n_tokens: usize,
    /// How many of its first tokens are those that were asked for. Less than `n_tokens` only from
    /// [`Parking::find_common`]: the state has to be cut back to as many.
    pub n_common: usize,
    /// The file's length.
    pub bytes: u64,
}

/// The parked conversations of one server.
#[derive(Debug)]
pub struct Parking {
    shared: Arc<Shared>,
    /// `None` only when it is being dropped, which ends the thread.
    queue: Option<SyncSender<Key>>,
    writer: Option<JoinHandle<()>>,
    /// Locked while we live; the system unlocks it when we are killed.
    _lock: File,
}

impl Parking {
    /// The folder `dir`, made where there is none, with at most `max_bytes` in it. `settings` says what a state depends
    /// on: the model, the cache, the version of states. Removes what is damaged or too much: see [`Parking::notices`].
    pub fn open(dir: &Path, max_bytes: u64, settings: &str) -> Result<Parking, ParkingError> {
        Parking::open_with(dir, max_bytes, settings, create_private)
    }

    fn open_with(dir: &Path, max_bytes: u64, settings: &str, create: Create) -> Result<Parking, ParkingError> {
        if settings.len() > MAX_SETTINGS {
            return Err(ParkingError::Settings(settings.len()));
        }
        make_private_folder(dir).map_err(failed("make the folder", dir))?;
        let lock = lock(dir)?;
        let mut index = Index::default();
        index.scan(dir, settings, max_bytes)?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            max_bytes,
            settings: settings.into(),
            create,
            index: Mutex::new(index),
            written: Condvar::new(),
        });
        let (queue, keys) = sync_channel(QUEUE);
        let writer = thread::Builder::new().name("parking".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.write_queued(&keys)
        });
        let writer = writer.map_err(failed("start a thread that writes to", dir))?;
        Ok(Parking { shared, queue: Some(queue), writer: Some(writer), _lock: lock })
    }

    /// Parks the `state` of a conversation of these `tokens`; does not wait for the disk.
    pub fn store(&self, tokens: &[i32], state: Vec<u8>) -> Stored {
        let Some(bytes) = file_bytes(self.shared.settings.len(), tokens.len(), state.len() as u64) else {
            return Stored::TooLarge;
        };
        if bytes > self.shared.max_bytes || tokens.len() > MAX_TOKENS {
            self.shared.index().stats.failed += 1;
            return Stored::TooLarge;
        }
        let key = Key::new(&self.shared.settings, tokens);
        let mut index = self.shared.index();
        let used = index.tick();
        if let Some(entry) = index.entries.get_mut(&key) {
            entry.used = used;
            if let Held::File = entry.held {
                touch(&self.shared.dir.join(key.file(PARKED)));
            }
            return Stored::Already;
        }
        // The thread that writes takes this lock before it looks for the key.
        let Some(queue) = &self.queue else { return Stored::Busy(state) };
        match queue.try_send(key) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => return Stored::Busy(state),
        }
        index.queued = (index.queued.0 + 1, index.queued.1 + state.len());
        let held = Held::Memory(Arc::new(state));
        index.entries.insert(key, Entry { tokens: Some(tokens.into()), bytes, used, held });
        Stored::Queued
    }

    /// The longest parked conversation that the `tokens` begin with.
    pub fn find(&self, tokens: &[i32]) -> Option<Parked> {
        self.best(tokens, |parked| parked.n_common == parked.n_tokens)
    }

    /// The parked conversation that has the most first tokens in common with `tokens`, whatever follows them; of those
    /// the shortest.
    pub fn find_common(&self, tokens: &[i32]) -> Option<Parked> {
        self.best(tokens, |_| true)
    }

    fn best(&self, asked: &[i32], usable: impl Fn(&Parked) -> bool) -> Option<Parked> {
        let index = self.shared.index();
        let found = index.entries.iter().filter_map(|(&key, entry)| {
            let tokens = entry.tokens.as_deref()?;
            let n_common = tokens.iter().zip(asked).take_while(|(one, other)| one == other).count();
            let parked = Parked { key, n_tokens: tokens.len(), n_common, bytes: entry.bytes };
            (n_common > 0 && usable(&parked)).then_some(parked)
        });
        // The key only so that it is the same one each time.
        found.max_by_key(|parked| (parked.n_common, usize::MAX - parked.n_tokens, parked.key))
    }

    /// The state of a conversation that was found, checked; it stays parked. One that is damaged is removed.
    pub fn load(&self, parked: &Parked) -> Result<Vec<u8>, ParkingError> {
        let (tokens, held) = {
            let mut index = self.shared.index();
            let used = index.tick();
            let entry = index.entries.get_mut(&parked.key).ok_or(ParkingError::Gone)?;
            entry.used = used;
            (entry.tokens.clone().ok_or(ParkingError::Gone)?, entry.held.clone())
        };
        let path = self.shared.dir.join(parked.key.file(PARKED));
        let state = match held {
            Held::Memory(state) => Ok(state.to_vec()),
            Held::File => read(&path, &self.shared.settings, &tokens),
        };
        let mut index = self.shared.index();
        match state {
            Ok(state) => {
                index.stats.restored += 1;
                Ok(state)
            }
            Err(Unreadable::Damaged(why)) => {
                index.drop_damaged(&self.shared.dir, parked.key, why);
                Err(ParkingError::Damaged { path, why })
            }
            Err(Unreadable::Io(source)) => {
                index.forget(parked.key);
                match source.kind() {
                    // It made room for another meanwhile, or somebody removed it.
                    io::ErrorKind::NotFound => Err(ParkingError::Gone),
                    _ => Err(failed("read", &path)(source)),
                }
            }
        }
    }

    /// What should be said of the start and since the last call.
    pub fn notices(&self) -> Vec<Notice> {
        let mut index = self.shared.index();
        let more = mem::take(&mut index.more_notices);
        let mut notices = Vec::from(mem::take(&mut index.notices));
        if more > 0 {
            notices.push(Notice::More(more));
        }
        notices
    }

    pub fn stats(&self) -> ParkingStats {
        let index = self.shared.index();
        let mut stats = ParkingStats { max_bytes: self.shared.max_bytes, ..index.stats };
        for entry in index.entries.values() {
            let Some(tokens) = &entry.tokens else {
                stats.others += 1;
                stats.others_bytes += entry.bytes;
                continue;
            };
            stats.entries += 1;
            stats.bytes += entry.bytes;
            stats.index_bytes += size_of_val(&**tokens) as u64 + size_of::<(Key, Entry)>() as u64;
            if let Held::Memory(state) = &entry.held {
                stats.queued += 1;
                stats.queued_bytes += state.len() as u64;
            }
        }
        stats
    }

    /// How many states are in memory to be written, and their bytes.
    pub fn queued(&self) -> (usize, usize) {
        self.shared.index().queued
    }

    /// Waits until nothing waits to be written. Dropping does as well.
    pub fn flush(&self) {
        let mut index = self.shared.index();
        while index.entries.values().any(|entry| matches!(entry.held, Held::Memory(_))) {
            index = self.shared.written.wait(index).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(writer) = self.writer.take() {
            // It does not panic; if it did, what is on the disk is whole.
            let _ = writer.join();
        }
    }
}
