//! How a model writes tool calls and reasoning: its template as llama.cpp's chat files read it.
//!
//! llama.cpp finds out what a template makes of tools, calls and thoughts, by rendering it with and without them or by
//! knowing it, and makes of that a parser of the model's answers and the grammar that goes with it.

use std::{sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    error::{ChatError, FormatError},
    message::Message,
    schema::{check_depth, check_text_depth},
    template::{ChatTemplate, RenderOptions},
};
use crate::{
    ggml::{RawChat, RawPrepared, message_diff},
    sampling::{GrammarTrigger, SamplerParams, ThinkingTags},
};

/// Which tools the model calls.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// Those it wants, or none.
    #[default]
    Auto,
    /// None.
    None,
    /// One at least.
    Required,
    /// This one. The model is told of no other.
    Function(String),
}

impl ToolChoice {
    /// What OpenAI's `tool_choice` says: `"auto"`, `"none"`, `"required"`, or an object that names a function.
    ///
    /// # Errors
    /// [`FormatError::Request`] for anything else.
    pub fn from_json(value: &Value) -> Result<ToolChoice, FormatError> {
        match (value.as_str(), value["function"]["name"].as_str()) {
            (Some("auto"), _) => Ok(ToolChoice::Auto),
            (Some("none"), _) => Ok(ToolChoice::None),
            (Some("required"), _) => Ok(ToolChoice::Required),
            (_, Some(name)) => Ok(ToolChoice::Function(name.to_owned())),
            _ => Err(FormatError::Request(
                "tool_choice must be \"auto\", \"none\", \"required\" or {\"type\": \"function\", \"function\": \
                 {\"name\": …}}"
                    .to_owned(),
            )),
        }
    }
}

/// Where the model's thoughts go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReasoningFormat {
    /// They stay in the content, as the model writes them.
    None,
    /// Into `reasoning_content`, by whatever the template marks them with.
    #[default]
    Auto,
    /// Into `reasoning_content`.
    DeepSeek,
}

impl ReasoningFormat {
    /// llama.cpp's `--reasoning-format`: `none`, `auto` or `deepseek`.
    pub fn from_name(name: &str) -> Option<ReasoningFormat> {
        [ReasoningFormat::None, ReasoningFormat::Auto, ReasoningFormat::DeepSeek]
            .into_iter()
            .find(|format| format.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            ReasoningFormat::None => "none",
            ReasoningFormat::Auto => "auto",
            ReasoningFormat::DeepSeek => "deepseek",
        }
    }
}

/// A conversation, and what is asked of its next message. Messages and tools are those of OpenAI's chat completions.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// `{"role": …, "content": …}`, with `tool_calls`, `tool_call_id`, `reasoning_content` where there are such. A content
    /// may be a list of text parts.
    pub messages: Vec<Value>,
    /// `{"type": "function", "function": {"name": …, "description": …, "parameters": a JSON schema}}`.
    pub tools: Vec<Value>,
    pub tool_choice: ToolChoice,
    /// Whether the model may call several tools at once; `None` where its template knows how to write that.
    pub parallel_tool_calls: Option<bool>,
    /// The answer is a JSON text that this schema describes.
    pub json_schema: Option<Value>,
    /// The answer follows this GBNF grammar. It cannot be had together with tools.
    pub grammar: Option<String>,
    pub reasoning_format: ReasoningFormat,
    /// Whether the model thinks first, where its template lets one choose.
    pub enable_thinking: bool,
    /// Further variables of the template.
    pub chat_template_kwargs: Map<String, Value>,
    /// Adds what opens the assistant's next message.
    pub add_generation_prompt: bool,
    /// The last message is the beginning of the answer.
    pub continue_final_message: bool,
}

impl Default for ChatRequest {
    fn default() -> Self {
        ChatRequest {
            messages: Vec::new(),
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: None,
            json_schema: None,
            grammar: None,
            reasoning_format: ReasoningFormat::Auto,
            enable_thinking: true,
            chat_template_kwargs: Map::new(),
            add_generation_prompt: true,
            continue_final_message: false,
        }
    }
}

impl ChatRequest {
    /// A conversation that nothing else is asked of.
    pub fn new(messages: Vec<Value>) -> ChatRequest {
        ChatRequest { messages, ..ChatRequest::default() }
    }

    /// Refuses what is nested too deeply: JSON values, and those that tool calls have as text.
    fn check_depth(&self) -> Result<(), FormatError> {
        let values = self.messages.iter().chain(&self.tools).chain(self.chat_template_kwargs.values());
        for value in values {
            check_depth(value).map_err(FormatError::Request)?;
        }
        if let Some(schema) = &self.json_schema {
            check_depth(schema).map_err(FormatError::Schema)?;
        }
        let calls = self.messages.iter().filter_map(|message| message["tool_calls"].as_array()).flatten();
        for arguments in calls.filter_map(|call| call["function"]["arguments"].as_str()) {
            check_text_depth(arguments).map_err(FormatError::Request)?;
        }
        Ok(())
    }

    /// Whether every message is a role and a text, so that the template needs no help of llama.cpp's.
    fn is_plain(&self) -> bool {
        let only_text = |message: &Value| {
            message.as_object().is_some_and(|message| {
                message.len() == 2
                    && message.contains_key("role")
                    && message.get("content").is_some_and(Value::is_string)
            })
        };
        self.tools.is_empty() && !self.continue_final_message && self.messages.iter().all(only_text)
    }
}

/// A model's chat template, with how the model writes tool calls and reasoning.
///
/// Making one takes some milliseconds: the template is run to see what it can do. Any thread may use it.
///
/// Prompts are rendered by [`ChatTemplate`], as everywhere else, as long as the conversation is roles and texts. With
/// tools, calls or thoughts in it, the prompt is llama.cpp's own rendering: what it gives to the template it has arranged
/// for it (arguments as objects or as text, thoughts under the template's own name), and parser and grammar belong to
/// the prompt that comes out.
///
/// ```
/// use serde_json::json;
/// use simlayer::chat::{ChatFormat, ChatRequest};
///
/// let template = "{%- if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}\
///                 Call one by <tool_call>{\"name\": …, \"arguments\": …}</tool_call><|im_end|>\n{% endif -%}\
///                 {%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}\
///                 {%- for call in message.tool_calls %}<tool_call>\n{\"name\": \"{{ call.function.name }}\", \
///                 \"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n\
///                 {%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// let format = ChatFormat::new(template, "", "<|im_end|>")?;
/// let tool = json!({"type": "function", "function": {
///     "name": "weather",
///     "description": "The weather of a place",
///     "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
/// }});
/// let messages = vec![json!({"role": "user", "content": "How is the weather in Oslo?"})];
/// let prepared = format.apply(&ChatRequest { tools: vec![tool], ..ChatRequest::new(messages) })?;
///
/// let answer = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";
/// let call = &prepared.parse(answer, false)?.tool_calls[0];
/// assert_eq!((call.name.as_str(), call.arguments.as_str()), ("weather", r#"{"city": "Oslo"}"#));
/// # Ok::<(), simlayer::chat::FormatError>(())
/// ```
#[derive(Debug)]
pub struct ChatFormat {
    raw: RawChat,
    template: ChatTemplate,
    capabilities: Map<String, Value>,
}

impl ChatFormat {
    /// A Jinja template, with the texts that stand for BOS and EOS in it.
    ///
    /// # Errors
    /// [`FormatError::Template`] for one that llama.cpp does not parse or makes no parser of, that has more than 128 KiB,
    /// or takes more than some seconds.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<ChatFormat, FormatError> {
        let raw = RawChat::new(template, bos, eos).map_err(FormatError::Template)?;
        let capabilities = raw.capabilities().map_err(FormatError::Template)?;
        let capabilities: Map<String, Value> =
            serde_json::from_str(&capabilities).map_err(|error| FormatError::Template(error.to_string()))?;
        Ok(ChatFormat { raw, template: ChatTemplate::jinja(template, bos, eos), capabilities })
    }

    /// What llama.cpp has found that the template can do, such as `supports_tools`, each true or false.
    pub fn capabilities(&self) -> &Map<String, Value> {
        &self.capabilities
    }

    fn can(&self, capability: &str) -> bool {
        self.capabilities.get(capability) == Some(&Value::Bool(true))
    }

    /// As llama-server: a template without thoughts is told that there are none.
    fn thinks(&self, request: &ChatRequest) -> bool {
        request.enable_thinking && self.can("supports_thinking")
    }

    /// The prompt of a request, and what its answer is to be read with.
    ///
    /// # Errors
    /// [`FormatError::Request`] for messages and tools that are not as OpenAI's, that the template refuses, or that are
    /// nested more than 128 levels deep; [`FormatError::Schema`]; [`FormatError::Template`] when no parser can be made of
    /// the template; [`FormatError::Chat`] when the template would lose something.
    pub fn apply(&self, request: &ChatRequest) -> Result<Prepared, FormatError> {
        request.check_depth()?;
        let mut tools = request.tools.clone();
        let tool_choice = match &request.tool_choice {
            ToolChoice::Auto => "auto",
            ToolChoice::None => "none",
            ToolChoice::Required => "required",
            ToolChoice::Function(name) => {
                tools.retain(|tool| tool["function"]["name"].as_str() == Some(name));
                if tools.is_empty() {
                    return Err(FormatError::Request(format!("tool_choice names {name}, which is none of the tools")));
                }
                "required"
            }
        };
        if tools.is_empty() && request.tool_choice == ToolChoice::Required {
            return Err(FormatError::Request("tool_choice is \"required\", and there are no tools".to_owned()));
        }
        let raw_request = json!({
            "messages": request.messages,
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": request.parallel_tool_calls.unwrap_or_else(|| self.can("supports_parallel_tool_calls")),
            "json_schema": request.json_schema,
            "grammar": request.grammar.as_deref().unwrap_or_default(),
            "reasoning_format": request.reasoning_format.name(),
            "enable_thinking": self.thinks(request),
            "chat_template_kwargs": request.chat_template_kwargs,
            "add_generation_prompt": request.add_generation_prompt,
            "continue_final_message": request.continue_final_message,
        });
        let parser = self.raw.apply(&raw_request.to_string()).map_err(|message| {
            match message.strip_prefix("Unable to generate parser for this template. ") {
                Some(why) => FormatError::Template(why.to_owned()),
                None => FormatError::Request(message),
            }
        })?;
        let raw: RawJson = read(parser.json(), FormatError::Request)?;
        let mut prepared = Prepared::new(raw, request.grammar.is_some(), parser);
        if request.is_plain() {
            match self.render(request) {
                // Otherwise the parser would not know where the answer begins.
                Ok(prompt) if prompt.ends_with(&prepared.generation_prompt) => prepared.prompt = prompt,
                Err(error @ ChatError::Lost(_)) => return Err(error.into()),
                // llama.cpp has rendered what our Jinja does not run, or has put the messages into another form.
                _ => {}
            }
        }
        Ok(prepared)
    }

    fn render(&self, request: &ChatRequest) -> Result<String, ChatError> {
        let text = |message: &Value, field: &str| message[field].as_str().unwrap_or_default().to_owned();
        let messages: Vec<_> = request
            .messages
            .iter()
            .map(|message| Message::new(text(message, "role"), text(message, "content")))
            .collect();
        let mut variables = request.chat_template_kwargs.clone();
        variables.entry("enable_thinking").or_insert(self.thinks(request).into());
        let options = RenderOptions {
            add_generation_prompt: request.add_generation_prompt,
            variables,
            ..RenderOptions::default()
        };
        self.template.render_with(&messages, &options)
    }
}

/// What [`RawPrepared::json`] tells.
#[derive(Deserialize)]
struct RawJson {
    format: String,
    prompt: String,
    generation_prompt: String,
    grammar: String,
    grammar_lazy: bool,
    grammar_triggers: Vec<RawTrigger>,
    preserved_tokens: Vec<String>,
    additional_stops: Vec<String>,
    supports_thinking: bool,
    thinking_start: String,
    thinking_ends: Vec<String>,
}

#[derive(Deserialize)]
struct RawTrigger {
    kind: String,
    value: String,
}

fn read<T: for<'a> Deserialize<'a>>(
    json: Result<String, String>,
    error: impl Fn(String) -> FormatError,
) -> Result<T, FormatError> {
    serde_json::from_str(&json.map_err(&error)?).map_err(|why| error(why.to_string()))
}

/// A request's prompt, what the sampler is to hold to, and the parser of the answer. Cheap to clone.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Prepared {
    /// llama.cpp's name for how the answer is written, such as `peg-native`.
    pub format: String,
    pub prompt: String,
    /// The prompt's end: what opens the answer.
    pub generation_prompt: String,
    /// A grammar that the answer follows.
    pub grammar: Option<String>,
    /// What the grammar waits for. Where there is none it holds from the beginning.
    pub grammar_triggers: Vec<GrammarTrigger>,
    /// What of the grammar's text the prompt ends with.
    pub grammar_prefix: String,
    /// Special tokens that belong to the answer's text: a parser looks for them.
    pub preserved_tokens: Vec<String>,
    /// Texts that end the answer, besides the model's own end.
    pub additional_stops: Vec<String>,
    /// Whether the template knows of thoughts.
    pub supports_thinking: bool,
    /// What thoughts are written between.
    pub thinking: Option<ThinkingTags>,
    parser: Arc<RawPrepared>,
}

impl Prepared {
    fn new(raw: RawJson, grammar_is_users: bool, parser: RawPrepared) -> Prepared {
        let triggers = raw.grammar_triggers.into_iter().filter_map(|RawTrigger { kind, value }| match kind.as_str() {
            "word" => Some(GrammarTrigger::Word(value)),
            "pattern" => Some(GrammarTrigger::Pattern(value)),
            "pattern_full" => Some(GrammarTrigger::PatternFull(value)),
            // A number of a vocabulary, and templates are given none.
            _ => None,
        });
        let triggers: Vec<_> = if raw.grammar_lazy { triggers.collect() } else { Vec::new() };
        // One that waits for nothing never begins.
        let never = raw.grammar.is_empty() || (raw.grammar_lazy && triggers.is_empty());
        let thinking = ThinkingTags { start: raw.thinking_start, ends: raw.thinking_ends };
        Prepared {
            format: raw.format,
            prompt: raw.prompt,
            grammar: (!never).then_some(raw.grammar),
            grammar_triggers: triggers,
            grammar_prefix: if grammar_is_users { String::new() } else { raw.generation_prompt.clone() },
            generation_prompt: raw.generation_prompt,
            preserved_tokens: raw.preserved_tokens,
            additional_stops: raw.additional_stops,
            supports_thinking: raw.supports_thinking,
            thinking: (!thinking.start.is_empty() && !thinking.ends.is_empty()).then_some(thinking),
            parser: Arc::new(parser),
        }
    }

    /// Makes a sampler hold to this request's grammar, if there is one.
    pub fn constrain(&self, params: &mut SamplerParams) {
        if let Some(grammar) = &self.grammar {
            params.grammar = Some(grammar.clone());
            params.grammar_triggers = self.grammar_triggers.clone();
            params.grammar_prefix = self.grammar_prefix.clone();
            params.thinking = self.thinking.clone();
        }
    }

    /// What the model has answered, out of its text with the preserved tokens in it. `is_partial` says that the text goes
    /// on; what may still become something else is then left out.
    ///
    /// # Errors
    /// [`FormatError::Answer`] when the text is not written as the format says.
    pub fn parse(&self, text: &str, is_partial: bool) -> Result<Answer, FormatError> {
        read(self.parser.parse(text, is_partial), FormatError::Answer)
    }

    /// For an answer that comes piece by piece.
    pub fn stream(&self) -> AnswerStream {
        AnswerStream { prepared: self.clone(), text: String::new(), answer: Answer::default(), ids: Vec::new() }
    }
}

/// What a model has answered.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Answer {
    pub content: String,
    /// The model's thoughts.
    pub reasoning_content: String,
    pub tool_calls: Vec<ToolCall>,
}

/// One call of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ToolCall {
    /// Empty where the model's format has none.
    pub id: String,
    pub name: String,
    /// A JSON object as text, or its beginning in an answer that goes on.
    pub arguments: String,
}

/// What an answer has more than before. Empty texts say nothing new.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct AnswerDelta {
    pub content: String,
    pub reasoning_content: String,
    pub tool_call: Option<ToolCallDelta>,
}

/// What a tool call has more than before.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct ToolCallDelta {
    /// Which of the answer's calls.
    pub index: usize,
    /// Empty but for the call's first delta.
    pub id: String,
    /// Empty but for the call's first delta.
    pub name: String,
    /// What follows in its arguments.
    pub arguments: String,
}

/// An answer that comes piece by piece.
#[derive(Debug, Clone)]
pub struct AnswerStream {
    prepared: Prepared,
    text: String,
    answer: Answer,
    ids: Vec<String>,
}

impl AnswerStream {
    /// Reads on, and says what is new. A tool call that the model gives no id gets one.
    ///
    /// # Errors
    /// [`FormatError::Answer`] when the text is not written as the format says.
    pub fn push(&mut self, piece: &str) -> Result<Vec<AnswerDelta>, FormatError> {
        self.text.push_str(piece);
        self.update(true)
    }

    /// The text ends here: what was held back is read, and what is new is said.
    ///
    /// # Errors
    /// As [`AnswerStream::push`].
    pub fn finish(&mut self) -> Result<Vec<AnswerDelta>, FormatError> {
        self.update(false)
    }

    /// All of the text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The answer so far.
    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    fn update(&mut self, is_partial: bool) -> Result<Vec<AnswerDelta>, FormatError> {
        let mut answer = self.prepared.parse(&self.text, is_partial)?;
        if answer == Answer::default() {
            return Ok(Vec::new());
        }
        for (at, call) in answer.tool_calls.iter_mut().enumerate() {
            if at == self.ids.len() {
                self.ids.push(if call.id.is_empty() { random_id() } else { call.id.clone() });
            }
            call.id.clone_from(&self.ids[at]);
        }
        let json = |answer: &Answer| json!(answer).to_string();
        let deltas = read(message_diff(&json(&self.answer), &json(&answer)), FormatError::Answer)?;
        self.answer = answer;
        Ok(deltas)
    }
}

/// An id that no other call has.
fn random_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    // The standard library seeds its hash maps from the system's random numbers.
    let random = || RandomState::new().hash_one(SystemTime::now());
    format!("call_{:016x}{:016x}", random(), random())
}
