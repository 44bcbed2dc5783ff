//! Templates written in the manner of the well-known ones, against what those models expect.

use serde_json::{Map, Value, json};

use super::{template::conversation, *};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const LLAMA3: &str = "{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}";

const MISTRAL: &str = "{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for m in turns %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + m['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + m['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
";

const GEMMA: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
    {% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";

/// The manner of Qwen 3: tools, namespaces, reversed slices, string methods.
const QWEN: &str = "{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' + tools | tojson }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}";

fn render(template: &str, messages: &[(&str, &str)], add_generation_prompt: bool) -> Result<String, ChatError> {
    let messages: Vec<_> = messages.iter().map(|&(role, content)| Message::new(role, content)).collect();
    ChatTemplate::jinja(template, "<s>", "</s>").render(&messages, add_generation_prompt)
}

const TURNS: [(&str, &str); 4] =
    [("system", "Be brief."), ("user", "Hi é"), ("assistant", " Hello! <b>"), ("user", "Bye ")];

#[test]
fn chatml() {
    let text = render(CHATML, &TURNS, true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi é<|im_end|>\n\
         <|im_start|>assistant\n Hello! <b><|im_end|>\n<|im_start|>user\nBye <|im_end|>\n<|im_start|>assistant\n"
    );
    // Two independent ways to the same text.
    let messages = TURNS.map(|(role, content)| Message::new(role, content));
    assert_eq!(ChatTemplate::builtin("chatml").unwrap().render(&messages, true).unwrap(), text);
}

#[test]
fn llama3() {
    assert_eq!(
        render(LLAMA3, &TURNS, true).unwrap(),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHi é<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\nHello! <b><|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[test]
fn mistral() {
    assert_eq!(
        render(MISTRAL, &TURNS, true).unwrap(),
        "<s>[INST] Hi é[/INST] Hello! <b></s>[INST] Be brief.\n\nBye [/INST]"
    );
}

#[test]
fn gemma_takes_the_system_message_into_the_first_turn() {
    assert_eq!(
        render(GEMMA, &TURNS, true).unwrap(),
        "<s><start_of_turn>user\nBe brief.\n\nHi é<end_of_turn>\n<start_of_turn>model\nHello! <b><end_of_turn>\n\
         <start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    );
}

#[test]
fn qwen() {
    let turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "<think>\nhm\n</think>\n\nHello"),
        ("user", "Bye"),
        ("assistant", "<think>\noh\n</think>\n\nBye!"),
    ];
    assert_eq!(
        render(QWEN, &turns, false).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
         <|im_start|>assistant\n<think>\noh\n</think>\n\nBye!<|im_end|>\n"
    );
}

/// Tools, calls and answers in the manner of Qwen 2.5 and 3, GLM 4 and Granite.
const TOOLS: &str = "{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function if tool_call.function else tool_call %}
            {{- '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response name=' + message.name + '>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}";

#[test]
fn tools_calls_and_thinking() {
    let call = json!([{"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}]);
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", "Oslo?"),
        Message::new("assistant", "").with("reasoning_content", "\nLook it up.\n").with("tool_calls", call),
        Message::new("tool", "Rain").with("name", "weather").with("tool_call_id", "1"),
    ];
    let options = RenderOptions {
        add_generation_prompt: true,
        tools: vec![json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}})],
        variables: [("enable_thinking".to_owned(), json!(false))].into_iter().collect(),
    };
    let text = ChatTemplate::jinja(TOOLS, "<s>", "</s>").render_with(&messages, &options).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.\n\n<tools>\n\
         {\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": {\"type\": \"object\"}}}\n\
         </tools><|im_end|>\n<|im_start|>user\nOslo?<|im_end|>\n\
         <|im_start|>assistant\n<think>\nLook it up.\n</think>\n\n<tool_call>\n\
         {\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 2}}\n</tool_call><|im_end|>\n\
         <|im_start|>user\n<tool_response name=weather>\nRain\n</tool_response><|im_end|>\n\
         <|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
    // Without them nothing of all that appears, and a thinking block in the content stays where it is.
    let plain = [Message::new("user", "Hi"), Message::new("assistant", "<think>\nhm\n</think>\n\nHello")];
    assert_eq!(
        ChatTemplate::jinja(TOOLS, "<s>", "</s>").render(&plain, true).unwrap(),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nHello<|im_end|>\n\
         <|im_start|>assistant\n"
    );
}

/// gpt-oss's channels: a developer message, and thinking beside the answer.
#[test]
fn channels() {
    let template = "{%- for m in messages %}{%- if m.role in ['system', 'developer'] %}\
        {{- '<|start|>developer<|message|># Instructions\\n\\n' + m.content + '<|end|>' }}\
        {%- elif m.role == 'assistant' %}{%- if m.thinking is defined %}\
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}\
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}\
        {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}\
        {{- ' ' + reasoning_effort | default('medium') }}";
    let messages = [
        Message::new("developer", "Be brief."),
        Message::new("user", "Hi"),
        Message::new("assistant", "Hello").with("thinking", "A greeting."),
    ];
    let variables = [("reasoning_effort".to_owned(), json!("low"))].into_iter().collect();
    let options = RenderOptions { variables, ..RenderOptions::default() };
    assert_eq!(
        ChatTemplate::jinja(template, "", "").render_with(&messages, &options).unwrap(),
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi<|end|>\
         <|start|>assistant<|channel|>analysis<|message|>A greeting.<|end|>\
         <|start|>assistant<|channel|>final<|message|>Hello<|return|> low"
    );
}

/// What a template makes of one message, whether it shows that or not.
fn plain(template: &str) -> Result<String, ChatError> {
    let conversation = conversation(&[Message::new("user", "hi")], &RenderOptions::default());
    jinja::render(template, "<s>", "</s>", &conversation, &Map::new())
}

#[test]
fn dialect_of_hugging_face() {
    let cases = [
        // Blocks swallow the newline behind them and the blanks before them.
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{%- generation -%} x {%- endgeneration %}", "x"),
        (
            "{{ tools is none }} {{ tools is iterable }} {{ nothing is defined }} {{ 'a' is iterable }}",
            "True False False True",
        ),
        ("{{ messages[0].content.upper() }}{{ messages[0].get('x', 'y') }}", "HIy"),
        (
            "{{ '{\n'|indent(2, first=true) }}{{ 'a\n\nb'|indent }}|{{ 'a\n\nb\r\n'|indent('-', blank=true) }}|",
            "  {\na\n\n    b|a\n-\n-b\n-|",
        ),
    ];
    for (template, expected) in cases {
        assert_eq!(plain(template), Ok(expected.to_owned()), "{template}");
    }
    let date = plain("{{ strftime_now('%Y-%m-%d') }}").unwrap();
    assert!(date.len() == 10 && date.starts_with("20"), "{date}");
}

/// What Python's `json.dumps` writes, with `ensure_ascii=False` where nothing is said.
#[test]
fn json_as_python_writes_it() {
    let value = "{'b': [1, 'é<🦙', none, {}, []], 'a': 1e16, 2: 0.5}";
    let cases = [
        ("", r#"{"b": [1, "é<🦙", null, {}, []], "a": 1e+16, "2": 0.5}"#),
        ("separators=(',', ':')", r#"{"b":[1,"é<🦙",null,{},[]],"a":1e+16,"2":0.5}"#),
        ("ensure_ascii=true", r#"{"b": [1, "\u00e9<\ud83e\udd99", null, {}, []], "a": 1e+16, "2": 0.5}"#),
        ("true", r#"{"b": [1, "\u00e9<\ud83e\udd99", null, {}, []], "a": 1e+16, "2": 0.5}"#),
        (
            "indent=2",
            "{\n  \"b\": [\n    1,\n    \"é<🦙\",\n    null,\n    {},\n    []\n  ],\n  \"a\": 1e+16,\n  \"2\": 0.5\n}",
        ),
        (
            "indent='\t', separators=(', ', '=')",
            "{\n\t\"b\"=[\n\t\t1, \n\t\t\"é<🦙\", \n\t\tnull, \n\t\t{}, \n\t\t[]\n\t], \n\t\"a\"=1e+16, \n\t\"2\"=0.5\n}",
        ),
        ("indent=0, separators=('', '')", "{\n\"b\"[\n1\n\"é<🦙\"\nnull\n{}\n[]\n]\n\"a\"1e+16\n\"2\"0.5\n}"),
        ("indent=none", r#"{"b": [1, "é<🦙", null, {}, []], "a": 1e+16, "2": 0.5}"#),
    ];
    for (options, expected) in cases {
        assert_eq!(plain(&format!("{{{{ {value} | tojson({options}) }}}}")), Ok(expected.to_owned()), "{options}");
    }
    assert_eq!(
        plain("{{ {'b': 1, 'a': {'d': 2, 'c': 3}} | tojson(sort_keys=true) }}").unwrap(),
        r#"{"a": {"c": 3, "d": 2}, "b": 1}"#
    );
    assert_eq!(plain("{{ '\\x00\\x1f\\x7f\\t\"' | tojson }}").unwrap(), "\"\\u0000\\u001f\u{7f}\\t\\\"\"");
    for wrong in
        ["indnt=2", "indent=[1]", "separators=','", "separators=(1, 2)", "true, ensure_ascii=true", "indent=1000000"]
    {
        let error = plain(&format!("{{{{ [1] | tojson({wrong}) }}}}")).unwrap_err();
        assert!(matches!(error, ChatError::Template(_)), "{wrong}: {error}");
    }
    assert!(matches!(plain("{{ nothing | tojson }}"), Err(ChatError::Template(_))));
}

/// A template without a branch for `system` passes over it in silence.
const NO_SYSTEM: &str = "{% for m in messages %}{% if m.role == 'user' %}{{ '[' + m.content + ']' }}\
    {% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}";

#[test]
fn what_a_template_passes_over_becomes_part_of_the_next_user_message() {
    assert_eq!(render(NO_SYSTEM, &TURNS, true).unwrap(), "[Be brief.\n\nHi é] Hello! <b>[Bye ]");
    // Also where the user says the same words, and for any number of such messages, anywhere.
    assert_eq!(render(NO_SYSTEM, &[("system", "Hi"), ("user", "Hi there")], true).unwrap(), "[Hi\n\nHi there]");
    let several =
        [("system", "A"), ("developer", "B"), ("assistant", "C"), ("user", "D"), ("system", "E"), ("user", "F")];
    assert_eq!(render(NO_SYSTEM, &several, true).unwrap(), "C[A\n\nB\n\nD][E\n\nF]");
    // Nothing can carry these.
    let lost = |messages: &[(&str, &str)]| render(NO_SYSTEM, messages, true).unwrap_err();
    assert_eq!(lost(&[("user", "Hi"), ("system", "A")]), ChatError::Lost("the text of message 2 (system)".to_owned()));
    assert_eq!(lost(&[("user", "Hi"), ("tool", "A")]), ChatError::Lost("the text of message 2 (tool)".to_owned()));
    // A template that looks at the first message alone loses others of the same role.
    let first_only = "{{ messages[0].content }}";
    assert!(matches!(render(first_only, &[("user", "Hi"), ("user", "Hi")], true), Err(ChatError::Lost(_))));
    // What is kept is not touched.
    let with_system = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";
    assert_eq!(render(with_system, &[("system", "A"), ("user", "B")], true).unwrap(), "system:A;user:B;");
}

#[test]
fn parts_for_templates_that_walk_them_and_text_for_those_that_do_not() {
    let walks = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}\
        {{ part.text }}{% endif %}{% endfor %};{% endfor %}";
    assert_eq!(render(walks, &TURNS, true).unwrap(), "system:Be brief.;user:Hi é;assistant: Hello! <b>;user:Bye ;");
    // Only one role's parts are walked.
    let user_walks = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0]['text'] }}{% else %}\
        {{ '<' + m.content + '>' }}{% endif %}{% endfor %}";
    assert_eq!(render(user_walks, &TURNS, true).unwrap(), "<Be brief.>Hi é< Hello! <b>>Bye ");
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    let message = Message::new("user", "").with("content", parts);
    let with_parts = |template: &str, message: &Message| {
        ChatTemplate::jinja(template, "", "").render(std::slice::from_ref(message), true)
    };
    assert_eq!(with_parts(walks, &message).unwrap(), "user:onetwo;");
    // Neither an error nor Python's way to print a list.
    for text_only in ["{{ '<' + messages[0].content + '>' }}", "<{{ messages[0].content }}>"] {
        assert_eq!(with_parts(text_only, &message).unwrap(), "<one\ntwo>");
    }
    assert_eq!(
        ChatTemplate::builtin("chatml").unwrap().render(&[message], false).unwrap(),
        "<|im_start|>user\none\ntwo<|im_end|>\n"
    );
    let picture = Message::new("user", "").with("content", json!([{"type": "text", "text": "one"}, {"type": "image"}]));
    assert!(with_parts("<{{ messages[0].content }}>", &picture).is_err());
}

#[test]
fn tools_and_calls_are_shown_or_named_in_the_error() {
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "rain or not"}});
    let options = RenderOptions { tools: vec![tool], ..RenderOptions::default() };
    let call = |arguments: Value| json!([{"id": "1", "function": {"name": "weather", "arguments": arguments}}]);
    let called = |arguments: Value| {
        [
            Message::new("user", "weather?"),
            Message::new("assistant", "").with("tool_calls", call(arguments)),
            Message::new("tool", "rain"),
        ]
    };
    let with =
        |template: &str, messages: &[Message]| ChatTemplate::jinja(template, "", "").render_with(messages, &options);
    let user = [Message::new("user", "weather?")];
    assert_eq!(with(CHATML, &user), Err(ChatError::Lost("the tools".to_owned())));
    let calls = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let lost = ChatError::Lost("tool calls of message 2 (assistant)".to_owned());
    assert_eq!(with(calls, &called(json!({}))), Err(lost));
    // Tools that are shown in front of a question are not missed elsewhere.
    let before_questions = "{% for m in messages %}{% if loop.last and m.role == 'user' %}{{ tools | tojson }}{% endif %}{{ m.content }}{% endfor %}";
    assert_eq!(with(before_questions, &[user[0].clone(), Message::new("assistant", "rain")]).unwrap(), "weather?rain");
    // Nor is a field whose place is another one; thinking may be left out anywhere.
    let plan = "{% for m in messages %}{% if loop.last and m.plan %}{{ m.plan }}{% endif %}{{ m.content }}{% endfor %}";
    let planned = |text: &str| Message::new("assistant", text).with("plan", "look").with("thinking", "hm");
    let without_tools =
        |template: &str, messages: &[Message]| ChatTemplate::jinja(template, "", "").render(messages, false);
    let turns = [user[0].clone(), planned("rain"), user[0].clone(), planned("snow")];
    assert_eq!(without_tools(plan, &turns).unwrap(), "weather?rainweather?looksnow");
    let lost =
        ChatError::Lost("the field plan of message 2 (assistant), the field plan of message 4 (assistant)".to_owned());
    assert_eq!(without_tools(CHATML, &turns), Err(lost));
    // Arguments as the template wants them.
    let arguments = "{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ '(' + c.function.name + ' ' + \
        c.function.arguments + ')' }}{% endfor %}{% endfor %}";
    let shown = with(arguments, &called(json!({"city": "Oslo", "days": 2}))).unwrap();
    assert!(shown.ends_with(r#"weather?(weather {"city": "Oslo", "days": 2})rain"#), "{shown}");
    let items = "{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}\
        {% for k, v in c.function.arguments.items() %}({{ k }}={{ v }}){% endfor %}{% endfor %}{% endfor %}";
    let shown = with(items, &called(json!("{\"city\": \"Oslo\"}"))).unwrap();
    assert!(shown.ends_with("weather?weather(city=Oslo)rain"), "{shown}");
    // No built-in template takes the place of one that fails where it would lose them.
    let fails = "{% if tools %}{{ no_such_function() }}{% endif %}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}";
    let error = with(fails, &called(json!({}))).unwrap_err();
    assert!(matches!(&error, ChatError::Template(why) if why.contains("would lose the tools, tool calls")), "{error}");
    let fields = [user[0].clone(), Message::new("assistant", "rain").with("name", "Bob")];
    let broken = "{{ '<|im_start|>' {% no such thing %}";
    let error = ChatTemplate::jinja(broken, "", "").render(&fields, true).unwrap_err();
    assert!(matches!(&error, ChatError::Template(why) if why.contains("would lose the field name")), "{error}");
    let builtin = ChatTemplate::builtin("chatml").unwrap();
    assert_eq!(builtin.render_with(&user, &options), Err(ChatError::Lost("the tools".to_owned())));
    let lost = ChatError::Lost("tool calls".to_owned());
    assert_eq!(builtin.render(&called(json!({})), true), Err(lost));
}

#[test]
fn a_template_may_refuse() {
    let error = render(MISTRAL, &[("assistant", "Hi")], true).unwrap_err();
    assert_eq!(error, ChatError::Refused("user and assistant must take turns".to_owned()));
    // Also out of a macro, and with a system message that could be merged.
    let template = "{% macro check(m) %}{{ raise_exception('no ' ~ m.role) }}{% endmacro %}{{ check(messages[0]) }}";
    assert_eq!(render(template, &TURNS, true), Err(ChatError::Refused("no system".to_owned())));
}

#[test]
fn a_broken_template_that_looks_like_a_known_one_still_works() {
    let broken = "{{ '<|im_start|>' + messages[0].role {% no such thing %}";
    assert_eq!(
        render(broken, &[("user", "Hi")], true).unwrap(),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let unknown = render("{{ messages[0].content", &[("user", "Hi")], true).unwrap_err();
    assert!(matches!(&unknown, ChatError::Template(message) if message.contains("syntax error")), "{unknown}");
}

#[test]
fn hostile_templates_give_an_error() {
    let nested = |open: &str, close: &str, n: usize| format!("{}x{}", open.repeat(n), close.repeat(n));
    let endless = [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'x' * 100000000000 }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        // Freeing this by recursion would overflow a stack of the usual size.
        "{% set ns = namespace(x=[]) %}{% for j in range(9999) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
    ];
    for template in endless {
        assert_eq!(render(template, &[("user", "Hi")], true), Err(ChatError::Endless), "{template}");
    }
    let broken = [
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% include 'other' %}".to_owned(),
        "{{ messages.no.such.thing }}".to_owned(),
        "{{ strftime_now('%Q%!') }}".to_owned(),
        "{{ 1 // 0 }}{{ range(1000000000000) | list }}".to_owned(),
        "{{".to_owned(),
        nested("{% if true %}", "{% endif %}", 20_000),
        format!("{{{{ {} }}}}", nested("(", ")", 200_000)),
    ];
    for template in broken {
        let error = render(&template, &[("user", "Hi")], true).unwrap_err();
        assert!(matches!(error, ChatError::Template(_)), "{error}: {:.80}", template);
    }
}

#[test]
fn builtin_templates() {
    let names = ChatTemplate::builtin_names();
    assert!(["chatml", "llama3", "gemma"].iter().all(|&name| names.iter().any(|known| known == name)), "{names:?}");
    let error = ChatTemplate::builtin("no such").unwrap_err();
    assert_eq!(error, ChatError::UnknownTemplate("no such".to_owned()));
    let nul = ChatTemplate::builtin("chatml").unwrap().render(&[Message::new("user", "a\0b")], true);
    assert!(matches!(nul, Err(ChatError::Template(_))), "{nul:?}");
}
