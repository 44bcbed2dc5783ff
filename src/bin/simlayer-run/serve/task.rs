//! What the API hands to the scheduler, and what comes back.

use std::time::Duration;

use simlayer::{Sampler, Token};
use tokio::sync::{mpsc, oneshot};

use super::error::ApiError;

/// Something for the scheduler to do.
#[derive(Debug)]
pub enum Order {
    Generate(Task),
    /// The last token's hidden state, of length 1.
    Embed {
        tokens: Vec<Token>,
        reply: oneshot::Sender<Result<Vec<f32>, ApiError>>,
    },
}

/// A prompt to be continued.
#[derive(Debug)]
pub struct Task {
    /// The request's number in the log.
    pub id: u64,
    /// Whose turn it is: tasks of the same client wait for each other rather than for other clients.
    pub client: u64,
    pub prompt: Vec<Token>,
    /// The text that the prompt's tokens were made from, where it was one.
    pub text: Option<String>,
    /// The number of its first answer.
    pub first_answer: usize,
    /// One for each answer that is asked for.
    pub samplers: Vec<Sampler>,
    /// Tokens of an answer at most.
    pub limit: Option<usize>,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Control tokens whose names are part of the text.
    pub shown: Vec<Token>,
    /// How many of the most probable tokens are told with each token; `None` tells nothing of probabilities.
    pub n_probs: Option<usize>,
    pub events: mpsc::UnboundedSender<Event>,
}

/// What becomes of a task.
#[derive(Debug)]
pub enum Event {
    /// The prompt is read; a client that was told nothing yet is told now that all is well.
    Started,
    Token {
        answer: usize,
        text: String,
        token: Token,
        probs: Option<Probs>,
    },
    Ended {
        answer: usize,
        text: String,
        end: End,
        usage: Box<Usage>,
    },
    Failed(ApiError),
}

/// A token, as it is told with probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Prob {
    pub token: Token,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

/// How probable a token was, before any sampler changed that, and which others were.
#[derive(Debug, Clone, PartialEq)]
pub struct Probs {
    pub chosen: Prob,
    pub top: Vec<Prob>,
}

/// Why an answer has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Eos,
    /// As many tokens as were asked for.
    Limit,
    /// This text came.
    Stop(String),
    /// The context is full.
    Context,
    /// The memory of all conversations is full.
    Memory,
    /// The server was told to stop.
    Shutdown,
}

impl End {
    /// OpenAI's word for it.
    pub fn finish_reason(&self) -> &'static str {
        match self {
            End::Eos | End::Stop(_) => "stop",
            End::Limit | End::Context | End::Memory | End::Shutdown => "length",
        }
    }
}

/// What an answer took.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Those of the prompt's tokens that were not read again.
    pub cached_tokens: usize,
    pub generated_tokens: usize,
    pub waited: Duration,
    pub read: Duration,
    pub generated: Duration,
    /// Bytes of this conversation's cache, and what they would be in f16.
    pub kv_bytes: usize,
    pub f16_bytes: usize,
    pub lazy_layers: usize,
    pub active_layers: usize,
    pub seed: u32,
}
