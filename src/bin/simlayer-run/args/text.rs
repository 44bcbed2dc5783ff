//! Commands that write text: what they are given, and how it becomes a conversation.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::{model::CommonArgs, output::OutputArgs, sampling::SamplingArgs};

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Tokens to generate at most; -1: until the model ends or the context is full
    #[arg(help_heading = "Text", short, long = "predict", alias = "n-predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_predict: i64,
    /// End the text where this comes (-r), which is not printed (may be given several times)
    #[arg(help_heading = "Text", long, value_name = "TEXT", action = ArgAction::Append, allow_hyphen_values = true)]
    pub reverse_prompt: Vec<String>,
    /// Print the prompt before the generated text
    #[arg(help_heading = "Text", long, overrides_with = "no_display_prompt")]
    pub display_prompt: bool,
    /// Print the generated text only (this is the default)
    #[arg(help_heading = "Text", long)]
    pub no_display_prompt: bool,
    /// Keep what was read of the prompt in this file, and go on from there where a prompt begins alike
    #[arg(help_heading = "Text", long, value_name = "FILE")]
    pub prompt_cache: Option<PathBuf>,
    /// Keep the answer there as well
    #[arg(help_heading = "Text", long)]
    pub prompt_cache_all: bool,
    /// Only go on from that file, and do not write it
    #[arg(help_heading = "Text", long, conflicts_with = "prompt_cache_all")]
    pub prompt_cache_ro: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// System message
    #[arg(
        help_heading = "Text",
        long,
        visible_alias = "system-prompt",
        value_name = "TEXT",
        allow_hyphen_values = true
    )]
    pub system: Option<String>,
    /// A file with the system message (-sysf)
    #[arg(help_heading = "Text", long, value_name = "FILE", conflicts_with = "system")]
    pub system_prompt_file: Option<PathBuf>,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Further variables of the chat template, as a JSON object: {"enable_thinking": false}
    #[arg(help_heading = "Text", long, value_name = "JSON", value_parser = json_object)]
    pub chat_template_kwargs: Option<JsonObject>,
    /// Leave after the first answer (-st)
    #[arg(help_heading = "Text", long)]
    pub single_turn: bool,
    #[command(flatten)]
    pub first: PromptArgs,
    /// Tokens of an answer at most; -1: until the model ends it or the context is full
    #[arg(help_heading = "Text", short, long = "predict", alias = "n-predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_predict: i64,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Text")]
pub struct PromptArgs {
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "file")]
    pub prompt: Option<String>,
    /// A file with the prompt; - for stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// As --file, with every byte of it (-bf): the last line break, too
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file"])]
    pub binary_file: Option<PathBuf>,
    /// Take \n, \t and the like in -p as they stand
    #[arg(long)]
    pub no_escape: bool,
    /// Replace \n, \t and the like in -p (this is the default)
    #[arg(short, long, overrides_with = "no_escape")]
    pub escape: bool,
}

#[derive(Debug, Args)]
pub struct TemplateArgs {
    /// Use one of llama.cpp's built-in chat templates instead of the file's own
    #[arg(help_heading = "Text", long, value_name = "NAME")]
    pub chat_template: Option<String>,
    /// Use the chat template in this file (Jinja) instead of the model's own
    #[arg(help_heading = "Text", long, value_name = "FILE", conflicts_with = "chat_template")]
    pub chat_template_file: Option<PathBuf>,
}

/// Names with values, for a template.
#[derive(Debug, Clone, PartialEq)]
pub struct JsonObject(pub serde_json::Map<String, serde_json::Value>);

pub(super) fn json_object(text: &str) -> Result<JsonObject, String> {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => Ok(JsonObject(map)),
        Ok(_) => Err("it must be a JSON object, such as {\"enable_thinking\": false}".to_owned()),
        Err(error) => Err(format!("it is no JSON: {error}")),
    }
}
