//! Products against f64 and against ggml, in all kernels that this processor can run.

use proptest::prelude::*;

use super::kernel;
use crate::ggml::{Context, Device, Graph, Scheduler, Tensor, Type, processor::Features};

/// All features of this processor that have a kernel.
fn all_features() -> Vec<Features> {
    Features::all().into_iter().filter(|&features| kernel(Type::Q8_0, false, features).is_some()).collect()
}

/// All types that have kernels, and the elements of a step.
const TYPES: [(Type, usize); 8] = [
    (Type::Q4_0, 64),
    (Type::Q4_1, 64),
    (Type::Q5_0, 64),
    (Type::Q5_1, 64),
    (Type::Q8_0, 64),
    (Type::Q4_K, 256),
    (Type::Q5_K, 256),
    (Type::Q6_K, 256),
];

fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn compute(scheduler: &mut Scheduler, graph: &Graph, result: &Tensor) -> Vec<f32> {
    graph.expand(result);
    scheduler.alloc(graph).unwrap();
    scheduler.compute(graph).unwrap();
    result.to_f32()
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
        ] {
            for n in [1, 2, 3, 4, 7, 300] {
                let context = Context::new(4);
                let source = context.tensor(Type::F32, &[k, rows]);
                let weight = context.tensor(ty, &[k, rows]);
                let input = context.tensor(Type::F32, &[k, n]);
                context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
                // With a mean, so that minima matter.
                source.write(0, &floats(1, k * rows).iter().map(|x| x + 0.3).collect::<Vec<_>>());
                let vectors = floats(2, k * n);
                input.write(0, &vectors);
                convert(&mut scheduler, &source, &weight);
                let graph = Graph::new(8);
                let stored = compute(&mut scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());

                let error_of = |got: &[f32]| {
                    let mut error = 0.0;
                    for i in 0..n {
                        for row in 0..rows {
                            let exact: f64 =
                                (0..k).map(|j| f64::from(stored[row * k + j]) * f64::from(vectors[i * k + j])).sum();
                            error += (f64::from(got[i * rows + row]) - exact).powi(2);
                        }
                    }
                    (error / (k * n * rows) as f64).sqrt()
                };
                assert!(super::applies(&weight, &input, Features::detect()));
                let graph = Graph::new(8);
                let their_error =
                    error_of(&compute(&mut scheduler, &graph, &graph.mul_mat(&weight, &input).as_output()));
                for &features in &all {
                    let graph = Graph::new(8);
                    let product = graph.mul_mat_with(&weight, &input, features).as_output();
                    let error = error_of(&compute(&mut scheduler, &graph, &product));
                    assert!(error < 3e-3, "{features:?}, {ty}, {k}, {n}: {error:e}");
                    let bound = 1.05 * their_error + 1e-6;
                    assert!(error < bound, "{features:?}, {ty}, {k}, {n}: {error:e}, {their_error:e}");
                }
            }
        }
    }
}

/// A few vectors together give each what it gives alone, so that sequences decoded in one batch do not differ.
#[test]
fn vectors_do_not_change_each_other() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 64).unwrap();
    for features in all_features() {
        for (ty, step) in TYPES {
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
                let product = graph.mul_mat_with(&weight, &some, features).as_output();
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
        for (ty, step) in TYPES {
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
                let product = graph.mul_mat_with(&weight, &input, features).as_output();
                for got in compute(&mut scheduler, &graph, &product) {
                    let exact: f32 = -weights[..k].iter().sum::<f32>();
                    assert!((got / exact - 1.0).abs() < 5e-3, "{features:?}, {ty}, {n}: {got}, not {exact}");
                }
            }
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
    let shape = [shape[0], shape[1]];
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
fn expected(stored: &[f32], vectors: &[f32], k: usize) -> Vec<(f64, f64)> {
    let quantized: Vec<f64> = vectors
        .chunks(32)
        .flat_map(|block| {
            let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let (scale, factor) = (largest / 127.0, if largest > 0.0 { 127.0 / largest } else { 0.0 });
            block.iter().map(move |x| f64::from((x * factor).round_ties_even()) * f64::from(scale))
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
    #![proptest_config(ProptestConfig::with_cases(96))]

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
        let expected = expected(&stored, &vectors, k);

        let repacked = repack(&weight);
        for features in all_features() {
            for weight in [Some(&weight), repacked.as_ref().map(|(_, weight)| weight)].into_iter().flatten() {
                if !super::applies(weight, &input, features) {
                    // Of what ggml repacks there are kernels for q4_K only.
                    prop_assert!(weight.is_repacked() && ty != Type::Q4_K);
                    continue;
                }
                let graph = Graph::new(8);
                let got = compute(&mut scheduler, &graph, &graph.mul_mat_with(weight, &input, features).as_output());
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

/// Repacked weights as those in a file: the error is not above ggml's.
#[test]
fn repacked_weights_are_multiplied_no_worse_than_by_ggml() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 64).unwrap();
    let (k, rows) = (1536, 40);
    for n in [1, 3, 8, 50] {
        let context = Context::new(4);
        let source = context.tensor(Type::F32, &[k, rows]);
        let weight = context.tensor(Type::Q4_K, &[k, rows]);
        let input = context.tensor(Type::F32, &[k, n]);
        context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
        source.write(0, &floats(1, k * rows).iter().map(|x| x + 0.3).collect::<Vec<_>>());
        let vectors = floats(2, k * n);
        input.write(0, &vectors);
        convert(&mut scheduler, &source, &weight);
        let Some((_context, repacked)) = repack(&weight) else {
            eprintln!("skipped: ggml does not repack q4_K here");
            return;
        };
        let graph = Graph::new(8);
        let stored = compute(&mut scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());
        let error_of = |got: &[f32]| {
            let exact = vectors.chunks(k).flat_map(|vector| {
                let product = |row: &[f32]| row.iter().zip(vector).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                stored.chunks(k).map(product).collect::<Vec<f64>>()
            });
            got.iter().zip(exact).map(|(&got, exact)| (f64::from(got) - exact).powi(2)).sum::<f64>().sqrt()
        };
        let graph = Graph::new(8);
        let theirs = error_of(&compute(&mut scheduler, &graph, &graph.mul_mat(&repacked, &input).as_output()));
        for features in all_features() {
            assert!(super::applies(&repacked, &input, features));
            let graph = Graph::new(8);
            let product = graph.mul_mat_with(&repacked, &input, features).as_output();
            let ours = error_of(&compute(&mut scheduler, &graph, &product));
            assert!(ours < theirs, "{features:?}, {n}: {ours:e}, ggml {theirs:e}");
        }
    }
}
