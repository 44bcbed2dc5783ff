//! What is said in a conversation, and by whom.

use serde_json::{Map, Value};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: "system", "user" or "assistant" in most templates, "tool" for what a tool answers, "developer" in
    /// some.
    pub role: String,
    /// What is said, thinking blocks included as the model wrote them: what becomes of those is the template's to say.
    pub content: String,
    /// What the model's template knows of a message besides: `tool_calls`, `tool_call_id`, `name`,
    /// `reasoning_content`, `thinking`. Built-in templates know nothing of them and refuse them. `content` takes the place of the text:
    /// a list of typed parts, for instance, which templates that know only text get as one.
    pub fields: Map<String, Value>,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into(), fields: Map::new() }
    }

    /// Adds a field that the model's template knows.
    ///
    /// ```
    /// use simlayer::chat::Message;
    /// use serde_json::json;
    ///
    /// let call = json!([{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]);
    /// let message = Message::new("assistant", "").with("tool_calls", call);
    /// ```
    pub fn with(mut self, field: impl Into<String>, value: impl Into<Value>) -> Message {
        self.fields.insert(field.into(), value.into());
        self
    }
}
