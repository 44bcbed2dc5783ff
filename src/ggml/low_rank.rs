//! What adapters add to products of weights.

use std::collections::HashMap;

use super::Tensor;

/// A product of low rank that is added to a weight's: `scale × b·(a·x)` (LoRA, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[input width, rank]`, of experts `[input width, rank, experts]`; of a table of embeddings `[rank, rows]`.
    pub a: Tensor,
    /// `[rank, output width]`, of experts `[rank, output width, experts]`.
    pub b: Tensor,
    pub scale: f32,
}

/// For weights what is added to their products, in order.
#[derive(Debug, Default)]
pub struct Adapted {
    /// By the address of the weight's header, with the weight, so that no other comes to lie there.
    of: HashMap<usize, (Tensor, Vec<LowRank>)>,
}

impl Adapted {
    /// Adds to the products of a weight from now on. Shapes are the caller's to have checked.
    pub fn add(&mut self, weight: &Tensor, low_rank: LowRank) {
        let (_, all) = self.of.entry(weight.raw().addr()).or_insert_with(|| (weight.clone(), Vec::new()));
        all.push(low_rank);
    }

    /// What is added to the products of this weight.
    pub(super) fn of(&self, weight: &Tensor) -> &[LowRank] {
        self.of.get(&weight.raw().addr()).map_or(&[], |(_, all)| all)
    }
}
