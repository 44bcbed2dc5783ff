//! Commands about this machine and this program.

use std::path::PathBuf;

use clap::Args;

use super::{model::CommonArgs, output::OutputArgs};

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
pub struct CompletionsArgs {
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}
