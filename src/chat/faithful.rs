//! Hands a conversation to a template in a form in which nothing of it is lost.
//!
//! A template says nothing of what it leaves out: the words of a role that it does not know, text where it expects
//! typed parts, tools. So the conversation is rendered a second time with a mark behind every text. A mark that does not
//! come out shows that the template passed over its text; then the conversation is tried in other forms that mean the
//! same. The marks stand in the conversation itself, since templates treat roles and places differently.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::{ChatError, json::dumps};

/// Roles whose words a user's message can carry.
const SYSTEM_ROLES: [&str; 2] = ["system", "developer"];

/// Fields of a message of which a template may show what it likes: names of others, and thinking, which most templates
/// leave out on purpose.
const OPTIONAL_FIELDS: [&str; 6] = ["role", "name", "tool_call_id", "reasoning_content", "reasoning", "thinking"];

/// What a template is given.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Conversation {
    /// Objects with at least `role` and `content`.
    pub messages: Vec<Map<String, Value>>,
    pub tools: Vec<Value>,
    pub add_generation_prompt: bool,
}

/// The text of a conversation in the first of these forms that loses nothing: as it is; with the texts that were lost as
/// typed parts, or parts as text; with system messages as the beginning of the user's; and each of these with the
/// arguments of calls as objects or as JSON.
///
/// # Errors
/// [`ChatError::Lost`] when every form loses something; the template's own error when it takes the conversation in no
/// form.
pub(super) fn render(
    conversation: &Conversation,
    template: &dyn Fn(&Conversation) -> Result<String, ChatError>,
) -> Result<String, ChatError> {
    let first = attempt(conversation, template);
    let (concerned, mut fewest) = match &first {
        Ok((text, lost)) if lost.is_empty() => return Ok(text.clone()),
        Ok((_, lost)) => (lost.iter().filter_map(Piece::message).collect::<HashSet<_>>(), Some(lost.clone())),
        Err(error @ ChatError::Endless) => return Err(error.clone()),
        Err(_) => ((0..conversation.messages.len()).collect(), None),
    };
    let mut tried = vec![conversation.clone()];
    for form in other_forms(conversation, &concerned) {
        if tried.contains(&form) {
            continue;
        }
        if let Ok((text, lost)) = attempt(&form, template) {
            if lost.is_empty() {
                return Ok(text);
            }
            if fewest.as_ref().is_none_or(|fewest| lost.len() < fewest.len()) {
                fewest = Some(lost);
            }
        }
        tried.push(form);
    }
    match (fewest, first) {
        (Some(fewest), _) => Err(ChatError::Lost(describe(&fewest, conversation))),
        (None, first) => first.map(|(text, _)| text),
    }
}

/// Something of a conversation that a template may pass over.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Tool(usize),
    Content(usize),
    Field(usize, String),
    Call(usize, usize),
    /// Typed parts that came out as they are written in JSON or Python instead of being walked.
    Unwalked(usize),
}

impl Piece {
    fn message(&self) -> Option<usize> {
        match self {
            Piece::Tool(_) => None,
            Piece::Content(at) | Piece::Field(at, _) | Piece::Call(at, _) | Piece::Unwalked(at) => Some(*at),
        }
    }
}

fn describe(lost: &[Piece], conversation: &Conversation) -> String {
    let message = |at: usize| {
        let role = conversation.messages.get(at).and_then(|message| message.get("role")).and_then(Value::as_str);
        format!("message {} ({})", at + 1, role.unwrap_or_default())
    };
    let mut names: Vec<String> = Vec::new();
    for piece in lost {
        let name = match piece {
            Piece::Tool(_) => "the tools".to_owned(),
            Piece::Content(at) | Piece::Unwalked(at) => format!("the text of {}", message(*at)),
            Piece::Field(at, field) => format!("the field {field} of {}", message(*at)),
            Piece::Call(at, _) => format!("tool calls of {}", message(*at)),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

/// The rendered text, and what of the conversation is not in it.
fn attempt(
    conversation: &Conversation,
    template: &dyn Fn(&Conversation) -> Result<String, ChatError>,
) -> Result<(String, Vec<Piece>), ChatError> {
    let text = template(conversation)?;
    let (marked, marks) = mark(conversation);
    let Ok(rendered) = template(&marked) else {
        // The marks are in the template's way. The texts themselves must do.
        let lost = marks.pieces.into_iter().filter(|piece| !shows(&text, piece, conversation)).collect();
        return Ok((text, lost));
    };
    let found = marks.found(&rendered);
    let lost = (0..).zip(marks.pieces).filter(|(at, piece)| match piece {
        Piece::Unwalked(_) => found.contains(at),
        _ => !found.contains(at),
    });
    Ok((text, missed(lost.map(|(_, piece)| piece).collect(), conversation, template)))
}

/// Of what did not come out that which the template does not know. The rest it leaves out for its place in this
/// conversation: tools where no question follows, fields of earlier turns.
fn missed(
    mut lost: Vec<Piece>,
    conversation: &Conversation,
    template: &dyn Fn(&Conversation) -> Result<String, ChatError>,
) -> Vec<Piece> {
    let user = object(json!({"role": "user", "content": "Hi"}));
    let shown = |conversation: Conversation| -> Vec<Piece> {
        let (marked, marks) = mark(&conversation);
        let found = template(&marked).map(|rendered| marks.found(&rendered)).unwrap_or_default();
        (0..).zip(marks.pieces).filter(|(at, _)| found.contains(at)).map(|(_, piece)| piece).collect()
    };
    if lost.iter().any(|piece| matches!(piece, Piece::Tool(_))) {
        let shown =
            shown(Conversation { messages: vec![user.clone()], add_generation_prompt: true, ..conversation.clone() });
        lost.retain(|piece| !matches!(piece, Piece::Tool(_)) || !shown.contains(piece));
    }
    // One message tells whether the field is known.
    let mut unknown: Vec<Piece> = Vec::new();
    while let Some((at, field)) = lost.iter().find_map(|piece| match piece {
        Piece::Field(at, field) => Some((*at, field.clone())),
        _ => None,
    }) {
        let messages = std::iter::once(user.clone()).chain(conversation.messages.get(at).cloned()).collect();
        let shown = shown(Conversation { messages, add_generation_prompt: false, ..conversation.clone() });
        let is_known = shown.contains(&Piece::Field(1, field.clone()));
        let same = lost.extract_if(.., |piece| matches!(piece, Piece::Field(_, other) if *other == field));
        let same: Vec<Piece> = same.collect();
        if !is_known {
            unknown.extend(same);
        }
    }
    lost.extend(unknown);
    lost
}

/// Whether the unmarked text has this piece in it.
fn shows(text: &str, piece: &Piece, conversation: &Conversation) -> bool {
    let has = |value: Option<&Value>| value.and_then(Value::as_str).is_none_or(|part| text.contains(part.trim()));
    let message = |at: usize| conversation.messages.get(at);
    match piece {
        Piece::Tool(at) => has(conversation.tools.get(*at).and_then(name_of)),
        Piece::Call(at, call) => {
            let calls = message(*at).and_then(|message| message.get("tool_calls"));
            has(calls.and_then(|calls| calls.get(*call)).and_then(name_of))
        }
        Piece::Field(at, field) => has(message(*at).and_then(|message| message.get(field))),
        Piece::Content(at) => match message(*at).and_then(|message| message.get("content")) {
            Some(Value::Array(parts)) => parts.iter().all(|part| has(part.get("text"))),
            content => has(content),
        },
        // Without marks nothing tells whether parts were walked; that they fail elsewhere is unlikely.
        Piece::Unwalked(_) => true,
    }
}

/// Marks are numbers with a beginning that the conversation does not have. Digits are changed by no filter for letters
/// and escaped in no language.
struct Marks {
    prefix: String,
    pieces: Vec<Piece>,
}

impl Marks {
    const DIGITS: usize = 9;

    fn new(conversation: &Conversation) -> Marks {
        let text = json!([conversation.messages, conversation.tools]).to_string();
        let mut prefix = 70_368_744_177_664_u64;
        while text.contains(&prefix.to_string()) {
            prefix += 1;
        }
        Marks { prefix: prefix.to_string(), pieces: Vec::new() }
    }

    fn add(&mut self, piece: Piece) -> String {
        let number = self.pieces.len();
        self.pieces.push(piece);
        format!("{}{number:0width$}", self.prefix, width = Marks::DIGITS)
    }

    /// Puts a mark behind a text; there is nothing to lose of an empty one.
    fn append(&mut self, text: &mut String, piece: impl FnOnce() -> Piece) {
        if !text.trim().is_empty() {
            let mark = self.add(piece());
            text.push_str(&mark);
        }
    }

    fn found(&self, rendered: &str) -> HashSet<usize> {
        let numbers = rendered.match_indices(&self.prefix).filter_map(|(at, prefix)| {
            let start = at + prefix.len();
            rendered.get(start..start + Marks::DIGITS)?.parse().ok()
        });
        numbers.collect()
    }
}

/// The conversation with a mark behind each piece of it.
fn mark(conversation: &Conversation) -> (Conversation, Marks) {
    let mut marks = Marks::new(conversation);
    let mut marked = conversation.clone();
    for (at, tool) in marked.tools.iter_mut().enumerate() {
        if let Some(Value::String(name)) = name_of_mut(tool) {
            marks.append(name, || Piece::Tool(at));
        }
    }
    for (at, message) in marked.messages.iter_mut().enumerate() {
        for (field, value) in message.iter_mut() {
            match value {
                Value::String(text) if field == "content" => marks.append(text, || Piece::Content(at)),
                Value::String(text) if !OPTIONAL_FIELDS.contains(&field.as_str()) => {
                    marks.append(text, || Piece::Field(at, field.clone()));
                }
                Value::Array(parts) if field == "content" => mark_parts(parts, at, &mut marks),
                Value::Array(calls) if field == "tool_calls" => {
                    for (call, value) in calls.iter_mut().enumerate() {
                        mark_call(value, || Piece::Call(at, call), &mut marks);
                    }
                }
                _ => {}
            }
        }
    }
    (marked, marks)
}

fn mark_parts(parts: &mut [Value], message: usize, marks: &mut Marks) {
    for part in parts.iter_mut().filter_map(Value::as_object_mut) {
        if let Some(Value::String(text)) = part.get_mut("text") {
            marks.append(text, || Piece::Content(message));
        }
        // No template asks for this field: it shows only where the part is printed as a whole.
        part.insert("simlayer_mark".to_owned(), marks.add(Piece::Unwalked(message)).into());
    }
}

/// Marks a call's name and each argument that is a text. Arguments may be an object or its JSON.
fn mark_call(call: &mut Value, piece: impl Fn() -> Piece, marks: &mut Marks) {
    if let Some(Value::String(name)) = name_of_mut(call) {
        marks.append(name, &piece);
    }
    let call = if call.get("function").is_some() { &mut call["function"] } else { call };
    let mut mark_all = |arguments: &mut Map<String, Value>| {
        for argument in arguments.values_mut() {
            if let Value::String(text) = argument {
                marks.append(text, &piece);
            }
        }
    };
    match call.get_mut("arguments") {
        Some(Value::Object(arguments)) => mark_all(arguments),
        Some(Value::String(json)) => {
            if let Ok(mut arguments) = serde_json::from_str(json) {
                mark_all(&mut arguments);
                *json = Value::Object(arguments).to_string();
            }
        }
        _ => {}
    }
}

/// The name of a tool or call, which may lie in `function` or not.
fn name_of(tool: &Value) -> Option<&Value> {
    tool.get("function").unwrap_or(tool).get("name")
}

fn name_of_mut(tool: &mut Value) -> Option<&mut Value> {
    if tool.get("function").is_some() { tool["function"].get_mut("name") } else { tool.get_mut("name") }
}

/// Forms that say the same, in the order in which they are to be tried. `concerned` are the messages that the template
/// has trouble with.
fn other_forms(conversation: &Conversation, concerned: &HashSet<usize>) -> Vec<Conversation> {
    let everything: HashSet<usize> = (0..conversation.messages.len()).collect();
    let merged = merge_system(&conversation.messages, concerned);
    let forms = [
        Some(typed(&conversation.messages, concerned)),
        Some(typed(&conversation.messages, &everything)),
        flat(&conversation.messages),
        merged.clone(),
        merged.as_ref().map(|messages| typed(messages, &everything)),
        merged.as_ref().and_then(|messages| flat(messages)),
    ];
    let mut forms: Vec<_> = forms.into_iter().flatten().collect();
    // With other arguments the conversation may do as it is.
    let with_others = std::iter::once(&conversation.messages).chain(&forms);
    let with_others: Vec<_> = with_others.filter_map(|messages| other_arguments(messages)).collect();
    forms.extend(with_others);
    forms.into_iter().map(|messages| Conversation { messages, ..conversation.clone() }).collect()
}

/// Arguments of calls that are objects as JSON, and the other way round; `None` where there are none.
fn other_arguments(messages: &[Map<String, Value>]) -> Option<Vec<Map<String, Value>>> {
    let mut messages = messages.to_vec();
    let mut any = false;
    let calls = messages.iter_mut().filter_map(|message| message.get_mut("tool_calls")?.as_array_mut()).flatten();
    for call in calls {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        let Some(arguments) = call.get_mut("arguments") else { continue };
        let other = match &*arguments {
            Value::String(json) => serde_json::from_str(json).ok().filter(Value::is_object),
            Value::Object(_) => Some(dumps(arguments).into()),
            _ => None,
        };
        if let Some(other) = other {
            *arguments = other;
            any = true;
        }
    }
    any.then_some(messages)
}

/// These messages' texts as lists of one part.
fn typed(messages: &[Map<String, Value>], which: &HashSet<usize>) -> Vec<Map<String, Value>> {
    let mut messages = messages.to_vec();
    for (at, message) in messages.iter_mut().enumerate() {
        if let Some(Value::String(text)) = message.get("content")
            && which.contains(&at)
            && !text.is_empty()
        {
            let parts = json!([{"type": "text", "text": text}]);
            message.insert("content".to_owned(), parts);
        }
    }
    messages
}

/// Lists of parts as their texts, a line break between them; `None` where parts are none or hold something else.
fn flat(messages: &[Map<String, Value>]) -> Option<Vec<Map<String, Value>>> {
    let mut messages = messages.to_vec();
    let mut any = false;
    for content in messages.iter_mut().filter_map(|message| message.get_mut("content")) {
        if content.is_array() {
            *content = flat_text(content)?.into();
            any = true;
        }
    }
    any.then_some(messages)
}

fn flat_text(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let texts = parts.iter().map(|part| part.as_str().or_else(|| part.get("text")?.as_str()));
            Some(texts.collect::<Option<Vec<_>>>()?.join("\n"))
        }
        _ => None,
    }
}

/// These of the system messages as the beginning of the next user message; `None` where there are none, or one has no
/// user message behind it.
fn merge_system(messages: &[Map<String, Value>], which: &HashSet<usize>) -> Option<Vec<Map<String, Value>>> {
    let has_role = |message: &Map<String, Value>, roles: &[&str]| {
        message.get("role").and_then(Value::as_str).is_some_and(|role| roles.contains(&role))
    };
    let mut merged = Vec::new();
    let mut waiting: Vec<String> = Vec::new();
    let mut any = false;
    for (at, message) in messages.iter().enumerate() {
        if which.contains(&at) && has_role(message, &SYSTEM_ROLES) {
            waiting.push(flat_text(message.get("content")?)?);
            any = true;
            continue;
        }
        let mut message = message.clone();
        if !waiting.is_empty() && has_role(&message, &["user"]) {
            let before = waiting.join("\n\n") + "\n\n";
            waiting.clear();
            match message.get_mut("content")? {
                Value::String(text) => text.insert_str(0, &before),
                Value::Array(parts) => parts.insert(0, json!({"type": "text", "text": before})),
                _ => return None,
            }
        }
        merged.push(message);
    }
    (any && waiting.is_empty()).then_some(merged)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
