//! From the policies that need a model's profile to a fixed set of layers.

use super::error::Error;
use crate::{
    lazy::{LazyParams, Policy, Profile, Target},
    model::Model,
};

/// Replaces `profile` by the layers that it names, and `auto` too where the model has a profile.
pub(super) fn settle(lazy: &mut LazyParams, model: &Model) -> Result<(), Error> {
    let path = lazy.profile.clone().unwrap_or_else(|| Profile::path_beside(model.path()));
    let target = match lazy.policy {
        Policy::Profile(target) => target,
        Policy::Auto if lazy.profile.is_some() || path.is_file() => Target::default(),
        _ => return Ok(()),
    };
    let profile = Profile::read(&path)?;
    profile.check_model(&model.identity()?, &path)?;
    lazy.policy = Policy::Layers(profile.lazy_layers(target));
    // Its windows were chosen in place of this one; whoever wants another for all layers does not want them.
    if lazy.n_window == profile.n_window {
        lazy.windows = lazy.windows.or(&profile.windows(target));
    }
    Ok(())
}
