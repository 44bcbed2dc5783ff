//! From a conversation to a prompt, and from what the model writes to a message: the one place that knows how a model writes
//! its thoughts and calls.

use serde_json::{Map, Value, json};
use simlayer::{
    AddBos, SamplerParams, Special, Token,
    chat::{
        self, AnswerDelta, AnswerStream, ChatFormat, ChatRequest, FormatError, Message, ReasoningFormat, RenderOptions,
        ToolChoice, json_schema_to_grammar,
    },
    sampling::GrammarTrigger,
};

use super::{
    app::{App, Prompt},
    error::ApiError,
    sampling::short,
};

/// A conversation that is to go on, in OpenAI's terms whatever the API.
#[derive(Debug, Clone, Default)]
pub struct Dialogue {
    pub messages: Vec<Value>,
    pub tools: Vec<Value>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    /// What the answer must be.
    pub format: Format,
    pub reasoning: ReasoningFormat,
    /// Further variables of the template.
    pub variables: Map<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub enum Format {
    #[default]
    Text,
    /// An object, or such JSON as this schema allows.
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
pub enum Reader {
    /// All of it is content.
    Plain,
    /// As the template has models write calls and thoughts. The prompt ends with the beginning of the answer.
    Format { format: Box<chat::Prepared>, begun: String },
}

pub use simlayer::chat::Answer as Written;
pub use simlayer::chat::ToolCall as Call;

impl Reader {
    /// The parts of a whole text.
    pub fn read(&self, text: &str) -> Written {
        let mut progress = Progress::new(self);
        progress.add(text, true);
        progress.written()
    }
}

/// The prompt of a conversation; what grammar there is goes to the sampler's parameters.
pub fn prepare(app: &App, dialogue: Dialogue, params: &mut SamplerParams) -> Result<Prepared, ApiError> {
    if dialogue.messages.is_empty() {
        return Err(ApiError::param("messages", "there are none"));
    }
    let has_format = dialogue.format != Format::Text;
    if has_format && params.grammar.is_some() {
        return Err(ApiError::param("response_format", "it cannot be used with a grammar: leave one of them out"));
    }
    let mut variables = app.settings.template_kwargs.clone();
    variables.extend(dialogue.variables.clone());
    let Some(format) = &app.settings.format else { return prepare_builtin(app, dialogue, variables, params) };
    if !dialogue.tools.is_empty() && format.capabilities().get("supports_tools") != Some(&Value::Bool(true)) {
        let message = "the model's chat template knows no tools: leave them out, or start the server with one that does \
                       (--chat-template-file)";
        return Err(ApiError::param("tools", message));
    }
    let enable_thinking = variables.remove("enable_thinking").as_ref().and_then(Value::as_bool).unwrap_or(true);
    // As in llama-server: an answer that was begun is gone on with.
    let begun = dialogue.messages.last().is_some_and(is_begun);
    let tool_choice = match &dialogue.tool_choice {
        None => ToolChoice::Auto,
        Some(choice) => ToolChoice::from_json(choice)?,
    };
    let request = ChatRequest {
        // One of the client's own holds from the answer's beginning; together with tools there is none.
        grammar: if dialogue.tools.is_empty() { None } else { params.grammar.clone() },
        messages: dialogue.messages,
        tools: dialogue.tools,
        tool_choice,
        parallel_tool_calls: dialogue.parallel_tool_calls,
        json_schema: match dialogue.format {
            Format::Text => None,
            Format::Json(schema) => Some(schema.unwrap_or_else(any_object)),
        },
        reasoning_format: dialogue.reasoning,
        enable_thinking,
        chat_template_kwargs: variables,
        add_generation_prompt: !begun,
        continue_final_message: begun,
    };
    let is_plain = request.tools.is_empty() && request.json_schema.is_none() && !begun;
    let mut prepared = format.apply(&request)?;
    prepared.constrain(params);
    let mut call = String::new();
    if !matches!(request.tool_choice, ToolChoice::Auto | ToolChoice::None) {
        if prepared.grammar.is_none() {
            let message =
                "how the model's chat template writes calls is not understood: only \"auto\" can be asked for";
            return Err(ApiError::param("tool_choice", message));
        }
        // The grammar allows words before the call, of which small models find no end.
        if !prepared.supports_thinking && !begun {
            call = beginning_of_calls(format, request)?;
            prepared.prompt.push_str(&call);
            params.grammar_prefix.push_str(&call);
        }
    }
    let vocab = app.model.vocab();
    let mut shown = Vec::new();
    for name in &prepared.preserved_tokens {
        if let [token] = vocab.tokenize(name, AddBos::No, Special::Parse)?[..] {
            shown.push(token);
        }
    }
    let tokens = app.settings.template.tokenize(vocab, &prepared.prompt)?;
    let prompt = Prompt { tokens, text: Some(prepared.prompt.clone()) };
    let stops = prepared.additional_stops.clone();
    let reader = match is_plain && !prepared.supports_thinking {
        true => Reader::Plain,
        false => Reader::Format { format: Box::new(prepared), begun: call },
    };
    Ok(Prepared { prompt, stops, shown, reader })
}

/// What all calls begin with, where the model may say something else and that tells a call from it.
fn beginning_of_calls(format: &ChatFormat, request: ChatRequest) -> Result<String, ApiError> {
    let free = format.apply(&ChatRequest { tool_choice: ToolChoice::Auto, ..request })?;
    match &free.grammar_triggers[..] {
        [GrammarTrigger::Word(word)] => Ok(word.clone()),
        _ => Ok(String::new()),
    }
}

/// As [`prepare`], where the template is one of llama.cpp's built-in ones, which know roles and texts.
fn prepare_builtin(
    app: &App,
    mut dialogue: Dialogue,
    variables: Map<String, Value>,
    params: &mut SamplerParams,
) -> Result<Prepared, ApiError> {
    if let Format::Json(schema) = &dialogue.format {
        constrain(schema, params)?;
    }
    let begun = dialogue.messages.pop_if(|last| is_begun(last));
    let message = |message: &Value| {
        let text = |field: &str| message.get(field).and_then(Value::as_str).unwrap_or_default();
        let fields = message.as_object().into_iter().flatten();
        let fields = fields.filter(|(name, _)| !matches!(name.as_str(), "role" | "content"));
        fields.fold(Message::new(text("role"), text("content")), |message, (name, value)| {
            message.with(name.as_str(), value.clone())
        })
    };
    let messages: Vec<Message> = dialogue.messages.iter().map(message).collect();
    let mut options = RenderOptions::default();
    options.add_generation_prompt = true;
    options.tools = dialogue.tools;
    options.variables = variables;
    let mut text = app.settings.template.render_with(&messages, &options)?;
    if let Some(begun) = begun {
        text.push_str(begun.get("content").and_then(Value::as_str).unwrap_or_default());
    }
    let tokens = app.settings.template.tokenize(app.model.vocab(), &text)?;
    let prompt = Prompt { tokens, text: Some(text) };
    Ok(Prepared { prompt, stops: Vec::new(), shown: Vec::new(), reader: Reader::Plain })
}

/// Whether a message is an answer that was begun.
fn is_begun(message: &Value) -> bool {
    message.get("role").is_some_and(|role| role == "assistant") && message.get("tool_calls").is_none()
}

fn any_object() -> Value {
    json!({ "type": "object" })
}

/// Lets an answer be nothing but JSON, such as the schema allows where there is one.
pub fn constrain(schema: &Option<Value>, params: &mut SamplerParams) -> Result<(), ApiError> {
    if params.grammar.is_some() {
        return Err(ApiError::param("json_schema", "it cannot be used with a grammar: leave one of them out"));
    }
    params.grammar = Some(json_schema_to_grammar(&schema.clone().unwrap_or_else(any_object))?);
    Ok(())
}

impl From<FormatError> for ApiError {
    fn from(error: FormatError) -> ApiError {
        match error {
            FormatError::Schema(_) => ApiError::param("response_format", error),
            FormatError::Chat(error) => error.into(),
            error => ApiError::bad(error.to_string()),
        }
    }
}

/// OpenAI's messages, checked: contents are texts, and there is nothing but what templates know.
pub fn messages(value: Option<&Value>) -> Result<Vec<Value>, ApiError> {
    let list = value.and_then(Value::as_array).ok_or_else(|| ApiError::param("messages", "it must be a list"))?;
    list.iter().enumerate().map(|(index, value)| message(value, &format!("messages[{index}]"))).collect()
}

fn message(value: &Value, name: &str) -> Result<Value, ApiError> {
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
    let mut message = json!({ "role": role, "content": content });
    for field in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(text) = object.get(field).and_then(Value::as_str) {
            message[field] = text.into();
        }
    }
    if let Some(calls) = object.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty()) {
        message["tool_calls"] = calls.iter().map(call).collect();
    }
    Ok(message)
}

/// A call whose arguments are text, as OpenAI's are.
fn call(value: &Value) -> Value {
    let mut call = value.clone();
    if let Some(arguments @ Value::Object(_)) = call.pointer("/function/arguments") {
        call["function"]["arguments"] = arguments.to_string().into();
    }
    if call.is_object() && call.get("type").is_none() {
        call["type"] = "function".into();
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

/// A message that comes piece by piece.
#[derive(Debug)]
pub enum Progress {
    Plain(String),
    Format {
        stream: Box<AnswerStream>,
        /// What could not be read as the format has it: it is told as it is.
        unread: Option<Unread>,
    },
}

/// A text that is not written as its format says.
#[derive(Debug)]
pub struct Unread {
    told: usize,
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
    pub fn new(reader: &Reader) -> Progress {
        match reader {
            Reader::Plain => Progress::Plain(String::new()),
            Reader::Format { format, begun } => {
                let mut stream = Box::new(format.stream());
                // Nothing of it is news: it is the name of no tool yet.
                let _ = stream.push(begun);
                Progress::Format { stream, unread: None }
            }
        }
    }

    /// Adds text; `ends` where nothing follows. What is new then.
    pub fn add(&mut self, text: &str, ends: bool) -> News {
        let (stream, unread) = match self {
            Progress::Plain(all) => {
                all.push_str(text);
                return News { content: text.to_owned(), ..News::default() };
            }
            Progress::Format { stream, unread } => (stream, unread),
        };
        let mut deltas = if text.is_empty() { Ok(Vec::new()) } else { stream.push(text) };
        if ends && let Ok(before) = &mut deltas {
            match stream.finish() {
                Ok(more) => before.extend(more),
                Err(error) => deltas = Err(error),
            }
        }
        match deltas {
            Ok(deltas) if unread.is_none() => News::of(deltas),
            // A text that breaks off, or that a small model has got wrong: nothing of it is kept from the client.
            Ok(_) | Err(_) if ends || unread.is_some() => {
                let all = stream.text();
                let known = stream.answer();
                let told = unread.as_ref().map_or(known.content.len(), |unread| unread.told);
                let content = all.get(told..).unwrap_or_default().to_owned();
                *unread = Some(Unread { told: all.len() });
                News { content, ..News::default() }
            }
            _ => News::default(),
        }
    }

    /// The message until now.
    pub fn written(&self) -> Written {
        match self {
            Progress::Plain(content) => Written { content: content.clone(), ..Written::default() },
            Progress::Format { stream, unread: None } => stream.answer().clone(),
            Progress::Format { stream, .. } => Written { content: stream.text().to_owned(), ..stream.answer().clone() },
        }
    }

    /// Whether the model has called a tool.
    pub fn has_calls(&self) -> bool {
        matches!(self, Progress::Format { stream, .. } if !stream.answer().tool_calls.is_empty())
    }
}

impl News {
    fn of(deltas: Vec<AnswerDelta>) -> News {
        let mut news = News::default();
        for delta in deltas {
            news.content.push_str(&delta.content);
            news.reasoning.push_str(&delta.reasoning_content);
            if let Some(call) = delta.tool_call {
                let news_of_call = Call { id: call.id, name: call.name, arguments: call.arguments };
                news.calls.push((call.index, news_of_call));
            }
        }
        news
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
        assert_eq!(read[0], json!({"role": "user", "content": "a\nb"}));
        assert_eq!(read[1]["tool_calls"][0]["function"]["arguments"], "{\"x\": 1}");
        assert_eq!(read[2]["tool_call_id"], "1");
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
        let mut progress = Progress::new(&Reader::Plain);
        let pieces = ["The ", "", "sea"].map(|text| progress.add(text, false).content);
        assert_eq!(pieces, ["The ", "", "sea"]);
        assert_eq!(progress.add(".", true).content, ".");
        assert_eq!(progress.written().content, "The sea.");
    }
}
