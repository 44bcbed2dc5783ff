//! Conversations to prompts, by the chat template that a model's file carries.
//!
//! The template is Jinja, rendered by `minijinja` in the dialect that Hugging Face's templates are written in. Where
//! a file has no template, or one that does not run, llama.cpp's built-in templates stand in. Nothing is lost without an
//! error: what a template passes over it gets in another form, or the error says what it is.
//!
//! With the feature `serve`, `ChatFormat` says how a model is told of tools, and reads calls and thoughts out of what it
//! answers; `json_schema_to_grammar` holds an answer to a JSON schema. Both are llama.cpp's own code.

mod error;
mod faithful;
#[cfg(feature = "serve")]
mod format;
mod fuel;
mod jinja;
mod json;
mod message;
#[cfg(feature = "serve")]
mod schema;
mod template;
mod value;

pub use error::ChatError;
#[cfg(feature = "serve")]
pub use error::FormatError;
#[cfg(feature = "serve")]
pub use format::{
    Answer, AnswerDelta, AnswerStream, ChatFormat, ChatRequest, Prepared, ReasoningFormat, ToolCall, ToolCallDelta,
    ToolChoice,
};
pub use message::Message;
#[cfg(feature = "serve")]
pub use schema::json_schema_to_grammar;
pub use template::{ChatTemplate, RenderOptions};

#[cfg(all(test, feature = "serve"))]
mod format_tests;
#[cfg(test)]
mod tests;
