//! Programs that were built for another llama.cpp. The structs that llama.h passes by value have no version in them, and
//! other fields there: read as ours, a flag is a pointer. What can be checked is, before anything is believed.
//!
//! The defaults have a stamp in bytes that no field has. A caller built for our revision gives it back with the struct; one
//! whose struct is shorter gives what happens to lie on its stack there.

use std::{ffi::c_void, mem::offset_of, ptr};

use ggml_sys as sys;

use crate::{
    border::{Failure, Result},
    upstream::{Crossing, Side},
};

/// Skips the checks, for a caller that is right and loses the stamp.
const VARIABLE: &str = "SIMLAYER_ANY_CALLER";

/// In the last two bytes that no field has.
const STAMP: [u8; 2] = [0xc3, 0x5a];

/// What every refusal says.
fn stranger(what: &str) -> Failure {
    Failure(format!(
        "simlayer is built for llama.cpp {}; this program was built for another (docs/c-abi.md, \"Versions\"): {what}",
        env!("LLAMA_VERSION")
    ))
}

/// A struct of llama.h as its bytes, which C passes as it passes the struct: both are too large for registers.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Bytes<const N: usize>([u8; N]);

const MODEL: usize = size_of::<sys::llama_model_params>();
const CONTEXT: usize = size_of::<sys::llama_context_params>();

impl<const N: usize> Bytes<N> {
    /// The bytes of a struct, with zeros and the stamp where no field is.
    ///
    /// # Safety
    /// `T` has N bytes, of which all but those in `gaps` are a field's.
    unsafe fn of<T>(value: T, gaps: &[(usize, usize)], stamp: usize) -> Bytes<N> {
        const { assert!(size_of::<T>() == N && align_of::<T>() <= align_of::<Bytes<N>>()) };
        let mut bytes = Bytes([0; N]);
        // SAFETY: it has room for one T, is aligned, and what is no field's is written again.
        unsafe { bytes.0.as_mut_ptr().cast::<T>().write(value) };
        for &(from, to) in gaps {
            // SAFETY: inside of the array. It is written as raw memory, since a gap may hold nothing yet.
            unsafe { ptr::write_bytes(bytes.0.as_mut_ptr().add(from), 0, to - from) };
        }
        bytes.0[stamp..stamp + STAMP.len()].copy_from_slice(&STAMP);
        bytes
    }

    fn i32(&self, at: usize) -> i32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        i32::from_ne_bytes(bytes)
    }

    fn f32(&self, at: usize) -> f32 {
        f32::from_bits(self.i32(at) as u32)
    }

    fn address(&self, at: usize) -> usize {
        let mut bytes = [0; size_of::<usize>()];
        bytes.copy_from_slice(&self.0[at..at + size_of::<usize>()]);
        usize::from_ne_bytes(bytes)
    }

    /// That the stamp is there, or zeros: who makes the struct without asking for defaults clears it first.
    fn stamp(&self, at: usize) -> Result<()> {
        match &self.0[at..at + STAMP.len()] {
            stamp if stamp == STAMP || stamp == [0; STAMP.len()] => Ok(()),
            _ => Err(stranger("its parameters lack what the defaults end with")),
        }
    }

    fn flags(&self, fields: &[(&str, usize)]) -> Result<()> {
        match fields.iter().find(|&&(_, at)| self.0[at] > 1) {
            Some((name, at)) => Err(stranger(&format!("{name} is {}, and neither true nor false", self.0[*at]))),
            None => Ok(()),
        }
    }

    fn numbers(&self, fields: &[(&str, usize, i32, i32)]) -> Result<()> {
        for &(name, at, least, most) in fields {
            let value = self.i32(at);
            if !(least..=most).contains(&value) {
                return Err(stranger(&format!("{name} is {value}")));
            }
        }
        Ok(())
    }

    /// That pointers are null, or lead to memory with room for one of what they point to.
    fn pointers(&self, fields: &[(&str, usize, usize)]) -> Result<()> {
        for &(name, at, n_bytes) in fields {
            let address = self.address(at);
            if address != 0 && !can_be_read(address, n_bytes) {
                return Err(stranger(&format!("{name} is {address:#x}, where no memory is")));
            }
        }
        Ok(())
    }
}

/// Whether there is memory of this process at the address. The system looks, so that a wrong one is an answer and no
/// crash; where it does not look for us, only what cannot be an address is told.
fn can_be_read(address: usize, n_bytes: usize) -> bool {
    const FIRST: usize = 0x1000;
    if address < FIRST {
        return false;
    }
    let mut bytes = [0u8; 16];
    let n_bytes = n_bytes.min(bytes.len());
    let to = libc::iovec { iov_base: bytes.as_mut_ptr().cast::<c_void>(), iov_len: n_bytes };
    let from = libc::iovec { iov_base: ptr::without_provenance_mut(address), iov_len: n_bytes };
    // SAFETY: writes into the local array only; an address that is none is an error.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) };
    // SAFETY: errno is this thread's.
    let error = unsafe { *libc::__errno_location() };
    n == n_bytes as isize || (n < 0 && error != libc::EFAULT)
}

fn is_checked() -> bool {
    std::env::var_os(VARIABLE).is_none_or(|value| value.is_empty() || value == "0")
}

macro_rules! field {
    ($of:ident . $name:ident) => {
        (stringify!($name), offset_of!(sys::$of, $name))
    };
    ($of:ident . $name:ident, $($with:expr),+) => {
        (stringify!($name), offset_of!(sys::$of, $name), $($with),+)
    };
}

/// Where no field is: behind `main_gpu`, and at the end.
const MODEL_STAMP: usize = offset_of!(sys::llama_model_params, load_mtp) + 1;
const MODEL_GAPS: [(usize, usize); 2] = [
    (offset_of!(sys::llama_model_params, main_gpu) + 4, offset_of!(sys::llama_model_params, tensor_split)),
    (MODEL_STAMP, MODEL),
];

/// Between the flags and the samplers.
const CONTEXT_STAMP: usize = offset_of!(sys::llama_context_params, kv_unified) + 1;
const CONTEXT_GAPS: [(usize, usize); 1] = [(CONTEXT_STAMP, offset_of!(sys::llama_context_params, samplers))];

// Where a later llama.h has a field in their place, the stamp has to go elsewhere.
const _: () = assert!(MODEL_STAMP + 2 == MODEL && MODEL_GAPS[0].0 + 4 == MODEL_GAPS[0].1);
const _: () = assert!(CONTEXT_STAMP + 2 == CONTEXT_GAPS[0].1);

fn check_model(bytes: &Bytes<MODEL>) -> Result<()> {
    bytes.pointers(&[
        field!(llama_model_params.devices, 8),
        field!(llama_model_params.tensor_buft_overrides, 16),
        field!(llama_model_params.tensor_split, 4),
        field!(llama_model_params.progress_callback, 1),
        field!(llama_model_params.kv_overrides, 8),
    ])?;
    bytes.numbers(&[
        field!(llama_model_params.split_mode, 0, sys::LLAMA_SPLIT_MODE_TENSOR as i32),
        field!(llama_model_params.load_mode, sys::LLAMA_LOAD_MODE_AUTO, sys::LLAMA_LOAD_MODE_DIRECT_IO),
        field!(llama_model_params.lazy_mode, 0, sys::LLAMA_LAZY_MODE_ON as i32),
    ])?;
    bytes.flags(&[
        field!(llama_model_params.vocab_only),
        field!(llama_model_params.check_tensors),
        field!(llama_model_params.use_extra_bufts),
        field!(llama_model_params.no_host),
        field!(llama_model_params.no_alloc),
        field!(llama_model_params.load_mtp),
    ])?;
    bytes.stamp(MODEL_STAMP)
}

fn check_context(bytes: &Bytes<CONTEXT>) -> Result<()> {
    bytes.pointers(&[
        field!(llama_context_params.cb_eval, 1),
        field!(llama_context_params.abort_callback, 1),
        field!(llama_context_params.samplers, 16),
    ])?;
    bytes.numbers(&[
        field!(llama_context_params.ctx_type, 0, sys::LLAMA_CONTEXT_TYPE_MTP as i32),
        field!(llama_context_params.rope_scaling_type, -1, sys::LLAMA_ROPE_SCALING_TYPE_MAX_VALUE),
        field!(llama_context_params.pooling_type, -1, sys::LLAMA_POOLING_TYPE_RANK),
        field!(llama_context_params.attention_type, -1, sys::LLAMA_ATTENTION_TYPE_NON_CAUSAL),
        field!(llama_context_params.flash_attn_type, -1, sys::LLAMA_FLASH_ATTN_TYPE_ENABLED),
        field!(llama_context_params.type_k, 0, sys::GGML_TYPE_COUNT as i32 - 1),
        field!(llama_context_params.type_v, 0, sys::GGML_TYPE_COUNT as i32 - 1),
    ])?;
    for (name, at) in [
        field!(llama_context_params.rope_freq_base),
        field!(llama_context_params.rope_freq_scale),
        field!(llama_context_params.yarn_ext_factor),
        field!(llama_context_params.yarn_attn_factor),
        field!(llama_context_params.yarn_beta_fast),
        field!(llama_context_params.yarn_beta_slow),
    ] {
        // A whole number that is read as one is all but zero.
        let value = bytes.f32(at);
        if !value.is_finite() || value.is_subnormal() {
            return Err(stranger(&format!("{name} is {value:e}")));
        }
    }
    bytes.flags(&[
        field!(llama_context_params.embeddings),
        field!(llama_context_params.offload_kqv),
        field!(llama_context_params.no_perf),
        field!(llama_context_params.op_offload),
        field!(llama_context_params.swa_full),
        field!(llama_context_params.kv_unified),
    ])?;
    bytes.stamp(CONTEXT_STAMP)
}

impl Crossing for sys::llama_model_params {
    type Raw = Bytes<MODEL>;

    fn read(raw: Self::Raw) -> Result<Self> {
        if is_checked() {
            check_model(&raw)?;
        }
        let mut raw = raw;
        // Rust must not see a flag that is none.
        for at in offset_of!(sys::llama_model_params, vocab_only)..MODEL_STAMP {
            raw.0[at] = u8::from(raw.0[at] != 0);
        }
        // SAFETY: as many bytes, aligned; any are numbers and pointers, and the flags are 0 or 1.
        Ok(unsafe { raw.0.as_ptr().cast::<Self>().read() })
    }

    fn raw(self) -> Self::Raw {
        // SAFETY: all but these are fields.
        unsafe { Bytes::of(self, &MODEL_GAPS, MODEL_STAMP) }
    }
}

impl Crossing for sys::llama_context_params {
    type Raw = Bytes<CONTEXT>;

    fn side(&self) -> Side {
        self.ctx_other.side()
    }

    /// Without samplers for its graph: those are known by their library's table of functions, and ours have ours.
    fn given(self) -> Self {
        sys::llama_context_params { samplers: ptr::null_mut(), n_samplers: 0, ..self }
    }

    fn read(raw: Self::Raw) -> Result<Self> {
        if is_checked() {
            check_context(&raw)?;
        }
        let mut raw = raw;
        for at in offset_of!(sys::llama_context_params, embeddings)..CONTEXT_STAMP {
            raw.0[at] = u8::from(raw.0[at] != 0);
        }
        // SAFETY: as above.
        Ok(unsafe { raw.0.as_ptr().cast::<Self>().read() })
    }

    fn raw(self) -> Self::Raw {
        // SAFETY: all but this is fields.
        unsafe { Bytes::of(self, &CONTEXT_GAPS, CONTEXT_STAMP) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(failure: Result<()>) -> String {
        failure.map_or_else(|Failure(why)| why, |()| "nothing is wrong".to_owned())
    }

    fn model_defaults() -> Bytes<MODEL> {
        crate::model::default_params().raw()
    }

    fn context_defaults() -> Bytes<CONTEXT> {
        crate::context::default_params().raw()
    }

    /// A struct of another revision: the bytes that its fields have, and behind it what happens to lie there.
    fn shorter(fields: &[(usize, &[u8])], behind: u8) -> Bytes<MODEL> {
        let mut bytes = Bytes([0; MODEL]);
        bytes.0[72..].fill(behind);
        for (at, field) in fields {
            bytes.0[*at..*at + field.len()].copy_from_slice(field);
        }
        bytes
    }

    #[test]
    fn ours_are_taken() {
        for (model, context) in [
            (model_defaults(), context_defaults()),
            // Of a caller that asks for no defaults.
            (Bytes([0; MODEL]), Bytes([0; CONTEXT])),
        ] {
            assert!(check_model(&model).is_ok() && check_context(&context).is_ok());
        }
        let split = [1.0f32, 2.0];
        let mut params = crate::model::default_params();
        params.tensor_split = split.as_ptr();
        params.vocab_only = true;
        assert!(check_model(&params.raw()).is_ok());
        let read = sys::llama_model_params::read(params.raw()).unwrap_or_else(|Failure(why)| panic!("{why}"));
        assert!(read.vocab_only && read.use_extra_bufts && !read.no_alloc && read.tensor_split == split.as_ptr());
    }

    /// llama-cpp-python 0.3.30: eight flags at 64, of which a pointer is made here.
    #[test]
    fn flags_are_no_pointer() {
        let flags = [0u8, 1, 0, 0, 0, 1, 0, 0];
        let why = why(check_model(&shorter(&[(64, &flags)], 0)));
        assert!(why.contains("kv_overrides is 0x10000000100, where no memory is"), "{why}");
        assert!(why.contains(concat!("simlayer is built for llama.cpp ", env!("LLAMA_VERSION"))), "{why}");
    }

    /// 0.3.35: the struct is shorter by the flags, in whose place the caller's stack is.
    #[test]
    fn what_lies_behind_is_no_flag() {
        assert!(why(check_model(&shorter(&[], 0xa0))).contains("vocab_only is 160"));
        // Flags by chance, but no stamp.
        assert!(why(check_model(&shorter(&[], 1))).contains("lack what the defaults end with"));
    }

    /// 0.3.30: one number less before the threads, so that all that follows lies four bytes earlier.
    #[test]
    fn shifted_numbers_are_told() {
        let ours = context_defaults();
        let at = offset_of!(sys::llama_context_params, n_outputs_max_per_seq);
        let mut theirs = ours;
        theirs.0.copy_within(at + 4..88, at);
        assert!(why(check_context(&theirs)).contains("is built for llama.cpp"));
        let mut flag = ours;
        flag.0[CONTEXT_STAMP - 1] = 2;
        assert!(why(check_context(&flag)).contains("kv_unified is 2, and neither true nor false"));
        let mut pointer = ours;
        let at = offset_of!(sys::llama_context_params, cb_eval);
        pointer.0[at..at + 8].copy_from_slice(&0x0101usize.to_ne_bytes());
        assert!(why(check_context(&pointer)).contains("cb_eval is 0x101, where no memory is"));
    }
}
