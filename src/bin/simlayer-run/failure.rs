//! How a command ends that does not end well: message and exit code.

use std::{error::Error, fmt, io};

/// Why a command did not end well.
#[derive(Debug)]
pub enum Failure {
    /// What was asked for makes no sense.
    Usage(String),
    /// It failed while running.
    Run(String),
    /// Ctrl-C.
    Interrupted,
    /// Nobody reads our output any more.
    Closed,
}

impl Failure {
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::Usage(message.into())
    }

    pub fn run(error: impl fmt::Display) -> Failure {
        Failure::Run(error.to_string())
    }

    pub fn message(&self) -> Option<&str> {
        match self {
            Failure::Usage(message) | Failure::Run(message) => Some(message),
            Failure::Interrupted | Failure::Closed => None,
        }
    }

    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Run(_) => 1,
            Failure::Interrupted => 130,
            Failure::Closed => 0,
        }
    }
}

/// What is said when ggml gives up, which it also does when the connection to a remote device is lost: that is no bug.
pub fn fatal(message: &str) {
    #[cfg(feature = "rpc")]
    if message.contains("ggml-rpc") {
        let lost = simlayer::ggml::rpc::lost().join(", ");
        let which = if lost.is_empty() { "a remote server".to_owned() } else { format!("remote server {lost}") };
        eprintln!("\nerror: the connection to {which} was lost; is it still running and reachable?");
        simlayer::ggml::exit_now(1);
    }
    eprintln!("\nggml gave up: {message}");
}

impl From<simlayer::Error> for Failure {
    fn from(error: simlayer::Error) -> Failure {
        if let simlayer::Error::Interrupted = error {
            return Failure::Interrupted;
        }
        match option(&error) {
            Some(option) => Failure::Run(format!("{option}: {error}")),
            None => Failure::run(error),
        }
    }
}

/// The option that a library's error is about, which knows nothing of options.
fn option(error: &simlayer::Error) -> Option<&'static str> {
    use simlayer::{Error, lazy::ProfileError};
    match error {
        Error::Window { .. } => Some("--lazy-windows"),
        Error::LazyLayer { .. } | Error::Profile(ProfileError::NoneKnown { .. }) => Some("--lazy"),
        Error::Rescue(_) => Some("--lazy-rescue"),
        Error::Profile(ProfileError::Missing { .. }) => Some("--lazy-profile"),
        _ => None,
    }
}

/// What this program does not run, programs of llama.cpp may.
impl From<simlayer::model::Error> for Failure {
    fn from(error: simlayer::model::Error) -> Failure {
        if !error.is_unsupported() {
            return Failure::run(error);
        }
        Failure::Run(format!(
            "{error}; llama.cpp's own programs may run it, also on simlayer's libllama.so.0 (docs/c-abi.md)"
        ))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Closed,
            _ => Failure::run(error),
        }
    }
}

impl From<Box<dyn Error>> for Failure {
    fn from(error: Box<dyn Error>) -> Failure {
        Failure::run(error)
    }
}

macro_rules! failed_while_running {
    ($($error:ty),+) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                Failure::run(error)
            }
        })+
    };
}

failed_while_running!(
    simlayer::ggml::Error,
    simlayer::vocab::VocabError,
    simlayer::sampling::SamplingError,
    simlayer::chat::ChatError,
    simlayer::quality::ExcerptsError,
    serde_json::Error
);
