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
    log,
};

static BATCHES: Registry<Mutex<Batch>> = Registry::new("batch");

/// One token of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// `LLAMA_TOKEN_NULL` where a row of an embedding stands in its place.
    pub token: sys::llama_token,
    pub embd: Option<Arc<[f32]>>,
    /// A text's token has the first one only.
    pub pos: Positions,
    pub seqs: BTreeSet<u32>,
    pub output: bool,
}

/// Where an entry stands, in as many dimensions as RoPE has.
pub(crate) type Positions = [sys::llama_pos; MAX_POSITIONS];

/// Positions that a token has at most (M-RoPE).
pub(crate) const MAX_POSITIONS: usize = 4;

/// What a `llama_batch_ext` handle stands for.
struct Batch {
    limits: Limits,
    /// Elements of a row that stands in place of a token, and how many positions it has.
    n_embd_input: usize,
    n_positions: usize,
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
    if batch.token.is_null() && batch.embd.is_null() {
        fail!("the batch has neither tokens nor embeddings");
    }
    let (width, n_positions) = (context.model.n_embd_input(), context.model.n_positions());
    // SAFETY: as the caller promises.
    let optional = |pointer: *const i32, what| unsafe {
        if pointer.is_null() { Ok(None) } else { slice(pointer, n, what).map(Some) }
    };
    // SAFETY: as the caller promises.
    let (tokens, rows, outputs) = unsafe {
        let outputs = if batch.logits.is_null() { None } else { Some(slice(batch.logits, n, "logits")?) };
        // Where there are both, the tokens count: they say no less.
        if batch.token.is_null() {
            (None, Some(slice(batch.embd, n * width, "embd")?), outputs)
        } else {
            (Some(slice(batch.token, n, "token")?), None, outputs)
        }
    };
    let n_positions = if tokens.is_some() { 1 } else { n_positions };
    let positions = match batch.pos.is_null() {
        true => None,
        // SAFETY: embeddings have so many positions each, all first ones before all second ones, as llama.h says.
        false => Some(unsafe { slice(batch.pos, n * n_positions, "pos") }?),
    };
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
            Some(positions) => {
                let mut all = Positions::default();
                let dimensions = positions.iter().skip(i).step_by(n);
                all.iter_mut().zip(dimensions).for_each(|(to, &position)| *to = position);
                all
            }
            None => {
                let first = seqs.first().copied().unwrap_or(0);
                let before = entries.iter().filter(|entry: &&Entry| entry.seqs.contains(&first)).count();
                [i32::try_from(next(first) + before).unwrap_or(i32::MAX), 0, 0, 0]
            }
        };
        let output = match outputs {
            Some(outputs) => outputs[i] != 0,
            None => i + 1 == n,
        };
        let token = tokens.map_or(sys::LLAMA_TOKEN_NULL, |tokens| tokens[i]);
        let embd = rows.map(|rows| Arc::from(&rows[i * width..(i + 1) * width]));
        entries.push(Entry { token, embd, pos, seqs, output: output || all_outputs });
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
    let Batch { limits, entries, .. } = &mut *batch;
    let n = entries.len();
    match usize::try_from(idx).ok().and_then(|idx| entries.get_mut(idx)) {
        Some(entry) => change(entry, limits),
        None => fail!("entry {idx}: the batch has {n}"),
    }
}

/// A row of an embedding, which is copied; `None` where it is not of the model's width.
fn row(embd: &sys::llama_embd, width: usize) -> Result<Option<Arc<[f32]>>> {
    if embd.data.is_null() || embd.n_rows.checked_mul(embd.n_embd) != Some(width) {
        let (rows, size) = (embd.n_rows, embd.n_embd);
        log::error("llama_batch_ext", &format!("{rows} rows of {size} elements given, a row of {width} expected"));
        return Ok(None);
    }
    // SAFETY: `n_rows` rows of `n_embd` elements, as llama.h says.
    Ok(Some(Arc::from(unsafe { slice(embd.data, width, "embd") }?)))
}

fn add(
    batch: *mut sys::llama_batch_ext,
    seq_id: sys::llama_seq_id,
    token: sys::llama_token,
    embd: Option<Arc<[f32]>>,
) -> Result<i32> {
    let batch = BATCHES.get(batch)?;
    let mut batch = lock(&batch);
    if batch.entries.len() >= batch.limits.n_batch {
        return Ok(-1);
    }
    let Ok(seq) = sequence(seq_id, &batch.limits) else { return Ok(-3) };
    batch.entries.push(Entry { token, embd, pos: [-1; MAX_POSITIONS], seqs: BTreeSet::from([seq]), output: false });
    Ok(batch.entries.len() as i32 - 1)
}

api! {
    fn llama_batch_ext_init(ctx: *mut sys::llama_context) -> *mut sys::llama_batch_ext, or ptr::null_mut(), {
        let context = CONTEXTS.get(ctx)?;
        let (limits, model) = (context.limits, &context.model);
        let (n_embd_input, n_positions) = (model.n_embd_input(), model.n_positions());
        Ok(BATCHES.insert(Mutex::new(Batch { limits, n_embd_input, n_positions, entries: Vec::new() })))
    }

    fn llama_batch_ext_free(batch: *mut sys::llama_batch_ext), or (), {
        BATCHES.remove(batch).map(drop)
    }

    fn llama_batch_ext_clear(batch: *mut sys::llama_batch_ext), or (), {
        lock(&BATCHES.get(batch)?).entries.clear();
        Ok(())
    }

    fn llama_batch_ext_add(batch: *mut sys::llama_batch_ext, seq_id: sys::llama_seq_id) -> i32, or -2, {
        add(batch, seq_id, sys::LLAMA_TOKEN_NULL, None)
    }

    fn llama_batch_ext_add_token(batch: *mut sys::llama_batch_ext, seq_id: sys::llama_seq_id, id: sys::llama_token)
    -> i32, or -2, {
        if id == sys::LLAMA_TOKEN_NULL {
            BATCHES.get(batch)?;
            return Ok(-2);
        }
        add(batch, seq_id, id, None)
    }

    fn llama_batch_ext_add_embd(batch: *mut sys::llama_batch_ext, seq: sys::llama_seq_id, embd: sys::llama_embd)
    -> i32, or -2, {
        let width = lock(&BATCHES.get(batch)?).n_embd_input;
        match row(&embd, width)? {
            Some(row) => add(batch, seq, sys::LLAMA_TOKEN_NULL, Some(row)),
            None => Ok(-2),
        }
    }

    fn llama_batch_ext_add_seq(batch: *mut sys::llama_batch_ext, idx: i32, seq_id: sys::llama_seq_id) -> bool,
    or false, {
        change(batch, idx, |entry, limits| {
            entry.seqs.insert(sequence(seq_id, limits)?);
            Ok(true)
        })
    }

    fn llama_batch_ext_set_embd_token(batch: *mut sys::llama_batch_ext, idx: i32, embd: sys::llama_embd) -> bool,
    or false, {
        let width = lock(&BATCHES.get(batch)?).n_embd_input;
        change(batch, idx, |entry, _| {
            if entry.embd.is_some() {
                fail!("entry {idx} has an embedding already");
            }
            entry.embd = row(&embd, width)?;
            Ok(entry.embd.is_some())
        })
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
        let n_positions = lock(&BATCHES.get(batch)?).n_positions;
        change(batch, idx, |entry, _| {
            let n = if entry.token == sys::LLAMA_TOKEN_NULL { n_positions } else { 1 };
            // SAFETY: a token has one position, an embedding as many as the model gives it; the caller points to them.
            let given = unsafe { slice(pos, n, "pos") }?;
            entry.pos[..n].copy_from_slice(given);
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
