//! A step: one batch, and what follows from it.

use std::{sync::Arc, time::Instant};

use simlayer::{BatchEntry, Error, LayerKind, LayerReport, Outputs, SeqId, Token, Vocab, generation::StopText};

use super::{
    super::{
        error::ApiError,
        pace::Piece,
        probs::probs,
        task::{End, Event, Usage},
    },
    Scheduler,
    admission::LEAST_SHARED,
    conversation::{Idle, Look, Running},
};

/// Prompts that are read in one step at most.
const MOST_READ: usize = 4;

/// An answer that has ended, or why there is none.
type Ended = (SeqId, Result<End, ApiError>);

impl Scheduler {
    pub(super) fn step(&mut self) {
        self.hold_back();
        self.step_embedding();
        let plan = self.plan();
        if plan.is_empty() {
            return;
        }
        let start = Instant::now();
        let Scheduler { session, running, logits, .. } = self;
        let entries: Vec<BatchEntry<'_>> = plan.iter().map(|part| part.entry(&running[part.index])).collect();
        let result = session.run(&entries);
        session.swap_logits(logits);
        let read: Vec<Piece> = plan.iter().filter_map(Part::piece).collect();
        match result {
            Ok(()) => {
                self.pace.took(&read, plan.len() - read.len(), start.elapsed());
                self.shared.count(|counts| {
                    counts.prompt_tokens += read.iter().map(|piece| piece.n as u64).sum::<u64>();
                    counts.steps += 1;
                });
                self.go_on(&plan);
            }
            Err(error) => self.fail(&plan, &error),
        }
    }

    /// A token of each answer, and pieces of prompts.
    fn plan(&self) -> Vec<Part> {
        let answers = (0..self.running.len()).filter(|&index| self.running[index].next.is_some());
        let mut plan: Vec<Part> =
            answers.filter(|&index| !self.running[index].is_held).map(|index| Part { index, reads: None }).collect();
        // A look takes as long as a piece of a prompt.
        if !plan.is_empty() && self.looked_at().is_some() {
            return plan;
        }
        let left = |index: usize| {
            let running = &self.running[index];
            running.prompt.len() - self.session.seq_n_past(running.seq).min(running.prompt.len())
        };
        let mut reading: Vec<usize> =
            (0..self.running.len()).filter(|&index| self.running[index].is_reading()).collect();
        // The one who came first, and then who has least to read: a long prompt neither keeps others waiting nor waits for
        // ever.
        if let Some((_, others)) = reading.split_first_mut() {
            others.sort_by_key(|&index| left(index));
        }
        reading.truncate(MOST_READ);
        // Shares are of time: what a token takes differs by the depth.
        let ((least, most), mut seconds) = (self.pace.bounds(plan.len()), self.pace.seconds(plan.len()));
        let (mut read, mut others) = (0, reading.len());
        // Whoever needs less than its share leaves the rest to the others.
        reading.sort_by_key(|&index| left(index));
        for index in reading {
            let (from, left) = (self.session.seq_n_past(self.running[index].seq), left(index));
            let cost = self.pace.cost(from);
            let [at_least, at_most] = [least, most].map(|tokens: usize| tokens.saturating_sub(read) / others);
            let share = ((seconds / others as f64 / cost) as usize).clamp(at_least, at_most).max(1);
            let n = piece(left, share, self.n_queries.min(self.limits.n_ubatch));
            seconds -= n as f64 * cost;
            (read, others) = (read + n, others - 1);
            plan.push(Part { index, reads: Some((from, from + n)) });
        }
        plan
    }

    /// Takes the tokens that follow.
    fn go_on(&mut self, plan: &[Part]) {
        let n_vocab = self.session.model().hparams().n_vocab;
        let logits = std::mem::take(&mut self.logits);
        let mut rows = logits.chunks_exact(n_vocab);
        let mut ended = Vec::new();
        for part in plan {
            let running = &self.running[part.index];
            let is_read = part.reads.is_none_or(|(_, to)| to >= running.prompt.len());
            if !is_read {
                continue;
            }
            let Some(row) = rows.next() else { continue };
            if part.reads.is_some() {
                if self.session.is_looking(running.seq) {
                    let look = Look { since: Instant::now(), logits: row.to_vec() };
                    self.running[part.index].look = Some(look);
                    continue;
                }
                self.prompt_ended(part.index, row, &mut ended);
            }
            self.take_next(part.index, row, &mut ended);
        }
        self.logits = logits;
        self.end(ended);
    }

    /// The conversation whose prompt's end is being looked at: the first one, so that only one look has logits in memory.
    fn looked_at(&self) -> Option<usize> {
        let looks = self.running.iter().enumerate();
        let since = looks.filter_map(|(index, running)| Some((running.look.as_ref()?.since, index)));
        since.min().map(|(_, index)| index)
    }

    /// A step of the look before dropping at a prompt's end; after the last one its answer begins.
    pub(super) fn look(&mut self) {
        let Some(index) = self.looked_at() else { return };
        let seq = self.running[index].seq;
        let answers = self.running.iter().filter(|running| running.next.is_some()).count();
        let n_tokens = self.pace.probe_tokens(answers, self.session.seq_n_past(seq));
        match self.session.look_step(seq, n_tokens) {
            Ok(true) => {}
            Ok(false) => {
                let Some(Look { logits, .. }) = self.running[index].look.take() else { return };
                let mut ended = Vec::new();
                self.prompt_ended(index, &logits, &mut ended);
                self.take_next(index, &logits, &mut ended);
                self.end(ended);
            }
            Err(error) => self.fail(&[Part { index, reads: None }], &error),
        }
    }

    /// Ends answers, or says why there are none.
    fn end(&mut self, ended: Vec<Ended>) {
        for (seq, result) in ended {
            let Some(index) = self.running.iter().position(|running| running.seq == seq) else { continue };
            match result {
                Ok(end) => self.finish(index, end),
                Err(error) => {
                    let running = self.running.remove(index);
                    let _ = running.events.send(Event::Failed(error));
                    self.session.seq_clear(running.seq);
                }
            }
        }
    }

    /// The prompt is read: layers have become lazy, and further answers begin.
    fn prompt_ended(&mut self, index: usize, row: &[f32], ended: &mut Vec<Ended>) {
        let now = Instant::now();
        let until = self.horizon(self.running[index].seq, self.running[index].limit, 0);
        let running = &mut self.running[index];
        running.read = Some(now);
        running.reserved_until = until;
        let others = std::mem::take(&mut running.others);
        let _ = running.events.send(Event::Started);
        for (answer, sampler) in (self.running[index].answer + 1..).zip(others) {
            let seq = self.new_seq();
            let running = &self.running[index];
            let n_past = self.session.seq_n_past(running.seq);
            if let Err(error) = self.session.seq_copy(running.seq, seq, n_past) {
                let _ = running.events.send(Event::Failed(ApiError::internal(error.to_string())));
                return;
            }
            let other = Running {
                client: running.client,
                id: running.id,
                answer,
                is_first: false,
                seq,
                prompt: running.prompt.clone(),
                text: None,
                cached: running.prompt.len(),
                sampler,
                others: Vec::new(),
                limit: running.limit,
                stops: running.stops.clone(),
                stop_text: StopText::new(running.stops.iter().cloned()),
                shown: Arc::clone(&running.shown),
                n_probs: running.n_probs,
                events: running.events.clone(),
                next: None,
                generated: Vec::new(),
                reserved_until: until,
                is_held: false,
                came: running.came,
                begun: running.begun,
                read: Some(now),
                look: None,
            };
            self.running.push(other);
            self.take_next(self.running.len() - 1, row, ended);
        }
    }

    /// Takes the token that follows, and notes the answer where it has ended.
    fn take_next(&mut self, index: usize, row: &[f32], ended: &mut Vec<Ended>) {
        let seq = self.running[index].seq;
        ended.extend(self.sample(index, row).map(|result| (seq, result)));
    }

    /// Takes the token that follows, and tells it. Why the answer has ended, if it has.
    fn sample(&mut self, index: usize, row: &[f32]) -> Option<Result<End, ApiError>> {
        let running = &mut self.running[index];
        if running.limit == Some(0) {
            return Some(Ok(End::Limit));
        }
        let token = match running.sampler.sample(row) {
            Ok(token) => token,
            Err(error) => return Some(Err(error.into())),
        };
        if self.vocab.is_eog(token) {
            return Some(Ok(End::Eos));
        }
        running.generated.push(token);
        self.shared.count(|counts| counts.generated_tokens += 1);
        let probs = running.n_probs.map(|n| probs(row, token, n, &self.vocab));
        let bytes = self.vocab.piece(token, running.shown.contains(&token));
        let (text, stops) = running.stop_text.push(&bytes);
        let event = Event::Token { answer: running.answer, text, token, probs };
        // Whoever has gone is noticed before the next step.
        let _ = running.events.send(event);
        if stops {
            return Some(Ok(End::Stop(stopped_by(running, &self.vocab))));
        }
        if running.limit.is_some_and(|limit| running.generated.len() >= limit) {
            return Some(Ok(End::Limit));
        }
        if self.session.seq_n_past(running.seq) >= self.session.n_ctx() {
            return Some(Ok(End::Context));
        }
        running.next = Some(token);
        None
    }

    /// Ends an answer.
    pub(super) fn finish(&mut self, index: usize, end: End) {
        let mut running = self.running.remove(index);
        let text = if matches!(end, End::Stop(_)) { String::new() } else { running.stop_text.finish() };
        let now = Instant::now();
        let read = running.read.unwrap_or(now);
        let layers = self.session.layers(running.seq);
        let lazy_layers = layers.iter().filter(|layer| layer.lazy).count();
        let attends =
            |layer: &&LayerReport| matches!(layer.kind, LayerKind::Full | LayerKind::Pruned | LayerKind::Window);
        let active_layers = layers.iter().filter(attends).count();
        let usage = Usage {
            prompt_tokens: running.prompt.len(),
            cached_tokens: running.cached,
            generated_tokens: running.generated.len(),
            waited: running.begun - running.came,
            read: read - running.begun,
            generated: now - read,
            kv_bytes: layers.iter().map(|layer| layer.kv_bytes).sum(),
            f16_bytes: self.session.f16_bytes_of(self.session.seq_n_past(running.seq)),
            lazy_layers,
            active_layers,
            seed: running.sampler.seed(),
        };
        self.shared.count(|counts| {
            counts.answers += 1;
            counts.cached_tokens += if running.is_first { running.cached as u64 } else { 0 };
        });
        let _ = running.events.send(Event::Ended { answer: running.answer, text, end, usage: Box::new(usage) });
        self.leave(running);
    }

    /// Nobody waits for this conversation any more; it stays where it is, if it may be of use.
    pub(super) fn leave(&mut self, running: Running) {
        self.session.stop_look(running.seq);
        let n_past = self.session.seq_n_past(running.seq);
        if !running.is_first || n_past < LEAST_SHARED {
            self.session.seq_clear(running.seq);
            return;
        }
        let said = &running.generated[..n_past.saturating_sub(running.prompt.len()).min(running.generated.len())];
        let text = running.text.filter(|_| n_past >= running.prompt.len()).and_then(|prompt| {
            let bytes: Vec<u8> = said.iter().flat_map(|&token| self.vocab.piece(token, true)).collect();
            // Text that ends within a character cannot be gone on from as text.
            String::from_utf8(bytes).ok().map(|said| prompt + &said)
        });
        let bytes = self.bytes(running.seq);
        self.idle.push(Idle { seq: running.seq, text, bytes, used: Instant::now(), is_parked: self.parking.is_none() });
    }

    /// A step that failed: nothing is known of whose fault that was.
    fn fail(&mut self, plan: &[Part], error: &Error) {
        let message = match error {
            Error::Interrupted => ApiError::busy("the server is shutting down"),
            error => ApiError::internal(format!("the model could not be run: {error}")),
        };
        let mut failed: Vec<usize> = plan.iter().map(|part| part.index).collect();
        failed.sort_unstable();
        for index in failed.into_iter().rev() {
            let running = self.running.remove(index);
            let _ = running.events.send(Event::Failed(message.clone()));
            self.session.seq_clear(running.seq);
        }
    }
}

/// A conversation's part in a step: its next token, or these of its prompt's.
#[derive(Debug, Clone, Copy)]
struct Part {
    index: usize,
    reads: Option<(usize, usize)>,
}

impl Part {
    /// What it reads of a prompt.
    fn piece(&self) -> Option<Piece> {
        self.reads.map(|(from, to)| Piece { n: to - from, depth: from })
    }

    fn entry(self, running: &Running) -> BatchEntry<'_> {
        match self.reads {
            None => BatchEntry {
                seq: running.seq,
                tokens: running.next.as_slice(),
                outputs: Outputs::Last,
                prompt_end: false,
            },
            Some((from, to)) => {
                let ends = to >= running.prompt.len();
                let outputs = if ends { Outputs::Last } else { Outputs::None };
                BatchEntry { seq: running.seq, tokens: &running.prompt[from..to], outputs, prompt_end: ends }
            }
        }
    }
}

/// How many of `left` tokens are read at once, about `share`: the last piece has as many as are scored.
fn piece(left: usize, share: usize, n_queries: usize) -> usize {
    if left <= share.max(n_queries) {
        return left;
    }
    let rest = left - share;
    if rest >= n_queries { share } else { left - n_queries.min(left - 1) }
}

/// The text that ended an answer.
fn stopped_by(running: &Running, vocab: &Vocab) -> String {
    let piece = |&token: &Token| vocab.piece(token, running.shown.contains(&token));
    let bytes: Vec<u8> = running.generated.iter().flat_map(piece).collect();
    let text = String::from_utf8_lossy(&bytes);
    let ends = running.stops.iter().filter(|stop| !stop.is_empty());
    let first = ends.filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), stop))).min();
    first.map(|(_, stop)| stop.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// All is read, nothing twice, and the last piece can be scored.
        #[test]
        fn prompts_are_read_in_pieces(n in 1usize..3000, share in 1usize..600, n_queries in 1usize..64) {
            let (mut left, mut last) = (n, 0);
            while left > 0 {
                last = piece(left, share, n_queries);
                prop_assert!((1..=share.max(n_queries)).contains(&last));
                left -= last;
            }
            prop_assert!(last >= n_queries.min(n));
        }
    }
}
