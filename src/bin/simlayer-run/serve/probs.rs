//! Probabilities as clients are told them: the model's own, before any sampler.

use simlayer::{Token, Vocab};

use super::task::{Prob, Probs};

/// How probable `chosen` is by these logits, with the `n` most probable tokens.
pub fn probs(logits: &[f32], chosen: Token, n: usize, vocab: &Vocab) -> Probs {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    let log_sum = most + sum.ln() as f32;
    let prob = |token: Token, logit: f32| Prob { token, bytes: vocab.piece(token, true), logprob: logit - log_sum };

    let mut order: Vec<Token> = (0..).take(logits.len()).collect();
    let n = n.min(order.len());
    let descending = |a: &Token, b: &Token| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if (1..order.len()).contains(&n) {
        order.select_nth_unstable_by(n - 1, descending);
    }
    order.truncate(n);
    order.sort_unstable_by(descending);
    let top = order.into_iter().map(|token| prob(token, logits[token as usize])).collect();
    let logit = usize::try_from(chosen).ok().and_then(|token| logits.get(token)).copied();
    Probs { chosen: prob(chosen, logit.unwrap_or(f32::NEG_INFINITY)), top }
}

#[cfg(test)]
mod tests {
    use simlayer_testkit::smollm2_path;

    use super::*;

    #[test]
    fn they_sum_to_one_and_are_in_order() {
        let vocab = Vocab::load(&smollm2_path()).unwrap();
        let logits: Vec<f32> = (0..vocab.n_tokens()).map(|token| ((token * 7919) % 1000) as f32 / 100.0).collect();
        let all = probs(&logits, 5, vocab.n_tokens(), &vocab);
        let sum: f64 = all.top.iter().map(|prob| f64::from(prob.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-3, "{sum}");
        assert!(all.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        let own = all.top.iter().find(|prob| prob.token == 5).unwrap();
        assert_eq!(&all.chosen, own);
        let three = probs(&logits, 5, 3, &vocab);
        assert_eq!(three.top, all.top[..3]);
        assert!(probs(&logits, 5, 0, &vocab).top.is_empty());
    }
}
