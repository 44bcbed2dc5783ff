//! What all requests share, and a request's way to the scheduler.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use simlayer::{
    Model, Sampler, SamplerParams, Token,
    chat::{ChatFormat, ChatTemplate},
};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::{
    error::ApiError,
    parking::Parking,
    scheduler::Engine,
    task::{Event, Order, Task},
};

/// The server's model and settings.
#[derive(Debug)]
pub struct App {
    pub engine: Engine,
    pub model: Model,
    pub settings: Settings,
    /// Large bodies at once.
    pub large_bodies: tokio::sync::Semaphore,
    /// Seconds since 1970.
    pub started: u64,
    next_id: AtomicU64,
}

/// What is known before the server runs.
#[derive(Debug)]
pub struct Settings {
    pub model_path: PathBuf,
    pub template: ChatTemplate,
    /// How the model writes calls and thoughts; `None` with a built-in template.
    pub format: Option<ChatFormat>,
    /// The template's text; empty for a built-in one.
    pub template_text: String,
    /// The template's variables for requests that give no others.
    pub template_kwargs: Map<String, Value>,
    /// The model's names, the one that is told first.
    pub names: Vec<String>,
    /// The rule that makes layers lazy.
    pub policy: String,
    pub defaults: SamplerParams,
    /// Tokens of an answer where a request does not say.
    pub limit: Option<usize>,
    pub keys: Vec<String>,
    pub cors_origins: Vec<String>,
    pub timeout: Duration,
    pub ping: Option<Duration>,
    pub max_body: usize,
    pub parking: Option<Arc<Parking>>,
}

/// Bodies larger than this are read a few at a time.
pub const LARGE_BODY: usize = 256 << 10;
const LARGE_AT_ONCE: usize = 4;

impl App {
    pub fn new(engine: Engine, model: Model, settings: Settings) -> App {
        App {
            engine,
            model,
            settings,
            large_bodies: tokio::sync::Semaphore::new(LARGE_AT_ONCE),
            started: now(),
            next_id: AtomicU64::new(1),
        }
    }

    pub fn name(&self) -> &str {
        self.settings.names.first().map_or("model", String::as_str)
    }

    /// A number that no other request of this process has.
    pub fn number(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// A name for clients that no other request has.
    pub fn id(&self, prefix: &str, number: u64) -> String {
        format!("{prefix}{:x}{number:06x}", self.started)
    }
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Prompts to be continued, as a request wants it.
#[derive(Debug)]
pub struct Wanted {
    pub prompts: Vec<Prompt>,
    pub params: SamplerParams,
    /// Answers to each prompt.
    pub n: usize,
    pub limit: Option<usize>,
    pub stops: Vec<String>,
    pub shown: Vec<Token>,
    pub n_probs: Option<usize>,
}

#[derive(Debug, Clone)]
pub struct Prompt {
    pub tokens: Vec<Token>,
    pub text: Option<String>,
}

/// Answers that are under way.
#[derive(Debug)]
pub struct Answers {
    pub n: usize,
    pub events: UnboundedReceiver<Event>,
}

impl App {
    /// Hands prompts to the scheduler. Takes a while: penalties look at prompts, and grammars are parsed.
    ///
    /// # Errors
    /// When a setting is out of range, a prompt can never be read here, or too many wait.
    pub fn submit(self: &Arc<App>, id: u64, client: u64, wanted: Wanted) -> Result<Answers, ApiError> {
        let (sender, events) = mpsc::unbounded_channel();
        let n = wanted.prompts.len() * wanted.n;
        for (index, prompt) in wanted.prompts.into_iter().enumerate() {
            if prompt.tokens.len() > self.engine.n_ctx {
                return Err(ApiError::context(prompt.tokens.len(), self.engine.n_ctx));
            }
            let first_answer = index * wanted.n;
            let sampler = |answer: usize| {
                let seed = wanted.params.seed.map(|seed| seed.wrapping_add((first_answer + answer) as u32));
                let mut sampler = Sampler::new(self.model.vocab(), &SamplerParams { seed, ..wanted.params.clone() })?;
                for &token in &prompt.tokens {
                    sampler.accept(token)?;
                }
                Ok::<_, ApiError>(sampler)
            };
            self.engine.submit(Order::Generate(Task {
                id,
                client,
                first_answer,
                samplers: (0..wanted.n).map(sampler).collect::<Result<_, _>>()?,
                prompt: prompt.tokens,
                text: prompt.text,
                limit: wanted.limit,
                stops: wanted.stops.clone(),
                shown: wanted.shown.clone(),
                n_probs: wanted.n_probs,
                events: sender.clone(),
            }))?;
        }
        Ok(Answers { n, events })
    }
}
