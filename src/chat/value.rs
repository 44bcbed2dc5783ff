//! JSON as templates see it.
//!
//! serde_json's own way of handing its values over depends on how it was built: with `arbitrary_precision`, which any
//! crate of a program can ask for, its numbers arrive as maps. So the values are walked here.

use minijinja::value::{Serde, Value};
use serde::{Serialize, Serializer};
use serde_json::Map;

/// The value, its objects in their order. A number is an integer of 64 bits where it is written as one and fits, else the
/// nearest f64; one that no f64 comes near is its digits as text.
pub(super) fn value(json: &serde_json::Value) -> Value {
    Value::from(Serde(Json(json)))
}

/// The same for an object.
pub(super) fn object(map: &Map<String, serde_json::Value>) -> Value {
    Value::from(Serde(Object(map)))
}

struct Json<'a>(&'a serde_json::Value);

struct Object<'a>(&'a Map<String, serde_json::Value>);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            serde_json::Value::Null => to.serialize_unit(),
            serde_json::Value::Bool(value) => to.serialize_bool(*value),
            serde_json::Value::String(text) => to.serialize_str(text),
            serde_json::Value::Array(items) => to.collect_seq(items.iter().map(Json)),
            serde_json::Value::Object(map) => Object(map).serialize(to),
            serde_json::Value::Number(number) => {
                if let Some(value) = number.as_u64() {
                    to.serialize_u64(value)
                } else if let Some(value) = number.as_i64() {
                    to.serialize_i64(value)
                } else if let Some(value) = number.as_f64() {
                    to.serialize_f64(value)
                } else {
                    to.collect_str(number)
                }
            }
        }
    }
}

impl Serialize for Object<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(key, value)| (key, Json(value))))
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::ValueKind;
    use serde_json::json;

    use super::*;

    /// `cargo test --features serde_json/arbitrary_precision chat::` holds it to the same.
    #[test]
    fn values_keep_kind_and_order() {
        let json =
            json!({"z": null, "a": [true, "2", 2, -3, u64::MAX, i64::MIN, 0.5, 2.0, 1e300], "m": {"y": 1, "b": 2}});
        let value = value(&json);
        let numbers = "2, -3, 18446744073709551615, -9223372036854775808, 0.5, 2.0, 1e300";
        let text = format!("{{'z': None, 'a': [True, '2', {numbers}], 'm': {{'y': 1, 'b': 2}}}}");
        assert_eq!(value.to_string(), text);
        assert_eq!(value, object(json.as_object().unwrap()));
        let numbers: Vec<Value> = value.get_attr("a").unwrap().try_iter().unwrap().skip(2).collect();
        assert!(numbers.iter().all(|number| number.kind() == ValueKind::Number), "{value}");
        let integers: Vec<bool> = numbers.iter().map(Value::is_integer).collect();
        assert_eq!(integers, [true, true, true, true, false, false, false]);
        assert_eq!(f64::try_from(numbers[6].clone()).unwrap(), 1e300);
    }
}
