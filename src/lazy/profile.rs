//! A model's profile: its layers in the order in which they can become lazy with the least harm, as a calibration found
//! it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{LayerWindows, PrefillMode, Setting, Target, n_active};

/// The version of the file format that this crate writes. It reads those before as well: 1 knew nothing of answers, and 2
/// nothing of settings.
const VERSION: u32 = 3;
const OLDEST_VERSION: u32 = 1;

/// Windows that make sense.
const WINDOWS: std::ops::RangeInclusive<usize> = 1..=i32::MAX as usize;

/// What a calibration found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Profile {
    pub version: u32,
    /// First and recent tokens that the lazy layers kept in the calibration.
    pub n_sink: usize,
    pub n_window: usize,
    /// How the prompt was read when the cuts were measured, and is read by those who say nothing else.
    pub prefill: PrefillMode,
    /// The layers that can become lazy, the least harmful first.
    pub order: Vec<usize>,
    pub model: Identity,
    pub text: CalibrationText,
    pub layers: Vec<ProfiledLayer>,
    pub cuts: Vec<Cut>,
    /// What was chosen for targets; one for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settings: Vec<Setting>,
}

/// What tells models apart. Quantisations of one model have the same identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The name that the file gives; for people, it is not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub architecture: String,
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    /// SHA-256 of the weights of the layers' norms, which no quantisation changes.
    pub norms_sha256: String,
}

/// The text of a calibration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationText {
    /// Of all tokens; in version 1 of the text.
    pub sha256: String,
    /// Tokens of each excerpt that were read as a prompt, and next tokens that were scored.
    pub n_prompt: usize,
    pub n_score: usize,
    pub excerpts: usize,
    /// Tokens of answers about notes in the prompts.
    #[serde(default)]
    pub n_answer: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfiledLayer {
    pub index: usize,
    /// KL divergence from the uncompressed run, in nats, when this layer alone is lazy.
    pub harm_kl: f64,
    /// The mean rise of an answer token's negative log-likelihood, in nats, when this layer alone is lazy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub harm_nll: Option<f64>,
    /// Attention mass on sink and window: what the paper's rules go by.
    pub mass: f32,
}

/// What it costs when the first layers of the order are lazy, measured in a real run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// How many layers are lazy.
    pub lazy: usize,
    pub kl_mean: f64,
    /// The mean rise of an answer token's negative log-likelihood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll_mean: Option<f64>,
    /// Uncompressed f16 cache over the cache of that run.
    pub compression: f64,
    /// The windows of these layers, in the order's order, where they were found to be better than one window for all
    /// that takes as much memory; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<usize>,
    /// `kl_mean` with one window for all, where there are `windows`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_mean_one_window: Option<f64>,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    #[error("there is no profile {path}: make one with `simlayer-run calibrate`, or name the file of one")]
    Missing { path: PathBuf },
    #[error(
        "no profile of {model} is known: there is no {beside}, {}, and none is built in; make one with `simlayer-run \
         calibrate`, or name the file of one",
        none_in(.folder.as_deref())
    )]
    NoneKnown { model: String, beside: PathBuf, folder: Option<PathBuf> },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is no profile: {why}")]
    Syntax { path: PathBuf, why: String },
    #[error(
        "profile {profile} has no setting for {target}{}; make it with `simlayer-run calibrate --target {target}`",
        if .known.is_empty() { String::new() } else { format!(", only for {}", .known) }
    )]
    NoSetting { profile: String, target: Target, known: String },
    #[error("{path} is a profile of another model: {what} is {profiled} there, and {here} in this model")]
    OtherModel { path: PathBuf, what: &'static str, profiled: String, here: String },
}

fn none_in(folder: Option<&Path>) -> String {
    match folder {
        Some(folder) => format!("none of it in {}", folder.display()),
        None => "no folder of profiles".to_owned(),
    }
}

impl Identity {
    /// Whether both are of one model, whatever its files call it.
    pub fn is_of(&self, other: &Identity) -> bool {
        self.difference(other).is_none()
    }

    /// The first fact in which they differ, and what it is in each.
    fn difference(&self, other: &Identity) -> Option<(&'static str, String, String)> {
        let facts = [
            ("the architecture", self.architecture.clone(), other.architecture.clone()),
            ("the number of layers", self.n_layer.to_string(), other.n_layer.to_string()),
            ("the embedding length", self.n_embd.to_string(), other.n_embd.to_string()),
            ("the number of heads", self.n_head.to_string(), other.n_head.to_string()),
            ("the number of KV heads", self.n_head_kv.to_string(), other.n_head_kv.to_string()),
            ("the hash of the norms' weights", self.norms_sha256.clone(), other.norms_sha256.clone()),
        ];
        facts.into_iter().find(|(_, own, others)| own != others)
    }
}

impl Profile {
    /// Reads and checks a profile.
    ///
    /// # Errors
    /// When the file cannot be read, or is no profile.
    pub fn read(path: &Path) -> Result<Profile, ProfileError> {
        let text = fs::read_to_string(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ProfileError::Missing { path: path.to_owned() },
            _ => ProfileError::Io { path: path.to_owned(), source },
        })?;
        Profile::parse(&text).map_err(|why| ProfileError::Syntax { path: path.to_owned(), why })
    }

    /// A checked profile, or why the text is none.
    pub(super) fn parse(text: &str) -> Result<Profile, String> {
        let profile: Profile = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        profile.check()?;
        Ok(profile)
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ProfileError> {
        let wrong = |source| ProfileError::Io { path: path.to_owned(), source };
        let text = toml::to_string(self).map_err(|error| wrong(std::io::Error::other(error)))?;
        fs::write(path, format!("# Made by `simlayer-run calibrate`.\n{text}")).map_err(wrong)
    }

    fn check(&self) -> Result<(), String> {
        if !(OLDEST_VERSION..=VERSION).contains(&self.version) {
            return Err(format!("version {} is unknown, the newest that is known is {VERSION}", self.version));
        }
        let n_layer = self.model.n_layer;
        let listed: BTreeSet<usize> = self.order.iter().copied().collect();
        let measured: BTreeSet<usize> = self.layers.iter().map(|layer| layer.index).collect();
        if self.order.len() != listed.len() || listed != measured {
            return Err("its order does not name each of the layers that were measured once".to_owned());
        }
        if let Some(layer) = listed.last().filter(|&&layer| layer >= n_layer) {
            return Err(format!("its order names layer {layer}, but the model has {n_layer}"));
        }
        for Cut { lazy, windows, .. } in &self.cuts {
            if *lazy > self.order.len() {
                let n = self.order.len();
                return Err(format!("a cut of {lazy} lazy layers, but {n} can become lazy"));
            }
            if !windows.is_empty() && (windows.len() != *lazy || windows.iter().any(|n| !WINDOWS.contains(n))) {
                return Err(format!("the cut of {lazy} lazy layers has not as many windows of at least 1 token"));
            }
        }
        for Setting { target, lazy, n_window, .. } in &self.settings {
            if matches!(target, Target::Share(_)) {
                return Err(format!("a setting for {target}, which is a share"));
            }
            if *lazy > self.order.len() || !WINDOWS.contains(n_window) {
                return Err(format!("the setting for {target} has {lazy} lazy layers with a window of {n_window}"));
            }
        }
        Ok(())
    }

    /// Whether it was made for this model; `path` is for the message.
    ///
    /// # Errors
    /// [`ProfileError::OtherModel`].
    pub fn check_model(&self, model: &Identity, path: &Path) -> Result<(), ProfileError> {
        match self.model.difference(model) {
            Some((what, profiled, here)) => {
                Err(ProfileError::OtherModel { path: path.to_owned(), what, profiled, here })
            }
            None => Ok(()),
        }
    }

    /// What was chosen for this very target.
    pub fn setting(&self, target: Target) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.target == target)
    }

    /// Adds a setting, in place of the one for the same target.
    pub fn set(&mut self, setting: Setting) {
        self.version = VERSION;
        self.settings.retain(|other| other.target != setting.target);
        self.settings.push(setting);
    }

    /// The layers that become lazy: the beginning of the order. None for a [`Target::Times`] without a setting.
    pub fn lazy_layers(&self, target: Target) -> BTreeSet<usize> {
        self.order.iter().copied().take(self.n_lazy(target)).collect()
    }

    /// The windows of the layers that become lazy, where they are not `n_window`: those of the largest cut that is not
    /// larger. Layers beyond it have `n_window`, so that nothing takes more memory than with one window for all. A setting
    /// has one window for all.
    pub fn windows(&self, target: Target) -> LayerWindows {
        if self.setting(target).is_some() {
            return LayerWindows::default();
        }
        let n_lazy = self.n_lazy(target);
        let cut = self.cuts.iter().filter(|cut| cut.lazy <= n_lazy).max_by_key(|cut| cut.lazy);
        let windows = cut.iter().flat_map(|cut| self.order.iter().copied().zip(cut.windows.iter().copied()));
        windows.filter(|&(_, n_window)| n_window != self.n_window).collect()
    }

    fn n_lazy(&self, target: Target) -> usize {
        let n_layer = self.order.len();
        if let Some(setting) = self.setting(target) {
            return setting.lazy;
        }
        match target {
            // As many as a budget of this share makes lazy.
            Target::Share(share) => n_layer - n_active(share, n_layer),
            Target::Kl(most) => {
                self.cuts.iter().filter(|cut| cut.kl_mean <= most).map(|cut| cut.lazy).max().unwrap_or(0)
            }
            Target::Times(_) => 0,
        }
    }

    /// The current format's version, for those who make profiles.
    pub(crate) const fn current_version() -> u32 {
        VERSION
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::Type;

    fn profile() -> Profile {
        let cut = |lazy, kl_mean| Cut {
            lazy,
            kl_mean,
            nll_mean: None,
            compression: 1.5,
            windows: vec![],
            kl_mean_one_window: None,
        };
        Profile {
            version: VERSION,
            n_sink: 4,
            n_window: 1024,
            prefill: PrefillMode::Window,
            order: vec![2, 0, 3, 1],
            model: Identity {
                name: Some("a model".into()),
                architecture: "llama".into(),
                n_layer: 4,
                n_embd: 64,
                n_head: 4,
                n_head_kv: 2,
                norms_sha256: "ab".into(),
            },
            text: CalibrationText { sha256: "cd".into(), n_prompt: 100, n_score: 10, excerpts: 1, n_answer: 7 },
            layers: (0..4).map(|index| ProfiledLayer { index, harm_kl: 0.1, harm_nll: Some(0.2), mass: 0.5 }).collect(),
            cuts: vec![cut(1, 0.001), cut(2, 0.01), cut(4, 0.1)],
            settings: vec![],
        }
    }

    fn setting(target: Target, lazy: usize) -> Setting {
        Setting {
            target,
            lazy,
            n_window: 768,
            n_rescued: 256,
            type_k: Type::Q8_0,
            type_v: Type::Q4_0,
            prune: true,
            n_prompt: 8_000,
            kl_mean: 0.01,
            nll_mean: None,
            compression: 12.5,
        }
    }

    #[test]
    fn is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.simlayer.toml");
        profile().write(&path).unwrap();
        assert_eq!(Profile::read(&path).unwrap(), profile());
        assert!(fs::read_to_string(&path).unwrap().contains("prefill = \"window\""));
    }

    /// Of a model in which only some layers can become lazy.
    #[test]
    fn only_some_layers_need_to_be_measured() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.simlayer.toml");
        let mut profile = profile();
        profile.order = vec![3, 1];
        profile.layers.retain(|layer| layer.index % 2 == 1);
        profile.cuts.truncate(2);
        profile.write(&path).unwrap();
        assert_eq!(Profile::read(&path).unwrap().lazy_layers(Target::Share(0.5)), [3].into());
    }

    #[test]
    fn cuts() {
        let lazy = |target| profile().lazy_layers(target);
        assert_eq!(lazy(Target::Share(0.0)), [].into());
        assert_eq!(lazy(Target::Share(0.5)), [0, 2].into());
        assert_eq!(lazy(Target::Share(0.6)), [0, 2].into());
        assert_eq!(lazy(Target::Share(1.0)), [0, 1, 2, 3].into());
        assert_eq!(lazy(Target::Kl(0.0)), [].into());
        assert_eq!(lazy(Target::Kl(0.01)), [0, 2].into());
        assert_eq!(lazy(Target::Kl(9.0)), [0, 1, 2, 3].into());
    }

    #[test]
    fn settings_are_for_their_targets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.simlayer.toml");
        let mut profile = profile();
        profile.version = 2;
        profile.cuts[1].windows = vec![256, 1024];
        profile.set(setting(Target::Times(12.5), 4));
        profile.set(setting(Target::Times(12.5), 3));
        profile.set(setting(Target::Kl(0.01), 1));
        profile.write(&path).unwrap();
        let read = Profile::read(&path).unwrap();
        assert_eq!(read, profile);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("target = \"12.5x\"") && text.contains("type_k = \"q8_0\""), "{text}");
        let lazy = |target| read.lazy_layers(target);
        assert_eq!(lazy(Target::Times(12.5)), [0, 2, 3].into());
        assert_eq!(lazy(Target::Times(12.0)), [].into());
        assert_eq!((lazy(Target::Kl(0.01)), read.windows(Target::Kl(0.01)).is_empty()), ([2].into(), true));
        assert_eq!((lazy(Target::Kl(0.02)), read.windows(Target::Kl(0.02)).is_empty()), ([0, 2].into(), false));
    }

    #[test]
    fn windows_are_those_of_the_cut_that_fits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.simlayer.toml");
        let mut profile = profile();
        profile.cuts[1].windows = vec![256, 1024];
        profile.cuts[1].kl_mean_one_window = Some(0.02);
        profile.cuts[2].windows = vec![512, 512, 1024, 2048];
        profile.write(&path).unwrap();
        assert_eq!(Profile::read(&path).unwrap(), profile);
        let windows = |target| profile.windows(target).to_string();
        assert_eq!(windows(Target::Share(0.25)), "");
        assert_eq!(windows(Target::Share(0.5)), "2=256");
        assert_eq!(windows(Target::Share(0.75)), "2=256");
        assert_eq!(windows(Target::Kl(9.0)), "0=512,1=2048,2=512");
    }

    #[test]
    fn wrong_files_say_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.simlayer.toml");
        let message = |change: &dyn Fn(&mut Profile)| {
            let mut profile = profile();
            change(&mut profile);
            profile.write(&path).unwrap();
            Profile::read(&path).unwrap_err().to_string()
        };
        assert!(message(&|profile| profile.version = 4).contains("version 4 is unknown"));
        assert!(
            message(&|profile| profile.order = vec![0, 1, 1, 3]).contains("each of the layers that were measured once")
        );
        assert!(
            message(&|profile| profile.order = vec![0, 1, 2]).contains("each of the layers that were measured once")
        );
        let other_layer = |profile: &mut Profile| {
            (profile.order, profile.layers[3].index) = (vec![0, 1, 2, 4], 4);
        };
        assert!(message(&other_layer).contains("layer 4, but the model has 4"));
        assert!(message(&|profile| profile.cuts[0].windows = vec![8, 8]).contains("not as many windows"));
        assert!(message(&|profile| profile.cuts[0].windows = vec![0]).contains("at least 1 token"));
        assert!(message(&|profile| profile.cuts[0].lazy = 5).contains("cut of 5 lazy layers"));
        assert!(message(&|profile| profile.set(setting(Target::Kl(0.1), 5))).contains("kl=0.1 has 5 lazy layers"));
        assert!(message(&|profile| profile.set(setting(Target::Share(0.1), 1))).contains("which is a share"));
        for text in ["", "version = 1", "no toml at all", "version = 1\nsurprise = 3"] {
            fs::write(&path, text).unwrap();
            assert!(matches!(Profile::read(&path), Err(ProfileError::Syntax { .. })), "{text}");
        }
        assert!(matches!(Profile::read(&folder.path().join("none")), Err(ProfileError::Missing { .. })));
    }

    #[test]
    fn another_models_profile_is_refused() {
        let path = Path::new("x.simlayer.toml");
        let model = profile().model;
        profile().check_model(&model, path).unwrap();
        // Another quantisation may have another name.
        profile().check_model(&Identity { name: None, ..model.clone() }, path).unwrap();
        let other = Identity { norms_sha256: "ef".into(), ..model.clone() };
        let message = profile().check_model(&other, path).unwrap_err().to_string();
        assert!(message.contains("another model") && message.contains("ab") && message.contains("ef"), "{message}");
        let message = profile().check_model(&Identity { n_layer: 3, ..model }, path).unwrap_err().to_string();
        assert!(message.contains("number of layers is 4 there, and 3 in this model"), "{message}");
    }
}
