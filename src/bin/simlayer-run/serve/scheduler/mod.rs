//! The thread that owns the session. Each of its steps is one batch: a token of every conversation that is being answered,
//! and pieces of the prompts that are being read, so large that nobody waits for long.
//!
//! A conversation takes the memory that its cache takes. One is begun when what it needs until its prompt is read is free,
//! with some tokens of its answer; conversations that nobody is answered in stay until that memory is needed, the least
//! recently used going first, and a prompt that begins like one of them goes on from there.
//!
//! `conversation` is what is known of one, `admission` who is begun and where the memory comes from, `parked` what goes to the disk
//! and comes back, `step` a batch and what follows from it, `embedding` texts of which only the last hidden state is wanted.

mod admission;
mod conversation;
mod embedding;
mod parked;
mod step;

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

use simlayer::{Model, SeqId, Session, Vocab};

use self::conversation::{Embedding, Idle, Running, Waiting};
use super::{
    error::ApiError,
    pace::Pace,
    parking::Parking,
    status::{Shared, Slot, Status},
    task::{End, Event, Order},
};

/// How long answers may take once the server is to stop.
const FAREWELL: Duration = Duration::from_secs(10);

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
            self.look();
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

    /// Bytes of a sequence's cache.
    fn bytes(&self, seq: SeqId) -> usize {
        self.session.layers(seq).iter().map(|layer| layer.kv_bytes).sum()
    }
}
