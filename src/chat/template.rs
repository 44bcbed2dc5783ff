//! A model's chat template, or a built-in one: from messages to text, and from text to tokens.

use serde_json::{Map, Value};

use super::{
    ChatError, Message,
    faithful::{self, Conversation},
    jinja,
};
use crate::{
    ggml,
    vocab::{AddBos, Special, Token, Vocab},
};

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
    /// The template of a model: its file's own, or ChatML where that has none or an empty one
    /// ([`ChatTemplate::is_builtin`] tells).
    pub fn new(template: Option<&str>, vocab: &Vocab) -> ChatTemplate {
        let name = |token: Option<Token>| token.map(|token| vocab.name(token)).unwrap_or_default();
        match template {
            None | Some("") => {
                ChatTemplate { source: Source::Builtin("chatml".to_owned()), ..ChatTemplate::jinja("", "", "") }
            }
            Some(template) => ChatTemplate::jinja(template, &name(vocab.bos()), &name(vocab.eos())),
        }
    }

    /// Whether this is one of llama.cpp's built-in templates.
    pub fn is_builtin(&self) -> bool {
        matches!(self.source, Source::Builtin(_))
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
    /// A template that knows no system message gets it as the beginning of the next user message; one that walks typed
    /// parts gets text as a list of one part.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        self.render_with(messages, &RenderOptions { add_generation_prompt, ..RenderOptions::default() })
    }

    /// As [`ChatTemplate::render`], with tools and whatever else the template knows.
    ///
    /// Thinking (`reasoning_content`, `thinking`) that a template leaves out is no loss: most do so on purpose.
    ///
    /// # Errors
    /// [`ChatError::Lost`] when the template would pass over a text, a tool or a call, [`ChatError::Refused`] when it
    /// raises an error itself, [`ChatError::Endless`] when it runs without end, [`ChatError::Template`] when it is
    /// broken and no built-in template is like it, or that would lose something.
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions) -> Result<String, ChatError> {
        let conversation = conversation(messages, options);
        let template = match &self.source {
            Source::Builtin(name) => {
                return match builtin_losses(&conversation, &Map::new()) {
                    Some(lost) => Err(ChatError::Lost(lost)),
                    None => render_builtin(name, &conversation),
                };
            }
            Source::Jinja(template) => template,
        };
        let render = |conversation: &Conversation| {
            jinja::render(template, &self.bos, &self.eos, conversation, &options.variables)
        };
        match faithful::render(&conversation, &render) {
            // What is known of the template by its look may still be enough.
            Err(ChatError::Template(reason)) => match builtin_losses(&conversation, &options.variables) {
                Some(lost) => {
                    let instead = "the built-in template that is most like it would lose";
                    Err(ChatError::Template(format!("{reason}; {instead} {lost}")))
                }
                None => render_builtin(template, &conversation).map_err(|_| ChatError::Template(reason)),
            },
            result => result,
        }
    }

    /// The tokens of a rendered conversation, with BOS in front exactly once where the model asks for it, whether the
    /// template writes it or not.
    ///
    /// # Errors
    /// [`ChatError::Vocab`].
    pub fn tokenize(&self, vocab: &Vocab, prompt: &str) -> Result<Vec<Token>, ChatError> {
        let mut tokens = vocab.tokenize(prompt, AddBos::No, Special::Parse)?;
        if let Some(bos) = vocab.bos()
            && vocab.adds_bos()
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }
}

/// The messages as templates see them.
pub(super) fn conversation(messages: &[Message], options: &RenderOptions) -> Conversation {
    let object = |message: &Message| {
        let own = [("role", &message.role), ("content", &message.content)];
        let own = own.into_iter().map(|(name, text)| (name.to_owned(), Value::from(text.as_str())));
        own.chain(message.fields.clone()).collect()
    };
    Conversation {
        messages: messages.iter().map(object).collect(),
        tools: options.tools.clone(),
        add_generation_prompt: options.add_generation_prompt,
    }
}

/// What built-in templates cannot say, since they know roles and texts only.
fn builtin_losses(conversation: &Conversation, variables: &Map<String, Value>) -> Option<String> {
    let fields = conversation.messages.iter().flat_map(Map::keys);
    let fields =
        fields.filter(|field| !["role", "content"].contains(&field.as_str())).map(|field| match field.as_str() {
            "tool_calls" => "tool calls".to_owned(),
            field => format!("the field {field}"),
        });
    let tools = (!conversation.tools.is_empty()).then(|| "the tools".to_owned());
    let variables = variables.keys().map(|name| format!("the variable {name}"));
    let mut lost: Vec<String> = Vec::new();
    for what in tools.into_iter().chain(fields).chain(variables) {
        if !lost.contains(&what) {
            lost.push(what);
        }
    }
    (!lost.is_empty()).then(|| lost.join(", "))
}

fn render_builtin(template: &str, conversation: &Conversation) -> Result<String, ChatError> {
    faithful::render(conversation, &|conversation| {
        let text = |message: &Map<String, Value>, field: &str| {
            let text = message.get(field).and_then(Value::as_str).map(str::to_owned);
            text.ok_or_else(|| ChatError::Template(format!("built-in chat templates take {field} as text only")))
        };
        let messages: Vec<(String, String)> = conversation
            .messages
            .iter()
            .map(|message| Ok((text(message, "role")?, text(message, "content")?)))
            .collect::<Result<_, ChatError>>()?;
        let messages: Vec<_> = messages.iter().map(|(role, content)| (role.as_str(), content.as_str())).collect();
        ggml::builtin_chat_template(template, &messages, conversation.add_generation_prompt)
            .map_err(ChatError::Template)
    })
}
