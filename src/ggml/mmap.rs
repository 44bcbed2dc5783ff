//! Files in memory maps.

use std::{fs::File, io, ops::Range};

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

/// Lets the system take back the memory of a range's whole pages. They are read from the file again when they are
/// touched.
pub fn release_pages(map: &Mmap, range: Range<usize>) {
    #[cfg(unix)]
    {
        // A page that is only partly in the range is kept. Where pages are larger than this, one more at the start
        // may go: it comes back as any other.
        const PAGE: usize = 4096;
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end.min(map.len()) / PAGE * PAGE);
        if start < end {
            // SAFETY: the map is of a file, read-only and never written: what is discarded is read from the file
            // again, with the same bytes (see `map_file` for a file that changes meanwhile).
            let done = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            // Advice: nothing is lost when the system does not take it.
            let _ = done;
        }
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}
