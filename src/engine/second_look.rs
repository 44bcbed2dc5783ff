//! The score of the policy `output`: a layer's last queries go through it once more, and see only what a lazy layer
//! would keep. The less their hidden states behind the layer change by that, the lazier the layer is. Attention mass
//! misses layers that fetch little from far back, of which much depends.

use super::{
    attention::{Look, Score, Taken},
    inputs::{Inputs, Part},
    sequence::LayerCache,
    session::Session,
};
use crate::{
    ggml::{Graph, Tensor},
    lazy::Measure,
    model::LayerStep,
};

/// Name of the nodes that compute scores.
pub(super) const SCORE_NAME: &std::ffi::CStr = c"score";

/// The scored queries of one part, and inputs for them alone.
pub(super) struct SecondLook {
    part: usize,
    queries: [Part; 1],
    inputs: Inputs,
}

impl SecondLook {
    pub fn fill(&mut self) {
        self.inputs.fill(&self.queries, &[], &[]);
    }
}

impl Session {
    /// What the policy needs of these parts' last queries: nothing, unless it goes by outputs.
    pub(super) fn second_looks(&self, parts: &[Part]) -> Vec<SecondLook> {
        if self.params.lazy.policy.measure() != Measure::Output {
            return Vec::new();
        }
        let scored = parts.iter().enumerate().filter(|(_, part)| part.n_score > 0);
        scored
            .map(|(index, part)| SecondLook { part: index, queries: [part.scored()], inputs: Inputs::default() })
            .collect()
    }

    /// The queries' second pass through a layer whose graph is built: `hidden` `[n_embd, tokens]` is what all tokens
    /// of the ubatch entered it with, `result` what they left it with; `None` where not all of them did. No score of a
    /// layer that is no candidate.
    pub(super) fn look_again(
        &self,
        graph: &Graph,
        look: &mut SecondLook,
        caches: &[&[LayerCache]],
        index: usize,
        hidden: &Tensor,
        result: Option<&Tensor>,
    ) -> Option<Score> {
        let SecondLook { part, queries, inputs } = look;
        let caches = caches[*part];
        if caches[index].span().is_some() {
            return None;
        }
        let Part { first, n, .. } = queries[0];
        if let Some(result) = result {
            graph.expand(result);
        }
        let first_node = graph.n_nodes();
        let entering = graph.rows(hidden, first, n);
        let positions = inputs.positions(graph, n);
        let step = LayerStep { index, hidden: &entering, positions: &positions, keep: None, n_ctx: self.params.n_ctx };
        let mut pass = |look| {
            let mut attention = self.attention(inputs, &*queries, vec![caches]);
            attention.look = look;
            self.model.architecture().layer(graph, &step, &mut attention)
        };
        let restricted = pass(Look::Again(Some(self.spans[index])));
        let full = match result {
            Some(result) => graph.rows(result, first, n),
            None => pass(Look::Again(None)),
        };
        let [full, restricted] = [full, restricted].map(|rows| graph.contiguous(&rows).as_output());
        graph.expand(&full);
        graph.expand(&restricted);
        graph.name_nodes_from(first_node, SCORE_NAME);
        Some(Score { part: *part, layer: index, taken: Taken::Outputs { full, restricted, n } })
    }
}

/// 1 − the mean over `n` rows of how far `restricted` is from `full`, relative to `full`.
pub(super) fn likeness(full: &[f32], restricted: &[f32], n: usize) -> f32 {
    let size = full.len() / n;
    let change = |(full, restricted): (&[f32], &[f32])| {
        let squares = |sum: f64, x: f32| sum + f64::from(x).powi(2);
        let difference = full.iter().zip(restricted).map(|(a, b)| a - b).fold(0.0, squares).sqrt();
        let norm = full.iter().copied().fold(0.0, squares).sqrt();
        if difference == 0.0 { 0.0 } else { difference / norm }
    };
    let changes: f64 = full.chunks_exact(size).zip(restricted.chunks_exact(size)).map(change).sum();
    (1.0 - changes / n as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::likeness;

    #[test]
    fn likeness_is_relative_and_a_mean_over_rows() {
        assert_eq!(likeness(&[3.0, 4.0, 0.0, 2.0], &[3.0, 4.0, 0.0, 2.0], 2), 1.0);
        // The first row changes by 5 of 5, the second by nothing.
        assert_eq!(likeness(&[3.0, 4.0, 0.0, 2.0], &[0.0, 0.0, 0.0, 2.0], 2), 0.5);
        assert_eq!(likeness(&[0.0, 0.0], &[0.0, 0.0], 1), 1.0);
    }
}
