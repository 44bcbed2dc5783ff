//! Where what was fetched is kept.

use std::{env, path::PathBuf};

use super::error::Error;

/// Where llama.cpp keeps what came from addresses.
pub fn addresses() -> Result<PathBuf, Error> {
    variable("LLAMA_CACHE").or_else(|| user("llama.cpp")).ok_or(Error::NoHome)
}

/// The cache of repositories, as llama.cpp finds it.
pub fn repositories() -> Result<PathBuf, Error> {
    let whole = ["LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].into_iter().find_map(variable);
    let home = || Some(variable("HF_HOME")?.join("hub"));
    whole.or_else(home).or_else(|| user("huggingface/hub")).ok_or(Error::NoHome)
}

/// The folder that a variable names.
fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// One of the user's caches; `None` where there is no home.
fn user(name: &str) -> Option<PathBuf> {
    let caches = variable("XDG_CACHE_HOME").or_else(|| Some(etcetera::home_dir().ok()?.join(".cache")));
    Some(caches?.join(name))
}
