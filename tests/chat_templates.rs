//! The chat templates that llama.cpp carries, rendered by us and by jinja2 as Transformers sets it up: each conversation
//! comes out the same, or is refused with a reason. Nothing is lost in silence.
//!
//! `SIMLAYER_CHAT_TEMPLATES` names the folder of templates and `SIMLAYER_JINJA2` the one that Python imports jinja2 from;
//! `cargo xtask test` sets both.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Map, Value, json};
use simlayer::chat::{ChatError, ChatTemplate, Message, RenderOptions};
use simlayer_testkit::workspace_root;

/// The folders of templates and of jinja2, or a loud nothing; on the machine that checks everything they must be there.
fn folders() -> Option<(PathBuf, PathBuf)> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from);
    let folders = folder("SIMLAYER_CHAT_TEMPLATES").zip(folder("SIMLAYER_JINJA2"));
    if folders.is_none() {
        let todo = "run `cargo xtask test`, which fetches templates and jinja2 and sets SIMLAYER_CHAT_TEMPLATES and \
                    SIMLAYER_JINJA2";
        assert!(std::env::var_os("CI").is_none(), "{todo}");
        eprintln!("SKIPPED: {todo}");
    }
    folders
}

/// One conversation, with the words that must come out of it.
#[derive(Clone)]
struct Case {
    kind: &'static str,
    messages: Vec<Value>,
    tools: Vec<Value>,
    words: Vec<&'static str>,
    add_generation_prompt: bool,
    /// Further variables.
    variables: Map<String, Value>,
}

fn cases() -> Vec<Case> {
    let system = || json!({"role": "system", "content": "Speak as pirate-7 does."});
    let user = |text: &str| json!({"role": "user", "content": text});
    let assistant = |text: &str| json!({"role": "assistant", "content": text});
    let call = |id: &str, city: &str| json!({"id": id, "type": "function", "function": {"name": "weather_in", "arguments": {"city": city, "days": 2}}});
    let answer =
        |id: &str, text: &str| json!({"role": "tool", "name": "weather_in", "tool_call_id": id, "content": text});
    let tools = || {
        vec![json!({"type": "function", "function": {
            "name": "weather_in",
            "description": "The weather of the next days, as told by \"experts\"",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where: Oslo, Tromsø <north>"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        }})]
    };
    let case = |kind, messages: Vec<Value>, words: &[&'static str]| Case {
        kind,
        messages,
        tools: Vec::new(),
        words: words.to_vec(),
        add_generation_prompt: true,
        variables: Map::new(),
    };
    let thinking = |on: bool| Map::from_iter([("enable_thinking".to_owned(), Value::from(on))]);
    let turns = || vec![user("Ahoy-1 <b>é"), assistant("Hello-2 & 🦙"), user("Farewell-3")];
    let typed = |texts: &[&str]| Value::from_iter(texts.iter().map(|text| json!({"type": "text", "text": text})));
    let calling = |calls: Value| json!({"role": "assistant", "content": "", "tool_calls": calls});
    vec![
        case("user", vec![user("Ahoy-1 <b>é")], &["Ahoy-1"]),
        case("system", vec![system(), user("Ahoy-1")], &["pirate-7", "Ahoy-1"]),
        case("turns", turns(), &["Ahoy-1", "Hello-2", "Farewell-3"]),
        case("system and turns", [vec![system()], turns()].concat(), &["pirate-7", "Ahoy-1", "Hello-2", "Farewell-3"]),
        Case {
            tools: tools(),
            ..case("tools", vec![system(), user("Ahoy-1")], &["pirate-7", "Ahoy-1", "weather_in", "experts"])
        },
        Case {
            tools: tools(),
            ..case(
                "call and answer",
                vec![user("Ahoy-1"), calling(json!([call("call12345", "Bergen-4")])), answer("call12345", "Rain-5")],
                &["Ahoy-1", "weather_in", "experts", "Bergen-4", "Rain-5"],
            )
        },
        Case {
            tools: tools(),
            ..case(
                "two calls",
                vec![
                    user("Ahoy-1"),
                    calling(json!([call("call12345", "Bergen-4"), call("call67890", "Narvik-6")])),
                    answer("call12345", "Rain-5"),
                    answer("call67890", "Snow-8"),
                    assistant("Hello-2"),
                    user("Farewell-3"),
                ],
                &["Ahoy-1", "experts", "Bergen-4", "Narvik-6", "Rain-5", "Snow-8", "Hello-2", "Farewell-3"],
            )
        },
        Case {
            tools: tools(),
            ..case(
                "text beside a call",
                vec![
                    user("Ahoy-1"),
                    json!({"role": "assistant", "content": "Hello-2", "tool_calls": [call("call12345", "Bergen-4")]}),
                    answer("call12345", "Rain-5"),
                    assistant("Wet-9"),
                ],
                &["Ahoy-1", "Hello-2", "weather_in", "experts", "Bergen-4", "Rain-5", "Wet-9"],
            )
        },
        // Thinking may be left out, by the template's own rules.
        case(
            "thinking",
            vec![
                user("Ahoy-1"),
                json!({"role": "assistant", "content": "Hello-2", "reasoning_content": "Musing"}),
                user("Farewell-3"),
            ],
            &["Ahoy-1", "Hello-2", "Farewell-3"],
        ),
        Case {
            tools: tools(),
            variables: thinking(true),
            ..case(
                "thinking and a call",
                vec![
                    system(),
                    user("Ahoy-1"),
                    json!({
                        "role": "assistant",
                        "content": "",
                        "reasoning_content": "Musing",
                        "tool_calls": [call("call12345", "Bergen-4")],
                    }),
                    answer("call12345", "Rain-5"),
                ],
                &["pirate-7", "Ahoy-1", "weather_in", "experts", "Bergen-4", "Rain-5"],
            )
        },
        Case {
            variables: thinking(false),
            ..case("no thinking", [vec![system()], turns()].concat(), &["pirate-7", "Ahoy-1", "Hello-2", "Farewell-3"])
        },
        Case {
            add_generation_prompt: false,
            ..case(
                "thinking in the text",
                vec![user("Ahoy-1"), assistant("<think>\nMusing\n</think>\n\nHello-2")],
                &["Ahoy-1", "Hello-2"],
            )
        },
        case(
            "typed",
            vec![
                json!({"role": "system", "content": typed(&["Speak as pirate-7 does."])}),
                json!({"role": "user", "content": typed(&["Ahoy-1", "Again-2"])}),
            ],
            &["pirate-7", "Ahoy-1", "Again-2"],
        ),
    ]
}

/// The forms that say the same, made here on their own: as given, typed, flat, merged.
fn forms(case: &Case) -> Vec<Vec<Value>> {
    let typed_of = |messages: &[Value], roles: &[&str]| -> Vec<Value> {
        let mut messages = messages.to_vec();
        for message in &mut messages {
            if let Some(text) = message["content"].as_str().filter(|text| !text.is_empty()).map(str::to_owned)
                && roles.contains(&message["role"].as_str().unwrap())
            {
                message["content"] = json!([{"type": "text", "text": text}]);
            }
        }
        messages
    };
    let flat_of = |messages: &[Value]| -> Vec<Value> {
        let mut messages = messages.to_vec();
        for message in &mut messages {
            if let Some(parts) = message["content"].as_array() {
                let texts: Vec<&str> = parts.iter().map(|part| part["text"].as_str().unwrap()).collect();
                message["content"] = texts.join("\n").into();
            }
        }
        messages
    };
    let merged = match case.messages.as_slice() {
        [system, user, rest @ ..] if system["role"] == "system" => {
            let mut user = user.clone();
            let system = flat_of(std::slice::from_ref(system))[0]["content"].as_str().unwrap().to_owned();
            let before = format!("{system}\n\n");
            match &mut user["content"] {
                Value::Array(parts) => parts.insert(0, json!({"type": "text", "text": before})),
                text => *text = (before + text.as_str().unwrap()).into(),
            }
            Some([&[user], rest].concat())
        }
        _ => None,
    };
    let all = ["system", "user", "assistant", "tool"];
    let mut forms = Vec::new();
    for messages in std::iter::once(case.messages.clone()).chain(merged) {
        forms.push(messages.clone());
        forms.push(flat_of(&messages));
        forms.push(typed_of(&messages, &all));
        for roles in
            [&["user"][..], &["system"], &["assistant"], &["tool"], &["user", "assistant"], &["user", "system"]]
        {
            forms.push(typed_of(&messages, roles));
        }
    }
    let mut with_text_arguments = forms.clone();
    for call in with_text_arguments.iter_mut().flatten().filter_map(|message| message["tool_calls"].as_array_mut()) {
        for call in call {
            let arguments = &mut call["function"]["arguments"];
            *arguments = format!("{{\"city\": {}, \"days\": {}}}", arguments["city"], arguments["days"]).into();
        }
    }
    forms.extend(with_text_arguments);
    let mut distinct: Vec<Vec<Value>> = Vec::new();
    for form in forms {
        if !distinct.contains(&form) {
            distinct.push(form);
        }
    }
    distinct
}

/// What jinja2 is asked to render. Some templates fail unless the list of tools is an empty one, as llama.cpp gives it.
fn asked_of(case: &Case) -> Vec<(Vec<Value>, Value)> {
    let forms = forms(case);
    let no_tools = [Value::Null, json!([])].into_iter().take(if case.tools.is_empty() { 2 } else { 1 });
    no_tools.flat_map(|none| forms.iter().map(move |form| (form.clone(), none.clone()))).collect()
}

fn variables(case: &Case, messages: &[Value], no_tools: &Value) -> Value {
    let mut variables = json!({
        "messages": messages,
        "tools": if case.tools.is_empty() { no_tools.clone() } else { case.tools.clone().into() },
        "documents": null,
        "add_generation_prompt": case.add_generation_prompt,
        "bos_token": "<BOS>",
        "eos_token": "<EOS>",
    });
    variables.as_object_mut().unwrap().extend(case.variables.clone());
    variables
}

/// What jinja2 says.
#[derive(Clone)]
struct Answer {
    text: Result<String, String>,
    /// Where llama.cpp's reading of the template gives another text; chat_templates.py says which.
    as_llama_cpp: Option<String>,
}

fn second_renderer(jinja2: &Path, input: &Value) -> Vec<Answer> {
    let mut python = Command::new("python3")
        .arg(workspace_root().join("tests/chat_templates.py"))
        .env("PYTHONPATH", jinja2)
        .env("PYTHONIOENCODING", "utf-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    python.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "chat_templates.py failed");
    let results: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &Value, name: &str| value[name].as_str().map(str::to_owned);
    let answer = |value: &Value| Answer {
        text: text(value, "text").ok_or_else(|| text(value, "error").unwrap()),
        as_llama_cpp: text(value, "as_llama_cpp"),
    };
    results.iter().map(answer).collect()
}

/// The conversation as one of llama.cpp's built-in templates writes it, whichever.
fn builtins(case: &Case) -> Vec<String> {
    let names = ChatTemplate::builtin_names();
    let templates = names.iter().map(|name| ChatTemplate::builtin(name).unwrap());
    templates.filter_map(|template| render(&template, case).ok()).collect()
}

fn render(template: &ChatTemplate, case: &Case) -> Result<String, ChatError> {
    let message = |message: &Value| {
        let fields: Map<String, Value> = message.as_object().unwrap().clone();
        let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut own = Message::new(text("role"), text("content"));
        for (name, value) in fields {
            if !(name == "role" || name == "content" && value.is_string()) {
                own = own.with(name, value);
            }
        }
        own
    };
    let mut options = RenderOptions::default();
    options.add_generation_prompt = case.add_generation_prompt;
    options.tools = case.tools.clone();
    options.variables = case.variables.clone();
    let messages: Vec<Message> = case.messages.iter().map(message).collect();
    template.render_with(&messages, &options)
}

/// What became of a conversation.
enum Cell {
    Equal,
    /// Equal in another form, where the first would have lost something or failed.
    Adapted,
    /// Not jinja2's text, but llama.cpp's.
    AsLlamaCpp,
    /// A built-in template stands in for one that jinja2 cannot run either.
    BuiltIn,
    Refused(String),
    Wrong(String),
}

fn judge(case: &Case, ours: Result<String, ChatError>, theirs: &[Answer]) -> Cell {
    let leaks = |text: &str| ["'type': 'text'", "\"type\": \"text\""].iter().any(|leak| text.contains(leak));
    let whole = |text: &&String| case.words.iter().all(|word| text.contains(word)) && !leaks(text);
    let (first, others) = theirs.split_first().unwrap();
    let possible: Vec<&String> = others.iter().filter_map(|answer| answer.text.as_ref().ok()).filter(whole).collect();
    let text = match ours {
        Ok(text) => text,
        Err(error) => {
            // Refusing is right only where no form would do.
            let form = first.text.as_ref().ok().filter(whole).or(possible.first().copied());
            return match (form, &first.text) {
                (Some(form), _) => Cell::Wrong(format!("ours: {error}\njinja2: {form:?}")),
                (None, Err(reason)) => Cell::Refused(format!("{error} (jinja2: {reason})")),
                (None, Ok(_)) => match error {
                    ChatError::Lost(_) => Cell::Refused(error.to_string()),
                    _ => Cell::Wrong(format!("ours: {error}\njinja2 renders it, but not whole")),
                },
            };
        }
    };
    if !whole(&&text) {
        return Cell::Wrong(format!("something is lost: {text:?}"));
    }
    match &first.text {
        Ok(first) if *first == text => Cell::Equal,
        _ if theirs.iter().any(|answer| answer.as_llama_cpp.as_ref() == Some(&text)) => Cell::AsLlamaCpp,
        Ok(first) if whole(&first) => Cell::Wrong(format!("ours: {text:?}\njinja2: {first:?}")),
        _ if possible.contains(&&text) => Cell::Adapted,
        Err(_) if builtins(case).contains(&text) => Cell::BuiltIn,
        first => Cell::Wrong(format!("ours: {text:?}\njinja2: {first:?}\nother forms: {possible:?}")),
    }
}

#[test]
fn every_template_says_the_same_or_why_not() {
    let Some((folder, jinja2)) = folders() else { return };
    let mut templates = BTreeMap::new();
    for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "jinja") {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            templates.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
    assert!(templates.len() >= 50, "{}: only {} templates", folder.display(), templates.len());

    let cases = cases();
    let mut asked = Vec::new();
    for name in templates.keys() {
        for case in &cases {
            for (form, no_tools) in asked_of(case) {
                asked.push(json!({"template": name, "variables": variables(case, &form, &no_tools)}));
            }
        }
    }
    let mut answers = second_renderer(&jinja2, &json!({"templates": templates, "cases": asked})).into_iter();
    let mut counts: Vec<(&str, [usize; 5])> = cases.iter().map(|case| (case.kind, [0; 5])).collect();
    let mut remarks = Vec::new();
    let mut wrong = Vec::new();
    for (name, template) in &templates {
        let template = ChatTemplate::jinja(template, "<BOS>", "<EOS>");
        for (case, (kind, counts)) in cases.iter().zip(&mut counts) {
            let theirs: Vec<_> = answers.by_ref().take(asked_of(case).len()).collect();
            let (at, remark) = match judge(case, render(&template, case), &theirs) {
                Cell::Equal => (0, None),
                Cell::Adapted => (1, None),
                Cell::AsLlamaCpp => (2, Some("as llama.cpp reads it".to_owned())),
                Cell::BuiltIn => (3, Some("a built-in template instead".to_owned())),
                Cell::Refused(reason) => (4, Some(reason)),
                Cell::Wrong(why) => {
                    wrong.push(format!("{name}, {kind}:\n{why}\n"));
                    continue;
                }
            };
            counts[at] += 1;
            remarks.extend(remark.map(|remark| format!("{name}, {kind}: {remark}")));
        }
    }
    println!("{}", remarks.join("\n"));
    println!("{:<22}  equal  adapted  llama.cpp  built-in  refused", "");
    for (kind, [equal, adapted, llama_cpp, builtin, refused]) in &counts {
        println!("{kind:<22} {equal:>6} {adapted:>8} {llama_cpp:>10} {builtin:>9} {refused:>8}");
    }
    let cells = templates.len() * cases.len();
    println!("{} templates, {cells} cells, {} wrong", templates.len(), wrong.len());
    assert!(wrong.is_empty(), "{} of {cells} cells:\n{}", wrong.len(), wrong.join("\n"));
}
