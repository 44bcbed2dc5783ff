//! The command line as it is typed. Names and meanings are llama.cpp's where it has the option.

use std::{path::PathBuf, str::FromStr};

use clap::{ArgAction, ArgGroup, Args, Subcommand, ValueEnum};
use simlayer::{
    ggml::Type,
    gguf::Override,
    lazy::{LayerWindows, Policy, Prune},
    quality::{Contender, ParseContenderError},
    sampling::SamplerStep,
};

use crate::build::LONG_VERSION;

/// Stands for the model where none was given and none is needed.
pub const NO_MODEL: &str = "-";

/// The whole command line. Options without a command's name are those of generation.
pub fn command_line() -> clap::Command {
    let command = GenerateArgs::augment_args(clap::Command::new("simlayer-run"));
    let mut command = Command::augment_subcommands(command.group(which_model()))
        .version(env!("CARGO_PKG_VERSION"))
        .long_version(LONG_VERSION)
        .about("Run GGUF models with a KV cache that shrinks where it can")
        .long_about(
            "Run GGUF models with a KV cache that shrinks where it can.\n\n\
             Without a command it continues the text given by -p or -f.",
        )
        .subcommand_negates_reqs(true)
        // As with llama.cpp, the last one counts where an option is given twice.
        .args_override_self(true)
        .max_term_width(110);
    let takes_model = |command: &clap::Command| command.get_arguments().any(|arg| arg.get_id() == "ctx_size");
    let names: Vec<String> =
        command.get_subcommands().filter(|of| takes_model(of)).map(|of| of.get_name().to_owned()).collect();
    // Of devices only a plan needs a model, which it says itself.
    for name in names.into_iter().filter(|name| name != "devices") {
        command = command.mut_subcommand(name, |of| of.group(which_model()));
    }
    command
}

/// What says where the model is: one of these must be there.
fn which_model() -> ArgGroup {
    let group = ArgGroup::new("which_model").arg("model").required(true).multiple(true);
    #[cfg(feature = "download")]
    let group = group.args(["hf_repo", "model_url"]);
    group
}

#[derive(Debug, Subcommand)]
pub enum Command {
    #[command(skip)]
    Generate(GenerateArgs),
    /// Hold a conversation in the terminal
    Chat(ChatArgs),
    /// Measure the speed of prefill and decoding
    Bench(BenchArgs),
    /// Score each layer on a prompt, and say what would be kept
    Inspect(InspectArgs),
    /// Measure how well the model predicts a text, and what laziness costs there
    Perplexity(PerplexityArgs),
    /// Hide secret numbers in made-up text and ask for them
    Passkey(PasskeyArgs),
    /// Measure which layers can become lazy with the least harm, and write the model's profile
    Calibrate(CalibrateArgs),
    /// List the devices that there are, and say what would go where
    Devices(DevicesArgs),
    /// Lend this machine's devices to others, for their --rpc
    #[cfg(feature = "rpc")]
    RpcServer(RpcServerArgs),
    /// Serve the model over HTTP: OpenAI's API, llama-server's, Anthropic's and Ollama's
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
    /// Say what is installed here: builds, devices, and which frontends would run on simlayer
    Doctor(DoctorArgs),
    /// Print shell completions
    Completions(CompletionsArgs),
}

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
    /// (off@q8_0/q4_0); may be given several times, and the uncompressed run is made once
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
    /// RULE@K/V (off@q8_0/q4_0), run under that instead of --lazy, may be given several times
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
    /// Where to write the profile, or the map [default: a file of its own in the user's folder of profiles, which $SIMLAYER_PROFILES
    /// names]
    #[arg(help_heading = "Output", short = 'o', long = "output", value_name = "FILE")]
    pub output_file: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Args)]
pub struct DevicesArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Say what of the model and of a full context would be on each device, and how long a context would fit
    #[arg(help_heading = "Output", long)]
    pub plan: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// llama.cpp's rpc-server has these options.
#[cfg(feature = "rpc")]
#[derive(Debug, Args)]
pub struct RpcServerArgs {
    /// Address to listen at. The protocol has no authentication: beyond loopback, anybody who reaches the port can use
    /// the devices and read what is in them
    #[arg(short = 'H', long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen at
    #[arg(short, long, value_name = "PORT", default_value_t = 50052, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// Memory that each device lends at most, in MiB [default: all that it has]
    #[arg(short, long, value_name = "MIB", value_parser = positive)]
    pub mem: Option<usize>,
    /// Threads of the processor [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Devices to lend [default: all but the processor, or the processor where there is no other]
    #[arg(short, long, value_name = "DEV,...", value_delimiter = ',')]
    pub device: Vec<String>,
    /// Keep large weights in this folder, so that they need not be sent again
    #[arg(short, long, value_name = "FOLDER")]
    pub cache: Option<PathBuf>,
}

#[cfg(feature = "serve")]
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Address to listen at, a path ending in .sock for a Unix socket
    #[arg(help_heading = "Server", long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen at; 0 takes a free one, which the log names
    #[arg(help_heading = "Server", long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Keys of which clients must send one (Authorization: Bearer KEY, or x-api-key)
    #[arg(help_heading = "Server", long, value_name = "KEY,...", value_delimiter = ',', action = ArgAction::Append)]
    pub api_key: Vec<String>,
    /// A file with such keys, one a line; lines that begin with # are comments
    #[arg(help_heading = "Server", long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// The model's name for clients, several by commas [default: the file's name]
    #[arg(help_heading = "Server", long, value_name = "NAME,...", value_delimiter = ',')]
    pub alias: Vec<String>,
    /// Pages of other hosts whose scripts may call the server, as Origin headers name them, or * for all [default: none]
    #[arg(help_heading = "Server", long, value_name = "ORIGIN,...", value_delimiter = ',')]
    pub cors_origins: Vec<String>,
    /// Memory for the caches of all conversations together: 4G, 512M
    #[arg(help_heading = "Server", long, value_name = "BYTES", default_value = "4G", value_parser = bytes)]
    pub kv_mem: usize,
    /// A folder for the conversations that nobody is answered in: they are found there again when their memory was needed for
    /// others, and after a restart
    #[arg(help_heading = "Server", long, value_name = "DIR")]
    pub kv_disk: Option<PathBuf>,
    /// What they may take there; the ones that were not used for longest go first
    #[arg(help_heading = "Server", long, value_name = "BYTES", default_value = "20G", value_parser = bytes, requires = "kv_disk")]
    pub kv_disk_mem: usize,
    /// Conversations that are answered at the same time (-np); others wait
    #[arg(help_heading = "Server", long, value_name = "N", default_value_t = 16, value_parser = parallel, allow_negative_numbers = true)]
    pub parallel: usize,
    /// Requests that may wait; more are refused with 503
    #[arg(help_heading = "Server", long, value_name = "N", default_value_t = 256, value_parser = positive)]
    pub queue: usize,
    /// Seconds that a client may take to send a request, or to take what it is sent (-to)
    #[arg(help_heading = "Server", long, value_name = "SECONDS", default_value_t = 60, value_parser = positive)]
    pub timeout: usize,
    /// Seconds after which a silent stream is given a comment, so that it is not taken for dead; -1: never
    #[arg(help_heading = "Server", long, value_name = "SECONDS", default_value_t = 30, allow_negative_numbers = true)]
    pub sse_ping_interval: i64,
    /// Largest body of a request
    #[arg(help_heading = "Server", long, value_name = "BYTES", default_value = "16M", value_parser = bytes)]
    pub max_body: usize,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Further variables of the chat template, as a JSON object, for requests that give no others
    #[arg(help_heading = "Text", long, value_name = "JSON", value_parser = json_object)]
    pub chat_template_kwargs: Option<JsonObject>,
    /// Tokens of an answer at most, where a request does not say; -1: until the model ends it or the context is full
    #[arg(help_heading = "Text", short, long = "predict", alias = "n-predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_predict: i64,
    /// What requests that do not say otherwise get
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// What every command that runs a model takes.
#[derive(Debug, Args)]
pub struct CommonArgs {
    /// Model file (GGUF); of a split model the first file
    #[arg(short, long, value_name = "FILE", default_value = NO_MODEL, hide_default_value = true)]
    pub model: PathBuf,
    #[cfg(feature = "download")]
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Tokens that the context holds; 0: as many as the model was trained for
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub ctx_size: usize,
    /// Tokens that are handed over at once
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    pub batch_size: usize,
    /// Tokens that are computed at once (-ub)
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub ubatch_size: usize,
    /// Threads for decoding [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Threads for reading prompts (-tb) [default: as for decoding]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads_batch: Option<usize>,
    /// Last layers to put on devices, the output counting as one: a number, auto or all (-ngl) [default: all]
    #[arg(long, alias = "n-gpu-layers", value_name = "N", value_parser = gpu_layers, allow_negative_numbers = true)]
    pub gpu_layers: Option<GpuLayers>,
    /// Devices to use besides the processor, or none (-dev) [default: all; see the command devices]
    #[arg(long, value_name = "DEV,...", value_delimiter = ',')]
    pub device: Vec<String>,
    /// How to share the layers out over the devices: 3,1 (-ts) [default: by their free memory]
    #[arg(long, value_name = "N,...", value_parser = tensor_split)]
    pub tensor_split: Option<Split>,
    /// How layers are shared out: layer, or none for all on one device, --main-gpu (-sm)
    #[arg(long, value_name = "none|layer", default_value = "layer", value_parser = split_mode, hide_possible_values = true)]
    pub split_mode: SplitMode,
    /// The device for --split-mode none, by its number among the devices in use (-mg)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub main_gpu: usize,
    /// Have tensors whose names match a pattern on a device, wherever their layers are (-ot): \.ffn_.*_exps=CPU
    #[arg(long, value_name = "PATTERN=DEV,...", value_delimiter = ',', action = ArgAction::Append, value_parser = tensor_override)]
    pub override_tensor: Vec<(String, String)>,
    /// Keep all experts with the processor (-cmoe)
    #[arg(long)]
    pub cpu_moe: bool,
    /// Keep the experts of the first N layers with the processor (-ncmoe)
    #[arg(long, value_name = "N")]
    pub n_cpu_moe: Option<usize>,
    /// Keep the feed-forward matrices of the first N layers that have no experts with the processor (-ncffn)
    #[arg(long, value_name = "N")]
    pub n_cpu_ffn: Option<usize>,
    /// Send no weights of the processor's to devices for products of many tokens
    #[arg(long, overrides_with = "op_offload")]
    pub no_op_offload: bool,
    /// Send them there where the device wants it, the default
    #[arg(long, hide = true)]
    pub op_offload: bool,
    /// Fit what is not given to the devices' free memory: the context, and what of layers and experts is on devices (-fit)
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_value = "on", default_missing_value = "on", value_parser = on_or_off, hide_possible_values = true)]
    pub fit: OnOrOff,
    /// MiB that --fit leaves free on each device, for what is computed with (-fitt)
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', default_value = "1024")]
    pub fit_target: Vec<usize>,
    /// Tokens below which --fit makes no context (-fitc)
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positive)]
    pub fit_ctx: usize,
    /// Servers whose devices to use as well: rpc-server's, here or of llama.cpp
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub rpc: Vec<String>,
    /// Flash attention (-fa)
    #[arg(long, value_name = "on|off|auto", num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_parser = flash_attn, hide_possible_values = true)]
    pub flash_attn: FlashAttn,
    /// Type of the keys in the cache, in active layers (-ctk); auto: q8_0, and q4_0 in layers that lose nothing by it, as
    /// found at the prompt's end [default: f16, and auto where the values are quantised]
    #[arg(long, value_name = "TYPE", value_parser = key_type)]
    pub cache_type_k: Option<KeyType>,
    /// Type of the values in the cache, in active layers (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: Type,
    /// Give keys of the file other values: KEY=int:N, float:X, bool:true or str:TEXT (may be given several times)
    #[arg(long, value_name = "KEY=TYPE:VALUE,...", value_delimiter = ',', action = ArgAction::Append, value_parser = key_override)]
    pub override_kv: Vec<(String, Override)>,
    /// How RoPE is stretched: none, linear or yarn [default: the file's]
    #[arg(long, value_name = "KIND", value_parser = ["none", "linear", "yarn"])]
    pub rope_scaling: Option<String>,
    /// How far RoPE is stretched [default: the file's]
    #[arg(long, value_name = "N", value_parser = factor)]
    pub rope_scale: Option<f64>,
    /// The same, as 1/N
    #[arg(long, value_name = "N", value_parser = factor, conflicts_with = "rope_scale")]
    pub rope_freq_scale: Option<f64>,
    /// RoPE's base frequency [default: the file's]
    #[arg(long, value_name = "N", value_parser = factor)]
    pub rope_freq_base: Option<f64>,
    /// Context that the model was trained with before YaRN [default: the file's]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub yarn_orig_ctx: Option<usize>,
    /// Leave weights as the file has them, where they would be repacked for ggml's kernels (-nr)
    #[arg(long)]
    pub no_repack: bool,
    /// Where threads run on machines with several memory nodes: spread over all (distribute), on the node of the start
    /// (isolate), or where numactl says
    #[arg(long, value_name = "HOW")]
    pub numa: Option<Numa>,
    /// LoRA adapters of the model (GGUF), several by commas or by repeating the option
    #[arg(long, value_name = "FILE,...", value_delimiter = ',')]
    pub lora: Vec<PathBuf>,
    /// As --lora, each multiplied by a number of one's own
    #[arg(long, value_name = "FILE:SCALE,...", value_delimiter = ',', value_parser = scaled_lora)]
    pub lora_scaled: Vec<(PathBuf, f32)>,
    /// Tell more on stderr
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    pub lazy: LazyFlags,
}

/// A model that is not here yet.
#[cfg(feature = "download")]
#[derive(Debug, Args)]
pub struct DownloadArgs {
    /// Fetch the model from this repository, if it is not in the cache that other programs share (-hf) [default QUANT:
    /// Q4_K_M, or what there is]
    #[arg(long, value_name = "USER/MODEL[:QUANT]", conflicts_with = "model_url")]
    pub hf_repo: Option<String>,
    /// The file's name in that repository (-hff)
    #[arg(long, value_name = "FILE")]
    pub hf_file: Option<String>,
    /// Who fetches (-hft) [default: what other programs have kept]
    #[arg(long, value_name = "TOKEN", hide_default_value = true)]
    pub hf_token: Option<String>,
    /// Fetch the model from this address, into --model or else llama.cpp's cache (-mu)
    #[arg(long, value_name = "URL")]
    pub model_url: Option<String>,
    /// Fetch nothing: take what was fetched before
    #[arg(long)]
    pub offline: bool,
}

/// Where threads run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Numa {
    Distribute,
    Isolate,
    Numactl,
}

/// What the keys are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyType {
    Auto,
    Of(Type),
}

/// Which layers become lazy, and what they keep.
#[derive(Debug, Args)]
#[command(next_help_heading = "Lazy layers")]
pub struct LazyFlags {
    /// Which layers become lazy: auto, `kl[:X]`, `threshold[:τ]`, `budget[:ρ]`, `output[:ρ]`, `profile[:ρ|:kl=X]`, layers:1,2,... or off
    #[arg(long, value_name = "RULE", default_value = "auto")]
    pub lazy: Policy,
    /// A profile of the model, made by calibrate [default: MODEL.simlayer.toml beside the model, else the model's in the
    /// user's folder of profiles, which $SIMLAYER_PROFILES names, else the one built in]
    #[arg(long, value_name = "FILE")]
    pub lazy_profile: Option<PathBuf>,
    /// First tokens that a lazy layer keeps
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub lazy_sink: usize,
    /// Recent tokens that a lazy layer keeps
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = positive)]
    pub lazy_window: usize,
    /// Tokens that layers with a window keep beyond it: as many of the newest can be taken back without reading again
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub lazy_slack: usize,
    /// Other windows for single layers, as 3=256,9-12=2048 [default: those of the profile, with its --lazy-window]
    #[arg(long, value_name = "LAYERS=N,...")]
    pub lazy_windows: Option<LayerWindows>,
    /// Last prompt tokens whose attention is scored
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive)]
    pub lazy_queries: usize,
    /// Score the prompt's last tokens, or the first generated one
    #[arg(long, value_name = "WHEN", default_value = "prefill")]
    pub lazy_at: LazyAt,
    /// What lazy layers see while the prompt is read [default: window where the layers are known beforehand]
    #[arg(long, value_name = "WHAT")]
    pub lazy_prefill: Option<LazyPrefill>,
    /// Types of a lazy layer's keys and values: one for both, or K/V [default: q4_0, with keys in q8_0 under auto and kl; f16 where heads are too small]
    #[arg(long, value_name = "T|K/V", value_parser = lazy_types)]
    pub lazy_type: Option<(Type, Type)>,
    /// Drop old rows of layers that are not lazy which no later token will look for: those scored below T, or auto; needs a map
    /// of the model, made by calibrate --fit-prune
    #[arg(long, value_name = "auto|T", default_value = "off", allow_hyphen_values = true)]
    pub prune: Prune,
    /// Do not rotate the keys and values of quantised caches
    #[arg(long)]
    pub no_kv_rotate: bool,
    /// Compute with ggml's kernels only: slower, and llama.cpp's own logits bit for bit
    #[arg(long)]
    pub ggml_kernels: bool,
    /// Newest tokens that are kept in f16 as well, with the sink, beside a quantised cache; 0: none, as llama.cpp
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub kv_exact: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LazyAt {
    Prefill,
    Decode,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LazyPrefill {
    Full,
    Window,
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

/// How tokens are chosen. The defaults are llama-cli's; where the file recommends others (`general.sampling.…`), those count.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// What runs in which order: top_k;temperature [default: the file's, else penalties;dry;top_n_sigma;top_k;typ_p;top_p;
    /// min_p;xtc;temperature]
    #[arg(long, value_name = "NAME;...", value_parser = SamplerStep::list, conflicts_with = "sampler_seq")]
    pub samplers: Option<Samplers>,
    /// The same by letters: edskypmxt
    #[arg(long, alias = "sampling-seq", value_name = "LETTERS", value_parser = SamplerStep::sequence)]
    pub sampler_seq: Option<Samplers>,
    /// Temperature; 0 always takes the most probable token [default: the file's, else 0.8]
    #[arg(long, alias = "temperature", value_name = "T", allow_negative_numbers = true)]
    pub temp: Option<f32>,
    /// Keep the K most probable tokens; 0 keeps all [default: the file's, else 40]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<i32>,
    /// Keep the most probable tokens that together have this probability; 1 is off [default: the file's, else 0.95]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Keep tokens with this share of the best one's probability; 0 is off [default: the file's, else 0.05]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Locally typical sampling; 1 is off
    #[arg(long, alias = "typical-p", value_name = "P", default_value_t = 1.0)]
    pub typical: f32,
    /// Keep tokens within this many standard deviations of the best; -1 is off
    #[arg(long, alias = "top-n-sigma", value_name = "N", default_value_t = -1.0, allow_negative_numbers = true)]
    pub top_nsigma: f32,
    /// Chance that XTC takes the best tokens away; 0 is off [default: the file's, else 0]
    #[arg(long, value_name = "P")]
    pub xtc_probability: Option<f32>,
    /// Probability above which XTC takes a token away [default: the file's, else 0.1]
    #[arg(long, value_name = "P")]
    pub xtc_threshold: Option<f32>,
    /// Width of a temperature range that follows the entropy; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0)]
    pub dynatemp_range: f32,
    /// How the entropy maps to that range
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    pub dynatemp_exp: f32,
    /// Last tokens that the penalties look at; 0 is off, -1 the whole context [default: the file's, else 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub repeat_last_n: Option<i32>,
    /// Penalty for tokens seen; 1 is off [default: the file's, else 1]
    #[arg(long, value_name = "N")]
    pub repeat_penalty: Option<f32>,
    /// Penalty for each time that a token was seen; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Penalty for tokens seen at all; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Strength of DRY, against repeated sequences; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0.0)]
    pub dry_multiplier: f32,
    /// Base of DRY's growth
    #[arg(long, value_name = "N", default_value_t = 1.75)]
    pub dry_base: f32,
    /// Length of a repetition that DRY allows
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub dry_allowed_length: i32,
    /// Last tokens that DRY looks at; 0 is off, -1 the whole context
    #[arg(long, value_name = "N", default_value_t = 64, allow_negative_numbers = true)]
    pub dry_penalty_last_n: i32,
    /// A text that breaks a repetition (may be given several times; none for none) [default: \n : " *]
    #[arg(long, value_name = "TEXT", action = ArgAction::Append, allow_hyphen_values = true)]
    pub dry_sequence_breaker: Vec<String>,
    /// Probability near which the sampler adaptive_p draws, where --samplers has it; -1 is off
    #[arg(long, value_name = "P", default_value_t = -1.0, allow_negative_numbers = true)]
    pub adaptive_target: f32,
    /// How long its past counts, 0 to 0.99
    #[arg(long, value_name = "N", default_value_t = 0.9)]
    pub adaptive_decay: f32,
    /// Mirostat: 0 is off, 1 or 2 its version [default: the file's, else 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=2))]
    pub mirostat: Option<u8>,
    /// Mirostat's learning rate [default: the file's, else 0.1]
    #[arg(long, value_name = "N")]
    pub mirostat_lr: Option<f32>,
    /// Mirostat's target entropy [default: the file's, else 5]
    #[arg(long, value_name = "N")]
    pub mirostat_ent: Option<f32>,
    /// Add BIAS to a token's logit: 15043+1 or 15043-1 (may be given several times)
    #[arg(short, long, value_name = "TOKEN(+/-)BIAS", action = ArgAction::Append, value_parser = logit_bias)]
    pub logit_bias: Vec<(i32, f32)>,
    /// Seed of the random choices; -1 takes a random one
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub seed: i64,
    /// Go on where the model would end
    #[arg(long)]
    pub ignore_eos: bool,
    /// A GBNF grammar that the text must follow
    #[arg(long, value_name = "GRAMMAR", conflicts_with = "grammar_file")]
    pub grammar: Option<String>,
    /// A file with such a grammar
    #[arg(long, value_name = "FILE")]
    pub grammar_file: Option<PathBuf>,
    /// A JSON schema of the text
    #[cfg(feature = "serve")]
    #[arg(short, long, value_name = "SCHEMA", conflicts_with_all = ["json_schema_file", "grammar", "grammar_file"])]
    pub json_schema: Option<String>,
    /// A file with such a schema (also -jf)
    #[cfg(feature = "serve")]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["grammar", "grammar_file"])]
    pub json_schema_file: Option<PathBuf>,
}

/// Samplers in their order. For clap a plain list would be an option that is given several times.
pub type Samplers = Vec<SamplerStep>;

#[derive(Debug, Args)]
pub struct TemplateArgs {
    /// Use one of llama.cpp's built-in chat templates instead of the file's own
    #[arg(help_heading = "Text", long, value_name = "NAME")]
    pub chat_template: Option<String>,
    /// Use the chat template in this file (Jinja) instead of the model's own
    #[arg(help_heading = "Text", long, value_name = "FILE", conflicts_with = "chat_template")]
    pub chat_template_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// A model, to say what of it fits here (GGUF)
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// The folder with libllama.so.0 [default: beside this program, and where frontends are told to look]
    #[arg(long, value_name = "DIR")]
    pub lib: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print one JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuLayers {
    Auto,
    All,
    Number(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlashAttn {
    On,
    Off,
    Auto,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("it must be a whole number above 0".to_owned()),
        Ok(number) => Ok(number),
    }
}

/// A number of bytes: 512M, 4G, 1.5GiB. As everywhere where memory is meant, K is 1,024.
#[cfg(feature = "serve")]
fn bytes(text: &str) -> Result<usize, String> {
    let wrong = || "it must be a size such as 512M or 4G".to_owned();
    let upper = text.trim().to_ascii_uppercase();
    let digits = upper.trim_end_matches(|char: char| char.is_ascii_alphabetic());
    let scale: f64 = match &upper[digits.len()..] {
        "" | "B" => 1.0,
        "K" | "KB" | "KIB" => 1024.0,
        "M" | "MB" | "MIB" => 1024.0 * 1024.0,
        "G" | "GB" | "GIB" => 1024.0 * 1024.0 * 1024.0,
        "T" | "TB" | "TIB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| wrong())?;
    let bytes = number * scale;
    if (1.0..9e15).contains(&bytes) { Ok(bytes as usize) } else { Err(wrong()) }
}

/// llama-server's -1 leaves the number to the server.
#[cfg(feature = "serve")]
fn parallel(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(16),
        number => positive(number),
    }
}

/// A positive number.
fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if factor.is_finite() && factor > 0.0 => Ok(factor),
        _ => Err("it must be a number above 0".to_owned()),
    }
}

/// `KEY=TYPE:VALUE`, as llama.cpp takes it.
fn key_override(text: &str) -> Result<(String, Override), String> {
    let form = "it must be KEY=int:N, KEY=float:X, KEY=bool:true or KEY=str:TEXT";
    let (key, typed) = text.split_once('=').ok_or(form)?;
    let (ty, value) = typed.split_once(':').ok_or(form)?;
    let value = match ty {
        "int" => Override::Int(value.parse().map_err(|_| format!("{value} is no whole number: {form}"))?),
        "float" => Override::Float(value.parse().map_err(|_| format!("{value} is no number: {form}"))?),
        "bool" => Override::Bool(value.parse().map_err(|_| format!("{value} is neither true nor false: {form}"))?),
        "str" => Override::Str(value.to_owned()),
        _ => return Err(form.to_owned()),
    };
    Ok((key.to_owned(), value))
}

/// `FILE:SCALE`; a path may have colons itself.
fn scaled_lora(text: &str) -> Result<(PathBuf, f32), String> {
    let (path, scale) = text.rsplit_once(':').ok_or("it must be FILE:SCALE")?;
    match scale.parse::<f32>() {
        Ok(scale) if scale.is_finite() => Ok((path.into(), scale)),
        _ => Err(format!("{scale} is no number: it must be FILE:SCALE")),
    }
}

fn gpu_layers(text: &str) -> Result<GpuLayers, String> {
    match text {
        "auto" | "-1" => Ok(GpuLayers::Auto),
        "all" | "-2" => Ok(GpuLayers::All),
        number => number.parse().map(GpuLayers::Number).map_err(|_| "it must be a number, auto or all".to_owned()),
    }
}

/// Proportions of layers on the devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Split(pub Vec<f32>);

fn tensor_split(text: &str) -> Result<Split, String> {
    let share = |part: &str| part.trim().parse().ok().filter(|share: &f32| *share >= 0.0 && share.is_finite());
    let shares: Option<Vec<f32>> = text.split([',', '/']).map(share).collect();
    shares.map(Split).ok_or_else(|| "it must be proportions such as 3,1".to_owned())
}

/// How layers are shared out over devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitMode {
    None,
    Layer,
}

fn split_mode(text: &str) -> Result<SplitMode, String> {
    match text {
        "none" => Ok(SplitMode::None),
        "layer" => Ok(SplitMode::Layer),
        "row" | "tensor" => Err("tensors go to devices whole: it must be none or layer".to_owned()),
        _ => Err("it must be none or layer".to_owned()),
    }
}

/// `PATTERN=DEVICE`, as llama.cpp takes it: the pattern ends at the first `=`.
fn tensor_override(text: &str) -> Result<(String, String), String> {
    let (pattern, device) = text.split_once('=').ok_or("it must be PATTERN=DEVICE, such as exps=CPU")?;
    Ok((pattern.to_owned(), device.to_owned()))
}

/// A switch with words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnOrOff {
    On,
    Off,
}

fn on_or_off(text: &str) -> Result<OnOrOff, String> {
    match text {
        "on" | "1" | "true" | "enabled" => Ok(OnOrOff::On),
        "off" | "0" | "false" | "disabled" => Ok(OnOrOff::Off),
        _ => Err("it must be on or off".to_owned()),
    }
}

/// Names with values, for a template.
#[derive(Debug, Clone, PartialEq)]
pub struct JsonObject(pub serde_json::Map<String, serde_json::Value>);

fn json_object(text: &str) -> Result<JsonObject, String> {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => Ok(JsonObject(map)),
        Ok(_) => Err("it must be a JSON object, such as {\"enable_thinking\": false}".to_owned()),
        Err(error) => Err(format!("it is no JSON: {error}")),
    }
}

fn flash_attn(text: &str) -> Result<FlashAttn, String> {
    match text {
        "on" | "1" | "true" | "enabled" => Ok(FlashAttn::On),
        "off" | "0" | "false" | "disabled" => Ok(FlashAttn::Off),
        "auto" | "-1" => Ok(FlashAttn::Auto),
        _ => Err("it must be on, off or auto".to_owned()),
    }
}

fn key_type(text: &str) -> Result<KeyType, String> {
    if text == "auto" { Ok(KeyType::Auto) } else { cache_type(text).map(KeyType::Of) }
}

fn cache_type(text: &str) -> Result<Type, String> {
    Type::cache_type_from_name(text).ok_or_else(no_cache_type)
}

fn lazy_types(text: &str) -> Result<(Type, Type), String> {
    Type::cache_types_from_name(text).ok_or_else(no_cache_type)
}

fn no_cache_type() -> String {
    format!("it must be one of {}", Type::cache_type_names())
}

fn logit_bias(text: &str) -> Result<(i32, f32), String> {
    let wrong = || "it must be a token's number and a signed bias, such as 15043-1".to_owned();
    let sign = text.find(['+', '-']).ok_or_else(wrong)?;
    let (token, bias) = text.split_at(sign);
    match (token.parse(), bias.parse::<f32>()) {
        (Ok(token), Ok(bias)) if !bias.is_nan() => Ok((token, bias)),
        _ => Err(wrong()),
    }
}
