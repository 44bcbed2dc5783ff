//! What a model's file recommends: its `general.sampling.…` keys, as llama.cpp's tools read them.

use super::{Mirostat, SamplerParams, SamplerStep};
use crate::gguf::{Gguf, Value};

impl SamplerParams {
    /// llama-cli's settings with those in their place that the file has. What is no number there, and names of samplers
    /// that there are not, do not count.
    pub fn recommended(file: &Gguf) -> SamplerParams {
        let mut params = SamplerParams::default();
        let number = |name: &str| number(file.get(&format!("general.sampling.{name}"))?);
        if let Some(Value::String(names)) = file.get("general.sampling.sequence") {
            let names = String::from_utf8_lossy(names);
            params.samplers = names.split(';').filter_map(|name| SamplerStep::from_name(name.trim())).collect();
        }
        let floats: [(&str, &mut f32); 6] = [
            ("top_p", &mut params.top_p),
            ("min_p", &mut params.min_p),
            ("xtc_probability", &mut params.xtc_probability),
            ("xtc_threshold", &mut params.xtc_threshold),
            ("temp", &mut params.temperature),
            ("penalty_repeat", &mut params.repeat_penalty),
        ];
        for (name, param) in floats {
            *param = number(name).map_or(*param, |value| value as f32);
        }
        params.top_k = number("top_k").map_or(params.top_k, |value| value as i32);
        let last_n = number("penalty_last_n").filter(|&value| value >= 0.0);
        params.repeat_last_n = last_n.map_or(params.repeat_last_n, |value| value as u32);
        let tau = number("mirostat_tau").map_or(Mirostat::TAU, |value| value as f32);
        let eta = number("mirostat_eta").map_or(Mirostat::ETA, |value| value as f32);
        params.mirostat = Mirostat::new(number("mirostat").map_or(0, |version| version as i64), tau, eta);
        params
    }
}

/// A number of any type, or written as text.
fn number(value: Value<'_>) -> Option<f64> {
    let number = match value {
        Value::U8(value) => value.into(),
        Value::I8(value) => value.into(),
        Value::U16(value) => value.into(),
        Value::I16(value) => value.into(),
        Value::U32(value) => value.into(),
        Value::I32(value) => value.into(),
        Value::U64(value) => value as f64,
        Value::I64(value) => value as f64,
        Value::F32(value) => value.into(),
        Value::F64(value) => value,
        Value::String(text) => std::str::from_utf8(text).ok()?.trim().parse().ok()?,
        Value::Bool(_) | Value::Array(_) => return None,
    };
    number.is_finite().then_some(number)
}

#[cfg(test)]
mod tests {
    use simlayer_testkit::smollm2_path;

    use super::*;
    use crate::gguf::Override;

    #[test]
    fn the_files_keys_are_taken() {
        let mut file = Gguf::open(smollm2_path()).unwrap();
        assert_eq!(SamplerParams::recommended(&file), SamplerParams::default());
        for (name, value) in [
            ("temp", Override::Float(0.6)),
            ("top_k", Override::Int(20)),
            ("top_p", Override::Str("0.9".to_owned())),
            ("min_p", Override::Bool(true)),
            ("penalty_last_n", Override::Int(-1)),
            ("penalty_repeat", Override::Float(1.1)),
            ("mirostat", Override::Int(2)),
            ("mirostat_tau", Override::Float(4.0)),
            ("sequence", Override::Str("temperature;no_such;top_k".to_owned())),
        ] {
            file.set_override(&format!("general.sampling.{name}"), value);
        }
        let expected = SamplerParams {
            temperature: 0.6,
            top_k: 20,
            top_p: 0.9,
            repeat_penalty: 1.1,
            mirostat: Mirostat::V2 { tau: 4.0, eta: Mirostat::ETA },
            samplers: vec![SamplerStep::Temperature, SamplerStep::TopK],
            ..SamplerParams::default()
        };
        assert_eq!(SamplerParams::recommended(&file), expected);
    }
}
