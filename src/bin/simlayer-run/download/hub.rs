//! Repositories of models, and the cache that other programs share: hf-hub knows where they are and how they are laid out.

use std::{
    env, fs,
    path::{Component, Path, PathBuf},
};

use hf_hub::{
    Cache, CacheRepo, Repo, RepoType,
    api::sync::{Api, ApiBuilder},
};
use serde::Deserialize;

use super::{
    error::Error,
    folders, names,
    transfer::{self, Source},
};

/// `USER/MODEL:QUANT`, and what else says which file.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// `USER/MODEL`.
    pub repository: &'a str,
    pub quant: Option<&'a str>,
    pub file: Option<&'a str>,
}

impl<'a> Wanted<'a> {
    pub fn new(repository: &'a str, file: Option<&'a str>) -> Result<Wanted<'a>, Error> {
        let (name, quant) = match repository.split_once(':') {
            Some((name, quant)) => (name, Some(quant)),
            None => (repository, None),
        };
        let good = |part: &str| {
            let inner = |char: char| char.is_ascii_alphanumeric() || "_-.".contains(char);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(inner)
        };
        match name.split('/').collect::<Vec<_>>()[..] {
            [user, model] if good(user) && good(model) && quant != Some("") => {
                Ok(Wanted { repository: name, quant, file })
            }
            _ => Err(Error::Repository(repository.to_owned())),
        }
    }

    /// The file's name among these.
    fn choose<'n>(&self, names: &[&'n str]) -> Option<&'n str> {
        match self.file {
            Some(file) => names.iter().find(|name| **name == file).copied(),
            None => names::choose(names, self.quant),
        }
    }
}

/// Where the model is in the cache; what is missing of it is fetched, unless `offline`.
pub fn model(wanted: &Wanted<'_>, token: Option<String>, offline: bool) -> Result<PathBuf, Error> {
    let cache = Cache::new(folders::repositories()?);
    let hub = Hub { local: cache.repo(Repo::new(wanted.repository.to_owned(), RepoType::Model)), cache };
    if offline {
        return hub.cached(wanted);
    }
    match hub.fetch(wanted, token) {
        // What is there is better than nothing.
        Err(error @ Error::Connection { .. }) => match hub.cached(wanted) {
            Ok(path) => {
                eprintln!("{error}; taking {} from the cache", path.display());
                Ok(path)
            }
            Err(_) => Err(error),
        },
        result => result,
    }
}

/// A repository: here and, where it is asked, there.
struct Hub {
    cache: Cache,
    local: CacheRepo,
}

/// What the server says of a repository.
#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    lfs: Option<Lfs>,
}

/// Large files have a checksum.
#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: String,
}

impl Listing {
    fn checksum(&self, name: &str) -> Option<String> {
        let file = self.siblings.iter().find(|file| file.rfilename == name)?;
        Some(file.lfs.as_ref()?.sha256.to_ascii_lowercase())
    }
}

impl Hub {
    /// The model of a repository that the cache has.
    fn cached(&self, wanted: &Wanted<'_>) -> Result<PathBuf, Error> {
        let (repository, cache) = (wanted.repository.to_owned(), self.cache.path().clone());
        let Some(snapshot) = self.snapshot(wanted) else {
            return Err(Error::OfflineRepository { repository, cache });
        };
        let mut names = Vec::new();
        files(&snapshot, "", &mut names);
        names.sort();
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        let missing = |name: String| Error::OfflineFile { name, repository: repository.clone(), cache: cache.clone() };
        let Some(name) = wanted.choose(&all) else {
            let what = wanted.file.or(wanted.quant).unwrap_or("a GGUF file");
            return Err(missing(what.to_owned()));
        };
        let parts = names::parts(name);
        match parts.iter().find(|part| !snapshot.join(part).exists()) {
            Some(part) => Err(missing(part.clone())),
            None => Ok(snapshot.join(&parts[0])),
        }
    }

    /// The folder of the newest version that is there.
    fn snapshot(&self, wanted: &Wanted<'_>) -> Option<PathBuf> {
        let repository = Repo::new(wanted.repository.to_owned(), RepoType::Model);
        let folder = self.cache.path().join(repository.folder_name());
        let commit = fs::read_to_string(folder.join("refs").join(repository.revision())).ok()?;
        Some(self.local.pointer_path(commit.trim())).filter(|snapshot| snapshot.is_dir())
    }

    fn fetch(&self, wanted: &Wanted<'_>, token: Option<String>) -> Result<PathBuf, Error> {
        let token = token.or_else(|| self.cache.token());
        let api = self.api(token.clone())?;
        let listing = list(&api, wanted)?;
        let all: Vec<&str> = listing.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let chosen = wanted.choose(&all).filter(|name| is_relative(name));
        let Some(name) = chosen else {
            let what = match (wanted.file, wanted.quant) {
                (Some(file), _) => format!("named {file}"),
                (None, Some(quant)) => format!("of {quant}"),
                (None, None) => "with a model".to_owned(),
            };
            let has = all.into_iter().filter(|name| name.ends_with(".gguf")).map(str::to_owned).collect();
            return Err(Error::NoModel { repository: wanted.repository.to_owned(), what, has });
        };
        if let Some(projector) = all.iter().find(|name| names::is_projector(name)) {
            eprintln!("{projector} is not fetched: simlayer reads no pictures and sounds");
        }
        let version = Repo::with_revision(wanted.repository.to_owned(), RepoType::Model, listing.sha.clone());
        let remote = api.repo(version);
        let snapshot = self.local.pointer_path(&listing.sha);
        let agent = transfer::agent();
        let parts = names::parts(name);
        let first = snapshot.join(&parts[0]);
        for part in parts {
            let target = snapshot.join(&part);
            if target.exists() {
                continue;
            }
            let sha256 = listing.checksum(&part);
            let source = Source { url: remote.url(&part), name: part, token: token.clone(), sha256 };
            self.fetch_file(&agent, &source, &target)?;
        }
        let noted = self.local.create_ref(&listing.sha);
        noted.map_err(|error| Error::File { path: snapshot.clone(), error })?;
        Ok(first)
    }

    /// The server's side, where the environment says or hf-hub knows.
    fn api(&self, token: Option<String>) -> Result<Api, Error> {
        let mut api = ApiBuilder::from_cache(self.cache.clone()).with_token(token).with_progress(false);
        let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        if let Some(endpoint) = ["MODEL_ENDPOINT", "HF_ENDPOINT"].into_iter().find_map(set) {
            api = api.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        api.build().map_err(|error| Error::Answer { url: "the client".to_owned(), why: error.to_string() })
    }

    /// A file with its checksum becomes a blob of that name and a link to it.
    fn fetch_file(&self, agent: &ureq::Agent, source: &Source, target: &Path) -> Result<(), Error> {
        let blob = match &source.sha256 {
            Some(sha256) => self.local.blob_path(sha256),
            None => {
                eprintln!(
                    "{}: the repository gives no checksum, so that nobody can tell whether it is whole",
                    source.name
                );
                target.to_owned()
            }
        };
        if !blob.is_file() {
            eprintln!("fetching {} from {} to {}", source.name, source.url, self.cache.path().display());
            transfer::fetch(agent, source, &blob)?;
        }
        if blob == target { Ok(()) } else { link(&blob, target) }
    }
}

/// What the repository has, with checksums. Whatever becomes a path here is looked at first.
fn list(api: &Api, wanted: &Wanted<'_>) -> Result<Listing, Error> {
    let repository = api.model(wanted.repository.to_owned());
    let url = repository.url("");
    let url = url.split("/resolve/").next().unwrap_or_default();
    let mut response =
        repository.info_request().query("blobs", "true").call().map_err(|error| transfer::failure(url, error))?;
    let listing: Listing = response.body_mut().read_json().map_err(|error| transfer::failure(url, error))?;
    let hexadecimal = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let wrong = |why: String| Error::Answer { url: url.to_owned(), why };
    if listing.sha.is_empty() || !hexadecimal(&listing.sha) {
        return Err(wrong(format!("{:?} is no commit", listing.sha)));
    }
    let sums = listing.siblings.iter().filter_map(|file| file.lfs.as_ref());
    match sums.map(|lfs| &lfs.sha256).find(|sum| sum.len() != 64 || !hexadecimal(sum)) {
        Some(sum) => Err(wrong(format!("{sum:?} is no SHA-256"))),
        None => Ok(listing),
    }
}

/// Whether a name stays below the folder that it is joined to.
fn is_relative(name: &str) -> bool {
    Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// The names of all files below a folder, which is `prefix` from where names begin.
fn files(folder: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = format!("{prefix}{name}");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), &format!("{name}/"), names);
        } else {
            names.push(name);
        }
    }
}

/// Makes `target` mean the blob. Links name it from where they are, so that the cache can be moved.
fn link(blob: &Path, target: &Path) -> Result<(), Error> {
    let failed = |error| Error::File { path: target.to_owned(), error };
    let folder = target.parent().unwrap_or(target);
    fs::create_dir_all(folder).map_err(failed)?;
    // Both are below the repository's folder: blobs/SUM and snapshots/COMMIT/NAME.
    let repository = blob.parent().and_then(Path::parent).unwrap_or(blob);
    let up = folder.strip_prefix(repository).map_or(0, |inside| inside.components().count());
    let inside = blob.strip_prefix(repository).unwrap_or(blob);
    let mut relative: PathBuf = std::iter::repeat_n("..", up).collect();
    relative.push(inside);
    // One that leads nowhere, from a cache that somebody has tidied.
    let _ = fs::remove_file(target);
    #[cfg(unix)]
    return std::os::unix::fs::symlink(relative, target).map_err(failed);
    #[cfg(not(unix))]
    return fs::hard_link(blob, target).map_err(failed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_read() {
        let wanted = Wanted::new("user/a-model.v2:Q4_K_M", None).unwrap();
        assert_eq!((wanted.repository, wanted.quant), ("user/a-model.v2", Some("Q4_K_M")));
        assert_eq!(Wanted::new("user/model", None).unwrap().quant, None);
        for wrong in ["model", "a/b/c", "/b", "a/", "../b", "a/..", "a b/c", "a/b:", ""] {
            assert!(matches!(Wanted::new(wrong, None), Err(Error::Repository(_))), "{wrong}");
        }
    }

    #[test]
    fn names_stay_in_their_folder() {
        assert!(is_relative("a.gguf") && is_relative("a/b.gguf"));
        assert!(!is_relative("../a.gguf") && !is_relative("/a.gguf") && !is_relative("a/../../b.gguf"));
    }
}
