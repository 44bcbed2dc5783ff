//! Which profile is a model's: found by what the model is, whatever its file is called and however it is quantised.

use std::{
    env, fmt, fs, io,
    path::{Path, PathBuf},
};

use etcetera::BaseStrategy;

use super::{Identity, Profile, ProfileError};

/// How the files of profiles end.
const EXTENSION: &str = "simlayer.toml";

/// Names another folder of the user's profiles.
const FOLDER_VARIABLE: &str = "SIMLAYER_PROFILES";

/// Letters of a model's name, and of its norms' hash, in the name of its profile's file.
const NAME_LETTERS: usize = 60;
const HASH_LETTERS: usize = 8;

/// A profile that is part of this program.
struct BuiltIn {
    file: &'static str,
    text: &'static str,
}

macro_rules! built_in {
    ($($file:literal),+ $(,)?) => {
        &[$(BuiltIn { file: $file, text: include_str!(concat!("../../profiles/", $file)) }),+]
    };
}

const BUILT_IN: &[BuiltIn] =
    built_in!["SmolLM2-135M-Instruct.Q4_1.simlayer.toml", "qwen2.5-coder-0.5b-instruct-q4_k_m.simlayer.toml"];

/// Where a profile was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProfileSource {
    File(PathBuf),
    /// The name of the file that it was made of.
    BuiltIn(&'static str),
}

impl fmt::Display for ProfileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProfileSource::File(path) => path.display().fmt(f),
            ProfileSource::BuiltIn(name) => write!(f, "{name} (built in)"),
        }
    }
}

/// The user's folder of profiles: `$SIMLAYER_PROFILES`, else `simlayer/profiles` in the folder for users' data (XDG's on
/// Unix). `None` where there is no home. It need not exist.
pub fn profile_folder() -> Option<PathBuf> {
    match env::var_os(FOLDER_VARIABLE).filter(|value| !value.is_empty()) {
        Some(folder) => Some(folder.into()),
        None => Some(etcetera::choose_base_strategy().ok()?.data_dir().join("simlayer/profiles")),
    }
}

impl Profile {
    /// The profile's place beside its model: `model.gguf` → `model.simlayer.toml`.
    pub fn path_beside(model: &Path) -> PathBuf {
        model.with_extension(EXTENSION)
    }

    /// A model's profile: the file `named`, else the one beside the model, else the first of [`profile_folder`] that is of
    /// this model, else the one built in. `skipped` is told which files of the folder are no profiles.
    ///
    /// # Errors
    /// When the named file, or the one beside the model, cannot be read, is no profile, or is another model's.
    pub fn find(
        named: Option<&Path>,
        model_path: &Path,
        model: &Identity,
        skipped: &mut dyn FnMut(ProfileError),
    ) -> Result<Option<(ProfileSource, Profile)>, ProfileError> {
        find(named, model_path, profile_folder().as_deref(), model, skipped)
    }

    /// Where the user's profile of a model belongs: in place of the one that [`profile_folder`] has, else in a file of its
    /// own there; beside the model where there is no such folder.
    pub fn path_for(model_path: &Path, model: &Identity) -> PathBuf {
        match profile_folder() {
            Some(folder) => path_in(&folder, model),
            None => Profile::path_beside(model_path),
        }
    }
}

impl ProfileError {
    /// No profile was found where [`Profile::find`] looks.
    pub(crate) fn none_known(model_path: &Path, model: &Identity) -> ProfileError {
        ProfileError::NoneKnown {
            model: model.name.clone().unwrap_or_else(|| model_path.display().to_string()),
            beside: Profile::path_beside(model_path),
            folder: profile_folder(),
        }
    }
}

fn find(
    named: Option<&Path>,
    model_path: &Path,
    folder: Option<&Path>,
    model: &Identity,
    skipped: &mut dyn FnMut(ProfileError),
) -> Result<Option<(ProfileSource, Profile)>, ProfileError> {
    let beside = Profile::path_beside(model_path);
    if let Some(path) = named.or(beside.is_file().then_some(&beside)) {
        let profile = Profile::read(path)?;
        profile.check_model(model, path)?;
        return Ok(Some((ProfileSource::File(path.to_owned()), profile)));
    }
    if let Some((path, profile)) = folder.and_then(|folder| in_folder(folder, model, skipped)) {
        return Ok(Some((ProfileSource::File(path), profile)));
    }
    Ok(built_in(model))
}

/// The first of a folder's profiles, by their files' names, that is of this model.
fn in_folder(folder: &Path, model: &Identity, skipped: &mut dyn FnMut(ProfileError)) -> Option<(PathBuf, Profile)> {
    let mut paths = match files(folder) {
        Ok(paths) => paths,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(source) => {
            skipped(ProfileError::Io { path: folder.to_owned(), source });
            return None;
        }
    };
    paths.sort();
    paths.into_iter().find_map(|path| match Profile::read(&path) {
        Ok(profile) => profile.model.is_of(model).then_some((path, profile)),
        Err(error) => {
            skipped(error);
            None
        }
    })
}

fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(&format!(".{EXTENSION}")) {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn path_in(folder: &Path, model: &Identity) -> PathBuf {
    match in_folder(folder, model, &mut |_| {}) {
        Some((path, _)) => path,
        None => folder.join(format!("{}.{EXTENSION}", stem(model))),
    }
}

fn built_in(model: &Identity) -> Option<(ProfileSource, Profile)> {
    BUILT_IN.iter().find_map(|BuiltIn { file, text }| {
        // A test says that all of them are profiles.
        let profile = Profile::parse(text).ok()?;
        profile.model.is_of(model).then_some((ProfileSource::BuiltIn(file), profile))
    })
}

/// The model's name and the beginning of its norms' hash.
pub(super) fn stem(model: &Identity) -> String {
    let name = model.name.as_ref().unwrap_or(&model.architecture);
    let words = name.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '_'));
    let mut name: String = words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-");
    name.truncate(NAME_LETTERS);
    let hash = model.norms_sha256.get(..HASH_LETTERS).unwrap_or_default();
    format!("{}-{hash}", name.trim_start_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2() -> Profile {
        Profile::parse(BUILT_IN[0].text).unwrap()
    }

    fn other(hash: &str) -> Profile {
        let mut profile = smollm2();
        profile.model.norms_sha256 = hash.repeat(32);
        profile
    }

    #[test]
    fn those_built_in_are_profiles_of_what_their_files_are_called() {
        let mut found = Vec::new();
        for BuiltIn { file, text } in BUILT_IN {
            let profile = Profile::parse(text).unwrap_or_else(|why| panic!("{file}: {why}"));
            assert_eq!(built_in(&profile.model), Some((ProfileSource::BuiltIn(file), profile.clone())), "{file}");
            // Names differ from one maker of files to the next; what they have in common is the model's size.
            let name = profile.model.name.unwrap().to_lowercase();
            let file = file.to_lowercase();
            let is_size = |word: &&str| word.strip_suffix(['m', 'b']).is_some_and(|n| n.parse::<f64>().is_ok());
            let size = file.split('-').find(is_size).unwrap();
            assert!(name.contains(size) && name.starts_with(&file[..5]), "{file} is of {name}");
            found.push(profile.model.norms_sha256);
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
        assert_eq!(files(&folder).unwrap().len(), BUILT_IN.len(), "a file of profiles/ is not built in");
        found.sort();
        found.dedup();
        assert_eq!(found.len(), BUILT_IN.len(), "two are of one model");
    }

    #[test]
    fn the_nearest_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let [models, users] = ["models", "users"].map(|name| folder.path().join(name));
        fs::create_dir(&models).unwrap();
        let model_path = models.join("m.gguf");
        let model = smollm2().model;
        let source = |named: Option<&Path>| {
            let found = find(named, &model_path, Some(&users), &model, &mut |error| panic!("{error}")).unwrap();
            found.unwrap().0
        };
        assert_eq!(source(None), ProfileSource::BuiltIn(BUILT_IN[0].file));
        fs::create_dir(&users).unwrap();
        assert_eq!(source(None), ProfileSource::BuiltIn(BUILT_IN[0].file));
        // Another quantisation may have another name.
        let mut own = smollm2();
        own.model.name = None;
        let path = path_in(&users, &model);
        own.write(&path).unwrap();
        other("ab").write(&users.join("a.simlayer.toml")).unwrap();
        assert_eq!(source(None), ProfileSource::File(path.clone()));
        // What is there already is replaced, whatever it is called.
        let renamed = users.join("b.simlayer.toml");
        fs::rename(&path, &renamed).unwrap();
        assert_eq!(path_in(&users, &model), renamed);
        let beside = models.join("m.simlayer.toml");
        smollm2().write(&beside).unwrap();
        assert_eq!(source(None), ProfileSource::File(beside));
        let named = folder.path().join("x");
        smollm2().write(&named).unwrap();
        assert_eq!(source(Some(&named)), ProfileSource::File(named.clone()));
    }

    #[test]
    fn what_was_asked_for_by_its_place_must_be_right() {
        let folder = tempfile::tempdir().unwrap();
        let model_path = folder.path().join("m.gguf");
        let model = smollm2().model;
        let find = |named: Option<&Path>| find(named, &model_path, None, &model, &mut |error| panic!("{error}"));
        let missing = folder.path().join("none");
        assert!(matches!(find(Some(&missing)), Err(ProfileError::Missing { .. })));
        other("ab").write(&Profile::path_beside(&model_path)).unwrap();
        assert!(matches!(find(None), Err(ProfileError::OtherModel { .. })));
        fs::write(Profile::path_beside(&model_path), "nonsense").unwrap();
        assert!(matches!(find(None), Err(ProfileError::Syntax { .. })));
    }

    #[test]
    fn damaged_files_of_the_folder_are_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::write(place("a.simlayer.toml"), "version = 1\n").unwrap();
        fs::write(place("b.simlayer.toml"), [0xff, 0xfe]).unwrap();
        fs::write(place("c.simlayer.toml.part"), "nonsense").unwrap();
        fs::write(place("d.txt"), "nonsense").unwrap();
        let mut skipped = Vec::new();
        let mut look = |model: &Identity| {
            let found = find(None, Path::new("no/such.gguf"), Some(folder.path()), model, &mut |error| {
                skipped.push(error.to_string());
            });
            found.unwrap().map(|(source, _)| source)
        };
        assert_eq!(look(&other("ab").model), None);
        other("ab").write(&place("e.simlayer.toml")).unwrap();
        assert_eq!(look(&other("ab").model), Some(ProfileSource::File(place("e.simlayer.toml"))));
        assert_eq!(skipped.len(), 4);
        assert!(skipped[0].contains("a.simlayer.toml is no profile"), "{}", skipped[0]);
        assert!(skipped[1].contains("b.simlayer.toml"), "{}", skipped[1]);
        // A folder that is none is as bad.
        let mut errors = 0;
        let found = find(None, Path::new("x"), Some(&place("d.txt")), &other("ab").model, &mut |_| errors += 1);
        assert_eq!((found.unwrap(), errors), (None, 1));
    }

    #[test]
    fn files_are_called_as_their_models() {
        let named = |name: Option<&str>| {
            let mut model = other("ab").model;
            model.name = name.map(str::to_owned);
            format!("{}.{EXTENSION}", stem(&model))
        };
        assert_eq!(named(Some("Qwen2.5 Coder 0.5B_(GGUF)")), "Qwen2.5-Coder-0.5B_-GGUF-abababab.simlayer.toml");
        assert_eq!(named(None), "llama-abababab.simlayer.toml");
        for hostile in ["../../x", "..", "/etc/passwd", "a\0b", "", "…", "C:\\x"] {
            let name = named(Some(hostile));
            assert!(!name.contains(['/', '\\', '\0', ':']) && !name.starts_with('.'), "{hostile}: {name}");
        }
        assert!(named(Some(&"é-x".repeat(200))).len() < 100);
    }

    #[test]
    fn lies_beside_the_model() {
        assert_eq!(Profile::path_beside(Path::new("a/b.Q4_1.gguf")), Path::new("a/b.Q4_1.simlayer.toml"));
    }

    #[test]
    fn what_is_not_known_says_where_it_was_looked_for() {
        let error = |folder: Option<&str>| {
            let (model, beside) = ("M".to_owned(), PathBuf::from("a/m.simlayer.toml"));
            ProfileError::NoneKnown { model, beside, folder: folder.map(PathBuf::from) }.to_string()
        };
        let text = error(Some("/home/u/profiles"));
        for part in ["M is known", "a/m.simlayer.toml", "/home/u/profiles", "built in", "simlayer-run calibrate"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(error(None).contains("no folder of profiles"));
    }
}
