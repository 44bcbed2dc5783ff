//! From the policies that need a model's profile to a fixed set of layers.

use std::path::Path;

use super::error::Error;
use crate::{
    ggml::logging,
    lazy::{Identity, LazyParams, Policy, PrefillMode, Profile, ProfileError, Setting, Target},
};

/// What a profile says besides which layers are lazy.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// Its order, where the rule goes by looks and a profile is named.
    pub order: Option<Vec<usize>>,
    /// What was chosen for the target.
    pub setting: Option<Setting>,
}

/// Replaces `profile` by the layers that it names for the model of this file, with their windows.
pub(super) fn settle(lazy: &mut LazyParams, path: &Path, identity: &Identity) -> Result<Settled, Error> {
    let policy = lazy.policy.clone();
    let is_looked_for = match policy {
        Policy::Profile(_) => true,
        // A look's own order goes further, on every prompt that was tried with both (docs/quality.md).
        _ => policy.most_foretold().is_some() && lazy.profile.is_some(),
    };
    if !is_looked_for {
        return Ok(Settled::default());
    }
    let skipped = &mut |error: ProfileError| logging::warn(&format!("skipped: {error}"));
    let found = Profile::find(lazy.profile.as_deref(), path, identity, skipped)?;
    let Policy::Profile(target) = policy else {
        let order = found.map(|(source, profile)| {
            logging::info(&format!("lazy layers in the order of profile {source}"));
            profile.order
        });
        return Ok(Settled { order, setting: None });
    };
    let Some((source, profile)) = found else {
        return Err(ProfileError::none_known(path, identity).into());
    };
    let setting = profile.setting(target);
    if setting.is_none() && matches!(target, Target::Times(_)) {
        let known: Vec<String> = profile.settings.iter().map(|setting| setting.target.to_string()).collect();
        return Err(ProfileError::NoSetting { profile: source.to_string(), target, known: known.join(", ") }.into());
    }
    logging::info(&format!("lazy layers by profile {source}"));
    // A windowed prefill is what rules with known layers have anyway.
    if profile.prefill == PrefillMode::Full {
        lazy.prefill.get_or_insert(PrefillMode::Full);
    }
    lazy.policy = Policy::Layers(profile.lazy_layers(target));
    // Its windows were chosen in place of this one; whoever wants another for all layers does not want them.
    if lazy.n_window == profile.n_window {
        lazy.windows = lazy.windows.or(&profile.windows(target));
        lazy.n_window = setting.map_or(lazy.n_window, |setting| setting.n_window);
    }
    if let Some(setting) = setting.filter(|_| lazy.n_rescued == 0) {
        lazy.n_rescued = setting.n_rescued;
    }
    Ok(Settled { order: None, setting: setting.cloned() })
}
