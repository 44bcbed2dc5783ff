//! Ridge regression with several targets, by Cholesky's decomposition, in f64.

use std::thread;

/// The penalty, as a share of the inputs' mean square.
const PENALTY: f64 = 0.01;

/// Inputs that are added together: each element of the sums is then loaded once for all of them.
const TOGETHER: usize = 8;

/// Sums over inputs and targets.
pub(super) struct Ridge {
    n_inputs: usize,
    n_targets: usize,
    n: usize,
    /// Of products of two elements of an input: row after row, the upper triangle.
    squares: Vec<f64>,
    /// Of products of an element and a target, `[target][element]`.
    products: Vec<f64>,
    inputs: Vec<f64>,
    targets: Vec<f64>,
}

impl Ridge {
    pub fn new(n_inputs: usize, n_targets: usize) -> Ridge {
        Ridge {
            n_inputs,
            n_targets,
            n: 0,
            squares: vec![0.0; n_inputs * n_inputs],
            products: vec![0.0; n_targets * n_inputs],
            inputs: vec![0.0; n_inputs],
            targets: vec![0.0; n_targets],
        }
    }

    /// Adds inputs, one after the other, and their targets.
    pub fn add(&mut self, inputs: &[f32], targets: &[f32], n_threads: usize) {
        let (n_inputs, n_targets) = (self.n_inputs, self.n_targets);
        for (input, targets) in inputs.chunks_exact(n_inputs).zip(targets.chunks_exact(n_targets)) {
            self.n += 1;
            add_scaled(&mut self.inputs, 1.0, input);
            for (t, &target) in targets.iter().enumerate() {
                self.targets[t] += f64::from(target);
                add_scaled(&mut self.products[t * n_inputs..][..n_inputs], f64::from(target), input);
            }
        }
        // Rows of the triangle in turn, so that threads have about as much to do.
        let n_threads = n_threads.max(1);
        let mut shares: Vec<Vec<(usize, &mut [f64])>> = (0..n_threads).map(|_| Vec::new()).collect();
        for (i, row) in self.squares.chunks_exact_mut(n_inputs).enumerate() {
            shares[i % n_threads].push((i, row));
        }
        thread::scope(|scope| {
            for share in shares {
                scope.spawn(|| add_squares(share, inputs, n_inputs));
            }
        });
    }

    /// The weights `[target][element]` and what is added to each target; `None` where the inputs do not determine them.
    pub fn solve(mut self) -> Option<(Vec<f32>, Vec<f32>)> {
        let (n, m) = (self.n as f64, self.n_inputs);
        let mean = |sums: &[f64]| sums.iter().map(|sum| sum / n).collect::<Vec<f64>>();
        let (inputs, targets) = (mean(&self.inputs), mean(&self.targets));
        let mean_square = (0..m).map(|i| self.squares[i * m + i]).sum::<f64>() / n / m as f64;
        for i in 0..m {
            for j in i..m {
                let covariance = self.squares[i * m + j] / n - inputs[i] * inputs[j];
                // The lower triangle, which the decomposition goes through.
                self.squares[j * m + i] = covariance;
            }
            self.squares[i * m + i] += PENALTY * mean_square;
        }
        decompose(&mut self.squares, m)?;
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (products, target) in self.products.chunks_exact(m).zip(targets) {
            let mut solved: Vec<f64> = products.iter().zip(&inputs).map(|(p, input)| p / n - input * target).collect();
            substitute(&self.squares, m, &mut solved);
            biases.push((target - solved.iter().zip(&inputs).map(|(w, input)| w * input).sum::<f64>()) as f32);
            weights.extend(solved.iter().map(|&w| w as f32));
        }
        weights.iter().chain(&biases).all(|x| x.is_finite()).then_some((weights, biases))
    }
}

fn add_scaled(sums: &mut [f64], factor: f64, values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += factor * f64::from(value));
}

/// Adds to some rows of the upper triangle.
fn add_squares(rows: Vec<(usize, &mut [f64])>, inputs: &[f32], n_inputs: usize) {
    let mut rows = rows;
    for together in inputs.chunks(TOGETHER * n_inputs) {
        let inputs: Vec<f64> = together.iter().map(|&x| f64::from(x)).collect();
        for (i, row) in &mut rows {
            for input in inputs.chunks_exact(n_inputs) {
                let factor = input[*i];
                row[*i..].iter_mut().zip(&input[*i..]).for_each(|(sum, x)| *sum += factor * x);
            }
        }
    }
}

/// Cholesky's decomposition of the lower triangle, in place; `None` where the matrix is not positive definite.
fn decompose(a: &mut [f64], n: usize) -> Option<()> {
    for i in 0..n {
        let (done, rest) = a.split_at_mut(i * n);
        let row = &mut rest[..n];
        for j in 0..i {
            let other = &done[j * n..][..n];
            let dot: f64 = row[..j].iter().zip(&other[..j]).map(|(a, b)| a * b).sum();
            row[j] = (row[j] - dot) / other[j];
        }
        let left = row[i] - row[..i].iter().map(|x| x * x).sum::<f64>();
        if !(left > 0.0 && left.is_finite()) {
            return None;
        }
        row[i] = left.sqrt();
    }
    Some(())
}

/// Solves for a right side, in place.
fn substitute(l: &[f64], n: usize, x: &mut [f64]) {
    for i in 0..n {
        let dot: f64 = l[i * n..][..i].iter().zip(&x[..i]).map(|(a, b)| a * b).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
    for i in (0..n).rev() {
        x[i] /= l[i * n + i];
        let (before, xi) = (&l[i * n..][..i], x[i]);
        x[..i].iter_mut().zip(before).for_each(|(x, l)| *x -= l * xi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uniform numbers in −1..1.
    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    /// The gradient of the penalised mean square is zero at what was found, whatever the threads.
    #[test]
    fn is_the_minimum() {
        let (m, n, targets) = (19, 300, 2);
        let mut inputs = random(m * n, 1);
        inputs.iter_mut().enumerate().for_each(|(i, x)| *x = *x * (1.0 + (i % m) as f32 / 4.0) + 0.5);
        let wanted = random(n * targets, 2);
        let solved = |n_threads: usize| {
            let mut ridge = Ridge::new(m, targets);
            let cut = 101;
            ridge.add(&inputs[..cut * m], &wanted[..cut * targets], n_threads);
            ridge.add(&inputs[cut * m..], &wanted[cut * targets..], n_threads);
            ridge.solve().unwrap()
        };
        let (weights, biases) = solved(1);
        assert_eq!(solved(3), (weights.clone(), biases.clone()));
        let mean_square = inputs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / (m * n) as f64;
        for t in 0..targets {
            let weights = &weights[t * m..][..m];
            let error = |row: usize| {
                let input = &inputs[row * m..][..m];
                let product: f64 = input.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                product + f64::from(biases[t]) - f64::from(wanted[row * targets + t])
            };
            let mean = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
            assert!(mean(&error).abs() < 1e-6);
            for i in 0..m {
                let of_errors = mean(&|row| error(row) * f64::from(inputs[row * m + i]));
                let gradient = of_errors + PENALTY * mean_square * f64::from(weights[i]);
                assert!(gradient.abs() < 1e-6, "{t}, {i}: {gradient:e}");
            }
        }
        assert!(weights.iter().any(|w| w.abs() > 1e-3));
    }

    #[test]
    fn nothing_determines_nothing() {
        assert_eq!(Ridge::new(3, 1).solve(), None);
        let mut ridge = Ridge::new(3, 1);
        ridge.add(&[0.0; 9], &[1.0; 3], 2);
        assert_eq!(ridge.solve(), None);
    }
}
