//! `simlayer-run serve --kv-disk` when things go wrong: killed while it writes and while it restores, files damaged or of
//! other settings, no room on the disk. What it answers has to be what a server that never parks answers.

#![cfg(unix)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, LazyLock, Mutex},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use simlayer_testkit::smollm2_path;

/// Conversations, and tokens of an answer.
const N: usize = 3;
const ANSWER: usize = 6;

struct Server {
    child: Child,
    address: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    fn start(dir: Option<&Path>, options: &[&str]) -> Server {
        Server::spawn(Command::new(env!("CARGO_BIN_EXE_simlayer-run")), dir, options)
    }

    /// `program` is the program, or one that becomes it.
    fn spawn(mut program: Command, dir: Option<&Path>, options: &[&str]) -> Server {
        program.env("SIMLAYER_PROFILES", "/no/such/folder").args(["serve", "--port", "0", "-t", "1", "-c", "1024"]);
        program.arg("-m").arg(smollm2_path()).args(["--parallel", "1"]).args(options);
        if !options.contains(&"--lazy") {
            program.args(["--lazy", "off"]);
        }
        if let Some(dir) = dir {
            program.arg("--kv-disk").arg(dir);
        }
        let mut child = program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let mut address = None;
        while address.is_none() {
            let mut line = String::new();
            assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "it ended: {}", log.lock().unwrap());
            address = line.trim().strip_prefix("listening at http://").map(str::to_owned);
            log.lock().unwrap().push_str(&line);
        }
        thread::spawn({
            let log = Arc::clone(&log);
            move || stderr.lines().map_while(Result::ok).for_each(|line| *log.lock().unwrap() += &(line + "\n"))
        });
        Server { child, address: address.unwrap(), log }
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends a request, and does not wait for its answer.
    fn send(&self, path: &str, body: Option<&Value>) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let body = body.map(Value::to_string);
        let (method, text) = (if body.is_some() { "POST" } else { "GET" }, body.unwrap_or_default());
        let headers = format!("Host: x\r\nConnection: close\r\nContent-Length: {}", text.len());
        write!(stream, "{method} {path} HTTP/1.1\r\n{headers}\r\n\r\n{text}").unwrap();
        stream
    }

    fn ask(&self, path: &str, body: Option<&Value>) -> Value {
        let mut answer = String::new();
        self.send(path, body).read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{answer}\n{}", self.log());
        serde_json::from_str(body).unwrap()
    }

    fn answer(&self, prompt: &[i64]) -> Answer {
        let answer = self.ask("/completion", Some(&completion(prompt)));
        let tokens = answer["tokens"].as_array().unwrap().iter().map(|token| token.as_i64().unwrap()).collect();
        Answer { tokens, cached: answer["timings"]["cache_n"].as_u64().unwrap() as usize }
    }

    fn parked(&self, what: &str) -> u64 {
        self.ask("/props", None)["parked"][what].as_u64().unwrap()
    }

    /// As `kill -9` does.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Answer {
    tokens: Vec<i64>,
    cached: usize,
}

fn completion(prompt: &[i64]) -> Value {
    json!({ "prompt": prompt, "n_predict": ANSWER, "temperature": 0, "ignore_eos": true, "return_tokens": true })
}

/// What conversations are, and what their second answers have to be.
struct Expected {
    firsts: Vec<Vec<i64>>,
    seconds: Vec<Vec<i64>>,
    /// Of each conversation, by how much of it was in the cache: nothing, the first turn, all of it. Sums are in another
    /// order then, and the answers need not be the same.
    answers: Vec<[Answer; 3]>,
}

static EXPECTED: LazyLock<Expected> = LazyLock::new(|| {
    let server = Server::start(None, &[]);
    let firsts: Vec<Vec<i64>> = (0..N).map(|n| server.tokens(&story(n))).collect();
    let again = server.tokens(" What happened after that? Then the keeper");
    let (mut seconds, mut kept) = (Vec::new(), Vec::new());
    for first in &firsts {
        let second = [first, &server.answer(first).tokens[..], &again].concat();
        kept.push([server.answer(&second), server.answer(&second)]);
        seconds.push(second);
    }
    drop(server);
    let anew = seconds.iter().map(|second| Server::start(None, &[]).answer(second));
    let answers: Vec<[Answer; 3]> = anew.zip(kept).map(|(anew, [kept, again])| [anew, kept, again]).collect();
    for [anew, kept, again] in &answers {
        assert!(anew.cached == 0 && kept.cached > 150 && again.cached > kept.cached, "{answers:?}");
    }
    Expected { firsts, seconds, answers }
});

impl Expected {
    /// Asks for all first answers.
    fn begin(&self, server: &Server) {
        for first in &self.firsts {
            server.answer(first);
        }
    }

    /// Asks for all second answers. How many of the conversations were restored.
    fn check(&self, server: &Server) -> usize {
        let mut restored = 0;
        for (n, second) in self.seconds.iter().enumerate() {
            let answer = server.answer(second);
            let expected = &self.answers[n];
            assert!(expected.contains(&answer), "{n}: {answer:?}, not one of {expected:?}\n{}", server.log());
            restored += usize::from(answer.cached > 0);
        }
        restored
    }
}

impl Server {
    fn tokens(&self, text: &str) -> Vec<i64> {
        let answer = self.ask("/tokenize", Some(&json!({ "content": text })));
        answer["tokens"].as_array().unwrap().iter().map(|token| token.as_i64().unwrap()).collect()
    }
}

/// Some 200 tokens that differ from the first on.
fn story(n: usize) -> String {
    let keeper = ["Anna", "Bertrand", "Cecilia"][n];
    let line = format!("{keeper} kept the lighthouse, counted {} ships and wrote each of them down. ", n + 2);
    format!("{keeper} was {} years old. {}", 40 + n, line.repeat(11))
}

/// Room for one conversation while it is read, and no other: each makes the one before go to disk.
const SMALL: [&str; 2] = ["--kv-mem", "12M"];

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..1000 {
        if is_so() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("waited too long: {what}");
}

fn parked_files(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "parked")).collect();
    files.sort();
    files
}

#[test]
fn nothing_wrong_is_ever_restored() {
    let expected = &*EXPECTED;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();

    // All goes well: they are parked, and a server that is started anew restores all.
    let server = Server::start(Some(dir), &SMALL);
    expected.begin(&server);
    wait_until("all but the last are parked to make room, the last as it is idle", || {
        server.parked("stored") >= N as u64
    });
    server.kill();
    let server = Server::start(Some(dir), &SMALL);
    assert_eq!(server.parked("entries"), N as u64);
    assert_eq!(expected.check(&server), N, "{}", server.log());
    server.kill();

    // Killed while it restores: at once, and some time later.
    for delay in [0, 8, 25] {
        let server = Server::start(Some(dir), &SMALL);
        let _unanswered = server.send("/completion", Some(&completion(&expected.seconds[1])));
        thread::sleep(Duration::from_millis(delay));
        server.kill();
    }
    let server = Server::start(Some(dir), &SMALL);
    assert_eq!(expected.check(&server), N, "{}", server.log());
    server.kill();

    // A damaged state, a file that is cut short, one that was not finished, and files for other settings.
    fs::read_dir(dir).unwrap().for_each(|file| fs::remove_file(file.unwrap().path()).unwrap());
    let server = Server::start(Some(dir), &["--kv-mem", "12M", "-ctk", "q8_0"]);
    server.answer(&expected.firsts[0]);
    wait_until("it is parked", || server.parked("stored") == 1);
    server.kill();
    let others = parked_files(dir);
    let server = Server::start(Some(dir), &SMALL);
    assert!(server.log().contains("1 parked conversations"), "{}", server.log());
    expected.begin(&server);
    wait_until("all are parked", || server.parked("stored") >= N as u64);
    server.kill();
    let ours: Vec<PathBuf> = parked_files(dir).into_iter().filter(|path| !others.contains(path)).collect();
    assert_eq!((others.len(), ours.len()), (1, N));
    let mut bytes = fs::read(&ours[0]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&ours[0], bytes).unwrap();
    let bytes = fs::read(&ours[1]).unwrap();
    fs::write(&ours[1], &bytes[..bytes.len() / 2]).unwrap();
    fs::write(ours[1].with_extension("partial"), &bytes[..bytes.len() / 2]).unwrap();
    let server = Server::start(Some(dir), &SMALL);
    let log = server.log();
    for said in ["partial: removed", "damaged: it is not as long", "1 parked conversations"] {
        assert!(log.contains(said), "{said}: {log}");
    }
    assert_eq!(expected.check(&server), 1, "{}", server.log());
    assert!(server.log().contains("checksum"), "{}", server.log());
    assert!(others[0].exists());
}

#[test]
fn killed_while_it_writes() {
    let expected = &*EXPECTED;
    for delay in [0, 4, 12] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Some(dir.path()), &SMALL);
        server.answer(&expected.firsts[0]);
        // This one makes the first go.
        let _unanswered = server.send("/completion", Some(&completion(&expected.firsts[1])));
        let partial_or_whole = || fs::read_dir(dir.path()).unwrap().count() > 1;
        wait_until("it begins to write", partial_or_whole);
        thread::sleep(Duration::from_millis(delay));
        server.kill();
        let server = Server::start(Some(dir.path()), &SMALL);
        expected.check(&server);
        let unfinished = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path());
        // What it writes now may be under way.
        assert!(unfinished.filter(|path| path.extension().is_some_and(|ending| ending == "partial")).count() <= 1);
    }
}

#[test]
fn a_disk_without_room_is_said_once() {
    let expected = &*EXPECTED;
    let dir = tempfile::tempdir().unwrap();
    // No file may be longer than 256 KiB: writing ends in the middle, as on a full disk.
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 512; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_simlayer-run")]);
    let server = Server::spawn(limited, Some(dir.path()), &SMALL);
    expected.begin(&server);
    wait_until("all have failed", || server.parked("failed") >= N as u64);
    assert_eq!(expected.check(&server), 0);
    wait_until("it is said", || server.log().contains("are not parked"));
    assert_eq!(server.log().matches("are not parked").count(), 1, "{}", server.log());
    server.kill();
    assert_eq!(parked_files(dir.path()), [] as [PathBuf; 0]);
    let server = Server::start(Some(dir.path()), &SMALL);
    expected.begin(&server);
    wait_until("all are parked", || server.parked("stored") >= N as u64);
    assert_eq!(expected.check(&server), N);
}

#[test]
fn an_edited_turn_goes_on_from_the_turn_before() {
    let expected = &*EXPECTED;
    let dir = tempfile::tempdir().unwrap();
    // Cutting a conversation back is not possible then, but to where its last prompt ended.
    let lazy = [&SMALL[..], &["--lazy", "budget:0.5", "--lazy-window", "32", "--lazy-slack", "0"]].concat();
    let server = Server::start(Some(dir.path()), &lazy);
    let first = &expected.firsts[0];
    let turn = [first, &server.answer(first).tokens[..]].concat();
    wait_until("the first turn is parked", || server.parked("stored") == 1);
    let [one, other] = [" What happened after that? Then the keeper", " What happened to the ships?"]
        .map(|text| [&turn[..], &server.tokens(text)].concat());
    server.answer(&one);
    wait_until("the second turn is parked", || server.parked("stored") == 2);
    server.kill();
    let server = Server::start(Some(dir.path()), &lazy);
    let answer = server.answer(&other);
    // The answer's last token was never run.
    assert_eq!(answer.cached, turn.len() - 1, "{}", server.log());
}
