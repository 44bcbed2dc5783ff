//! Commands that measure: speed, and what laziness costs.

use std::{path::PathBuf, str::FromStr};

use clap::{ArgAction, Args, ValueEnum};
use simlayer::{
    lazy::Target,
    quality::{Contender, ParseContenderError},
};

use super::{model::CommonArgs, output::OutputArgs, text::PromptArgs, values::positive};

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Prompt lengths to read; 0 for none
    #[arg(
        help_heading = "Tests",
        short,
        long,
        alias = "n-prompt",
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "512"
    )]
    pub prompt: Vec<usize>,
    /// Numbers of tokens to generate; 0 for none
    #[arg(
        help_heading = "Tests",
        short = 'n',
        long,
        alias = "n-gen",
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "128"
    )]
    pub r#gen: Vec<usize>,
    /// Tokens that are in the context before the measured part
    #[arg(
        help_heading = "Tests",
        short,
        long,
        alias = "n-depth",
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "0"
    )]
    pub depth: Vec<usize>,
    /// Conversations that go on at once, a token of each in a step; speeds are those of all together
    #[arg(help_heading = "Tests", long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub sequences: usize,
    /// Repetitions of each test
    #[arg(help_heading = "Tests", short, long, alias = "repetitions", value_name = "N", default_value_t = 5, value_parser = positive)]
    pub reps: usize,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Draw the scores into a file (.svg or .png)
    #[arg(help_heading = "Output", long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// The text; - for stdin
    #[arg(help_heading = "Text", short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// First tokens of the text (or of each chunk), which are read as a prompt and not scored [default: half]
    #[arg(help_heading = "Text", long, value_name = "K", value_parser = positive)]
    pub skip: Option<usize>,
    /// Next tokens, which are scored [default: all that follow, as far as the context goes]
    #[arg(help_heading = "Text", long, value_name = "N", value_parser = positive)]
    pub score: Option<usize>,
    /// Chunks of K + N tokens to take from the text, each with a fresh context, as llama-perplexity does
    #[arg(help_heading = "Text", long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub chunks: usize,
    /// Scored tokens to feed at once: 1 is what decoding does, more is faster
    #[arg(help_heading = "Text", long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub score_batch: usize,
    /// Compare with the uncompressed run: KL divergence, and how often both prefer the same token
    #[arg(help_heading = "Text", long)]
    pub kl: bool,
    /// Score the text under this rule instead of --lazy, with --kl; RULE@K/V has these types in active layers
    /// (off@q8_0/q4_0), and more after plus signs (+prune, +lazy:K/V, +window:N, +rescue:M); may be given several times, and the
    /// uncompressed run is made once
    #[arg(help_heading = "Text", long, value_name = "RULE", action = ArgAction::Append, conflicts_with = "chunks")]
    pub compare: Vec<Contender>,
    /// Draw what --compare measured into a file (.svg or .png): memory and divergence
    #[arg(help_heading = "Output", long, value_name = "FILE", requires = "compare")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Args)]
pub struct PasskeyArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Lengths of the texts, in tokens
    #[arg(help_heading = "Needles", long, value_name = "N,...", value_delimiter = ',', default_value = "1024,2048,4096", value_parser = positive)]
    pub lengths: Vec<usize>,
    /// Where the answers are hidden, in percent of the text
    #[arg(
        help_heading = "Needles",
        long,
        value_name = "P,...",
        value_delimiter = ',',
        default_value = "0,25,50,75,100"
    )]
    pub depths: Vec<f64>,
    /// Answers asked for at each length and depth
    #[arg(help_heading = "Needles", long, value_name = "N", default_value_t = 20, value_parser = positive)]
    pub trials: usize,
    /// What is hidden: one number in a text, or many with different keys; variables of a program, made-up words, facts told
    /// in a conversation
    #[arg(help_heading = "Needles", long, value_name = "KIND", default_value = "multi")]
    pub variant: Variant,
    /// When the questions come: after the text was read and layers became lazy, or as the end of the prompt
    #[arg(help_heading = "Needles", long, value_name = "WHEN", default_value = "after")]
    pub ask: AskWhen,
    /// Seed of the made-up text
    #[arg(help_heading = "Needles", short, long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Also run with the full cache, with all layers lazy (StreamingLLM), and with q4_0 in all layers; with RULE, or
    /// RULE@K/V (off@q8_0/q4_0) and more after plus signs (+prune, +lazy:K/V, +window:N, +rescue:M), run under that instead of --lazy,
    /// may be given several times
    #[arg(help_heading = "Needles", long, value_name = "RULE", action = ArgAction::Append, num_args = 0..=1,
          default_missing_value = "")]
    pub compare: Vec<Compare>,
    /// Draw heat maps into a file (.svg or .png)
    #[arg(help_heading = "Output", long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    Single,
    Multi,
    Variables,
    Definition,
    Turns,
}

impl Variant {
    pub fn name(self) -> &'static str {
        match self {
            Variant::Single => "single",
            Variant::Multi => "multi",
            Variant::Variables => "variables",
            Variant::Definition => "definition",
            Variant::Turns => "turns",
        }
    }
}

/// When a text's questions are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AskWhen {
    After,
    Prompt,
}

impl AskWhen {
    pub fn name(self) -> &'static str {
        match self {
            AskWhen::After => "after",
            AskWhen::Prompt => "prompt",
        }
    }
}

/// What `passkey` compares with.
#[derive(Debug, Clone, PartialEq)]
pub enum Compare {
    /// `--compare` alone.
    Usual,
    Rule(Contender),
}

impl FromStr for Compare {
    type Err = ParseContenderError;

    fn from_str(text: &str) -> Result<Compare, ParseContenderError> {
        match text {
            "" => Ok(Compare::Usual),
            rule => rule.parse().map(Compare::Rule),
        }
    }
}

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// A text of some thousand tokens, of the kind that the model will read; - for stdin [default: a built-in one]
    #[arg(help_heading = "Text", short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Tokens of each excerpt's prompt: text, and notes that fill it [default: 8000, or what the context holds]
    #[arg(help_heading = "Text", long, value_name = "K", value_parser = positive)]
    pub skip: Option<usize>,
    /// The text's next tokens, on which harm is measured [default: 160]
    #[arg(help_heading = "Text", long, value_name = "N", value_parser = positive)]
    pub score: Option<usize>,
    /// Excerpts to take from the text [default: 2 of a long text]
    #[arg(help_heading = "Text", long, value_name = "N", value_parser = positive)]
    pub chunks: Option<usize>,
    /// Questions about notes in each prompt, on whose answers harm is measured, too; 0 reads the text alone
    #[arg(help_heading = "Text", long, value_name = "N", default_value_t = 8)]
    pub questions: usize,
    /// Also look for windows of their own for the lazy layers, where these cost less at equal memory
    #[arg(help_heading = "Text", long, value_name = "N,...", value_delimiter = ',', num_args = 0..=1,
          default_missing_value = "256,512,1024,2048", value_parser = positive)]
    pub windows: Option<Vec<usize>>,
    /// Fit the map that --prune goes by, and nothing else: pieces of the text are read and repeated (--chunks of them)
    #[arg(help_heading = "Text", long, conflicts_with_all = ["skip", "score", "windows"])]
    pub fit_prune: bool,
    /// Choose layers, types, window, pruned and rescued rows for this many times less memory (12x), or for this harm (kl=0.01),
    /// and write that into the model's profile, for --lazy profile:12x; may be given several times
    #[arg(help_heading = "Text", long, value_name = "GOAL", action = ArgAction::Append, value_parser = goal,
          conflicts_with_all = ["windows", "fit_prune"])]
    pub target: Vec<Target>,
    /// Where to write the profile, or the map [default: a file of its own in the user's folder of profiles, which $SIMLAYER_PROFILES
    /// names]
    #[arg(help_heading = "Output", short = 'o', long = "output", value_name = "FILE")]
    pub output_file: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What a cache is made for.
fn goal(text: &str) -> Result<Target, String> {
    match text.parse() {
        Ok(target @ (Target::Kl(_) | Target::Times(_))) => Ok(target),
        _ => Err("it must be how many times smaller, as in 12x, or a harm, as in kl=0.01".to_owned()),
    }
}
