//! Running a batch: its tokens are sorted by sequence, checked, and given to the engine in as few calls as possible.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use ggml_sys as sys;
use simlayer::{BatchEntry, Embeddings, Error, Outputs as Wanted, Session, Token};

use crate::{
    batch::{Entry, Positions, entries, ext_entries},
    border::{Failure, Result},
    context::{CONTEXTS, Context, State, session},
    log,
};

/// llama_decode's answers.
const NO_SLOT: i32 = 1;
const ABORTED: i32 = 2;
const INVALID: i32 = -1;
const FAILED: i32 = -3;

/// More pieces of one sequence than this, by which of its tokens have outputs, are run as one with all outputs.
const MAX_RUNS: usize = 8;

/// Neighbouring tokens of one sequence that go to the engine together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    range: Range<usize>,
    wanted: Wanted,
}

/// Cuts a sequence's tokens where they stop or start having outputs, and where rows of embeddings begin or end.
fn runs_of(outputs: &[bool], embd: &[Option<Arc<[f32]>>]) -> Vec<Run> {
    let mut all = Vec::new();
    for part in embd.chunk_by(|a, b| a.is_some() == b.is_some()) {
        let first = all.last().map_or(0, |run: &Run| run.range.end);
        let cut = runs(&outputs[first..first + part.len()]).into_iter();
        all.extend(cut.map(|Run { range, wanted }| Run { range: first + range.start..first + range.end, wanted }));
    }
    all
}

/// Cuts a sequence's tokens where they stop or start having outputs.
fn runs(outputs: &[bool]) -> Vec<Run> {
    let n = outputs.len();
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    for end in 1..=n {
        if end < n && outputs[end] == outputs[start] {
            continue;
        }
        let wanted = if outputs[start] { Wanted::All } else { Wanted::None };
        match runs.last_mut() {
            // A prompt: nothing but the last token's output is wanted.
            Some(before) if wanted == Wanted::All && end - start == 1 && end == n && before.wanted == Wanted::None => {
                *before = Run { range: before.range.start..end, wanted: Wanted::Last };
            }
            _ => runs.push(Run { range: start..end, wanted }),
        }
        start = end;
    }
    if runs.len() > MAX_RUNS { vec![Run { range: 0..n, wanted: Wanted::All }] } else { runs }
}

/// The tokens of a batch that belong to one sequence.
#[derive(Debug, Default)]
struct Lane {
    /// Their numbers in the batch.
    indices: Vec<usize>,
    tokens: Vec<Token>,
    /// What stands in place of each token, if anything does.
    embd: Vec<Option<Arc<[f32]>>>,
    positions: Vec<Positions>,
    /// Where the next token of text stands.
    next: usize,
    /// Whether this lane gives a token's output: a token of several sequences has it from the first of them.
    outputs: Vec<bool>,
    runs: Vec<Run>,
}

impl Lane {
    fn push(&mut self, index: usize, entry: &Entry, output: bool) {
        self.indices.push(index);
        self.tokens.push(entry.token);
        self.embd.push(entry.embd.clone().filter(|_| entry.token == sys::LLAMA_TOKEN_NULL));
        self.positions.push(entry.pos);
        self.outputs.push(output);
    }

    /// Its first `n` tokens as a lane of their own.
    fn take(&mut self, n: usize) -> Lane {
        let mut first = Lane {
            indices: self.indices.drain(..n).collect(),
            tokens: self.tokens.drain(..n).collect(),
            embd: self.embd.drain(..n).collect(),
            positions: self.positions.drain(..n).collect(),
            next: self.next,
            outputs: self.outputs.drain(..n).collect(),
            runs: Vec::new(),
        };
        first.runs = runs_of(&first.outputs, &first.embd);
        first
    }

    /// A run's rows of embeddings and their positions; `None` of a run of tokens.
    fn embeddings(&self, run: &Run, n_positions: usize) -> Option<(Vec<f32>, Vec<i32>)> {
        let rows = self.embd[run.range.clone()].iter().map(Option::as_deref).collect::<Option<Vec<&[f32]>>>()?;
        let positions = &self.positions[run.range.clone()];
        let dimension = |dimension: usize| positions.iter().map(move |positions| positions[dimension]);
        // Where there is one a token it is the next, which was checked.
        let n_given = if n_positions > 1 { n_positions } else { 0 };
        Some((rows.concat(), (0..n_given).flat_map(dimension).collect()))
    }
}

/// Sorts a batch by sequence and checks it against what the sequences hold.
fn lanes(batch: &[Entry], context: &Context, session: &Session) -> Result<BTreeMap<u32, Lane>> {
    if batch.is_empty() {
        fail!("a batch of 0 tokens");
    }
    if batch.len() > context.limits.n_batch {
        fail!("a batch of {} tokens; n_batch is {}", batch.len(), context.limits.n_batch);
    }
    let n_vocab = context.model.n_vocab();
    let mut lanes: BTreeMap<u32, Lane> = BTreeMap::new();
    for (index, entry) in batch.iter().enumerate() {
        let is_row = entry.token == sys::LLAMA_TOKEN_NULL && entry.embd.is_some();
        if !is_row && usize::try_from(entry.token).map_or(true, |id| id >= n_vocab) {
            fail!("token {index} is {}, the vocabulary has {n_vocab}", entry.token);
        }
        for (nth, &seq) in entry.seqs.iter().enumerate() {
            let new = || Lane { next: session.seq_next_position(seq), ..Lane::default() };
            let lane = lanes.entry(seq).or_insert_with(new);
            let expected = lane.next;
            // Pictures' rows share positions; the engine looks at them.
            let is_apart = is_row && context.model.n_positions() > 1;
            match usize::try_from(entry.pos[0]) {
                Ok(position) if position == expected || is_apart => {}
                _ => fail!(
                    "token {index} is at position {} of sequence {seq}, which goes on at {expected}",
                    entry.pos[0]
                ),
            }
            lane.next = match is_apart {
                true => entry
                    .pos
                    .iter()
                    .filter_map(|&at| usize::try_from(at).ok())
                    .fold(expected, |next, at| next.max(at + 1)),
                false => expected + 1,
            };
            lane.push(index, entry, entry.output && nth == 0);
        }
    }
    Ok(lanes)
}

/// Whether the context has room for the batch.
fn has_room(batch: &[Entry], lanes: &BTreeMap<u32, Lane>, context: &Context, state: &State, session: &Session) -> bool {
    let limits = &context.limits;
    if lanes.iter().any(|(&seq, lane)| session.seq_n_past(seq) + lane.tokens.len() > limits.n_ctx_seq) {
        return false;
    }
    if !limits.kv_unified {
        return true;
    }
    // One cache for all: tokens that sequences share are counted once.
    let held = |seq: u32| {
        let n_past = session.seq_n_past(seq);
        n_past - state.shared.get(&seq).copied().unwrap_or(0).min(n_past)
    };
    session.seq_ids().into_iter().map(held).sum::<usize>() + batch.len() <= limits.n_ctx
}

/// Runs a batch; the answer is llama_decode's.
fn decode(context: &Context, state: &mut State, batch: &[Entry]) -> Result<i32> {
    let Some(mut session) = state.session.take() else {
        fail!("the model was loaded without its weights");
    };
    // SAFETY: reads a clock.
    let start = unsafe { sys::ggml_time_us() };
    let done = run(context, state, &mut session, batch);
    // SAFETY: reads a clock.
    state.perf.add(batch.len(), unsafe { sys::ggml_time_us() } - start);
    state.session = Some(session);
    match done {
        Ok(code) => Ok(code),
        Err(RunError::Batch(why)) => {
            log::error("llama_decode", &format!("invalid batch: {}", why.0));
            Ok(INVALID)
        }
        Err(RunError::Engine(error)) => {
            state.outputs.clear();
            log::error("llama_decode", &error.to_string());
            Ok(match error {
                Error::Interrupted => ABORTED,
                Error::ContextFull { .. } => NO_SLOT,
                Error::Embeddings(_) => INVALID,
                _ => FAILED,
            })
        }
    }
}

enum RunError {
    Batch(Failure),
    Engine(Error),
}

impl From<Error> for RunError {
    fn from(error: Error) -> RunError {
        RunError::Engine(error)
    }
}

fn run(
    context: &Context,
    state: &mut State,
    session: &mut Session,
    batch: &[Entry],
) -> std::result::Result<i32, RunError> {
    let mut lanes = lanes(batch, context, session).map_err(RunError::Batch)?;
    if !has_room(batch, &lanes, context, state, session) {
        let limits = &context.limits;
        log::warn("llama_decode", &format!("no room for {} tokens: {limits:?}", batch.len()));
        return Ok(NO_SLOT);
    }
    let outputs = &mut state.outputs;
    outputs.clear();
    for entry in batch {
        outputs.rows.push(if entry.output { outputs.n_rows as i32 } else { -1 });
        outputs.n_rows += usize::from(entry.output);
    }
    attach_threads(state, session, batch.len());

    if !state.causal && lanes.values().any(|lane| lane.embd.iter().any(Option::is_none)) {
        let why =
            "tokens that see those behind them (llama_set_causal_attn) are supported of embeddings only".to_owned();
        return Err(RunError::Batch(Failure(why)));
    }
    share_prefixes(context, batch, &mut lanes, state, session)?;
    for lane in lanes.values_mut() {
        lane.runs = runs_of(&lane.outputs, &lane.embd);
    }
    run_lanes(context, state, session, &lanes)?;
    pool(context, state, batch);
    Ok(0)
}

/// Runs the lanes' runs: the first ones of all of them together, then the second ones.
fn run_lanes(
    context: &Context,
    state: &mut State,
    session: &mut Session,
    lanes: &BTreeMap<u32, Lane>,
) -> std::result::Result<(), RunError> {
    let rounds = lanes.values().map(|lane| lane.runs.len()).max().unwrap_or(0);
    for round in 0..rounds {
        let mut entries = Vec::new();
        let mut targets = Vec::new();
        for (&seq, lane) in lanes {
            let Some(run) = lane.runs.get(round) else { continue };
            let ends = round + 1 == lane.runs.len() && lane.outputs.last() == Some(&true);
            let prompt_end = ends && is_prompt_end(state, seq, lane.tokens.len());
            if lane.embd[run.range.start].is_some() {
                run_rows(context, state, session, (seq, lane, run), prompt_end)?;
                continue;
            }
            let tokens = &lane.tokens[run.range.clone()];
            entries.push(BatchEntry { seq, tokens, outputs: run.wanted, prompt_end });
            targets.extend(rows_of(run, lane, &state.outputs.rows));
        }
        if !entries.is_empty() {
            session.run(&entries)?;
            collect(session, state, &targets);
        }
    }
    Ok(())
}

/// Runs rows of embeddings of one sequence.
fn run_rows(
    context: &Context,
    state: &mut State,
    session: &mut Session,
    (seq, lane, run): (u32, &Lane, &Run),
    prompt_end: bool,
) -> std::result::Result<(), RunError> {
    let Some((rows, positions)) = lane.embeddings(run, context.model.n_positions()) else { return Ok(()) };
    let embeddings = Embeddings { rows: &rows, positions: &positions, see_each_other: !state.causal };
    session.run_embeddings(seq, &embeddings, run.wanted, prompt_end)?;
    let targets: Vec<i32> = rows_of(run, lane, &state.outputs.rows).collect();
    collect(session, state, &targets);
    Ok(())
}

/// The output rows that a run's logits go to, -1 for those that nobody wants.
fn rows_of<'a>(run: &Run, lane: &'a Lane, rows: &'a [i32]) -> impl Iterator<Item = i32> + 'a {
    let with_logits = match run.wanted {
        Wanted::None => run.range.end..run.range.end,
        Wanted::Last => run.range.end - 1..run.range.end,
        Wanted::All => run.range.clone(),
    };
    with_logits.map(|i| if lane.outputs[i] { rows[lane.indices[i]] } else { -1 })
}

/// Whether a prompt ends here. llama.h does not say; logits of the last of several tokens do, or of one token of a
/// sequence whose layers were never scored.
fn is_prompt_end(state: &mut State, seq: u32, n_tokens: usize) -> bool {
    let asked = state.score_next.iter().position(|&other| other == seq).map(|at| state.score_next.swap_remove(at));
    let scored = state.scored.entry(seq).or_default();
    let ends = n_tokens > 1 || !*scored || asked.is_some();
    *scored |= ends;
    ends
}

/// A prompt that several empty sequences begin with is computed once and copied.
fn share_prefixes(
    context: &Context,
    batch: &[Entry],
    lanes: &mut BTreeMap<u32, Lane>,
    state: &mut State,
    session: &mut Session,
) -> std::result::Result<(), RunError> {
    let leaders: Vec<u32> = lanes.keys().copied().collect();
    for leader in leaders {
        let Some(&first) = lanes[&leader].indices.first() else { continue };
        let seqs = &batch[first].seqs;
        let all_begin_here = |seq: &u32| session.seq_n_past(*seq) == 0 && lanes[seq].indices.first() == Some(&first);
        if seqs.len() < 2 || seqs.first() != Some(&leader) || !seqs.iter().all(all_begin_here) {
            continue;
        }
        let lane = &lanes[&leader];
        let n = lane.indices.iter().take_while(|&&index| batch[index].seqs == *seqs).count();
        let Some(own) = lanes.get_mut(&leader).map(|lane| lane.take(n)) else { continue };
        run_lanes(context, state, session, &BTreeMap::from([(leader, own)]))?;
        for &seq in seqs {
            if seq != leader {
                session.seq_copy(leader, seq, n)?;
                state.shared.insert(seq, n);
                let scored = state.scored.get(&leader).copied().unwrap_or(false);
                state.scored.insert(seq, scored);
            }
            if let Some(lane) = lanes.get_mut(&seq).filter(|_| seq != leader) {
                lane.take(n);
            }
        }
    }
    lanes.retain(|_, lane| !lane.tokens.is_empty());
    Ok(())
}

/// Moves what the engine computed to the batch's rows.
fn collect(session: &mut Session, state: &mut State, targets: &[i32]) {
    let outputs = &mut state.outputs;
    let n_rows = outputs.n_rows;
    if targets.is_empty() {
        return;
    }
    let in_order = targets.len() == n_rows && targets.iter().zip(0..).all(|(&target, row)| target == row);
    if in_order {
        session.swap_logits(&mut outputs.logits);
    } else {
        scatter(session.logits(), targets, n_rows, &mut outputs.logits);
    }
    scatter(session.embeddings(), targets, n_rows, &mut outputs.embeddings);
}

fn scatter(from: &[f32], targets: &[i32], n_rows: usize, to: &mut Vec<f32>) {
    let width = from.len() / targets.len();
    if width == 0 {
        return;
    }
    to.resize(n_rows * width, 0.0);
    for (row, &target) in from.chunks_exact(width).zip(targets) {
        if let Ok(target) = usize::try_from(target) {
            to[target * width..][..width].copy_from_slice(row);
        }
    }
}

/// One embedding for each sequence of the batch, where the context asks for that.
fn pool(context: &Context, state: &mut State, batch: &[Entry]) {
    if !state.embeddings || context.pooling == sys::LLAMA_POOLING_TYPE_NONE {
        return;
    }
    let outputs = &mut state.outputs;
    let width = outputs.embeddings.len() / outputs.n_rows.max(1);
    let mut rows: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (entry, &row) in batch.iter().zip(&outputs.rows) {
        for &seq in &entry.seqs {
            rows.entry(seq).or_default().extend(usize::try_from(row).ok());
        }
    }
    for (seq, rows) in rows {
        let row = |row: usize| outputs.embeddings[row * width..][..width].to_vec();
        let (Some(&first), Some(&last)) = (rows.first(), rows.last()) else { continue };
        let pooled = match context.pooling {
            sys::LLAMA_POOLING_TYPE_CLS => row(first),
            sys::LLAMA_POOLING_TYPE_LAST => row(last),
            _ => {
                let mut mean = vec![0.0; width];
                for &index in &rows {
                    mean.iter_mut().zip(row(index)).for_each(|(sum, value)| *sum += value / rows.len() as f32);
                }
                mean
            }
        };
        outputs.pooled.insert(seq, pooled);
    }
    // As upstream: with pooling there are no embeddings of single tokens.
    outputs.embeddings.clear();
}

fn attach_threads(state: &State, session: &mut Session, n_tokens: usize) {
    let pool = if n_tokens > 1 { state.pools.batch } else { state.pools.one };
    // SAFETY: the frontend keeps its thread pools alive until it detaches them.
    unsafe { session.scheduler().attach_threadpool(pool) };
}

api! {
    fn llama_decode(ctx: *mut sys::llama_context, batch: sys::llama_batch) -> i32, or INVALID, {
        let context = CONTEXTS.get(ctx)?;
        let mut state = context.lock();
        let all = state.embeddings;
        let held = session(&mut state)?;
        // SAFETY: the frontend's arrays, as llama.h describes them.
        let batch = unsafe { entries(&batch, &context, all, &mut |seq| held.seq_next_position(seq)) }?;
        decode(&context, &mut state, &batch)
    }

    fn llama_encode(ctx: *mut sys::llama_context, _batch: sys::llama_batch) -> i32, or INVALID, {
        CONTEXTS.get(ctx)?;
        fail!("the model has no encoder; use llama_decode")
    }

    fn llama_process(ctx: *mut sys::llama_context, kind: sys::llama_process_type, batch: *mut sys::llama_batch_ext)
    -> i32, or INVALID, {
        let context = CONTEXTS.get(ctx)?;
        if kind != sys::LLAMA_PROCESS_TYPE_DECODE {
            fail!("the model has no encoder; use LLAMA_PROCESS_TYPE_DECODE");
        }
        let mut state = context.lock();
        let batch = ext_entries(batch, state.embeddings)?;
        decode(&context, &mut state, &batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(outputs: &[u8]) -> Vec<(Range<usize>, Wanted)> {
        let outputs: Vec<bool> = outputs.iter().map(|&output| output != 0).collect();
        runs(&outputs).into_iter().map(|run| (run.range, run.wanted)).collect()
    }

    #[test]
    fn tokens_are_cut_where_outputs_begin_and_end() {
        assert_eq!(cut(&[1]), [(0..1, Wanted::All)]);
        assert_eq!(cut(&[0, 0]), [(0..2, Wanted::None)]);
        assert_eq!(cut(&[0, 0, 1]), [(0..3, Wanted::Last)]);
        assert_eq!(cut(&[1, 1, 1]), [(0..3, Wanted::All)]);
        assert_eq!(cut(&[0, 0, 1, 1]), [(0..2, Wanted::None), (2..4, Wanted::All)]);
        assert_eq!(cut(&[1, 0, 1]), [(0..1, Wanted::All), (1..3, Wanted::Last)]);
        let alternating: Vec<u8> = (0..40).map(|i| i % 2).collect();
        assert_eq!(cut(&alternating), [(0..40, Wanted::All)]);
    }

    #[test]
    fn rows_go_where_they_belong() {
        let mut to = Vec::new();
        scatter(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1, -1, 0], 2, &mut to);
        assert_eq!(to, [5.0, 6.0, 1.0, 2.0]);
    }
}
