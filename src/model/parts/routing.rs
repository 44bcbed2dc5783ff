//! Which experts a token goes through, and with which weights.

use super::{Builder, Error};
use crate::ggml::{Graph, Tensor};

/// How an expert's weight comes from the router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Routing {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over all experts, the used ones' weights then divided by their sum.
    SoftmaxNormalised,
    /// Softmax over the logits of the used experts.
    SoftmaxOfUsed,
    /// The sigmoid of each expert's logit.
    Sigmoid,
    /// The sigmoid of each expert's logit, the used ones' weights then divided by their sum.
    SigmoidNormalised,
    /// The sigmoid of the used experts' logits, which are chosen by the logits themselves.
    SigmoidOfUsed,
}

impl Routing {
    /// As `expert_gating_func` and `expert_weights_norm` say. Without the first key it is `default`; `None` where the file
    /// must have it.
    pub fn of_keys(b: &Builder<'_>, default: Option<Routing>) -> Result<Routing, Error> {
        let key = "expert_gating_func";
        let routing = match (b.keys.optional_u32(key)?.unwrap_or(0), default) {
            (0, Some(default)) => default,
            (1, _) => Routing::Softmax,
            (2, _) => Routing::Sigmoid,
            (3, _) => Routing::SoftmaxOfUsed,
            (0, None) => return Err(b.keys.error(key, "is missing or 0; the architecture has no default".into())),
            (other, _) => {
                let why = format!("{other} is not supported (supported: 1 softmax, 2 sigmoid, 3 softmax of the used)");
                return Err(b.keys.error(key, why));
            }
        };
        let is_normalised = b.keys.optional_bool("expert_weights_norm")?.unwrap_or(false);
        Ok(if is_normalised { routing.normalised() } else { routing })
    }

    /// The used experts' weights divided by their sum.
    pub fn normalised(self) -> Routing {
        match self {
            Routing::Softmax => Routing::SoftmaxNormalised,
            Routing::Sigmoid => Routing::SigmoidNormalised,
            other => other,
        }
    }

    /// By what experts are chosen, and what their weights come from: `[n_expert, n]`.
    pub(super) fn scores(self, graph: &Graph, logits: Tensor) -> Tensor {
        match self {
            Routing::Softmax | Routing::SoftmaxNormalised => graph.soft_max_rows(&logits),
            Routing::Sigmoid | Routing::SigmoidNormalised => graph.sigmoid(&logits),
            Routing::SoftmaxOfUsed | Routing::SigmoidOfUsed => logits,
        }
    }

    /// The weights of the used experts from their scores, `[n_used, n]` both.
    pub(super) fn weights(self, graph: &Graph, used: Tensor) -> Tensor {
        match self {
            Routing::Softmax | Routing::Sigmoid => used,
            Routing::SoftmaxOfUsed => graph.soft_max_rows(&used),
            Routing::SigmoidOfUsed => graph.sigmoid(&used),
            Routing::SoftmaxNormalised | Routing::SigmoidNormalised => {
                // The smallest f16 that is not subnormal keeps the quotient finite.
                let sum = graph.at_least(&graph.sum_rows(&used), 6.103_515_6e-5);
                graph.div(&used, &sum)
            }
        }
    }
}

/// Experts in groups: only those of some groups are used, of the groups whose two best experts are the best.
#[derive(Debug, Clone, Copy)]
pub(super) struct Groups {
    n_group: usize,
    n_used: usize,
}

/// Experts that count for their group.
const BEST_OF_GROUP: usize = 2;

impl Groups {
    /// `expert_group_count` and `expert_group_used_count`, where there is more than one group.
    pub fn of_keys(b: &Builder<'_>, n_expert: usize) -> Result<Option<Groups>, Error> {
        let key = "expert_group_count";
        let Some(n_group) = b.keys.optional_u32(key)?.map(|n| n as usize).filter(|&n| n > 1) else { return Ok(None) };
        if !n_expert.is_multiple_of(n_group) || n_expert / n_group < BEST_OF_GROUP {
            return Err(b.keys.error(key, format!("{n_group} groups of {n_expert} experts")));
        }
        let n_used = b.keys.count("expert_group_used_count")?;
        if n_used >= n_group {
            return Err(b
                .keys
                .error("expert_group_used_count", format!("{n_used} of {n_group} groups; it must be less")));
        }
        Ok(Some(Groups { n_group, n_used }))
    }

    /// `scores` `[n_expert, n]` → the same, minus infinity in the groups that are not used.
    pub fn masked(self, graph: &Graph, scores: &Tensor) -> Tensor {
        let [n_expert, n, ..] = scores.shape();
        let n_in_group = n_expert / self.n_group;
        let groups = graph.reshape(scores, &[n_in_group, self.n_group, n]);
        let best = graph.top_n(&groups, BEST_OF_GROUP);
        let best = graph.get_rows(&graph.reshape(&groups, &[1, n_in_group, self.n_group, n]), &best);
        let sums = graph.sum_rows(&graph.reshape(&best, &[BEST_OF_GROUP, self.n_group, n]));
        let used = graph.top_n(&graph.reshape(&sums, &[self.n_group, n]), self.n_used);
        let kept = graph.get_rows(&groups, &used);
        let masked = graph.set_rows(&graph.filled_like(&groups, f32::NEG_INFINITY), &kept, &used);
        graph.reshape(&masked, &[n_expert, n])
    }
}
