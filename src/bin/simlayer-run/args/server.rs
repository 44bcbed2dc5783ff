//! Commands that serve: the model over HTTP, and this machine's devices.

use std::path::PathBuf;

#[cfg(feature = "serve")]
use clap::ArgAction;
use clap::Args;

use super::values::positive;
#[cfg(feature = "serve")]
use super::{
    model::CommonArgs,
    sampling::SamplingArgs,
    text::{JsonObject, TemplateArgs, json_object},
};

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
