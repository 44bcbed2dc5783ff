//! Anthropic's API: /v1/messages and /v1/messages/count_tokens.

use std::sync::Arc;

use super::{
    dialogue::{self, Call, Dialogue, Format, News, Progress},
    error::ApiError,
    http::{Asked, json},
    openai::{kv, timings, wanted, working},
    sampling::{self, member, short},
    stream::{Render, collect, stream},
    task::{End, Event, Usage},
};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use simlayer::chat::ReasoningFormat;

/// Anthropic's kind of error object.
#[derive(Debug)]
pub struct AnthropicError(ApiError);

impl From<ApiError> for AnthropicError {
    fn from(error: ApiError) -> AnthropicError {
        AnthropicError(error)
    }
}

fn error_object(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        413 => "request_too_large",
        503 => "overloaded_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": error.message } })
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        let mut response = json(&error_object(&self.0));
        *response.status_mut() = self.0.status;
        response
    }
}

pub async fn messages(mut asked: Asked) -> Result<Response, AnthropicError> {
    let body = asked.json().await?;
    let Asked { app, client, log, .. } = asked;
    let streams = sampling::boolean(&body, "stream")?.unwrap_or(false);
    let (id, with) = (app.number(), Arc::clone(&app));
    let (answers, reader) = working(move || {
        let dialogue = dialogue_of(&body)?;
        let mut wanted = wanted(&with, &body, &["max_tokens"], None)?;
        wanted.stops = sampling::stops(body.get("stop_sequences"), "stop_sequences")?;
        wanted.n = 1;
        let prepared = dialogue::prepare(&with, dialogue, &mut wanted.params)?;
        wanted.prompts = vec![prepared.prompt];
        wanted.stops.extend(prepared.stops);
        wanted.shown = prepared.shown;
        Ok((with.submit(id, client.0, wanted)?, prepared.reader))
    })
    .await?;
    let id = app.id("msg_", id);
    if streams {
        let render = MessageStream {
            id,
            model: app.name().to_owned(),
            progress: Progress::new(&reader),
            block: None,
            blocks: 0,
        };
        return Ok(stream(answers, render, app.settings.ping, log).await?);
    }
    let answers = collect(answers, &log).await?;
    let Some(answer) = answers.first() else { return Err(ApiError::internal("there is no answer").into()) };
    let written = reader.read(&answer.text);
    let mut content = Vec::new();
    if !written.reasoning_content.is_empty() {
        content.push(json!({ "type": "thinking", "thinking": written.reasoning_content, "signature": "" }));
    }
    if !written.content.is_empty() || written.tool_calls.is_empty() {
        content.push(json!({ "type": "text", "text": written.content }));
    }
    content.extend(written.tool_calls.iter().map(|call| {
        let input = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": input })
    }));
    let (reason, sequence) = stop_reason(&answer.end, !written.tool_calls.is_empty());
    Ok(json(&json!({
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": app.name(),
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage_of(&answer.usage),
        "timings": timings(&answer.usage),
    })))
}

pub async fn count_tokens(mut asked: Asked) -> Result<Response, AnthropicError> {
    let body = asked.json().await?;
    let app = asked.app;
    let with = Arc::clone(&app);
    let prepared =
        working(move || dialogue::prepare(&with, dialogue_of(&body)?, &mut with.settings.defaults.clone())).await?;
    Ok(json(&json!({ "input_tokens": prepared.prompt.tokens.len() })))
}

fn usage_of(usage: &Usage) -> Value {
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    json!({
        "input_tokens": usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.generated_tokens,
        "kv": kv(&[usage]),
    })
}

fn stop_reason(end: &End, has_calls: bool) -> (&'static str, Value) {
    match end {
        End::Eos if has_calls => ("tool_use", Value::Null),
        End::Eos => ("end_turn", Value::Null),
        End::Stop(text) => ("stop_sequence", text.as_str().into()),
        End::Limit | End::Context | End::Memory | End::Shutdown => ("max_tokens", Value::Null),
    }
}

/// The request's conversation in OpenAI's terms.
fn dialogue_of(body: &Map<String, Value>) -> Result<Dialogue, ApiError> {
    let mut list = Vec::new();
    match member(body, "system") {
        None => {}
        Some(Value::String(text)) => list.push(json!({ "role": "system", "content": text })),
        Some(Value::Array(parts)) => {
            list.push(json!({ "role": "system", "content": dialogue::text_of_parts(parts, "system")? }))
        }
        Some(_) => return Err(ApiError::param("system", "it must be a string or a list of text blocks")),
    }
    let given = body.get("messages").and_then(Value::as_array);
    let given = given.ok_or_else(|| ApiError::param("messages", "it must be a list"))?;
    for (index, message) in given.iter().enumerate() {
        add_message(message, &format!("messages[{index}]"), &mut list)?;
    }
    let tools = match member(body, "tools") {
        None => Vec::new(),
        Some(Value::Array(tools)) => tools.iter().map(tool).collect::<Result<_, _>>()?,
        Some(_) => return Err(ApiError::param("tools", "it must be a list")),
    };
    let choice = member(body, "tool_choice");
    let tool_choice = match choice.and_then(|choice| choice.get("type")).and_then(Value::as_str) {
        Some("any") => Some(json!("required")),
        Some("none") => Some(json!("none")),
        Some("tool") => {
            let name = choice.and_then(|choice| choice.get("name")).cloned().unwrap_or_default();
            Some(json!({ "type": "function", "function": { "name": name } }))
        }
        _ => None,
    };
    let alone = choice.and_then(|choice| choice.get("disable_parallel_tool_use")).and_then(Value::as_bool);
    let mut variables = Map::new();
    if let Some(kind) = body.get("thinking").and_then(|thinking| thinking.get("type")).and_then(Value::as_str) {
        variables.insert("enable_thinking".to_owned(), (kind == "enabled").into());
    }
    let parallel_tool_calls = alone.map(|alone| !alone);
    let reasoning = ReasoningFormat::Auto;
    Ok(Dialogue { reasoning, messages: list, tools, tool_choice, parallel_tool_calls, format: Format::Text, variables })
}

fn tool(tool: &Value) -> Result<Value, ApiError> {
    let name = tool.get("name").and_then(Value::as_str);
    let name = name.ok_or_else(|| ApiError::param("tools", "a tool has no name"))?;
    Ok(json!({ "type": "function", "function": {
        "name": name,
        "description": tool.get("description").cloned().unwrap_or_else(|| json!("")),
        "parameters": tool.get("input_schema").cloned().unwrap_or_else(|| json!({ "type": "object" })),
    }}))
}

/// A message of blocks, which may be several of OpenAI's: a tool's result is a message of its own.
fn add_message(message: &Value, name: &str, list: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = message.get("role").and_then(Value::as_str);
    let role = role.ok_or_else(|| ApiError::param(format!("{name}.role"), "it must be a string"))?;
    let blocks = match message.get("content") {
        Some(Value::String(text)) => {
            list.push(json!({ "role": role, "content": text }));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        _ => return Err(ApiError::param(format!("{name}.content"), "it must be a string or a list of blocks")),
    };
    let (mut texts, mut thinking, mut calls) = (Vec::new(), String::new(), Vec::new());
    for block in blocks {
        let string = |field: &str| block.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        match block.get("type").and_then(Value::as_str) {
            Some("text") => texts.push(string("text")),
            Some("thinking") => thinking.push_str(&string("thinking")),
            Some("redacted_thinking") => {}
            Some("tool_use") => calls.push(json!({ "id": string("id"), "type": "function", "function": {
                "name": string("name"),
                "arguments": block.get("input").unwrap_or(&json!({})).to_string(),
            }})),
            Some("tool_result") => {
                let content = match block.get("content") {
                    None | Some(Value::Null) => String::new(),
                    Some(Value::String(text)) => text.clone(),
                    Some(Value::Array(parts)) => dialogue::text_of_parts(parts, &format!("{name}.content"))?,
                    Some(other) => other.to_string(),
                };
                list.push(json!({ "role": "tool", "content": content, "tool_call_id": string("tool_use_id") }));
            }
            other => {
                let kind = short(&json!(other));
                return Err(ApiError::param(
                    format!("{name}.content"),
                    format_args!("blocks of type {kind} are not read here"),
                ));
            }
        }
    }
    if texts.is_empty() && calls.is_empty() && thinking.is_empty() {
        return Ok(());
    }
    let mut message = json!({ "role": role, "content": texts.join("\n") });
    if !thinking.is_empty() {
        message["reasoning_content"] = thinking.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    list.push(message);
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Block {
    Thinking,
    Text,
    Tool(usize),
}

/// A message, piece by piece.
struct MessageStream {
    id: String,
    model: String,
    progress: Progress,
    /// The block that is open.
    block: Option<Block>,
    /// Blocks that were begun.
    blocks: usize,
}

fn event(name: &str, mut value: Value) -> String {
    value["type"] = name.into();
    format!("event: {name}\ndata: {value}\n\n")
}

impl MessageStream {
    fn open(&mut self, block: Block, begin: Value, out: &mut String) {
        if self.block != Some(block) {
            self.close(out);
            out.push_str(&event("content_block_start", json!({ "index": self.blocks, "content_block": begin })));
            self.block = Some(block);
            self.blocks += 1;
        }
    }

    fn close(&mut self, out: &mut String) {
        if self.block.take().is_some() {
            out.push_str(&event("content_block_stop", json!({ "index": self.blocks - 1 })));
        }
    }

    fn pieces(&mut self, text: &str, ends: bool) -> String {
        let News { reasoning, content, calls } = self.progress.add(text, ends);
        let mut out = String::new();
        let delta =
            |index: usize, delta: Value| event("content_block_delta", json!({ "index": index, "delta": delta }));
        if !reasoning.is_empty() {
            self.open(Block::Thinking, json!({ "type": "thinking", "thinking": "", "signature": "" }), &mut out);
            out.push_str(&delta(self.blocks - 1, json!({ "type": "thinking_delta", "thinking": reasoning })));
        }
        if !content.is_empty() {
            self.open(Block::Text, json!({ "type": "text", "text": "" }), &mut out);
            out.push_str(&delta(self.blocks - 1, json!({ "type": "text_delta", "text": content })));
        }
        for (index, Call { id, name, arguments }) in calls {
            self.open(Block::Tool(index), json!({ "type": "tool_use", "id": id, "name": name, "input": {} }), &mut out);
            if !arguments.is_empty() {
                out.push_str(&delta(self.blocks - 1, json!({ "type": "input_json_delta", "partial_json": arguments })));
            }
        }
        out
    }
}

impl Render for MessageStream {
    const CONTENT_TYPE: &'static str = "text/event-stream";
    const PING: &'static str = "event: ping\ndata: {\"type\":\"ping\"}\n\n";

    fn event(&mut self, what: Event) -> String {
        match what {
            Event::Started => event(
                "message_start",
                json!({ "message": {
                    "id": self.id,
                    "type": "message",
                    "role": "assistant",
                    "model": self.model,
                    "content": [],
                    "stop_reason": null,
                    "stop_sequence": null,
                    "usage": { "input_tokens": 0, "output_tokens": 0 },
                }}),
            ),
            Event::Failed(_) => String::new(),
            Event::Token { text, .. } => self.pieces(&text, false),
            Event::Ended { text, end, usage, .. } => {
                let mut out = self.pieces(&text, true);
                self.close(&mut out);
                let (reason, sequence) = stop_reason(&end, self.progress.has_calls());
                let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
                out.push_str(&event("message_delta", json!({ "delta": delta, "usage": usage_of(&usage) })));
                out
            }
        }
    }

    fn error(&mut self, error: &ApiError) -> String {
        event("error", error_object(error))
    }

    fn end(&mut self) -> String {
        event("message_stop", json!({}))
    }
}
