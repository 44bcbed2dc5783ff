//! The environment of unchanged frontends: `SIMLAYER_LAZY` and its like, in the command line's syntax.

use simlayer::{
    ggml::Type,
    lazy::{At, LazyParams, Policy, PrefillMode, Prune},
};

use crate::log;

/// How lazy layers are found and stored.
#[derive(Debug, Clone)]
pub(crate) struct LazySettings {
    pub lazy: LazyParams,
    pub prune: Prune,
}

impl LazySettings {
    /// Without any lazy layer: what a frontend that knows nothing of simlayer gets.
    pub fn off() -> LazySettings {
        let lazy = LazyParams { policy: Policy::Off, ..LazyParams::default() };
        LazySettings { lazy, prune: Prune::Off }
    }

    pub fn may_be_lazy(&self) -> bool {
        self.lazy.policy != Policy::Off || self.prune != Prune::Off
    }

    /// What the environment asks for. Values that make no sense are reported once and ignored.
    pub fn from_environment() -> LazySettings {
        let mut settings = LazySettings::off();
        let LazySettings { lazy, prune } = &mut settings;
        read("SIMLAYER_LAZY", |text| text.parse().map_err(to_text).map(|policy| lazy.policy = policy));
        read("SIMLAYER_PROFILE", |text| {
            lazy.profile = Some(text.into());
            Ok(())
        });
        read("SIMLAYER_SINK", |text| number(text, 0).map(|n| lazy.n_sink = n));
        read("SIMLAYER_WINDOW", |text| number(text, 1).map(|n| lazy.n_window = n));
        read("SIMLAYER_SLACK", |text| number(text, 0).map(|n| lazy.n_slack = n));
        read("SIMLAYER_LAZY_RESCUE", |text| number(text, 0).map(|n| lazy.n_rescued = n));
        read("SIMLAYER_WINDOWS", |text| text.parse().map_err(to_text).map(|windows| lazy.windows = windows));
        read("SIMLAYER_QUERIES", |text| number(text, 1).map(|n| lazy.n_queries = n));
        read("SIMLAYER_AT", |text| parse_at(text).map(|at| lazy.at = at));
        read("SIMLAYER_PREFILL", |text| parse_prefill(text).map(|mode| lazy.prefill = Some(mode)));
        read("SIMLAYER_LAZY_TYPE", |text| {
            parse_types(text).map(|(k, v)| (lazy.type_k, lazy.type_v) = (Some(k), Some(v)))
        });
        read("SIMLAYER_PRUNE", |text| text.parse().map_err(to_text).map(|asked| *prune = asked));
        read("SIMLAYER_KEYS", |text| match text {
            "auto" => {
                lazy.narrow_keys = true;
                Ok(())
            }
            _ => Err("it must be auto".to_owned()),
        });
        settings
    }
}

fn to_text(error: impl std::error::Error) -> String {
    error.to_string()
}

/// Hands a variable's value on, when it is set and not empty.
fn read(name: &str, take: impl FnOnce(&str) -> Result<(), String>) {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else { return };
    let taken = match value.to_str() {
        Some(text) => take(text),
        None => Err("it is not valid UTF-8".to_owned()),
    };
    if let Err(why) = taken {
        log::warn_once("simlayer", &format!("{name}={} is ignored: {why}", value.to_string_lossy()));
    }
}

/// A number of tokens.
fn number(text: &str, least: usize) -> Result<usize, String> {
    let number = text.trim().parse::<usize>().ok().filter(|&n| n >= least && n <= i32::MAX as usize);
    number.ok_or_else(|| format!("it must be a number of at least {least}"))
}

pub(crate) fn parse_at(text: &str) -> Result<At, String> {
    match text {
        "prefill" => Ok(At::Prefill),
        "decode" => Ok(At::Decode),
        _ => Err("it must be prefill or decode".to_owned()),
    }
}

pub(crate) fn parse_prefill(text: &str) -> Result<PrefillMode, String> {
    match text {
        "full" => Ok(PrefillMode::Full),
        "window" => Ok(PrefillMode::Window),
        _ => Err("it must be full or window".to_owned()),
    }
}

/// `T` for keys and values alike, or `K/V`.
pub(crate) fn parse_types(text: &str) -> Result<(Type, Type), String> {
    let wrong = || format!("it must be one of {}, or two of them as K/V", Type::cache_type_names());
    Type::cache_types_from_name(text).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax() {
        assert_eq!(parse_types("q4_0"), Ok((Type::Q4_0, Type::Q4_0)));
        assert_eq!(parse_types("q8_0/q4_0"), Ok((Type::Q8_0, Type::Q4_0)));
        assert!(parse_types("q8_0/").is_err() && parse_types("i32").is_err());
        assert_eq!((number("12", 0), number("0", 0)), (Ok(12), Ok(0)));
        assert!(number("0", 1).is_err() && number("-1", 0).is_err() && number("99999999999", 0).is_err());
        assert!(parse_at("never").is_err() && parse_prefill("half").is_err());
    }
}
