//! Products of a quantised matrix and vectors: an operation of our own.
//!
//! As in ggml, activations are quantised to eight bits in blocks of 32 and products are summed as integers; k-quants, for
//! which ggml takes blocks of 256, are multiplied with blocks of 32, too. Scales stay in f32, each thread quantises the
//! input for itself, so that no thread waits for another before the product, and weights are unpacked once for several
//! vectors. Many vectors are taken in slices that stay in the second-level cache.
//!
//! `formats` has the types of weights, a small file each; `avx2` and `vnni` (AVX-512) multiply any of them, `run` says in
//! which order. Where the processor has neither, ggml's operation is used.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod formats;
#[cfg(target_arch = "x86_64")]
mod input;
mod product;
#[cfg(target_arch = "x86_64")]
mod run;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ffi::c_void;

use ggml_sys as sys;

#[cfg(target_arch = "x86_64")]
pub(super) use self::input::quantize_block;
use self::product::{Product, ROWS};
use super::{Tensor, Type, processor::Features};

/// Multiplies one thread's share. The pointers must be good for what the fields say, and the processor must have the
/// features that the function is for.
type Run = unsafe fn(&Product);

/// A kernel for weights of one type, and elements of which a row must have a multiple.
#[derive(Clone, Copy)]
struct Kernel {
    run: Run,
    step: usize,
}

/// The kernel for weights of this type, as in a file or as ggml repacks them, with these features; `None` where ggml's is used.
#[cfg(target_arch = "x86_64")]
fn kernel(ty: Type, is_repacked: bool, features: Features) -> Option<Kernel> {
    use self::{avx2::Avx2, formats::*, run::Kernels, run::run, vnni::Vnni};
    fn of<F: Layout>(features: Features) -> Option<Kernel>
    where
        Avx2: Kernels<F>,
        Vnni: Kernels<F>,
    {
        let run: Run = match features {
            Features::Portable => return None,
            Features::Avx2 | Features::Avx512 => run::<Avx2, F>,
            Features::Avx512Vnni => run::<Vnni, F>,
        };
        Some(Kernel { run, step: F::STEP })
    }
    match ty {
        Type::Q4_K if is_repacked => of::<Q4_Kx8>(features),
        _ if is_repacked => None,
        Type::Q4_0 => of::<Q4_0>(features),
        Type::Q4_1 => of::<Q4_1>(features),
        Type::Q5_0 => of::<Q5_0>(features),
        Type::Q5_1 => of::<Q5_1>(features),
        Type::Q8_0 => of::<Q8_0>(features),
        Type::Q4_K => of::<Q4_K>(features),
        Type::Q5_K => of::<Q5_K>(features),
        Type::Q6_K => of::<Q6_K>(features),
        _ => None,
    }
}

/// The kernel for weights of this type, as in a file or as ggml repacks them, with these features; `None` where ggml's is used.
#[cfg(not(target_arch = "x86_64"))]
fn kernel(_: Type, _: bool, _: Features) -> Option<Kernel> {
    None
}

/// Whether [`add`] can multiply these with a kernel for these features.
pub(super) fn applies(weight: &Tensor, input: &Tensor, features: Features) -> bool {
    let ([k, n_rows, w2, w3], [_, n, i2, i3]) = (weight.shape(), input.shape());
    let is_plain = [w2, w3, i2, i3] == [1; 4] && input.ty() == Type::F32 && input.strides()[0] == size_of::<f32>();
    let is_repacked = weight.is_repacked();
    kernel(weight.ty(), is_repacked, features).is_some_and(|kernel| k.is_multiple_of(kernel.step))
        && is_plain
        && n > 0
        && n_rows > 0
        && k > 0
        && (is_repacked || weight.is_host())
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
    let run = kernel(weight.ty(), weight.is_repacked(), features)
        .map_or(std::ptr::null_mut(), |kernel| kernel.run as *mut c_void);
    // SAFETY: as the caller says; what the callback is given is the function that it takes it for.
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
            Some(callback),
            sys::GGML_N_TASKS_MAX,
            run,
        )
    }
}

unsafe extern "C" fn callback(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, run: *mut c_void) {
    // SAFETY: ggml runs nodes that `add` made, while their tensors have memory; its caller has the features, and there
    // was a kernel for them.
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
        std::mem::transmute::<*mut c_void, Run>(run)(&product);
    }
}
