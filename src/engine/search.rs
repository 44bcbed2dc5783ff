//! A search for the most layers that can change, by few measurements of how far the logits move.

/// Sets that are tried, besides the run that they are compared with.
const MOST_SETS: usize = 4;

/// By how much the logarithm of the divergence is taken to grow from no layer to all: where to look next. On
/// SmolLM2-135M and Qwen2.5-Coder-0.5B it grows by 3.6 and 5.3.
const GROWTH: f64 = 4.5;

/// After a set that cannot go, at least this part of it is left out, of the layers that are not known to be able to.
const STEP_DOWN: usize = 4;

/// A search for the most layers that can go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Search {
    /// So many can go, with this divergence; and so many cannot.
    can: (usize, f64),
    cannot: usize,
    /// How many to try next.
    next: usize,
    /// By how much the logarithm of the divergence is taken to grow with a layer.
    growth: f64,
    /// The divergence that is allowed.
    most: f64,
    /// Sets that were tried.
    n_tried: usize,
}

impl Search {
    /// Of `n` layers, the first ones of an order; `n_first` are tried first. `n_all` layers there are, those that may not change
    /// included; the divergence may be `most`.
    pub fn new(n: usize, n_first: usize, n_all: usize, most: f64) -> Search {
        let growth = GROWTH / n_all as f64;
        Search { can: (0, 0.0), cannot: n + 1, next: n_first, growth, most, n_tried: 0 }
    }

    /// How many can go, as far as that is known, and the divergence that was measured with them.
    pub fn found(&self) -> (usize, f64) {
        self.can
    }

    /// How many to try next; `None` when it is known how many can go, or enough was tried.
    pub fn next(&self) -> Option<usize> {
        let (least, most) = (self.can.0 + 1, self.cannot - 1);
        (least <= most && self.n_tried < MOST_SETS).then(|| self.next.clamp(least, most))
    }

    /// Notes how much `n` layers diverge.
    pub fn note(&mut self, n: usize, kl: f64) {
        self.n_tried += 1;
        let known_before = self.can.0;
        let more = (self.most / kl).ln() / self.growth;
        // A divergence that is no number (a broken model) is none that is small.
        if kl <= self.most {
            self.can = (n, kl);
            // Another look would bring no further layer.
            if more < 1.0 {
                self.cannot = n + 1;
            }
        } else {
            self.cannot = n
        }
        self.next = if kl > 0.0 && kl.is_finite() {
            let next = (n as f64 + more).floor().max(0.0) as usize;
            // Divergences are noisy: a step down is to leave what failed behind.
            if kl > self.most { next.min(n - (n - known_before).div_ceil(STEP_DOWN)) } else { next }
        } else {
            (self.can.0 + self.cannot).div_ceil(2)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `n` can go where so many diverge by as much, and which were tried.
    fn search(n: usize, kl: impl Fn(usize) -> f64, most: f64) -> (usize, Vec<usize>) {
        let (mut search, mut all) = (Search::new(n, n.div_ceil(2), n, most), Vec::new());
        while let Some(next) = search.next() {
            search.note(next, kl(next));
            all.push(next);
        }
        (search.found().0, all)
    }

    #[test]
    fn a_search_goes_where_the_bound_is() {
        assert_eq!(search(30, |_| 1e-9, 0.01).0, 30);
        assert_eq!(search(30, |_| 0.0, 0.01), (29, vec![15, 23, 27, 29]));
        assert_eq!(search(30, |_| f64::NAN, 0.01).0, 0);
        assert_eq!(search(1, |_| 1.0, 0.01), (0, vec![1]));
        for sharp in 1..24 {
            let (can, tried) = search(24, |n| if n <= sharp { 1e-3 } else { 1e-1 }, 0.01);
            assert!(can <= sharp && tried.len() <= MOST_SETS, "{sharp}: {can} of {tried:?}");
            assert!(can > 0 || sharp < 4, "{sharp}: {can} of {tried:?}");
        }
        // As the divergence grows on real models: near the bound after four looks.
        for slope in [3.6, 5.3] {
            for at in 6..20 {
                let kl = |n: usize| 0.01 * (slope * (n as f64 - f64::from(at)) / 24.0).exp();
                let (can, tried) = search(24, kl, 0.01);
                assert!(can <= at as usize && can + 2 >= at as usize, "{slope}, {at}: {can} of {tried:?}");
            }
        }
    }
}
