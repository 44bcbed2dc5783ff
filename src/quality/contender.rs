//! What is compared: a rule, and the types that the active layers' cache has under it.

use std::{fmt, str::FromStr};

use crate::{
    ggml::Type,
    lazy::{ParsePolicyError, Policy},
};

/// A rule and, where they are not the run's own, the types of keys and values in active layers. It is written
/// `budget:0.5`, or with types `budget:0.5@q8_0/q4_0` and `off@q8_0`.
#[derive(Debug, Clone, PartialEq)]
pub struct Contender {
    pub policy: Policy,
    /// Of keys and of values.
    pub types: Option<(Type, Type)>,
    /// [`LazyParams::narrow_keys`](crate::lazy::LazyParams::narrow_keys): written `auto/q4_0`, for keys that are `q8_0`
    /// before.
    pub narrow_keys: bool,
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
}

impl From<Policy> for Contender {
    fn from(policy: Policy) -> Contender {
        Contender { policy, types: None, narrow_keys: false }
    }
}

impl FromStr for Contender {
    type Err = ParseContenderError;

    fn from_str(text: &str) -> Result<Contender, ParseContenderError> {
        let Some((rule, types)) = text.split_once('@') else { return Ok(Contender::from(text.parse::<Policy>()?)) };
        let wrong = || ParseContenderError::Types { types: types.to_owned(), text: text.to_owned() };
        let (narrow_keys, types) = match types.strip_prefix(NARROW_KEYS) {
            Some(of_values) => (true, Type::cache_type_from_name(of_values).map(|v| (Type::Q8_0, v))),
            None => (false, Type::cache_types_from_name(types)),
        };
        let types = Some(types.ok_or_else(wrong)?);
        Ok(Contender { policy: rule.parse()?, types, narrow_keys })
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.policy.fmt(f)?;
        match self.types {
            Some((_, v)) if self.narrow_keys => write!(f, "@{NARROW_KEYS}{v}"),
            Some((k, v)) if k == v => write!(f, "@{k}"),
            Some((k, v)) => write!(f, "@{k}/{v}"),
            None => Ok(()),
        }
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
        let typed = Contender { policy: budget, types: Some((Type::Q8_0, Type::Q4_0)), narrow_keys: false };
        assert_eq!(parse("budget:0.5@q8_0/q4_0"), Ok(typed));
        assert_eq!(parse("off@q8_0"), parse("off@q8_0/q8_0"));
        let narrow = parse("off@auto/q4_0").unwrap();
        assert_eq!((narrow.types, narrow.narrow_keys), (Some((Type::Q8_0, Type::Q4_0)), true));
        for text in ["budget:0.5", "auto@auto/q8_0", "budget:0.5@q8_0/q4_0", "off@q8_0", "auto@f16", "layers:1,2@q4_0"]
        {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
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
            ("", ""),
        ] {
            let error = text.parse::<Contender>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert!("off@q9".parse::<Contender>().unwrap_err().to_string().contains("q8_0"));
    }
}
