//! The command line as it is typed. Names and meanings are llama.cpp's where it has the option.

mod cache;
mod measure;
mod model;
mod output;
mod placement;
mod sampling;
#[cfg(any(feature = "rpc", feature = "serve"))]
mod server;
mod system;
mod text;
mod values;

use clap::{ArgGroup, Args, Subcommand};

#[cfg(feature = "download")]
pub use self::model::DownloadArgs;
#[cfg(feature = "rpc")]
pub use self::server::RpcServerArgs;
#[cfg(feature = "serve")]
pub use self::server::ServeArgs;
pub use self::{
    cache::{KeyType, LazyAt, LazyPrefill},
    measure::{AskWhen, BenchArgs, CalibrateArgs, Compare, InspectArgs, PasskeyArgs, PerplexityArgs, Variant},
    model::{CommonArgs, FlashAttn, NO_MODEL, Numa},
    placement::{GpuLayers, OnOrOff, PlacementFlags, SplitMode},
    sampling::SamplingArgs,
    system::{CompletionsArgs, DevicesArgs, DoctorArgs},
    text::{ChatArgs, GenerateArgs, PromptArgs, TemplateArgs},
};
use crate::build::LONG_VERSION;

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
