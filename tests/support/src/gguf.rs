//! A GGUF writer that writes whatever it is told, right or wrong.

use std::{fs, ops::Range, path::Path, path::PathBuf};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Meta {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(Vec<u8>),
    /// The number of the elements' type, and the elements.
    Array(u32, Vec<Meta>),
    U64(u64),
    I64(i64),
    F64(f64),
    /// A type's number and the bytes after it, as they are.
    Raw(u32, Vec<u8>),
}

/// The numbers of some value types.
pub const TYPE_U32: u32 = 4;
pub const TYPE_I32: u32 = 5;
pub const TYPE_F32: u32 = 6;
pub const TYPE_STR: u32 = 8;
pub const TYPE_ARRAY: u32 = 9;

macro_rules! meta_from {
    ($($from:ty => $variant:ident),*) => {
        $(impl From<$from> for Meta {
            fn from(value: $from) -> Meta {
                Meta::$variant(value.into())
            }
        })*
    };
}
meta_from!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool, &str => Str,
    String => Str, Vec<u8> => Str, u64 => U64, i64 => I64, f64 => F64);

impl Meta {
    /// An array of numbers or strings.
    pub fn array<T: Into<Meta>>(elements: impl IntoIterator<Item = T>) -> Meta {
        let elements: Vec<Meta> = elements.into_iter().map(Into::into).collect();
        Meta::Array(elements.first().map_or(TYPE_U32, Meta::type_number), elements)
    }

    fn type_number(&self) -> u32 {
        match self {
            Meta::U8(_) => 0,
            Meta::I8(_) => 1,
            Meta::U16(_) => 2,
            Meta::I16(_) => 3,
            Meta::U32(_) => TYPE_U32,
            Meta::I32(_) => TYPE_I32,
            Meta::F32(_) => TYPE_F32,
            Meta::Bool(_) => 7,
            Meta::Str(_) => TYPE_STR,
            Meta::Array(..) => TYPE_ARRAY,
            Meta::U64(_) => 10,
            Meta::I64(_) => 11,
            Meta::F64(_) => 12,
            Meta::Raw(number, _) => *number,
        }
    }

    fn write(&self, out: &mut Output) {
        match self {
            Meta::U8(v) => out.bytes(&v.to_le_bytes()),
            Meta::I8(v) => out.bytes(&v.to_le_bytes()),
            Meta::U16(v) => out.bytes(&v.to_le_bytes()),
            Meta::I16(v) => out.bytes(&v.to_le_bytes()),
            Meta::U32(v) => out.bytes(&v.to_le_bytes()),
            Meta::I32(v) => out.bytes(&v.to_le_bytes()),
            Meta::F32(v) => out.bytes(&v.to_le_bytes()),
            Meta::Bool(v) => out.bytes(&[u8::from(*v)]),
            Meta::Str(v) => out.string(v),
            Meta::Array(element, elements) => {
                out.field(FieldKind::Type, &element.to_le_bytes());
                out.field(FieldKind::Count, &(elements.len() as u64).to_le_bytes());
                for element in elements {
                    element.write(out);
                }
            }
            Meta::U64(v) => out.bytes(&v.to_le_bytes()),
            Meta::I64(v) => out.bytes(&v.to_le_bytes()),
            Meta::F64(v) => out.bytes(&v.to_le_bytes()),
            Meta::Raw(_, bytes) => out.bytes(bytes),
        }
    }
}

/// A tensor as it will stand in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// ggml's number of the type.
    pub ty: u32,
    pub dims: Vec<u64>,
    pub data: Vec<u8>,
    /// The offset to write; the true one when `None`.
    pub offset: Option<u64>,
}

/// What a field of the header means, for mutations that know the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldKind {
    Magic,
    Version,
    /// The number of keys, tensors, dimensions or array elements.
    Count,
    /// The number of bytes of a string.
    Length,
    /// The type of a value or tensor.
    Type,
    Dimension,
    Offset,
    /// The bytes of a metadata value.
    Value,
}

/// A field of the header and its place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub kind: FieldKind,
    pub range: Range<usize>,
}

/// A GGUF file to be written. All members may be set to wrong values.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufFile {
    pub magic: [u8; 4],
    pub version: u32,
    /// The counts to write; the true ones when `None`.
    pub n_tensors: Option<u64>,
    pub n_keys: Option<u64>,
    pub keys: Vec<(Vec<u8>, Meta)>,
    pub tensors: Vec<Tensor>,
}

impl Default for GgufFile {
    fn default() -> GgufFile {
        let (keys, tensors) = (Vec::new(), Vec::new());
        GgufFile { magic: *b"GGUF", version: 3, n_tensors: None, n_keys: None, keys, tensors }
    }
}

impl GgufFile {
    /// An empty file of version 3.
    pub fn new() -> GgufFile {
        GgufFile::default()
    }

    /// Sets a key, in place when it is already there.
    pub fn set(&mut self, key: &str, value: impl Into<Meta>) -> &mut Self {
        let value = value.into();
        match self.keys.iter_mut().find(|(name, _)| name == key.as_bytes()) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.into(), value)),
        }
        self
    }

    /// Removes a key, which must be there.
    pub fn remove(&mut self, key: &str) -> &mut Self {
        let index = self.keys.iter().position(|(name, _)| name == key.as_bytes());
        self.keys.remove(index.unwrap_or_else(|| panic!("no key {key}")));
        self
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Meta> {
        self.keys.iter().find(|(name, _)| name == key.as_bytes()).map(|(_, value)| value)
    }

    /// Adds a tensor.
    pub fn add_tensor(&mut self, name: &str, ty: u32, dims: &[u64], data: Vec<u8>) -> &mut Self {
        self.tensors.push(Tensor { name: name.into(), ty, dims: dims.to_vec(), data, offset: None });
        self
    }

    /// The tensor of this name, which must be there.
    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        let tensor = self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes());
        tensor.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Removes a tensor, which must be there.
    pub fn remove_tensor(&mut self, name: &str) -> &mut Self {
        let before = self.tensors.len();
        self.tensors.retain(|tensor| tensor.name != name.as_bytes());
        assert_ne!(before, self.tensors.len(), "no tensor {name}");
        self
    }

    /// `general.alignment` where it is a sensible one, else GGUF's default.
    fn alignment(&self) -> usize {
        match self.get("general.alignment") {
            Some(Meta::U32(alignment)) if alignment.is_power_of_two() => *alignment as usize,
            _ => 32,
        }
    }

    /// The file's bytes, and where its fields lie. Nothing follows the last tensor.
    pub fn to_bytes_and_fields(&self) -> (Vec<u8>, Vec<Field>) {
        let alignment = self.alignment();
        let mut out = Output::default();
        out.field(FieldKind::Magic, &self.magic);
        out.field(FieldKind::Version, &self.version.to_le_bytes());
        let n_tensors = self.n_tensors.unwrap_or(self.tensors.len() as u64);
        let n_keys = self.n_keys.unwrap_or(self.keys.len() as u64);
        out.field(FieldKind::Count, &n_tensors.to_le_bytes());
        out.field(FieldKind::Count, &n_keys.to_le_bytes());
        for (key, value) in &self.keys {
            out.string(key);
            out.field(FieldKind::Type, &value.type_number().to_le_bytes());
            let start = out.bytes.len();
            value.write(&mut out);
            out.fields.push(Field { kind: FieldKind::Value, range: start..out.bytes.len() });
        }
        let mut end = 0;
        for tensor in &self.tensors {
            out.string(&tensor.name);
            out.field(FieldKind::Count, &(tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                out.field(FieldKind::Dimension, &dim.to_le_bytes());
            }
            out.field(FieldKind::Type, &tensor.ty.to_le_bytes());
            out.field(FieldKind::Offset, &tensor.offset.unwrap_or(end as u64).to_le_bytes());
            end = (end + tensor.data.len()).next_multiple_of(alignment);
        }
        for tensor in &self.tensors {
            out.bytes.resize(out.bytes.len().next_multiple_of(alignment), 0);
            out.bytes.extend(&tensor.data);
        }
        (out.bytes, out.fields)
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_bytes_and_fields().0
    }

    /// Writes the file.
    pub fn write(&self, path: impl AsRef<Path>) {
        let path = path.as_ref();
        fs::write(path, self.to_bytes()).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }

    /// The parts of this model split into `n`: the metadata and the first tensors, then the other tensors.
    pub fn split(&self, n: usize) -> Vec<GgufFile> {
        let per_part = self.tensors.len().div_ceil(n);
        let mut parts = vec![GgufFile::new(); n];
        for (index, part) in parts.iter_mut().enumerate() {
            if index == 0 {
                part.keys.clone_from(&self.keys);
            }
            part.set("split.no", index as u16);
            part.set("split.count", n as u16);
            part.set("split.tensors.count", self.tensors.len() as i32);
            part.tensors = self.tensors.iter().skip(index * per_part).take(per_part).cloned().collect();
        }
        parts
    }

    /// Writes the parts as `<folder>/<prefix>-00001-of-0000N.gguf` and so on, and returns their paths.
    pub fn write_split(&self, folder: &Path, prefix: &str, n: usize) -> Vec<PathBuf> {
        let parts = self.split(n);
        let name = |index| folder.join(format!("{prefix}-{:05}-of-{n:05}.gguf", index + 1));
        parts.iter().enumerate().for_each(|(index, part)| part.write(name(index)));
        (0..n).map(name).collect()
    }
}

#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    fields: Vec<Field>,
}

impl Output {
    fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    fn field(&mut self, kind: FieldKind, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes(bytes);
        self.fields.push(Field { kind, range: start..self.bytes.len() });
    }

    fn string(&mut self, bytes: &[u8]) {
        self.field(FieldKind::Length, &(bytes.len() as u64).to_le_bytes());
        self.bytes(bytes);
    }
}
