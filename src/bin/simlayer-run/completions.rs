//! Shell completions.

use std::io::Write;

use crate::{
    args::{CompletionsArgs, command_line},
    failure::Failure,
    interrupt,
};

pub fn run(args: CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command_line(), "simlayer-run", &mut script);
    interrupt::stdout().write_all(&script)?;
    Ok(())
}
