//! Products against f64 and against ggml, in all kernels that this processor can run.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Kernel, kernel};
use crate::ggml::{
    Context, Device, Graph, Scheduler, Tensor, Type,
    processor::{Features, shorter},
};

/// All features of this processor that have a kernel.
fn all_features() -> Vec<Features> {
    Features::all().into_iter().filter(|&features| kernel(Type::Q8_0, false, features).is_some()).collect()
}

/// All types that have kernels, and the elements of a step.
const TYPES: &[(Type, usize)] = &[
    #[cfg(target_arch = "x86_64")]
    (Type::F16, 32),
    #[cfg(target_arch = "x86_64")]
    (Type::BF16, 32),
    (Type::Q4_0, 64),
    (Type::Q4_1, 64),
    (Type::Q5_0, 64),
    (Type::Q5_1, 64),
    (Type::Q8_0, 64),
    (Type::Q4_K, 256),
    (Type::Q5_K, 256),
    (Type::Q6_K, 256),
    (Type::Q2_K, 256),
    (Type::Q3_K, 256),
    (Type::IQ4_NL, 64),
    (Type::IQ4_XS, 256),
    (Type::MXFP4, 64),
];

fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// As [`floats`], of other sizes in each block of 32, as activations are.
fn activations(seed: u64, n: usize) -> Vec<f32> {
    floats(seed, n).iter().enumerate().map(|(i, x)| x * [1.0, 0.5, 2.0, 0.25][i / 32 % 4]).collect()
}

fn compute(scheduler: &mut Scheduler, graph: &Graph, result: &Tensor) -> Vec<f32> {
    graph.expand(result);
    scheduler.alloc(graph).unwrap();
    scheduler.compute(graph).unwrap();
    result.to_f32()
}

/// The product with the kernel for these features, which there must be.
fn product(graph: &Graph, weight: &Tensor, input: &Tensor, features: Features) -> Tensor {
    let kernel = kernel(weight.ty(), weight.is_repacked(), features).expect("a kernel");
    graph.mul_mat_with(weight, input, kernel).as_output()
}

/// The products of the vectors with the rows, each of `k` elements, a vector's after the other's.
fn exact(rows: &[f32], vectors: &[f32], k: usize) -> Vec<f64> {
    let product =
        |vector: &[f32], row: &[f32]| row.iter().zip(vector).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
    vectors.chunks(k).flat_map(|vector| rows.chunks(k).map(move |row| product(vector, row))).collect()
}

/// Squared errors of each kernel, by whether weights are repacked, and of ggml's for the same products.
#[derive(Default)]
struct Errors(BTreeMap<(bool, Features), ([f64; 2], usize)>);

impl Errors {
    fn add(&mut self, kernel: (bool, Features), [ours, theirs]: [&[f32]; 2], exact: &[f64]) {
        assert_eq!([ours.len(), theirs.len()], [exact.len(); 2]);
        let (sums, n) = self.0.entry(kernel).or_default();
        for (sum, got) in sums.iter_mut().zip([ours, theirs]) {
            *sum += got.iter().zip(exact).map(|(&got, exact)| (f64::from(got) - exact).powi(2)).sum::<f64>();
        }
        *n += exact.len();
    }

    /// That ours are no greater than ggml's, and below `bound`, as roots of means.
    fn check(&self, bound: f64, what: &str) {
        assert_eq!(self.0.is_empty(), all_features().is_empty());
        for (kernel, (sums, n)) in &self.0 {
            let [ours, theirs] = sums.map(|sum| (sum / *n as f64).sqrt());
            assert!(ours < bound, "{kernel:?}, {what}: {ours:e}");
            assert!(ours < 1.05 * theirs + 1e-6, "{kernel:?}, {what}: {ours:e}, ggml {theirs:e}");
        }
    }
}

/// Writes one tensor into another of any type.
fn convert(scheduler: &mut Scheduler, from: &Tensor, to: &Tensor) {
    let graph = Graph::new(8);
    graph.expand(&graph.copy(from, to));
    scheduler.alloc(&graph).unwrap();
    scheduler.compute(&graph).unwrap();
}

/// Against the product of the weights as they are stored and the input as it is, in f64: the error is that of
/// eight-bit inputs, and not above ggml's.
#[test]
fn products_are_those_of_the_stored_weights() {
    let all = all_features();
    if all.is_empty() {
        eprintln!("skipped: this processor has no kernel");
        return;
    }
    for threads in [1, 3] {
        let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 64).unwrap();
        for (ty, k, rows) in [
            #[cfg(target_arch = "x86_64")]
            (Type::F16, 1504, 50),
            #[cfg(target_arch = "x86_64")]
            (Type::BF16, 96, 17),
            (Type::Q4_1, 576, 77),
            (Type::Q4_0, 64, 5),
            (Type::Q4_0, 192, 24),
            (Type::Q8_0, 1536, 33),
            (Type::Q8_0, 128, 1),
            (Type::Q5_0, 896, 50),
            (Type::Q5_1, 1088, 17),
            (Type::Q4_K, 1536, 33),
            (Type::Q5_K, 256, 40),
            (Type::Q6_K, 2304, 35),
            (Type::Q2_K, 768, 21),
            (Type::Q3_K, 1280, 34),
            (Type::IQ4_NL, 960, 19),
            (Type::IQ4_XS, 1792, 33),
            (Type::MXFP4, 320, 52),
        ] {
            for n in [1, 2, 3, 4, 7, 300 / shorter()] {
                let context = Context::new(4);
                let source = context.tensor(Type::F32, &[k, rows]);
                let weight = context.tensor(ty, &[k, rows]);
                let input = context.tensor(Type::F32, &[k, n]);
                context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
                // With a mean, so that minima matter.
                source.write(0, &floats(1, k * rows).iter().map(|x| x + 0.3).collect::<Vec<_>>());
                convert(&mut scheduler, &source, &weight);
                let graph = Graph::new(8);
                let stored = compute(&mut scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());
                assert!(Kernel::of_matrix(&weight, &input, Features::detect()).is_some() || !ty.is_quantized());
                let repacked = repack(&weight);
                let mut errors = Errors::default();
                // One vector's rounding says little.
                for seed in 0..if n < 4 { 12 } else { 1 } {
                    let vectors = activations(2 + seed, k * n);
                    input.write(0, &vectors);
                    let exact = exact(&stored, &vectors, k);
                    for weight in [Some(&weight), repacked.as_ref().map(|(_, weight)| weight)].into_iter().flatten() {
                        let graph = Graph::new(8);
                        let theirs = compute(&mut scheduler, &graph, &graph.mul_mat(weight, &input).as_output());
                        for &features in all.iter().filter(|&&f| kernel(ty, weight.is_repacked(), f).is_some()) {
                            let graph = Graph::new(8);
                            let ours = compute(&mut scheduler, &graph, &product(&graph, weight, &input, features));
                            errors.add((weight.is_repacked(), features), [&ours, &theirs], &exact);
                        }
                    }
                }
                errors.check(3e-3 * (k as f64).sqrt(), &format!("{ty}, {k}, {n}"));
            }
        }
    }
}

/// A few vectors together give each what it gives alone, so that sequences decoded in one batch do not differ.
#[test]
fn vectors_do_not_change_each_other() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 64).unwrap();
    for features in all_features() {
        for &(ty, step) in TYPES {
            let (k, rows) = (9 * step, 37);
            let context = Context::new(3);
            let source = context.tensor(Type::F32, &[k, rows]);
            let weight = context.tensor(ty, &[k, rows]);
            let input = context.tensor(Type::F32, &[k, 3]);
            context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
            source.write(0, &floats(3, k * rows));
            input.write(0, &floats(4, k * 3));
            convert(&mut scheduler, &source, &weight);
            let mut product = |first: usize, n: usize| {
                let graph = Graph::new(8);
                let some = graph.view(&input, [k, n, 1], [4 * k, 4 * k * n], 4 * k * first);
                let product = super::tests::product(&graph, &weight, &some, features);
                compute(&mut scheduler, &graph, &product)
            };
            let alone: Vec<Vec<f32>> = (0..3).map(|i| product(i, 1)).collect();
            assert_eq!(product(0, 2), alone[..2].concat(), "{features:?}, {ty}");
            assert_eq!(product(0, 3), alone.concat(), "{features:?}, {ty}");
        }
    }
}

/// The largest numbers that weights and inputs can have: no sum on the way is cut off.
#[test]
fn extremes_do_not_overflow() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 1, 64).unwrap();
    for features in all_features() {
        for &(ty, step) in TYPES {
            for n in [1, 9] {
                let context = Context::new(3);
                let (k, rows) = (step, 9);
                let source = context.tensor(Type::F32, &[k, rows]);
                let weight = context.tensor(ty, &[k, rows]);
                let input = context.tensor(Type::F32, &[k, n]);
                context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
                // One element of each block sets the scale, all others are at the other end.
                let of = |i: usize| if i.is_multiple_of(32) { -8.0 } else { 7.0 };
                let weights: Vec<f32> = (0..k * rows).map(of).collect();
                source.write(0, &weights);
                input.write(0, &vec![-1.0f32; k * n]);
                convert(&mut scheduler, &source, &weight);
                let graph = Graph::new(8);
                let stored = compute(&mut scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());
                let exact: f32 = -stored[..k].iter().sum::<f32>();
                let graph = Graph::new(8);
                let product = product(&graph, &weight, &input, features);
                for got in compute(&mut scheduler, &graph, &product) {
                    assert!((got / exact - 1.0).abs() < 1e-5, "{features:?}, {ty}, {n}: {got}, not {exact}");
                }
            }
        }
    }
}

/// Arm's processors differ in instructions, not in results.
#[cfg(target_arch = "aarch64")]
#[test]
fn all_arm_processors_give_the_same_bits() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 64).unwrap();
    for &(ty, step) in TYPES {
        let (k, rows) = (9 * step, 37);
        for n in [1, 3, 7] {
            let context = Context::new(3);
            let source = context.tensor(Type::F32, &[k, rows]);
            let weight = context.tensor(ty, &[k, rows]);
            let input = context.tensor(Type::F32, &[k, n]);
            context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
            source.write(0, &floats(5, k * rows));
            input.write(0, &floats(6, k * n));
            convert(&mut scheduler, &source, &weight);
            let mut bits = all_features().into_iter().map(|features| {
                let graph = Graph::new(8);
                let product = product(&graph, &weight, &input, features);
                compute(&mut scheduler, &graph, &product).into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            let first = bits.next().unwrap();
            assert!(bits.all(|bits| bits == first), "{ty}, {n}");
        }
    }
}

#[test]
fn an_input_of_zeros_gives_zeros() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 1, 64).unwrap();
    let context = Context::new(2);
    let weight = context.tensor(Type::Q8_0, &[64, 3]);
    let input = context.tensor(Type::F32, &[64, 1]);
    context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
    let mut graph = Graph::new(8);
    graph.use_own_kernels(true);
    assert_eq!(compute(&mut scheduler, &graph, &graph.mul_mat(&weight, &input).as_output()), [0.0; 3]);
}

/// Writes the weights `from` as ggml repacks them; the context of the copy, and it. `None` where ggml does not.
fn repack(from: &Tensor) -> Option<(Context, Tensor)> {
    let (ty, shape) = (from.ty(), from.shape());
    let shape = if shape[2] > 1 { shape[..3].to_vec() } else { shape[..2].to_vec() };
    let memory = Device::cpu().repacking_buffer_types();
    let memory = memory.into_iter().find(|&memory| Device::cpu().can_multiply(memory, ty, &shape))?;
    let context = Context::new(1);
    let repacked = context.tensor(ty, &shape);
    context.alloc(memory, "a test").unwrap();
    let mut bytes = vec![0u8; from.n_bytes()];
    from.read(0, &mut bytes);
    repacked.write(0, &bytes);
    Some((context, repacked))
}

/// What kernels are to compute, but for rounding to f32: products of the stored weights and the input in blocks of 32 as
/// 8-bit numbers. Beside each the size of all that is summed for it.
fn expected(ty: Type, stored: &[f32], vectors: &[f32], k: usize) -> Vec<(f64, f64)> {
    let quantized: Vec<f64> = vectors
        .chunks(32)
        .flat_map(|block| {
            let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            if !ty.is_quantized() {
                return block.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            }
            let (scale, factor) = (largest / 127.0, if largest > 0.0 { 127.0 / largest } else { 0.0 });
            block.iter().map(move |x| f64::from((x * factor).round_ties_even()) * f64::from(scale)).collect()
        })
        .collect();
    let row_of = |vector: &[f64], row: &[f32]| {
        let largest = row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
        let terms = row.iter().zip(vector).map(|(&w, x)| (f64::from(w) * x, f64::from(w.abs() + largest) * x.abs()));
        terms.fold((0.0, 0.0), |sum, term| (sum.0 + term.0, sum.1 + term.1))
    };
    quantized.chunks(k).flat_map(|vector| stored.chunks(k).map(move |row| row_of(vector, row))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96 / shorter() as u32))]

    /// Any shape: rows that no panel fills, slices of rows, one vector to 17, weights as in a file and repacked.
    #[test]
    fn products_of_any_shape_are_those_of_the_same_arithmetic(
        (ty, step) in prop::sample::select(TYPES.to_vec()),
        length in 1..2400usize,
        rows in 1..70usize,
        n in 1..18usize,
        threads in 1..4usize,
        seed in any::<u64>(),
        mean in -1.0..1.0f32,
    ) {
        let k = length.next_multiple_of(step);
        // Half of them such that ggml repacks them.
        let rows = if seed % 2 == 0 { rows.next_multiple_of(8) } else { rows };
        let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 64).unwrap();
        let context = Context::new(4);
        let source = context.tensor(Type::F32, &[k, rows]);
        let weight = context.tensor(ty, &[k, rows]);
        let input = context.tensor(Type::F32, &[k, n]);
        context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
        source.write(0, &floats(seed, k * rows).iter().map(|x| x + mean).collect::<Vec<_>>());
        let vectors: Vec<f32> = floats(!seed, k * n).iter().map(|x| x + mean).collect();
        input.write(0, &vectors);
        convert(&mut scheduler, &source, &weight);
        let graph = Graph::new(8);
        let stored = compute(&mut scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());
        let expected = expected(ty, &stored, &vectors, k);

        let repacked = repack(&weight);
        for features in all_features() {
            for weight in [Some(&weight), repacked.as_ref().map(|(_, weight)| weight)].into_iter().flatten() {
                if kernel(ty, weight.is_repacked(), features).is_none() {
                    // Of what ggml repacks there are kernels for q4_K only, and on Arm for nothing.
                    prop_assert!(weight.is_repacked() && (ty != Type::Q4_K || cfg!(target_arch = "aarch64")));
                    continue;
                }
                let graph = Graph::new(8);
                let got = compute(&mut scheduler, &graph, &product(&graph, weight, &input, features));
                prop_assert_eq!(got.len(), expected.len());
                for (i, (&got, &(exact, size))) in got.iter().zip(&expected).enumerate() {
                    let error = (f64::from(got) - exact).abs();
                    prop_assert!(
                        error <= 4e-6 * size,
                        "{:?}, {}, repacked {}, [{}, {}] × {}, {}: {} instead of {}, size {}",
                        features, ty, weight.is_repacked(), k, rows, n, i, got, exact, size
                    );
                }
            }
        }
    }
}

/// Experts' weights, an input and who is chosen, at random; what ggml makes of them is in `stored` and `ids`.
struct Mixture {
    _context: Context,
    weight: Tensor,
    input: Tensor,
    chosen: Tensor,
    stored: Vec<f32>,
    vectors: Vec<f32>,
    ids: Vec<usize>,
}

/// What a mixture is of. `per_expert`: the input has a vector for each expert of a token, not one for all.
#[derive(Debug, Clone, Copy)]
struct Experts {
    ty: Type,
    k: usize,
    rows: usize,
    experts: usize,
    used: usize,
    n: usize,
    per_expert: bool,
}

impl Mixture {
    fn new(scheduler: &mut Scheduler, of: Experts, seed: u64, mean: f32) -> Mixture {
        let Experts { ty, k, rows, experts, used, n, per_expert } = of;
        let n1 = if per_expert { used } else { 1 };
        let context = Context::new(5);
        let source = context.tensor(Type::F32, &[k, rows, experts]);
        let weight = context.tensor(ty, &[k, rows, experts]);
        let input = context.tensor(Type::F32, &[k, n1, n]);
        // As from a sort of all experts, of which the first are used.
        let sorted = context.tensor(Type::I32, &[experts, n]);
        context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
        let with_mean = |x: Vec<f32>| x.iter().map(|x| x + mean).collect::<Vec<_>>();
        source.write(0, &with_mean(floats(seed, k * rows * experts)));
        let vectors = with_mean(activations(!seed, k * n1 * n));
        input.write(0, &vectors);
        // The last expert is nobody's where others will do.
        let candidates = if used < experts { experts - 1 } else { experts };
        let order = |token: usize| {
            let scores = floats(seed ^ (token as u64 + 7), candidates);
            let mut order: Vec<usize> = (0..candidates).collect();
            order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            order.extend(candidates..experts);
            order
        };
        let orders: Vec<Vec<usize>> = (0..n).map(order).collect();
        sorted.write(0, &orders.concat().iter().map(|&id| id as i32).collect::<Vec<_>>());
        let ids = orders.iter().flat_map(|order| order[..used].to_vec()).collect();
        convert(scheduler, &source, &weight);
        let graph = Graph::new(8);
        let stored = compute(scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());
        Mixture { _context: context, weight, input, chosen: sorted, stored, vectors, ids }
    }

    /// The rows that each of the products is of, and the vector, in the products' order.
    fn pairs(&self, of: Experts) -> impl Iterator<Item = (&[f32], &[f32])> {
        let Experts { k, rows, used, per_expert, .. } = of;
        self.ids.iter().enumerate().map(move |(i, id)| {
            let vector = if per_expert { i } else { i / used };
            (&self.stored[id * k * rows..][..k * rows], &self.vectors[vector * k..][..k])
        })
    }

    /// The products with the kernel for these features, of ggml's without.
    fn products(
        &self,
        scheduler: &mut Scheduler,
        weight: &Tensor,
        used: usize,
        features: Option<Features>,
    ) -> Vec<f32> {
        let graph = Graph::new(8);
        let n = self.chosen.shape()[1];
        let ids = graph.view(&self.chosen, [used, n, 1], [self.chosen.strides()[1], 0], 0);
        let products = match features {
            Some(features) => {
                let kernel = kernel(weight.ty(), weight.is_repacked(), features).expect("a kernel");
                graph.mul_mat_id_with(weight, &self.input, &ids, kernel)
            }
            None => graph.mul_mat_id(weight, &self.input, &ids),
        };
        compute(scheduler, &graph, &products.as_output())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96 / shorter() as u32))]

    /// Any number of experts, of which not all are used, and of tokens; weights as in a file and repacked.
    #[test]
    fn products_of_experts_are_those_of_the_same_arithmetic(
        (ty, step) in prop::sample::select(TYPES.to_vec()),
        length in 1..1400usize,
        rows in 1..50usize,
        (experts, used) in (2..9usize).prop_flat_map(|experts| (Just(experts), 1..=experts)),
        n in 1..14usize,
        per_expert in any::<bool>(),
        threads in 1..4usize,
        seed in any::<u64>(),
        mean in -1.0..1.0f32,
    ) {
        // Half of them such that ggml repacks them.
        let rows = if seed % 2 == 0 { rows.next_multiple_of(8) } else { rows };
        let of = Experts { ty, k: length.next_multiple_of(step), rows, experts, used, n, per_expert };
        let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 64).unwrap();
        let mixture = Mixture::new(&mut scheduler, of, seed, mean);
        let pairs = mixture.pairs(of);
        let expected: Vec<_> = pairs.flat_map(|(stored, vector)| expected(ty, stored, vector, of.k)).collect();
        let repacked = repack(&mixture.weight);
        for features in all_features() {
            for weight in [Some(&mixture.weight), repacked.as_ref().map(|(_, weight)| weight)].into_iter().flatten() {
                if kernel(ty, weight.is_repacked(), features).is_none() {
                    prop_assert!(weight.is_repacked() && (ty != Type::Q4_K || cfg!(target_arch = "aarch64")));
                    continue;
                }
                let got = mixture.products(&mut scheduler, weight, used, Some(features));
                prop_assert_eq!(got.len(), expected.len());
                for (i, (&got, &(exact, size))) in got.iter().zip(&expected).enumerate() {
                    let error = (f64::from(got) - exact).abs();
                    prop_assert!(
                        error <= 4e-6 * size,
                        "{:?}, repacked {}, {:?}, {}: {} instead of {}, size {}",
                        features, weight.is_repacked(), of, i, got, exact, size
                    );
                }
            }
        }
    }
}

/// Against the exact products of experts the error is not above ggml's, over some mixtures each.
#[test]
fn experts_are_multiplied_no_worse_than_by_ggml() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 64).unwrap();
    for &(ty, step) in TYPES {
        for (n, per_expert) in [(1, false), (1, true), (30 / shorter().min(6), false), (30 / shorter().min(6), true)] {
            let of = Experts { ty, k: 2 * step.max(256), rows: 40, experts: 6, used: 3, n, per_expert };
            let mut errors = Errors::default();
            for seed in 0..if n == 1 { 12 } else { 2 } {
                let mixture = Mixture::new(&mut scheduler, of, seed, 0.3);
                let pairs = mixture.pairs(of);
                let exact: Vec<f64> = pairs.flat_map(|(stored, vector)| exact(stored, vector, of.k)).collect();
                let repacked = repack(&mixture.weight);
                for weight in [Some(&mixture.weight), repacked.as_ref().map(|(_, weight)| weight)].into_iter().flatten()
                {
                    let theirs = mixture.products(&mut scheduler, weight, of.used, None);
                    for features in all_features() {
                        if kernel(ty, weight.is_repacked(), features).is_some() {
                            let ours = mixture.products(&mut scheduler, weight, of.used, Some(features));
                            errors.add((weight.is_repacked(), features), [&ours, &theirs], &exact);
                        }
                    }
                }
            }
            errors.check(3e-3 * (of.k as f64).sqrt(), &format!("{of:?}"));
        }
    }
}
