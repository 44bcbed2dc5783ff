//! Models that are not here yet: `--hf-repo` and `--model-url`, as llama.cpp has them.
//!
//! `hub` is repositories and their cache, `names` which of their files is meant, `transfer` how a file comes.

mod error;
mod folders;
mod hub;
mod names;
mod transfer;

use std::path::{Path, PathBuf};

use error::Error;
use transfer::{Fetched, Source};

use crate::{
    args::{DownloadArgs, NO_MODEL},
    failure::Failure,
};

/// The model that is asked for: `model`, or one that is fetched, or was before.
pub fn model(model: PathBuf, args: DownloadArgs) -> Result<PathBuf, Failure> {
    match (args.hf_repo, args.model_url, args.hf_file) {
        (Some(repository), _, file) => {
            let wanted = hub::Wanted::new(&repository, file.as_deref())?;
            Ok(hub::model(&wanted, args.hf_token, args.offline)?)
        }
        (None, Some(_), Some(file)) | (None, None, Some(file)) => Err(Error::FileAlone(file).into()),
        (None, Some(url), None) => {
            let target = Some(model).filter(|model| model.as_os_str() != NO_MODEL);
            Ok(of_address(&url, target, args.hf_token, args.offline)?)
        }
        (None, None, None) => Ok(model),
    }
}

/// The file of an address, at `target` or else in llama.cpp's cache; of a split model all files.
fn of_address(url: &str, target: Option<PathBuf>, token: Option<String>, offline: bool) -> Result<PathBuf, Error> {
    let plain = url.split(['?', '#']).next().unwrap_or(url);
    let (_, path) = plain.split_once("://").ok_or_else(|| Error::Address(url.to_owned()))?;
    let name = names::file_name(path);
    if name == path || matches!(name, "" | "." | "..") {
        return Err(Error::Address(url.to_owned()));
    }
    let folder = &plain[..plain.len() - name.len()];
    let query = &url[plain.len()..];
    let parts = names::parts(name);
    let target_of = |part: &str| match &target {
        Some(target) if parts.len() == 1 => Ok(target.clone()),
        // The parts' names tell the loader where the others are.
        Some(target) => Ok(target.with_file_name(part)),
        None => Ok(folders::addresses()?.join(part)),
    };
    let agent = transfer::agent();
    for part in &parts {
        let url = format!("{folder}{part}{query}");
        let source = Source { url, name: part.clone(), token: token.clone(), sha256: None };
        fetch_newer(&agent, &source, &target_of(part)?, offline)?;
    }
    target_of(&parts[0])
}

/// Fetches a file unless it is there and the server has no other.
fn fetch_newer(agent: &ureq::Agent, source: &Source, path: &Path, offline: bool) -> Result<(), Error> {
    let is_there = path.is_file();
    if offline {
        let (url, path) = (source.url.clone(), path.to_owned());
        return if is_there { Ok(()) } else { Err(Error::OfflineAddress { url, path }) };
    }
    if !is_there {
        eprintln!("fetching {} to {}", source.url, path.display());
    }
    match transfer::fetch(agent, source, path) {
        Ok(Fetched::Whole | Fetched::Unchanged) => Ok(()),
        Err(error) if is_there && error.may_pass() => {
            eprintln!("{error}; taking {} as it is", path.display());
            Ok(())
        }
        Err(error) => Err(error),
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Repository(_) | Error::FileAlone(_) | Error::Address(_) => Failure::usage(error.to_string()),
            error => Failure::run(error),
        }
    }
}
