//! From the policies that need a model's profile to a fixed set of layers.

use super::error::Error;
use crate::{
    lazy::{DEFAULT_KL, LazyParams, Policy, Profile},
    model::Model,
};

/// Replaces `profile` by the layers that it names, and `auto` by the rule that it stands for. The profile's order, where
/// the rule goes by looks and the model has a profile.
pub(super) fn settle(lazy: &mut LazyParams, model: &Model) -> Result<Option<Vec<usize>>, Error> {
    if lazy.policy == Policy::Auto {
        lazy.policy = Policy::Kl(DEFAULT_KL);
    }
    let path = lazy.profile.clone().unwrap_or_else(|| Profile::path_beside(model.path()));
    let target = match lazy.policy {
        Policy::Profile(target) => Some(target),
        Policy::Kl(_) if lazy.profile.is_some() || path.is_file() => None,
        _ => return Ok(None),
    };
    let profile = Profile::read(&path)?;
    profile.check_model(&model.identity()?, &path)?;
    let Some(target) = target else { return Ok(Some(profile.order)) };
    lazy.policy = Policy::Layers(profile.lazy_layers(target));
    // Its windows were chosen in place of this one; whoever wants another for all layers does not want them.
    if lazy.n_window == profile.n_window {
        lazy.windows = lazy.windows.or(&profile.windows(target));
    }
    Ok(None)
}
