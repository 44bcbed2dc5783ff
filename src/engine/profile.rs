//! From the policies that need a model's profile to a fixed set of layers.

use std::path::Path;

use super::error::Error;
use crate::{
    ggml::logging,
    lazy::{Identity, LazyParams, Policy, Profile, ProfileError},
};

/// Replaces `profile` by the layers that it names for the model of this file. The order of a profile that is named, where the rule goes by looks.
pub(super) fn settle(lazy: &mut LazyParams, path: &Path, identity: &Identity) -> Result<Option<Vec<usize>>, Error> {
    let policy = lazy.policy.clone();
    let is_looked_for = match policy {
        Policy::Profile(_) => true,
        // A look's own order goes further, on every prompt that was tried with both (docs/quality.md).
        _ => policy.most_foretold().is_some() && lazy.profile.is_some(),
    };
    if !is_looked_for {
        return Ok(None);
    }
    let skipped = &mut |error: ProfileError| logging::warn(&format!("skipped: {error}"));
    let found = Profile::find(lazy.profile.as_deref(), path, identity, skipped)?;
    let Policy::Profile(target) = policy else {
        return Ok(found.map(|(source, profile)| {
            logging::info(&format!("lazy layers in the order of profile {source}"));
            profile.order
        }));
    };
    let Some((source, profile)) = found else {
        return Err(ProfileError::none_known(path, identity).into());
    };
    logging::info(&format!("lazy layers by profile {source}"));
    lazy.policy = Policy::Layers(profile.lazy_layers(target));
    // Its windows were chosen in place of this one; whoever wants another for all layers does not want them.
    if lazy.n_window == profile.n_window {
        lazy.windows = lazy.windows.or(&profile.windows(target));
    }
    Ok(None)
}
