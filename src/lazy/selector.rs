//! From scores to decisions, layer by layer, for one prompt.

use std::collections::BTreeSet;

use super::Policy;

/// Decides layer by layer while scores come in. One selector serves one prompt of one sequence.
#[derive(Debug, Clone)]
pub struct Selector {
    rule: Rule,
}

#[derive(Debug, Clone)]
enum Rule {
    Nothing,
    Above(f32),
    /// Scored layers that are still active, and how many may stay so.
    Queue {
        active: Vec<(f32, usize)>,
        n_active: usize,
    },
    Set(BTreeSet<usize>),
}

impl Selector {
    /// `threshold` is the model's own τ, for policies that name none. `n_layers` counts the layers that can become lazy
    /// at all, those that already are included.
    pub fn new(policy: &Policy, threshold: f32, n_layers: usize) -> Selector {
        let rule = match policy {
            // What goes by looks is decided elsewhere, when the prompt has been read.
            Policy::Off | Policy::Kl(_) | Policy::Auto => Rule::Nothing,
            Policy::Threshold(given) => Rule::Above(given.unwrap_or(threshold)),
            Policy::Budget(share) | Policy::Output(share) => {
                Rule::Queue { active: Vec::new(), n_active: n_active(*share, n_layers) }
            }
            Policy::Layers(layers) => Rule::Set(layers.clone()),
            // A session has replaced it by the layers that the profile names.
            Policy::Profile(_) => Rule::Nothing,
        };
        Selector { rule }
    }

    /// Whether decisions need scores at all.
    pub fn needs_scores(&self) -> bool {
        matches!(self.rule, Rule::Above(_) | Rule::Queue { .. })
    }

    /// Whether this layer is lazy before anything is scored.
    pub fn is_known_lazy(&self, layer: usize) -> bool {
        matches!(&self.rule, Rule::Set(layers) if layers.contains(&layer))
    }

    /// Takes an active layer's score, or that it has none: then a layer of a fixed set becomes lazy. The answer is that of
    /// [`Selector::scored`].
    pub fn decide(&mut self, layer: usize, score: Option<f32>) -> Option<usize> {
        match score {
            Some(score) => self.scored(layer, score),
            None => self.is_known_lazy(layer).then_some(layer),
        }
    }

    /// Takes the score of an active layer; the answer is the layer that becomes lazy now, if any does. It may be an
    /// earlier one: a budget's queue gives up the layer with the highest score when it overflows. Equal scores give up
    /// the lower layer first.
    pub fn scored(&mut self, layer: usize, score: f32) -> Option<usize> {
        match &mut self.rule {
            Rule::Nothing => None,
            Rule::Above(threshold) => (score > *threshold).then_some(layer),
            Rule::Set(layers) => layers.contains(&layer).then_some(layer),
            Rule::Queue { active, n_active } => {
                active.push((score, layer));
                if active.len() <= *n_active {
                    return None;
                }
                // A score that is no number (a broken model) counts as the least lazy.
                let key = |&(score, layer): &(f32, usize)| (if score.is_nan() { f32::MIN } else { score }, layer);
                let laziest = (0..active.len()).max_by(|&a, &b| {
                    let ((a, i), (b, j)) = (key(&active[a]), key(&active[b]));
                    a.total_cmp(&b).then(j.cmp(&i))
                })?;
                Some(active.swap_remove(laziest).1)
            }
        }
    }
}

/// `⌈(1 − ρ)·L⌉`, exact for shares that f32 cannot represent (30 layers at 0.9 leave 3, not 4).
pub(crate) fn n_active(share: f32, n_layers: usize) -> usize {
    let active = (1.0 - f64::from(share)) * n_layers as f64;
    (active - 1e-4).ceil().max(0.0) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn select(policy: &Policy, scores: &[f32]) -> BTreeSet<usize> {
        let mut selector = Selector::new(policy, 0.9, scores.len());
        scores.iter().enumerate().filter_map(|(layer, &score)| selector.scored(layer, score)).collect()
    }

    #[test]
    fn budget_counts() {
        assert_eq!(n_active(0.5, 30), 15);
        assert_eq!(n_active(0.5, 31), 16);
        assert_eq!(n_active(0.9, 30), 3);
        assert_eq!(n_active(0.8, 30), 6);
        assert_eq!(n_active(0.0, 30), 30);
        assert_eq!(n_active(1.0, 30), 0);
    }

    #[test]
    fn threshold_is_exclusive() {
        assert_eq!(select(&Policy::Threshold(Some(0.5)), &[0.5, 0.51, 0.2, f32::NAN]), [1].into());
        assert_eq!(select(&Policy::Threshold(None), &[0.95, 0.85]), [0].into());
    }

    #[test]
    fn a_budget_gives_up_the_laziest_at_once() {
        let mut selector = Selector::new(&Policy::Budget(0.5), 0.9, 4);
        assert_eq!(selector.scored(0, 0.3), None);
        assert_eq!(selector.scored(1, 0.8), None);
        assert_eq!(selector.scored(2, 0.5), Some(1));
        assert_eq!(selector.scored(3, 0.9), Some(3));
    }

    proptest! {
        #[test]
        fn a_budget_keeps_the_layers_with_the_lowest_scores(
            scores in prop::collection::vec(0.0f32..1.0, 1..80),
            share in 0.0f32..=1.0,
        ) {
            let lazy = select(&Policy::Budget(share), &scores);
            prop_assert_eq!(scores.len() - lazy.len(), n_active(share, scores.len()).min(scores.len()));
            let active = (0..scores.len()).filter(|layer| !lazy.contains(layer));
            let highest_active = active.map(|layer| scores[layer]).fold(f32::MIN, f32::max);
            for &layer in &lazy {
                prop_assert!(scores[layer] >= highest_active);
            }
        }

        #[test]
        fn a_fixed_set_is_followed(scores in prop::collection::vec(0.0f32..1.0, 1..40), set: BTreeSet<u8>) {
            let set: BTreeSet<usize> = set.into_iter().map(usize::from).collect();
            let expected: BTreeSet<usize> = set.iter().copied().filter(|&layer| layer < scores.len()).collect();
            prop_assert_eq!(select(&Policy::Layers(set), &scores), expected);
        }

        #[test]
        fn off_selects_nothing(scores in prop::collection::vec(0.0f32..1.0, 1..40)) {
            for policy in [Policy::Off, Policy::Kl(0.01), Policy::Auto] {
                prop_assert!(select(&policy, &scores).is_empty());
            }
        }
    }
}
