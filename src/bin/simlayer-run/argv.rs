//! llama.cpp's way of writing options, brought into the form that clap reads.

use std::{collections::HashMap, ffi::OsString};

use clap::FromArgMatches;

use crate::args::{Command, GenerateArgs, command_line};

/// llama.cpp's short options of several letters; clap knows short options of one.
const SHORTS: &[(&str, &str)] = &[
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-ngl", "--gpu-layers"),
    ("-dev", "--device"),
    ("-ts", "--tensor-split"),
    ("-fa", "--flash-attn"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-sys", "--system"),
];

/// Reads the command line; wrong usage ends the process with code 2.
pub fn parse() -> Command {
    try_parse(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

fn try_parse(argv: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let command = command_line();
    let matches = command.clone().try_get_matches_from(rewrite(argv, &command))?;
    match matches.subcommand_name() {
        Some(_) => Command::from_arg_matches(&matches),
        None => GenerateArgs::from_arg_matches(&matches).map(Command::Generate),
    }
}

/// Spells the short options of several letters out, and moves the command's name to the front, so that
/// `-m MODEL chat` is the same as `chat -m MODEL`. Values of options stay as they are.
fn rewrite(argv: impl IntoIterator<Item = OsString>, command: &clap::Command) -> Vec<OsString> {
    let takes_value = options_with_values(command);
    let mut argv = argv.into_iter();
    let mut out: Vec<OsString> = argv.next().into_iter().collect();
    let mut named = false;
    while let Some(word) = argv.next() {
        let Some(text) = word.to_str() else {
            out.push(word);
            continue;
        };
        if text == "--" {
            out.push(word);
            out.extend(argv);
            break;
        }
        if !text.starts_with('-') {
            if !named && command.find_subcommand(text).is_some() {
                named = true;
                out.insert(1, word);
            } else {
                out.push(word);
            }
            continue;
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let name = SHORTS.iter().find(|(short, _)| *short == name).map_or(name, |(_, long)| long);
        match value {
            Some(value) => out.push(format!("{name}={value}").into()),
            None => {
                out.push(name.into());
                if takes_value.get(name) == Some(&true) {
                    out.extend(argv.next());
                }
            }
        }
    }
    out
}

/// Each option of any command, with whether the next word is its value.
fn options_with_values(command: &clap::Command) -> HashMap<String, bool> {
    let mut command = command.clone();
    command.build();
    let mut options = HashMap::new();
    for command in std::iter::once(&command).chain(command.get_subcommands()) {
        for arg in command.get_arguments() {
            let takes_value =
                arg.get_action().takes_values() && arg.get_num_args().is_none_or(|range| range.min_values() > 0);
            let longs = arg.get_long_and_visible_aliases().unwrap_or_default().into_iter();
            let hidden = arg.get_all_aliases().unwrap_or_default().into_iter();
            let shorts = arg.get_short_and_visible_aliases().unwrap_or_default().into_iter();
            let names =
                longs.chain(hidden).map(|long| format!("--{long}")).chain(shorts.map(|short| format!("-{short}")));
            for name in names {
                *options.entry(name).or_default() |= takes_value;
            }
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(words: &str) -> String {
        let argv = std::iter::once("simlayer-run").chain(words.split(' ')).map(OsString::from);
        let out: Vec<_> = rewrite(argv, &command_line()).into_iter().map(|word| word.into_string().unwrap()).collect();
        out[1..].join(" ")
    }

    #[test]
    fn definitions_are_consistent() {
        command_line().debug_assert();
        // Each short stands for an option that exists, and no one-letter option would eat its letters.
        let options = options_with_values(&command_line());
        for (_, long) in SHORTS {
            assert!(options.contains_key(*long), "{long}");
        }
    }

    #[test]
    fn shorts_of_several_letters() {
        assert_eq!(rewritten("-m x -ngl 3 -ctk q8_0"), "-m x --gpu-layers 3 --cache-type-k q8_0");
        assert_eq!(rewritten("-ngl=3 -fa=off -ub=64"), "--gpu-layers=3 --flash-attn=off --ubatch-size=64");
        // Only exact matches, and no values.
        assert_eq!(rewritten("-nglx -p -ngl -n 3"), "-nglx -p -ngl -n 3");
        assert_eq!(rewritten("-p x -- -ngl chat"), "-p x -- -ngl chat");
    }

    #[test]
    fn the_command_may_stand_anywhere() {
        assert_eq!(rewritten("-m x chat -ngl 3"), "chat -m x --gpu-layers 3");
        assert_eq!(rewritten("-p chat -m bench"), "-p chat -m bench");
        assert_eq!(rewritten("-fa chat"), "chat --flash-attn");
        assert_eq!(rewritten("bench --prompt 512 chat"), "bench --prompt 512 chat");
    }

    fn parse(words: &str) -> Result<Command, clap::Error> {
        try_parse(std::iter::once("simlayer-run").chain(words.split(' ')).map(OsString::from))
    }

    #[test]
    fn negative_values_and_dashes() {
        let Ok(Command::Generate(args)) = parse("-m x -n -1 -s -1 --temp -0.5 --top-k -1 -p -ngl") else {
            panic!("it is the default command");
        };
        assert_eq!((args.n_predict, args.sampling.seed), (-1, -1));
        assert_eq!(args.sampling.temp, -0.5);
        assert_eq!(args.prompt.prompt.as_deref(), Some("-ngl"));
    }

    #[test]
    fn the_last_of_two_counts() {
        let Ok(Command::Bench(args)) = parse("bench -m x -t 1 -m y --threads 2 -r 3 --reps 4") else {
            panic!("options may be repeated");
        };
        assert_eq!((args.common.model.to_str(), args.common.threads, args.reps), (Some("y"), Some(2), 4));
    }

    #[test]
    fn wrong_usage() {
        for words in [
            "-p x",
            "-m x -p a -f b",
            "-m x --no-such",
            "-m x -ctk q3_k",
            "-m x --lazy nonsense",
            "-m x -t 0",
            "completions nosuch",
        ] {
            let error = parse(words).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{words}");
        }
    }
}
