//! The filter `tojson` as Hugging Face defines it: Python's `json.dumps`, by default with non-ASCII characters as they
//! are. A model has seen its tools written so, to the last blank.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, Rest, ValueKind},
};

use super::{fuel::BYTES_PER_FUEL, value};

/// Python gives up at about as many, too.
const MAX_DEPTH: usize = 500;

/// The options in the order in which they may be given without a name.
const OPTIONS: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];

pub(super) fn to_json(state: &State, value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let options = Options::new(&positional, &named)?;
    let limit = match state.fuel_levels() {
        Some((_, remaining)) => usize::try_from(remaining).unwrap_or(usize::MAX).saturating_mul(BYTES_PER_FUEL),
        None => usize::MAX,
    };
    let mut json = Writer { out: String::new(), limit, options };
    json.value(value, 0)?;
    state.consume_fuel((json.out.len() / BYTES_PER_FUEL) as u64)?;
    Ok(Value::from(json.out))
}

/// The same text for a value of our own.
pub(super) fn dumps(value: &serde_json::Value) -> String {
    let options = Options {
        ensure_ascii: false,
        indent: None,
        item_separator: ", ".to_owned(),
        key_separator: ": ".to_owned(),
        sort_keys: false,
    };
    let mut json = Writer { out: String::new(), limit: usize::MAX, options };
    // What serde_json holds can be written, but for values nested too deep.
    match json.value(&value::value(value), 0) {
        Ok(()) => json.out,
        Err(_) => value.to_string(),
    }
}

struct Options {
    ensure_ascii: bool,
    /// What each level is indented by; without it everything is on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl Options {
    fn new(positional: &[Value], named: &Kwargs) -> Result<Options, Error> {
        if positional.len() > OPTIONS.len() {
            return Err(invalid(format!("tojson takes {} options, not {}", OPTIONS.len(), positional.len())));
        }
        let mut given: [Option<Value>; OPTIONS.len()] = [const { None }; OPTIONS.len()];
        for ((name, slot), at) in OPTIONS.iter().zip(&mut given).zip(0..) {
            let by_name: Option<Value> = if named.has(name) { Some(named.get(name)?) } else { None };
            *slot = match (positional.get(at), by_name) {
                (Some(_), Some(_)) => return Err(invalid(format!("tojson gets {name} twice"))),
                (by_position, by_name) => by_position.cloned().or(by_name),
            };
        }
        // An option that is passed over in silence would change what the model reads.
        named.assert_all_used()?;
        let [ensure_ascii, indent, separators, sort_keys] = given;
        let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
        let indent = indent.filter(|indent| !indent.is_none()).map(|indent| indentation(&indent)).transpose()?;
        let (item_separator, key_separator) = match separators.filter(|separators| !separators.is_none()) {
            Some(separators) => pair_of_texts(&separators)?,
            // Python leaves no blank at the end of a line.
            None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        };
        let (ensure_ascii, sort_keys) = (is_true(ensure_ascii), is_true(sort_keys));
        Ok(Options { ensure_ascii, indent, item_separator, key_separator, sort_keys })
    }
}

fn indentation(value: &Value) -> Result<String, Error> {
    const WIDEST: i64 = 100;
    if let Some(text) = value.as_str() {
        return match text.len() as i64 {
            ..=WIDEST => Ok(text.to_owned()),
            length => Err(invalid(format!("tojson: an indent of {length} bytes"))),
        };
    }
    let width = match value.kind() {
        ValueKind::Bool => i64::from(value.is_true()),
        ValueKind::Number if value.is_integer() => value.as_i64().unwrap_or(i64::MAX),
        kind => return Err(invalid(format!("tojson: indent is a number of blanks or a text, not a {kind}"))),
    };
    match width {
        ..=0 => Ok(String::new()),
        1..=WIDEST => Ok(" ".repeat(width as usize)),
        _ => Err(invalid(format!("tojson: an indent of {width} blanks"))),
    }
}

fn pair_of_texts(value: &Value) -> Result<(String, String), Error> {
    let texts: Vec<Value> = value.try_iter().map(|items| items.take(3).collect()).unwrap_or_default();
    match texts.as_slice() {
        [item, key] if value.as_str().is_none() => match (item.as_str(), key.as_str()) {
            (Some(item), Some(key)) => Ok((item.to_owned(), key.to_owned())),
            _ => Err(invalid("tojson: separators are two texts")),
        },
        _ => Err(invalid("tojson: separators are two texts")),
    }
}

struct Writer {
    out: String,
    /// Bytes that may be written.
    limit: usize,
    options: Options,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: values nested more than {MAX_DEPTH} deep")));
        }
        if self.out.len() > self.limit {
            return Err(Error::from(ErrorKind::OutOfFuel));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(invalid(format!("tojson: {kind} is no JSON value"))),
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut any = false;
        for item in value.try_iter()? {
            self.next(any, depth + 1);
            any = true;
            self.value(&item, depth + 1)?;
        }
        self.close(any, depth, ']');
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.options.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        for (at, key) in keys.iter().enumerate() {
            self.next(at > 0, depth + 1);
            let name = match key.kind() {
                ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                ValueKind::None => "null".to_owned(),
                ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
                ValueKind::Number => number(key)?,
                kind => return Err(invalid(format!("tojson: {kind} is no key"))),
            };
            self.text(&name);
            self.out.push_str(&self.options.key_separator);
            self.value(&value.get_item(key)?, depth + 1)?;
        }
        self.close(!keys.is_empty(), depth, '}');
        Ok(())
    }

    /// What stands in front of an item.
    fn next(&mut self, others_before: bool, depth: usize) {
        if others_before {
            self.out.push_str(&self.options.item_separator);
        }
        self.line(depth);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.options.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(character),
                // Python takes DEL for none of ASCII's characters here.
                '\u{7f}'.. if self.options.ensure_ascii => self.escape(character),
                character => self.out.push(character),
            }
        }
        self.out.push('"');
    }

    /// As UTF-16, so that a character beyond the first 65,536 is two escapes.
    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            self.out.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// A number as Python writes it.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    Ok(if number.is_nan() {
        "NaN".to_owned()
    } else if number.is_infinite() {
        if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else {
        float(number)
    })
}

/// The shortest digits that give the number back, with an exponent below 1e-4 and from 1e16 on.
fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent @ -4..=15) => {
            let plain = format!("{number}");
            if exponent >= 0 && !plain.contains('.') { format!("{plain}.0") } else { plain }
        }
        Ok(exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        Err(_) => scientific,
    }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::float;

    /// What Python's `repr` says.
    #[test]
    fn floats() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (f64::MIN_POSITIVE, "2.2250738585072014e-308"),
        ];
        for (number, text) in cases {
            assert_eq!(float(number), text);
        }
    }
}
