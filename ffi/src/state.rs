//! Saving and restoring: the whole context, or one sequence, in memory or in a file.
//!
//! Sequences are the engine's states, each with a checksum of its own. A context is a list of them behind a header; a
//! file has the tokens in front. Everything is checked before anything is changed.

use std::{
    ffi::c_char,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use ggml_sys as sys;
use simlayer::Session;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    batch::sequence,
    border::{Result, c_str, slice, slice_mut},
    context::{CONTEXTS, Context, State, session},
    log,
};

const CONTEXT_MAGIC: [u8; 8] = *b"SIMLCTX1";
const FILE_MAGIC: [u8; 8] = *b"SIMLFIL1";

/// Magic, length of the list, and the ids, followed by their checksum.
fn context_header(seqs: &[u32]) -> Vec<u8> {
    let mut header = CONTEXT_MAGIC.to_vec();
    header.extend((seqs.len() as u64).to_le_bytes());
    header.extend(seqs.iter().flat_map(|seq| seq.to_le_bytes()));
    let checksum = xxh3_64(&header);
    header.extend(checksum.to_le_bytes());
    header
}

fn context_bytes(session: &Session) -> usize {
    let seqs = session.seq_ids();
    context_header(&seqs).len() + seqs.iter().map(|&seq| session.seq_state_bytes(seq)).sum::<usize>()
}

fn write_context(session: &Session, to: &mut dyn Write) -> io::Result<()> {
    let seqs = session.seq_ids();
    to.write_all(&context_header(&seqs))?;
    seqs.iter().try_for_each(|&seq| session.save_seq(seq, to))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Restores all sequences; the bytes that the state took.
fn read_context(context: &Context, state: &mut State, from: &[u8]) -> Result<usize> {
    let damaged = || crate::border::Failure("the state is damaged: its header is none; save it again".into());
    let n = read_u64(from, 8).filter(|_| from.starts_with(&CONTEXT_MAGIC)).ok_or_else(damaged)?;
    let n = usize::try_from(n).ok().filter(|&n| n <= context.limits.n_seq_ids()).ok_or_else(damaged)?;
    let ids_end = 16 + n * 4;
    let checksum = read_u64(from, ids_end).ok_or_else(damaged)?;
    if xxh3_64(&from[..ids_end]) != checksum {
        return Err(damaged());
    }
    let mut at = ids_end + 8;
    let mut states = Vec::new();
    for id in from[16..ids_end].chunks_exact(4) {
        let id = u32::from_le_bytes(id.try_into().map_err(|_| damaged())?);
        let seq = sequence(i32::try_from(id).unwrap_or(-1), &context.limits)?;
        let length = Session::state_length(&from[at..])?;
        states.push((seq, &from[at..at + length]));
        at += length;
    }
    session(state)?.load_seqs(&states)?;
    after_load(state, None);
    Ok(at)
}

/// Puts what is kept beside the engine's sequences right. The last batch's outputs stay, as upstream leaves them.
fn after_load(state: &mut State, seq: Option<u32>) {
    match seq {
        Some(seq) => state.forget(seq),
        None => {
            (state.scored, state.shared, state.score_next) = Default::default();
        }
    }
    let Some(session) = &state.session else { return };
    let seqs = seq.map_or_else(|| session.seq_ids(), |seq| vec![seq]);
    // Lazy layers or scores say that a prompt has ended.
    let is_scored = |&seq: &u32| session.layers(seq).iter().any(|layer| layer.lazy || layer.score.is_some());
    let scored: Vec<u32> = seqs.into_iter().filter(is_scored).collect();
    state.scored.extend(scored.into_iter().map(|seq| (seq, true)));
}

/// The tokens in front of a file's state.
fn file_header(tokens: &[sys::llama_token]) -> Vec<u8> {
    let mut header = FILE_MAGIC.to_vec();
    header.extend((tokens.len() as u64).to_le_bytes());
    header.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    let checksum = xxh3_64(&header);
    header.extend(checksum.to_le_bytes());
    header
}

/// A file's tokens and its state.
fn read_file(bytes: &[u8]) -> Result<(Vec<sys::llama_token>, &[u8])> {
    let n = read_u64(bytes, 8).filter(|_| bytes.starts_with(&FILE_MAGIC)).and_then(|n| usize::try_from(n).ok());
    let end = n.and_then(|n| n.checked_mul(4)?.checked_add(16));
    let Some((end, checksum)) = end.and_then(|end| Some((end, read_u64(bytes, end)?))) else {
        fail!("the file is no state file of simlayer, or is damaged: save it again");
    };
    if xxh3_64(&bytes[..end]) != checksum {
        fail!("the file's tokens are damaged (wrong checksum): save it again");
    }
    let token = |bytes: &[u8]| bytes.try_into().map_or(0, i32::from_le_bytes);
    Ok((bytes[16..end].chunks_exact(4).map(token).collect(), &bytes[end + 8..]))
}

/// # Safety
/// As [`c_str`].
unsafe fn path<'a>(path: *const c_char) -> Result<&'a Path> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: the caller's promise.
    let path = unsafe { c_str(path, "path") }?;
    Ok(Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())))
}

fn named<T>(path: &Path, result: io::Result<T>) -> Result<T> {
    match result {
        Ok(value) => Ok(value),
        Err(error) => fail!("{}: {error}", path.display()),
    }
}

/// Writes a file beside its place first, so that a failure leaves the old one as it was.
fn write_file(
    path: &Path,
    tokens: &[sys::llama_token],
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<usize> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let written = (|| {
        let mut file = BufWriter::new(File::create(part)?);
        file.write_all(&file_header(tokens))?;
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(part, path)?;
        std::fs::metadata(path).map(|metadata| metadata.len() as usize)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(part);
    }
    named(path, written)
}

/// Loads a file: `restore` gets its state, then the tokens go to the caller.
///
/// # Safety
/// `tokens_out` has room for `capacity` tokens; `count_out` is null or writable.
unsafe fn load_file(
    file: *const c_char,
    tokens_out: *mut sys::llama_token,
    capacity: usize,
    count_out: *mut usize,
    restore: impl FnOnce(&[u8]) -> Result<()>,
) -> Result<usize> {
    // SAFETY: the caller's C string.
    let path = unsafe { path(file) }?;
    let bytes = named(path, std::fs::read(path))?;
    let (tokens, state) = read_file(&bytes)?;
    if tokens_out.is_null() && capacity == 0 {
        // Only the number is asked for.
        // SAFETY: as the caller promises.
        unsafe { write_count(count_out, tokens.len()) };
        return Ok(bytes.len() - state.len());
    }
    if tokens.len() > capacity {
        fail!("{}: it has {} tokens, there is room for {capacity}", path.display(), tokens.len());
    }
    // SAFETY: as the caller promises.
    let out = unsafe { slice_mut(tokens_out, tokens.len(), "tokens_out") }?;
    restore(state)?;
    out.copy_from_slice(&tokens);
    // SAFETY: as the caller promises.
    unsafe { write_count(count_out, tokens.len()) };
    Ok(bytes.len())
}

/// # Safety
/// `count_out` is null or writable.
unsafe fn write_count(count_out: *mut usize, count: usize) {
    if !count_out.is_null() {
        // SAFETY: not null, and the caller's promise.
        unsafe { count_out.write(count) };
    }
}

fn get_size(ctx: *mut sys::llama_context) -> Result<usize> {
    let context = CONTEXTS.get(ctx)?;
    let mut state = context.lock();
    Ok(context_bytes(session(&mut state)?))
}

/// # Safety
/// `dst` has room for `size` bytes.
unsafe fn get_data(ctx: *mut sys::llama_context, dst: *mut u8, size: usize) -> Result<usize> {
    let context = CONTEXTS.get(ctx)?;
    let mut state = context.lock();
    let session = session(&mut state)?;
    let needed = context_bytes(session);
    if needed > size {
        fail!("the state takes {needed} bytes, there is room for {size}");
    }
    // SAFETY: the caller's promise.
    let mut to = unsafe { slice_mut(dst, needed, "dst") }?;
    write_context(session, &mut to)?;
    Ok(needed)
}

/// # Safety
/// `src` points to `size` bytes.
unsafe fn set_data(ctx: *mut sys::llama_context, src: *const u8, size: usize) -> Result<usize> {
    let context = CONTEXTS.get(ctx)?;
    let mut state = context.lock();
    // SAFETY: the caller's promise.
    let from = unsafe { slice(src, size, "src") }?;
    read_context(&context, &mut state, from)
}

/// # Safety
/// As [`load_file`].
unsafe fn load(
    ctx: *mut sys::llama_context,
    file: *const c_char,
    tokens_out: *mut sys::llama_token,
    capacity: usize,
    count_out: *mut usize,
) -> Result<bool> {
    let context = CONTEXTS.get(ctx)?;
    let mut state = context.lock();
    let restore = |from: &[u8]| match read_context(&context, &mut state, from)? {
        length if length == from.len() => Ok(()),
        _ => fail!("something follows behind the state's end"),
    };
    // SAFETY: the caller's promise.
    unsafe { load_file(file, tokens_out, capacity, count_out, restore) }?;
    Ok(true)
}

/// # Safety
/// `file` is a C string and `tokens` has `n` elements.
unsafe fn save(
    ctx: *mut sys::llama_context,
    file: *const c_char,
    tokens: *const sys::llama_token,
    n: usize,
) -> Result<bool> {
    let context = CONTEXTS.get(ctx)?;
    let mut state = context.lock();
    let session = session(&mut state)?;
    // SAFETY: the caller's promise.
    let (path, tokens) = unsafe { (path(file)?, slice(tokens, n, "tokens")?) };
    write_file(path, tokens, |to| write_context(session, to))?;
    Ok(true)
}

/// Whether a state is a checkpoint: only what cutting the sequence cannot bring back. The other flag keeps a state on its
/// device, which the caller cannot tell from memory of its own.
fn is_partial(flags: sys::llama_state_seq_flags) -> bool {
    flags & sys::LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY != 0
}

fn seq_bytes(session: &Session, seq: u32, flags: sys::llama_state_seq_flags) -> usize {
    if is_partial(flags) { session.seq_checkpoint_bytes(seq) } else { session.seq_state_bytes(seq) }
}

fn seq_size(
    ctx: *mut sys::llama_context,
    seq_id: sys::llama_seq_id,
    flags: sys::llama_state_seq_flags,
) -> Result<usize> {
    let context = CONTEXTS.get(ctx)?;
    let seq = sequence(seq_id, &context.limits)?;
    let mut state = context.lock();
    Ok(seq_bytes(session(&mut state)?, seq, flags))
}

/// # Safety
/// `dst` has room for `size` bytes.
unsafe fn seq_get(
    ctx: *mut sys::llama_context,
    dst: *mut u8,
    size: usize,
    seq_id: sys::llama_seq_id,
    flags: sys::llama_state_seq_flags,
) -> Result<usize> {
    let context = CONTEXTS.get(ctx)?;
    let seq = sequence(seq_id, &context.limits)?;
    let mut state = context.lock();
    let session = session(&mut state)?;
    let needed = seq_bytes(session, seq, flags);
    if needed > size {
        fail!("the state takes {needed} bytes, there is room for {size}");
    }
    // SAFETY: the caller's promise.
    let mut to = unsafe { slice_mut(dst, needed, "dst") }?;
    if is_partial(flags) {
        session.save_checkpoint(seq, &mut to)?
    } else {
        session.save_seq(seq, &mut to)?
    }
    Ok(needed)
}

fn seq_restore(state: &mut State, seq: u32, from: &[u8]) -> Result<usize> {
    let length = session(state)?.load_seq(seq, from)?;
    after_load(state, Some(seq));
    Ok(length)
}

fn seq_restore_checkpoint(state: &mut State, seq: u32, from: &[u8]) -> Result<usize> {
    let restored = session(state)?.restore_checkpoint(seq, from)?;
    if restored.n_read > 0 {
        // Nothing is known of these tokens' scores.
        state.forget(seq);
        let why = "layers have become lazy since the checkpoint was made";
        log::info("simlayer", &format!("{} tokens were read again: {why}", restored.n_read));
    }
    Ok(restored.n_bytes)
}

/// # Safety
/// `src` points to `size` bytes.
unsafe fn seq_set(
    ctx: *mut sys::llama_context,
    src: *const u8,
    size: usize,
    seq_id: sys::llama_seq_id,
    flags: sys::llama_state_seq_flags,
) -> Result<usize> {
    let context = CONTEXTS.get(ctx)?;
    let seq = sequence(seq_id, &context.limits)?;
    let mut state = context.lock();
    // SAFETY: the caller's promise.
    let from = unsafe { slice(src, size, "src") }?;
    if is_partial(flags) { seq_restore_checkpoint(&mut state, seq, from) } else { seq_restore(&mut state, seq, from) }
}

api! {
    fn llama_state_get_size(ctx: *mut sys::llama_context) -> usize, or 0, {
        get_size(ctx)
    }

    fn llama_get_state_size(ctx: *mut sys::llama_context) -> usize, or 0, {
        get_size(ctx)
    }

    fn llama_state_get_data(ctx: *mut sys::llama_context, dst: *mut u8, size: usize) -> usize, or 0, {
        // SAFETY: a buffer of the caller's.
        unsafe { get_data(ctx, dst, size) }
    }

    fn llama_copy_state_data(ctx: *mut sys::llama_context, dst: *mut u8) -> usize, or 0, {
        // SAFETY: a buffer of the caller's, of at least the size that `llama_get_state_size` has told.
        unsafe { get_data(ctx, dst, get_size(ctx)?) }
    }

    fn llama_state_set_data(ctx: *mut sys::llama_context, src: *const u8, size: usize) -> usize, or 0, {
        // SAFETY: a buffer of the caller's.
        unsafe { set_data(ctx, src, size) }
    }

    fn llama_set_state_data(_ctx: *mut sys::llama_context, _src: *const u8) -> usize, or 0, {
        fail!("a state of unknown length cannot be checked; use llama_state_set_data")
    }

    fn llama_state_load_file(
        ctx: *mut sys::llama_context,
        path: *const c_char,
        tokens_out: *mut sys::llama_token,
        capacity: usize,
        count_out: *mut usize,
    ) -> bool, or false, {
        // SAFETY: a C string and buffers of the caller's.
        unsafe { load(ctx, path, tokens_out, capacity, count_out) }
    }

    fn llama_load_session_file(
        ctx: *mut sys::llama_context,
        path: *const c_char,
        tokens_out: *mut sys::llama_token,
        capacity: usize,
        count_out: *mut usize,
    ) -> bool, or false, {
        // SAFETY: a C string and buffers of the caller's.
        unsafe { load(ctx, path, tokens_out, capacity, count_out) }
    }

    fn llama_state_save_file(
        ctx: *mut sys::llama_context,
        path: *const c_char,
        tokens: *const sys::llama_token,
        n_tokens: usize,
    ) -> bool, or false, {
        // SAFETY: a C string and a buffer of the caller's.
        unsafe { save(ctx, path, tokens, n_tokens) }
    }

    fn llama_save_session_file(
        ctx: *mut sys::llama_context,
        path: *const c_char,
        tokens: *const sys::llama_token,
        n_tokens: usize,
    ) -> bool, or false, {
        // SAFETY: a C string and a buffer of the caller's.
        unsafe { save(ctx, path, tokens, n_tokens) }
    }

    fn llama_state_seq_get_size(ctx: *mut sys::llama_context, seq_id: sys::llama_seq_id) -> usize, or 0, {
        seq_size(ctx, seq_id, sys::LLAMA_STATE_SEQ_FLAGS_NONE)
    }

    fn llama_state_seq_get_data(ctx: *mut sys::llama_context, dst: *mut u8, size: usize, seq_id: sys::llama_seq_id)
    -> usize, or 0, {
        // SAFETY: a buffer of the caller's.
        unsafe { seq_get(ctx, dst, size, seq_id, sys::LLAMA_STATE_SEQ_FLAGS_NONE) }
    }

    fn llama_state_seq_set_data(ctx: *mut sys::llama_context, src: *const u8, size: usize, seq_id: sys::llama_seq_id)
    -> usize, or 0, {
        // SAFETY: a buffer of the caller's.
        unsafe { seq_set(ctx, src, size, seq_id, sys::LLAMA_STATE_SEQ_FLAGS_NONE) }
    }

    fn llama_state_seq_get_size_ext(
        ctx: *mut sys::llama_context,
        seq_id: sys::llama_seq_id,
        flags: sys::llama_state_seq_flags,
    ) -> usize, or 0, {
        seq_size(ctx, seq_id, flags)
    }

    fn llama_state_seq_get_data_ext(
        ctx: *mut sys::llama_context,
        dst: *mut u8,
        size: usize,
        seq_id: sys::llama_seq_id,
        flags: sys::llama_state_seq_flags,
    ) -> usize, or 0, {
        // SAFETY: a buffer of the caller's.
        unsafe { seq_get(ctx, dst, size, seq_id, flags) }
    }

    fn llama_state_seq_set_data_ext(
        ctx: *mut sys::llama_context,
        src: *const u8,
        size: usize,
        seq_id: sys::llama_seq_id,
        flags: sys::llama_state_seq_flags,
    ) -> usize, or 0, {
        // SAFETY: a buffer of the caller's.
        unsafe { seq_set(ctx, src, size, seq_id, flags) }
    }

    fn llama_state_seq_save_file(
        ctx: *mut sys::llama_context,
        file: *const c_char,
        seq_id: sys::llama_seq_id,
        tokens: *const sys::llama_token,
        n_tokens: usize,
    ) -> usize, or 0, {
        let context = CONTEXTS.get(ctx)?;
        let seq = sequence(seq_id, &context.limits)?;
        let mut state = context.lock();
        let session = session(&mut state)?;
        // SAFETY: a C string and a buffer of the caller's.
        let (path, tokens) = unsafe { (path(file)?, slice(tokens, n_tokens, "tokens")?) };
        write_file(path, tokens, |to| session.save_seq(seq, to))
    }

    fn llama_state_seq_load_file(
        ctx: *mut sys::llama_context,
        file: *const c_char,
        dest_seq_id: sys::llama_seq_id,
        tokens_out: *mut sys::llama_token,
        capacity: usize,
        count_out: *mut usize,
    ) -> usize, or 0, {
        let context = CONTEXTS.get(ctx)?;
        let seq = sequence(dest_seq_id, &context.limits)?;
        let mut state = context.lock();
        let restore = |from: &[u8]| match Session::state_length(from)? {
            length if length == from.len() => seq_restore(&mut state, seq, from).map(drop),
            _ => fail!("something follows behind the state's end"),
        };
        // As llama.h says: without a buffer only the number of tokens is told.
        let capacity = if tokens_out.is_null() { 0 } else { capacity };
        // SAFETY: a C string and buffers of the caller's.
        unsafe { load_file(file, tokens_out, capacity, count_out, restore) }
    }
}
