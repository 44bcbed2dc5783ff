//! A layer's score: the higher, the lazier.

use std::ffi::CStr;

use crate::ggml::Tensor;

/// Name of the nodes that compute scores.
pub(super) const SCORE_NAME: &CStr = c"score";

/// A layer's score, as a graph computes it.
pub(super) struct Score {
    pub part: usize,
    pub layer: usize,
    pub taken: Taken,
}

pub(super) enum Taken {
    /// Attention masses `[1, n_score, heads]`, of a few heads each.
    Masses(Vec<Tensor>),
    /// Hidden states `[n_embd, n]` after the layer, as they are, and as they were if it was lazy.
    Outputs { full: Tensor, restricted: Tensor, n: usize },
}

impl Score {
    /// 1 or less; the higher, the lazier.
    pub fn value(&self) -> f32 {
        match &self.taken {
            Taken::Masses(masses) => {
                let masses: Vec<f32> = masses.iter().flat_map(Tensor::to_f32).collect();
                (masses.iter().map(|&mass| f64::from(mass)).sum::<f64>() / masses.len().max(1) as f64) as f32
            }
            Taken::Outputs { full, restricted, n } => likeness(&full.to_f32(), &restricted.to_f32(), *n),
        }
    }
}

/// 1 − the mean over `n` rows of how far `restricted` is from `full`, relative to `full`.
fn likeness(full: &[f32], restricted: &[f32], n: usize) -> f32 {
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
