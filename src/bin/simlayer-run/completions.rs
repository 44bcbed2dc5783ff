//! Shell completions, of options and of their values.

use std::io::Write;

use clap::builder::{PossibleValue, PossibleValuesParser};
use simlayer::{
    chat::ChatTemplate,
    ggml::{Device, Type},
};

use crate::{
    args::{CompletionsArgs, command_line},
    failure::Failure,
    interrupt,
};

pub fn run(args: CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut with_values(command_line()), "simlayer-run", &mut script);
    interrupt::stdout().write_all(&script)?;
    Ok(())
}

/// The command line with lists of the values that are usual, where a parser takes others as well.
fn with_values(command: clap::Command) -> clap::Command {
    let types: Vec<String> = Type::cache_type_names().split(", ").map(str::to_owned).collect();
    let keys: Vec<String> = std::iter::once("auto".to_owned()).chain(types.clone()).collect();
    let devices = Device::all().into_iter().map(Device::name).chain(["none".to_owned()]).collect();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let values: Vec<(&str, Vec<String>)> = vec![
        ("lazy", names(&["auto", "kl", "threshold", "budget", "output", "profile", "off"])),
        ("lazy_type", types.clone()),
        ("cache_type_k", keys),
        ("cache_type_v", types),
        ("flash_attn", names(&["on", "off", "auto"])),
        ("gpu_layers", names(&["all", "auto", "0"])),
        ("device", devices),
        ("chat_template", ChatTemplate::builtin_names()),
    ];
    values.into_iter().fold(command, |command, (id, values)| fill(command, id, &values))
}

/// Gives an option of a command, and of those beneath it, these values.
fn fill(mut command: clap::Command, id: &str, values: &[String]) -> clap::Command {
    if command.get_arguments().any(|arg| arg.get_id() == id) {
        command = command.mut_arg(id, |arg| {
            arg.value_parser(PossibleValuesParser::new(
                values.iter().map(|value| PossibleValue::new(&*value.clone().leak())),
            ))
            .hide_possible_values(true)
        });
    }
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, |command| fill(command, id, values)))
}
