//! Ollama's API: /api/chat, /api/generate, /api/tags, /api/show, /api/ps, /api/version. There is one model, whatever name a
//! client gives it.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use simlayer::{AddBos, SamplerParams, Special};

use super::{
    app::{App, Prompt, Wanted},
    dialogue::{self, Call, Dialogue, Format, Progress, Reader},
    error::ApiError,
    http::{Asked, Client, LogLine, json},
    openai::{kv, working},
    sampling::{self, member},
    stream::{Render, collect, stream},
    task::{End, Event, Usage},
};

/// The version of Ollama whose API this is: clients ask for it.
const VERSION: &str = "0.9.0";

/// Ollama's kind of error object.
#[derive(Debug)]
pub struct OllamaError(ApiError);

impl From<ApiError> for OllamaError {
    fn from(error: ApiError) -> OllamaError {
        OllamaError(error)
    }
}

impl IntoResponse for OllamaError {
    fn into_response(self) -> Response {
        let mut response = json(&json!({ "error": self.0.message }));
        *response.status_mut() = self.0.status;
        response
    }
}

pub async fn version() -> Response {
    json(&json!({ "version": VERSION }))
}

fn details(app: &App) -> Value {
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": app.model.hparams().architecture,
        "families": [app.model.hparams().architecture],
        "parameter_size": "",
        "quantization_level": "",
    })
}

fn model(app: &App, name: &str) -> Value {
    let size = std::fs::metadata(&app.settings.model_path).map_or(0, |file| file.len());
    json!({
        "name": name,
        "model": name,
        "modified_at": time(app.started),
        "size": size,
        "digest": "",
        "details": details(app),
    })
}

pub async fn tags(State(app): State<Arc<App>>) -> Response {
    json(&json!({ "models": app.settings.names.iter().map(|name| model(&app, name)).collect::<Vec<_>>() }))
}

pub async fn ps(State(app): State<Arc<App>>) -> Response {
    let mut model = model(&app, app.name());
    model["context_length"] = app.engine.n_ctx.into();
    model["size_vram"] = 0.into();
    model["expires_at"] = time(super::app::now() + 365 * 86_400).into();
    json(&json!({ "models": [model] }))
}

pub async fn show(State(app): State<Arc<App>>) -> Response {
    let hparams = app.model.hparams();
    let key = |name: &str| format!("{}.{name}", hparams.architecture);
    let info = Map::from_iter([
        ("general.architecture".to_owned(), json!(hparams.architecture)),
        (key("context_length"), json!(app.engine.n_ctx)),
        (key("embedding_length"), json!(hparams.n_embd)),
        (key("block_count"), json!(hparams.n_layer)),
    ]);
    json(&json!({
        "modelfile": "",
        "parameters": "",
        "template": app.settings.template_text,
        "details": details(&app),
        "model_info": info,
        "capabilities": ["completion", "tools"],
    }))
}

fn time(seconds: u64) -> String {
    jiff::Timestamp::from_second(i64::try_from(seconds).unwrap_or(0)).unwrap_or_default().to_string()
}

pub async fn chat(mut asked: Asked) -> Result<Response, OllamaError> {
    let body = asked.json().await?;
    let Asked { app, client, log, .. } = asked;
    answer(app, client, log, body, Kind::Chat).await
}

pub async fn generate(mut asked: Asked) -> Result<Response, OllamaError> {
    let body = asked.json().await?;
    let Asked { app, client, log, .. } = asked;
    answer(app, client, log, body, Kind::Generate).await
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Chat,
    Generate,
}

async fn answer(
    app: Arc<App>,
    client: Client,
    log: Arc<LogLine>,
    body: Map<String, Value>,
    kind: Kind,
) -> Result<Response, OllamaError> {
    // Unlike everybody else's, Ollama's answers come piece by piece unless they are not to.
    let streams = sampling::boolean(&body, "stream")?.unwrap_or(true);
    let (id, with) = (app.number(), Arc::clone(&app));
    let prepared = working(move || {
        let name = |name: &str| sampling::text(&body, name).map(|text| text.unwrap_or_default().to_owned());
        let mut wanted = options(&with, &body)?;
        let messages = match kind {
            Kind::Chat => messages(&body)?,
            Kind::Generate => {
                let (system, prompt) = (name("system")?, name("prompt")?);
                let system = Some(system).filter(|system| !system.is_empty());
                let mut messages: Vec<_> =
                    system.map(|system| json!({ "role": "system", "content": system })).into_iter().collect();
                messages.extend(
                    Some(prompt)
                        .filter(|prompt| !prompt.is_empty())
                        .map(|prompt| json!({ "role": "user", "content": prompt })),
                );
                messages
            }
        };
        // A client that only wants the model to be there.
        if messages.is_empty() {
            return Ok(None);
        }
        let reader = if kind == Kind::Generate && sampling::boolean(&body, "raw")?.unwrap_or(false) {
            let text = name("prompt")?;
            let tokens = with.model.vocab().tokenize(&text, AddBos::Yes, Special::Parse)?;
            wanted.prompts = vec![Prompt { tokens, text: Some(text) }];
            Reader::Plain
        } else {
            let dialogue = dialogue_of(&body, messages)?;
            let prepared = dialogue::prepare(&with, dialogue, &mut wanted.params)?;
            wanted.prompts = vec![prepared.prompt];
            wanted.stops.extend(prepared.stops);
            wanted.shown = prepared.shown;
            prepared.reader
        };
        Ok(Some((with.submit(id, client.0, wanted)?, reader)))
    })
    .await?;
    let head = Head { model: app.name().to_owned(), kind };
    let Some((answers, reader)) = prepared else {
        let mut object = head.object("", "", &[]);
        object["done"] = true.into();
        object["done_reason"] = "load".into();
        return Ok(json(&object));
    };
    if streams {
        let render = Lines { head, progress: Progress::new(&reader) };
        return Ok(stream(answers, render, app.settings.ping, log).await?);
    }
    let answers = collect(answers, &log).await?;
    let Some(answer) = answers.first() else { return Err(ApiError::internal("there is no answer").into()) };
    let written = reader.read(&answer.text);
    let mut object = head.object(&written.content, &written.reasoning_content, &written.tool_calls);
    finish(&mut object, &answer.end, &answer.usage);
    Ok(json(&object))
}

/// Ollama's messages: calls' arguments are objects, and results name the tool.
fn messages(body: &Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    let given = body.get("messages").filter(|messages| !messages.is_null());
    let Some(given) = given else { return Ok(Vec::new()) };
    let mut given = given.clone();
    for message in given.as_array_mut().into_iter().flatten() {
        let Some(message) = message.as_object_mut() else { continue };
        if message.get("images").and_then(Value::as_array).is_some_and(|images| !images.is_empty()) {
            return Err(ApiError::param("images", "pictures are not read here, only text"));
        }
        if let Some(thinking) = message.remove("thinking") {
            message.insert("reasoning_content".to_owned(), thinking);
        }
        if let Some(name) = message.remove("tool_name") {
            message.insert("name".to_owned(), name);
        }
    }
    dialogue::messages(Some(&given))
}

fn dialogue_of(body: &Map<String, Value>, messages: Vec<Value>) -> Result<Dialogue, ApiError> {
    let format = match member(body, "format") {
        None => Format::Text,
        Some(Value::String(format)) if format.is_empty() => Format::Text,
        Some(Value::String(format)) if format == "json" => Format::Json(None),
        Some(schema @ Value::Object(_)) => Format::Json(Some(schema.clone())),
        Some(_) => return Err(ApiError::param("format", "it must be json, or a JSON schema")),
    };
    let tools = match member(body, "tools") {
        None => Vec::new(),
        Some(Value::Array(tools)) => tools.clone(),
        Some(_) => return Err(ApiError::param("tools", "it must be a list")),
    };
    let mut variables = Map::new();
    match member(body, "think") {
        Some(Value::Bool(thinks)) => drop(variables.insert("enable_thinking".to_owned(), (*thinks).into())),
        Some(Value::String(effort)) => drop(variables.insert("reasoning_effort".to_owned(), effort.as_str().into())),
        _ => {}
    }
    Ok(Dialogue { messages, tools, format, variables, ..Dialogue::default() })
}

/// Ollama's `options` are llama-server's members, by and large.
fn options(app: &App, body: &Map<String, Value>) -> Result<Wanted, ApiError> {
    let none = Map::new();
    let options = match member(body, "options") {
        None => &none,
        Some(Value::Object(options)) => options,
        Some(_) => return Err(ApiError::param("options", "it must be an object")),
    };
    let params: SamplerParams = sampling::params(options, &app.settings.defaults, app.model.vocab(), app.engine.n_ctx)?;
    Ok(Wanted {
        prompts: Vec::new(),
        params,
        n: 1,
        limit: sampling::limit(options, &["num_predict"])?.unwrap_or(app.settings.limit),
        stops: sampling::stops(options.get("stop"), "stop")?,
        shown: Vec::new(),
        n_probs: None,
    })
}

struct Head {
    model: String,
    kind: Kind,
}

impl Head {
    fn object(&self, content: &str, thinking: &str, calls: &[Call]) -> Value {
        let mut object = json!({ "model": self.model, "created_at": jiff::Timestamp::now().to_string() });
        match self.kind {
            Kind::Generate => {
                object["response"] = content.into();
                if !thinking.is_empty() {
                    object["thinking"] = thinking.into();
                }
            }
            Kind::Chat => {
                let mut message = json!({ "role": "assistant", "content": content });
                if !thinking.is_empty() {
                    message["thinking"] = thinking.into();
                }
                if !calls.is_empty() {
                    let call = |call: &Call| {
                        let arguments = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
                        json!({ "function": { "name": call.name, "arguments": arguments } })
                    };
                    message["tool_calls"] = calls.iter().map(call).collect();
                }
                object["message"] = message;
            }
        }
        object["done"] = false.into();
        object
    }
}

fn finish(object: &mut Value, end: &End, usage: &Usage) {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    object["done"] = true.into();
    object["done_reason"] = end.finish_reason().into();
    object["total_duration"] = nanoseconds(usage.waited + usage.read + usage.generated).into();
    object["load_duration"] = 0.into();
    object["prompt_eval_count"] = usage.prompt_tokens.into();
    object["prompt_eval_cached_count"] = cached.into();
    object["prompt_eval_duration"] = nanoseconds(usage.read).into();
    object["eval_count"] = usage.generated_tokens.into();
    object["eval_duration"] = nanoseconds(usage.generated).into();
    object["kv"] = kv(&[usage]);
}

/// An answer, line by line. A call is told when it is complete.
struct Lines {
    head: Head,
    progress: Progress,
}

impl Render for Lines {
    const CONTENT_TYPE: &'static str = "application/x-ndjson";
    // Lines that say nothing would be errors.
    const PING: &'static str = "\n";

    fn event(&mut self, event: Event) -> String {
        match event {
            Event::Started | Event::Failed(_) => String::new(),
            Event::Token { text, .. } => {
                let news = self.progress.add(&text, false);
                if news.content.is_empty() && news.reasoning.is_empty() {
                    return String::new();
                }
                format!("{}\n", self.head.object(&news.content, &news.reasoning, &[]))
            }
            Event::Ended { text, end, usage, .. } => {
                let news = self.progress.add(&text, true);
                let mut out = String::new();
                let calls = &self.progress.written().tool_calls;
                if !news.content.is_empty() || !news.reasoning.is_empty() || !calls.is_empty() {
                    out = format!("{}\n", self.head.object(&news.content, &news.reasoning, calls));
                }
                let mut object = self.head.object("", "", &[]);
                finish(&mut object, &end, &usage);
                out + &format!("{object}\n")
            }
        }
    }

    fn error(&mut self, error: &ApiError) -> String {
        format!("{}\n", json!({ "error": error.message }))
    }

    fn end(&mut self) -> String {
        String::new()
    }
}
