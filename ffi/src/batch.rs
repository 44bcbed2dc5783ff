//! Batches: llama.h's plain struct and its newer, opaque one.

use std::{
    alloc::Layout,
    collections::BTreeSet,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ggml_sys as sys;

use crate::{
    border::{Result, slice},
    context::{CONTEXTS, Context, Limits},
    handles::Registry,
};

static BATCHES: Registry<Mutex<Batch>> = Registry::new("batch");

/// One token of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub token: sys::llama_token,
    pub pos: sys::llama_pos,
    pub seqs: BTreeSet<u32>,
    pub output: bool,
}

/// What a `llama_batch_ext` handle stands for.
struct Batch {
    limits: Limits,
    entries: Vec<Entry>,
}

fn lock(batch: &Arc<Mutex<Batch>>) -> MutexGuard<'_, Batch> {
    batch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The entries of a `llama_batch`, with what its null pointers stand for filled in. `next` gives a sequence's next
/// position.
///
/// # Safety
/// The arrays that are not null have `n_tokens` elements, and those of `seq_id` as many as `n_seq_id` says.
pub(crate) unsafe fn entries(
    batch: &sys::llama_batch,
    context: &Context,
    all_outputs: bool,
    next: &mut dyn FnMut(u32) -> usize,
) -> Result<Vec<Entry>> {
    let Some(n) = usize::try_from(batch.n_tokens).ok().filter(|&n| n > 0) else {
        fail!("a batch of {} tokens", batch.n_tokens);
    };
    // Looked at before the arrays are: a length that makes no sense must not be read.
    if n > context.limits.n_batch {
        fail!("a batch of {n} tokens; n_batch is {}", context.limits.n_batch);
    }
    if batch.token.is_null() {
        fail!("the batch has no tokens; input by embeddings is not supported by simlayer");
    }
    // SAFETY: as the caller promises.
    let optional = |pointer: *const i32, what| unsafe {
        if pointer.is_null() { Ok(None) } else { slice(pointer, n, what).map(Some) }
    };
    // SAFETY: as the caller promises.
    let (tokens, outputs) = unsafe {
        let outputs = if batch.logits.is_null() { None } else { Some(slice(batch.logits, n, "logits")?) };
        (slice(batch.token, n, "token")?, outputs)
    };
    let positions = optional(batch.pos, "pos")?;
    let counts = optional(batch.n_seq_id, "n_seq_id")?;
    let mut entries = Vec::with_capacity(n);
    for i in 0..n {
        let seqs = match counts {
            Some(counts) if !batch.seq_id.is_null() => {
                let count = usize::try_from(counts[i]).unwrap_or(usize::MAX);
                if count == 0 || count > context.limits.n_seq_ids() {
                    fail!("token {i} is in {} sequences", counts[i]);
                }
                // SAFETY: as the caller promises.
                let ids = unsafe { slice(*batch.seq_id.add(i), count, "seq_id") }?;
                ids.iter().map(|&id| sequence(id, &context.limits)).collect::<Result<BTreeSet<u32>>>()?
            }
            _ => BTreeSet::from([0]),
        };
        let pos = match positions {
            Some(positions) => positions[i],
            None => {
                let first = seqs.first().copied().unwrap_or(0);
                let before = entries.iter().filter(|entry: &&Entry| entry.seqs.contains(&first)).count();
                i32::try_from(next(first) + before).unwrap_or(i32::MAX)
            }
        };
        let output = match outputs {
            Some(outputs) => outputs[i] != 0,
            None => i + 1 == n,
        };
        entries.push(Entry { token: tokens[i], pos, seqs, output: output || all_outputs });
    }
    Ok(entries)
}

/// A sequence id that is one.
pub(crate) fn sequence(id: sys::llama_seq_id, limits: &Limits) -> Result<u32> {
    match u32::try_from(id) {
        Ok(seq) if (seq as usize) < limits.n_seq_ids() => Ok(seq),
        _ => fail!("sequence {id}: the context has the sequences 0 to {}", limits.n_seq_ids() - 1),
    }
}

/// The entries of a `llama_batch_ext`.
pub(crate) fn ext_entries(batch: *mut sys::llama_batch_ext, all_outputs: bool) -> Result<Vec<Entry>> {
    let batch = BATCHES.get(batch)?;
    let batch = lock(&batch);
    let with_outputs = |entry: &Entry| Entry { output: entry.output || all_outputs, ..entry.clone() };
    Ok(batch.entries.iter().map(with_outputs).collect())
}

/// Changes one entry.
fn change(
    batch: *mut sys::llama_batch_ext,
    idx: i32,
    change: impl FnOnce(&mut Entry, &Limits) -> Result<bool>,
) -> Result<bool> {
    let batch = BATCHES.get(batch)?;
    let mut batch = lock(&batch);
    let Batch { limits, entries } = &mut *batch;
    let n = entries.len();
    match usize::try_from(idx).ok().and_then(|idx| entries.get_mut(idx)) {
        Some(entry) => change(entry, limits),
        None => fail!("entry {idx}: the batch has {n}"),
    }
}

fn add(batch: *mut sys::llama_batch_ext, seq_id: sys::llama_seq_id, token: sys::llama_token) -> Result<i32> {
    let batch = BATCHES.get(batch)?;
    let mut batch = lock(&batch);
    if batch.entries.len() >= batch.limits.n_batch {
        return Ok(-1);
    }
    let Ok(seq) = sequence(seq_id, &batch.limits) else { return Ok(-3) };
    batch.entries.push(Entry { token, pos: -1, seqs: BTreeSet::from([seq]), output: false });
    Ok(batch.entries.len() as i32 - 1)
}

api! {
    fn llama_batch_ext_init(ctx: *mut sys::llama_context) -> *mut sys::llama_batch_ext, or ptr::null_mut(), {
        let limits = CONTEXTS.get(ctx)?.limits;
        Ok(BATCHES.insert(Mutex::new(Batch { limits, entries: Vec::new() })))
    }

    fn llama_batch_ext_free(batch: *mut sys::llama_batch_ext), or (), {
        BATCHES.remove(batch).map(drop)
    }

    fn llama_batch_ext_clear(batch: *mut sys::llama_batch_ext), or (), {
        lock(&BATCHES.get(batch)?).entries.clear();
        Ok(())
    }

    fn llama_batch_ext_add(batch: *mut sys::llama_batch_ext, seq_id: sys::llama_seq_id) -> i32, or -2, {
        add(batch, seq_id, sys::LLAMA_TOKEN_NULL)
    }

    fn llama_batch_ext_add_token(batch: *mut sys::llama_batch_ext, seq_id: sys::llama_seq_id, id: sys::llama_token)
    -> i32, or -2, {
        if id == sys::LLAMA_TOKEN_NULL {
            BATCHES.get(batch)?;
            return Ok(-2);
        }
        add(batch, seq_id, id)
    }

    fn llama_batch_ext_add_embd(batch: *mut sys::llama_batch_ext, _seq: sys::llama_seq_id, _embd: sys::llama_embd)
    -> i32, or -2, {
        BATCHES.get(batch)?;
        fail!("input by embeddings is not supported by simlayer")
    }

    fn llama_batch_ext_add_seq(batch: *mut sys::llama_batch_ext, idx: i32, seq_id: sys::llama_seq_id) -> bool,
    or false, {
        change(batch, idx, |entry, limits| {
            entry.seqs.insert(sequence(seq_id, limits)?);
            Ok(true)
        })
    }

    fn llama_batch_ext_set_embd_token(batch: *mut sys::llama_batch_ext, idx: i32, _embd: sys::llama_embd) -> bool,
    or false, {
        change(batch, idx, |_, _| fail!("input by embeddings is not supported by simlayer"))
    }

    fn llama_batch_ext_set_embd_state(batch: *mut sys::llama_batch_ext, idx: i32, _embd: sys::llama_embd) -> bool,
    or false, {
        change(batch, idx, |_, _| Ok(false))
    }

    fn llama_batch_ext_set_output_embd(batch: *mut sys::llama_batch_ext, idx: i32, value: bool) -> bool, or false, {
        change(batch, idx, |entry, _| {
            entry.output = value;
            Ok(true)
        })
    }

    fn llama_batch_ext_set_output_logits(batch: *mut sys::llama_batch_ext, idx: i32, value: bool) -> bool, or false, {
        change(batch, idx, |entry, _| {
            entry.output = value;
            Ok(true)
        })
    }

    fn llama_batch_ext_set_pos(batch: *mut sys::llama_batch_ext, idx: i32, pos: *const sys::llama_pos) -> bool,
    or false, {
        // SAFETY: text tokens have one position, which the caller points to.
        let pos = unsafe { slice(pos, 1, "pos") }?[0];
        change(batch, idx, |entry, _| {
            entry.pos = pos;
            Ok(true)
        })
    }

    fn llama_batch_get_one(tokens: *mut sys::llama_token, n_tokens: i32) -> sys::llama_batch, or EMPTY, {
        Ok(sys::llama_batch { n_tokens, token: tokens, ..EMPTY })
    }

    fn llama_batch_init(n_tokens: i32, embd: i32, n_seq_max: i32) -> sys::llama_batch, or EMPTY, {
        allocate(n_tokens, embd, n_seq_max)
    }

    fn llama_batch_free(batch: sys::llama_batch), or (), {
        // SAFETY: the arrays of `llama_batch_init`, or null, and not yet freed: C gives no way to tell.
        unsafe { free(&batch) };
        Ok(())
    }
}

const EMPTY: sys::llama_batch = sys::llama_batch {
    n_tokens: 0,
    token: ptr::null_mut(),
    embd: ptr::null_mut(),
    pos: ptr::null_mut(),
    n_seq_id: ptr::null_mut(),
    seq_id: ptr::null_mut(),
    logits: ptr::null_mut(),
};

/// C memory, as frontends may free single arrays themselves.
fn allocate_array<T>(n: usize) -> Result<*mut T> {
    let Ok(layout) = Layout::array::<T>(n.max(1)) else { fail!("{n} elements are too many") };
    // SAFETY: a size that is not zero.
    let memory = unsafe { libc::calloc(1, layout.size()) };
    if memory.is_null() {
        fail!("out of memory: {} bytes for a batch", layout.size());
    }
    Ok(memory.cast())
}

fn allocate(n_tokens: i32, embd: i32, n_seq_max: i32) -> Result<sys::llama_batch> {
    let size = |n: i32, what: &str| match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => fail!("{what} is {n}"),
    };
    let (n, embd, n_seq_max) = (size(n_tokens, "n_tokens")?, size(embd, "embd")?, size(n_seq_max, "n_seq_max")?);
    let mut batch = EMPTY;
    let filled = fill(&mut batch, n, embd, n_seq_max);
    if filled.is_err() {
        // SAFETY: what was allocated so far, the list of sequence arrays with its null at the end.
        unsafe { free(&batch) };
    }
    filled.map(|()| batch)
}

fn fill(batch: &mut sys::llama_batch, n: usize, embd: usize, n_seq_max: usize) -> Result<()> {
    match embd {
        0 => batch.token = allocate_array(n)?,
        width => batch.embd = allocate_array(n.saturating_mul(width))?,
    }
    batch.pos = allocate_array(n)?;
    batch.n_seq_id = allocate_array(n)?;
    batch.logits = allocate_array(n)?;
    // The null behind the last one tells `free` where the list ends.
    batch.seq_id = allocate_array::<*mut sys::llama_seq_id>(n.saturating_add(1))?;
    for i in 0..n {
        let ids = allocate_array(n_seq_max)?;
        // SAFETY: within the list just allocated.
        unsafe { *batch.seq_id.add(i) = ids };
    }
    Ok(())
}

/// # Safety
/// The arrays are null or from `fill`, and were not freed yet.
unsafe fn free(batch: &sys::llama_batch) {
    // SAFETY: as the caller promises; the list of arrays ends with a null.
    unsafe {
        libc::free(batch.token.cast());
        libc::free(batch.embd.cast());
        libc::free(batch.pos.cast());
        libc::free(batch.n_seq_id.cast());
        libc::free(batch.logits.cast());
        if !batch.seq_id.is_null() {
            let mut ids = batch.seq_id;
            while !(*ids).is_null() {
                libc::free((*ids).cast());
                ids = ids.add(1);
            }
            libc::free(batch.seq_id.cast());
        }
    }
}
