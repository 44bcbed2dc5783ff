//! `simlayer-run serve` as clients meet it: the real program on the real model.

#![cfg(feature = "serve")]

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use simlayer_testkit::smollm2_path;

/// A server, which ends with the value.
struct Server {
    child: Child,
    address: String,
    log: Option<thread::JoinHandle<String>>,
}

impl Server {
    fn start(args: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_simlayer-run"))
            .args(["serve", "--port", "0", "-m", smollm2_path().to_str().unwrap()])
            .args(["--chat-template-file", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chatml_tools.jinja")])
            .args(args)
            .env("SIMLAYER_PROFILES", "/no/such/folder")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut log = String::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("it does not listen: {log}"));
            if let Some(address) = line.strip_prefix("listening at http://") {
                break address.to_owned();
            }
            log += &(line + "\n");
        };
        // What nobody reads would stop the program.
        let log = thread::spawn(move || lines.fold(log, |log, line| log + &line + "\n"));
        Server { child, address, log: Some(log) }
    }

    /// The answer's status and body to bytes that are sent as they are.
    fn raw(&self, request: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // A server that has seen enough closes the connection.
        let _ = stream.write_all(request);
        response(&mut stream)
    }

    fn post(&self, path: &str, body: &[u8]) -> (u16, String) {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    fn json(&self, path: &str, body: &Value) -> Value {
        let (status, text) = self.post(path, body.to_string().as_bytes());
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
    }

    fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name}: {text}"))
    }

    /// Resident bytes.
    fn memory(&self) -> usize {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Tells it to stop, and gives its exit code and log.
    fn stop(mut self) -> (Option<i32>, String) {
        Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.log.take().unwrap().join().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer's status and body; chunks are put together.
fn response(stream: &mut TcpStream) -> (u16, String) {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (status, body.to_owned());
    }
    let (mut out, mut rest) = (String::new(), body);
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        out.push_str(after.get(..size).unwrap_or_default());
        rest = after.get(size + 2..).unwrap_or_default();
    }
    (status, out)
}

fn sea() -> Value {
    json!([{"role": "user", "content": "Say one sentence about the sea."}])
}

/// What the openai and ollama packages of pip ask: chat, streaming, tools, schemas, probabilities, two answers, cancellation,
/// a wrong key, too long a prompt.
#[test]
fn other_peoples_clients_are_served() {
    let Some(packages) = env::var_os("SIMLAYER_CLIENTS") else {
        assert!(env::var_os("CI").is_none(), "the clients are missing (SIMLAYER_CLIENTS)");
        eprintln!("skipped: SIMLAYER_CLIENTS names no folder with openai and ollama");
        return;
    };
    let server = Server::start(&["--api-key", "secret"]);
    let output = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/serve_clients.py"))
        .args([&format!("http://{}", server.address), "secret"])
        .env("PYTHONPATH", packages)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.lines().count(), 12);
}

#[test]
fn llama_servers_and_anthropics_api() {
    let server = Server::start(&["-c", "2048"]);
    assert_eq!(server.get("/health"), (200, r#"{"status":"ok"}"#.to_owned()));
    let text = "Two fishes, €5.";
    let tokens = server.json("/tokenize", &json!({"content": text}))["tokens"].clone();
    assert_eq!(server.json("/detokenize", &json!({ "tokens": tokens }))["content"], text);
    // Long enough that what is known of it is worth more than reading it.
    let talk = json!([{"role": "user", "content":
        "Say one sentence about the sea, the wind over it and the birds on it, for somebody who has never been there."}]);
    let prompt = server.json("/apply-template", &json!({ "messages": talk }))["prompt"].clone();
    assert!(prompt.as_str().unwrap().ends_with("been there.<|im_end|>\n<|im_start|>assistant\n"), "{prompt}");

    // A raw completion of that prompt says what a chat says; of few tokens, since a prompt that is known is rounded otherwise.
    let greedy = json!({"prompt": prompt, "n_predict": 4, "temperature": 0, "n_probs": 2});
    let raw = server.json("/completion", &greedy);
    assert_eq!((&raw["stop"], &raw["tokens_predicted"], &raw["stop_type"]), (&json!(true), &json!(4), &json!("limit")));
    assert_eq!(raw["completion_probabilities"].as_array().map(Vec::len), Some(4));
    let message = json!({"model": "x", "max_tokens": 4, "temperature": 0, "messages": talk});
    let message = server.json("/v1/messages", &message);
    assert_eq!(message["content"][0]["text"], raw["content"]);
    assert_eq!((&message["stop_reason"], &message["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(4)));
    let usage = &message["usage"];
    assert!(usage["cache_read_input_tokens"].as_u64() > usage["input_tokens"].as_u64(), "{usage}");

    // Piece by piece, with a tool's call in it.
    let tool = json!({"name": "weather", "input_schema": {"type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}, "required": ["city"]}});
    let ask = json!({"max_tokens": 60, "temperature": 0, "messages": talk, "tools": [tool],
        "tool_choice": {"type": "any"}, "stream": true});
    let (status, events) = server.post("/v1/messages", ask.to_string().as_bytes());
    assert_eq!(status, 200, "{events}");
    let data = events.lines().filter_map(|line| line.strip_prefix("data: "));
    let data: Vec<Value> = data.map(|data| serde_json::from_str(data).unwrap()).collect();
    let kinds: Vec<&str> = data.iter().map(|data| data["type"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("message_start", "message_stop"));
    let block =
        data.iter().find(|data| data["content_block"]["type"] == "tool_use").unwrap_or_else(|| panic!("{events}"));
    assert_eq!(block["content_block"]["name"], "weather");
    // It may call more than once.
    for index in data.iter().filter(|data| data["type"] == "content_block_stop").map(|data| &data["index"]) {
        let own = data.iter().filter(|data| data["index"] == *index);
        let arguments: String = own.filter_map(|data| data["delta"]["partial_json"].as_str()).collect();
        let arguments: Value = serde_json::from_str(&arguments).unwrap_or_else(|error| panic!("{error}: {events}"));
        assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()), "{arguments}");
    }

    let slots: Value = serde_json::from_str(&server.get("/slots").1).unwrap();
    let slots = slots.as_array().unwrap();
    assert!(!slots.is_empty() && slots.iter().all(|slot| slot["layers"].as_array().map(Vec::len) == Some(30)));
    let kept: f64 = slots.iter().map(|slot| slot["kv"]["allocated_bytes"].as_f64().unwrap()).sum();
    assert!(server.metric("simlayer:kv_bytes") >= kept && kept > 0.0);
    let props: Value = serde_json::from_str(&server.get("/props").1).unwrap();
    assert_eq!((&props["default_generation_settings"]["n_ctx"], &props["total_slots"]), (&json!(2048), &json!(16)));
}

/// What nobody should send is refused with what is wrong, and takes no memory.
#[test]
fn hostile_requests_are_refused() {
    let server = Server::start(&["--timeout", "2", "-c", "2048"]);
    let chat = "/v1/chat/completions";
    let warm = json!({"messages": sea(), "max_tokens": 2});
    server.json(chat, &warm);
    let before = server.memory();

    let length = |bytes: usize| {
        format!("POST {chat} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {bytes}\r\n\r\n").into_bytes()
    };
    assert_eq!(server.raw(&length(1 << 30)).0, 413);
    // The same without saying how much it is: chunks until the server has enough.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream
        .write_all(format!("POST {chat} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes())
        .unwrap();
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    let sent = (0..1024).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(sent < 64, "{sent} MiB were taken");

    let headers: String = (0..10_000).map(|index| format!("x-{index}: y\r\n")).collect();
    let (status, _) = server.raw(format!("GET /health HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes());
    assert!(status == 431 || status == 0, "{status}");
    let long = "y".repeat(1 << 20);
    let (status, _) = server.raw(format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {long}\r\n\r\n").as_bytes());
    assert!(status == 431 || status == 0, "{status}");

    // A client that sends a letter and waits.
    let start = Instant::now();
    let slow = server.raw(&[length(100), b"{".to_vec()].concat());
    assert_eq!((slow.0, start.elapsed() < Duration::from_secs(20)), (408, true), "{slow:?}");

    let deep = "[".repeat(100_000);
    let grammar = json!({"messages": sea(), "grammar": "root ::= nothing [a"}).to_string();
    let schema = json!({"messages": sea(), "response_format":
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}});
    for (body, status) in [
        (&b"\xff\xfe{"[..], 400),
        (deep.as_bytes(), 400),
        (b"", 400),
        (b"[1]", 400),
        (b"{}", 400),
        (grammar.as_bytes(), 400),
        (schema.to_string().as_bytes(), 400),
        (br#"{"messages": []}"#, 400),
        (br#"{"messages": [{"role": "user"}], "n": -1}"#, 400),
        (br#"{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999999": 1}}"#, 400),
    ] {
        let refused = server.post(chat, body);
        assert_eq!(refused.0, status, "{}: {refused:?}", String::from_utf8_lossy(&body[..body.len().min(60)]));
        let error: Value = serde_json::from_str(&refused.1).unwrap();
        assert!(error["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    }
    for path in ["/slots/../../etc/passwd", "/slots/..%2f..%2fetc%2fpasswd?action=save", "/page/../../Cargo.toml", "/x"]
    {
        assert_eq!(server.get(path).0, 404, "{path}");
    }
    assert_eq!(server.get(chat).0, 405);
    assert_eq!(server.post("/v1/completions", br#"{"prompt": [1, 99999999]}"#).0, 400);
    let long = json!({"prompt": "the sea ".repeat(2000)});
    let (status, text) = server.post("/v1/completions", long.to_string().as_bytes());
    assert!(status == 400 && text.contains("exceed_context_size_error"), "{status} {text}");

    // Not even the HTTP library's own errors end it.
    server.raw(b"\x16\x03\x01\x02\x00nonsense\r\n\r\n");
    server.json(chat, &warm);
    let grown = server.memory().saturating_sub(before);
    assert!(grown < 64 << 20, "it grew by {grown} bytes");
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

/// What takes more memory than there is waits, or is told so; and a conversation whose memory was needed goes on from disk, also
/// after a restart.
#[test]
fn memory_is_counted_and_conversations_are_parked() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().to_str().unwrap();
    let args = ["--kv-mem", "24M", "--kv-disk", disk, "--kv-disk-mem", "1G", "-c", "4096"];
    let server = Server::start(&args);
    let (status, text) =
        server.post("/completion", json!({"prompt": "the sea ".repeat(1500), "n_predict": 1}).to_string().as_bytes());
    assert!(status == 400 && text.contains("exceed_memory_error") && text.contains("--kv-mem"), "{status} {text}");

    // Of three, two at most are in memory.
    let prompts = ["sea", "wind", "stone"].map(|word| format!("{word} and {word}. ").repeat(130));
    let ask = |server: &Server, prompt: &str| {
        server.json("/completion", &json!({"prompt": prompt, "n_predict": 4, "temperature": 0}))
    };
    let first = prompts.each_ref().map(|prompt| ask(&server, prompt));
    assert!(server.metric("simlayer:evicted_total") >= 1.0);
    assert!(server.metric("simlayer:kv_bytes") <= f64::from(24 << 20));
    for (prompt, first) in prompts.iter().zip(&first) {
        let n = first["timings"]["prompt_n"].as_u64().unwrap();
        assert!(n > 300, "{first}");
        let longer = format!("{prompt}And so on");
        let again = ask(&server, &longer);
        let timings = &again["timings"];
        assert!(timings["cache_n"].as_u64().unwrap() + 16 > n, "{prompt:.10}: {n} tokens were known: {timings}");
    }
    assert!(server.metric("simlayer:restored_total") >= 1.0);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");

    let server = Server::start(&args);
    let again = ask(&server, &prompts[0]);
    let n = first[0]["timings"]["prompt_n"].as_u64().unwrap();
    assert!(again["timings"]["cache_n"].as_u64().unwrap() + 16 > n, "{n} tokens were known: {again}");
    let (_, log) = server.stop();
    assert!(log.contains("--kv-disk: ") && !log.contains("--kv-disk: 0 conversations"), "{log}");
}

/// A prompt that is read does not keep others waiting, and many at once are all answered.
#[test]
fn answers_go_on_while_prompts_are_read() {
    let server = Server::start(&[]);
    let ask =
        json!({"prompt": "One two three", "n_predict": 160, "temperature": 0, "ignore_eos": true, "stream": true});
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = ask.to_string();
    let head =
        format!("POST /completion HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut pieces = BufReader::new(stream).lines().map_while(Result::ok).filter(|line| line.starts_with("data: "));
    assert!(pieces.next().is_some());
    // Meanwhile a long prompt is read: pieces of the answer come before that has ended.
    let (come, long) = thread::scope(|scope| {
        let long = scope.spawn(|| {
            let prompt = "the sea and the wind, ".repeat(400);
            server.json("/completion", &json!({"prompt": prompt, "n_predict": 1}))
        });
        let mut come = 0;
        while !long.is_finished() && pieces.next().is_some() {
            come += 1;
        }
        (come, long.join().unwrap())
    });
    assert!(long["timings"]["prompt_n"].as_u64().unwrap() > 2000, "{long}");
    assert!(come >= 5, "{come} pieces came while a prompt was read");
    drop(pieces);
    let answers = thread::scope(|scope| {
        let ask = |index: usize| {
            let prompt = format!("Number {index}: {index} {index} {index} {index}");
            server.json("/completion", &json!({"prompt": prompt, "n_predict": 6}))
        };
        let threads: Vec<_> = (0..20).map(|index| scope.spawn(move || ask(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(answers.iter().all(|answer| answer["tokens_predicted"].as_u64().is_some_and(|n| n <= 6)));
}
