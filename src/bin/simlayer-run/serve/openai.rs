//! OpenAI's API, with llama-server's additions: /v1/chat/completions, /v1/completions, /v1/models, /v1/embeddings.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode, response::Response};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::{Map, Value, json};
use simlayer::{AddBos, Special, Token, chat::ReasoningFormat};
use tokio::sync::oneshot;

use super::{
    app::{Answers, App, Prompt, Wanted, now},
    dialogue::{self, Call, Dialogue, Progress, Reader, Written},
    error::ApiError,
    http::{Asked, json},
    sampling::{self, member, short},
    stream::{Answer, Render, collect, sse, stream},
    task::{End, Event, Order, Prob, Probs, Usage},
};

/// Most probable tokens that are told at most.
const MOST_PROBS: i64 = 20;
const MOST_PROMPTS: usize = 64;

pub async fn chat_completions(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let Asked { app, client, log, .. } = asked;
    let streams = sampling::boolean(&body, "stream")?.unwrap_or(false);
    let wants_usage = streams_usage(&body)?;
    let (id, with) = (app.number(), Arc::clone(&app));
    let (answers, reader) = working(move || {
        let (dialogue, mut wanted) = chat(&with, &body)?;
        let mut params = std::mem::take(&mut wanted.params);
        let prepared = dialogue::prepare(&with, dialogue, &mut params)?;
        wanted.params = params;
        wanted.prompts = vec![prepared.prompt];
        wanted.stops.extend(prepared.stops);
        wanted.shown = prepared.shown;
        Ok((with.submit(id, client.0, wanted)?, prepared.reader))
    })
    .await?;
    let head = Head { id: app.id("chatcmpl-", id), model: app.name().to_owned(), created: now() };
    if streams {
        let progress = (0..answers.n).map(|_| Progress::new(&reader)).collect();
        let begun = vec![false; answers.n];
        let render = ChatStream { head, progress, begun, wants_usage, usages: Vec::new() };
        return stream(answers, render, app.settings.ping, log).await;
    }
    let answers = collect(answers, &log).await?;
    let choices: Vec<Value> =
        answers.iter().enumerate().map(|(index, answer)| choice(index, answer, &reader)).collect();
    let mut object = head.object("chat.completion", choices);
    add_usage(&mut object, answers.iter().map(|answer| &answer.usage), 1);
    Ok(json(&object))
}

/// Runs what takes long apart from the threads that wait for clients.
pub async fn working<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::internal("the request could not be prepared; the server's log may say why")))
}

/// A chat request's conversation.
pub fn dialogue(body: &Map<String, Value>) -> Result<Dialogue, ApiError> {
    let list = |name: &str| match member(body, name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list.clone()),
        Some(_) => Err(ApiError::param(name, "it must be a list")),
    };
    let mut variables = match member(body, "chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(variables)) => variables.clone(),
        Some(_) => return Err(ApiError::param("chat_template_kwargs", "it must be an object")),
    };
    if let Some(effort) = sampling::text(body, "reasoning_effort")? {
        variables.entry("reasoning_effort").or_insert_with(|| effort.into());
    }
    Ok(Dialogue {
        messages: dialogue::messages(body.get("messages"))?,
        tools: list("tools")?,
        tool_choice: member(body, "tool_choice").cloned(),
        parallel_tool_calls: sampling::boolean(body, "parallel_tool_calls")?,
        format: dialogue::format(body)?,
        reasoning: reasoning(body)?,
        variables,
    })
}

fn reasoning(body: &Map<String, Value>) -> Result<ReasoningFormat, ApiError> {
    let Some(name) = sampling::text(body, "reasoning_format")? else { return Ok(ReasoningFormat::Auto) };
    let wrong = || ApiError::param("reasoning_format", "it must be none, auto or deepseek");
    ReasoningFormat::from_name(name).ok_or_else(wrong)
}

/// A chat request's conversation, and how it is to go on.
fn chat(app: &App, body: &Map<String, Value>) -> Result<(Dialogue, Wanted), ApiError> {
    let dialogue = dialogue(body)?;
    let n_probs = match sampling::boolean(body, "logprobs")? {
        Some(true) => Some(most_probs(sampling::integer(body, "top_logprobs")?.unwrap_or(0), "top_logprobs")?),
        _ => None,
    };
    Ok((dialogue, wanted(app, body, &["max_completion_tokens", "max_tokens", "n_predict"], n_probs)?))
}

fn most_probs(n: i64, name: &str) -> Result<usize, ApiError> {
    match n {
        0..=MOST_PROBS => Ok(n as usize),
        _ => Err(ApiError::param(name, format_args!("{n} is not between 0 and {MOST_PROBS}"))),
    }
}

/// What a request says besides its prompt.
pub fn wanted(
    app: &App,
    body: &Map<String, Value>,
    limits: &[&str],
    n_probs: Option<usize>,
) -> Result<Wanted, ApiError> {
    let n = sampling::integer(body, "n")?.unwrap_or(1);
    let n = usize::try_from(n).ok().filter(|n| (1..=app.engine.limits.parallel).contains(n)).ok_or_else(|| {
        ApiError::param("n", format_args!("{n} is not between 1 and {} (--parallel)", app.engine.limits.parallel))
    })?;
    Ok(Wanted {
        prompts: Vec::new(),
        params: sampling::params(body, &app.settings.defaults, app.model.vocab(), app.engine.n_ctx)?,
        n,
        limit: sampling::limit(body, limits)?.unwrap_or(app.settings.limit),
        stops: sampling::stops(body.get("stop"), "stop")?,
        shown: Vec::new(),
        n_probs,
    })
}

fn streams_usage(body: &Map<String, Value>) -> Result<bool, ApiError> {
    match member(body, "stream_options") {
        None => Ok(false),
        Some(Value::Object(options)) => Ok(sampling::boolean(options, "include_usage")?.unwrap_or(false)),
        Some(_) => Err(ApiError::param("stream_options", "it must be an object")),
    }
}

/// What all objects of an answer begin with.
#[derive(Debug)]
struct Head {
    id: String,
    model: String,
    created: u64,
}

impl Head {
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("simlayer-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }
}

fn choice(index: usize, answer: &Answer, reader: &Reader) -> Value {
    let Written { content, reasoning_content: reasoning, tool_calls: calls } = reader.read(&answer.text);
    let mut message = json!({ "role": "assistant", "content": content });
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.into();
    }
    let finish_reason = finish_reason(&answer.end, !calls.is_empty());
    if !calls.is_empty() {
        message["tool_calls"] = calls.iter().map(tool_call).collect();
        if message["content"] == "" {
            message["content"] = Value::Null;
        }
    }
    let mut choice = json!({ "index": index, "message": message, "logprobs": null, "finish_reason": finish_reason });
    if !answer.probs.is_empty() {
        choice["logprobs"] = json!({ "content": answer.probs.iter().map(logprob).collect::<Value>(), "refusal": null });
    }
    choice
}

fn finish_reason(end: &End, has_calls: bool) -> &'static str {
    if has_calls && end.finish_reason() == "stop" { "tool_calls" } else { end.finish_reason() }
}

fn tool_call(call: &Call) -> Value {
    json!({ "id": call.id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } })
}

/// A token's object in `logprobs`.
pub fn logprob(probs: &Probs) -> Value {
    let object = |prob: &Prob| {
        json!({
            "id": prob.token,
            "token": String::from_utf8_lossy(&prob.bytes),
            // Infinities are no JSON.
            "logprob": prob.logprob.max(-9999.0),
            "bytes": prob.bytes,
        })
    };
    let mut chosen = object(&probs.chosen);
    chosen["top_logprobs"] = probs.top.iter().map(object).collect();
    chosen
}

/// `usage` and `timings` of answers to `n_prompts` prompts.
fn add_usage<'a>(object: &mut Value, usages: impl Iterator<Item = &'a Usage>, n_prompts: usize) {
    let usages: Vec<&Usage> = usages.collect();
    let per_prompt = usages.len() / n_prompts.max(1);
    let prompts = usages.iter().step_by(per_prompt.max(1));
    let (prompt, cached) = prompts.fold((0, 0), |(prompt, cached), usage| {
        (prompt + usage.prompt_tokens, cached + usage.cached_tokens.min(usage.prompt_tokens))
    });
    let generated: usize = usages.iter().map(|usage| usage.generated_tokens).sum();
    object["usage"] = json!({
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": { "cached_tokens": cached },
        "kv": kv(&usages),
    });
    if let Some(first) = usages.first() {
        object["timings"] = timings(first);
    }
}

/// What the caches of answers take.
pub fn kv(usages: &[&Usage]) -> Value {
    let bytes: usize = usages.iter().map(|usage| usage.kv_bytes).sum();
    let f16_bytes: usize = usages.iter().map(|usage| usage.f16_bytes).sum();
    // A short text's cache has more room than it needs: nothing is saved yet.
    let compression = Some(f16_bytes as f64 / bytes.max(1) as f64).filter(|&times| times >= 1.0);
    json!({
        "allocated_bytes": bytes,
        "f16_bytes": f16_bytes,
        "compression": compression,
        "lazy_layers": usages.first().map_or(0, |usage| usage.lazy_layers),
        "active_layers": usages.first().map_or(0, |usage| usage.active_layers),
    })
}

/// llama-server's `timings`.
pub fn timings(usage: &Usage) -> Value {
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    let read = usage.prompt_tokens - cached;
    let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let each = |ms: f64, n: usize| if n == 0 { 0.0 } else { ms / n as f64 };
    let rate = |ms: f64, n: usize| if ms > 0.0 { n as f64 * 1e3 / ms } else { 0.0 };
    let (prompt_ms, predicted_ms) = (ms(usage.read), ms(usage.generated));
    json!({
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": each(prompt_ms, read),
        "prompt_per_second": rate(prompt_ms, read),
        "predicted_n": usage.generated_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": each(predicted_ms, usage.generated_tokens),
        "predicted_per_second": rate(predicted_ms, usage.generated_tokens),
        "wait_ms": ms(usage.waited),
    })
}

/// A chat answer, piece by piece.
struct ChatStream {
    head: Head,
    progress: Vec<Progress>,
    /// Whose role was told.
    begun: Vec<bool>,
    wants_usage: bool,
    usages: Vec<Usage>,
}

impl ChatStream {
    /// The chunks for what is new of an answer.
    fn pieces(&mut self, answer: usize, text: &str, probs: Option<Probs>, ends: bool) -> String {
        let Some(progress) = self.progress.get_mut(answer) else { return String::new() };
        let news = progress.add(text, ends);
        let mut deltas = Vec::new();
        if !std::mem::replace(&mut self.begun[answer], true) {
            deltas.push(json!({ "role": "assistant", "content": null }));
        }
        if !news.reasoning.is_empty() {
            deltas.push(json!({ "reasoning_content": news.reasoning }));
        }
        // A token's probabilities are told with it, though its text may come later.
        if !news.content.is_empty() || probs.is_some() {
            deltas.push(json!({ "content": news.content }));
        }
        for (index, call) in news.calls {
            let mut object = json!({ "index": index, "function": { "arguments": call.arguments } });
            if !call.name.is_empty() {
                object["id"] = call.id.into();
                object["type"] = "function".into();
                object["function"]["name"] = call.name.into();
            }
            deltas.push(json!({ "tool_calls": [object] }));
        }
        let last = deltas.len().saturating_sub(1);
        let chunks = deltas.into_iter().enumerate().map(|(index, delta)| {
            let mut choice = json!({ "index": answer, "delta": delta, "finish_reason": null });
            if let Some(probs) = probs.as_ref().filter(|_| index == last) {
                choice["logprobs"] = json!({ "content": [logprob(probs)], "refusal": null });
            }
            sse(&self.head.object("chat.completion.chunk", vec![choice]))
        });
        chunks.collect()
    }
}

impl Render for ChatStream {
    const CONTENT_TYPE: &'static str = "text/event-stream";
    const PING: &'static str = ":\n\n";

    fn event(&mut self, event: Event) -> String {
        match event {
            Event::Started | Event::Failed(_) => String::new(),
            Event::Token { answer, text, probs, .. } => self.pieces(answer, &text, probs, false),
            Event::Ended { answer, text, end, usage } => {
                let mut out = self.pieces(answer, &text, None, true);
                let has_calls = self.progress.get(answer).is_some_and(Progress::has_calls);
                let reason = finish_reason(&end, has_calls);
                let choice = json!({ "index": answer, "delta": {}, "finish_reason": reason });
                let mut object = self.head.object("chat.completion.chunk", vec![choice]);
                object["timings"] = timings(&usage);
                out.push_str(&sse(&object));
                self.usages.push(*usage);
                out
            }
        }
    }

    fn error(&mut self, error: &ApiError) -> String {
        sse(&json!({ "error": error.object() }))
    }

    fn end(&mut self) -> String {
        let mut out = String::new();
        if self.wants_usage {
            let mut object = self.head.object("chat.completion.chunk", Vec::new());
            add_usage(&mut object, self.usages.iter(), 1);
            out.push_str(&sse(&object));
        }
        out + "data: [DONE]\n\n"
    }
}

pub async fn completions(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let Asked { app, client, log, .. } = asked;
    let streams = sampling::boolean(&body, "stream")?.unwrap_or(false);
    let wants_usage = streams_usage(&body)?;
    let echoes = sampling::boolean(&body, "echo")?.unwrap_or(false);
    let (id, with) = (app.number(), Arc::clone(&app));
    let (answers, echo, n_prompts): (Answers, Vec<String>, usize) = working(move || {
        if sampling::text(&body, "suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::not_supported("suffix: nothing is filled in between two texts here; leave it out"));
        }
        let n_probs = sampling::integer(&body, "logprobs")?.map(|n| most_probs(n, "logprobs")).transpose()?;
        let mut wanted = wanted(&with, &body, &["max_tokens", "n_predict"], n_probs)?;
        // OpenAI's default, which its clients know.
        if member(&body, "max_tokens").is_none() && member(&body, "n_predict").is_none() && wanted.limit.is_none() {
            wanted.limit = Some(16);
        }
        wanted.prompts = prompts(&with, body.get("prompt"))?;
        if let dialogue::Format::Json(schema) = dialogue::format(&body)? {
            dialogue::constrain(&schema, &mut wanted.params)?;
        }
        let n_prompts = wanted.prompts.len();
        let echo = wanted.prompts.iter().flat_map(|prompt| {
            let text = match &prompt.text {
                Some(text) => text.clone(),
                None => with.model.vocab().detokenize(&prompt.tokens, true).unwrap_or_default(),
            };
            std::iter::repeat_n(if echoes { text } else { String::new() }, wanted.n)
        });
        let echo = echo.collect();
        Ok((with.submit(id, client.0, wanted)?, echo, n_prompts))
    })
    .await?;
    let head = Head { id: app.id("cmpl-", id), model: app.name().to_owned(), created: now() };
    if streams {
        let render = TextStream { head, echo, wants_usage, usages: Vec::new(), n_prompts };
        return stream(answers, render, app.settings.ping, log).await;
    }
    let answers = collect(answers, &log).await?;
    let choices = answers.iter().zip(echo).enumerate().map(|(index, (answer, echo))| {
        let text = echo + &answer.text;
        let logprobs = legacy_logprobs(&answer.probs);
        json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.end.finish_reason() })
    });
    let mut object = head.object("text_completion", choices.collect());
    add_usage(&mut object, answers.iter().map(|answer| &answer.usage), n_prompts);
    Ok(json(&object))
}

/// As completions have always told them, and as llama-server does.
fn legacy_logprobs(probs: &[Probs]) -> Value {
    if probs.is_empty() {
        return Value::Null;
    }
    let name = |prob: &Prob| String::from_utf8_lossy(&prob.bytes).into_owned();
    let mut offsets = Vec::with_capacity(probs.len());
    let mut offset = 0;
    for probs in probs {
        offsets.push(offset);
        offset += name(&probs.chosen).chars().count();
    }
    let top = |probs: &Probs| -> Map<String, Value> {
        probs.top.iter().map(|prob| (name(prob), prob.logprob.max(-9999.0).into())).collect()
    };
    json!({
        "tokens": probs.iter().map(|probs| name(&probs.chosen)).collect::<Vec<_>>(),
        "token_logprobs": probs.iter().map(|probs| probs.chosen.logprob.max(-9999.0)).collect::<Vec<_>>(),
        "top_logprobs": probs.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
        "content": probs.iter().map(logprob).collect::<Vec<_>>(),
    })
}

/// A completion, piece by piece.
struct TextStream {
    head: Head,
    echo: Vec<String>,
    wants_usage: bool,
    usages: Vec<Usage>,
    n_prompts: usize,
}

impl TextStream {
    fn chunk(&mut self, answer: usize, text: String, probs: Option<Probs>, reason: Option<&str>) -> Value {
        let echo = self.echo.get_mut(answer).map(std::mem::take).unwrap_or_default();
        let logprobs = legacy_logprobs(&probs.into_iter().collect::<Vec<_>>());
        let choice = json!({ "index": answer, "text": echo + &text, "logprobs": logprobs, "finish_reason": reason });
        self.head.object("text_completion", vec![choice])
    }
}

impl Render for TextStream {
    const CONTENT_TYPE: &'static str = "text/event-stream";
    const PING: &'static str = ":\n\n";

    fn event(&mut self, event: Event) -> String {
        match event {
            Event::Started | Event::Failed(_) => String::new(),
            Event::Token { text, probs: None, .. } if text.is_empty() => String::new(),
            Event::Token { answer, text, probs, .. } => sse(&self.chunk(answer, text, probs, None)),
            Event::Ended { answer, text, end, usage } => {
                let mut chunk = self.chunk(answer, text, None, Some(end.finish_reason()));
                chunk["timings"] = timings(&usage);
                self.usages.push(*usage);
                sse(&chunk)
            }
        }
    }

    fn error(&mut self, error: &ApiError) -> String {
        sse(&json!({ "error": error.object() }))
    }

    fn end(&mut self) -> String {
        let mut out = String::new();
        if self.wants_usage {
            let mut object = self.head.object("text_completion", Vec::new());
            add_usage(&mut object, self.usages.iter(), self.n_prompts);
            out.push_str(&sse(&object));
        }
        out + "data: [DONE]\n\n"
    }
}

/// One prompt or several: texts, tokens, or llama-server's lists of both.
pub fn prompts(app: &App, value: Option<&Value>) -> Result<Vec<Prompt>, ApiError> {
    let value = value.filter(|value| !value.is_null()).ok_or_else(|| ApiError::param("prompt", "it is missing"))?;
    match value {
        // Several: none of them is a number.
        Value::Array(list) if !list.is_empty() && list.iter().all(|item| item.is_string() || item.is_array()) => {
            if list.len() > MOST_PROMPTS {
                return Err(ApiError::param(
                    "prompt",
                    format_args!("at most {MOST_PROMPTS} prompts can be sent at once"),
                ));
            }
            list.iter().map(|item| prompt(app, item)).collect()
        }
        one => Ok(vec![prompt(app, one)?]),
    }
}

fn prompt(app: &App, value: &Value) -> Result<Prompt, ApiError> {
    let vocab = app.model.vocab();
    let tokens = match value {
        Value::String(text) => {
            let mut tokens = vocab.tokenize(text, AddBos::Yes, Special::Parse)?;
            if tokens.is_empty() {
                tokens.extend(vocab.bos());
            }
            return Ok(Prompt { tokens, text: Some(text.clone()) });
        }
        Value::Array(items) => mixed(app, items, "prompt")?,
        other => {
            return Err(ApiError::param("prompt", format_args!("{} is no text and no list of tokens", short(other))));
        }
    };
    Ok(Prompt { tokens, text: None })
}

/// Tokens, among which may be texts.
pub fn mixed(app: &App, items: &[Value], name: &str) -> Result<Vec<Token>, ApiError> {
    let vocab = app.model.vocab();
    let mut tokens = Vec::new();
    for item in items {
        match item {
            Value::String(text) => {
                let add_bos = if tokens.is_empty() { AddBos::Yes } else { AddBos::No };
                tokens.extend(vocab.tokenize(text, add_bos, Special::Parse)?);
            }
            item => {
                let token = item.as_u64().filter(|&token| token < vocab.n_tokens() as u64);
                let wrong = || ApiError::param(name, format_args!("{} is no token of this model", short(item)));
                tokens.push(token.ok_or_else(wrong)? as Token);
            }
        }
    }
    Ok(tokens)
}

pub async fn models(State(app): State<Arc<App>>) -> Response {
    let hparams = app.model.hparams();
    let data: Vec<Value> = app
        .settings
        .names
        .iter()
        .map(|name| {
            json!({
                "id": name,
                "object": "model",
                "created": app.started,
                "owned_by": "simlayer",
                "meta": {
                    "vocab_type": null,
                    "n_vocab": hparams.n_vocab,
                    "n_ctx": app.engine.n_ctx,
                    "n_ctx_train": hparams.n_ctx_train,
                    "n_embd": hparams.n_embd,
                    "architecture": hparams.architecture,
                    "kv_mem_bytes": app.engine.limits.kv_mem,
                },
            })
        })
        .collect();
    json(&json!({ "object": "list", "data": data }))
}

pub async fn embeddings(mut asked: Asked) -> Result<Response, ApiError> {
    let body = asked.json().await?;
    let app = asked.app;
    let as_base64 = match sampling::text(&body, "encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::param("encoding_format", "it must be float or base64")),
    };
    let with = Arc::clone(&app);
    let inputs = working(move || prompts(&with, body.get("input").or_else(|| body.get("content")))).await?;
    let (mut data, mut n_tokens) = (Vec::new(), 0);
    for (index, input) in inputs.into_iter().enumerate() {
        n_tokens += input.tokens.len();
        let (reply, embedding) = oneshot::channel();
        app.engine.submit(Order::Embed { tokens: input.tokens, reply })?;
        let gone =
            |_| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "the server is shutting down");
        let embedding = embedding.await.map_err(gone)??;
        let embedding = match as_base64 {
            // OpenAI's Python client asks for them so.
            true => BASE64_STANDARD.encode(embedding.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).into(),
            false => json!(embedding),
        };
        data.push(json!({ "object": "embedding", "index": index, "embedding": embedding }));
    }
    Ok(json(&json!({
        "object": "list",
        "data": data,
        "model": app.name(),
        "usage": { "prompt_tokens": n_tokens, "total_tokens": n_tokens },
    })))
}
