//! Products of weights and vectors, of experts too: an operation of our own.
//!
//! As in ggml, activations are quantised to eight bits in blocks of 32 and products are summed as integers; k-quants, for
//! which ggml takes blocks of 256, are multiplied with blocks of 32, too. Scales stay in f32, and weights are unpacked once for
//! several vectors. Many vectors are taken in slices that stay in the second-level cache. Weights that are floats are multiplied
//! with few vectors only.
//!
//! `formats` has the types of weights, a small file each; `avx2` and `vnni` (AVX-512) multiply any of them, `run` says in
//! which order; `floats` is apart. `neon` has all that for 64-bit Arm. `node` adds products to a graph. Where the processor has
//! none of these, ggml's operation is used.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code, reason = "no kernels"))]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod floats;
#[cfg(target_arch = "x86_64")]
mod formats;
mod input;
mod kernel;
#[cfg(target_arch = "aarch64")]
mod neon;
mod node;
mod product;
#[cfg(target_arch = "x86_64")]
mod quantize;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod run;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub(super) use self::input::Scheme;
pub(super) use self::kernel::Kernel;
#[cfg(target_arch = "aarch64")]
use self::neon::{formats, kernel};
#[cfg(target_arch = "x86_64")]
pub(super) use self::quantize::quantize_block;
use super::{Tensor, Type, processor::Features};

/// The kernel for weights of this type, as in a file or as ggml repacks them, with these features; `None` where ggml's is used.
#[cfg(target_arch = "x86_64")]
fn kernel(ty: Type, is_repacked: bool, features: Features) -> Option<&'static Kernel> {
    use self::{
        avx2::{Avx2, AvxVnni},
        formats::*,
        quantize::quantize,
        run::Kernels,
        run::run,
        vnni::Vnni,
    };
    struct Of<K, F>(std::marker::PhantomData<(K, F)>);
    impl<K: Kernels<F>, F: Layout> Of<K, F> {
        const KERNEL: &Kernel =
            &Kernel { run: run::<K, F>, quantize, scheme: F::SCHEME, step: F::STEP, max_tokens: usize::MAX };
    }
    fn of<F: Layout>(features: Features) -> Option<&'static Kernel>
    where
        Avx2: Kernels<F>,
        AvxVnni: Kernels<F>,
        Vnni: Kernels<F>,
    {
        match features {
            Features::Portable => None,
            Features::AvxVnni => Some(Of::<AvxVnni, F>::KERNEL),
            Features::Avx2 | Features::Avx512 => Some(Of::<Avx2, F>::KERNEL),
            Features::Avx512Vnni => Some(Of::<Vnni, F>::KERNEL),
        }
    }
    match ty {
        Type::Q4_K if is_repacked => of::<Q4_Kx8>(features),
        _ if is_repacked => None,
        Type::F16 => floats::kernel::<floats::F16>(features),
        Type::BF16 => floats::kernel::<floats::Bf16>(features),
        Type::Q4_0 => of::<Q4_0>(features),
        Type::Q4_1 => of::<Q4_1>(features),
        Type::Q5_0 => of::<Q5_0>(features),
        Type::Q5_1 => of::<Q5_1>(features),
        Type::Q8_0 => of::<Q8_0>(features),
        Type::Q4_K => of::<Q4_K>(features),
        Type::Q5_K => of::<Q5_K>(features),
        Type::Q6_K => of::<Q6_K>(features),
        Type::Q2_K => of::<Q2_K>(features),
        Type::Q3_K => of::<Q3_K>(features),
        Type::IQ4_NL => of::<IQ4_NL>(features),
        Type::IQ4_XS => of::<IQ4_XS>(features),
        Type::MXFP4 => of::<Mxfp4>(features),
        _ => None,
    }
}

/// The kernel for weights of this type, as in a file or as ggml repacks them, with these features; `None` where ggml's is used.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn kernel(_: Type, _: bool, _: Features) -> Option<&'static Kernel> {
    None
}

/// Whether weights of this type, in rows of `k`, are multiplied by a kernel of our own as a file has them and not as ggml
/// repacks them. It is faster than ggml's for those.
pub(crate) fn multiplies_as_stored(ty: Type, k: usize) -> bool {
    // Nobody has timed ours against ggml's there.
    if cfg!(target_arch = "aarch64") {
        return false;
    }
    let [stored, repacked] = [false, true].map(|is_repacked| kernel(ty, is_repacked, Features::detect()));
    repacked.is_none() && stored.is_some_and(|kernel| k.is_multiple_of(kernel.step))
}

impl Kernel {
    /// The kernel for `weight [k, rows] × input [k, n]`, where there is one.
    pub fn of_matrix(weight: &Tensor, input: &Tensor, features: Features) -> Option<&'static Kernel> {
        let ([_, _, experts, w3], [_, _, i2, i3]) = (weight.shape(), input.shape());
        let n = input.shape()[1];
        Kernel::find(weight, input, n, features).filter(|_| [experts, w3, i2, i3] == [1; 4])
    }

    /// The kernel for experts' weights `[k, rows, experts]` and `input [k, 1 or used, n]`, as `ids [used, n]` (i32) choose
    /// them, where there is one.
    pub fn of_experts(weight: &Tensor, input: &Tensor, ids: &Tensor, features: Features) -> Option<&'static Kernel> {
        let ([.., w3], [_, i1, i2, i3], [used, n, id2, id3]) = (weight.shape(), input.shape(), ids.shape());
        let fits = (i1 == 1 || i1 == used) && i2 == n && [w3, i3, id2, id3] == [1; 4] && used > 0;
        let is_plain = ids.ty() == Type::I32 && ids.strides()[0] == size_of::<i32>();
        Kernel::find(weight, input, n, features).filter(|_| fits && is_plain)
    }

    fn find(weight: &Tensor, input: &Tensor, tokens: usize, features: Features) -> Option<&'static Kernel> {
        let (k, is_repacked) = (weight.shape()[0], weight.is_repacked());
        let is_plain = input.ty() == Type::F32 && input.strides()[0] == size_of::<f32>() && input.shape()[0] == k;
        let is_empty = [weight, input].iter().any(|tensor| tensor.shape().contains(&0));
        let is_reached = (is_repacked || weight.is_host()) && weight.strides()[0] == weight.ty().block_bytes();
        let kernel = kernel(weight.ty(), is_repacked, features)?;
        (k.is_multiple_of(kernel.step) && tokens <= kernel.max_tokens && is_plain && !is_empty && is_reached)
            .then_some(kernel)
    }
}
