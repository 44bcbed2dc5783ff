//! Conversations to prompts, by the chat template that a model's file carries.
//!
//! The template is Jinja, rendered by `minijinja` in the dialect that Hugging Face's templates are written in. Where
//! a file has no template, or one that does not run, llama.cpp's built-in templates stand in. Nothing is lost without an
//! error: what a template passes over it gets in another form, or the error says what it is.

mod error;
mod faithful;
mod fuel;
mod jinja;
mod json;
mod message;
mod template;
mod value;

pub use error::ChatError;
pub use message::Message;
pub use template::{ChatTemplate, RenderOptions};

#[cfg(test)]
mod tests;
