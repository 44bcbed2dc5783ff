//! What is compared: a rule, and what else of a cache is not the run's own under it.

use std::{fmt, str::FromStr};

use crate::{
    engine::SessionParams,
    ggml::Type,
    lazy::{ParsePolicyError, Policy, Prune},
};

/// A rule and, where they are not the run's own, the types of keys and values in active layers, and more. It is written
/// `budget:0.5`, with types `budget:0.5@q8_0/q4_0` and `off@q8_0`, and with more after plus signs:
/// `profile:0.8@q4_0+prune+lazy:q8_0/q4_0+window:768+rescue:256`.
#[derive(Debug, Clone, PartialEq)]
pub struct Contender {
    pub policy: Policy,
    /// Of keys and of values.
    pub types: Option<(Type, Type)>,
    /// [`LazyParams::narrow_keys`](crate::lazy::LazyParams::narrow_keys): written `auto/q4_0`, for keys that are `q8_0`
    /// before.
    pub narrow_keys: bool,
    /// Whether rows of active layers are pruned: `+prune` for [`Prune::Auto`], `+prune:-1.8` for a bound.
    pub prune: Option<Prune>,
    /// Types of keys and values in lazy layers: `+lazy:q8_0/q4_0`.
    pub lazy_types: Option<(Type, Type)>,
    /// Recent tokens that lazy layers keep: `+window:768`.
    pub n_window: Option<usize>,
    /// Older rows that they keep beside these: `+rescue:256`.
    pub n_rescued: Option<usize>,
}

/// How types of narrow keys begin.
const NARROW_KEYS: &str = "auto/";

/// Why a text is no rule with types.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseContenderError {
    #[error(transparent)]
    Policy(#[from] ParsePolicyError),
    #[error(
        "\"{types}\" in \"{text}\" are no cache types: write one type, or K/V (K may be auto), of {}",
        Type::cache_type_names()
    )]
    Types { types: String, text: String },
    #[error("\"+{more}\" in \"{text}\" is none of +prune, +prune:BOUND, +lazy:TYPES, +window:TOKENS and +rescue:ROWS")]
    More { more: String, text: String },
}

impl From<Policy> for Contender {
    fn from(policy: Policy) -> Contender {
        Contender {
            policy,
            types: None,
            narrow_keys: false,
            prune: None,
            lazy_types: None,
            n_window: None,
            n_rescued: None,
        }
    }
}

impl Contender {
    /// The parameters of a session, with what the contender says in place of theirs.
    pub(super) fn params(&self, run: &SessionParams) -> SessionParams {
        let mut params = run.clone();
        params.lazy.policy = self.policy.clone();
        // Types of one's own are compared without anything else of the run's.
        if self.types.is_some() {
            (params.prune, params.lazy.n_rescued) = (Prune::Off, 0);
        }
        if let Some(types) = self.types {
            ((params.type_k, params.type_v), params.lazy.narrow_keys) = (types, self.narrow_keys);
        }
        if let Some((type_k, type_v)) = self.lazy_types {
            (params.lazy.type_k, params.lazy.type_v) = (Some(type_k), Some(type_v));
        }
        params.lazy.n_window = self.n_window.unwrap_or(params.lazy.n_window);
        params.lazy.n_rescued = self.n_rescued.unwrap_or(params.lazy.n_rescued);
        params.prune = self.prune.unwrap_or(params.prune);
        params
    }

    /// Reads what stands after a plus sign. `None` where it is nothing of the kind.
    fn add(&mut self, more: &str) -> Option<()> {
        let (name, value) = more.split_once(':').map_or((more, None), |(name, value)| (name, Some(value)));
        match (name, value) {
            ("prune", value) => self.prune = Some(value.unwrap_or("auto").parse().ok()?),
            ("lazy", Some(types)) => self.lazy_types = Some(Type::cache_types_from_name(types)?),
            ("rescue", Some(rows)) => self.n_rescued = Some(rows.parse().ok()?),
            ("window", Some(tokens)) => self.n_window = Some(tokens.parse().ok().filter(|&n| n > 0)?),
            _ => return None,
        }
        Some(())
    }
}

impl FromStr for Contender {
    type Err = ParseContenderError;

    fn from_str(text: &str) -> Result<Contender, ParseContenderError> {
        let mut parts = text.split('+');
        let rule = parts.next().unwrap_or_default();
        let mut contender = match rule.split_once('@') {
            None => Contender::from(rule.parse::<Policy>()?),
            Some((rule, types)) => {
                let (narrow_keys, both) = match types.strip_prefix(NARROW_KEYS) {
                    Some(of_values) => (true, Type::cache_type_from_name(of_values).map(|v| (Type::Q8_0, v))),
                    None => (false, Type::cache_types_from_name(types)),
                };
                let wrong = || ParseContenderError::Types { types: types.to_owned(), text: text.to_owned() };
                let types = Some(both.ok_or_else(wrong)?);
                Contender { types, narrow_keys, ..rule.parse::<Policy>()?.into() }
            }
        };
        for more in parts {
            let wrong = || ParseContenderError::More { more: more.to_owned(), text: text.to_owned() };
            contender.add(more).ok_or_else(wrong)?;
        }
        Ok(contender)
    }
}

/// Types of keys and values as they are read again.
struct Types(Type, Type);

impl fmt::Display for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Types(k, v) if k == v => k.fmt(f),
            Types(k, v) => write!(f, "{k}/{v}"),
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.policy.fmt(f)?;
        match self.types {
            Some((_, v)) if self.narrow_keys => write!(f, "@{NARROW_KEYS}{v}")?,
            Some((k, v)) => write!(f, "@{}", Types(k, v))?,
            None => {}
        }
        match self.prune {
            Some(Prune::Auto) => f.write_str("+prune")?,
            Some(prune) => write!(f, "+prune:{prune}")?,
            None => {}
        }
        if let Some((k, v)) = self.lazy_types {
            write!(f, "+lazy:{}", Types(k, v))?;
        }
        if let Some(tokens) = self.n_window {
            write!(f, "+window:{tokens}")?;
        }
        self.n_rescued.map_or(Ok(()), |rows| write!(f, "+rescue:{rows}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_and_types() {
        let parse = |text: &str| text.parse::<Contender>();
        let budget = Policy::Budget(0.5);
        assert_eq!(parse("budget:0.5"), Ok(budget.clone().into()));
        let typed = Contender { types: Some((Type::Q8_0, Type::Q4_0)), ..budget.into() };
        assert_eq!(parse("budget:0.5@q8_0/q4_0"), Ok(typed));
        assert_eq!(parse("off@q8_0"), parse("off@q8_0/q8_0"));
        let narrow = parse("off@auto/q4_0").unwrap();
        assert_eq!((narrow.types, narrow.narrow_keys), (Some((Type::Q8_0, Type::Q4_0)), true));
        for text in [
            "budget:0.5",
            "auto@auto/q8_0",
            "budget:0.5@q8_0/q4_0",
            "off@q8_0",
            "auto@f16",
            "layers:1,2@q4_0",
            "off+prune",
            "off@q4_0+prune:-1.5",
            "auto+prune:off",
            "profile:0.8@q4_0+prune+lazy:q8_0/q4_0+window:768+rescue:256",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_said_takes_the_place_of_the_runs_own() {
        let mut run = SessionParams { prune: Prune::Auto, ..SessionParams::default() };
        run.lazy.n_window = 512;
        let params = |text: &str| text.parse::<Contender>().unwrap().params(&run);
        assert_eq!((params("off").prune, params("off").lazy.n_window), (Prune::Auto, 512));
        assert_eq!((params("off@q4_0").prune, params("off@q4_0").type_v), (Prune::Off, Type::Q4_0));
        let params = params("profile:0.8@q4_0+prune:-2+lazy:q8_0/q4_0+window:256+rescue:64");
        assert_eq!((params.prune, params.lazy.n_window, params.lazy.n_rescued), (Prune::Below(-2.0), 256, 64));
        assert_eq!((params.lazy.type_k, params.lazy.type_v), (Some(Type::Q8_0), Some(Type::Q4_0)));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, named) in [
            ("off@", "\"\""),
            ("off@q9", "q9"),
            ("off@q8_0/", "q8_0/"),
            ("off@auto", "auto"),
            ("off@auto/", "auto/"),
            ("of@q8_0", "of"),
            ("off+prune:much", "+prune:much"),
            ("off+lazy", "+lazy"),
            ("off+lazy:q9", "+lazy:q9"),
            ("off+window:0", "+window:0"),
            ("off+rescue", "+rescue"),
            ("off+", "\"+\""),
            ("", ""),
        ] {
            let error = text.parse::<Contender>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert!("off@q9".parse::<Contender>().unwrap_err().to_string().contains("q8_0"));
    }
}
