//! From the policies that need a model's profile to a fixed set of layers.

use super::error::Error;
use crate::{
    ggml::logging,
    lazy::{LazyParams, Policy, Profile, ProfileError, Target},
    model::Model,
};

/// Replaces `profile` by the layers that it names, and `auto` too where the model's profile is known.
pub(super) fn settle(lazy: &mut LazyParams, model: &Model) -> Result<(), Error> {
    let target = match lazy.policy {
        Policy::Profile(target) => target,
        Policy::Auto => Target::default(),
        _ => return Ok(()),
    };
    let skipped = &mut |error: ProfileError| logging::warn(&format!("skipped: {error}"));
    let (source, profile) = match Profile::find(lazy.profile.as_deref(), model.path(), model.identity(), skipped)? {
        Some(found) => found,
        None if lazy.policy == Policy::Auto => return Ok(()),
        None => return Err(ProfileError::none_known(model.path(), model.identity()).into()),
    };
    logging::info(&format!("lazy layers by profile {source}"));
    lazy.policy = Policy::Layers(profile.lazy_layers(target));
    // Its windows were chosen in place of this one; whoever wants another for all layers does not want them.
    if lazy.n_window == profile.n_window {
        lazy.windows = lazy.windows.or(&profile.windows(target));
    }
    Ok(())
}
