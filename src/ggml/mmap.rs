use std::{fs::File, io};

use memmap2::Mmap;

/// Maps a whole file for reading.
///
/// Errors: whatever the operating system says. A file of no bytes gives an empty map.
pub fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read-only and private to nobody: if another process changes the file while it is mapped,
    // the bytes change under us, and if it cuts the file short, reading past the new end raises SIGBUS. That trust
    // in the file cannot be checked; it is the one llama.cpp places in a model that it maps. Nothing in this
    // library relies on two reads of the map giving the same bytes: lengths and offsets are copied out and checked
    // once, and what is read later is bounds-checked against the map.
    unsafe { Mmap::map(file) }
}
