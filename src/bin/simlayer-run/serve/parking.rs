//! Parked conversations: the states of idle ones in files, so that memory is free and nothing need be read again.
//!
//! A folder belongs to one server at a time (`lock`). A conversation is a file, `<32 hex digits>.parked`, named by a hash
//! of what it holds, never by what a client sent. It is written as `….partial`, flushed, and renamed: a program that is
//! killed leaves a partial file, which the next start removes, or a whole one. All numbers are little-endian:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `SLPARKED` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | F, bytes of the settings |
//! | 16 | 8 | T, number of tokens |
//! | 24 | 8 | S, bytes of the state |
//! | 32 | 16 | XXH3-128 of the state |
//! | 48 | 16 | XXH3-128 of the bytes 0..48, the settings and the tokens |
//! | 64 | F | the settings: what model and cache the state fits, as text |
//! | 64 + F | 4 T | the tokens |
//! | 64 + F + 4 T | S | the state |
//!
//! The file's length has to be that sum, and is compared before anything is allocated. At the start every header is read
//! and checked, a state when it is restored. What is damaged is removed and said ([`Parking::notices`]). Files of other
//! settings, and of other versions of this format, are left for the server that they are for; they count towards the limit
//! and age as ours do. When a file was last used is its modification time.
//!
//! Checksums find accidents, not attacks: who can write to the folder (made for its owner alone) can change answers.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry::Occupied},
    fmt,
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    mem,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::SystemTime,
};

use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

const MAGIC: [u8; 8] = *b"SLPARKED";
const VERSION: u32 = 1;
const FIXED_BYTES: usize = 64;
/// Where the header's own checksum is.
const CHECKSUM_AT: usize = 48;
/// No settings are longer, and no conversation has more tokens: what a header may make us allocate.
const MAX_SETTINGS: usize = 4096;
const MAX_TOKENS: usize = 1 << 24;
/// States that wait to be written, besides the one that is being written. They take memory.
const QUEUE: usize = 2;
/// Notices that are kept until somebody asks.
const MAX_NOTICES: usize = 64;

const PARKED: &str = ".parked";
const PARTIAL: &str = ".partial";

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

/// A hash of settings and tokens: a file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key(u128);

impl Key {
    fn new(settings: &str, tokens: &[i32]) -> Key {
        let mut hash = Xxh3Default::new();
        hash.update(&(settings.len() as u64).to_le_bytes());
        hash.update(settings.as_bytes());
        hash.update(&token_bytes(tokens));
        Key(hash.digest128())
    }

    fn file(self, ending: &str) -> String {
        format!("{:032x}{ending}", self.0)
    }

    /// Of a file that is named as [`Key::file`] does.
    fn of_file(name: &str, ending: &str) -> Option<Key> {
        let digits = name.strip_suffix(ending)?;
        let key = Key(u128::from_str_radix(digits, 16).ok()?);
        (key.file(ending) == name).then_some(key)
    }
}

#[derive(Debug)]
struct Entry {
    /// `None` for those of other settings.
    tokens: Option<Arc<[i32]>>,
    /// The file's length.
    bytes: u64,
    /// The higher the later.
    used: u64,
    held: Held,
}

#[derive(Debug, Clone)]
enum Held {
    /// It waits to be written.
    Memory(Arc<Vec<u8>>),
    File,
}

#[derive(Debug, Default)]
struct Index {
    entries: HashMap<Key, Entry>,
    /// Of all files, those of other settings included. Files with holes have lengths whose sum is beyond 64 bits.
    bytes: u128,
    ticks: u64,
    /// States in memory, and their bytes.
    queued: (usize, usize),
    /// Only what is counted since the start.
    stats: ParkingStats,
    notices: VecDeque<Notice>,
    more_notices: usize,
    /// The last conversation could not be written, and that was said.
    failing: bool,
}

impl Index {
    fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    fn notice(&mut self, notice: Notice) {
        if self.notices.len() < MAX_NOTICES {
            self.notices.push_back(notice);
        } else {
            self.more_notices += 1;
        }
    }

    /// What is in the folder. Only files named as ours are looked at.
    fn scan(&mut self, dir: &Path, settings: &str, max_bytes: u64) -> Result<(), ParkingError> {
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
    fn make_room(&mut self, dir: &Path, max_bytes: u64, bytes: u64) -> (usize, u64) {
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

    fn drop_damaged(&mut self, dir: &Path, key: Key, why: &'static str) {
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
    fn forget(&mut self, key: Key) -> u64 {
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

    fn remove_file(&mut self, path: &Path, name: &str) {
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.notice(Notice::Unreadable { name: name.to_owned(), why: format!("not removed: {error}") })
            }
        }
    }
}

/// Makes a file that must not be there yet.
type Create = fn(&Path) -> io::Result<File>;

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    max_bytes: u64,
    settings: Box<str>,
    create: Create,
    index: Mutex<Index>,
    /// A conversation was written, or could not be.
    written: Condvar,
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        // Nothing that is done under the lock panics half-way.
        self.index.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The thread that writes.
    fn write_queued(&self, keys: &Receiver<Key>) {
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

/// Why a file gives no state.
#[derive(Debug)]
enum Unreadable {
    Damaged(&'static str),
    Io(io::Error),
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Unreadable {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Unreadable::Damaged("it is too short"),
            _ => Unreadable::Io(error),
        }
    }
}

fn header(settings: &str, tokens: &[i32], state: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(FIXED_BYTES + settings.len() + size_of_val(tokens));
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    // Its length was compared with MAX_SETTINGS.
    header.extend((settings.len() as u32).to_le_bytes());
    header.extend((tokens.len() as u64).to_le_bytes());
    header.extend((state.len() as u64).to_le_bytes());
    header.extend(xxh3_128(state).to_le_bytes());
    header.extend([0; FIXED_BYTES - CHECKSUM_AT]);
    header.extend(settings.as_bytes());
    header.extend(token_bytes(tokens));
    let checksum = header_checksum(&header);
    header[CHECKSUM_AT..FIXED_BYTES].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Of a whole header, but for the checksum in it.
fn header_checksum(header: &[u8]) -> u128 {
    let mut hash = Xxh3Default::new();
    hash.update(&header[..CHECKSUM_AT]);
    hash.update(&header[FIXED_BYTES..]);
    hash.digest128()
}

fn token_bytes(tokens: &[i32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

/// A file's length; `None` where no number is large enough.
fn file_bytes(settings: usize, tokens: usize, state: u64) -> Option<u64> {
    let tokens = (tokens as u64).checked_mul(4)?;
    (FIXED_BYTES as u64).checked_add(settings as u64)?.checked_add(tokens)?.checked_add(state)
}

/// What a header says that was checked.
#[derive(Debug, PartialEq, Eq)]
enum Header {
    Ours {
        settings: Vec<u8>,
        tokens: Vec<i32>,
        state_bytes: u64,
        state_checksum: u128,
    },
    /// Nothing more can be known of it.
    OtherVersion,
}

/// Reads the header of a file of `length` bytes. Allocates what the file is long at most.
fn read_header(mut file: impl Read, length: u64) -> Result<Header, Unreadable> {
    let mut header = vec![0; FIXED_BYTES];
    file.read_exact(&mut header)?;
    if header[..8] != MAGIC {
        return Err(Unreadable::Damaged("it does not begin as a parked conversation does"));
    }
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let u128_at = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    if u32_at(8) != VERSION {
        return Ok(Header::OtherVersion);
    }
    let (n_settings, n_tokens, state_bytes) = (u32_at(12) as usize, u64_at(16), u64_at(24));
    let (state_checksum, checksum) = (u128_at(32), u128_at(CHECKSUM_AT));
    let n_tokens = usize::try_from(n_tokens).unwrap_or(usize::MAX);
    if n_settings > MAX_SETTINGS || n_tokens > MAX_TOKENS {
        return Err(Unreadable::Damaged("its header cannot be"));
    }
    if file_bytes(n_settings, n_tokens, state_bytes) != Some(length) {
        return Err(Unreadable::Damaged("it is not as long as its header says"));
    }
    header.resize(FIXED_BYTES + n_settings + 4 * n_tokens, 0);
    file.read_exact(&mut header[FIXED_BYTES..])?;
    if header_checksum(&header) != checksum {
        return Err(Unreadable::Damaged("its header's checksum is wrong"));
    }
    let (settings, tokens) = header[FIXED_BYTES..].split_at(n_settings);
    let tokens = tokens.chunks_exact(4).map(|bytes| i32::from_le_bytes(std::array::from_fn(|i| bytes[i])));
    Ok(Header::Ours { settings: settings.to_vec(), tokens: tokens.collect(), state_bytes, state_checksum })
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

/// The state in a file, which has to be of these settings and tokens.
fn read(path: &Path, settings: &str, tokens: &[i32]) -> Result<Vec<u8>, Unreadable> {
    let file = File::open(path)?;
    let Header::Ours { settings: its_settings, tokens: its_tokens, state_bytes, state_checksum } =
        read_header(&file, file.metadata()?.len())?
    else {
        return Err(Unreadable::Damaged("it is another file now"));
    };
    if its_settings != settings.as_bytes() || its_tokens != tokens {
        return Err(Unreadable::Damaged("it is another file now"));
    }
    let no_memory = |_| Unreadable::Io(io::ErrorKind::OutOfMemory.into());
    let n = usize::try_from(state_bytes).map_err(|_| Unreadable::Io(io::ErrorKind::OutOfMemory.into()))?;
    let mut state = Vec::new();
    state.try_reserve_exact(n).map_err(no_memory)?;
    (&file).take(state_bytes).read_to_end(&mut state)?;
    if state.len() != n {
        return Err(Unreadable::Damaged("it is too short"));
    }
    if xxh3_128(&state) != state_checksum {
        return Err(Unreadable::Damaged("its state's checksum is wrong"));
    }
    // So that the next start knows; it is no harm where that fails.
    let _ = file.set_modified(SystemTime::now());
    Ok(state)
}

fn touch(path: &Path) {
    // As above.
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ParkingError {
    move |source| ParkingError::Io { what, path: path.to_owned(), source }
}

/// Conversations are private.
fn make_private_folder(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

fn create_private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    // Never through a link, nor over what is there.
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn lock(dir: &Path) -> Result<File, ParkingError> {
    let path = dir.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ParkingError::InUse(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: &str = "a model; q4_0, lazy";
    const OTHERS: &str = "a model; f16";
    const PLENTY: u64 = 1 << 30;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn open(dir: &Path) -> Parking {
        Parking::open(dir, PLENTY, SETTINGS).unwrap()
    }

    fn state_of(tokens: &[i32]) -> Vec<u8> {
        tokens.iter().flat_map(|token| token.wrapping_mul(77).to_le_bytes()).cycle().take(1000).collect()
    }

    /// Parks the tokens with their state, on the disk when it returns.
    fn park(parking: &Parking, tokens: &[i32]) {
        assert_eq!(parking.store(tokens, state_of(tokens)), Stored::Queued);
        parking.flush();
    }

    fn restored(parking: &Parking, tokens: &[i32]) -> Option<Vec<u8>> {
        parking.find(tokens).map(|parked| parking.load(&parked).unwrap())
    }

    fn files(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "lock").collect();
        names.sort();
        names
    }

    fn only_file(dir: &Path) -> PathBuf {
        match &files(dir)[..] {
            [name] => dir.join(name),
            names => panic!("{names:?}"),
        }
    }

    fn set_age(path: &Path, seconds: u64) {
        let then = SystemTime::now() - std::time::Duration::from_secs(seconds);
        File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    }

    #[test]
    fn what_is_parked_is_given_back_before_and_after_a_restart() {
        let dir = folder();
        let parking = open(dir.path());
        assert_eq!(parking.store(&[1, 2, 3], state_of(&[1, 2, 3])), Stored::Queued);
        assert_eq!(restored(&parking, &[1, 2, 3]), Some(state_of(&[1, 2, 3])), "while it waits");
        parking.flush();
        assert_eq!(restored(&parking, &[1, 2, 3, 4]), Some(state_of(&[1, 2, 3])), "written");
        assert_eq!(parking.store(&[1, 2, 3], state_of(&[1, 2, 3])), Stored::Already);
        drop(parking);

        let parking = open(dir.path());
        assert_eq!(parking.notices(), []);
        assert_eq!(restored(&parking, &[1, 2, 3]), Some(state_of(&[1, 2, 3])));
        let length = fs::metadata(only_file(dir.path())).unwrap().len();
        let stats = parking.stats();
        assert_eq!((stats.entries, stats.bytes, stats.restored, stats.max_bytes), (1, length, 1, PLENTY));
    }

    #[test]
    fn dropping_writes_what_waits() {
        let dir = folder();
        let parking = open(dir.path());
        assert_eq!(parking.store(&[1, 2], state_of(&[1, 2])), Stored::Queued);
        assert_eq!(parking.store(&[3], state_of(&[3])), Stored::Queued);
        drop(parking);
        assert_eq!(open(dir.path()).stats().entries, 2);
    }

    #[test]
    fn the_longest_that_fits_is_found() {
        let dir = folder();
        let parking = open(dir.path());
        for tokens in [&[1, 2][..], &[1, 2, 3, 4], &[1, 2, 3, 4, 5, 6], &[9]] {
            park(&parking, tokens);
        }
        let found = |parked: Option<Parked>| parked.map(|parked| (parked.n_tokens, parked.n_common));
        assert_eq!(found(parking.find(&[1, 2, 3, 4, 5])), Some((4, 4)));
        assert_eq!(found(parking.find(&[1, 2, 3, 4])), Some((4, 4)));
        assert_eq!(found(parking.find(&[1, 2, 3])), Some((2, 2)));
        assert_eq!(found(parking.find(&[1])), None);
        assert_eq!(found(parking.find(&[2, 1])), None);
        assert_eq!(found(parking.find(&[])), None);
        assert_eq!(found(parking.find_common(&[1, 2, 3, 4, 5])), Some((6, 5)));
        assert_eq!(
            found(parking.find_common(&[1, 2, 3])),
            Some((4, 3)),
            "of those with as much in common the shortest"
        );
        assert_eq!(found(parking.find_common(&[1, 7])), Some((2, 1)));
        assert_eq!(found(parking.find_common(&[7])), None);
    }

    #[test]
    fn files_cut_short_anywhere_are_removed_and_never_restored() {
        let dir = folder();
        let tokens = [5, 6, 7];
        park(&open(dir.path()), &tokens);
        let path = only_file(dir.path());
        let whole = fs::read(&path).unwrap();
        let state_at = FIXED_BYTES + SETTINGS.len() + 4 * tokens.len();
        assert_eq!(whole.len(), state_at + 1000);
        for length in (0..=state_at + 1).chain([state_at + 500, whole.len() - 1]) {
            fs::write(&path, &whole[..length]).unwrap();
            let parking = open(dir.path());
            assert_eq!(parking.find_common(&tokens), None, "{length}");
            let notices = parking.notices();
            assert!(matches!(&notices[..], [Notice::Damaged { .. }]), "{length}: {notices:?}");
            assert_eq!((parking.stats().dropped, files(dir.path())), (1, vec![]), "{length}");
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert_eq!(open(dir.path()).stats().entries, 0, "too long");
    }

    #[test]
    fn a_write_that_was_killed_leaves_nothing() {
        let dir = folder();
        park(&open(dir.path()), &[1]);
        let path = only_file(dir.path());
        let whole = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().replace(PARKED, PARTIAL);
        fs::remove_file(path).unwrap();
        for length in [0, 1, FIXED_BYTES, whole.len() / 2, whole.len()] {
            fs::write(dir.path().join(&name), &whole[..length]).unwrap();
            let parking = open(dir.path());
            assert_eq!(parking.notices(), [Notice::Unfinished { name: name.clone() }]);
            assert_eq!((parking.stats().entries, files(dir.path())), (0, vec![]));
        }
        let parking = open(dir.path());
        park(&parking, &[1]);
        assert_eq!(restored(&parking, &[1]), Some(state_of(&[1])));
    }

    #[test]
    fn no_changed_byte_is_ever_restored() {
        let dir = folder();
        let tokens = [5, 6, 7];
        park(&open(dir.path()), &tokens);
        let path = only_file(dir.path());
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, bytes).unwrap();
            let parking = open(dir.path());
            if let Some(parked) = parking.find(&tokens) {
                // A state is looked at when it is wanted.
                let error = parking.load(&parked).unwrap_err();
                assert!(matches!(error, ParkingError::Damaged { .. }), "{at}: {error}");
                assert_eq!(parking.find(&tokens), None, "{at}");
                assert!(matches!(parking.load(&parked), Err(ParkingError::Gone)), "{at}");
            }
            let stats = parking.stats();
            if (8..12).contains(&at) {
                assert_eq!((stats.entries, stats.others), (0, 1), "{at}: another version");
            } else {
                assert_eq!((stats.dropped, files(dir.path())), (1, vec![]), "{at}");
                assert!(matches!(&parking.notices()[..], [Notice::Damaged { .. }]), "{at}");
            }
        }
    }

    #[test]
    fn a_file_damaged_while_we_run_is_not_restored() {
        let dir = folder();
        let parking = open(dir.path());
        park(&parking, &[1, 2]);
        park(&parking, &[3, 4]);
        let one = dir.path().join(Key::new(SETTINGS, &[1, 2]).file(PARKED));
        let other = dir.path().join(Key::new(SETTINGS, &[3, 4]).file(PARKED));
        fs::copy(&one, &other).unwrap();
        let parked = parking.find(&[3, 4]).unwrap();
        assert!(matches!(parking.load(&parked), Err(ParkingError::Damaged { .. })));
        fs::remove_file(one).unwrap();
        let parked = parking.find(&[1, 2]).unwrap();
        assert!(matches!(parking.load(&parked), Err(ParkingError::Gone)));
        assert_eq!((parking.stats().entries, parking.stats().bytes), (0, 0));
        park(&parking, &[1, 2]);
        assert_eq!(restored(&parking, &[1, 2]), Some(state_of(&[1, 2])));
    }

    #[test]
    fn no_header_makes_us_panic_or_allocate_much() {
        let length = 4096;
        let mut good = header(SETTINGS, &[1, 2, 3], &[0; 100]);
        good.resize(length, 0);
        for lengths in [[u64::MAX; 3], [0, u64::MAX / 4, 0], [0, 1 << 62, 64], [4032, 0, 0], [0, 0, u64::MAX - 60]] {
            let mut bytes = good.clone();
            bytes[12..16].copy_from_slice(&(lengths[0] as u32).to_le_bytes());
            bytes[16..24].copy_from_slice(&lengths[1].to_le_bytes());
            bytes[24..32].copy_from_slice(&lengths[2].to_le_bytes());
            assert!(matches!(read_header(&bytes[..], length as u64), Err(Unreadable::Damaged(_))), "{lengths:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_us_panic(mut bytes in proptest::collection::vec(0_u8.., 0..200), magic: bool) {
            if magic && bytes.len() >= 12 {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            }
            let read = read_header(&bytes[..], bytes.len() as u64);
            let accepted = matches!(read, Ok(Header::Ours { .. }));
            proptest::prop_assert!(!accepted);
        }
    }

    #[test]
    fn files_of_other_settings_are_left_and_make_room_in_turn() {
        let dir = folder();
        let theirs = Parking::open(dir.path(), PLENTY, OTHERS).unwrap();
        park(&theirs, &[1, 2]);
        drop(theirs);
        set_age(&only_file(dir.path()), 60);

        let parking = open(dir.path());
        assert_eq!(parking.find_common(&[1, 2]), None);
        let stats = parking.stats();
        assert_eq!((stats.entries, stats.others), (0, 1));
        assert_eq!(parking.notices(), [Notice::Others { entries: 1, bytes: stats.others_bytes }]);
        park(&parking, &[1, 2]);
        drop(parking);

        let theirs = Parking::open(dir.path(), PLENTY, OTHERS).unwrap();
        assert_eq!(restored(&theirs, &[1, 2]), Some(state_of(&[1, 2])));
        drop(theirs);
        set_age(&dir.path().join(Key::new(OTHERS, &[1, 2]).file(PARKED)), 60);
        let parking = Parking::open(dir.path(), 2500, SETTINGS).unwrap();
        park(&parking, &[3]);
        let stats = parking.stats();
        assert_eq!((stats.entries, stats.others, stats.evicted), (2, 0, 1));
    }

    #[test]
    fn a_file_of_another_name_is_damaged() {
        let dir = folder();
        park(&open(dir.path()), &[1]);
        let path = only_file(dir.path());
        fs::rename(&path, dir.path().join(Key(7).file(PARKED))).unwrap();
        let parking = open(dir.path());
        assert_eq!((parking.stats().entries, parking.stats().dropped), (0, 1));
    }

    #[test]
    fn the_longest_unused_make_room() {
        let dir = folder();
        // Three fit.
        let max_bytes = 3 * file_bytes(SETTINGS.len(), 1, 1000).unwrap();
        let parking = Parking::open(dir.path(), max_bytes, SETTINGS).unwrap();
        for token in 1..=3 {
            park(&parking, &[token]);
        }
        assert!(restored(&parking, &[1]).is_some());
        park(&parking, &[4]);
        let there = |parking: &Parking| (1..=5).filter(|&token| parking.find(&[token]).is_some()).collect::<Vec<_>>();
        assert_eq!(there(&parking), [1, 3, 4]);
        assert_eq!(parking.store(&[3], state_of(&[3])), Stored::Already);
        park(&parking, &[5]);
        assert_eq!(there(&parking), [3, 4, 5]);
        assert_eq!((parking.stats().bytes, parking.stats().evicted), (max_bytes, 2));
        assert_eq!(files(dir.path()).len(), 3);
        drop(parking);

        // The order outlives us.
        for (token, seconds) in [(3, 10), (4, 30), (5, 20)] {
            set_age(&dir.path().join(Key::new(SETTINGS, &[token]).file(PARKED)), seconds);
        }
        let parking = Parking::open(dir.path(), max_bytes - 1, SETTINGS).unwrap();
        assert_eq!(there(&parking), [3, 5]);
        assert!(matches!(parking.notices()[..], [Notice::OverLimit { entries: 1, .. }]));
        assert!(restored(&parking, &[5]).is_some());
        assert_eq!(parking.store(&[3], state_of(&[3])), Stored::Already);
        drop(parking);
        let parking = Parking::open(dir.path(), max_bytes / 3, SETTINGS).unwrap();
        assert_eq!(there(&parking), [3]);
    }

    #[test]
    fn what_never_fits_is_refused() {
        let dir = folder();
        let parking = Parking::open(dir.path(), 1000, SETTINGS).unwrap();
        assert_eq!(parking.store(&[1], state_of(&[1])), Stored::TooLarge);
        assert_eq!((parking.find(&[1]), files(dir.path())), (None, vec![]));
        assert!(matches!(
            Parking::open(folder().path(), 1000, &"x".repeat(MAX_SETTINGS + 1)),
            Err(ParkingError::Settings(_))
        ));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_said_once_and_leaves_no_file() {
        // What is written to the file that is opened here fails as on a full disk.
        fn full(path: &Path) -> io::Result<File> {
            fs::write(path, "the part that fitted")?;
            File::options().write(true).open("/dev/full")
        }
        let dir = folder();
        let parking = Parking::open_with(dir.path(), PLENTY, SETTINGS, full).unwrap();
        for token in 1..=3 {
            park(&parking, &[token]);
            assert_eq!((parking.find(&[token]), files(dir.path())), (None, vec![]));
        }
        let notices = parking.notices();
        assert!(matches!(&notices[..], [Notice::NotWritten { why }] if why.contains("No space left")), "{notices:?}");
        assert_eq!((parking.stats().failed, parking.stats().bytes), (3, 0));
        drop(parking);
        let parking = open(dir.path());
        park(&parking, &[1]);
        assert_eq!(restored(&parking, &[1]), Some(state_of(&[1])));
    }

    #[test]
    fn it_is_said_again_when_writing_worked_meanwhile() {
        // A folder where the partial file would be.
        let dir = folder();
        let parking = open(dir.path());
        let in_the_way = dir.path().join(Key::new(SETTINGS, &[1]).file(PARTIAL));
        for _ in 0..2 {
            fs::create_dir(&in_the_way).unwrap();
            park(&parking, &[1]);
            park(&parking, &[1]);
            let notices = parking.notices();
            let said = notices.iter().filter(|notice| matches!(notice, Notice::NotWritten { .. }));
            assert_eq!(said.count(), 1, "{notices:?}");
            fs::remove_dir(&in_the_way).unwrap();
            park(&parking, &[2]);
            fs::remove_file(dir.path().join(Key::new(SETTINGS, &[2]).file(PARKED))).unwrap();
            assert_eq!(parking.load(&parking.find(&[2]).unwrap()).ok(), None);
        }
    }

    #[test]
    fn no_more_wait_than_may() {
        // Opening a file waits for whoever holds this lock.
        static DISK: Mutex<()> = Mutex::new(());
        fn slow(path: &Path) -> io::Result<File> {
            let _held = DISK.lock();
            create_private(path)
        }
        let dir = folder();
        let parking = Parking::open_with(dir.path(), PLENTY, SETTINGS, slow).unwrap();
        let disk = DISK.lock();
        let mut queued = 0;
        let returned = loop {
            match parking.store(&[queued], state_of(&[queued])) {
                Stored::Queued => queued += 1,
                Stored::Busy(state) => break state,
                other => panic!("{other:?}"),
            }
            assert!(queued <= QUEUE as i32 + 1);
        };
        assert_eq!(returned, state_of(&[queued]));
        assert_eq!((parking.stats().queued, parking.stats().queued_bytes), (queued as usize, 1000 * queued as u64));
        drop(disk);
        parking.flush();
        assert_eq!((parking.stats().queued, parking.stats().entries), (0, queued as usize));
    }

    #[test]
    fn a_folder_has_one_server() {
        let dir = folder();
        let parking = open(dir.path());
        assert!(matches!(Parking::open(dir.path(), PLENTY, OTHERS), Err(ParkingError::InUse(_))));
        drop(parking);
        open(dir.path());
    }

    #[test]
    fn what_is_not_ours_is_left() {
        let dir = folder();
        let hex = "0".repeat(32);
        let names =
            ["notes.parked", "notes.partial", "readme", &format!("{hex}.parked2"), &format!("+{}.parked", &hex[1..])];
        for name in names {
            fs::write(dir.path().join(name), "mine").unwrap();
        }
        fs::create_dir(dir.path().join(format!("{hex}.parked"))).unwrap();
        let parking = open(dir.path());
        assert!(matches!(&parking.notices()[..], [Notice::Unreadable { .. }]));
        assert_eq!(files(dir.path()).len(), 6);
        assert_eq!(parking.stats().entries, 0);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed_and_files_are_private() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let outside = folder();
        let dir = outside.path().join("a/b");
        let parking = open(&dir);
        let precious = outside.path().join("precious");
        fs::write(&precious, "mine").unwrap();
        symlink(&precious, dir.join(Key::new(SETTINGS, &[1]).file(PARTIAL))).unwrap();
        park(&parking, &[1]);
        assert_eq!(fs::read(&precious).unwrap(), b"mine");
        park(&parking, &[1]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&only_file(&dir))), (0o700, 0o600));
        drop(parking);
        let parked = only_file(&dir);
        fs::rename(&parked, &precious).unwrap();
        symlink(&precious, &parked).unwrap();
        assert_eq!(open(&dir).stats().entries, 0);
        assert!(precious.exists());
    }
}
