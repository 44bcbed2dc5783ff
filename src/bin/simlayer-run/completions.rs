//! Shell completions.

use std::io::{self, Write};

use crate::{
    args::{CompletionsArgs, command_line},
    failure::Failure,
};

pub fn run(args: CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command_line(), "simlayer-run", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(())
}
