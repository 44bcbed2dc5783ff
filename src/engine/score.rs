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

/// A score of a layer's keys and values in one part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scored {
    pub part: usize,
    pub layer: usize,
    pub value: f32,
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

/// One score of each layer's keys and values: of several layers that read them masses are averaged, and changes add up.
pub(super) fn joined(scores: &[Score]) -> Vec<Scored> {
    let mut all: Vec<(Scored, usize)> = Vec::new();
    for score in scores {
        let (part, layer, value) = (score.part, score.layer, score.value());
        match all.iter_mut().find(|(known, _)| (known.part, known.layer) == (part, layer)) {
            None => all.push((Scored { part, layer, value }, 1)),
            Some((known, n)) => {
                *n += 1;
                known.value += match score.taken {
                    Taken::Masses(_) => (value - known.value) / *n as f32,
                    Taken::Outputs { .. } => value - 1.0,
                };
            }
        }
    }
    all.into_iter().map(|(scored, _)| scored).collect()
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
    use super::{Score, Scored, Taken, joined, likeness};
    use crate::ggml::{Context, Device, Tensor, Type};

    fn row(values: &[f32]) -> Tensor {
        let context = Context::new(1);
        let tensor = context.tensor(Type::F32, &[values.len()]);
        context.alloc(Device::cpu().buffer_type(), "a row").unwrap();
        tensor.write(0, values);
        tensor
    }

    #[test]
    fn masses_are_averaged_over_readers_and_changes_add_up() {
        let mass = |part, layer, mass| Score { part, layer, taken: Taken::Masses(vec![row(&[mass])]) };
        let scores = [mass(0, 3, 0.25), mass(0, 4, 0.5), mass(1, 3, 1.0), mass(0, 3, 0.5), mass(0, 3, 0.75)];
        let scored = |part, layer, value| Scored { part, layer, value };
        assert_eq!(joined(&scores), [scored(0, 3, 0.5), scored(0, 4, 0.5), scored(1, 3, 1.0)]);

        let change = |restricted: f32| {
            let taken = Taken::Outputs { full: row(&[4.0]), restricted: row(&[restricted]), n: 1 };
            Score { part: 0, layer: 3, taken }
        };
        assert_eq!(joined(&[change(3.0), change(2.0), change(4.0)]), [scored(0, 3, 0.25)]);
    }

    #[test]
    fn likeness_is_relative_and_a_mean_over_rows() {
        assert_eq!(likeness(&[3.0, 4.0, 0.0, 2.0], &[3.0, 4.0, 0.0, 2.0], 2), 1.0);
        // The first row changes by 5 of 5, the second by nothing.
        assert_eq!(likeness(&[3.0, 4.0, 0.0, 2.0], &[0.0, 0.0, 0.0, 2.0], 2), 0.5);
        assert_eq!(likeness(&[0.0, 0.0], &[0.0, 0.0], 1), 1.0);
    }
}
