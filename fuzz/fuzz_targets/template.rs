//! Whatever a chat template says, and whatever a conversation holds: rendering it ends, and never panics or aborts.
//!
//! `cargo xtask fuzz template` runs it for ten minutes.
#![no_main]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use simlayer::chat::{ChatTemplate, Message, RenderOptions};

/// A template that runs out of fuel in each form of a conversation takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(60);

const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

// The input is text in sections, with a NUL between them: the template, then messages. A section that is a JSON object is
// a tool, a list the last message's typed parts or, in an assistant's, tool calls.
fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut sections = text.split('\0');
    let template = sections.next().unwrap_or_default();
    let mut messages: Vec<Message> = Vec::new();
    let mut options = RenderOptions::default();
    options.add_generation_prompt = bytes.len() % 2 == 0;
    for section in sections {
        match (serde_json::from_str(section), messages.pop()) {
            (Ok(tool @ Value::Object(_)), last) => {
                messages.extend(last);
                options.tools.push(tool);
            }
            (Ok(list @ Value::Array(_)), Some(last)) => {
                let field = if last.role == "assistant" { "tool_calls" } else { "content" };
                messages.push(last.with(field, list));
            }
            (_, last) => {
                messages.extend(last);
                messages.push(Message::new(ROLES[messages.len() % ROLES.len()], section));
            }
        }
    }
    let start = Instant::now();
    let _ = ChatTemplate::jinja(template, "<s>", "</s>").render_with(&messages, &options);
    // llama.cpp's own templates know texts only.
    options.tools.clear();
    messages.iter_mut().for_each(|message| message.fields.clear());
    if let Some(name) = ChatTemplate::builtin_names().get(bytes.len() % 64)
        && let Ok(builtin) = ChatTemplate::builtin(name)
    {
        let _ = builtin.render_with(&messages, &options);
    }
    assert!(start.elapsed() < PATIENCE, "it took {:?}", start.elapsed());
});

/// Writes templates in the manner of well-known ones to the folder that `cargo fuzz` reads first.
fn write_seeds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/template");
    fs::create_dir_all(&corpus).expect("fuzz/corpus can be made");
    let tool = r#"{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}"#;
    let calls = r#"[{"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2.5}}}]"#;
    let parts = r#"[{"type": "text", "text": "Hi"}, {"type": "image"}]"#;
    let seeds = [
        (
            "chatml",
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
             {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\0Be brief.\0Hi\0Hello\0rain"
                .to_owned(),
        ),
        (
            "no-system",
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]\
             {% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}\0Be brief.\0Hi"
                .to_owned(),
        ),
        (
            "parts",
            format!(
                "{{% for m in messages %}}{{% for part in m.content %}}{{% if part.type == 'text' %}}{{{{ part.text }}}}\
                 {{% endif %}}{{% endfor %}}{{% endfor %}}\0Be brief.\0Hi\0{parts}"
            ),
        ),
        (
            "tools",
            format!(
                "{{%- macro call(c) %}}{{{{ c.name ~ c.arguments | tojson(indent='\\t', separators=(',', ':')) }}}}{{% endmacro -%}}\
                 {{%- set ns = namespace(n=0) %}}{{%- for t in tools or [] %}}{{{{ t | tojson(ensure_ascii=true) | indent(2) }}}}\
                 {{%- endfor %}}{{%- for m in messages[::-1] %}}{{% set ns.n = ns.n + 1 %}}{{% if ns.n > 3 %}}{{% break %}}{{% endif %}}\
                 {{{{ m.content.split('x')[-1].strip() }}}}{{%- for c in m.tool_calls %}}{{{{ call(c.function) }}}}{{% endfor %}}\
                 {{%- endfor %}}{{% if messages | length > 9 %}}{{{{ raise_exception('no') }}}}{{% endif %}}\
                 \0Be brief.\0Oslo?\0\0{calls}\0rain\0{tool}"
            ),
        ),
    ];
    for (name, text) in seeds {
        fs::write(corpus.join(name), text).expect("fuzz/corpus is writable");
    }
}
