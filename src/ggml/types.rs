//! Types of elements: ggml's, and those of caches that this crate adds.

use ggml_sys::{self as sys, checked};

use super::tiles;

/// A ggml element type, such as `f16` or `q4_0`; or one of tiles, which caches alone have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Type(u32);

impl Type {
    pub const F32: Type = Type(sys::GGML_TYPE_F32);
    pub const F16: Type = Type(sys::GGML_TYPE_F16);
    pub const BF16: Type = Type(sys::GGML_TYPE_BF16);
    pub const Q4_0: Type = Type(sys::GGML_TYPE_Q4_0);
    pub const Q4_1: Type = Type(sys::GGML_TYPE_Q4_1);
    pub const Q5_0: Type = Type(sys::GGML_TYPE_Q5_0);
    pub const Q5_1: Type = Type(sys::GGML_TYPE_Q5_1);
    pub const Q8_0: Type = Type(sys::GGML_TYPE_Q8_0);
    pub const Q4_K: Type = Type(sys::GGML_TYPE_Q4_K);
    pub const Q5_K: Type = Type(sys::GGML_TYPE_Q5_K);
    pub const Q6_K: Type = Type(sys::GGML_TYPE_Q6_K);
    pub const Q2_K: Type = Type(sys::GGML_TYPE_Q2_K);
    pub const Q3_K: Type = Type(sys::GGML_TYPE_Q3_K);
    pub const IQ4_XS: Type = Type(sys::GGML_TYPE_IQ4_XS);
    pub const MXFP4: Type = Type(sys::GGML_TYPE_MXFP4);
    pub const IQ4_NL: Type = Type(sys::GGML_TYPE_IQ4_NL);
    /// Tiles of two to four bits an element. The numbers are in states, and none of ggml's.
    pub const KVARN2: Type = Type(Type::TILES + 2);
    pub const KVARN3: Type = Type(Type::TILES + 3);
    pub const KVARN4: Type = Type(Type::TILES + 4);
    pub const I8: Type = Type(sys::GGML_TYPE_I8);
    pub const I32: Type = Type(sys::GGML_TYPE_I32);
    pub const I64: Type = Type(sys::GGML_TYPE_I64);

    /// The types a KV cache can have: those that llama.cpp's `--cache-type-k` lists, and tiles.
    pub const CACHE: [Type; 12] = [
        Type::F32,
        Type::F16,
        Type::BF16,
        Type::Q8_0,
        Type::Q4_0,
        Type::Q4_1,
        Type::IQ4_NL,
        Type::Q5_0,
        Type::Q5_1,
        Type::KVARN4,
        Type::KVARN3,
        Type::KVARN2,
    ];

    const TILES: u32 = 0x4b56_0000;

    /// Bits of a code, of a type of tiles.
    pub(crate) fn tile_bits(self) -> Option<usize> {
        (Type::KVARN2.0..=Type::KVARN4.0).contains(&self.0).then(|| (self.0 - Type::TILES) as usize)
    }

    /// Whether keys or values are in tiles.
    pub(crate) fn is_tiles(self) -> bool {
        self.tile_bits().is_some()
    }

    /// The cache type with this number, which for types of ggml is that of a GGUF file.
    pub(crate) fn cache_type_from_raw(raw: u32) -> Option<Type> {
        Type::CACHE.into_iter().find(|ty| ty.0 == raw)
    }

    /// The type with this number in a GGUF file; `None` for a number that ggml does not know or has removed.
    pub fn from_raw(raw: u32) -> Option<Type> {
        if raw >= sys::GGML_TYPE_COUNT {
            return None;
        }
        let ty = Type(raw);
        // Removed types keep their number in ggml's table, with a block size of zero.
        (ty.block_size() > 0 && ty.block_bytes() > 0).then_some(ty)
    }

    /// The number that stands for this type in a GGUF file.
    pub fn raw(self) -> u32 {
        self.0
    }

    /// The cache type of this name ("f16", "q4_0", …).
    pub fn cache_type_from_name(name: &str) -> Option<Type> {
        Type::CACHE.into_iter().find(|ty| ty.name() == name)
    }

    /// Cache types of keys and values: `T` for both, or `K/V`.
    pub fn cache_types_from_name(text: &str) -> Option<(Type, Type)> {
        let (k, v) = text.split_once('/').unwrap_or((text, text));
        Some((Type::cache_type_from_name(k)?, Type::cache_type_from_name(v)?))
    }

    /// The names of the cache types, for messages.
    pub fn cache_type_names() -> String {
        Type::CACHE.map(Type::name).join(", ")
    }

    /// The type's name, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Type::KVARN2 => "kvarn2",
            Type::KVARN3 => "kvarn3",
            Type::KVARN4 => "kvarn4",
            Type(raw) => checked::type_name(raw),
        }
    }

    /// Elements in a block: a row's length must be a multiple of it.
    pub fn block_size(self) -> usize {
        if self.is_tiles() { tiles::BLOCK } else { checked::type_block_size(self.0) }
    }

    /// Bytes of a block; of tiles, of its codes alone.
    pub fn block_bytes(self) -> usize {
        match self.tile_bits() {
            Some(bits) => tiles::BLOCK / 8 * bits,
            None => checked::type_block_bytes(self.0),
        }
    }

    /// Bytes of a row of `n` elements, `n` being a multiple of the block size; of tiles, a head's share of the tile.
    pub fn row_bytes(self, n: usize) -> usize {
        match self.tile_bits() {
            Some(bits) => tiles::Layout { bits, size: n }.bytes() / tiles::TILE,
            None => n / self.block_size() * self.block_bytes(),
        }
    }

    /// Whether a matrix of this type can be multiplied and its rows looked up.
    pub fn is_weight_type(self) -> bool {
        if self == Type::F32 {
            return true;
        }
        // SAFETY: tables look-ups with a number below GGML_TYPE_COUNT; the entries live as long as the process.
        unsafe {
            let to_float = (*sys::ggml_get_type_traits(self.0)).to_float;
            let dot = (*sys::ggml_get_type_traits_cpu(self.0)).vec_dot;
            to_float.is_some() && dot.is_some()
        }
    }

    /// Whether rows are stored in blocks with a common scale.
    pub fn is_quantized(self) -> bool {
        // SAFETY: a table look-up with a number below GGML_TYPE_COUNT.
        self.is_tiles() || unsafe { sys::ggml_is_quantized(self.0) }
    }
}

impl std::fmt::Debug for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_names() {
        assert_eq!((Type::F16.name(), Type::F16.row_bytes(64)), ("f16", 128));
        assert_eq!((Type::Q4_0.block_size(), Type::Q4_0.row_bytes(64)), (32, 36));
        assert_eq!(Type::cache_type_from_name("q5_1"), Some(Type::Q5_1));
        assert_eq!(Type::cache_type_from_name("q3_k"), None);
    }

    #[test]
    fn removed_and_unknown_numbers_are_no_types() {
        // 4 and 5 were q4_2 and q4_3.
        for raw in [4, 5, 1000, u32::MAX] {
            assert_eq!(Type::from_raw(raw), None, "{raw}");
        }
        assert_eq!(Type::from_raw(0), Some(Type::F32));
    }
}
