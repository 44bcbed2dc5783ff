//! llama_memory_*: what sequences hold, and editing it as far as it can be edited.

use ggml_sys as sys;
use simlayer::Session;

use crate::{
    batch::sequence,
    border::Result,
    context::{CONTEXTS, Context, State, session},
};

/// A memory handle is its context's.
fn context(memory: sys::llama_memory_t) -> Result<std::sync::Arc<Context>> {
    CONTEXTS.get(memory)
}

/// The tokens of a sequence at positions `p0..p1`; negative ones stand for its beginning and end.
fn tokens_at(session: &Session, seq: u32, p0: sys::llama_pos, p1: sys::llama_pos) -> std::ops::Range<usize> {
    let positions = range(p0, p1, session.seq_next_position(seq));
    let n_past = session.seq_n_past(seq);
    let number = |position: usize| match position == session.seq_next_position(seq) {
        true => n_past,
        false => session.seq_tokens_before(seq, position),
    };
    number(positions.start)..number(positions.end)
}

/// Positions `p0..p1` of `n_past`; negative ones stand for the beginning and the end.
fn range(p0: sys::llama_pos, p1: sys::llama_pos, n_past: usize) -> std::ops::Range<usize> {
    let first = usize::try_from(p0).unwrap_or(0).min(n_past);
    let end = usize::try_from(p1).unwrap_or(n_past).min(n_past);
    first..end.max(first)
}

impl State {
    /// What is kept beside the engine's sequences goes with them.
    pub fn forget(&mut self, seq: u32) {
        self.scored.remove(&seq);
        self.shared.remove(&seq);
        self.score_next.retain(|&other| other != seq);
    }

    fn forget_all(&mut self) {
        self.scored.clear();
        self.shared.clear();
        self.score_next.clear();
    }
}

/// Removes positions of one sequence. False, with nothing changed, where that cannot be done: in the middle, or where a
/// lazy layer has dropped what would be the end.
fn remove(state: &mut State, seq: u32, p0: sys::llama_pos, p1: sys::llama_pos) -> Result<bool> {
    let session = session(state)?;
    let n_past = session.seq_n_past(seq);
    let range = tokens_at(session, seq, p0, p1);
    if range.is_empty() {
        return Ok(true);
    }
    let removed = range.end == n_past && session.seq_truncate(seq, range.start);
    if removed && range.start == 0 {
        session.release_memory();
        state.forget(seq);
    }
    Ok(removed)
}

fn can_remove(session: &Session, seq: u32, p0: sys::llama_pos, p1: sys::llama_pos) -> bool {
    let n_past = session.seq_n_past(seq);
    let range = tokens_at(session, seq, p0, p1);
    range.is_empty() || (range.end == n_past && session.seq_can_truncate(seq, range.start))
}

/// The answer of a function that moves positions.
fn cannot_shift() -> Result<()> {
    fail!("positions cannot be moved (llama_memory_can_shift is false); nothing was changed")
}

api! {
    fn llama_memory_clear(mem: sys::llama_memory_t, _data: bool), or (), {
        let context = context(mem)?;
        let mut state = context.lock();
        // A context without weights has nothing to clear.
        if let Some(session) = &mut state.session {
            session.clear();
        }
        state.forget_all();
        Ok(())
    }

    fn llama_memory_seq_rm(mem: sys::llama_memory_t, seq_id: sys::llama_seq_id, p0: sys::llama_pos, p1: sys::llama_pos)
    -> bool, or false, {
        let context = context(mem)?;
        let mut state = context.lock();
        if seq_id >= 0 {
            let seq = sequence(seq_id, &context.limits)?;
            return remove(&mut state, seq, p0, p1);
        }
        // All sequences, or none.
        let session = session(&mut state)?;
        let seqs = session.seq_ids();
        if !seqs.iter().all(|&seq| can_remove(session, seq, p0, p1)) {
            return Ok(false);
        }
        for seq in seqs {
            remove(&mut state, seq, p0, p1)?;
        }
        Ok(true)
    }

    fn llama_memory_seq_cp(
        mem: sys::llama_memory_t,
        seq_id_src: sys::llama_seq_id,
        seq_id_dst: sys::llama_seq_id,
        p0: sys::llama_pos,
        p1: sys::llama_pos,
    ), or (), {
        let context = context(mem)?;
        let mut state = context.lock();
        let (from, to) = (sequence(seq_id_src, &context.limits)?, sequence(seq_id_dst, &context.limits)?);
        let session = session(&mut state)?;
        let range = tokens_at(session, from, p0, p1);
        if from == to || range.is_empty() {
            return Ok(());
        }
        if range.start > 0 {
            fail!("sequence {from} can be copied from its beginning only, not from position {}", range.start);
        }
        if !session.seq_copy(from, to, range.end)? {
            fail!("a lazy layer of sequence {from} has dropped what its first {} tokens need", range.end);
        }
        state.forget(to);
        state.shared.insert(to, range.end);
        let scored = state.scored.get(&from).copied().unwrap_or(false);
        state.scored.insert(to, scored);
        Ok(())
    }

    fn llama_memory_seq_keep(mem: sys::llama_memory_t, seq_id: sys::llama_seq_id), or (), {
        let context = context(mem)?;
        let mut state = context.lock();
        let seq = sequence(seq_id, &context.limits)?;
        session(&mut state)?.seq_keep(seq);
        let scored = state.scored.get(&seq).copied();
        state.forget_all();
        state.scored.extend(scored.map(|scored| (seq, scored)));
        Ok(())
    }

    fn llama_memory_seq_add(
        mem: sys::llama_memory_t,
        seq_id: sys::llama_seq_id,
        p0: sys::llama_pos,
        p1: sys::llama_pos,
        delta: sys::llama_pos,
    ), or (), {
        let context = context(mem)?;
        let seq = sequence(seq_id, &context.limits)?;
        let n_past = session(&mut context.lock())?.seq_n_past(seq);
        if delta == 0 || range(p0, p1, n_past).is_empty() { Ok(()) } else { cannot_shift() }
    }

    fn llama_memory_seq_div(
        mem: sys::llama_memory_t,
        seq_id: sys::llama_seq_id,
        p0: sys::llama_pos,
        p1: sys::llama_pos,
        d: i32,
    ), or (), {
        let context = context(mem)?;
        let seq = sequence(seq_id, &context.limits)?;
        let n_past = session(&mut context.lock())?.seq_n_past(seq);
        if d == 1 || range(p0, p1, n_past).is_empty() { Ok(()) } else { cannot_shift() }
    }

    // llama-server goes on from a position that is above this one by more than `llama_model_n_swa`, and never asks
    // whether `seq_rm` could do that.
    fn llama_memory_seq_pos_min(mem: sys::llama_memory_t, seq_id: sys::llama_seq_id) -> sys::llama_pos, or -1, {
        let context = context(mem)?;
        let seq = sequence(seq_id, &context.limits)?;
        let state = context.lock();
        let Some(session) = state.session.as_ref().filter(|session| session.seq_n_past(seq) > 0) else {
            return Ok(-1);
        };
        let reported = if context.swa_full { 0 } else { context.model.n_swa() };
        // What is there now can always be gone on from, though it may be all.
        let least = session.seq_resumable(seq).min(session.seq_n_past(seq) - 1);
        Ok(session.seq_position(seq, least).saturating_sub(reported) as i32)
    }

    fn llama_memory_seq_pos_max(mem: sys::llama_memory_t, seq_id: sys::llama_seq_id) -> sys::llama_pos, or -1, {
        let context = context(mem)?;
        let seq = sequence(seq_id, &context.limits)?;
        let state = context.lock();
        let last = |session: &Session| Some(session.seq_position(seq, *session.seq_held(seq)?.end()) as i32);
        Ok(state.session.as_ref().and_then(last).unwrap_or(-1))
    }

    fn llama_memory_can_shift(mem: sys::llama_memory_t) -> bool, or false, {
        context(mem)?;
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::range;

    #[test]
    fn negative_positions_are_the_ends() {
        assert_eq!(range(-1, -1, 10), 0..10);
        assert_eq!(range(3, -1, 10), 3..10);
        assert_eq!(range(-1, 4, 10), 0..4);
        assert_eq!(range(5, 100, 10), 5..10);
        assert_eq!(range(12, -1, 10), 10..10);
        assert_eq!(range(7, 3, 10), 7..7);
        assert_eq!(range(i32::MIN, i32::MAX, 0), 0..0);
    }
}
