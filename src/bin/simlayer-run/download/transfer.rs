//! One file from an address into a folder: whole or not at all, resumed where it stopped, checked where there is a checksum.

use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{Response, StatusCode, header},
};

use super::error::Error;
use crate::progress::Progress;

/// Tries in a row that may bring nothing.
const TRIES: u32 = 3;
/// Before the second try; twice as long before each further one.
const PAUSE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(60);

/// What is fetched.
#[derive(Debug)]
pub struct Source {
    pub url: String,
    /// What it is called in messages.
    pub name: String,
    pub token: Option<String>,
    /// Of the whole file, in lower-case hexadecimal digits. With one, what was fetched before is the same file's.
    pub sha256: Option<String>,
}

/// What came of asking for a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Fetched {
    Whole,
    /// The server has none but what is there.
    Unchanged,
}

pub fn agent() -> Agent {
    Agent::config_builder()
        .user_agent(concat!("simlayer/", env!("CARGO_PKG_VERSION")))
        // Bytes are counted, and go on from where they stopped.
        .accept_encoding("identity")
        // A token is for the server that it was given for.
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .http_status_as_error(false)
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .build()
        .into()
}

/// Fetches `source` to `target`. What is there of it from before, in `target.part`, is not fetched again.
pub fn fetch(agent: &Agent, source: &Source, target: &Path) -> Result<Fetched, Error> {
    let part = Part::open(target)?;
    let known = fs::read_to_string(beside(target, ".etag")).ok().filter(|_| target.is_file());
    let progress = Progress::new(source.name.clone());
    let mut tries = 0;
    loop {
        let before = part.len()?;
        let error = match part.pull(agent, source, known.as_deref(), &progress) {
            Ok(Pulled::Unchanged) => return part.give_up().map(|()| Fetched::Unchanged),
            Ok(Pulled::Whole { etag, digest }) => {
                return part.finish(source, target, etag.as_deref(), &digest).map(|()| Fetched::Whole);
            }
            Err(error) => error,
        };
        tries = if part.len()? > before { 1 } else { tries + 1 };
        if !error.may_pass() || tries >= TRIES {
            // An empty file says nothing to those who come later.
            if part.len()? == 0 {
                part.give_up()?;
            }
            return Err(error);
        }
        thread::sleep(PAUSE * 2_u32.pow(tries - 1));
    }
}

/// `path` with this at its end.
pub fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

enum Pulled {
    Unchanged,
    Whole { etag: Option<String>, digest: String },
}

/// What is there of a file. Locked, so that two programs do not write one file.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn open(target: &Path) -> Result<Part, Error> {
        let path = beside(target, ".part");
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| Error::File { path: folder.to_owned(), error })?;
        }
        let file = File::options().read(true).append(true).create(true).open(&path);
        let file = file.map_err(|error| Error::File { path: path.clone(), error })?;
        match file.try_lock() {
            Ok(()) => Ok(Part { path, file }),
            Err(TryLockError::WouldBlock) => Err(Error::Busy(target.to_owned())),
            Err(TryLockError::Error(error)) => Err(Error::File { path, error }),
        }
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::File { path: self.path.clone(), error }
    }

    fn len(&self) -> Result<u64, Error> {
        self.file.metadata().map(|file| file.len()).map_err(|error| self.failed(error))
    }

    fn etag_path(&self) -> PathBuf {
        beside(&self.path, ".etag")
    }

    /// Asks for what is missing, and takes what comes. `known` is the ETag of the whole file that is there.
    fn pull(&self, agent: &Agent, source: &Source, known: Option<&str>, progress: &Progress) -> Result<Pulled, Error> {
        let etag = fs::read_to_string(self.etag_path()).ok().filter(|etag| !etag.is_empty());
        // Without checksum and ETag nobody knows whether the rest would be the same file's.
        let start = if source.sha256.is_some() || etag.is_some() { self.len()? } else { 0 };
        let response = ask(agent, source, start, etag.filter(|_| source.sha256.is_none()).as_deref(), known)?;
        let start = match response.status() {
            StatusCode::NOT_MODIFIED => return Ok(Pulled::Unchanged),
            StatusCode::PARTIAL_CONTENT if begins_at(&response, start) => start,
            // All of it is there already, or more than all of it.
            StatusCode::RANGE_NOT_SATISFIABLE if start > 0 => {
                self.cut(0)?;
                return self.pull(agent, source, known, progress);
            }
            StatusCode::OK => 0,
            status => return Err(refusal(source, status)),
        };
        let etag = text(&response, header::ETAG);
        if known.is_some() && known == etag.as_deref() {
            return Ok(Pulled::Unchanged);
        }
        if start == 0 {
            self.cut(0)?;
            let noted = fs::write(self.etag_path(), etag.as_deref().unwrap_or_default());
            noted.map_err(|error| self.failed(error))?;
        }
        let digest = self.take(source, start, response, progress)?;
        Ok(Pulled::Whole { etag, digest })
    }

    fn cut(&self, length: u64) -> Result<(), Error> {
        self.file.set_len(length).map_err(|error| self.failed(error))
    }

    /// Writes a response's body behind the first `start` bytes, and returns the SHA-256 of all.
    fn take(
        &self,
        source: &Source,
        start: u64,
        response: Response<Body>,
        progress: &Progress,
    ) -> Result<String, Error> {
        let mut hash = Sha256::new();
        let mut file = &self.file;
        self.cut(start)?;
        file.seek(SeekFrom::Start(0)).map_err(|error| self.failed(error))?;
        io::copy(&mut file.take(start), &mut HashWriter(&mut hash)).map_err(|error| self.failed(error))?;

        let total = response.body().content_length().map(|rest| start + rest);
        let mut body = response.into_body().into_reader();
        let lost = |why: String| Error::Connection { url: source.url.clone(), why };
        let mut buffer = vec![0; 1 << 18];
        let mut done = start;
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(lost(format!("the connection broke after {done} bytes ({error})"))),
            };
            file.write_all(&buffer[..n]).map_err(|error| self.failed(error))?;
            hash.update(&buffer[..n]);
            done += n as u64;
            if let Some(total) = total {
                progress.set(done as f32 / total as f32);
            }
        }
        match total {
            Some(total) if total != done => Err(lost(format!("the connection broke after {done} of {total} bytes"))),
            _ => Ok(hexadecimal(&hash.finalize())),
        }
    }

    /// Gives the whole file its name, if it is the right one.
    fn finish(&self, source: &Source, target: &Path, etag: Option<&str>, digest: &str) -> Result<(), Error> {
        if let Some(expected) = source.sha256.as_deref().filter(|expected| *expected != digest) {
            self.give_up()?;
            let (name, found, expected) = (source.name.clone(), digest.to_owned(), expected.to_owned());
            return Err(Error::Checksum { name, found, expected });
        }
        self.file.sync_all().map_err(|error| self.failed(error))?;
        if source.sha256.is_none() {
            let noted = fs::write(beside(target, ".etag"), etag.unwrap_or_default());
            noted.map_err(|error| self.failed(error))?;
        }
        let _ = fs::remove_file(self.etag_path());
        fs::rename(&self.path, target).map_err(|error| self.failed(error))
    }

    /// Deletes what is there.
    fn give_up(&self) -> Result<(), Error> {
        let _ = fs::remove_file(self.etag_path());
        fs::remove_file(&self.path).map_err(|error| self.failed(error))
    }
}

fn ask(
    agent: &Agent,
    source: &Source,
    start: u64,
    part_of: Option<&str>,
    known: Option<&str>,
) -> Result<Response<Body>, Error> {
    let mut request = agent.get(&source.url);
    if let Some(token) = &source.token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    if start > 0 {
        request = request.header(header::RANGE, format!("bytes={start}-"));
        if let Some(etag) = part_of {
            request = request.header(header::IF_RANGE, etag);
        }
    }
    if let Some(etag) = known.filter(|etag| !etag.is_empty()) {
        request = request.header(header::IF_NONE_MATCH, etag);
    }
    request.call().map_err(|error| failure(&source.url, error))
}

/// What an error of the client means.
pub fn failure(url: &str, error: ureq::Error) -> Error {
    let url = url.to_owned();
    match error {
        ureq::Error::StatusCode(code) => status(url, code),
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => Error::Address(url),
        ureq::Error::Json(error) => Error::Answer { url, why: error.to_string() },
        error => Error::Connection { url, why: error.to_string() },
    }
}

fn refusal(source: &Source, code: StatusCode) -> Error {
    status(source.url.clone(), code.as_u16())
}

fn status(url: String, code: u16) -> Error {
    match code {
        404 => Error::Missing(url),
        401 | 403 => Error::Forbidden { url, code },
        code => Error::Status { url, code },
    }
}

/// Whether a part of a file is the one that was asked for.
fn begins_at(response: &Response<Body>, start: u64) -> bool {
    let range = text(response, header::CONTENT_RANGE);
    range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
}

fn text(response: &Response<Body>, name: header::HeaderName) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
