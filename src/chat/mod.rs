//! Conversations to prompts, by the chat template that a model's file carries.
//!
//! The template is Jinja, rendered by `minijinja` in the dialect that Hugging Face's templates are written in. Where
//! a file has no template, or one that does not run, llama.cpp's built-in templates stand in.

mod jinja;

use serde_json::{Map, Value};

use crate::{
    ggml,
    vocab::{Token, Vocab, VocabError},
};

/// What can go wrong while a conversation is formatted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The template does not parse or run, and no built-in template fits.
    #[error("the chat template fails: {0}")]
    Template(String),
    /// The template refuses this conversation, for instance because the roles do not alternate.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template takes more steps than a conversation of this size can need.
    #[error("the chat template does not come to an end")]
    Endless,
    /// There is no built-in template of this name.
    #[error("no built-in chat template is called {0}")]
    UnknownTemplate(String),
    /// The prompt could not be turned into tokens.
    #[error(transparent)]
    Vocab(#[from] VocabError),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: "system", "user" or "assistant" in most templates, "tool" for what a tool answers, "developer" in
    /// some.
    pub role: String,
    /// What is said, thinking blocks included as the model wrote them: what becomes of those is the template's to say.
    pub content: String,
    /// What the model's template knows of a message besides: `tool_calls`, `tool_call_id`, `name`,
    /// `reasoning_content`, `thinking`. Built-in templates know nothing of them.
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

/// How a conversation is rendered.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RenderOptions {
    /// Adds what opens the assistant's next answer.
    pub add_generation_prompt: bool,
    /// The tools that the model may call, as JSON descriptions (`{"type": "function", "function": {…}}`).
    pub tools: Vec<Value>,
    /// Further variables of the template, such as `enable_thinking` or `reasoning_effort`.
    pub variables: Map<String, Value>,
}

/// A template that turns a conversation into a prompt.
///
/// ```
/// use simlayer::chat::{ChatTemplate, Message};
///
/// let template = ChatTemplate::builtin("chatml")?;
/// let prompt = template.render(&[Message::new("user", "Hello")], true)?;
/// assert_eq!(prompt, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n");
/// # Ok::<(), simlayer::chat::ChatError>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: Source,
    bos: String,
    eos: String,
}

#[derive(Debug, Clone)]
enum Source {
    Jinja(String),
    Builtin(String),
}

impl ChatTemplate {
    /// The template of a model: its file's own, or ChatML where it has none.
    pub fn new(template: Option<&str>, vocab: &Vocab) -> ChatTemplate {
        let name = |token: Option<Token>| token.map(|token| vocab.name(token)).unwrap_or_default();
        match template {
            Some(template) => ChatTemplate::jinja(template, &name(vocab.bos()), &name(vocab.eos())),
            None => ChatTemplate { source: Source::Builtin("chatml".to_owned()), ..ChatTemplate::jinja("", "", "") },
        }
    }

    /// A Jinja template, with the texts that stand for BOS and EOS in it.
    pub fn jinja(template: &str, bos: &str, eos: &str) -> ChatTemplate {
        ChatTemplate { source: Source::Jinja(template.to_owned()), bos: bos.to_owned(), eos: eos.to_owned() }
    }

    /// One of llama.cpp's built-in templates.
    ///
    /// # Errors
    /// [`ChatError::UnknownTemplate`]; [`ChatTemplate::builtin_names`] has the names.
    pub fn builtin(name: &str) -> Result<ChatTemplate, ChatError> {
        if !ChatTemplate::builtin_names().iter().any(|known| known == name) {
            return Err(ChatError::UnknownTemplate(name.to_owned()));
        }
        Ok(ChatTemplate { source: Source::Builtin(name.to_owned()), bos: String::new(), eos: String::new() })
    }

    /// The names of llama.cpp's built-in templates.
    pub fn builtin_names() -> Vec<String> {
        ggml::builtin_chat_templates()
    }

    /// The conversation as one text. `add_generation_prompt` adds what opens the assistant's next answer.
    ///
    /// A template that knows no system message gets it as the beginning of the first user message.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        self.render_with(messages, &RenderOptions { add_generation_prompt, ..RenderOptions::default() })
    }

    /// As [`ChatTemplate::render`], with tools and whatever else the template knows.
    ///
    /// # Errors
    /// [`ChatError::Refused`] when the template itself raises an error, [`ChatError::Endless`] when it runs without
    /// end, [`ChatError::Template`] when it is broken and no built-in template is like it.
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions) -> Result<String, ChatError> {
        let add_generation_prompt = options.add_generation_prompt;
        let template = match &self.source {
            Source::Builtin(name) => return render_builtin(name, messages, add_generation_prompt),
            Source::Jinja(template) => template,
        };
        let render = |messages: &[Message]| jinja::render(template, &self.bos, &self.eos, messages, options);
        match render(messages) {
            Err(ChatError::Refused(reason)) => match merge_system(messages) {
                Some(merged) => render(&merged).map_err(|_| ChatError::Refused(reason)),
                None => Err(ChatError::Refused(reason)),
            },
            // What is known of the template by its look may still be enough.
            Err(ChatError::Template(reason)) => {
                render_builtin(template, messages, add_generation_prompt).map_err(|_| ChatError::Template(reason))
            }
            result => result,
        }
    }

    /// The tokens of a rendered conversation, with BOS in front exactly once where the model asks for it, whether the
    /// template writes it or not.
    ///
    /// # Errors
    /// [`ChatError::Vocab`].
    pub fn tokenize(&self, vocab: &Vocab, prompt: &str) -> Result<Vec<Token>, ChatError> {
        let mut tokens = vocab.tokenize(prompt, false, true)?;
        if let Some(bos) = vocab.bos()
            && vocab.adds_bos()
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }
}

fn render_builtin(template: &str, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
    let messages: Vec<_> = messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect();
    ggml::builtin_chat_template(template, &messages, add_generation_prompt).map_err(ChatError::Template)
}

/// The conversation with its system message in front of the first user message; `None` where it does not begin so.
fn merge_system(messages: &[Message]) -> Option<Vec<Message>> {
    match messages {
        [system, user, rest @ ..] if system.role == "system" && user.role == "user" => {
            let content = format!("{}\n\n{}", system.content, user.content);
            let first = Message { content, ..user.clone() };
            Some(std::iter::once(first).chain(rest.iter().cloned()).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
