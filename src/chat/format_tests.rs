//! Tool calls, reasoning and schemas by llama.cpp's chat files, in templates as models of several makers have them.

use serde_json::{Map, Value, json};
use simlayer_testkit::smollm2_path;

use super::{
    Answer, ChatFormat, ChatRequest, ChatTemplate, FormatError, Message, Prepared, ReasoningFormat, RenderOptions,
    ToolCall, ToolChoice, json_schema_to_grammar,
};
use crate::{
    gguf::Gguf,
    sampling::{GrammarTrigger, Sampler, SamplerParams, ThinkingTags},
    vocab::{AddBos, Special, Token, Vocab},
};

/// As Hermes and Qwen: JSON in tags, and thoughts in tags.
const HERMES: &str = "\
{%- if tools %}<|im_start|>system\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n\
For each call answer <tool_call>\n{\"name\": <name>, \"arguments\": <arguments>}\n</tool_call><|im_end|>\n{% endif %}\
{%- for message in messages %}\
{%- if message.role == 'assistant' %}<|im_start|>assistant\n\
{%- if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}\
{%- for call in message.tool_calls %}\n<tool_call>\n{\"name\": \"{{ call.function.name }}\", \"arguments\": \
{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n\
{%- elif message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n\
{%- else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}\
{%- if add_generation_prompt %}<|im_start|>assistant\n\
{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}";

/// As Llama 3: one JSON object, which names its parameters.
const LLAMA_3: &str = "\
{{- bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nAnswer {\"name\": name, \"parameters\": \
parameters}\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|eot_id|>{% endif %}\
{%- for message in messages %}\
{%- if message.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"\
{{- message.tool_calls[0].function.name }}\", \"parameters\": {{ message.tool_calls[0].function.arguments | tojson }}}\
<|eot_id|>\
{%- else %}<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>\n\n\
{{- message.content | trim }}<|eot_id|>{% endif %}{% endfor %}\
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}";

/// As Mistral: a list of JSON objects with ids.
const MISTRAL: &str = "\
{{- bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
{%- for message in messages %}\
{%- if message.role == 'user' or message.role == 'system' %}[INST]{{ message.content }}[/INST]\
{%- elif message.tool_calls %}[TOOL_CALLS][\
{%- for call in message.tool_calls %}{\"name\": \"{{ call.function.name }}\", \"arguments\": \
{{ call.function.arguments | tojson }}, \"id\": \"{{ call.id }}\"}{% if not loop.last %}, {% endif %}{% endfor %}]\
{{- eos_token }}\
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{\"content\": {{ message.content | tojson }}, \"call_id\": \
\"{{ message.tool_call_id }}\"}[/TOOL_RESULTS]\
{%- else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}";

/// As gpt-oss: channels, of which one is for thoughts, and calls that name whom they are to.
const GPT_OSS: &str = "\
{%- if tools %}<|start|>developer<|message|># Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\
{%- endif %}\
{%- for message in messages %}\
{%- if message.tool_calls %}\
{%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}\
<|start|>assistant to=functions.{{ message.tool_calls[0].function.name }}<|channel|>commentary json<|message|>\
{{- message.tool_calls[0].function.arguments | tojson }}<|call|>\
{%- elif message.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>\
{%- elif message.role == 'tool' %}<|start|>functions.weather to=assistant<|channel|>commentary<|message|>\
{{- message.content | tojson }}<|end|>\
{%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}\
{%- if add_generation_prompt %}<|start|>assistant{% endif %}";

/// As DeepSeek-R1: the prompt opens the thoughts.
const DEEPSEEK_R1: &str = "\
{{- bos_token }}{% for message in messages %}\
{%- if message.role == 'user' %}<｜User｜>{{ message.content }}\
{%- elif message.role == 'assistant' %}{% set content = message.content %}\
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}<｜Assistant｜>{{ content }}\
<｜end▁of▁sentence｜>\
{%- else %}{{ message.content }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}";

fn weather() -> Value {
    json!({"type": "function", "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    }})
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn with_tool() -> ChatRequest {
    ChatRequest { tools: vec![weather()], ..ChatRequest::new(vec![user("How is the weather in Oslo?")]) }
}

fn prepare(template: &str, request: &ChatRequest) -> Prepared {
    ChatFormat::new(template, "<s>", "</s>").unwrap().apply(request).unwrap()
}

fn call(id: &str, name: &str, arguments: &Value) -> (String, String, Value) {
    (id.to_owned(), name.to_owned(), arguments.clone())
}

/// An answer's calls, with their arguments as JSON.
fn calls(answer: &Answer) -> Vec<(String, String, Value)> {
    let call = |ToolCall { id, name, arguments }: &ToolCall| call(id, name, &serde_json::from_str(arguments).unwrap());
    answer.tool_calls.iter().map(call).collect()
}

#[test]
fn calls_are_read_as_each_model_writes_them() {
    let oslo = json!({"city": "Oslo"});
    let cases = [
        (HERMES, "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>", ""),
        (LLAMA_3, "{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}", ""),
        (
            MISTRAL,
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}, \"id\": \"abcdefghi\"}]",
            "abcdefghi",
        ),
        (GPT_OSS, " to=functions.weather<|channel|>commentary json<|message|>{\"city\": \"Oslo\"}", ""),
        (
            GPT_OSS,
            "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather json<|message|>{\"city\": \"Oslo\"}",
            "",
        ),
    ];
    for (template, text, id) in cases {
        let prepared = prepare(template, &with_tool());
        let answer = prepared.parse(text, false).unwrap();
        assert_eq!(calls(&answer), [call(id, "weather", &oslo)], "{text}");
        assert_eq!(answer.content, "", "{text}");
        // Whoever answers in words may.
        let words = if template == GPT_OSS { "<|channel|>final<|message|>Cold." } else { "Cold." };
        let answer = prepared.parse(words, false).unwrap();
        assert_eq!((answer.content.as_str(), answer.tool_calls), ("Cold.", Vec::new()), "{words}");
    }
}

#[test]
fn tools_are_in_the_prompt_and_in_the_grammar() {
    for template in [HERMES, LLAMA_3, MISTRAL, GPT_OSS] {
        let auto = prepare(template, &with_tool());
        assert!(auto.prompt.contains("The weather of a place"), "{}", auto.prompt);
        assert!(auto.prompt.contains("How is the weather in Oslo?"), "{}", auto.prompt);
        // Nothing but a brace begins Llama's calls, and that is no trigger.
        assert_eq!(auto.grammar.is_some(), template != LLAMA_3, "{auto:?}");
        assert_eq!(auto.grammar_triggers.is_empty(), template == LLAMA_3, "{auto:?}");
        let required = prepare(template, &ChatRequest { tool_choice: ToolChoice::Required, ..with_tool() });
        assert!(required.grammar.is_some() && required.grammar_triggers.is_empty(), "{required:?}");
        let none = prepare(template, &ChatRequest { tool_choice: ToolChoice::None, ..with_tool() });
        assert_eq!(none.grammar, None);
    }
    let mut request = with_tool();
    request.tools.push(json!({"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}));
    request.tool_choice = ToolChoice::Function("clock".to_owned());
    let prepared = prepare(HERMES, &request);
    assert!(prepared.prompt.contains("clock") && !prepared.prompt.contains("The weather of a place"));
    request.tool_choice = ToolChoice::Function("calendar".to_owned());
    let error = ChatFormat::new(HERMES, "", "").unwrap().apply(&request).unwrap_err();
    assert!(error.to_string().contains("calendar"), "{error}");
}

#[test]
fn several_calls_and_their_answers() {
    let format = ChatFormat::new(HERMES, "", "<|im_end|>").unwrap();
    let prepared = format.apply(&ChatRequest { parallel_tool_calls: Some(true), ..with_tool() }).unwrap();
    let one = |city: &str| {
        format!(
            "<tool_call>\n{{\"name\": \"weather\", \"arguments\": {{\"city\": \"{city}\", \"days\": 2}}}}\n</tool_call>"
        )
    };
    let answer = prepared.parse(&format!("{}\n{}", one("Oslo"), one("Tromsø")), false).unwrap();
    let expected = ["Oslo", "Tromsø"].map(|city| call("", "weather", &json!({"city": city, "days": 2})));
    assert_eq!(calls(&answer), expected);

    // A round trip: the call is in the next prompt, whether its arguments come as text or as an object.
    for arguments in [json!("{\"city\": \"Oslo\"}"), json!({"city": "Oslo"})] {
        let function = json!({"name": "weather", "arguments": arguments});
        let messages = vec![
            user("Weather?"),
            json!({"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}),
            json!({"role": "tool", "tool_call_id": "c1", "content": "8 degrees"}),
        ];
        let prompt = format.apply(&ChatRequest { messages, ..with_tool() }).unwrap().prompt;
        assert!(prompt.contains("\"arguments\": {\"city\": \"Oslo\"}}"), "{prompt}");
        assert!(prompt.contains("<tool_response>\n8 degrees\n</tool_response>"), "{prompt}");
        assert!(prompt.ends_with("<|im_start|>assistant\n"), "{prompt}");
    }
}

#[test]
fn thoughts_are_taken_apart() {
    let deepseek = prepare(DEEPSEEK_R1, &ChatRequest::new(vec![user("2 + 2?")]));
    assert!(deepseek.supports_thinking && deepseek.prompt.ends_with("<think>\n"), "{deepseek:?}");
    let tags = ThinkingTags { start: "<think>".to_owned(), ends: vec!["</think>".to_owned()] };
    assert_eq!(deepseek.thinking, Some(tags));
    let answer = deepseek.parse("Two and two.\n</think>\n\n4", false).unwrap();
    assert_eq!((answer.reasoning_content.trim(), answer.content.trim()), ("Two and two.", "4"));

    let request = |reasoning_format| ChatRequest { reasoning_format, ..ChatRequest::new(vec![user("2 + 2?")]) };
    let text = "<think>\nTwo and two.\n</think>\n\n4";
    let answer = prepare(HERMES, &request(ReasoningFormat::DeepSeek)).parse(text, false).unwrap();
    assert_eq!((answer.reasoning_content.trim(), answer.content.as_str()), ("Two and two.", "4"));
    let answer = prepare(HERMES, &request(ReasoningFormat::None)).parse(text, false).unwrap();
    assert_eq!((answer.reasoning_content.as_str(), answer.content.as_str()), ("", text));

    let prepared = prepare(GPT_OSS, &request(ReasoningFormat::Auto));
    let text = "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>4";
    let answer = prepared.parse(text, false).unwrap();
    assert_eq!((answer.reasoning_content.as_str(), answer.content.as_str()), ("Two and two.", "4"));

    let without = ChatRequest { enable_thinking: false, ..request(ReasoningFormat::Auto) };
    assert!(prepare(HERMES, &without).prompt.ends_with("<think>\n\n</think>\n\n"));
}

/// Whatever pieces an answer comes in, its deltas make up the whole.
#[test]
fn streams_say_what_is_new() {
    let text = "<think>\nLook outside: cold.\n</think>\n\nI ask.\n<tool_call>\n{\"name\": \"weather\", \
                \"arguments\": {\"city\": \"Tromsø\", \"days\": 3}}\n</tool_call>";
    let prepared = prepare(HERMES, &with_tool());
    let whole = prepared.parse(text, false).unwrap();
    assert_eq!(whole.tool_calls.len(), 1);
    let characters: Vec<String> = text.chars().map(String::from).collect();
    for size in [1, 2, 7, 1000] {
        let mut stream = prepared.stream();
        let mut deltas = Vec::new();
        for piece in characters.chunks(size) {
            deltas.extend(stream.push(&piece.concat()).unwrap());
        }
        deltas.extend(stream.finish().unwrap());

        let mut made = Answer::default();
        for delta in &deltas {
            made.content += &delta.content;
            made.reasoning_content += &delta.reasoning_content;
            let Some(delta) = &delta.tool_call else { continue };
            if delta.index == made.tool_calls.len() {
                made.tool_calls.push(ToolCall::default());
            }
            let call = &mut made.tool_calls[delta.index];
            call.id += &delta.id;
            call.name += &delta.name;
            call.arguments += &delta.arguments;
        }
        assert_eq!(&made, stream.answer(), "{size}");
        assert!(made.tool_calls[0].id.starts_with("call_"));
        made.tool_calls[0].id.clear();
        assert_eq!(made, whole, "{size}");
        assert!(size > 7 || deltas.len() > 5, "{size}: {deltas:?}");
        assert_eq!(stream.text(), text);
    }
}

#[test]
fn plain_prompts_are_those_of_the_template() {
    let smollm2 = Gguf::open(smollm2_path()).unwrap();
    let own = smollm2.require_str("tokenizer.chat_template").unwrap();
    let messages =
        [("system", "Speak as pirates do."), ("user", "Ahoy <b>é"), ("assistant", "Hello & 🦙"), ("user", "Farewell")];
    for template in [HERMES, LLAMA_3, MISTRAL, GPT_OSS, DEEPSEEK_R1, own] {
        let prepared = {
            let message = |(role, content)| json!({"role": role, "content": content});
            prepare(template, &ChatRequest::new(messages.map(message).to_vec()))
        };
        let messages = messages.map(|(role, content)| Message::new(role, content));
        let thinks = prepared.supports_thinking;
        let variables = Map::from_iter([("enable_thinking".to_owned(), json!(thinks))]);
        let options = RenderOptions { add_generation_prompt: true, variables, ..RenderOptions::default() };
        let expected = ChatTemplate::jinja(template, "<s>", "</s>").render_with(&messages, &options).unwrap();
        assert_eq!(prepared.prompt, expected);
    }
}

fn schemas() -> Vec<(Value, Vec<&'static str>, Vec<&'static str>)> {
    vec![
        (json!({"type": "integer", "minimum": 0, "maximum": 120}), vec!["0", "99", "120"], vec!["121", "-1", "1.5"]),
        (json!({"enum": ["a", 1, null]}), vec!["\"a\"", "1", "null"], vec!["\"b\"", "2"]),
        (json!({"type": "string", "pattern": "^[a-c]{2,3}$"}), vec!["\"abc\""], vec!["\"a\"", "\"abcd\""]),
        (
            json!({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}),
            vec!["[true]", "[true, false]"],
            vec!["[]", "[true, true, true]"],
        ),
        (
            json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"], "additionalProperties": false}),
            vec!["{\"name\": \"Ada\"}", "{\"name\": \"Ada\", \"age\": 36}"],
            vec!["{\"age\": 36}", "{\"name\": 1}"],
        ),
        (
            json!({"$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "additionalProperties": false}}, "$ref": "#/$defs/tree"}),
            vec!["{\"left\": {\"left\": {}}}"],
            vec!["{\"left\": 1}"],
        ),
        (
            json!({"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]}),
            vec!["null", "\"2026-11-28\""],
            vec!["\"soon\""],
        ),
    ]
}

/// Whether a grammar allows a text, and then the end.
fn allows(vocab: &Vocab, grammar: &str, text: &str) -> bool {
    let mut tokens = vocab.tokenize(text, AddBos::No, Special::Text).unwrap();
    tokens.push(vocab.eos().unwrap());
    let mut sampler =
        Sampler::new(vocab, &SamplerParams { grammar: Some(grammar.to_owned()), ..SamplerParams::greedy() }).unwrap();
    tokens.into_iter().all(|token| sampler.sample(&wish(vocab, token)) == Ok(token))
}

/// Logits of a model that wants this token.
fn wish(vocab: &Vocab, token: Token) -> Vec<f32> {
    let mut logits = vec![0.0; vocab.n_tokens()];
    logits[token as usize] = 10.0;
    logits
}

#[test]
fn schemas_become_grammars() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    for (schema, good, bad) in schemas() {
        let grammar = json_schema_to_grammar(&schema).unwrap();
        for text in good {
            assert!(allows(&vocab, &grammar, text), "{schema}: {text}\n{grammar}");
        }
        for text in bad {
            assert!(!allows(&vocab, &grammar, text), "{schema}: {text}\n{grammar}");
        }
    }
    for (schema, reason) in [
        (json!("string"), "must be an object"),
        (json!({"type": "text"}), "text"),
        (json!({"$ref": "#/nowhere"}), "nowhere"),
        (json!({"$ref": "other.json"}), "same document"),
        (json!({"type": "string", "pattern": "^(a$"}), "parentheses"),
        (json!({"type": "object", "properties": []}), "properties"),
        (json!({"type": "array", "minItems": -1}), "minItems"),
    ] {
        let error = json_schema_to_grammar(&schema).unwrap_err();
        assert!(matches!(&error, FormatError::Schema(why) if why.contains(reason)), "{schema}: {error}");
    }
}

#[test]
fn an_answer_is_held_to_a_schema() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let schema = json!({"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": false});
    let request = ChatRequest { json_schema: Some(schema), ..ChatRequest::new(vec![user("2 + 2?")]) };
    for template in [HERMES, LLAMA_3, MISTRAL] {
        let prepared = prepare(template, &request);
        let mut params = SamplerParams::greedy();
        prepared.constrain(&mut params);
        assert!(params.grammar.is_some() && params.grammar_triggers.is_empty());
        for (text, good) in [("{\"sum\": 4}", true), ("four", false)] {
            let mut sampler = Sampler::new(&vocab, &params).unwrap();
            let tokens = vocab.tokenize(text, AddBos::No, Special::Text).unwrap();
            let allowed = tokens.into_iter().all(|token| sampler.sample(&wish(&vocab, token)) == Ok(token));
            assert_eq!(allowed, good, "{template}: {text}\n{prepared:?}");
        }
        assert_eq!(prepared.parse("{\"sum\": 4}", false).unwrap().content, "{\"sum\": 4}");
    }
}

/// Before its trigger a lazy grammar allows everything, after it only what it says; thoughts have no triggers.
#[test]
fn grammars_wait_for_their_trigger() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let follow = |params: &SamplerParams, text: &str| {
        let mut sampler = Sampler::new(&vocab, params).unwrap();
        let tokens = vocab.tokenize(text, AddBos::No, Special::Text).unwrap();
        let allowed = |sampler: &mut Sampler| {
            tokens.iter().take_while(|&&token| sampler.sample(&wish(&vocab, token)) == Ok(token)).count()
                == tokens.len()
        };
        let first = allowed(&mut sampler);
        sampler.reset().unwrap();
        assert_eq!(allowed(&mut sampler.try_clone().unwrap()), first, "{text}");
        first
    };
    let params = |trigger: GrammarTrigger| SamplerParams {
        grammar: Some("root ::= \"<call>\" [a-z]+ \"</call>\"".to_owned()),
        grammar_triggers: vec![trigger],
        ..SamplerParams::greedy()
    };
    let word = params(GrammarTrigger::Word("<call>".to_owned()));
    let pattern = params(GrammarTrigger::Pattern("(<call>)".to_owned()));
    let full = params(GrammarTrigger::PatternFull("[\\s\\S]*(<call>)[\\s\\S]*".to_owned()));
    for params in [&word, &pattern, &full] {
        assert!(follow(params, "12 + 3 < 4? <call>weather</call>"));
        assert!(follow(params, "12 + 3"));
        assert!(!follow(params, "12 <call>3</call>"));
    }
    let thinking = Some(ThinkingTags { start: "<think>".to_owned(), ends: vec!["</think>".to_owned()] });
    let thinking = SamplerParams { thinking, ..word };
    assert!(follow(&thinking, "<think>A <call>3</call>?</think> No: <call>three</call>"));
    assert!(!follow(&thinking, "<think>A <call>3</call>?</think> Yes: <call>3</call>"));
    let opened = SamplerParams { grammar_prefix: "assistant<think>\n".to_owned(), ..thinking };
    assert!(follow(&opened, "A <call>3</call>?"));
    assert!(!follow(&opened, "</think><call>3</call>"));

    // A grammar without triggers goes on after the prompt's end.
    let prefix = SamplerParams {
        grammar: Some("root ::= \"Answer: \" [a-z]+".to_owned()),
        grammar_prefix: "Answer: ".to_owned(),
        ..SamplerParams::greedy()
    };
    assert!(follow(&prefix, "yes") && !follow(&prefix, "Answer"));
    let error = Sampler::new(&vocab, &SamplerParams { grammar_prefix: "Question".to_owned(), ..prefix }).unwrap_err();
    assert!(error.to_string().contains("Question"), "{error}");
    assert!(Sampler::new(&vocab, &params(GrammarTrigger::Pattern("(".to_owned()))).is_err());
    assert!(Sampler::new(&vocab, &params(GrammarTrigger::Token(Token::MAX))).is_err());
}

fn nested(n: usize) -> Value {
    (0..n).fold(json!({"type": "null"}), |inner, _| {
        // The macro would copy `inner`, with recursion.
        Value::Object(Map::from_iter([("type".to_owned(), "array".into()), ("items".to_owned(), inner)]))
    })
}

/// Frees a deep value without recursion.
fn dismantle(mut value: Value) {
    loop {
        value = match &mut value {
            Value::Object(fields) if fields.contains_key("items") => fields["items"].take(),
            _ => return,
        }
    }
}

#[test]
fn hostile_schemas_are_refused() {
    assert!(json_schema_to_grammar(&nested(60)).is_ok());
    let deep = nested(100_000);
    let error = json_schema_to_grammar(&deep).unwrap_err();
    assert!(error.to_string().contains("nested"), "{error}");
    dismantle(deep);

    let long = "x".repeat(2 << 20);
    let refused = |schema: Value, reason: &str| {
        let error = json_schema_to_grammar(&schema).unwrap_err().to_string();
        assert!(error.contains(reason) && error.len() < 2000, "{error}");
    };
    refused(json!({"const": long}), "1048576");
    // Itself, all of it.
    refused(json!({"allOf": [{"$ref": "#/x"}], "x": {"$ref": "#/x"}}), "nested too deeply");
    // Twice itself, forty times.
    let doubling = (0..40).fold(
        json!({"type": "null"}),
        |inner, _| json!({"type": ["object", "object"], "properties": {"a": inner}, "additionalProperties": false}),
    );
    refused(doubling, "too long");
    // A row of references is as deep as it is long.
    let mut chain = json!({"$ref": "#/0"});
    for at in 0..3000 {
        chain[at.to_string()] = json!({"$ref": format!("#/{}", at + 1)});
    }
    chain["3000"] = json!({"type": "null"});
    _ = json_schema_to_grammar(&chain);
    let name = " ".repeat(100_000);
    _ = json_schema_to_grammar(&json!({"type": "object", "properties": {name: {"type": "null"}}}));
    let many: Map<_, _> = (0..200).map(|at| (format!("p{at}"), json!({"type": "null"}))).collect();
    assert!(json_schema_to_grammar(&json!({"type": "object", "properties": many})).is_ok());
}

#[test]
fn hostile_templates_are_refused() {
    let run = |template: &str| {
        let format = ChatFormat::new(template, "", "").map_err(|error| error.to_string())?;
        format
            .apply(&ChatRequest::new(vec![user("Hi")]))
            .map(|prepared| prepared.prompt)
            .map_err(|error| error.to_string())
    };
    for broken in
        ["{{", "{% if %}", "{% for x in %}", "{% endfor %}", "{{ a b }}", "{% nonsense %}", "{{ 'a }}", "{% if true %}"]
    {
        let error = run(broken).unwrap_err();
        assert!(error.contains("template cannot be used") && error.len() > 40, "{broken}: {error}");
    }
    assert!(run("").is_err() && run(&"x".repeat(200_000)).is_err());
    let depth = 20_000;
    for deep in [
        format!("{{{{ {}1{} }}}}", "(".repeat(depth), ")".repeat(depth)),
        format!("{{{{ {}1{} }}}}", "[".repeat(depth), "]".repeat(depth)),
        format!("{{{{ {}1 }}}}", "1+".repeat(depth)),
        format!("{{{{ x{} }}}}", ".a".repeat(depth)),
        format!("{{{{ {}1 }}}}", "not ".repeat(depth)),
        "{% if 1 %}".repeat(10_000) + &"{% endif %}".repeat(2_000),
    ] {
        _ = run(&deep);
    }
    for endless in [
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set c = a + b %}{% endfor %}{% endfor %}",
    ] {
        let error = run(endless).unwrap_err();
        assert!(error.contains("nested too deeply") || error.contains("too long"), "{error}");
    }
}

#[test]
fn hostile_requests_and_answers_are_refused() {
    let format = ChatFormat::new(HERMES, "", "").unwrap();
    let refused = |request: ChatRequest, reason: &str| {
        let error = format.apply(&request).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let with = |messages: Value| ChatRequest::new(vec![messages]);
    refused(with(json!("hello")), "message");
    refused(with(json!({"content": "hello"})), "role");
    refused(with(json!({"role": "user"})), "content");
    refused(with(json!({"role": "user", "content": [{"type": "image_url"}]})), "content part");
    refused(ChatRequest { tools: vec![json!({"type": "retrieval"})], ..with(user("hi")) }, "tool");
    refused(ChatRequest { grammar: Some("root ::= \"a\"".to_owned()), ..with_tool() }, "grammar");
    let mut request = ChatRequest::new(vec![user("hi"), nested(100_000)]);
    assert!(format.apply(&request).unwrap_err().to_string().contains("nested"));
    dismantle(request.messages.remove(1));
    let arguments = "[".repeat(100_000);
    let calls = json!([{"type": "function", "function": {"name": "weather", "arguments": arguments}}]);
    refused(with(json!({"role": "assistant", "content": "", "tool_calls": calls})), "nested");

    let prepared = format.apply(&with_tool()).unwrap();
    for text in
        ["[".repeat(300_000), "{\"a\":".repeat(100_000), "\u{0}\u{7f}\u{fffd}".to_owned(), "<tool_call>".repeat(20_000)]
    {
        for before in ["", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": "] {
            for is_partial in [true, false] {
                // On the stack that a server's thread has.
                let (prepared, text) = (prepared.clone(), format!("{before}{text}"));
                let parse = move || _ = prepared.parse(&text, is_partial);
                std::thread::Builder::new().stack_size(256 << 10).spawn(parse).unwrap().join().unwrap();
            }
        }
    }
}
