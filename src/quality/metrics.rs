//! How good a row of logits is, and how far it is from another.

use crate::vocab::Token;

/// The logarithm of the sum of all exponentials: a logit less this is the token's log-probability.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
    f64::from(max) + sum.ln()
}

/// Negative log-likelihood of `token`, in nats. Infinite for a token that is not in the row.
pub fn nll(logits: &[f32], token: Token) -> f64 {
    let logit = usize::try_from(token).ok().and_then(|index| logits.get(index));
    logit.map_or(f64::INFINITY, |&logit| log_sum_exp(logits) - f64::from(logit))
}

/// Kullback-Leibler divergence KL(base‖other) of the distributions that two rows of logits stand for, in nats.
pub fn kl(base: &[f32], other: &[f32]) -> f64 {
    kl_with(base, log_sum_exp(base), other)
}

/// As [`kl`], where the [`log_sum_exp`] of `base` is known.
pub fn kl_with(base: &[f32], base_sum: f64, other: &[f32]) -> f64 {
    // Both rows are measured against one shift, so that equal rows give exactly 0.
    let shift = base_sum - log_sum_exp(other);
    let terms = base.iter().zip(other).map(|(&p, &q)| {
        let probability = f64::from((f64::from(p) - base_sum) as f32).exp();
        if probability == 0.0 { 0.0 } else { probability * (f64::from(p) - f64::from(q) - shift) }
    });
    terms.sum()
}

/// The most probable token; of several, the first.
pub fn top(logits: &[f32]) -> Token {
    let best =
        logits.iter().enumerate().fold(0, |best, (index, logit)| if *logit > logits[best] { index } else { best });
    Token::try_from(best).unwrap_or(Token::MAX)
}

/// Mean and standard error of the mean.
pub fn mean_and_stderr(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, 0.0);
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0) / n).sqrt())
}

/// The smallest of the values that a share of `share` of them does not exceed; not a number where there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values() {
        let values: Vec<f64> = (0..2000).map(|i| f64::from((i * 7 + 3) % 2000)).collect();
        assert_eq!(quantile(&values, 0.999), 1997.0);
        assert_eq!((quantile(&values, 0.0), quantile(&values, 0.5), quantile(&values, 1.0)), (0.0, 999.0, 1999.0));
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.999), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn by_hand() {
        // p = (1/4, 3/4), q = (1/2, 1/2), each shifted by a constant.
        let p = [1f32.ln() + 5.0, 3f32.ln() + 5.0];
        let q = [-2.0, -2.0];
        let expected = 0.25 * (0.25f64 / 0.5).ln() + 0.75 * (0.75f64 / 0.5).ln();
        assert!((kl(&p, &q) - expected).abs() < 1e-6);
        assert!((nll(&p, 1) - (4.0f64 / 3.0).ln()).abs() < 1e-6);
        assert_eq!(nll(&p, 2), f64::INFINITY);
        assert_eq!((top(&p), top(&q)), (1, 0));
        assert_eq!(mean_and_stderr(&[1.0, 2.0, 3.0]), (2.0, (1.0f64 / 3.0).sqrt()));
    }

    #[test]
    fn equal_rows_do_not_diverge() {
        let row: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
        assert_eq!(kl(&row, &row), 0.0);
        let with_impossible = [1.0, f32::NEG_INFINITY, 0.5];
        assert_eq!(kl(&with_impossible, &with_impossible), 0.0);
    }
}
