//! What the scheduler lets others see, for /slots, /metrics and the page.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use simlayer::{LayerReport, SeqId};

/// How old what is told may be while answers are given.
const FRESH: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
pub struct Shared {
    waiting: AtomicUsize,
    counts: Mutex<Counts>,
    status: Mutex<(Option<Instant>, Status)>,
}

/// What has happened since the start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Prompts that were begun to be read, answers that were given to their end, and such that nobody waited for any more.
    pub begun: u64,
    pub answers: u64,
    pub cancelled: u64,
    /// Tokens of prompts that were read.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were known from before.
    pub cached_tokens: u64,
    /// Tokens of prompts that were read again though a conversation in memory began with them.
    pub reread_tokens: u64,
    pub generated_tokens: u64,
    /// Idle conversations whose memory was needed.
    pub evicted: u64,
    pub steps: u64,
}

/// A conversation in memory.
#[derive(Debug, Clone)]
pub struct Slot {
    pub id: SeqId,
    /// The request that is being answered in it.
    pub task: Option<u64>,
    pub is_reading: bool,
    pub n_past: usize,
    pub n_prompt: usize,
    pub n_generated: usize,
    pub kv_bytes: usize,
    pub f16_bytes: usize,
    pub layers: Vec<LayerReport>,
}

/// How things are now.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub running: Vec<Slot>,
    pub idle: Vec<Slot>,
    pub kv_bytes: usize,
    pub kv_peak_bytes: usize,
    pub f16_bytes: usize,
    pub context_tokens: usize,
}

impl Shared {
    /// One more waits, unless as many do as may.
    pub fn wait(&self, most: usize) -> bool {
        let more = |waiting: usize| (waiting < most).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    pub fn waits_no_more(&self) {
        let _ = self.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |waiting| waiting.checked_sub(1));
    }

    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut lock(&self.counts));
    }

    pub fn counts(&self) -> Counts {
        *lock(&self.counts)
    }

    /// Notes how things are, where what was noted last is not fresh any more, or nothing will change for a while.
    pub fn tell(&self, status: impl FnOnce() -> Status, at_rest: bool) {
        let mut noted = lock(&self.status);
        if at_rest || noted.0.is_none_or(|at| at.elapsed() > FRESH) {
            *noted = (Some(Instant::now()), status());
        }
    }

    pub fn status(&self) -> Status {
        lock(&self.status).1.clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
