//! Windows of their own for lazy layers, at equal memory: some layers give rows of their cache up, others get them.

/// One way to share the rows out: so many layers keep `smaller` recent tokens, so many `larger` ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    pub n_donors: usize,
    pub smaller: usize,
    pub n_receivers: usize,
    pub larger: usize,
}

/// Ways to try for `n` layers whose window is `window`, with others of `sizes`. None takes more rows than now.
pub fn exchanges(n: usize, window: usize, sizes: &[usize]) -> Vec<Exchange> {
    let mut all = Vec::new();
    for &smaller in sizes.iter().filter(|&&size| size < window) {
        for &larger in sizes.iter().filter(|&&size| size > window) {
            // Ever larger steps: the more layers have changed, the less one more tells.
            let (mut n_receivers, mut step) = (1, 1);
            loop {
                let n_donors = (n_receivers * (larger - window)).div_ceil(window - smaller);
                if n_donors + n_receivers > n {
                    break;
                }
                all.push(Exchange { n_donors, smaller, n_receivers, larger });
                (n_receivers, step) = (n_receivers + step, step + 1);
            }
        }
    }
    all
}

impl Exchange {
    /// The windows of layers, given what each one's loss becomes when it alone has less, and when it alone has more.
    /// Those that gain most receive; of the others those that lose least give.
    pub fn windows(&self, window: usize, with_less: &[f64], with_more: &[f64]) -> Vec<usize> {
        let ranked = |losses: &[f64]| {
            let mut layers: Vec<usize> = (0..losses.len()).collect();
            layers.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]));
            layers
        };
        let mut windows = vec![window; with_less.len()];
        for &layer in ranked(with_more).iter().take(self.n_receivers) {
            windows[layer] = self.larger;
        }
        let others = ranked(with_less).into_iter().filter(|&layer| windows[layer] == window);
        for layer in others.take(self.n_donors).collect::<Vec<_>>() {
            windows[layer] = self.smaller;
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn takes_no_more_memory(
            n in 1usize..40,
            window in 1usize..2_000,
            sizes in proptest::collection::vec(1usize..4_000, 0..5),
            losses in proptest::collection::vec((0.0..1.0, 0.0..1.0), 40),
        ) {
            let (less, more): (Vec<f64>, Vec<f64>) = losses[..n].iter().copied().unzip();
            for exchange in exchanges(n, window, &sizes) {
                let windows = exchange.windows(window, &less, &more);
                prop_assert_eq!(windows.len(), n);
                prop_assert!(windows.iter().sum::<usize>() <= n * window);
                prop_assert_eq!(windows.iter().filter(|&&size| size > window).count(), exchange.n_receivers);
                prop_assert_eq!(windows.iter().filter(|&&size| size < window).count(), exchange.n_donors);
            }
        }
    }

    #[test]
    fn rows_go_to_those_that_gain_most() {
        let found = exchanges(6, 1024, &[512, 1024, 2048]);
        let one = Exchange { n_donors: 2, smaller: 512, n_receivers: 1, larger: 2048 };
        assert_eq!(found, [one, Exchange { n_donors: 4, n_receivers: 2, ..one }]);
        let less = [0.1, 0.2, 0.1, 0.5, 0.1, 0.9];
        let more = [0.0, 0.2, 0.1, 0.1, 0.1, 0.1];
        assert_eq!(one.windows(1024, &less, &more), [2048, 1024, 512, 1024, 512, 1024]);
        assert!(exchanges(2, 1024, &[512, 2048]).is_empty());
        assert!(exchanges(9, 1024, &[1024]).is_empty());
    }
}
