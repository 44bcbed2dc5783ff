//! Products of a quantised matrix and vectors: an operation of our own.
//!
//! As in ggml, activations are quantised to eight bits in blocks of 32 and products are summed as integers. Scales stay
//! in f32, each thread quantises the input for itself, so that no thread waits for another before the product, and
//! weights are unpacked once for several vectors. Many vectors are taken in tiles that stay in the second-level cache.
//! For AVX-512 with VNNI, and for AVX2; where both are missing ggml's operation is used.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod product;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ffi::c_void;

use ggml_sys as sys;

#[cfg(target_arch = "x86_64")]
pub(super) use self::avx2::quantize_block;
use self::product::{Kernels, Product, ROWS};
use super::{Tensor, Type, processor::Features};

/// The kernel for these features, the operation's callback; `None` without AVX2.
fn kernel(features: Features) -> sys::ggml_custom_op_t {
    match features {
        Features::Portable => None,
        #[cfg(target_arch = "x86_64")]
        Features::Avx2 | Features::Avx512 => Some(callback::<avx2::Avx2>),
        #[cfg(target_arch = "x86_64")]
        Features::Avx512Vnni => Some(callback::<vnni::Vnni>),
    }
}

/// Whether [`add`] can multiply these with a kernel for these features.
pub(super) fn applies(weight: &Tensor, input: &Tensor, features: Features) -> bool {
    let ([k, n_rows, w2, w3], [_, n, i2, i3]) = (weight.shape(), input.shape());
    let is_plain = [w2, w3, i2, i3] == [1; 4] && input.ty() == Type::F32 && input.strides()[0] == size_of::<f32>();
    kernel(features).is_some()
        && is_plain
        && n > 0
        && n_rows > 0
        && k.is_multiple_of(64)
        && [Type::Q4_0, Type::Q4_1, Type::Q8_0].contains(&weight.ty())
        && weight.is_host()
}

/// Adds the node of `weight [k, rows] × input [k, n]` → `[rows, n]` to the context `raw`.
///
/// # Safety
/// [`applies`] said yes, and the processor has the features; the context is alive, and the tensors live as long as it.
pub(super) unsafe fn add(
    raw: *mut sys::ggml_context,
    weight: &Tensor,
    input: &Tensor,
    features: Features,
) -> *mut sys::ggml_tensor {
    let mut sources = [weight.raw(), input.raw()];
    // SAFETY: as the caller says; the callback has no state.
    unsafe {
        sys::ggml_custom_4d(
            raw,
            sys::GGML_TYPE_F32,
            weight.shape()[1] as i64,
            input.shape()[1] as i64,
            1,
            1,
            sources.as_mut_ptr(),
            sources.len() as i32,
            kernel(features),
            sys::GGML_N_TASKS_MAX,
            std::ptr::null_mut(),
        )
    }
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only x86-64 has kernels"))]
unsafe extern "C" fn callback<K: Kernels>(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, _: *mut c_void) {
    // SAFETY: ggml runs nodes that `add` made, while their tensors have memory; its caller has the features.
    unsafe {
        let (weight, input) = ((*node).src[0], (*node).src[1]);
        let (k, n_rows, n) = ((*weight).ne[0] as usize, (*weight).ne[1] as usize, (*input).ne[1] as usize);
        let (thread, n_threads) = (thread as usize, n_threads as usize);
        let groups = n_rows.div_ceil(ROWS);
        let first_of = |thread: usize| (thread * groups / n_threads * ROWS).min(n_rows);
        let rows = first_of(thread)..first_of(thread + 1);
        if rows.is_empty() {
            return;
        }
        let product = Product {
            weights: (*weight).data.cast(),
            row_bytes: (*weight).nb[1],
            k,
            input: (*input).data.cast(),
            input_bytes: (*input).nb[1],
            n,
            rows,
            out: (*node).data.cast(),
            out_bytes: (*node).nb[1],
        };
        K::run(&product, (*weight).type_);
    }
}

#[cfg(test)]
mod tests {
    use super::kernel;
    use crate::ggml::{Context, Device, Graph, Scheduler, Tensor, Type, processor::Features};

    /// All features of this processor that have a kernel.
    fn all_features() -> Vec<Features> {
        Features::all().into_iter().filter(|&features| kernel(features).is_some()).collect()
    }

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
                                let exact: f64 = (0..k)
                                    .map(|j| f64::from(stored[row * k + j]) * f64::from(vectors[i * k + j]))
                                    .sum();
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
            for ty in [Type::Q4_0, Type::Q4_1, Type::Q8_0] {
                let (k, rows) = (576, 37);
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
            for ty in [Type::Q4_0, Type::Q4_1, Type::Q8_0] {
                for n in [1, 9] {
                    let context = Context::new(3);
                    let (k, rows) = (64, 9);
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
}
