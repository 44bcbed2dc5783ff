//! Conversations: waiting, being answered, idle.

use std::{sync::Arc, time::Instant};

use simlayer::{Sampler, SeqId, Token, generation::StopText};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use super::super::{
    error::ApiError,
    task::{Event, Task},
};

/// A conversation that is being answered.
#[derive(Debug)]
pub(super) struct Running {
    pub client: u64,
    pub id: u64,
    pub answer: usize,
    /// Whether the prompt was read for it.
    pub is_first: bool,
    pub seq: SeqId,
    pub prompt: Vec<Token>,
    pub text: Option<String>,
    pub cached: usize,
    pub sampler: Sampler,
    /// Those of further answers to the same prompt, until it is read.
    pub others: Vec<Sampler>,
    pub limit: Option<usize>,
    pub stops: Vec<String>,
    pub stop_text: StopText,
    pub shown: Arc<[Token]>,
    pub n_probs: Option<usize>,
    pub events: UnboundedSender<Event>,
    /// The token to be read next; `None` while the prompt is being read.
    pub next: Option<Token>,
    pub generated: Vec<Token>,
    /// There is memory until it has as many tokens.
    pub reserved_until: usize,
    /// Waits for memory.
    pub is_held: bool,
    pub came: Instant,
    pub begun: Instant,
    pub read: Option<Instant>,
    /// The prompt's end is looked at; nothing follows it until that is done.
    pub look: Option<Look>,
}

/// A look before dropping that is under way.
#[derive(Debug)]
pub(super) struct Look {
    pub since: Instant,
    /// The logits of the prompt's last token.
    pub logits: Vec<f32>,
}

impl Running {
    /// Whether a token of the prompt is still to be read.
    pub fn is_reading(&self) -> bool {
        self.next.is_none() && self.look.is_none()
    }
}

/// A conversation that nobody is answered in.
#[derive(Debug)]
pub(super) struct Idle {
    pub seq: SeqId,
    /// What its tokens stand for, where that is known.
    pub text: Option<String>,
    pub bytes: usize,
    pub used: Instant,
    /// It is on disk, or is not to be.
    pub is_parked: bool,
}

/// A text whose last hidden state is wanted.
#[derive(Debug)]
pub(super) struct Embedding {
    pub seq: SeqId,
    pub tokens: Vec<Token>,
    pub reply: oneshot::Sender<Result<Vec<f32>, ApiError>>,
}

/// What a prompt can go on from.
#[derive(Debug)]
pub(super) struct SharedBeginning {
    pub idle: usize,
    pub n: usize,
    /// The prompt's tokens, where they are not those of its text read anew.
    pub prompt: Option<Vec<Token>>,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub task: Task,
    pub came: Instant,
}
