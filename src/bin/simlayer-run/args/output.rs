//! How results are printed.

use clap::Args;

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print one JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}
