//! Hugging Face's dialect of Jinja on `minijinja`.

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, Serde},
};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

use super::{ChatError, Message, RenderOptions};

/// Steps that a template may take; 64 bytes of text count as one. Real templates need some hundreds for a message, so
/// this is enough for a thousand messages and more, and an endless template stops at once.
const FUEL: u64 = 1_000_000;

/// Values that a hostile template nests are freed recursively: the stack must outlast the fuel. What is not used of it
/// is never touched.
const STACK_BYTES: usize = 512 << 20;

/// Marks an error that the template raised itself.
const RAISED: &str = "raised by the template: ";

pub(super) fn render(
    template: &str,
    bos: &str,
    eos: &str,
    messages: &[Message],
    options: &RenderOptions,
) -> Result<String, ChatError> {
    let run = || {
        let template = without_generation_tags(template);
        let mut env = environment()?;
        // An error would otherwise carry the template's variables.
        env.set_debug(false);
        env.set_fuel(Some(FUEL));
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                let fields = message.fields.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
                let own = [("role", message.role.as_str()), ("content", message.content.as_str())];
                Value::from_pairs(own.into_iter().map(|(name, value)| (name, Value::from(value))).chain(fields))
            })
            .collect();
        // Templates ask whether there are tools at all, by `none` or by truth.
        let tools = if options.tools.is_empty() { Value::from(()) } else { Value::from(Serde(&options.tools)) };
        let given = context! {
            messages,
            tools,
            add_generation_prompt => options.add_generation_prompt,
            bos_token => bos,
            eos_token => eos,
            documents => (),
        };
        let variables = Value::from(Serde(&options.variables));
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

/// `json.dumps` as Hugging Face calls it: not escaped for HTML, a space after commas and colons.
fn to_json(value: &Value, _positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut json = Vec::new();
    let result = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            value.serialize(&mut Serializer::with_formatter(&mut json, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, PythonFormatter(CompactFormatter))),
    };
    result.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(json).map(Value::from).map_err(|_| Error::from(ErrorKind::BadSerialization))
}

struct PythonFormatter(CompactFormatter);

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
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
