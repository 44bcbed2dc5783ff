//! Which layers, types, windows, pruned and rescued rows together get a cache to a size, or to a harm, at the least cost: the
//! [`Setting`] that a profile holds for a target.
//!
//! There are a few kinds of caches, by the types of the active layers' rows and by whether these are pruned. In each kind
//! the cache shrinks, and harm grows, with the number of lazy layers, which are the beginning of the profile's order. How
//! small it becomes is foretold by what each layer takes in a run with none and in one with all of them lazy; harm is
//! bisected. Whatever is chosen was a real run over every excerpt. At last the best kind's lazy layers are tried with other
//! windows, and with rescued rows in place of a part of the window.

use std::{collections::BTreeSet, fmt};

use super::{
    Excerpts,
    harm::{Base, Sum, check, real_run},
    journal::Found,
    uncompressed,
};
use crate::{
    engine::{Error, Session, SessionParams},
    ggml::Type,
    lazy::{Policy, Profile, Prune, PruneMap, Setting, Target},
    model::Model,
};

/// Types of keys and values in active layers that are tried, the most exact first.
const TYPES: [(Type, Type); 4] =
    [(Type::F16, Type::F16), (Type::Q8_0, Type::Q4_0), (Type::KVARN4, Type::KVARN3), (Type::Q4_0, Type::Q4_0)];

/// All of a cache but how many of its layers are lazy.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kind {
    type_k: Type,
    type_v: Type,
    prune: bool,
    n_window: usize,
    n_rescued: usize,
}

/// A cache that was tried.
#[derive(Debug, Clone, PartialEq)]
struct Tried {
    kind: Kind,
    lazy: usize,
    found: Found,
    /// Of each layer, behind the first excerpt.
    bytes: Vec<usize>,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kind { type_k, type_v, prune, n_window, n_rescued } = self;
        write!(f, "window {n_window}")?;
        if *n_rescued > 0 {
            write!(f, " + {n_rescued}")?;
        }
        write!(f, ", {type_k}/{type_v}{}", if *prune { ", pruned" } else { "" })
    }
}

impl Tried {
    fn compression(&self) -> f64 {
        self.found.compression.unwrap_or(1.0)
    }

    /// What happens to texts, or to answers, whichever is worse: in nats a token.
    fn harm(&self) -> f64 {
        self.found.nll.map_or(self.found.kl, |nll| nll.max(self.found.kl))
    }

    fn reaches(&self, target: Target) -> bool {
        match target {
            Target::Times(times) => self.compression() >= times,
            Target::Kl(most) => self.harm() <= most,
            Target::Share(_) => false,
        }
    }

    /// Both reach the target.
    fn is_better(&self, other: &Tried, target: Target) -> bool {
        match target {
            Target::Kl(_) => self.compression() > other.compression(),
            _ => self.harm() < other.harm(),
        }
    }
}

/// Finds the settings of a model for one target after the other; what was tried for one serves the next.
pub struct SettingFinder<'a> {
    model: &'a Model,
    params: &'a SessionParams,
    profile: &'a Profile,
    excerpts: &'a Excerpts,
    kinds: Vec<Kind>,
    has_map: bool,
    bases: Vec<Base>,
    tried: Vec<Tried>,
    progress: &'a mut dyn FnMut(&str),
}

impl fmt::Debug for SettingFinder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SettingFinder").field("kinds", &self.kinds).field("tried", &self.tried).finish_non_exhaustive()
    }
}

impl<'a> SettingFinder<'a> {
    /// Reads the excerpts uncompressed. Rows will be pruned and rescued where the model has a [`PruneMap`]. `params` says
    /// what is not chosen. `progress` is told what is being tried.
    ///
    /// # Errors
    /// As [`calibrate`](super::calibrate).
    pub fn new(
        model: &'a Model,
        params: &'a SessionParams,
        profile: &'a Profile,
        excerpts: &'a Excerpts,
        progress: &'a mut dyn FnMut(&str),
    ) -> Result<SettingFinder<'a>, Error> {
        check(params, excerpts)?;
        progress("the uncompressed run");
        let mut bases = Vec::new();
        for excerpt in &excerpts.excerpts {
            let session = real_run(model, uncompressed(params), excerpt, &mut |_| {})?;
            bases.push(Base::new(excerpt, session.logits()));
        }
        let has_map = PruneMap::find(model.path(), model.identity()).is_ok();
        let n_window = params.lazy.n_window;
        let plain = |(type_k, type_v), prune| Kind { type_k, type_v, prune, n_window, n_rescued: 0 };
        let kinds = TYPES.into_iter().flat_map(|types| [false, true].map(|prune| plain(types, prune)));
        let (none, tried) = (Vec::new(), Vec::new());
        let mut finder =
            SettingFinder { model, params, profile, excerpts, kinds: none, has_map, bases, tried, progress };
        // With some devices, head sizes and files not all can be had.
        finder.kinds = kinds.filter(|&kind| (has_map || !kind.prune) && finder.can_be_had(kind)).collect();
        Ok(finder)
    }

    /// The least harmful cache that is as small, or the smallest that is no more harmful; to texts, and to answers about
    /// the prompts' notes.
    ///
    /// # Errors
    /// [`Error::Params`] when the target is a share, or when nothing is that small; else as [`Session::prefill`].
    pub fn find(&mut self, target: Target) -> Result<Setting, Error> {
        if let Target::Share(share) = target {
            return Err(Error::Params(format!("a share of {share} is no target: give one like 12x or kl=0.01")));
        }
        let n_layer = self.profile.order.len();
        let Some(mut best) = search(&self.kinds.clone(), n_layer, target, self)? else {
            let smallest = self.tried.iter().map(Tried::compression).fold(1.0, f64::max);
            return Err(Error::Params(format!(
                "no cache of {} tokens is {target} smaller; the smallest that was tried is {smallest:.1}x",
                self.excerpts.n_prompt
            )));
        };
        if best.lazy > 0 {
            for other in others(best.kind, self.has_map) {
                if !self.can_be_had(other) {
                    continue;
                }
                let tried = self.run(other, best.lazy)?;
                if tried.reaches(target) && tried.is_better(&best, target) {
                    best = tried;
                }
            }
        }
        let Tried { kind: Kind { type_k, type_v, prune, n_window, n_rescued }, lazy, found, .. } = best;
        Ok(Setting {
            target,
            lazy,
            n_window,
            n_rescued,
            type_k,
            type_v,
            prune,
            n_prompt: self.excerpts.n_prompt,
            kl_mean: found.kl,
            nll_mean: found.nll,
            compression: best.compression(),
        })
    }

    fn can_be_had(&self, kind: Kind) -> bool {
        Session::new(self.model, self.session_params(kind, self.profile.order.len() / 2)).is_ok()
    }

    fn session_params(&self, kind: Kind, lazy: usize) -> SessionParams {
        let mut params = self.params.clone();
        let layers: BTreeSet<usize> = self.profile.order.iter().copied().take(lazy).collect();
        params.lazy.policy = Policy::Layers(layers);
        params.lazy.prefill = Some(params.lazy.prefill.unwrap_or(self.profile.prefill));
        (params.lazy.n_window, params.lazy.n_rescued) = (kind.n_window, kind.n_rescued);
        (params.type_k, params.type_v) = (kind.type_k, kind.type_v);
        params.prune = if kind.prune { Prune::Auto } else { Prune::Off };
        params
    }
}

/// What is known of caches, by running them.
trait Trials {
    fn run(&mut self, kind: Kind, lazy: usize) -> Result<Tried, Error>;

    /// How many times smaller it will be.
    fn foretold(&mut self, kind: Kind, lazy: usize) -> Result<f64, Error>;
}

impl Trials for SettingFinder<'_> {
    fn run(&mut self, kind: Kind, lazy: usize) -> Result<Tried, Error> {
        if let Some(tried) = self.tried.iter().find(|tried| (tried.kind, tried.lazy) == (kind, lazy)) {
            return Ok(tried.clone());
        }
        (self.progress)(&format!("{lazy} lazy, {kind}"));
        let mut sum = Sum::default();
        let mut bytes = Vec::new();
        // The least of the excerpts: what is promised holds on each.
        let mut compression = f64::INFINITY;
        for (excerpt, base) in self.excerpts.excerpts.iter().zip(&self.bases) {
            let session = real_run(self.model, self.session_params(kind, lazy), excerpt, &mut |_| {})?;
            base.compare(excerpt, session.logits(), &mut sum);
            if session.kv().compression < compression {
                compression = session.kv().compression;
                bytes = session.layers(0).iter().map(|layer| layer.kv_bytes).collect();
            }
        }
        let tried = Tried { kind, lazy, found: sum.found(Some(compression)), bytes };
        self.tried.push(tried.clone());
        Ok(tried)
    }

    fn foretold(&mut self, kind: Kind, lazy: usize) -> Result<f64, Error> {
        let n_layer = self.profile.order.len();
        // With all layers lazy kinds are alike.
        let small = self.run(self.kinds[0], n_layer)?.bytes;
        let none = self.run(kind, 0)?;
        let full: usize = none.bytes.iter().sum();
        let saved = |&layer: &usize| none.bytes[layer].saturating_sub(small[layer]);
        let saved: usize = self.profile.order[..lazy].iter().map(saved).sum();
        Ok(none.compression() * full as f64 / (full - saved).max(1) as f64)
    }
}

/// The same with another window, and with rescued rows for a quarter of the window.
fn others(kind: Kind, rescues: bool) -> Vec<Kind> {
    let window = kind.n_window;
    let mut kinds: Vec<Kind> =
        [window / 2, 2 * window].map(|n_window| Kind { n_window: n_window.max(1), ..kind }).into();
    if rescues && window >= 4 {
        kinds.push(Kind { n_window: window - window / 4, n_rescued: window / 4, ..kind });
    }
    kinds
}

/// The best of what reaches the target, among these kinds, the most exact first, with 0 to `n_layer` lazy layers.
fn search(kinds: &[Kind], n_layer: usize, target: Target, trials: &mut dyn Trials) -> Result<Option<Tried>, Error> {
    let mut best: Option<Tried> = None;
    for &kind in kinds {
        let found = match target {
            Target::Times(times) => fewest_lazy(kind, n_layer, times, best.as_ref(), trials)?,
            _ => most_lazy(kind, n_layer, target, best.as_ref(), trials)?,
        };
        if let Some(found) = found
            && best.as_ref().is_none_or(|best| found.is_better(best, target))
        {
            best = Some(found);
        }
    }
    match best {
        Some(best) if matches!(target, Target::Kl(_)) => {
            let beyond = (best.lazy + bisected_to(n_layer)).min(n_layer + 1);
            bisect(best, beyond, 1, target, None, trials).map(Some)
        }
        best => Ok(best),
    }
}

/// How exactly the number of lazy layers is found in each kind; in the best kind it is found exactly.
fn bisected_to(n_layer: usize) -> usize {
    (n_layer / 10).max(1)
}

/// The fewest lazy layers that make the cache so many times smaller; `None` where all do not, or where without any it is
/// as harmful as the best so far.
fn fewest_lazy(
    kind: Kind,
    n_layer: usize,
    times: f64,
    best: Option<&Tried>,
    trials: &mut dyn Trials,
) -> Result<Option<Tried>, Error> {
    let none = trials.run(kind, 0)?;
    if best.is_some_and(|best| none.harm() >= best.harm()) {
        return Ok(None);
    }
    for lazy in 0..=n_layer {
        if trials.foretold(kind, lazy)? >= times {
            let tried = trials.run(kind, lazy)?;
            // Blocks may round it.
            if tried.compression() >= times {
                return Ok(Some(tried));
            }
        }
    }
    Ok(None)
}

/// The most lazy layers with which harm is as small as it is to be; `None` where it is not without any, or where the best
/// so far is smaller than this could be.
fn most_lazy(
    kind: Kind,
    n_layer: usize,
    target: Target,
    best: Option<&Tried>,
    trials: &mut dyn Trials,
) -> Result<Option<Tried>, Error> {
    let none = trials.run(kind, 0)?;
    if !none.reaches(target) {
        return Ok(None);
    }
    bisect(none, n_layer + 1, bisected_to(n_layer), target, best, trials).map(Some)
}

/// The most lazy layers with which harm is as small as it is to be, to within `step`: as many as `found` has, or more, but
/// fewer than `high`.
fn bisect(
    mut found: Tried,
    mut high: usize,
    step: usize,
    target: Target,
    best: Option<&Tried>,
    trials: &mut dyn Trials,
) -> Result<Tried, Error> {
    let kind = found.kind;
    while high - found.lazy > step {
        // The most that could still come of it.
        if let Some(best) = best
            && trials.foretold(kind, high - 1)? <= best.compression()
        {
            break;
        }
        let tried = trials.run(kind, found.lazy.midpoint(high))?;
        if tried.reaches(target) {
            found = tried;
        } else {
            high = tried.lazy;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn kind(type_k: Type, prune: bool) -> Kind {
        Kind { type_k, type_v: Type::Q4_0, prune, n_window: 1024, n_rescued: 0 }
    }

    /// Caches of 20 layers, whose lazy ones take nothing and cost the more the later they come.
    struct Made;

    impl Trials for Made {
        fn run(&mut self, kind: Kind, lazy: usize) -> Result<Tried, Error> {
            Ok(made(kind, lazy))
        }

        fn foretold(&mut self, kind: Kind, lazy: usize) -> Result<f64, Error> {
            // It may be somewhat less.
            Ok(1.01 * made(kind, lazy).compression())
        }
    }

    fn made(kind: Kind, lazy: usize) -> Tried {
        let (bytes, harm) = match (kind.type_k, kind.prune) {
            (Type::Q8_0, _) => (0.5, 0.001),
            (_, false) => (0.25, 0.02),
            (_, true) => (0.125, 0.06),
        };
        let active = (20 - lazy) as f64 / 20.0;
        let found = Found {
            kl: harm / 2.0,
            nll: Some(harm + 0.001 * (lazy * lazy) as f64),
            compression: Some(1.0 / (active * bytes).max(0.01)),
        };
        Tried { kind, lazy, found, bytes: Vec::new() }
    }

    const EXACT: Kind = kind(Type::Q8_0, false);
    const FOUR_BITS: Kind = kind(Type::Q4_0, false);
    const PRUNED: Kind = kind(Type::Q4_0, true);

    /// What is chosen for a target, and with how many lazy layers.
    fn found(target: &str) -> Option<(Kind, usize)> {
        let tried = search(&[EXACT, FOUR_BITS, PRUNED], 20, target.parse().unwrap(), &mut Made).unwrap();
        tried.map(|tried| (tried.kind, tried.lazy))
    }

    #[test]
    fn the_least_harm_that_is_as_small() {
        // By hand: exact keys with 4 lazy layers cost 0.017, four bits alone 0.02.
        assert_eq!(found("2.5x"), Some((EXACT, 4)));
        // Exact ones need 11 lazy layers (0.122), four bits 2 (0.024), pruned ones none (0.06).
        assert_eq!(found("4.4x"), Some((FOUR_BITS, 2)));
        assert_eq!(found("8x"), Some((PRUNED, 0)));
        assert_eq!(found("1000x"), None);
    }

    #[test]
    fn the_smallest_that_does_no_more_harm() {
        // 3 lazy layers cost 0.010 with exact keys, and nothing else is that harmless.
        assert_eq!(found("kl=0.0101"), Some((EXACT, 3)));
        // 8 lazy layers and 3.3 times, 7 and 6.2 times, or 3 pruned ones and 9.4 times.
        assert_eq!(found("kl=0.07"), Some((PRUNED, 3)));
        assert_eq!(found("kl=0.0001"), None);
    }

    #[test]
    fn other_windows() {
        let windows = |rescues| {
            let kinds = others(kind(Type::F16, false), rescues);
            kinds.into_iter().map(|kind| (kind.n_window, kind.n_rescued)).collect::<Vec<_>>()
        };
        assert_eq!(windows(false), [(512, 0), (2048, 0)]);
        assert_eq!(windows(true), [(512, 0), (2048, 0), (768, 256)]);
    }
}
