//! Hugging Face's dialect of Jinja on `minijinja`.

use minijinja::{
    Environment, Error, ErrorKind, State, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest},
};
use serde_json::Map;

use super::{
    ChatError,
    faithful::Conversation,
    fuel::{BYTES_PER_FUEL, FUEL},
    json::to_json,
    value,
};

/// Values that a hostile template nests are freed recursively: the stack must outlast the fuel. What is not used of it
/// is never touched.
const STACK_BYTES: usize = 512 << 20;

/// Marks an error that the template raised itself.
const RAISED: &str = "raised by the template: ";

pub(super) fn render(
    template: &str,
    bos: &str,
    eos: &str,
    conversation: &Conversation,
    variables: &Map<String, serde_json::Value>,
) -> Result<String, ChatError> {
    let run = || {
        let template = without_generation_tags(template);
        let mut env = environment()?;
        // An error would otherwise carry the template's variables.
        env.set_debug(false);
        env.set_fuel(Some(FUEL));
        let Conversation { messages, tools, add_generation_prompt } = conversation;
        // Templates ask whether there are tools at all, by `none` or by truth.
        let tools = if tools.is_empty() { Value::from(()) } else { tools.iter().map(value::value).collect() };
        let given = context! {
            messages => messages.iter().map(value::object).collect::<Value>(),
            tools,
            add_generation_prompt,
            bos_token => bos,
            eos_token => eos,
            documents => (),
        };
        let variables = value::object(variables);
        env.template_from_str(&template)?.render(context! { ..given, ..variables })
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES);
        match thread.spawn_scoped(scope, || run().map_err(|error| describe(&error))) {
            Ok(handle) => match handle.join() {
                Ok(result) => result,
                Err(_) => Err(ChatError::Template("the template engine panicked".to_owned())),
            },
            Err(error) => Err(ChatError::Template(format!("no thread could be started: {error}"))),
        }
    })
}

fn environment<'source>() -> Result<Environment<'source>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", to_json);
    env.add_filter("indent", indent);
    // Here None can be iterated over, in Python it cannot; templates ask this of `tools`.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    Ok(env)
}

fn describe(error: &Error) -> ChatError {
    if error.kind() == ErrorKind::OutOfFuel {
        return ChatError::Endless;
    }
    // The template's own message is somewhere in the chain when it was raised inside a macro.
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(error) = current.downcast_ref::<Error>() {
            if error.kind() == ErrorKind::OutOfFuel {
                return ChatError::Endless;
            }
            if let Some(message) = error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
                return ChatError::Refused(message.to_owned());
            }
        }
        cause = current.source();
    }
    ChatError::Template(error.to_string())
}

fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// jinja2's filter, which keeps a line break at the end where minijinja's drops it.
fn indent(state: &State, text: &str, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    const OPTIONS: [&str; 3] = ["width", "first", "blank"];
    if positional.len() > OPTIONS.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let option = |at: usize| -> Result<Option<Value>, Error> {
        match positional.get(at) {
            Some(value) => Ok(Some(value.clone())),
            None if named.has(OPTIONS[at]) => named.get(OPTIONS[at]).map(Some),
            None => Ok(None),
        }
    };
    let (width, first, blank) = (option(0)?, option(1)?, option(2)?);
    named.assert_all_used()?;
    let width = width.unwrap_or(Value::from(4));
    let (by, length) = match width.as_str() {
        Some(text) => (text, 1),
        None => (" ", usize::try_from(width.clone().try_into().unwrap_or(-1_i64)).unwrap_or(0)),
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let lines = lines(text);
    // Before so much memory is asked for.
    let bytes = lines.len().saturating_mul(length).saturating_mul(by.len()).saturating_add(text.len());
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)?;
    let by = by.repeat(length);
    let indented = lines.iter().enumerate().map(|(at, line)| match at {
        0 if first => format!("{by}{line}"),
        1.. if blank || !line.is_empty() => format!("{by}{line}"),
        _ => (*line).to_owned(),
    });
    Ok(indented.collect::<Vec<_>>().join("\n"))
}

/// The lines as Python's `splitlines` finds them, the empty one behind a last line break included.
fn lines(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        if matches!(
            character,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        ) {
            lines.push(&text[start..at]);
            if character == '\r' {
                characters.next_if(|&(_, next)| next == '\n');
            }
            start = characters.peek().map_or(text.len(), |&(next, _)| next);
        }
    }
    lines.push(&text[start..]);
    lines
}

/// `{% generation %}` marks the assistant's words for training and changes nothing in the text; minijinja does not
/// know it, so a condition that always holds takes its place.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inner.replacen(word, replacement, 1));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}
