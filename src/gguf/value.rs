//! Metadata values: views into the mapped file.

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// The type with this number in a file.
    pub(super) fn from_raw(raw: u32) -> Option<ValueType> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(usize::try_from(raw).ok()?).copied()
    }

    /// Bytes of one value; `None` for strings and arrays, whose size varies.
    pub(super) fn size(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }

    /// The type's short name, as GGUF tools print it.
    pub fn name(self) -> &'static str {
        use ValueType::*;
        match self {
            U8 => "u8",
            I8 => "i8",
            U16 => "u16",
            I16 => "i16",
            U32 => "u32",
            I32 => "i32",
            F32 => "f32",
            Bool => "bool",
            String => "str",
            Array => "arr",
            U64 => "u64",
            I64 => "i64",
            F64 => "f64",
        }
    }
}

/// A metadata value. Strings and arrays borrow from the file's memory map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// Text should be UTF-8, but the pieces of a vocabulary need not be.
    String(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// Decodes a value of fixed size or a string's content; `None` when `bytes` has another length, or for arrays.
    pub(super) fn decode(ty: ValueType, bytes: &'a [u8]) -> Option<Value<'a>> {
        Some(match ty {
            ValueType::U8 => Value::U8(u8::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::Bool => Value::Bool(u8::from_le_bytes(bytes.try_into().ok()?) != 0),
            ValueType::String => Value::String(bytes),
            ValueType::Array => return None,
            ValueType::U64 => Value::U64(u64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(bytes.try_into().ok()?)),
        })
    }

    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The number, for a value of any integer type that `T` can hold.
    pub fn to_int<T: TryFrom<i128>>(self) -> Option<T> {
        let wide: i128 = match self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        };
        T::try_from(wide).ok()
    }

    /// The number, for a finite value of a floating-point type.
    pub fn to_f32(self) -> Option<f32> {
        let value = match self {
            Value::F32(v) => v,
            Value::F64(v) => v as f32,
            _ => return None,
        };
        value.is_finite().then_some(value)
    }

    /// The type, with what distinguishes a value of it: for error messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Value::Array(array) => format!("an array of {} {}", array.len(), array.element_type().name()),
            Value::String(_) => "a string".to_owned(),
            Value::Bool(v) => format!("the bool {v}"),
            Value::F32(v) => format!("the f32 {v}"),
            Value::F64(v) => format!("the f64 {v}"),
            other => format!("the {} {}", other.value_type().name(), other.to_int::<i128>().unwrap_or_default()),
        }
    }
}

/// An array of metadata values, decoded element by element from the memory map.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'a> {
    ty: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    pub(super) fn new(ty: ValueType, len: usize, bytes: &'a [u8]) -> Self {
        Array { ty, len, bytes }
    }

    /// The type of every element.
    pub fn element_type(&self) -> ValueType {
        self.ty
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the array has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as they lie in the file; strings have their length in front.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements in order. Reaching the last string of a vocabulary means passing all before it.
    pub fn iter(&self) -> Elements<'a> {
        Elements { ty: self.ty, left: self.len, bytes: self.bytes }
    }
}

impl std::fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}; {}]", self.ty.name(), self.len)
    }
}

impl<'a> IntoIterator for Array<'a> {
    type Item = Value<'a>;
    type IntoIter = Elements<'a>;

    fn into_iter(self) -> Elements<'a> {
        self.iter()
    }
}

/// The elements of an [`Array`].
#[derive(Debug, Clone)]
pub struct Elements<'a> {
    ty: ValueType,
    left: usize,
    bytes: &'a [u8],
}

impl<'a> Iterator for Elements<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        let size = match self.ty.size() {
            Some(size) => size,
            None => {
                let (length, rest) = self.bytes.split_first_chunk()?;
                self.bytes = rest;
                usize::try_from(u64::from_le_bytes(*length)).ok()?
            }
        };
        let (element, rest) = self.bytes.split_at_checked(size)?;
        self.bytes = rest;
        Value::decode(self.ty, element)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // Each element takes at least one byte, so a wrong count cannot ask for more memory than the file has.
        (self.left.min(self.bytes.len()), Some(self.left))
    }
}
