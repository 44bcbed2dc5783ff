//! The thread that owns the session. Each of its steps is one batch: a token of every conversation that is being answered,
//! and pieces of the prompts that are being read, so large that nobody waits for long.
//!
//! A conversation takes the memory that its cache takes. One is begun when what it needs until its prompt is read is free,
//! with some tokens of its answer; conversations that nobody is answered in stay until that memory is needed, the least
//! recently used going first, and a prompt that begins like one of them goes on from there.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use simlayer::generation::StopText;
use simlayer::{
    AddBos, BatchEntry, Error, LayerKind, LayerReport, Model, Outputs, Sampler, SeqId, Session, Special, Token, Vocab,
};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use super::{
    error::ApiError,
    pace::Pace,
    parking::{Parked, Parking, Stored},
    probs::probs,
    status::{Shared, Slot, Status},
    task::{End, Event, Order, Task, Usage},
};

/// Tokens of an answer for which there must be memory before it goes on.
const HORIZON: usize = 256;
/// Prompts that are read in one step at most.
const MOST_READ: usize = 4;
/// A shared beginning that is shorter is read again.
const LEAST_SHARED: usize = 16;
/// How long answers may take once the server is to stop.
const FAREWELL: Duration = Duration::from_secs(10);

/// Conversations that were idle for so long are written to disk.
const PARKED_AFTER: Duration = Duration::from_secs(3);
/// Shorter ones are read again as fast.
const LEAST_PARKED: usize = 64;

/// What the scheduler keeps to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of all caches together.
    pub kv_mem: usize,
    /// Answers at the same time.
    pub parallel: usize,
    /// Tasks that may wait.
    pub queue: usize,
    pub n_ubatch: usize,
}

/// The scheduler, as the API sees it.
#[derive(Debug)]
pub struct Engine {
    orders: Sender<Order>,
    pub shared: Arc<Shared>,
    pub limits: Limits,
    pub n_ctx: usize,
}

impl Engine {
    /// Starts the thread. It ends when the flag `stop` is set and everybody is answered, or when nobody can order any more.
    pub fn start(
        session: Session,
        limits: Limits,
        parking: Option<Arc<Parking>>,
        stop: Arc<AtomicBool>,
    ) -> std::io::Result<(Engine, JoinHandle<()>)> {
        let (orders, receiver) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let n_ctx = session.n_ctx();
        let model: Model = session.model().clone();
        let mut scheduler = Scheduler {
            vocab: model.vocab().clone(),
            n_queries: session.lazy_params().n_queries,
            session,
            limits,
            parking,
            orders: receiver,
            shared: Arc::clone(&shared),
            waiting: VecDeque::new(),
            running: Vec::new(),
            idle: Vec::new(),
            embedding: None,
            next_seq: 0,
            pace: Pace::new(limits.n_ubatch),
            logits: Vec::new(),
        };
        let thread = thread::Builder::new().name("scheduler".to_owned()).spawn(move || scheduler.run(&stop))?;
        Ok((Engine { orders, shared, limits, n_ctx }, thread))
    }

    /// Hands a task over.
    ///
    /// # Errors
    /// When as many wait as may, or its prompt can never be read here.
    pub fn submit(&self, order: Order) -> Result<(), ApiError> {
        let (n_tokens, n_answers) = match &order {
            Order::Generate(task) => (task.prompt.len(), task.samplers.len()),
            Order::Embed { tokens, .. } => (tokens.len(), 1),
        };
        if n_tokens == 0 {
            return Err(ApiError::bad("the prompt is empty"));
        }
        if n_tokens > self.n_ctx {
            return Err(ApiError::context(n_tokens, self.n_ctx));
        }
        if n_answers > self.limits.parallel {
            let most = self.limits.parallel;
            return Err(ApiError::param(
                "n",
                format!("{n_answers} answers: at most {most} are given at once (--parallel)"),
            ));
        }
        if !self.shared.wait(self.limits.queue) {
            let message = format!("{} requests wait already (--queue): try again later", self.limits.queue);
            return Err(ApiError::busy(message));
        }
        self.orders.send(order).map_err(|_| ApiError::busy("the server is shutting down"))
    }
}

/// A conversation that is being answered.
#[derive(Debug)]
struct Running {
    client: u64,
    id: u64,
    answer: usize,
    /// Whether the prompt was read for it.
    is_first: bool,
    seq: SeqId,
    prompt: Vec<Token>,
    text: Option<String>,
    cached: usize,
    sampler: Sampler,
    /// Those of further answers to the same prompt, until it is read.
    others: Vec<Sampler>,
    limit: Option<usize>,
    stops: Vec<String>,
    stop_text: StopText,
    shown: Arc<[Token]>,
    n_probs: Option<usize>,
    events: UnboundedSender<Event>,
    /// The token to be read next; `None` while the prompt is being read.
    next: Option<Token>,
    generated: Vec<Token>,
    /// Bytes that are set aside for it, which suffice until it has as many tokens.
    reserved: usize,
    reserved_until: usize,
    /// Waits for memory.
    is_held: bool,
    came: Instant,
    begun: Instant,
    read: Option<Instant>,
}

impl Running {
    fn is_reading(&self) -> bool {
        self.next.is_none()
    }
}

/// A conversation that nobody is answered in.
#[derive(Debug)]
struct Idle {
    seq: SeqId,
    /// What its tokens stand for, where that is known.
    text: Option<String>,
    bytes: usize,
    used: Instant,
    /// It is on disk, or is not to be.
    is_parked: bool,
}

/// A text whose last hidden state is wanted.
#[derive(Debug)]
struct Embedding {
    seq: SeqId,
    tokens: Vec<Token>,
    bytes: usize,
    reply: oneshot::Sender<Result<Vec<f32>, ApiError>>,
}

/// What a prompt can go on from.
#[derive(Debug)]
struct SharedBeginning {
    idle: usize,
    n: usize,
    /// The prompt's tokens, where they are not those of its text read anew.
    prompt: Option<Vec<Token>>,
}

#[derive(Debug)]
struct Waiting {
    task: Task,
    came: Instant,
}

struct Scheduler {
    session: Session,
    vocab: Vocab,
    n_queries: usize,
    limits: Limits,
    parking: Option<Arc<Parking>>,
    orders: Receiver<Order>,
    shared: Arc<Shared>,
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
    /// The least recently used first.
    idle: Vec<Idle>,
    embedding: Option<Embedding>,
    next_seq: SeqId,
    pace: Pace,
    logits: Vec<f32>,
}

impl Scheduler {
    fn run(&mut self, stop: &AtomicBool) {
        let mut stopping: Option<Instant> = None;
        loop {
            if stop.load(Ordering::SeqCst) && stopping.is_none() {
                stopping = Some(Instant::now());
                for waiting in self.waiting.drain(..) {
                    self.shared.waits_no_more();
                    let _ = waiting.task.events.send(Event::Failed(ApiError::busy("the server is shutting down")));
                }
            }
            if !self.take_orders(stopping.is_some()) {
                break;
            }
            if let Some(since) = stopping
                && (self.is_at_rest() || since.elapsed() > FAREWELL)
            {
                while !self.running.is_empty() {
                    self.finish(0, End::Shutdown);
                }
                break;
            }
            self.drop_cancelled();
            self.admit();
            self.step();
            self.park_one();
            self.tell();
        }
        self.park_all();
    }

    fn is_at_rest(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.embedding.is_none()
    }

    /// Takes what was ordered; waits for something where there is nothing to do. False when nobody can order any more.
    fn take_orders(&mut self, stopping: bool) -> bool {
        loop {
            let order = if self.is_at_rest() && !stopping {
                match self.orders.recv_timeout(Duration::from_millis(200)) {
                    Ok(order) => order,
                    Err(RecvTimeoutError::Timeout) => return true,
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            } else {
                match self.orders.try_recv() {
                    Ok(order) => order,
                    Err(_) => return true,
                }
            };
            match order {
                Order::Generate(task) if stopping => {
                    self.shared.waits_no_more();
                    let _ = task.events.send(Event::Failed(ApiError::busy("the server is shutting down")));
                }
                Order::Generate(task) => self.waiting.push_back(Waiting { task, came: Instant::now() }),
                Order::Embed { tokens, reply } => {
                    self.shared.waits_no_more();
                    self.begin_embedding(tokens, reply);
                }
            }
        }
    }

    /// Whose clients have gone.
    fn drop_cancelled(&mut self) {
        let shared = &self.shared;
        self.waiting.retain(|waiting| {
            let is_here = !waiting.task.events.is_closed();
            if !is_here {
                shared.waits_no_more();
            }
            is_here
        });
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].events.is_closed() {
                self.shared.count(|counts| counts.cancelled += 1);
                let running = self.running.remove(index);
                self.leave(running);
            } else {
                index += 1;
            }
        }
    }
}

/// Who is begun, and where the memory comes from.
impl Scheduler {
    fn admit(&mut self) {
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
        let alone = self.session.bytes_of(until) * n_answers;
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
        let needed = |scheduler: &Scheduler, shared: &Option<SharedBeginning>| match shared {
            None => alone,
            Some(shared) => {
                let grown = scheduler.session.bytes_of(until).saturating_sub(scheduler.session.bytes_of(shared.n));
                (scheduler.idle[shared.idle].bytes + grown) * n_answers
            }
        };
        // A copy leaves the other conversation where it is.
        let copies = shared.as_ref().is_some_and(|shared| {
            let n_past = self.session.seq_n_past(self.idle[shared.idle].seq);
            2 * shared.n < n_past && shared.n >= LEAST_SHARED * 4
        });
        let bytes = needed(self, &shared);
        let keep = shared.as_ref().map(|shared| self.idle[shared.idle].seq);
        let mut takes = shared.is_some() && !copies;
        let mut has_room = self.make_room(bytes, keep, takes);
        if !has_room && copies {
            takes = true;
            has_room = self.make_room(bytes, keep, takes);
        }
        if !has_room && self.running.is_empty() && self.embedding.is_none() {
            // Alone it fits.
            shared = None;
            has_room = self.make_room(alone, None, false);
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
        let bytes = needed(self, &shared);
        let Some(Waiting { task, came }) = self.waiting.remove(index) else { return true };
        self.shared.waits_no_more();
        let kept = shared.as_ref().map_or(0, |shared| shared.n);
        self.shared.count(|counts| counts.reread_tokens += common.saturating_sub(kept) as u64);
        self.start(task, came, shared, takes, bytes, until);
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
        reserved: usize,
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
            reserved,
            reserved_until,
            is_held: false,
            came,
            begun: Instant::now(),
            read: None,
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

    fn new_seq(&mut self) -> SeqId {
        let is_taken = |seq: SeqId| {
            self.running.iter().any(|running| running.seq == seq)
                || self.idle.iter().any(|idle| idle.seq == seq)
                || self.embedding.as_ref().is_some_and(|embedding| embedding.seq == seq)
        };
        let mut seq = self.next_seq;
        while is_taken(seq) {
            seq = seq.wrapping_add(1);
        }
        self.next_seq = seq.wrapping_add(1);
        seq
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

    /// Bytes that are taken or set aside.
    fn committed(&self) -> usize {
        let running: usize = self.running.iter().map(|running| running.reserved).sum();
        let idle: usize = self.idle.iter().map(|idle| idle.bytes).sum();
        running + idle + self.embedding.as_ref().map_or(0, |embedding| embedding.bytes)
    }

    /// Lets idle conversations go, the least recently used first, until there is room for so many bytes more. The one of
    /// sequence `keep` stays; `takes` says that its memory is part of what is needed.
    fn make_room(&mut self, bytes: usize, keep: Option<SeqId>, takes: bool) -> bool {
        let taken = |scheduler: &Scheduler| {
            let kept = scheduler.idle.iter().find(|idle| takes && Some(idle.seq) == keep);
            kept.map_or(0, |idle| idle.bytes)
        };
        loop {
            if self.committed() - taken(self) + bytes <= self.limits.kv_mem {
                return true;
            }
            let oldest = (0..self.idle.len()).filter(|&index| Some(self.idle[index].seq) != keep);
            let Some(oldest) = oldest.min_by_key(|&index| self.idle[index].used) else { return false };
            // What cannot help is not driven out.
            let all: usize = self.idle.iter().filter(|idle| Some(idle.seq) != keep).map(|idle| idle.bytes).sum();
            if self.committed() - taken(self) - all + bytes > self.limits.kv_mem {
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

    /// Restores a parked conversation that the prompt can go on from, where that is more than `known` tokens and there is
    /// room, as an idle one: the one that has most in common with it, or, where that cannot be cut back so far (a lazy
    /// layer has dropped what that needs), the longest that it begins with.
    fn restore(&mut self, prompt: &[Token], until: usize, known: usize) {
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
        if !is_worth || !self.make_room(bytes + grown, None, false) {
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
    fn park(&mut self, index: usize, must: bool) {
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
    fn park_one(&mut self) {
        let Some(parking) = &self.parking else { return };
        parking.notices().iter().for_each(|notice| eprintln!("--kv-disk: {notice}"));
        let waits = |idle: &Idle| !idle.is_parked && idle.used.elapsed() > PARKED_AFTER;
        let Some(index) = self.idle.iter().position(waits) else { return };
        if parking.stats().queued > 0 {
            return;
        }
        self.park(index, false);
        // Nor is one looked at again that is too short, or could not be written.
        self.idle[index].is_parked = true;
    }

    fn park_all(&mut self) {
        (0..self.idle.len()).for_each(|index| self.park(index, true));
    }

    /// Bytes of a sequence's cache.
    fn bytes(&self, seq: SeqId) -> usize {
        self.session.layers(seq).iter().map(|layer| layer.kv_bytes).sum()
    }

    /// What is set aside for an answer: what it has, and what its next tokens take.
    fn reserve(&self, seq: SeqId, limit: Option<usize>, generated: usize) -> (usize, usize) {
        let n_past = self.session.seq_n_past(seq);
        let ahead = limit.map_or(HORIZON, |limit| limit.saturating_sub(generated).min(HORIZON));
        let until = (n_past + ahead).min(self.session.n_ctx());
        let grown = self.session.bytes_of(until).saturating_sub(self.session.bytes_of(n_past));
        (self.bytes(seq) + grown, until)
    }

    /// Holds back the answers for whose next token there is no memory; where that is all of them, the last one ends.
    fn hold_back(&mut self) {
        for index in 0..self.running.len() {
            let running = &self.running[index];
            if running.is_reading() || self.session.seq_n_past(running.seq) < running.reserved_until {
                continue;
            }
            let (reserved, until) = self.reserve(running.seq, running.limit, running.generated.len());
            let before = std::mem::take(&mut self.running[index].reserved);
            let has_room = self.make_room(reserved, None, false);
            let running = &mut self.running[index];
            running.is_held = !has_room;
            (running.reserved, running.reserved_until) =
                if has_room { (reserved, until) } else { (before, running.reserved_until) };
        }
        let all_held = !self.running.is_empty() && self.running.iter().all(|running| running.is_held);
        if all_held && let Some(last) = (0..self.running.len()).max_by_key(|&index| self.running[index].begun) {
            self.finish(last, End::Memory);
        }
    }
}

/// A step.
impl Scheduler {
    fn step(&mut self) {
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
        let (read, decoded) = plan.iter().fold((0, 0), |(read, decoded), part| match part.reads {
            Some((from, to)) => (read + to - from, decoded),
            None => (read, decoded + 1),
        });
        match result {
            Ok(()) => {
                self.pace.took(read, decoded, start.elapsed());
                self.shared.count(|counts| {
                    counts.prompt_tokens += read as u64;
                    counts.steps += 1;
                });
                self.go_on(&plan);
            }
            Err(error) => self.fail(&plan, &error),
        }
    }

    /// A token of each answer, and pieces of prompts.
    fn plan(&self) -> Vec<Part> {
        let answers = (0..self.running.len()).filter(|&index| !self.running[index].is_reading());
        let mut plan: Vec<Part> =
            answers.filter(|&index| !self.running[index].is_held).map(|index| Part { index, reads: None }).collect();
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
        let mut budget = self.pace.piece(plan.len());
        let mut others = reading.len();
        // Whoever needs less than its share leaves the rest to the others.
        reading.sort_by_key(|&index| left(index));
        for index in reading {
            let (from, left) = (self.session.seq_n_past(self.running[index].seq), left(index));
            let share = (budget / others.max(1)).max(1);
            others -= 1;
            let n = piece(left, share, self.n_queries.min(self.limits.n_ubatch));
            budget = budget.saturating_sub(n);
            plan.push(Part { index, reads: Some((from, from + n)) });
        }
        plan
    }

    /// Takes the tokens that follow.
    fn go_on(&mut self, plan: &[Part]) {
        let n_vocab = self.session.model().hparams().n_vocab;
        let logits = std::mem::take(&mut self.logits);
        let mut rows = logits.chunks_exact(n_vocab);
        let mut ended: Vec<(SeqId, Result<End, ApiError>)> = Vec::new();
        for part in plan {
            let running = &self.running[part.index];
            let is_read = part.reads.is_none_or(|(_, to)| to >= running.prompt.len());
            if !is_read {
                continue;
            }
            let Some(row) = rows.next() else { continue };
            if part.reads.is_some() {
                self.prompt_ended(part.index, row, &mut ended);
            }
            let seq = self.running[part.index].seq;
            if let Some(result) = self.sample(part.index, row) {
                ended.push((seq, result));
            }
        }
        self.logits = logits;
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
    fn prompt_ended(&mut self, index: usize, row: &[f32], ended: &mut Vec<(SeqId, Result<End, ApiError>)>) {
        let now = Instant::now();
        let (reserved, until) = self.reserve(self.running[index].seq, self.running[index].limit, 0);
        let running = &mut self.running[index];
        running.read = Some(now);
        (running.reserved, running.reserved_until) = (reserved, until);
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
                reserved,
                reserved_until: until,
                is_held: false,
                came: running.came,
                begun: running.begun,
                read: Some(now),
            };
            self.running.push(other);
            if let Some(result) = self.sample(self.running.len() - 1, row) {
                ended.push((seq, result));
            }
        }
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
    fn finish(&mut self, index: usize, end: End) {
        let mut running = self.running.remove(index);
        let text = if matches!(end, End::Stop(_)) { String::new() } else { running.stop_text.finish() };
        let now = Instant::now();
        let read = running.read.unwrap_or(now);
        let layers = self.session.layers(running.seq);
        let lazy_layers = layers.iter().filter(|layer| layer.lazy).count();
        let attends = |layer: &&LayerReport| matches!(layer.kind, LayerKind::Full | LayerKind::Window);
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
    fn leave(&mut self, running: Running) {
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

    fn tell(&mut self) {
        let slot = |seq: SeqId, running: Option<&Running>| {
            let layers = self.session.layers(seq);
            let n_past = self.session.seq_n_past(seq);
            Slot {
                id: seq,
                task: running.map(|running| running.id),
                is_reading: running.is_some_and(Running::is_reading),
                n_past,
                n_prompt: running.map_or(n_past, |running| running.prompt.len()),
                n_generated: running.map_or(0, |running| running.generated.len()),
                kv_bytes: layers.iter().map(|layer| layer.kv_bytes).sum(),
                f16_bytes: self.session.f16_bytes_of(n_past),
                layers,
            }
        };
        self.shared.tell(
            || {
                let kv = self.session.kv();
                Status {
                    running: self.running.iter().map(|running| slot(running.seq, Some(running))).collect(),
                    idle: self.idle.iter().map(|idle| slot(idle.seq, None)).collect(),
                    kv_bytes: kv.allocated_bytes,
                    kv_peak_bytes: kv.peak_bytes,
                    f16_bytes: kv.f16_bytes,
                    context_tokens: kv.context_tokens,
                }
            },
            self.is_at_rest(),
        );
    }
}

/// Embeddings: read piece by piece between the steps.
impl Scheduler {
    fn begin_embedding(&mut self, tokens: Vec<Token>, reply: oneshot::Sender<Result<Vec<f32>, ApiError>>) {
        // One at a time: the others are read to their end first.
        while self.embedding.is_some() {
            self.step_embedding();
        }
        let bytes = self.session.bytes_of(tokens.len());
        if !self.make_room(bytes, None, false) {
            let _ = reply.send(Err(ApiError::busy("there is no memory for this text now (--kv-mem): try again later")));
            return;
        }
        let seq = self.new_seq();
        self.embedding = Some(Embedding { seq, tokens, bytes, reply });
    }

    fn step_embedding(&mut self) {
        let Some(embedding) = self.embedding.take() else { return };
        let done = self.session.seq_n_past(embedding.seq);
        let rest = &embedding.tokens[done..];
        let n = rest.len().min(self.pace.piece(self.running.len()).max(1));
        let is_last = n == rest.len();
        self.session.set_embeddings(is_last);
        let outputs = if is_last { Outputs::Last } else { Outputs::None };
        let entry = BatchEntry { seq: embedding.seq, tokens: &rest[..n], outputs, prompt_end: false };
        let result = self.session.run(&[entry]);
        let state = self.session.embeddings().to_vec();
        self.session.set_embeddings(false);
        match result {
            Ok(()) if !is_last && !embedding.reply.is_closed() => self.embedding = Some(embedding),
            result => {
                self.session.seq_clear(embedding.seq);
                let length = state.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
                let state = result.map(|()| state.iter().map(|x| x / length).collect());
                let state = state.map_err(|error| ApiError::internal(format!("the model could not be run: {error}")));
                let _ = embedding.reply.send(state);
            }
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
