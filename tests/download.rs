//! Models that are fetched: the real program against a server of the test, which serves a small random model.

#![cfg(feature = "download")]

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use serde_json::json;
use sha2::{Digest, Sha256};
use simlayer_testkit::RandomModel;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a server has, and what it was asked for.
#[derive(Default)]
struct Content {
    files: HashMap<String, Vec<u8>>,
    /// Ends the connection after so many bytes of a file, once.
    cut: Option<usize>,
    /// Says that files have this checksum.
    checksum: Option<String>,
    /// What tells files without a checksum apart.
    etag: String,
    log: Vec<String>,
}

/// A server of one repository, `user/model`.
struct Server {
    address: String,
    content: Arc<Mutex<Content>>,
}

impl Server {
    fn start(files: &[(&str, &[u8])]) -> Server {
        let files = files.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())).collect();
        let content = Arc::new(Mutex::new(Content { files, etag: "\"one\"".to_owned(), ..Content::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let served = content.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let content = served.clone();
                thread::spawn(move || answer(stream.unwrap(), &content));
            }
        });
        Server { address, content }
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.content.lock().unwrap());
    }

    /// What was asked for since the last time.
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.content.lock().unwrap().log)
    }
}

/// One request, one answer.
fn answer(mut stream: TcpStream, content: &Mutex<Content>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())))
        .collect();
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut content = content.lock().unwrap();
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let entry = format!("{path} {} {}", header("range"), header("authorization"));
    content.log.push(entry.trim().to_owned());
    let (status, extra, body) = content.respond(&path, &headers);
    let head = format!(
        "HTTP/1.1 {status}\r\n{extra}content-length: {}\r\nconnection: close\r\naccept-ranges: bytes\r\n\r\n",
        body.len()
    );
    let sent = match content.cut.filter(|_| path.contains(".gguf") && body.len() > 1000) {
        Some(n) => {
            content.cut = None;
            n
        }
        None => body.len(),
    };
    drop(content);
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body[..sent]);
}

impl Content {
    fn respond(&self, path: &str, headers: &HashMap<String, String>) -> (String, String, Vec<u8>) {
        let none = |status: &str| (status.to_owned(), String::new(), Vec::new());
        if path.starts_with("/api/models/user/model/") {
            let sum = |bytes: &[u8]| self.checksum.clone().unwrap_or_else(|| checksum(bytes));
            let file = |(name, bytes): (&String, &Vec<u8>)| json!({"rfilename": name, "lfs": {"sha256": sum(bytes)}});
            let files: Vec<_> = self.files.iter().map(file).collect();
            return ("200 OK".to_owned(), String::new(), json!({"sha": COMMIT, "siblings": files}).to_string().into());
        }
        let prefix = format!("/user/model/resolve/{COMMIT}/");
        let name = path.strip_prefix(&prefix).or_else(|| path.strip_prefix("/files/"));
        let Some(bytes) = name.and_then(|name| self.files.get(name)) else { return none("404 Not Found") };
        let etag = format!("etag: {}\r\n", self.etag);
        if headers.get("if-none-match") == Some(&self.etag) {
            return none("304 Not Modified");
        }
        let same = headers.get("if-range").is_none_or(|etag| *etag == self.etag);
        let start =
            headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        match start.filter(|_| same) {
            Some(start) if start >= bytes.len() => none("416 Range Not Satisfiable"),
            Some(start) => {
                let range = format!("content-range: bytes {start}-{}/{}\r\n{etag}", bytes.len() - 1, bytes.len());
                ("206 Partial Content".to_owned(), range, bytes[start..].to_vec())
            }
            None => ("200 OK".to_owned(), etag, bytes.clone()),
        }
    }
}

fn checksum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A user: a home folder of its own, and where they fetch from.
struct User {
    home: tempfile::TempDir,
    endpoint: String,
}

impl User {
    fn of(server: &Server) -> User {
        User { home: tempfile::tempdir().unwrap(), endpoint: format!("http://{}/", server.address) }
    }

    /// Code, stdout and stderr of generating two tokens.
    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_simlayer-run"));
        for variable in
            ["LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_TOKEN"]
        {
            command.env_remove(variable);
        }
        command.env("HOME", self.home.path()).env("HF_ENDPOINT", &self.endpoint).env("no_proxy", "*");
        let output = command.args(args).args(["-p", "a b c", "-n", "2", "-t", "1", "--temp", "0"]).output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    fn good(&self, args: &[&str]) -> (String, String) {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, 0, "{stderr}");
        (stdout, stderr)
    }

    fn bad(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!((code, &stdout[..]), (1, ""), "{stderr}");
        stderr
    }

    fn repository(&self) -> PathBuf {
        self.home.path().join(".cache/huggingface/hub/models--user--model")
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A model's bytes.
fn model() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    RandomModel::tiny().gguf().write(&path);
    fs::read(path).unwrap()
}

#[test]
fn a_repositorys_model_is_fetched_once() {
    let bytes = model();
    let files = [("m-Q8_0.gguf", &bytes[..]), ("m-F16.gguf", b"another"), ("mmproj-f16.gguf", b"eyes")];
    let server = Server::start(&files);
    let user = User::of(&server);
    let (first, said) = user.good(&["-hf", "user/model", "--hf-token", "secret"]);
    assert!(said.contains("fetching m-Q8_0.gguf") && said.contains("mmproj-f16.gguf is not fetched"), "{said}");
    let log = server.log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(log.iter().all(|entry| entry.ends_with("Bearer secret")), "{log:?}");
    // As other programs lay their cache out.
    let repository = user.repository();
    assert_eq!(names(&repository.join("blobs")), [checksum(&bytes)]);
    let snapshot = repository.join("snapshots").join(COMMIT);
    assert_eq!(names(&snapshot), ["m-Q8_0.gguf"]);
    assert!(fs::symlink_metadata(snapshot.join("m-Q8_0.gguf")).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);

    // Again: only what there is is asked for. Offline: nothing.
    assert_eq!(user.good(&["-hf", "user/model:q8_0"]).0, first);
    assert_eq!(server.log().len(), 1);
    assert_eq!(user.good(&["-hf", "user/model", "--offline"]).0, first);
    assert_eq!(user.good(&["-m", snapshot.join("m-Q8_0.gguf").to_str().unwrap()]).0, first);
    assert!(server.log().is_empty());

    // What cannot be had is named, with what to do.
    let error = user.bad(&["-hf", "user/model:F16", "--offline"]);
    assert!(error.contains("F16") && error.contains("user/model") && error.contains("without it"), "{error}");
    let error = user.bad(&["-hf", "user/other", "--offline"]);
    assert!(error.contains("nothing of user/other") && error.contains("-m"), "{error}");
    let error = user.bad(&["-hf", "user/model:Q2_K"]);
    assert!(error.contains("Q2_K") && error.contains("m-F16.gguf"), "{error}");
    let error = user.bad(&["-hf", "user/model", "-hff", "none.gguf"]);
    assert!(error.contains("none.gguf") && error.contains("m-Q8_0.gguf"), "{error}");
    let error = user.bad(&["-hf", "user/other"]);
    assert!(error.contains("404") && error.contains("user/other") && error.contains("--hf-token"), "{error}");
    assert_eq!(user.run(&["-hf", "no-slash"]).0, 2);
    assert_eq!(user.run(&["-hff", "file.gguf", "-m", "x"]).0, 2);

    // Without a network the cache is better than nothing; without either the address is named.
    let away = User { endpoint: "http://127.0.0.1:9".to_owned(), ..user };
    let (text, said) = away.good(&["-hf", "user/model"]);
    assert!(text == first && said.contains("from the cache"), "{said}");
    let error = away.bad(&["-hf", "user/other"]);
    assert!(error.contains("127.0.0.1:9"), "{error}");
}

#[test]
fn a_cut_download_goes_on() {
    let bytes = model();
    let server = Server::start(&[("m.gguf", &bytes)]);
    let user = User::of(&server);
    server.change(|content| content.cut = Some(bytes.len() / 2));
    user.good(&["-hf", "user/model", "-hff", "m.gguf"]);
    let log = server.log();
    assert_eq!(log.len(), 3, "{log:?}");
    assert!(log[2].ends_with(&format!("bytes={}-", bytes.len() / 2)), "{log:?}");
    assert_eq!(names(&user.repository().join("blobs")), [checksum(&bytes)]);

    // Also in a later run, and only if it is the same file.
    let user = User::of(&server);
    let blobs = user.repository().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let part = blobs.join(format!("{}.part", checksum(&bytes)));
    fs::write(&part, &bytes[..1000]).unwrap();
    user.good(&["-hf", "user/model"]);
    assert!(server.log()[1].ends_with("bytes=1000-"));
    let user = User::of(&server);
    let blobs = user.repository().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.part", checksum(&bytes))), [7; 1000]).unwrap();
    let error = user.bad(&["-hf", "user/model"]);
    assert!(error.contains("m.gguf is damaged") && error.contains("deleted"), "{error}");
    assert!(names(&blobs).is_empty());
    user.good(&["-hf", "user/model"]);
}

#[test]
fn a_wrong_checksum_is_an_error() {
    let bytes = model();
    let server = Server::start(&[("m.gguf", &bytes)]);
    server.change(|content| content.checksum = Some(checksum(b"what it should be")));
    let user = User::of(&server);
    let error = user.bad(&["-hf", "user/model"]);
    for part in ["m.gguf", &checksum(&bytes), &checksum(b"what it should be"), "try again"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(names(&user.repository().join("blobs")).is_empty());
    assert!(user.bad(&["-hf", "user/model", "--offline"]).contains("--offline"));
    // What is no checksum becomes no path.
    server.change(|content| content.checksum = Some("../../escaped".to_owned()));
    assert!(user.bad(&["-hf", "user/model"]).contains("is no SHA-256"));
}

#[test]
fn addresses_are_fetched_as_they_change() {
    let bytes = model();
    let server = Server::start(&[("m.gguf", &bytes)]);
    let user = User::of(&server);
    let url = format!("http://{}/files/m.gguf?download=true", server.address);
    // The query is part of the address, and not of the name.
    server.change(|content| {
        let model = content.files["m.gguf"].clone();
        content.files.insert("m.gguf?download=true".to_owned(), model);
    });
    server.change(|content| content.cut = Some(5000));
    let (first, said) = user.good(&["-mu", &url]);
    assert!(said.contains("fetching"), "{said}");
    assert!(server.log()[1].ends_with("bytes=5000-"));
    let cached = user.home.path().join(".cache/llama.cpp/m.gguf");
    assert_eq!(fs::read(&cached).unwrap(), bytes);
    assert_eq!(user.good(&["-mu", &url, "--offline"]).0, first);
    assert!(server.log().is_empty());
    let (text, said) = user.good(&["-mu", &url]);
    assert!(text == first && !said.contains("fetching"), "{said}");
    // A newer file takes its place.
    server.change(|content| {
        content.etag = "\"two\"".to_owned();
        content.files.insert("m.gguf?download=true".to_owned(), b"no model".to_vec());
    });
    user.bad(&["-mu", &url]);
    assert_eq!(fs::read(&cached).unwrap(), b"no model");

    // Into a file of one's own.
    let own = user.home.path().join("own.gguf");
    let url = format!("http://{}/files/m.gguf", server.address);
    assert_eq!(user.good(&["-mu", &url, "-m", own.to_str().unwrap()]).0, first);
    assert!(own.is_file());
    let error = user.bad(&["-mu", &format!("http://{}/files/none.gguf", server.address)]);
    assert!(error.contains("404") && error.contains("none.gguf"), "{error}");
    let error = user.bad(&["-mu", "http://127.0.0.1:9/none.gguf", "--offline"]);
    assert!(error.contains("none.gguf") && error.contains("--offline"), "{error}");
    assert_eq!(user.run(&["-mu", "m.gguf"]).0, 2);
}

/// Whole models only: what the first file is worth without the others.
#[test]
fn split_models_are_fetched_whole() {
    let parts = ["s/m-Q4_0-00001-of-00002.gguf", "s/m-Q4_0-00002-of-00002.gguf"];
    let server = Server::start(&[(parts[1], b"the end"), (parts[0], b"no model")]);
    let user = User::of(&server);
    let error = user.bad(&["-hf", "user/model:Q4_0"]);
    assert!(error.contains("m-Q4_0-00001-of-00002.gguf"), "{error}");
    let folder = user.repository().join("snapshots").join(COMMIT).join("s");
    assert_eq!(names(&folder), ["m-Q4_0-00001-of-00002.gguf", "m-Q4_0-00002-of-00002.gguf"]);
    assert_eq!(fs::read(folder.join("m-Q4_0-00002-of-00002.gguf")).unwrap(), b"the end");
    // One of them is gone.
    fs::remove_file(folder.join("m-Q4_0-00002-of-00002.gguf")).unwrap();
    let error = user.bad(&["-hf", "user/model", "--offline"]);
    assert!(error.contains("s/m-Q4_0-00002-of-00002.gguf") && error.contains("--offline"), "{error}");
}
