//! A model's copy with f32 weights.
//!
//! Matrix products with quantised weights quantise their inputs as well, to 8 bits: a difference in the last bit of an
//! attention result then becomes one of a hundredth, here and there. Two correct programs differ by some 0.002 in mean
//! KL so, too much to tell what else might differ. With f32 weights nothing is quantised, and nothing hides.

use std::path::{Path, PathBuf};

use simlayer::gguf::{Gguf, Value, ValueType};
use simlayer_testkit::{
    WeightType, dequantize,
    gguf::{GgufFile, Meta},
    smollm2_path,
};

/// SmolLM2 with f32 weights, made once.
pub fn smollm2_f32_path() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("SmolLM2-135M-Instruct.F32.gguf");
    if !path.exists() {
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        write_unquantized(&smollm2_path(), &partial);
        std::fs::rename(&partial, &path).expect("renamed");
    }
    path
}

/// Writes the model at `path` to `to`, with f32 weights.
pub fn write_unquantized(path: &Path, to: &Path) {
    unquantized(&Gguf::open(path).expect("the model")).write(to);
}

fn unquantized(file: &Gguf) -> GgufFile {
    let mut copy = GgufFile::new();
    for key in file.keys().filter(|key| *key != "general.alignment") {
        copy.set(key, meta(file.get(key).expect("a key's value")));
    }
    for info in file.tensors() {
        let values = dequantize(WeightType(info.ty.raw()), file.data(info));
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        copy.add_tensor(&info.name, WeightType::F32.0, &info.shape[..info.n_dims], data);
    }
    copy
}

fn meta(value: Value<'_>) -> Meta {
    match value {
        Value::U8(v) => Meta::U8(v),
        Value::I8(v) => Meta::I8(v),
        Value::U16(v) => Meta::U16(v),
        Value::I16(v) => Meta::I16(v),
        Value::U32(v) => Meta::U32(v),
        Value::I32(v) => Meta::I32(v),
        Value::F32(v) => Meta::F32(v),
        Value::Bool(v) => Meta::Bool(v),
        Value::String(v) => Meta::Str(v.to_vec()),
        Value::U64(v) => Meta::U64(v),
        Value::I64(v) => Meta::I64(v),
        Value::F64(v) => Meta::F64(v),
        // Elements of strings and numbers; nested arrays are not to be expected in a model.
        Value::Array(array) => {
            let elements: Vec<Meta> = array.iter().map(meta).collect();
            assert!(!elements.is_empty() && array.element_type() != ValueType::Array, "an unusual array");
            Meta::array(elements)
        }
    }
}
