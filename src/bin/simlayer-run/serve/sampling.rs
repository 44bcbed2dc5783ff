//! How a request wants its tokens chosen: llama-server's and OpenAI's names, over the command line's settings.

use serde_json::{Map, Value};
use simlayer::{
    SamplerParams, Token, Vocab,
    sampling::{Mirostat, SamplerStep},
};

use super::error::ApiError;

/// Logit biases that a request may have.
const MOST_BIASES: usize = 4096;
/// Longest text that ends an answer, and how many there may be.
const MOST_STOPS: usize = 64;
const LONGEST_STOP: usize = 1024;

/// A member of a request; `null` is as if it were not there.
pub fn member<'a>(body: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    body.get(name).filter(|value| !value.is_null())
}

pub fn number(body: &Map<String, Value>, name: &str) -> Result<Option<f32>, ApiError> {
    let number = member(body, name).map(|value| match value.as_f64().map(|number| number as f32) {
        Some(number) if number.is_finite() => Ok(number),
        _ => Err(ApiError::param(name, format_args!("{} is no number", short(value)))),
    });
    number.transpose()
}

pub fn integer(body: &Map<String, Value>, name: &str) -> Result<Option<i64>, ApiError> {
    let integer = member(body, name).map(|value| {
        let whole = value.as_i64().or_else(|| value.as_f64().filter(|number| number.fract() == 0.0).map(|n| n as i64));
        whole.ok_or_else(|| ApiError::param(name, format_args!("{} is no whole number", short(value))))
    });
    integer.transpose()
}

pub fn boolean(body: &Map<String, Value>, name: &str) -> Result<Option<bool>, ApiError> {
    let boolean = member(body, name).map(|value| {
        value.as_bool().ok_or_else(|| ApiError::param(name, format_args!("{} is neither true nor false", short(value))))
    });
    boolean.transpose()
}

pub fn text<'a>(body: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, ApiError> {
    let text = member(body, name).map(|value| {
        value.as_str().ok_or_else(|| ApiError::param(name, format_args!("{} is no string", short(value))))
    });
    text.transpose()
}

/// A value in a message to a client, which may have sent megabytes.
pub fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// How many tokens an answer may have: the first of these members that is there. Negative is no limit.
pub fn limit(body: &Map<String, Value>, names: &[&str]) -> Result<Option<Option<usize>>, ApiError> {
    for name in names {
        if let Some(limit) = integer(body, name)? {
            return Ok(Some(usize::try_from(limit).ok()));
        }
    }
    Ok(None)
}

/// Texts that end an answer: one, or a list.
pub fn stops(value: Option<&Value>, name: &str) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::param(name, "it must be a string or a list of strings");
    let stops: Vec<String> = match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => {
            stops.iter().map(|stop| stop.as_str().map(str::to_owned).ok_or_else(wrong)).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(wrong()),
    };
    if stops.len() > MOST_STOPS || stops.iter().any(|stop| stop.len() > LONGEST_STOP) {
        let message = format!("at most {MOST_STOPS} strings of {LONGEST_STOP} bytes can end an answer");
        return Err(ApiError::param(name, message));
    }
    Ok(stops)
}

/// The settings with what the request says.
pub fn params(
    body: &Map<String, Value>,
    defaults: &SamplerParams,
    vocab: &Vocab,
    n_ctx: usize,
) -> Result<SamplerParams, ApiError> {
    let mut params = defaults.clone();
    let numbers: [(&str, &mut f32); 16] = [
        ("temperature", &mut params.temperature),
        ("dynatemp_range", &mut params.dynatemp_range),
        ("dynatemp_exponent", &mut params.dynatemp_exponent),
        ("top_p", &mut params.top_p),
        ("min_p", &mut params.min_p),
        ("typical_p", &mut params.typical_p),
        ("top_n_sigma", &mut params.top_n_sigma),
        ("xtc_probability", &mut params.xtc_probability),
        ("xtc_threshold", &mut params.xtc_threshold),
        ("repeat_penalty", &mut params.repeat_penalty),
        ("frequency_penalty", &mut params.frequency_penalty),
        ("presence_penalty", &mut params.presence_penalty),
        ("dry_multiplier", &mut params.dry_multiplier),
        ("dry_base", &mut params.dry_base),
        ("adaptive_target", &mut params.adaptive_target),
        ("adaptive_decay", &mut params.adaptive_decay),
    ];
    for (name, param) in numbers {
        if let Some(given) = number(body, name)? {
            *param = given;
        }
    }
    let counts: [(&str, &mut i32); 2] =
        [("top_k", &mut params.top_k), ("dry_allowed_length", &mut params.dry_allowed_length)];
    for (name, param) in counts {
        if let Some(given) = integer(body, name)? {
            *param = i32::try_from(given).map_err(|_| ApiError::param(name, "it is out of range"))?;
        }
    }
    let last_n: [(&str, &mut u32); 2] =
        [("repeat_last_n", &mut params.repeat_last_n), ("dry_penalty_last_n", &mut params.dry_penalty_last_n)];
    for (name, param) in last_n {
        if let Some(given) = integer(body, name)? {
            let given = if given == -1 { n_ctx as i64 } else { given };
            *param = u32::try_from(given).map_err(|_| ApiError::param(name, "it must be -1 or more"))?;
        }
    }
    if let Some(breakers) = member(body, "dry_sequence_breakers") {
        params.dry_sequence_breakers = stops(Some(breakers), "dry_sequence_breakers")?;
    }
    if let Some(samplers) = member(body, "samplers") {
        params.samplers = steps(samplers)?;
    }
    if let Some(ignore) = boolean(body, "ignore_eos")? {
        params.ignore_eos = ignore;
    }
    if let Some(seed) = integer(body, "seed")? {
        // Clients send any 64 bits; -1 is a random one.
        params.seed = (seed != -1).then_some(seed as u32);
    }
    let (tau, eta) = params.mirostat.tau_and_eta();
    let (tau, eta) = (number(body, "mirostat_tau")?.unwrap_or(tau), number(body, "mirostat_eta")?.unwrap_or(eta));
    match integer(body, "mirostat")?.unwrap_or(params.mirostat.version()) {
        version @ 0..=2 => params.mirostat = Mirostat::new(version, tau, eta),
        other => return Err(ApiError::param("mirostat", format_args!("{other} is none of 0, 1 and 2"))),
    }
    if let Some(grammar) = text(body, "grammar")?.filter(|grammar| !grammar.is_empty()) {
        params.grammar = Some(grammar.to_owned());
    }
    if let Some(bias) = member(body, "logit_bias") {
        params.logit_bias = biases(bias, vocab)?;
    }
    Ok(params)
}

/// Samplers in their order: a list of names, or their letters.
fn steps(value: &Value) -> Result<Vec<SamplerStep>, ApiError> {
    let wrong = || ApiError::param("samplers", "it must be a list of names, or a string of letters");
    let steps = match value {
        Value::String(letters) => SamplerStep::sequence(letters),
        Value::Array(names) => {
            let names: Option<Vec<&str>> = names.iter().map(Value::as_str).collect();
            SamplerStep::list(&names.ok_or_else(wrong)?.join(";"))
        }
        _ => return Err(wrong()),
    };
    steps.map_err(|error| ApiError::param("samplers", error))
}

/// OpenAI's object of tokens, or llama-server's list of pairs; a bias of `false` forbids a token.
fn biases(value: &Value, vocab: &Vocab) -> Result<Vec<(Token, f32)>, ApiError> {
    let wrong = || ApiError::param("logit_bias", "it must be an object of tokens and biases, or a list of such pairs");
    let pairs: Vec<(Value, &Value)> = match value {
        Value::Object(object) => {
            let key = |key: &String| key.parse::<i64>().map_or_else(|_| Value::from(key.as_str()), Value::from);
            object.iter().map(|(token, bias)| (key(token), bias)).collect()
        }
        Value::Array(list) => {
            let pair = |pair: &'_ Value| match pair.as_array().map(Vec::as_slice) {
                Some([token, _]) => Ok(token.clone()),
                _ => Err(wrong()),
            };
            let tokens: Vec<Value> = list.iter().map(pair).collect::<Result<_, _>>()?;
            tokens.into_iter().zip(list.iter().map(|pair| &pair[1])).collect()
        }
        _ => return Err(wrong()),
    };
    if pairs.len() > MOST_BIASES {
        return Err(ApiError::param("logit_bias", format_args!("at most {MOST_BIASES} tokens can have one")));
    }
    let mut biases = Vec::new();
    for (token, bias) in pairs {
        let bias = match bias {
            Value::Bool(false) => f32::NEG_INFINITY,
            bias => bias.as_f64().ok_or_else(wrong)? as f32,
        };
        match &token {
            Value::String(text) => {
                let tokens = vocab.tokenize(text, simlayer::AddBos::No, simlayer::Special::Text)?;
                biases.extend(tokens.into_iter().map(|token| (token, bias)));
            }
            token => {
                let token = token.as_i64().and_then(|token| Token::try_from(token).ok());
                let token = token.filter(|&token| (0..vocab.n_tokens() as i64).contains(&i64::from(token)));
                let token = token.ok_or_else(|| ApiError::param("logit_bias", "it names a token that there is not"))?;
                biases.push((token, bias));
            }
        }
    }
    Ok(biases)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use simlayer_testkit::smollm2_path;

    use super::*;

    fn of(body: Value) -> Result<SamplerParams, ApiError> {
        let vocab = Vocab::load(&smollm2_path()).unwrap();
        params(body.as_object().unwrap(), &SamplerParams::default(), &vocab, 2048)
    }

    #[test]
    fn members_take_the_place_of_settings() {
        let params = of(json!({"temperature": 0, "top_k": 3.0, "repeat_last_n": -1, "seed": 7, "top_p": null,
            "logit_bias": {"5": -100, "the": 1}, "mirostat": 2, "stop": "x", "unknown": {}}))
        .unwrap();
        assert_eq!((params.temperature, params.top_k, params.repeat_last_n, params.seed), (0.0, 3, 2048, Some(7)));
        assert_eq!((params.top_p, params.mirostat), (0.95, Mirostat::new(2, Mirostat::TAU, Mirostat::ETA)));
        assert_eq!(params.logit_bias[0], (5, -100.0));
        assert!(params.logit_bias.len() > 1);
        for samplers in [json!(["temperature", "top-k"]), json!("tk")] {
            let params = of(json!({"samplers": samplers, "adaptive_target": 0.5})).unwrap();
            assert_eq!(params.samplers, [SamplerStep::Temperature, SamplerStep::TopK]);
            assert_eq!(params.adaptive_target, 0.5);
        }
        let params = of(json!({"logit_bias": [[5, false], [6, 0.5]]})).unwrap();
        assert_eq!(params.logit_bias, [(5, f32::NEG_INFINITY), (6, 0.5)]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, name) in [
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_k": 1.5}), "top_k"),
            (json!({"top_k": 1e30}), "top_k"),
            (json!({"repeat_last_n": -2}), "repeat_last_n"),
            (json!({"ignore_eos": 1}), "ignore_eos"),
            (json!({"mirostat": 3}), "mirostat"),
            (json!({"samplers": ["nonsense"]}), "samplers"),
            (json!({"samplers": {}}), "samplers"),
            (json!({"logit_bias": {"999999999": 1}}), "logit_bias"),
            (json!({"logit_bias": [[1]]}), "logit_bias"),
            (json!({"grammar": 5}), "grammar"),
        ] {
            let error = of(body).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(name)));
        }
        assert_eq!(stops(Some(&json!(["a", "b"])), "stop").unwrap(), ["a", "b"]);
        assert!(stops(Some(&json!([1])), "stop").is_err());
        assert!(stops(Some(&json!(vec!["x"; 100])), "stop").is_err());
    }
}
