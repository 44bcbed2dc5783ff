//! The chat template that a command uses: one that the command line names, else the model's own.

use simlayer::{Model, chat::ChatTemplate};

use crate::{args::TemplateArgs, failure::Failure, options};

/// What the command line names, read before the model is.
pub struct NamedTemplate {
    builtin: Option<ChatTemplate>,
    from_file: Option<String>,
}

impl NamedTemplate {
    pub fn read(args: &TemplateArgs) -> Result<NamedTemplate, Failure> {
        let builtin = args.chat_template.as_deref().map(ChatTemplate::builtin).transpose().map_err(|error| {
            Failure::usage(format!("--chat-template: {error} (there are {})", ChatTemplate::builtin_names().join(", ")))
        })?;
        let utf8 = |path: &std::path::PathBuf| {
            let not_utf8 = |_| Failure::run(format!("{}: a chat template must be UTF-8", path.display()));
            String::from_utf8(options::read_file(path)?).map_err(not_utf8)
        };
        let from_file = args.chat_template_file.as_ref().map(utf8).transpose()?;
        Ok(NamedTemplate { builtin, from_file })
    }

    /// The template for a model, and its text, which is empty where llama.cpp's own code stands for it. Says so where there is
    /// none, and ChatML serves.
    pub fn for_model(self, model: &Model) -> Result<(ChatTemplate, String), Failure> {
        if let Some(template) = self.builtin {
            return Ok((template, String::new()));
        }
        let text = match &self.from_file {
            Some(text) => Some(&**text),
            None => model.chat_template()?,
        };
        let template = ChatTemplate::new(text, model.vocab());
        if template.is_builtin() {
            let which = if text.is_some() { "the chat template is empty" } else { "the file has no chat template" };
            eprintln!("{which}: messages are written as ChatML");
        }
        Ok((template, text.unwrap_or_default().to_owned()))
    }
}
