//! What a calibration has measured so far, in a file: one that is interrupted goes on from there.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::Excerpts;
use crate::{
    engine::{Error, SessionParams},
    lazy::{Identity, Policy, PrefillMode, ProfileError},
    model::Model,
};

/// What was measured: the harm with these layers lazy, which have these windows of their own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Trial {
    pub lazy: Vec<usize>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub windows: String,
    /// How the prompt was read where it was, in place of a copy of the uncompressed run's cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<PrefillMode>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Found {
    /// Mean divergence after a token of the texts.
    pub kl: f64,
    /// Mean rise of an answer token's negative log-likelihood, where there are answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll: Option<f64>,
    /// Of cuts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<f64>,
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    trial: Trial,
    #[serde(flatten)]
    found: Found,
}

/// The first line of the file: measurements of other calibrations are of no use.
#[derive(Serialize)]
struct Header<'a> {
    calibration: u32,
    model: &'a Identity,
    weight_bytes: usize,
    text_sha256: String,
    n_prompt: usize,
    n_text: Vec<usize>,
    params: &'a str,
}

/// The measurements of a calibration, kept in a file as they come. Each is a line of JSON, so that a program that is
/// killed loses at most one.
#[derive(Debug, Default)]
pub struct Journal {
    file: Option<(PathBuf, File)>,
    known: HashMap<Trial, Found>,
    /// The file was of another calibration.
    replaced: bool,
}

impl Journal {
    /// Remembers nothing.
    pub fn none() -> Journal {
        Journal::default()
    }

    /// Goes on from the file, if it is of a calibration with the same model, parameters and excerpts; else it begins one.
    ///
    /// # Errors
    /// [`Error::Profile`] when the file can be neither read nor made.
    pub fn open(path: &Path, model: &Model, params: &SessionParams, excerpts: &Excerpts) -> Result<Journal, Error> {
        let header = header(model, params, excerpts)?;
        let wrong = |source| Error::Profile(ProfileError::Io { path: path.to_owned(), source });
        let before = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => "\n".to_owned(),
            Err(error) => return Err(wrong(error)),
        };
        let known = match before.strip_prefix(&header).and_then(|rest| rest.strip_prefix('\n')) {
            Some(lines) => read(lines),
            None => HashMap::new(),
        };
        let replaced = known.is_empty() && !before.is_empty() && !before.starts_with(&header);
        // Written anew, since the last line may be cut off.
        let mut file = File::create(path).map_err(wrong)?;
        let mut text = header + "\n";
        for (trial, found) in &known {
            text += &line(trial, found)?;
        }
        file.write_all(text.as_bytes()).map_err(wrong)?;
        Ok(Journal { file: Some((path.to_owned(), file)), known, replaced })
    }

    /// How many measurements there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether they are kept in a file.
    pub fn is_kept(&self) -> bool {
        self.file.is_some()
    }

    /// Whether the file held something else, which is lost now.
    pub fn replaced(&self) -> bool {
        self.replaced
    }

    /// Removes the file: the calibration is complete.
    ///
    /// # Errors
    /// [`Error::Profile`] when it cannot be removed.
    pub fn remove(self) -> Result<(), Error> {
        match self.file {
            Some((path, _)) => {
                fs::remove_file(&path).map_err(|source| Error::Profile(ProfileError::Io { path, source }))
            }
            None => Ok(()),
        }
    }

    pub(super) fn trials(&self) -> impl Iterator<Item = &Trial> {
        self.known.keys()
    }

    pub(super) fn find(&self, trial: &Trial) -> Option<Found> {
        self.known.get(trial).copied()
    }

    pub(super) fn note(&mut self, trial: Trial, found: Found) -> Result<(), Error> {
        if let Some((path, file)) = &mut self.file {
            let written = file.write_all(line(&trial, &found)?.as_bytes());
            written.map_err(|source| Error::Profile(ProfileError::Io { path: path.clone(), source }))?;
        }
        self.known.insert(trial, found);
        Ok(())
    }
}

fn read(lines: &str) -> HashMap<Trial, Found> {
    let lines = lines.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let lines = lines.filter_map(|line| serde_json::from_str::<Line>(line).ok());
    lines
        .filter(|line| line.found.kl.is_finite() && line.found.nll.is_none_or(f64::is_finite))
        .map(|line| (line.trial, line.found))
        .collect()
}

fn line(trial: &Trial, found: &Found) -> Result<String, Error> {
    let line = serde_json::to_string(&Line { trial: trial.clone(), found: *found });
    line.map(|line| line + "\n").map_err(|error| Error::Params(error.to_string()))
}

fn header(model: &Model, params: &SessionParams, excerpts: &Excerpts) -> Result<String, Error> {
    let mut params = params.clone();
    // Neither changes what is measured: threads do not, and the layers are chosen by the calibration.
    (params.n_threads, params.n_threads_batch, params.n_ctx) = (0, 0, 0);
    params.lazy.policy = Policy::Off;
    params.lazy.profile = None;
    let header = Header {
        calibration: 3,
        model: model.identity(),
        weight_bytes: model.weight_bytes(),
        text_sha256: excerpts.sha256(),
        n_prompt: excerpts.n_prompt,
        n_text: excerpts.excerpts.iter().map(|excerpt| excerpt.n_text).collect(),
        params: &format!("{params:?}"),
    };
    serde_json::to_string(&header).map_err(|error| Error::Params(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_again() {
        let trial = Trial { lazy: vec![3, 0], windows: "3=256".to_owned(), cut: Some(PrefillMode::Full) };
        let found = Found { kl: 0.1 + 0.2, nll: Some(-1.0 / 7.0), compression: Some(1.0 / 3.0) };
        let set = Trial { lazy: vec![1], windows: String::new(), cut: None };
        let kl = Found { kl: 5e-324, nll: None, compression: None };
        let text = line(&trial, &found).unwrap() + &line(&set, &kl).unwrap();
        let known = read(&text);
        assert_eq!((known.len(), known[&trial], known[&set]), (2, found, kl));
        // A line that was cut off is none.
        assert_eq!(read(&text[..text.len() - 1]).len(), 1);
        assert_eq!(read(&format!("nonsense\n{text}")).len(), 2);
    }
}
