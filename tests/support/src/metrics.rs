//! How far two rows of logits are apart.

use std::{fs, path::Path};

/// Kullback-Leibler divergence KL(p‖q) of the distributions that two rows of logits stand for, in nats.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    assert_eq!(p.len(), q.len(), "rows of different vocabularies");
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(&p, &q)| if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }).sum()
}

/// The mean of [`kl`] over pairs of rows.
pub fn mean_kl(p: &[Vec<f32>], q: &[Vec<f32>]) -> f64 {
    assert_eq!(p.len(), q.len(), "different numbers of rows");
    assert!(!p.is_empty(), "no rows");
    p.iter().zip(q).map(|(p, q)| kl(p, q)).sum::<f64>() / p.len() as f64
}

/// Logarithms of the probabilities that logits stand for.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    assert!(logits.iter().all(|logit| !logit.is_nan()), "a logit is not a number");
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!(max.is_finite(), "no finite logit");
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - f64::from(max) - sum.ln()).collect()
}

/// The token with the largest logit; of several, the first.
pub fn top(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold(0, |best, (id, logit)| if *logit > logits[best] { id } else { best })
}

/// Whether two rows have the same top token.
pub fn same_top(p: &[f32], q: &[f32]) -> bool {
    top(p) == top(q)
}

/// Entropy of the distribution that logits stand for, in nats: how far from one-sided or all-equal it is.
pub fn entropy(logits: &[f32]) -> f64 {
    log_softmax(logits).iter().map(|&log| if log == f64::NEG_INFINITY { 0.0 } else { -log.exp() * log }).sum()
}

/// Reads rows of little-endian f32.
pub fn read_rows(path: &Path, n_columns: usize) -> Vec<Vec<f32>> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    assert_eq!(bytes.len() % (4 * n_columns), 0, "{} does not hold rows of {n_columns}", path.display());
    let values = bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes")));
    values.collect::<Vec<_>>().chunks(n_columns).map(<[f32]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        // p = (1/4, 3/4), q = (1/2, 1/2), each shifted by a constant.
        let p = [1f32.ln() + 5.0, 3f32.ln() + 5.0];
        let q = [-2.0, -2.0];
        let expected = 0.25 * (0.25f64 / 0.5).ln() + 0.75 * (0.75f64 / 0.5).ln();
        assert!((kl(&p, &q) - expected).abs() < 1e-7);
        assert!(kl(&p, &p).abs() < 1e-12);
        assert!((entropy(&q) - 2f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn top_takes_the_first_of_equals() {
        assert_eq!(top(&[1.0, 3.0, 3.0]), 1);
        assert!(!same_top(&[1.0, 2.0], &[2.0, 1.0]));
    }
}
