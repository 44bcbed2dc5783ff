//! Who is begun, and where the memory comes from.

use std::time::Instant;

use simlayer::{AddBos, SeqId, Special, generation::StopText, lazy::Policy};

use super::{
    super::{
        error::ApiError,
        task::{End, Event, Task},
    },
    Scheduler,
    conversation::{Running, SharedBeginning, Waiting},
};

/// Tokens of an answer for which there must be memory before it goes on.
const HORIZON: usize = 256;
/// Rows that a copy takes of what it shares when it begins to write.
const ROWS_ANEW: usize = 128;
/// A shared beginning that is shorter is read again.
pub(super) const LEAST_SHARED: usize = 16;

impl Scheduler {
    pub(super) fn admit(&mut self) {
        while let Some(index) = self.next_waiting() {
            let n = self.waiting[index].task.samplers.len();
            if !self.running.is_empty() && self.running.len() + n > self.limits.parallel {
                break;
            }
            let begun = self.begin(index);
            if !begun {
                break;
            }
        }
    }

    /// The one who waits longest of those whose clients are given the fewest answers.
    fn next_waiting(&self) -> Option<usize> {
        let answers = |client: u64| self.running.iter().filter(|running| running.client == client).count();
        (0..self.waiting.len()).min_by_key(|&index| (answers(self.waiting[index].task.client), index))
    }

    /// Begins to answer, or refuses. False when it has to wait for memory.
    fn begin(&mut self, index: usize) -> bool {
        let task = &self.waiting[index].task;
        let (n_ctx, n_answers) = (self.session.n_ctx(), task.samplers.len());
        let horizon = task.limit.unwrap_or(HORIZON).min(HORIZON);
        let until = (task.prompt.len() + horizon).min(n_ctx);
        let n_prompt = task.prompt.len();
        let copies = (n_answers - 1) * self.bytes_of_copy(n_prompt, until);
        let look = self.session.look_bytes_of(n_prompt);
        let alone = self.session.bytes_of(until) + look + copies;
        if alone > self.limits.kv_mem {
            let message = format!(
                "the prompt's cache takes up to {alone} bytes while it is read, all conversations together have {} \
                 (--kv-mem): send less, or start the server with a larger --kv-mem or smaller types (-ctk, -ctv)",
                self.limits.kv_mem
            );
            let error = ApiError::new(axum::http::StatusCode::BAD_REQUEST, "exceed_memory_error", message);
            self.refuse(index, error);
            return true;
        }
        let (mut shared, mut common) = self.shared_beginning(task);
        if self.parking.is_some() {
            let prompt = task.prompt.clone();
            self.restore(&prompt, until, shared.as_ref().map_or(0, |shared| shared.n));
            (shared, common) = self.shared_beginning(&self.waiting[index].task);
        }
        // A copy leaves the other conversation where it is.
        let leaves = shared.as_ref().is_some_and(|shared| {
            let n_past = self.session.seq_n_past(self.idle[shared.idle].seq);
            2 * shared.n < n_past && shared.n >= LEAST_SHARED * 4
        });
        let keep = shared.as_ref().map(|shared| self.idle[shared.idle].seq);
        let known = shared.as_ref().map_or(0, |shared| self.session.bytes_of(shared.n));
        let grown = self.session.bytes_of(until).saturating_sub(known) + look + copies;
        let of_copy = |n| self.bytes_of_copy(n, n);
        let of_copy = shared.as_ref().filter(|_| leaves).map_or(0, |shared| of_copy(shared.n));
        let mut takes = shared.is_some() && !leaves;
        let mut has_room = self.make_room(grown + of_copy, keep);
        if !has_room && leaves {
            takes = true;
            has_room = self.make_room(grown, keep);
        }
        if !has_room && self.running.is_empty() && self.embedding.is_none() {
            // Alone it fits.
            shared = None;
            has_room = self.make_room(alone, None);
        }
        if !has_room {
            return false;
        }
        // Making room may have moved it.
        if let (Some(shared), Some(seq)) = (&mut shared, keep) {
            match self.idle.iter().position(|idle| idle.seq == seq) {
                Some(index) => shared.idle = index,
                None => return false,
            }
        }
        let Some(Waiting { task, came }) = self.waiting.remove(index) else { return true };
        self.shared.waits_no_more();
        let kept = shared.as_ref().map_or(0, |shared| shared.n);
        self.shared.count(|counts| counts.reread_tokens += common.saturating_sub(kept) as u64);
        self.start(task, came, shared, takes, until);
        true
    }

    fn refuse(&mut self, index: usize, error: ApiError) {
        if let Some(waiting) = self.waiting.remove(index) {
            self.shared.waits_no_more();
            let _ = waiting.task.events.send(Event::Failed(error));
        }
    }

    fn start(
        &mut self,
        task: Task,
        came: Instant,
        shared: Option<SharedBeginning>,
        takes: bool,
        reserved_until: usize,
    ) {
        let mut prompt = task.prompt;
        let (seq, cached) = match shared {
            None => (self.new_seq(), 0),
            Some(shared) => {
                if let Some(tokens) = shared.prompt {
                    prompt = tokens;
                }
                self.go_on_from(shared.idle, shared.n, takes)
            }
        };
        let mut samplers = task.samplers.into_iter();
        let Some(sampler) = samplers.next() else { return };
        self.shared.count(|counts| counts.begun += 1);
        self.running.push(Running {
            client: task.client,
            id: task.id,
            answer: task.first_answer,
            is_first: true,
            seq,
            prompt,
            text: task.text,
            cached,
            sampler,
            others: samplers.collect(),
            limit: task.limit,
            stop_text: StopText::new(task.stops.iter().cloned()),
            stops: task.stops,
            shown: task.shown.into(),
            n_probs: task.n_probs,
            events: task.events,
            next: None,
            generated: Vec::new(),
            reserved_until,
            is_held: false,
            came,
            begun: Instant::now(),
            read: None,
            look: None,
        });
    }

    /// The sequence with the first `n` tokens of an idle conversation, and how many it has.
    fn go_on_from(&mut self, idle: usize, n: usize, takes: bool) -> (SeqId, usize) {
        if takes {
            let idle = self.idle.remove(idle);
            if self.session.seq_truncate(idle.seq, n) {
                return (idle.seq, n);
            }
            self.session.seq_clear(idle.seq);
            return (idle.seq, 0);
        }
        let (from, to) = (self.idle[idle].seq, self.new_seq());
        self.idle[idle].used = Instant::now();
        match self.session.seq_copy(from, to, n) {
            Ok(true) => (to, n),
            // It is read, then.
            Ok(false) | Err(_) => (to, 0),
        }
    }

    /// The longest beginning of a prompt that can be gone on from, and how much of it idle conversations began with.
    fn shared_beginning(&self, task: &Task) -> (Option<SharedBeginning>, usize) {
        let mut best: Option<SharedBeginning> = None;
        let mut most_common = 0;
        for (index, idle) in self.idle.iter().enumerate() {
            let known = self.session.seq_tokens(idle.seq);
            let common = known.iter().zip(&task.prompt).take_while(|(a, b)| a == b).count();
            let at_least = best.as_ref().map_or(LEAST_SHARED, |best| best.n + 1);
            // The model may have spelled its answer with other tokens than its text is read as.
            if common < known.len() && known.len() >= at_least {
                let texts = (idle.text.as_ref(), task.text.as_ref());
                if let (Some(said), Some(text)) = texts
                    && let Some(rest) = text.strip_prefix(said.as_str()).filter(|rest| !rest.is_empty())
                    && let Ok(rest) = self.vocab.tokenize(rest, AddBos::No, Special::Parse)
                    && !rest.is_empty()
                    && known.len() + rest.len() <= self.session.n_ctx()
                {
                    let prompt = Some([known, &rest].concat());
                    best = Some(SharedBeginning { idle: index, n: known.len(), prompt });
                    continue;
                }
            }
            // The last token is read in any case: what follows it is asked for.
            let common = common.min(task.prompt.len() - 1);
            most_common = most_common.max(common);
            if common < at_least {
                continue;
            }
            let reached = (at_least..=common).rev().find(|&n| self.session.seq_can_truncate(idle.seq, n));
            if let Some(n) = reached {
                best = Some(SharedBeginning { idle: index, n, prompt: None });
            }
        }
        (best, most_common)
    }

    /// Bytes that are taken or set aside: what the caches take, whoever shares them, and what those that are being answered will
    /// take.
    fn committed(&self) -> usize {
        let running: usize = self.running.iter().map(|running| self.growth(running)).sum();
        let embedding = self.embedding.as_ref().map_or(0, |embedding| {
            let n_past = self.session.seq_n_past(embedding.seq);
            self.session.bytes_of(embedding.tokens.len()).saturating_sub(self.session.bytes_of(n_past))
        });
        // One look goes on at a time.
        let to_be_read = self.running.iter().filter(|running| running.read.is_none());
        let longest = to_be_read.map(|running| running.prompt.len()).max();
        let look = longest.map_or(0, |n| self.session.look_bytes_of(n));
        self.session.kv().allocated_bytes + running + embedding + look
    }

    /// What a conversation will take besides what it has, with its other answers, until it has as many tokens as there is
    /// room for.
    fn growth(&self, running: &Running) -> usize {
        let (n_past, until) = (self.session.seq_n_past(running.seq), running.reserved_until);
        let copies = running.others.len() * self.bytes_of_copy(running.prompt.len(), until);
        self.session.bytes_of(until).saturating_sub(self.session.bytes_of(n_past)) + copies
    }

    /// What a copy of a sequence of `n` tokens takes besides what both share, once it has `until`: what follows, and what is
    /// written anew of lazy layers and of the last block of the others, with room for one more.
    fn bytes_of_copy(&self, n: usize, until: usize) -> usize {
        let lazy = self.session.lazy_params();
        let rings = if lazy.policy == Policy::Off { 0 } else { lazy.n_kept() };
        let grown = self.session.bytes_of(until).saturating_sub(self.session.bytes_of(n));
        grown + self.session.bytes_of(n.min(rings.max(ROWS_ANEW)))
    }

    /// Lets idle conversations go, the least recently used first, until there is room for so many bytes more. The one of
    /// sequence `keep` stays.
    pub(super) fn make_room(&mut self, bytes: usize, keep: Option<SeqId>) -> bool {
        loop {
            let committed = self.committed();
            if committed + bytes + self.queued_bytes() <= self.limits.kv_mem {
                return true;
            }
            if committed + bytes <= self.limits.kv_mem {
                // States that are being written are in the way. Others can go on meanwhile.
                if self.running.is_empty() && self.wait_for_disk() {
                    continue;
                }
                return false;
            }
            let oldest = (0..self.idle.len()).filter(|&index| Some(self.idle[index].seq) != keep);
            let Some(oldest) = oldest.min_by_key(|&index| self.idle[index].used) else { return false };
            // What cannot help is not driven out.
            let all: usize = self.idle.iter().filter(|idle| Some(idle.seq) != keep).map(|idle| idle.bytes).sum();
            if committed.saturating_sub(all) + bytes > self.limits.kv_mem && !self.running.is_empty() {
                return false;
            }
            self.evict(oldest);
        }
    }

    fn evict(&mut self, index: usize) {
        self.park(index, true);
        let idle = self.idle.remove(index);
        self.session.seq_clear(idle.seq);
        self.shared.count(|counts| counts.evicted += 1);
    }

    /// Until how many tokens there is to be memory for an answer that goes on now.
    pub(super) fn horizon(&self, seq: SeqId, limit: Option<usize>, generated: usize) -> usize {
        let ahead = limit.map_or(HORIZON, |limit| limit.saturating_sub(generated).min(HORIZON));
        (self.session.seq_n_past(seq) + ahead).min(self.session.n_ctx())
    }

    /// Holds back the answers for whose next token there is no memory; where that is all of them, the last one ends.
    pub(super) fn hold_back(&mut self) {
        for index in 0..self.running.len() {
            let running = &self.running[index];
            if running.next.is_none() || self.session.seq_n_past(running.seq) < running.reserved_until {
                continue;
            }
            let until = self.horizon(running.seq, running.limit, running.generated.len());
            let n_past = self.session.seq_n_past(running.seq);
            let grown = self.session.bytes_of(until).saturating_sub(self.session.bytes_of(n_past));
            let has_room = self.make_room(grown, None);
            let running = &mut self.running[index];
            running.is_held = !has_room;
            if has_room {
                running.reserved_until = until;
            }
        }
        let all_held = !self.running.is_empty() && self.running.iter().all(|running| running.is_held);
        if all_held
            && !self.wait_for_disk()
            && let Some(last) = (0..self.running.len()).max_by_key(|&index| self.running[index].begun)
        {
            self.finish(last, End::Memory);
        }
    }
}
