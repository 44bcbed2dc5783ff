use std::ffi::CStr;

use ggml_sys as sys;

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
        self.check();
        // SAFETY: the number is that of a type, so ggml has a static C string for it.
        unsafe { CStr::from_ptr(sys::ggml_type_name(self.0)) }.to_str().expect("ggml's names are ASCII")
    }

    /// Elements per block; a row is a whole number of blocks.
    pub fn block_size(self) -> usize {
        self.check();
        // SAFETY: a table look-up with the number of a type.
        unsafe { sys::ggml_blck_size(self.0) as usize }
    }

    /// Bytes of `n` elements.
    pub fn bytes(self, n: usize) -> usize {
        assert_eq!(n % self.block_size(), 0, "{n} elements do not fill blocks of {}", self.name());
        // SAFETY: a table look-up with the number of a type.
        n / self.block_size() * unsafe { sys::ggml_type_size(self.0) }
    }

    fn check(self) {
        assert!(self.0 < sys::GGML_TYPE_COUNT, "{} is no ggml type", self.0);
    }
}

impl std::fmt::Debug for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rows of `row` values in a weight type, by ggml's own quantiser.
pub fn quantize(ty: WeightType, values: &[f32], row: usize) -> Vec<u8> {
    assert!(row > 0 && values.len().is_multiple_of(row), "{} values are no rows of {row}", values.len());
    assert_eq!(row % ty.block_size(), 0, "rows of {row} do not fill blocks of {}", ty.name());
    let rows = values.len() / row;
    let mut bytes = vec![0u8; ty.bytes(values.len())];
    // Some types want to know how much each column matters: all alike.
    let importance = vec![1f32; row];
    // SAFETY: `values` holds rows × row floats, `importance` row floats, and `bytes` what rows × row elements take;
    // the asserts above are what ggml asks of the row length.
    let written = unsafe {
        let importance = if sys::ggml_quantize_requires_imatrix(ty.0) { importance.as_ptr() } else { std::ptr::null() };
        let out = bytes.as_mut_ptr().cast();
        sys::ggml_quantize_chunk(ty.0, values.as_ptr(), out, 0, rows as i64, row as i64, importance)
    };
    assert_eq!(written, bytes.len(), "ggml wrote another size for {}", ty.name());
    bytes
}
