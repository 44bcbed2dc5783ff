//! From a conversation to a prompt, and from what the model writes to a message: the one place that knows how a model writes
//! its thoughts and calls.

use serde_json::{Map, Value, json};
use simlayer::{
    SamplerParams, Token,
    chat::{Message, RenderOptions},
};

use super::{
    app::{App, Prompt},
    error::ApiError,
    sampling::short,
};

/// A conversation that is to go on, in OpenAI's terms whatever the API.
#[derive(Debug, Clone, Default)]
pub struct Dialogue {
    pub messages: Vec<Message>,
    pub tools: Vec<Value>,
    /// `auto`, `none`, `required`, or a function's name.
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: bool,
    /// What the answer must be.
    pub format: Format,
    /// Further variables of the template.
    pub variables: Map<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub enum Format {
    #[default]
    Text,
    /// Any JSON, or such as this schema allows.
    Json(Option<Value>),
}

/// A prompt, and what becomes of its answer.
#[derive(Debug)]
pub struct Prepared {
    pub prompt: Prompt,
    pub stops: Vec<String>,
    pub shown: Vec<Token>,
    pub reader: Reader,
}

/// Reads what the model writes.
#[derive(Debug, Clone)]
pub struct Reader {}

/// What the model has written, by its parts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Written {
    pub content: String,
    pub reasoning: String,
    pub calls: Vec<Call>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// JSON.
    pub arguments: String,
}

impl Reader {
    pub fn plain() -> Reader {
        Reader {}
    }

    /// The parts of a text, which may go on where it is `partial`.
    pub fn read(&self, text: &str, partial: bool) -> Written {
        let _ = partial;
        Written { content: text.to_owned(), ..Written::default() }
    }
}

/// The prompt of a conversation; a grammar goes to the sampler's parameters.
pub fn prepare(app: &App, dialogue: Dialogue, params: &mut SamplerParams) -> Result<Prepared, ApiError> {
    let mut messages = dialogue.messages;
    if messages.is_empty() {
        return Err(ApiError::param("messages", "there are none"));
    }
    // As in llama-server: an answer that was begun is gone on with.
    let begun = messages.pop_if(|last| last.role == "assistant" && last.fields.is_empty()).map(|last| last.content);
    if begun.is_some() && messages.is_empty() {
        return Err(ApiError::param("messages", "the first one is the assistant's: there is nothing to answer"));
    }
    if dialogue.format != Format::Text && params.grammar.is_some() {
        return Err(ApiError::param("response_format", "it cannot be used with a grammar: leave one of them out"));
    }
    let mut variables = app.template_kwargs.clone();
    variables.extend(dialogue.variables);
    let mut options = RenderOptions::default();
    options.add_generation_prompt = true;
    options.tools = dialogue.tools;
    options.variables = variables;
    let mut text = app.template.render_with(&messages, &options)?;
    if let Some(begun) = begun {
        text.push_str(&begun);
    }
    let tokens = app.template.tokenize(app.model.vocab(), &text)?;
    let prompt = Prompt { tokens, text: Some(text) };
    Ok(Prepared { prompt, stops: Vec::new(), shown: Vec::new(), reader: Reader::plain() })
}

/// Lets the answer be nothing but JSON, such as the schema allows where there is one.
pub fn constrain(schema: &Option<Value>, params: &mut SamplerParams) -> Result<(), ApiError> {
    let _ = (schema, params);
    Err(ApiError::not_supported("response_format: only text"))
}

/// OpenAI's messages.
pub fn messages(value: Option<&Value>) -> Result<Vec<Message>, ApiError> {
    let list = value.and_then(Value::as_array).ok_or_else(|| ApiError::param("messages", "it must be a list"))?;
    list.iter().enumerate().map(|(index, value)| message(value, &format!("messages[{index}]"))).collect()
}

fn message(value: &Value, name: &str) -> Result<Message, ApiError> {
    let object = value.as_object().ok_or_else(|| ApiError::param(name, "it must be an object"))?;
    let role = object.get("role").and_then(Value::as_str);
    let role = role.ok_or_else(|| ApiError::param(format!("{name}.role"), "it must be a string"))?;
    let content = match object.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_of_parts(parts, &format!("{name}.content"))?,
        Some(other) => {
            return Err(ApiError::param(format!("{name}.content"), format_args!("{} is no text", short(other))));
        }
    };
    let mut message = Message::new(role, content);
    for field in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(text) = object.get(field).and_then(Value::as_str) {
            message = message.with(field, text);
        }
    }
    if let Some(calls) = object.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty()) {
        let calls: Vec<Value> = calls.iter().map(call).collect();
        message = message.with("tool_calls", calls);
    }
    Ok(message)
}

/// A call whose arguments are an object, as templates want them, where they are one.
fn call(value: &Value) -> Value {
    let mut call = value.clone();
    if let Some(arguments) = call.pointer("/function/arguments").and_then(Value::as_str)
        && let Ok(arguments @ Value::Object(_)) = serde_json::from_str(arguments)
    {
        call["function"]["arguments"] = arguments;
    }
    call
}

/// The text of a list of typed parts.
pub fn text_of_parts(parts: &[Value], name: &str) -> Result<String, ApiError> {
    let text = |part: &Value| {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        let text = part.get("text").and_then(Value::as_str).or_else(|| part.as_str());
        match (kind, text) {
            ("text" | "input_text" | "output_text" | "refusal", Some(text)) => Ok(text.to_owned()),
            _ => Err(ApiError::param(
                name,
                format_args!("parts of type {} are not read here, only text", short(&json!(kind))),
            )),
        }
    };
    Ok(parts.iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// OpenAI's `response_format`, or llama-server's `json_schema`.
pub fn format(body: &Map<String, Value>) -> Result<Format, ApiError> {
    if let Some(schema) = body.get("json_schema").filter(|schema| !schema.is_null()) {
        return Ok(Format::Json(Some(schema.clone())));
    }
    let Some(format) = body.get("response_format").filter(|format| !format.is_null()) else { return Ok(Format::Text) };
    match format.get("type").and_then(Value::as_str) {
        None | Some("text") => Ok(Format::Text),
        Some("json_object") => Ok(Format::Json(format.get("schema").cloned())),
        Some("json_schema") => {
            let schema = format.pointer("/json_schema/schema").or_else(|| format.get("schema")).cloned();
            let missing = || ApiError::param("response_format", "json_schema.schema is missing");
            Ok(Format::Json(Some(schema.ok_or_else(missing)?)))
        }
        Some(other) => Err(ApiError::param(
            "response_format",
            format_args!("{} is none of text, json_object and json_schema", short(&json!(other))),
        )),
    }
}

/// What of a message is new since it was told last.
#[derive(Debug, Default)]
pub struct Progress {
    text: String,
    told: Written,
}

/// New parts of a message.
#[derive(Debug, Default, PartialEq)]
pub struct News {
    pub reasoning: String,
    pub content: String,
    /// New calls, and new ends of the arguments of known ones, by their numbers: the first news of a call has its name.
    pub calls: Vec<(usize, Call)>,
}

impl Progress {
    /// Adds text; `ends` where nothing follows.
    pub fn add(&mut self, reader: &Reader, text: &str, ends: bool) -> News {
        if text.is_empty() && !ends {
            return News::default();
        }
        self.text.push_str(text);
        let written = reader.read(&self.text, !ends);
        // What was told stays told: a part that has become another is told from where it is longer.
        let news = |told: &mut String, now: &str| {
            let same = now.strip_prefix(told.as_str()).unwrap_or_default().to_owned();
            told.push_str(&same);
            same
        };
        let mut calls = Vec::new();
        for (index, call) in written.calls.into_iter().enumerate() {
            match self.told.calls.get_mut(index) {
                None => {
                    self.told.calls.push(call.clone());
                    calls.push((index, call));
                }
                Some(told) => {
                    let arguments = news(&mut told.arguments, &call.arguments);
                    if !arguments.is_empty() {
                        calls.push((index, Call { arguments, ..Call::default() }));
                    }
                }
            }
        }
        News {
            reasoning: news(&mut self.told.reasoning, &written.reasoning),
            content: news(&mut self.told.content, &written.content),
            calls,
        }
    }

    /// The calls that were told, with their arguments until now.
    pub fn calls(&self) -> &[Call] {
        &self.told.calls
    }

    /// Whether the model has called a tool.
    pub fn has_calls(&self) -> bool {
        !self.told.calls.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_openais() {
        let list = json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]);
        let read = messages(Some(&list)).unwrap();
        assert_eq!(read[0], Message::new("user", "a\nb"));
        assert_eq!(read[1].fields["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(read[2].fields["tool_call_id"], "1");
        for wrong in [json!("x"), json!([1]), json!([{"content": "x"}]), json!([{"role": "user", "content": 1}])] {
            assert_eq!(messages(Some(&wrong)).unwrap_err().status.as_u16(), 400);
        }
        let picture = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
        assert!(messages(Some(&picture)).unwrap_err().message.contains("image_url"));
    }

    #[test]
    fn formats() {
        let of = |value: Value| format(value.as_object().unwrap());
        assert_eq!(of(json!({})).unwrap(), Format::Text);
        assert_eq!(of(json!({"response_format": {"type": "json_object"}})).unwrap(), Format::Json(None));
        let schema = json!({"type": "object"});
        let given = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
        assert_eq!(of(given).unwrap(), Format::Json(Some(schema)));
        assert!(of(json!({"response_format": {"type": "xml"}})).is_err());
        assert!(of(json!({"response_format": {"type": "json_schema"}})).is_err());
    }

    #[test]
    fn news_add_up() {
        let (reader, mut progress) = (Reader::plain(), Progress::default());
        let pieces = ["The ", "", "sea"].map(|text| progress.add(&reader, text, false).content);
        assert_eq!(pieces, ["The ", "", "sea"]);
        assert_eq!(progress.add(&reader, ".", true).content, ".");
    }
}
