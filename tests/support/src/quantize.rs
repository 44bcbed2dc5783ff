//! Weight types by ggml's numbers, and its own conversions to and from them.

use ggml_sys::{self as sys, checked};

/// A ggml type that weights are stored in: its number in GGUF files.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct WeightType(pub u32);

impl WeightType {
    pub const F32: WeightType = WeightType(sys::GGML_TYPE_F32);
    pub const F16: WeightType = WeightType(sys::GGML_TYPE_F16);
    pub const BF16: WeightType = WeightType(sys::GGML_TYPE_BF16);
    pub const Q4_0: WeightType = WeightType(sys::GGML_TYPE_Q4_0);
    pub const Q4_1: WeightType = WeightType(sys::GGML_TYPE_Q4_1);
    pub const Q5_0: WeightType = WeightType(sys::GGML_TYPE_Q5_0);
    pub const Q5_1: WeightType = WeightType(sys::GGML_TYPE_Q5_1);
    pub const Q8_0: WeightType = WeightType(sys::GGML_TYPE_Q8_0);
    pub const Q2_K: WeightType = WeightType(sys::GGML_TYPE_Q2_K);
    pub const Q3_K: WeightType = WeightType(sys::GGML_TYPE_Q3_K);
    pub const Q4_K: WeightType = WeightType(sys::GGML_TYPE_Q4_K);
    pub const Q5_K: WeightType = WeightType(sys::GGML_TYPE_Q5_K);
    pub const Q6_K: WeightType = WeightType(sys::GGML_TYPE_Q6_K);
    pub const IQ4_NL: WeightType = WeightType(sys::GGML_TYPE_IQ4_NL);
    pub const IQ4_XS: WeightType = WeightType(sys::GGML_TYPE_IQ4_XS);
    pub const MXFP4: WeightType = WeightType(sys::GGML_TYPE_MXFP4);

    /// The types that the logits are compared for.
    pub const ALL: [WeightType; 15] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::BF16,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::Q8_0,
        WeightType::Q2_K,
        WeightType::Q3_K,
        WeightType::Q4_K,
        WeightType::Q5_K,
        WeightType::Q6_K,
        WeightType::IQ4_NL,
        WeightType::IQ4_XS,
    ];

    /// ggml's name of the type.
    pub fn name(self) -> &'static str {
        checked::type_name(self.0)
    }

    /// Elements per block; a row is a whole number of blocks.
    pub fn block_size(self) -> usize {
        checked::type_block_size(self.0)
    }

    /// Bytes of `n` elements.
    pub fn bytes(self, n: usize) -> usize {
        checked::type_bytes(self.0, n)
    }
}

impl std::fmt::Debug for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rows of `row` values in a weight type, by ggml's own quantiser.
pub fn quantize(ty: WeightType, values: &[f32], row: usize) -> Vec<u8> {
    checked::quantize(ty.0, values, row)
}

/// The values of a weight's blocks.
pub fn dequantize(ty: WeightType, bytes: &[u8]) -> Vec<f32> {
    checked::dequantize(ty.0, bytes)
}
