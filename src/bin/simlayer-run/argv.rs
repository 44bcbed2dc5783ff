//! llama.cpp's way of writing options, brought into the form that clap reads.

use std::{collections::HashMap, ffi::OsString};

use clap::{FromArgMatches, error::ErrorKind};

use crate::{
    args::{Command, GenerateArgs, command_line},
    llama_cpp::{self, Meaning, Values},
};

/// Reads the command line; wrong usage ends the process with code 2.
pub fn parse() -> Command {
    try_parse(std::env::args_os(), &|name| std::env::var_os(name)).unwrap_or_else(|error| error.exit())
}

/// The environment: a variable's value.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn try_parse(argv: impl IntoIterator<Item = OsString>, environment: Environment<'_>) -> Result<Command, clap::Error> {
    let command = command_line();
    let matches = command.clone().try_get_matches_from(rewrite(argv, environment, &command)?)?;
    match matches.subcommand_name() {
        Some(_) => Command::from_arg_matches(&matches),
        None => GenerateArgs::from_arg_matches(&matches).map(Command::Generate),
    }
}

/// Spells the short options of several letters out, and moves the command's name to the front, so that
/// `-m MODEL chat` is the same as `chat -m MODEL`. Values of options stay as they are. Of llama.cpp's options those go that
/// do nothing here; what its variables say comes first, so that options take its place.
///
/// # Errors
/// When an option of llama.cpp's is not supported, or a word is no option that anybody could mean.
fn rewrite(
    argv: impl IntoIterator<Item = OsString>,
    environment: Environment<'_>,
    command: &clap::Command,
) -> Result<Vec<OsString>, clap::Error> {
    let mut argv = argv.into_iter();
    let program = argv.next();
    let (words, rest) = split(argv, command);
    let named = words.iter().find_map(|word| match word {
        Word::Plain(text) => text.to_str().and_then(|text| command.find_subcommand(text)),
        Word::Option { .. } => None,
    });
    // llama-cli's way to a conversation: -cnv, or -st with a prompt.
    let asks_for_chat = |word: &Word| match word {
        Word::Option { name, .. } => {
            llama_cpp::CONVERSATION.contains(&name.as_str()) || ["-st", "--single-turn"].contains(&name.as_str())
        }
        Word::Plain(_) => false,
    };
    let is_named = named.is_some();
    let chat = || command.find_subcommand("chat").filter(|_| words.iter().any(asks_for_chat));
    let named = named.or_else(chat);
    let of_command = options_of(named.unwrap_or(command));
    let mut out: Vec<OsString> = program.into_iter().collect();
    out.extend(named.map(|named| named.get_name().into()));
    for (variable, option) in llama_cpp::VARIABLES {
        let Some(value) = environment(variable).filter(|value| !value.is_empty()) else { continue };
        match of_command.get(*option) {
            Some(true) => {
                let mut word = OsString::from(format!("{option}="));
                word.push(value);
                out.push(word);
            }
            Some(false) if ["on", "enabled", "true", "1"].iter().any(|yes| value == *yes) => out.push(option.into()),
            _ => {}
        }
    }
    let mut is_named = !is_named;
    for word in words {
        let (name, value, next) = match word {
            Word::Plain(text) if !is_named && named.is_some_and(|named| text == named.get_name()) => {
                is_named = true;
                continue;
            }
            Word::Plain(text) => {
                out.push(text);
                continue;
            }
            Word::Option { name, value, next } => (name, value, next),
        };
        let Some(name) = name_here(&name, &of_command, named)? else { continue };
        match value {
            Some(value) => out.push(format!("{name}={value}").into()),
            None => out.push(name.into()),
        }
        out.extend(next);
    }
    out.extend(rest);
    Ok(out)
}

/// What clap is to be told for an option: `None` for nothing.
fn name_here(
    name: &str,
    of_command: &HashMap<String, bool>,
    named: Option<&clap::Command>,
) -> Result<Option<String>, clap::Error> {
    if of_command.contains_key(name) {
        return Ok(Some(name.to_owned()));
    }
    let wrong = |why: String| Err(clap::Error::raw(ErrorKind::UnknownArgument, format!("{why}\n")));
    match llama_cpp::find(name).map(|known| known.meaning) {
        Some(Meaning::Ours(long)) if of_command.contains_key(long) => Ok(Some(long.to_owned())),
        Some(Meaning::Ours(long)) => {
            let command = named.map_or("generating", clap::Command::get_name);
            wrong(format!("{name} ({long}) is no option of {command}: see --help"))
        }
        Some(Meaning::Nothing) => Ok(None),
        Some(Meaning::Serve(option)) if named.is_some_and(|named| named.get_name() == "serve") => {
            Ok(option.map(str::to_owned))
        }
        Some(Meaning::ServeOrNothing(option)) => {
            Ok(named.filter(|named| named.get_name() == "serve").map(|_| option.to_owned()))
        }
        Some(Meaning::Serve(_)) => wrong(format!("{name} is not supported here: {}", llama_cpp::OF_SERVE)),
        Some(Meaning::Refused(instead)) => wrong(format!("{name} is not supported: {instead}")),
        // A letter of clap's with a number: -t4.
        None if name.starts_with("--") || name.len() == 2 => Ok(Some(name.to_owned())),
        None if name[2..].chars().all(|char| char.is_ascii_digit()) => Ok(Some(name.to_owned())),
        None => wrong(format!("there is no option {name}: see --help")),
    }
}

/// A word of the command line, with those that belong to it.
enum Word {
    Plain(OsString),
    Option {
        name: String,
        /// After `=`.
        value: Option<String>,
        /// The words that follow and are its values.
        next: Vec<OsString>,
    },
}

/// The words, and what stands from `--` on.
fn split(argv: impl Iterator<Item = OsString>, command: &clap::Command) -> (Vec<Word>, Vec<OsString>) {
    let takes_value = options_with_values(command);
    let mut words = Vec::new();
    let mut argv = argv.peekable();
    while let Some(word) = argv.next() {
        let Some(text) = word.to_str().filter(|text| text.starts_with('-') && text.len() > 1) else {
            words.push(Word::Plain(word));
            continue;
        };
        if text == "--" {
            return (words, std::iter::once(word).chain(argv).collect());
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (text.to_owned(), None),
        };
        let mut next = Vec::new();
        if value.is_none() {
            // What clap knows of an option counts first: `bench -r 3` are repetitions.
            let values = match (takes_value.get(&name), llama_cpp::find(&name).map(|known| known.values)) {
                (Some(true), _) => Values::One,
                (Some(false), None) | (None, None) => Values::None,
                (_, Some(values)) => values,
            };
            let n = match values {
                Values::None => 0,
                Values::One => 1,
                Values::Two => 2,
                Values::Switch => {
                    let is_value = argv.peek().and_then(|word| word.to_str()).is_some_and(llama_cpp::is_switch_value);
                    usize::from(is_value)
                }
            };
            next.extend(argv.by_ref().take(n));
        }
        words.push(Word::Option { name, value, next });
    }
    (words, Vec::new())
}

/// Each option of any command, with whether the next word is its value.
fn options_with_values(command: &clap::Command) -> HashMap<String, bool> {
    let mut options = HashMap::new();
    for command in std::iter::once(command).chain(command.get_subcommands()) {
        for (name, takes_value) in options_of(command) {
            *options.entry(name).or_default() |= takes_value;
        }
    }
    options
}

/// Each option of a command, with whether the next word is its value.
fn options_of(command: &clap::Command) -> HashMap<String, bool> {
    let mut command = command.clone();
    command.build();
    let mut options = HashMap::new();
    for arg in command.get_arguments() {
        let takes_value =
            arg.get_action().takes_values() && arg.get_num_args().is_none_or(|range| range.min_values() > 0);
        let longs = arg.get_long_and_visible_aliases().unwrap_or_default().into_iter();
        let hidden = arg.get_all_aliases().unwrap_or_default().into_iter();
        let shorts = arg.get_short_and_visible_aliases().unwrap_or_default().into_iter();
        let names = longs.chain(hidden).map(|long| format!("--{long}")).chain(shorts.map(|short| format!("-{short}")));
        options.extend(names.map(|name| (name, takes_value)));
    }
    options
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn rewritten(words: &str) -> String {
        let argv = std::iter::once("simlayer-run").chain(words.split(' ')).map(OsString::from);
        let out = rewrite(argv, &|_| None, &command_line()).unwrap_or_else(|error| panic!("{error}"));
        let out: Vec<_> = out.into_iter().map(|word| word.into_string().unwrap()).collect();
        out[1..].join(" ")
    }

    #[test]
    fn definitions_are_consistent() {
        command_line().debug_assert();
    }

    #[test]
    fn shorts_of_several_letters() {
        assert_eq!(rewritten("-m x -ngl 3 -ctk q8_0"), "-m x --gpu-layers 3 --cache-type-k q8_0");
        assert_eq!(rewritten("-ngl=3 -fa=off -ub=64"), "--gpu-layers=3 --flash-attn=off --ubatch-size=64");
        // No values.
        assert_eq!(rewritten("-p -ngl -n 3 -t4"), "-p -ngl -n 3 -t4");
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
        try_parse(std::iter::once("simlayer-run").chain(words.split(' ')).map(OsString::from), &|_| None)
    }

    #[test]
    fn negative_values_and_dashes() {
        let Ok(Command::Generate(args)) = parse("-m x -n -1 -s -1 --temp -0.5 --top-k -1 -p -ngl") else {
            panic!("it is the default command");
        };
        assert_eq!((args.n_predict, args.sampling.seed), (-1, -1));
        assert_eq!(args.sampling.temp, Some(-0.5));
        assert_eq!(args.prompt.prompt.as_deref(), Some("-ngl"));
    }

    #[test]
    fn the_last_of_two_counts() {
        let Ok(Command::Bench(args)) = parse("bench -m x -t 1 -m y --threads 2 -r 3 --reps 4") else {
            panic!("options may be repeated");
        };
        assert_eq!((args.common.model.to_str(), args.common.threads, args.reps), (Some("y"), Some(2), 4));
    }

    /// A value that an option of ours takes.
    fn sample(option: &str) -> &'static str {
        match option {
            "--cache-type-k" | "--cache-type-v" => "q8_0",
            "--override-kv" => "some.key=int:1",
            "--rope-scaling" => "linear",
            "--lora-scaled" => "adapter.gguf:0.5",
            "--logit-bias" => "5+1",
            "--samplers" => "top_k;temperature",
            "--sampler-seq" => "kt",
            "--numa" => "isolate",
            "--split-mode" => "none",
            "--override-tensor" => "exps=CPU",
            "--adaptive-decay" => "0.5",
            "--chat-template-kwargs" => r#"{"a": 1}"#,
            _ => "1",
        }
    }

    /// Options that clap takes to mean that another is not given.
    fn excludes(option: &str) -> &'static [&'static str] {
        match option {
            "--file" | "--binary-file" => &["-p", "x"],
            _ => &[],
        }
    }

    /// The spellings in a row of a tool's table, and the words that follow the last one.
    fn row(line: &str) -> Option<(Vec<String>, String)> {
        let (spellings, _) = line.strip_prefix("| `")?.split_once("` |")?;
        let spellings = spellings.replace("\\|", "|");
        spellings.starts_with('-').then_some(())?;
        let mut names = Vec::new();
        let mut value = String::new();
        for part in spellings.split(", ") {
            let (name, rest) = part.split_once(' ').unwrap_or((part, ""));
            names.push(name.to_owned());
            value = rest.to_owned();
        }
        Some((names, value))
    }

    /// Every option of llama-cli, llama-completion and llama-server, in every spelling: one of ours, where one of two commands
    /// has it; accepted; or refused by its own name, with what to do. What follows it is never taken for something else.
    #[test]
    fn every_option_of_llama_cpps_tools_is_understood() {
        let mut counts = [0; 3];
        for tool in ["cli", "completion", "server"] {
            let path = format!("{}/tools/{tool}/README.md", ggml_sys::LLAMA_SOURCE);
            let readme = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            let rows: Vec<_> = readme.lines().filter_map(row).collect();
            assert!(rows.len() > 100, "{path}: {} options", rows.len());
            for (names, value) in rows {
                for name in names {
                    let known = llama_cpp::find(&name).unwrap_or_else(|| panic!("{tool}: {name} is not known"));
                    let n_values = match known.values {
                        Values::None => "",
                        Values::One => "1",
                        Values::Two => "2",
                        Values::Switch => "on",
                    };
                    let theirs = match value.as_str() {
                        "" => "",
                        "START END" => "2",
                        switch if switch.starts_with("[on|off") => "on",
                        _ => "1",
                    };
                    assert_eq!(n_values, theirs, "{tool}: {name} {value}");
                    understood(&name, known, &mut counts);
                }
            }
        }
        println!("spellings: {} ours, {} without effect, {} refused", counts[0], counts[1], counts[2]);
    }

    fn understood(name: &str, known: &llama_cpp::Known, counts: &mut [usize; 3]) {
        let words = |command: &[&str], values: &[&str], option: &str| {
            let prompt: &[&str] = if command.is_empty() { &["-p", "x"] } else { &[] };
            let prompt = if prompt == excludes(option) { &[] } else { prompt };
            let model: &[&str] = if option == "--model" { &[] } else { &["-m", "m"] };
            let all = [&["simlayer-run"], command, model, prompt, &[name], values, &["-n", "7"]].concat();
            all.into_iter().map(OsString::from).collect::<Vec<_>>()
        };
        let values: &[&str] = match (known.values, known.meaning) {
            (Values::None, _) => &[],
            (Values::One, Meaning::Ours(option) | Meaning::Serve(Some(option)) | Meaning::ServeOrNothing(option)) => {
                &[sample(option)]
            }
            (Values::One, _) => &["1"],
            (Values::Two, _) => &["1", "2"],
            (Values::Switch, _) => &["on"],
        };
        match known.meaning {
            Meaning::Ours(option @ ("--help" | "--version")) => {
                counts[0] += 1;
                let error = try_parse(words(&[], values, option), &|_| None).unwrap_err();
                let expected = [ErrorKind::DisplayHelp, ErrorKind::DisplayVersion];
                assert!(expected.contains(&error.kind()), "{name}: {error}");
            }
            Meaning::Ours(option) => {
                counts[0] += 1;
                let generate = try_parse(words(&[], values, option), &|_| None);
                let chat = try_parse(words(&["chat"], values, option), &|_| None);
                assert!(generate.is_ok() || chat.is_ok(), "{name}: {:?}, {:?}", generate.err(), chat.err());
                let n = |parsed: Result<Command, clap::Error>| match parsed {
                    Ok(Command::Generate(args)) => args.n_predict,
                    Ok(Command::Chat(args)) => args.n_predict,
                    Ok(_) => panic!("{name}: another command"),
                    // As its own option, of the other command.
                    Err(error) => {
                        assert!(error.to_string().contains(name), "{name}: {error}");
                        7
                    }
                };
                assert_eq!((n(generate), n(chat)), (7, 7), "{name}");
            }
            Meaning::Nothing => {
                counts[1] += 1;
                if llama_cpp::CONVERSATION.contains(&name) {
                    let chat = try_parse(words(&[], values, name), &|_| None);
                    let Ok(Command::Chat(chat)) = chat else { panic!("{name} is a conversation") };
                    assert_eq!(chat.first.prompt.as_deref(), Some("x"), "{name}");
                    return;
                }
                let with =
                    try_parse(words(&[], values, name), &|_| None).unwrap_or_else(|error| panic!("{name}: {error}"));
                let without =
                    try_parse(["simlayer-run", "-m", "m", "-p", "x", "-n", "7"].map(OsString::from), &|_| None)
                        .unwrap();
                assert_eq!(format!("{with:?}"), format!("{without:?}"), "{name}");
            }
            Meaning::ServeOrNothing(_) => {
                counts[0] += 1;
                let served = try_parse(words(&["serve"], values, name), &|_| None);
                let Ok(Command::Serve(args)) = served else { panic!("{name}: {:?}", served.err()) };
                assert_eq!(args.n_predict, 7, "{name}");
                let with = try_parse(words(&[], values, name), &|_| None).unwrap();
                let without = ["simlayer-run", "-m", "m", "-p", "x", "-n", "7"].map(OsString::from);
                assert_eq!(format!("{with:?}"), format!("{:?}", try_parse(without, &|_| None).unwrap()), "{name}");
            }
            Meaning::Serve(option) => {
                counts[usize::from(option.is_none())] += 1;
                let served = try_parse(words(&["serve"], values, name), &|_| None);
                let Ok(Command::Serve(args)) = served else { panic!("{name}: {:?}", served.err()) };
                assert_eq!(args.n_predict, 7, "{name}");
                let error = try_parse(words(&["chat"], values, name), &|_| None).unwrap_err();
                assert_eq!(
                    error.to_string(),
                    format!("error: {name} is not supported here: {}\n", llama_cpp::OF_SERVE)
                );
            }
            Meaning::Refused(instead) => {
                counts[2] += 1;
                for command in [&[][..], &["chat"]] {
                    let error = try_parse(words(command, values, name), &|_| None).unwrap_err();
                    assert_eq!(error.exit_code(), 2, "{name}");
                    assert_eq!(error.to_string(), format!("error: {name} is not supported: {instead}\n"));
                }
            }
        }
    }

    /// What the documentation tells its readers to type can be typed.
    #[test]
    fn documented_commands_are_understood() {
        let root = simlayer_testkit::workspace_root();
        let mut n = 0;
        for (file, text) in simlayer_testkit::markdown::documents(&root) {
            for (line, words) in simlayer_testkit::markdown::commands(&text) {
                if words[0].rsplit('/').next() == Some("simlayer-run") {
                    n += 1;
                    let parsed = try_parse(words.iter().map(OsString::from), &|_| None);
                    assert!(parsed.is_ok(), "{file}:{line}: {}", parsed.unwrap_err());
                }
            }
        }
        assert!(n > 20, "{n} commands were found");
    }

    /// The variables are those of llama.cpp's tables, for options that are ours.
    #[test]
    fn variables_are_llama_cpps() {
        let mut theirs = BTreeMap::new();
        for tool in ["cli", "completion", "server"] {
            let path = format!("{}/tools/{tool}/README.md", ggml_sys::LLAMA_SOURCE);
            let readme = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            for line in readme.lines() {
                let (Some((names, _)), Some((_, rest))) = (row(line), line.split_once("(env: ")) else { continue };
                let (variable, _) = rest.split_once(')').expect("a bracket ends");
                let meaning = llama_cpp::find(&names[0]).map(|known| known.meaning);
                if let Some(Meaning::Ours(option) | Meaning::Serve(Some(option)) | Meaning::ServeOrNothing(option)) =
                    meaning
                {
                    theirs.insert(variable.to_owned(), option);
                }
            }
        }
        let ours: BTreeMap<String, &str> =
            llama_cpp::VARIABLES.iter().map(|&(variable, option)| (variable.to_owned(), option)).collect();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn variables_come_before_options() {
        let environment = |name: &str| match name {
            "LLAMA_ARG_MODEL" => Some("of the environment".into()),
            "LLAMA_ARG_CTX_SIZE" => Some("512".into()),
            "LLAMA_ARG_TEMPERATURE" => Some(String::new().into()),
            "LLAMA_ARG_N_PREDICT" => Some("-1".into()),
            _ => None,
        };
        let words = |words: &str| words.split(' ').map(OsString::from).collect::<Vec<_>>();
        let Ok(Command::Generate(args)) = try_parse(words("simlayer-run -p x -c 1024"), &environment) else {
            panic!("the model is named");
        };
        assert_eq!((args.common.model.to_str(), args.common.ctx_size), (Some("of the environment"), 1024));
        assert_eq!((args.sampling.temp, args.n_predict), (None, -1));
        #[cfg(feature = "download")]
        for (value, offline) in [("1", true), ("true", true), ("0", false)] {
            let environment = |name: &str| (name == "LLAMA_ARG_OFFLINE").then(|| value.into());
            let Ok(Command::Bench(args)) = try_parse(words("simlayer-run bench -hf user/model"), &environment) else {
                panic!("{value}")
            };
            assert_eq!(args.common.download.offline, offline, "{value}");
        }
        // A command takes what it has.
        let Ok(Command::Bench(args)) = try_parse(words("simlayer-run bench -m x"), &environment) else {
            panic!("it is right")
        };
        assert_eq!((args.common.model.to_str(), args.common.ctx_size), (Some("x"), 512));
    }

    #[test]
    fn words_that_nobody_knows_are_refused() {
        for (words, name) in
            [("-m x -p y -nope", "-nope"), ("-m x -p y -tbx 3", "-tbx"), ("-m x -nglx 3 -p y", "-nglx")]
        {
            let error = parse(words).unwrap_err();
            assert_eq!(
                (error.exit_code(), error.to_string()),
                (2, format!("error: there is no option {name}: see --help\n"))
            );
        }
        let Ok(Command::Generate(args)) = parse("-m x -p y -n5 -no-cnv --no-mmap --color auto") else {
            panic!("they are known");
        };
        assert_eq!(args.n_predict, 5);
        let Ok(Command::Bench(args)) = parse("bench -m x -r 3") else { panic!("a command's own options come first") };
        assert_eq!(args.reps, 3);
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
