//! One parked conversation's file.
//!
//! Its name is `<32 hex digits>.parked`, or `….partial` while it is being written. All numbers are little-endian:
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
//! The file's length has to be that sum, and is compared before anything is allocated.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    time::SystemTime,
};

use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

pub(super) const MAGIC: [u8; 8] = *b"SLPARKED";
pub(super) const VERSION: u32 = 1;
pub(super) const FIXED_BYTES: usize = 64;
/// Where the header's own checksum is.
const CHECKSUM_AT: usize = 48;
/// No settings are longer, and no conversation has more tokens: what a header may make us allocate.
pub(super) const MAX_SETTINGS: usize = 4096;
pub(super) const MAX_TOKENS: usize = 1 << 24;

pub(super) const PARKED: &str = ".parked";
pub(super) const PARTIAL: &str = ".partial";

/// A hash of settings and tokens: a file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key(pub(super) u128);

impl Key {
    pub(super) fn new(settings: &str, tokens: &[i32]) -> Key {
        let mut hash = Xxh3Default::new();
        hash.update(&(settings.len() as u64).to_le_bytes());
        hash.update(settings.as_bytes());
        hash.update(&token_bytes(tokens));
        Key(hash.digest128())
    }

    pub(super) fn file(self, ending: &str) -> String {
        format!("{:032x}{ending}", self.0)
    }

    /// Of a file that is named as [`Key::file`] does.
    pub(super) fn of_file(name: &str, ending: &str) -> Option<Key> {
        let digits = name.strip_suffix(ending)?;
        let key = Key(u128::from_str_radix(digits, 16).ok()?);
        (key.file(ending) == name).then_some(key)
    }
}

/// Why a file gives no state.
#[derive(Debug)]
pub(super) enum Unreadable {
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

pub(super) fn header(settings: &str, tokens: &[i32], state: &[u8]) -> Vec<u8> {
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
pub(super) fn file_bytes(settings: usize, tokens: usize, state: u64) -> Option<u64> {
    let tokens = (tokens as u64).checked_mul(4)?;
    (FIXED_BYTES as u64).checked_add(settings as u64)?.checked_add(tokens)?.checked_add(state)
}

/// What a header says that was checked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
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
pub(super) fn read_header(mut file: impl Read, length: u64) -> Result<Header, Unreadable> {
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

/// The state in a file, which has to be of these settings and tokens.
pub(super) fn read(path: &Path, settings: &str, tokens: &[i32]) -> Result<Vec<u8>, Unreadable> {
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

pub(super) fn touch(path: &Path) {
    // As above.
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}
