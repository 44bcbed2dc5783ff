//! How weights are stored: a type is a small file here, and a line in `kernel`.
//!
//! A kernel sees rows as steps of 64 or 256 elements, in groups of 32 or 16 that share a scale. An element is its number
//! less the offset, times the scale, plus the minimum. `q4_k_x8` is as ggml repacks q4_K: eight rows together.

mod format;
mod iq4_nl;
mod iq4_xs;
mod legacy;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_k;
pub(super) mod q4_k_x8;
mod q5_k;
mod q6_k;

pub(super) use self::{
    format::{Format, Layout, Scales},
    iq4_nl::IQ4_NL,
    iq4_xs::IQ4_XS,
    legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0},
    mxfp4::Mxfp4,
    q2_k::Q2_K,
    q3_k::Q3_K,
    q4_k::Q4_K,
    q4_k_x8::Q4_Kx8,
    q5_k::Q5_K,
    q6_k::Q6_K,
};
