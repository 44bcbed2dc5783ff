//! JSON schemas as grammars.

use serde_json::Value;

use super::error::FormatError;
use crate::ggml;

/// Lists in lists and objects in objects that are read: serde_json's own bound for text.
const MAX_DEPTH: usize = 128;

/// The GBNF grammar, with a rule named `root`, of the JSON texts that a schema describes: llama.cpp's own conversion.
///
/// References (`$ref`) lead to places of the same schema. A `pattern` that grammars cannot say allows any string.
///
/// ```
/// use serde_json::json;
///
/// let schema = json!({"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]});
/// let grammar = simlayer::chat::json_schema_to_grammar(&schema)?;
/// assert!(grammar.contains("root ::= "));
/// # Ok::<(), simlayer::chat::FormatError>(())
/// ```
///
/// # Errors
/// [`FormatError::Schema`] for what is no schema, or one with more than a mebibyte of text, more than 128 levels, or so
/// many branches that the conversion takes more than some seconds.
pub fn json_schema_to_grammar(schema: &Value) -> Result<String, FormatError> {
    check_depth(schema).map_err(FormatError::Schema)?;
    ggml::json_schema_to_grammar(&schema.to_string()).map_err(FormatError::Schema)
}

/// Refuses values that are nested too deeply for code that recurses over them.
pub(super) fn check_depth(value: &Value) -> Result<(), String> {
    let mut level = vec![value];
    for _ in 0..=MAX_DEPTH {
        if level.is_empty() {
            return Ok(());
        }
        let inner = level.into_iter().flat_map(|value| -> Box<dyn Iterator<Item = &Value>> {
            match value {
                Value::Array(items) => Box::new(items.iter()),
                Value::Object(fields) => Box::new(fields.values()),
                _ => Box::new(std::iter::empty()),
            }
        });
        level = inner.filter(|value| value.is_array() || value.is_object()).collect();
    }
    Err(format!("it is nested more than {MAX_DEPTH} levels deep"))
}

/// As [`check_depth`], for JSON in a text: the levels that its brackets open outside of strings.
pub(super) fn check_text_depth(text: &str) -> Result<(), String> {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(format!("it is nested more than {MAX_DEPTH} levels deep"));
        }
    }
    Ok(())
}
