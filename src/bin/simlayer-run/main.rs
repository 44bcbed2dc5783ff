//! `simlayer-run`: generate text, hold a conversation, measure speed and quality.
//!
//! `args` is what was typed, `options` what it means; then there is one file for each command.
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

mod args;
mod argv;
mod bench;
mod build;
mod calibrate;
mod chat;
mod completions;
mod devices;
mod doctor;
#[cfg(feature = "download")]
mod download;
mod failure;
mod find_settings;
mod fit_prune;
mod generate;
mod inspect;
mod interrupt;
mod llama_cpp;
mod options;
mod passkey;
mod perplexity;
mod plot;
mod processor;
mod progress;
mod report;
#[cfg(feature = "rpc")]
mod rpc_server;
#[cfg(feature = "serve")]
mod serve;
mod stream;
mod template;

use std::process::ExitCode;

use args::Command;
use failure::Failure;

fn main() -> ExitCode {
    // Wrong usage, --help and --version end here.
    let command = argv::parse();
    simlayer::ggml::logging::on_fatal_error(failure::fatal);
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                eprintln!("error: {message}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    interrupt::install()?;
    match command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Passkey(args) => passkey::run(args),
        Command::Calibrate(args) if args.fit_prune => fit_prune::run(args),
        Command::Calibrate(args) if !args.target.is_empty() => find_settings::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Devices(args) => devices::run(args),
        #[cfg(feature = "rpc")]
        Command::RpcServer(args) => rpc_server::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(args),
    }
}
