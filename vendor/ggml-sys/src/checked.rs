//! The few functions that can be called safely once their arguments are checked: element types and quantising. For
//! programs that need no more of ggml than that.

use std::ffi::CStr;

fn check(ty: u32) {
    assert!(ty < crate::GGML_TYPE_COUNT, "{ty} is no ggml type");
}

/// ggml's name of a type, in small letters.
///
/// # Panics
/// When the number is no type's.
pub fn type_name(ty: u32) -> &'static str {
    check(ty);
    // SAFETY: the number is that of a type, so ggml has a static C string for it.
    unsafe { CStr::from_ptr(crate::ggml_type_name(ty)) }.to_str().unwrap_or("?")
}

/// Elements in a block of a type.
///
/// # Panics
/// When the number is no type's.
pub fn type_block_size(ty: u32) -> usize {
    check(ty);
    // SAFETY: a table look-up with the number of a type.
    usize::try_from(unsafe { crate::ggml_blck_size(ty) }).unwrap_or(0)
}

/// Bytes of a block of a type.
///
/// # Panics
/// When the number is no type's.
pub fn type_block_bytes(ty: u32) -> usize {
    check(ty);
    // SAFETY: a table look-up with the number of a type.
    unsafe { crate::ggml_type_size(ty) }
}

/// Bytes of `n` elements, which are a whole number of blocks.
///
/// # Panics
/// When the number is no type's, or the elements do not fill blocks.
pub fn type_bytes(ty: u32, n: usize) -> usize {
    let block = type_block_size(ty);
    assert!(block > 0 && n.is_multiple_of(block), "{n} elements do not fill blocks of {}", type_name(ty));
    n / block * type_block_bytes(ty)
}

/// Rows of `row` values in a type, by ggml's own quantiser, every column mattering alike.
///
/// # Panics
/// When the number is no type's, the values are no rows of that length, or a row does not fill blocks.
pub fn quantize(ty: u32, values: &[f32], row: usize) -> Vec<u8> {
    assert!(row > 0 && values.len().is_multiple_of(row), "{} values are no rows of {row}", values.len());
    let row_bytes = type_bytes(ty, row);
    let rows = values.len() / row;
    let mut bytes = vec![0u8; rows * row_bytes];
    let importance = vec![1f32; row];
    // SAFETY: `values` holds rows × row floats, `importance` row floats, and `bytes` what rows × row elements take;
    // the checks above are what ggml asks of type and row length.
    let written = unsafe {
        let importance = if crate::ggml_quantize_requires_imatrix(ty) { importance.as_ptr() } else { std::ptr::null() };
        let out = bytes.as_mut_ptr().cast();
        crate::ggml_quantize_chunk(ty, values.as_ptr(), out, 0, rows as i64, row as i64, importance)
    };
    assert_eq!(written, bytes.len(), "ggml wrote another size for {}", type_name(ty));
    bytes
}

/// Values of a type's blocks, by ggml's own conversion.
///
/// # Panics
/// When the number is no type's or ggml cannot convert it, or the bytes are no whole blocks.
pub fn dequantize(ty: u32, bytes: &[u8]) -> Vec<f32> {
    let block_bytes = type_block_bytes(ty);
    assert!(bytes.len().is_multiple_of(block_bytes), "{} bytes are no blocks of {}", bytes.len(), type_name(ty));
    let n = bytes.len() / block_bytes * type_block_size(ty);
    let mut values = vec![0f32; n];
    if ty == crate::GGML_TYPE_F32 {
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_ne_bytes(*bytes);
        }
        return values;
    }
    // SAFETY: a table look-up with the number of a type; the entry lives as long as the process.
    let to_float = unsafe { (*crate::ggml_get_type_traits(ty)).to_float };
    let Some(to_float) = to_float else { panic!("{} cannot be converted", type_name(ty)) };
    // SAFETY: `bytes` holds the blocks of `n` elements, `values` has room for as many.
    unsafe { to_float(bytes.as_ptr().cast(), values.as_mut_ptr(), n as i64) };
    values
}
