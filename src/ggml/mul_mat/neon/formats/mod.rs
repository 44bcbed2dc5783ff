//! How weights are stored: a type is a small file here, or a few lines of one, and a line in `kernel`.
//!
//! A kernel sees rows as steps of 64 or 256 elements, in groups of 32 or 16 that share a scale. An element is its number
//! times the scale, plus the minimum.

mod format;
mod k_quants;
mod legacy;
mod tables;

pub(in super::super) use self::{
    format::{Format, Layout},
    k_quants::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K},
    legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0},
    tables::{IQ4_NL, IQ4_XS, Mxfp4},
};
