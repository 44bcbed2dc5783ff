//! Nodes of a graph that run kernels.
//!
//! Few vectors are quantised by each thread for itself, so that none waits for another before the product. Many are quantised
//! by a node of their own, each thread a share, once for all products with the same input.

use std::{cell::RefCell, ffi::c_void};

use ggml_sys as sys;

use super::{
    input::{ALIGNMENT, Input, slices},
    kernel::Kernel,
    product::{Column, Product, share},
};
use crate::ggml::Tensor;

impl Kernel {
    /// Whether so many vectors are better quantised by [`Kernel::add_input`].
    pub fn shares_input(&self, n_vectors: usize) -> bool {
        n_vectors >= Product::MIN_PANEL
    }

    /// Adds the node that quantises `input [k, …]` to the context `raw`.
    ///
    /// # Safety
    /// The kernel is for a product with the input; the context is alive, and the tensors live as long as it.
    pub unsafe fn add_input(&'static self, raw: *mut sys::ggml_context, input: &Tensor) -> *mut sys::ggml_tensor {
        let [k, n1, n2, _] = input.shape();
        let shape = [self.scheme.slice_bytes(k) * n1 * n2 + ALIGNMENT, 1, 1];
        // SAFETY: as the caller says; the callback takes this kernel and these sources.
        unsafe { self.add(raw, sys::GGML_TYPE_I8, shape, &[input], quantize) }
    }

    /// Adds the node of `weight [k, rows] × input [k, n]` → `[rows, n]` to the context `raw`.
    ///
    /// # Safety
    /// This is the kernel for the product, and `quantized`, if there is one, [`Kernel::add_input`]'s node of the input or a
    /// node of the same scheme; else as [`Kernel::add_input`].
    pub unsafe fn add_product(
        &'static self,
        raw: *mut sys::ggml_context,
        weight: &Tensor,
        input: &Tensor,
        quantized: Option<&Tensor>,
    ) -> *mut sys::ggml_tensor {
        let shape = [weight.shape()[1], input.shape()[1], 1];
        let sources: Vec<&Tensor> = [weight, input].into_iter().chain(quantized).collect();
        // SAFETY: as the caller says; the callback takes this kernel and these sources.
        unsafe { self.add(raw, sys::GGML_TYPE_F32, shape, &sources, multiply) }
    }

    /// Adds the node of the experts' products → `[rows, used, n]` to the context `raw`.
    ///
    /// # Safety
    /// As [`Kernel::add_product`]; `ids` are numbers of experts.
    pub unsafe fn add_experts(
        &'static self,
        raw: *mut sys::ggml_context,
        weight: &Tensor,
        input: &Tensor,
        ids: &Tensor,
        quantized: Option<&Tensor>,
    ) -> *mut sys::ggml_tensor {
        let [used, n, ..] = ids.shape();
        let sources: Vec<&Tensor> = [weight, input, ids].into_iter().chain(quantized).collect();
        // SAFETY: as the caller says; the callback takes this kernel and these sources.
        unsafe { self.add(raw, sys::GGML_TYPE_F32, [weight.shape()[1], used, n], &sources, multiply_experts) }
    }

    /// # Safety
    /// The context is alive, and the tensors live as long as it; the callback takes this kernel and these sources.
    unsafe fn add(
        &'static self,
        raw: *mut sys::ggml_context,
        ty: sys::ggml_type,
        [ne0, ne1, ne2]: [usize; 3],
        sources: &[&Tensor],
        callback: unsafe extern "C" fn(*mut sys::ggml_tensor, i32, i32, *mut c_void),
    ) -> *mut sys::ggml_tensor {
        let mut sources: Vec<_> = sources.iter().map(|source| source.raw()).collect();
        let (n_sources, kernel) = (sources.len() as i32, std::ptr::from_ref(self).cast_mut().cast());
        // SAFETY: as the caller says; ggml copies the list of sources.
        unsafe {
            sys::ggml_custom_4d(
                raw,
                ty,
                ne0 as i64,
                ne1 as i64,
                ne2 as i64,
                1,
                sources.as_mut_ptr(),
                n_sources,
                Some(callback),
                sys::GGML_N_TASKS_MAX,
                kernel,
            )
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { input: Vec::new(), columns: Vec::new(), ends: Vec::new() }) };
}

/// One thread's memory. It grows to what the largest product needs, and stays.
struct Scratch {
    /// An input that this thread quantised for itself.
    input: Vec<f32>,
    /// The columns of a product; of experts, one expert's after the other's.
    columns: Vec<Column>,
    /// Where each expert's columns end.
    ends: Vec<usize>,
}

/// Where vectors are that are to be quantised: `[k, n1, n2]`.
struct Source {
    data: *const u8,
    k: usize,
    n1: usize,
    n2: usize,
    strides: [usize; 2],
}

impl Source {
    /// # Safety
    /// A live tensor of f32 whose rows are without gaps.
    unsafe fn of(tensor: *const sys::ggml_tensor) -> Source {
        // SAFETY: as the caller says.
        let (data, ne, nb) = unsafe { ((*tensor).data, (*tensor).ne, (*tensor).nb) };
        let [k, n1, n2, _] = ne.map(|n| n as usize);
        Source { data: data.cast_const().cast(), k, n1, n2, strides: [nb[1], nb[2]] }
    }

    fn n_vectors(&self) -> usize {
        self.n1 * self.n2
    }

    /// # Safety
    /// The tensor has memory and the vector.
    unsafe fn vector(&self, index: usize) -> *const f32 {
        // SAFETY: as the caller says.
        unsafe { self.data.add(index % self.n1 * self.strides[0] + index / self.n1 * self.strides[1]).cast() }
    }

    /// The input as a product takes it: what a node quantised, or what this thread quantises now.
    ///
    /// # Safety
    /// The tensor has memory; `quantized` is null or a computed node of [`Kernel::add_input`] of the kernel's scheme.
    unsafe fn quantized(self, quantized: *const sys::ggml_tensor, kernel: &Kernel, memory: &mut Vec<f32>) -> Input {
        let (scheme, n_vectors) = (kernel.scheme, self.n_vectors());
        if !quantized.is_null() {
            // SAFETY: as the caller says.
            return Input::within(unsafe { (*quantized).data.cast() }, scheme, n_vectors);
        }
        let floats = (scheme.slice_bytes(self.k) * n_vectors + ALIGNMENT).div_ceil(size_of::<f32>());
        if memory.len() < floats {
            memory.resize(floats, 0.0);
        }
        let input = Input::within(memory.as_mut_ptr().cast(), scheme, n_vectors);
        for vector in 0..n_vectors {
            for slice in slices(self.k) {
                // SAFETY: as the caller says.
                unsafe { input.write(kernel.quantize, vector, slice, self.vector(vector)) };
            }
        }
        input
    }
}

/// The node's kernel and its sources.
///
/// # Safety
/// The node is one that [`Kernel::add`] added, with so many sources at least; those not given are null.
unsafe fn parts<const N: usize>(
    node: *mut sys::ggml_tensor,
    kernel: *mut c_void,
) -> (&'static Kernel, [*mut sys::ggml_tensor; N]) {
    // SAFETY: as the caller says.
    unsafe { (&*kernel.cast_const().cast::<Kernel>(), std::array::from_fn(|i| (*node).src[i])) }
}

unsafe extern "C" fn quantize(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, kernel: *mut c_void) {
    // SAFETY: ggml runs nodes that `add_input` made, while their tensors have memory; its caller has the features.
    unsafe {
        let (kernel, [input]) = parts(node, kernel);
        let source = Source::of(input);
        let input = Input::within((*node).data.cast(), kernel.scheme, source.n_vectors());
        let n = slices(source.k).count() * source.n_vectors();
        let first_of = |thread: i32| thread as usize * n / n_threads as usize;
        let pieces = slices(source.k).flat_map(|slice| (0..source.n_vectors()).map(move |vector| (slice, vector)));
        for (slice, vector) in pieces.take(first_of(thread + 1)).skip(first_of(thread)) {
            input.write(kernel.quantize, vector, slice, source.vector(vector));
        }
    }
}

unsafe extern "C" fn multiply(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, kernel: *mut c_void) {
    // SAFETY: ggml runs nodes that `add_product` made, while their tensors have memory; its caller has the features.
    unsafe {
        let (kernel, [weight, input, quantized]) = parts(node, kernel);
        let (k, n_rows) = ((*weight).ne[0] as usize, (*weight).ne[1] as usize);
        let rows = share(n_rows, thread as usize, n_threads as usize);
        if rows.is_empty() {
            return;
        }
        let (out, out_bytes) = ((*node).data.cast::<u8>(), (*node).nb[1]);
        let source = Source::of(input);
        SCRATCH.with_borrow_mut(|scratch| {
            let column = |vector| Column { vector, results: out.add(vector * out_bytes).cast() };
            scratch.columns.clear();
            scratch.columns.extend((0..source.n_vectors()).map(column));
            let input = source.quantized(quantized, kernel, &mut scratch.input);
            let (weights, row_bytes) = ((*weight).data.cast_const().cast(), (*weight).nb[1]);
            (kernel.run)(&Product { weights, row_bytes, k, rows, input, columns: &scratch.columns });
        });
    }
}

unsafe extern "C" fn multiply_experts(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, kernel: *mut c_void) {
    // SAFETY: ggml runs nodes that `add_experts` made, while their tensors have memory; its caller has the features.
    unsafe {
        let (kernel, [weight, input, ids, quantized]) = parts(node, kernel);
        let [k, n_rows, n_experts, _] = (*weight).ne.map(|n| n as usize);
        let rows = share(n_rows, thread as usize, n_threads as usize);
        if rows.is_empty() {
            return;
        }
        let source = Source::of(input);
        SCRATCH.with_borrow_mut(|Scratch { input, columns, ends }| {
            sort_by_expert(node, ids, source.n1, n_experts, columns, ends);
            let input = source.quantized(quantized, kernel, input);
            let mut start = 0;
            for (expert, &end) in ends.iter().enumerate() {
                let weights = (*weight).data.cast_const().cast::<u8>().add(expert * (*weight).nb[2]);
                let (row_bytes, rows, columns) = ((*weight).nb[1], rows.clone(), &columns[start..end]);
                (kernel.run)(&Product { weights, row_bytes, k, rows, input, columns });
                start = end;
            }
        });
    }
}

/// The columns of all experts, one's after the other's, and where each's end. `n1` is what the input has a token: a vector
/// for each expert, or one for all.
///
/// # Safety
/// Live tensors that have memory: what results go to `[rows, used, n]`, and numbers of experts `[used, n]`.
unsafe fn sort_by_expert(
    results: *const sys::ggml_tensor,
    ids: *const sys::ggml_tensor,
    n1: usize,
    n_experts: usize,
    columns: &mut Vec<Column>,
    ends: &mut Vec<usize>,
) {
    // SAFETY: as the caller says; each place in the list is one that was counted.
    unsafe {
        let [used, n, ..] = (*ids).ne.map(|n| n as usize);
        let expert_of = |slot: usize, token: usize| {
            let id = (*ids).data.cast::<u8>().add(token * (*ids).nb[1]).cast::<i32>().add(slot).read();
            // Within bounds as the caller says, and without trust in it.
            (id as usize).min(n_experts - 1)
        };
        let all = || (0..n).flat_map(|token| (0..used).map(move |slot| (slot, token)));
        ends.clear();
        ends.resize(n_experts, 0);
        for (slot, token) in all() {
            ends[expert_of(slot, token)] += 1;
        }
        // Where each expert's columns begin, which moves to where they end.
        let mut start = 0;
        for count in ends.iter_mut() {
            start += std::mem::replace(count, start);
        }
        columns.clear();
        columns.resize(used * n, Column { vector: 0, results: std::ptr::null_mut() });
        for (slot, token) in all() {
            let place = &mut ends[expert_of(slot, token)];
            let results = (*results).data.cast::<u8>().add(slot * (*results).nb[1] + token * (*results).nb[2]);
            columns[*place] = Column { vector: slot % n1 + token * n1, results: results.cast() };
            *place += 1;
        }
    }
}
