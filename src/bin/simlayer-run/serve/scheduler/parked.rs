//! What goes to the disk and comes back from it.

use std::time::{Duration, Instant};

use simlayer::{SeqId, Token};

use super::{
    super::parking::{Parked, Parking, Stored},
    Scheduler,
    conversation::Idle,
};

/// Conversations that were idle for so long are written to disk.
const PARKED_AFTER: Duration = Duration::from_secs(1);
/// Shorter ones are read again as fast.
const LEAST_PARKED: usize = 64;

impl Scheduler {
    /// Restores a parked conversation that the prompt can go on from, where that is more than `known` tokens and there is
    /// room, as an idle one: the one that has most in common with it, or, where that cannot be cut back so far (a lazy
    /// layer has dropped what that needs), the longest that it begins with.
    pub(super) fn restore(&mut self, prompt: &[Token], until: usize, known: usize) {
        let Some(parking) = self.parking.clone() else { return };
        let (common, whole) = (parking.find_common(prompt), parking.find(prompt));
        let least = whole.as_ref().map_or(known, |whole| whole.n_common.max(known));
        if let Some(common) = common.filter(|common| common.n_common > least)
            && self.restore_one(&parking, &common, prompt, until, least)
        {
            return;
        }
        if let Some(whole) = whole {
            self.restore_one(&parking, &whole, prompt, until, known);
        }
    }

    /// False where it cannot be gone on from after more than `known` tokens.
    fn restore_one(
        &mut self,
        parking: &Parking,
        parked: &Parked,
        prompt: &[Token],
        until: usize,
        known: usize,
    ) -> bool {
        // Of a conversation that goes on otherwise from early on, little could be used.
        let is_worth = parked.n_common >= LEAST_PARKED + known && 2 * parked.n_common >= parked.n_tokens;
        let bytes = usize::try_from(parked.bytes).unwrap_or(usize::MAX / 4);
        let grown = self.session.bytes_of(until).saturating_sub(self.session.bytes_of(parked.n_common));
        if !is_worth || !self.make_room(bytes + grown, None) {
            return false;
        }
        let seq = self.new_seq();
        if let Err(why) = self.load(parking, parked, seq) {
            eprintln!("--kv-disk: {why}; the prompt is read anew");
            return false;
        }
        let most = parked.n_common.min(prompt.len() - 1);
        if !(known + 1..=most).rev().any(|n| self.session.seq_can_truncate(seq, n)) {
            self.session.seq_clear(seq);
            return false;
        }
        let bytes = self.bytes(seq);
        self.idle.push(Idle { seq, text: None, bytes, used: Instant::now(), is_parked: true });
        true
    }

    fn load(&mut self, parking: &Parking, parked: &Parked, seq: SeqId) -> Result<(), String> {
        let state = parking.load(parked).map_err(|error| error.to_string())?;
        self.session.load_seq(seq, &state).map_err(|error| error.to_string())?;
        Ok(())
    }

    /// Writes an idle conversation to disk, if it is not there. Where others wait to be written it stays, unless it `must`
    /// be now.
    pub(super) fn park(&mut self, index: usize, must: bool) {
        let Some(parking) = &self.parking else { return };
        let idle = &mut self.idle[index];
        let tokens = self.session.seq_tokens(idle.seq);
        if idle.is_parked || tokens.len() < LEAST_PARKED {
            return;
        }
        let mut state = Vec::with_capacity(self.session.seq_state_bytes(idle.seq));
        if self.session.save_seq(idle.seq, &mut state).is_err() {
            return;
        }
        let mut stored = parking.store(tokens, state);
        if must && let Stored::Busy(state) = stored {
            parking.flush();
            stored = parking.store(tokens, state);
        }
        idle.is_parked = !matches!(stored, Stored::Busy(_));
    }

    /// Writes one conversation that nobody has gone on with for a while.
    pub(super) fn park_one(&mut self) {
        let Some(parking) = &self.parking else { return };
        parking.notices().iter().for_each(|notice| eprintln!("--kv-disk: {notice}"));
        let waits = |idle: &Idle| !idle.is_parked && idle.used.elapsed() > PARKED_AFTER;
        let Some(index) = self.idle.iter().position(waits) else { return };
        if parking.queued().0 > 0 {
            return;
        }
        self.park(index, false);
        // Nor is one looked at again that is too short, or could not be written.
        self.idle[index].is_parked = true;
    }

    pub(super) fn park_all(&mut self) {
        (0..self.idle.len()).for_each(|index| self.park(index, true));
    }

    /// Bytes of states that wait to be written. One alone, which is being written, does not count: what is evicted next is
    /// written before its memory is needed.
    pub(super) fn queued_bytes(&self) -> usize {
        match self.parking.as_ref().map(|parking| parking.queued()) {
            None | Some((0 | 1, _)) => 0,
            Some((_, bytes)) => bytes,
        }
    }

    /// Waits until nothing waits to be written. False when nothing does.
    pub(super) fn wait_for_disk(&self) -> bool {
        let waiting = self.parking.as_ref().filter(|_| self.queued_bytes() > 0);
        waiting.inspect(|parking| parking.flush()).is_some()
    }
}
