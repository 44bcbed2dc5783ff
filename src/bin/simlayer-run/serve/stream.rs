//! Answers as they come: events of the scheduler's to a client, at once or piece by piece.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::stream;
use tokio::time::timeout;

use super::{
    app::Answers,
    error::ApiError,
    http::LogLine,
    task::{End, Event, Probs, Usage},
};

/// An answer that was given to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<simlayer::Token>,
    /// Of each token with the beginning of its text, where they are wanted.
    pub probs: Vec<Probs>,
    pub end: End,
    pub usage: Usage,
}

/// Puts answers together from events.
#[derive(Debug)]
pub struct Collector {
    answers: Vec<Partial>,
}

#[derive(Debug, Default)]
struct Partial {
    text: String,
    tokens: Vec<simlayer::Token>,
    probs: Vec<Probs>,
    end: Option<(End, Usage)>,
}

impl Collector {
    pub fn new(n: usize) -> Collector {
        Collector { answers: (0..n).map(|_| Partial::default()).collect() }
    }

    pub fn add(&mut self, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Started => {}
            Event::Token { answer, text, token, probs } => {
                if let Some(partial) = self.answers.get_mut(answer) {
                    partial.text.push_str(&text);
                    partial.tokens.push(token);
                    partial.probs.extend(probs);
                }
            }
            Event::Ended { answer, text, end, usage } => {
                if let Some(partial) = self.answers.get_mut(answer) {
                    partial.text.push_str(&text);
                    partial.end = Some((end, *usage));
                }
            }
            Event::Failed(error) => return Err(error),
        }
        Ok(())
    }

    pub fn is_complete(&self) -> bool {
        self.answers.iter().all(|answer| answer.end.is_some())
    }

    pub fn answers(self) -> Vec<Answer> {
        let answers = self.answers.into_iter().filter_map(|Partial { text, tokens, probs, end }| {
            let (end, usage) = end?;
            Some(Answer { text, tokens, probs, end, usage })
        });
        answers.collect()
    }
}

/// All answers, once they are given.
pub async fn collect(mut answers: Answers, log: &LogLine) -> Result<Vec<Answer>, ApiError> {
    let mut collector = Collector::new(answers.n);
    while !collector.is_complete() {
        match answers.events.recv().await {
            Some(event) => collector.add(event)?,
            None => return Err(ApiError::internal("the answer was given up; the server's log may say why")),
        }
    }
    let answers = collector.answers();
    for answer in &answers {
        tell(log, &answer.end, &answer.usage);
    }
    Ok(answers)
}

/// The line in the log of an answer.
fn tell(log: &LogLine, end: &End, usage: &Usage) {
    let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(1e-6);
    let read = usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens);
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    log.add(format_args!(
        " | prompt {} ({} known, {:.0}/s), answer {} ({:.1}/s, {}), waited {:.0} ms, kv {:.1} MiB (f16 {:.1}), {} lazy layers",
        usage.prompt_tokens,
        usage.cached_tokens,
        rate(read, usage.read),
        usage.generated_tokens,
        rate(usage.generated_tokens.saturating_sub(1), usage.generated),
        match end {
            End::Eos => "ended",
            End::Limit => "limit",
            End::Stop(_) => "stop",
            End::Context => "context full",
            End::Memory => "memory full (--kv-mem)",
            End::Shutdown => "shutdown",
        },
        usage.waited.as_secs_f64() * 1e3,
        mib(usage.kv_bytes),
        mib(usage.f16_bytes),
        usage.lazy_layers,
    ));
}

/// How events become text for a client.
pub trait Render: Send + 'static {
    const CONTENT_TYPE: &'static str;
    /// What a client passes over: it keeps connections open.
    const PING: &'static str;

    /// The text for an event, if any.
    fn event(&mut self, event: Event) -> String;

    /// The text for an error after the beginning.
    fn error(&mut self, error: &ApiError) -> String;

    /// What comes after all answers have ended.
    fn end(&mut self) -> String;
}

/// What a stream is until it ends.
struct Open<R> {
    answers: Answers,
    render: R,
    left: usize,
    first: Option<Event>,
    ping: Option<Duration>,
    log: Arc<LogLine>,
    began: Instant,
}

/// Answers piece by piece. What goes wrong before the prompt is read is an error of its own, unless that takes long.
pub async fn stream<R: Render>(
    mut answers: Answers,
    render: R,
    ping: Option<Duration>,
    log: Arc<LogLine>,
) -> Result<Response, ApiError> {
    let patience = ping.unwrap_or(Duration::from_secs(30));
    let first = match timeout(patience, answers.events.recv()).await {
        Ok(Some(Event::Failed(error))) => return Err(error),
        Ok(None) => return Err(ApiError::internal("the answer was given up; the server's log may say why")),
        Ok(Some(event)) => Some(event),
        Err(_) => None,
    };
    let left = answers.n;
    let open = Open { answers, render, left, first, ping, log, began: Instant::now() };
    let body = stream::unfold(Some(open), |open| async move {
        let mut open = open?;
        loop {
            let event = match open.first.take() {
                Some(event) => Some(event),
                None => {
                    // A pause that is never.
                    let pause = open.ping.unwrap_or(Duration::from_secs(1 << 30));
                    match timeout(pause, open.answers.events.recv()).await {
                        Ok(event) => event,
                        Err(_) => {
                            return Some((Ok::<_, Infallible>(Bytes::from_static(R::PING.as_bytes())), Some(open)));
                        }
                    }
                }
            };
            let (text, goes_on) = match event {
                None => (open.render.error(&ApiError::internal("the answer was given up")), false),
                Some(Event::Failed(error)) => {
                    open.log.add(format_args!(
                        " | failed after {:.0} s: {}",
                        open.began.elapsed().as_secs_f64(),
                        error.message
                    ));
                    (open.render.error(&error), false)
                }
                Some(event) => {
                    if let Event::Ended { end, usage, .. } = &event {
                        tell(&open.log, end, usage);
                        open.left -= 1;
                    }
                    let mut text = open.render.event(event);
                    if open.left == 0 {
                        text.push_str(&open.render.end());
                    }
                    (text, open.left > 0)
                }
            };
            if !text.is_empty() || !goes_on {
                return Some((Ok(Bytes::from(text)), goes_on.then_some(open)));
            }
        }
    });
    let headers = [(header::CONTENT_TYPE, R::CONTENT_TYPE), (header::CACHE_CONTROL, "no-cache")];
    // Proxies are not to wait for more.
    Ok((headers, [("x-accel-buffering", "no")], Body::from_stream(body)).into_response())
}

/// A server-sent event.
pub fn sse(value: &serde_json::Value) -> String {
    format!("data: {value}\n\n")
}
