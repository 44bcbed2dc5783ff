//! One pass over the bytes of one file, which checks every length before it is used.

use std::{collections::BTreeMap, ops::Range, path::Path};

use super::{Array, Error, Value, ValueType, shown};
use crate::ggml::Type;

/// ggml's limits: `GGML_MAX_DIMS`, `GGML_MAX_NAME` (with its final NUL), and the longest string and array that its
/// own reader accepts.
const MAX_DIMS: u32 = 4;
const MAX_NAME: usize = 64;
const MAX_LEN: u64 = 1 << 30;
const DEFAULT_ALIGNMENT: u32 = 32;
/// The smallest entries that can be: a key of one letter with a one-byte value, and a tensor without a name or
/// dimensions.
const MIN_KEY_BYTES: usize = 8 + 1 + 4 + 1;
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

/// A weight's entry in the tensor directory.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// At most 63 bytes.
    pub name: String,
    pub ty: Type,
    /// Elements per dimension, the fastest-moving first; 1 beyond `n_dims`.
    pub shape: [u64; 4],
    pub n_dims: usize,
    /// Which of the model's files holds the data: an index into [`super::Gguf::maps`].
    pub file: usize,
    /// Where the data begins in that file, in bytes.
    pub offset: usize,
    /// Bytes of data.
    pub n_bytes: usize,
}

/// Where a key's value lies: a scalar's or string's bytes, or an array's elements.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    ty: ValueType,
    /// Type and number of elements, for an array.
    elements: Option<(ValueType, usize)>,
    range: Range<usize>,
}

impl Entry {
    pub(super) fn value<'a>(&self, bytes: &'a [u8]) -> Option<Value<'a>> {
        let bytes = bytes.get(self.range.clone())?;
        match self.elements {
            Some((ty, len)) => Some(Value::Array(Array::new(ty, len, bytes))),
            None => Value::decode(self.ty, bytes),
        }
    }
}

/// The checked header of one file.
#[derive(Debug)]
pub(super) struct Header {
    pub entries: BTreeMap<String, Entry>,
    pub tensors: Vec<TensorInfo>,
}

/// Reads and checks the header of file number `file`, which consists of `bytes`.
pub(super) fn header(path: &Path, bytes: &[u8], file: usize) -> Result<Header, Error> {
    let mut cursor = Cursor { path, bytes, pos: 0 };
    let owned = || path.to_path_buf();

    let found = cursor.array("the magic number")?;
    if found != *b"GGUF" {
        return Err(Error::BadMagic { path: owned(), found });
    }
    match cursor.u32("the version number")? {
        2 | 3 => {}
        // A small number read in the wrong byte order has its low bytes empty.
        version if version != 0 && version & 0xffff == 0 => return Err(Error::BigEndian { path: owned() }),
        version => return Err(Error::BadVersion { path: owned(), version }),
    }
    let n_tensors = cursor.u64("the tensor count")?;
    let n_keys = cursor.u64("the key count")?;
    cursor.check_count(n_keys, "keys", MIN_KEY_BYTES)?;
    cursor.check_count(n_tensors, "tensors", MIN_TENSOR_BYTES)?;

    let mut entries = BTreeMap::new();
    for index in 0..n_keys {
        let (key, entry) = cursor.entry(index)?;
        if entries.insert(key.clone(), entry).is_some() {
            return Err(bad_key(path, &key, "appears twice: the file is damaged, fetch it again"));
        }
    }

    let alignment = alignment(path, &entries, bytes)?;
    let tensors = (0..n_tensors).map(|index| cursor.tensor(index, file)).collect::<Result<Vec<_>, _>>()?;

    // The data begins at the next multiple of the alignment, and each tensor where the one before it ends, aligned:
    // ggml's own reader, which reads the same file for the vocabulary, accepts no other order.
    let data = cursor.pos.checked_next_multiple_of(alignment);
    let mut expected = 0u64;
    let mut placed = Vec::with_capacity(tensors.len());
    for (mut tensor, offset) in tensors {
        let refuse = |problem: String| {
            let advice = "the file is incomplete or damaged, fetch it again";
            Error::BadTensor { path: owned(), tensor: tensor.name.clone(), problem: format!("{problem}: {advice}") }
        };
        if !offset.is_multiple_of(alignment as u64) {
            return Err(refuse(format!("is misplaced: offset {offset} is not a multiple of {alignment}")));
        }
        let start = usize::try_from(offset).ok().zip(data).and_then(|(offset, data)| data.checked_add(offset));
        let end = start.and_then(|start| start.checked_add(tensor.n_bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(refuse(format!("is misplaced: offset {offset} is far outside the file")));
        };
        if end > bytes.len() {
            return Err(refuse(format!("needs bytes {start} to {end}, but the file has {}", bytes.len())));
        }
        if offset != expected {
            return Err(refuse(format!("is misplaced: offset {offset}, where {expected} is expected")));
        }
        // No overflow: the end was found to lie inside the file.
        expected = (offset + tensor.n_bytes as u64).next_multiple_of(alignment as u64);
        tensor.offset = start;
        placed.push(tensor);
    }
    Ok(Header { entries, tensors: placed })
}

fn alignment(path: &Path, entries: &BTreeMap<String, Entry>, bytes: &[u8]) -> Result<usize, Error> {
    let key = "general.alignment";
    let alignment = match entries.get(key).and_then(|entry| entry.value(bytes)) {
        None => DEFAULT_ALIGNMENT,
        Some(Value::U32(alignment)) => alignment,
        Some(other) => {
            let (path, key) = (path.to_path_buf(), key.to_owned());
            return Err(Error::WrongType { path, key, expected: "a u32", found: other.describe() });
        }
    };
    if !alignment.is_power_of_two() || alignment < 8 {
        let problem = format!("is {alignment}, but must be a power of two and at least 8: convert the model again");
        return Err(bad_key(path, key, &problem));
    }
    usize::try_from(alignment).map_err(|_| bad_key(path, key, "is too large"))
}

fn bad_key(path: &Path, key: &str, problem: &str) -> Error {
    Error::BadKey { path: path.to_path_buf(), key: key.to_owned(), problem: problem.to_owned() }
}

fn bad_tensor(path: &Path, tensor: &str, problem: &str) -> Error {
    Error::BadTensor { path: path.to_path_buf(), tensor: tensor.to_owned(), problem: problem.to_owned() }
}

/// Reads forward through a file's bytes; what runs past the end is an error that says what was being read.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Cursor<'a> {
    fn truncated(&self, what: impl Into<String>) -> Error {
        Error::Truncated { path: self.path.to_path_buf(), what: what.into() }
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let end = self.pos.checked_add(n)?;
        let taken = self.bytes.get(self.pos..end)?;
        self.pos = end;
        Some(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        self.take(N).and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| self.truncated(what))
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length in front of as many bytes.
    fn string(&mut self, what: &str) -> Result<&'a [u8], Error> {
        let len = self.u64(what)?;
        let bytes = if len <= MAX_LEN { usize::try_from(len).ok().and_then(|len| self.take(len)) } else { None };
        bytes.ok_or_else(|| self.truncated(format!("{what} ({len} bytes long)")))
    }

    fn check_count(&self, count: u64, what: &'static str, min_bytes: usize) -> Result<(), Error> {
        let most = (self.bytes.len() - self.pos) / min_bytes;
        if count > most as u64 {
            let (path, size) = (self.path.to_path_buf(), self.bytes.len());
            return Err(Error::BadCount { path, what, count, size });
        }
        Ok(())
    }

    fn entry(&mut self, index: u64) -> Result<(String, Entry), Error> {
        let path = self.path;
        let key = self.string(&format!("the name of key {index}"))?;
        let key = match std::str::from_utf8(key) {
            Ok(key) if !key.is_empty() && !key.contains('\0') => key.to_owned(),
            _ => {
                return Err(bad_key(path, &shown(key), "has no proper name: the file is damaged, fetch it again"));
            }
        };
        let what = format!("key '{}'", shown(&key));
        let value_type = |raw: u32| {
            ValueType::from_raw(raw)
                .ok_or_else(|| bad_key(path, &key, &format!("has the unknown type {raw}: the file is damaged")))
        };
        let ty = value_type(self.u32(&what)?)?;
        let (elements, range) = match ty {
            ValueType::Array => {
                let element = value_type(self.u32(&what)?)?;
                let len = self.u64(&what)?;
                let start = self.pos;
                let len = self.skip_elements(&key, element, len)?;
                (Some((element, len)), start..self.pos)
            }
            ValueType::String => {
                let len = self.string(&what)?.len();
                (None, self.pos - len..self.pos)
            }
            scalar => {
                let start = self.pos;
                let size = scalar.size().unwrap_or(0);
                self.take(size).ok_or_else(|| self.truncated(&what))?;
                (None, start..self.pos)
            }
        };
        Ok((key, Entry { ty, elements, range }))
    }

    /// Moves past an array's elements and returns their number.
    fn skip_elements(&mut self, key: &str, element: ValueType, len: u64) -> Result<usize, Error> {
        let what = format!("key '{}', an array of {len} {}", shown(key), element.name());
        let n = usize::try_from(len).ok().filter(|_| len <= MAX_LEN).ok_or_else(|| self.truncated(&what))?;
        match element {
            ValueType::Array => {
                return Err(bad_key(self.path, key, "is an array of arrays, which GGUF readers do not accept"));
            }
            ValueType::String => {
                // Each string has at least its length: a count that cannot be true is refused at once.
                if n > (self.bytes.len() - self.pos) / 8 {
                    return Err(self.truncated(&what));
                }
                for _ in 0..n {
                    self.string(&what)?;
                }
            }
            scalar => {
                let bytes = n.checked_mul(scalar.size().unwrap_or(0));
                bytes.and_then(|bytes| self.take(bytes)).ok_or_else(|| self.truncated(&what))?;
            }
        }
        Ok(n)
    }

    /// A tensor's entry and its offset from the beginning of the data.
    fn tensor(&mut self, index: u64, file: usize) -> Result<(TensorInfo, u64), Error> {
        let path = self.path;
        let name = self.string(&format!("the name of tensor {index}"))?;
        let name = match std::str::from_utf8(name) {
            Ok(text) if !text.is_empty() && text.len() < MAX_NAME && !text.contains('\0') => text.to_owned(),
            _ => {
                let problem = "has no proper name (UTF-8, 1 to 63 bytes): the file is damaged, fetch it again";
                return Err(bad_tensor(path, &shown(name), problem));
            }
        };
        let what = format!("the entry of tensor '{}'", shown(&name));

        let n_dims = self.u32(&what)?;
        if n_dims > MAX_DIMS {
            return Err(bad_tensor(path, &name, &format!("has {n_dims} dimensions, more than {MAX_DIMS}")));
        }
        let mut shape = [1; MAX_DIMS as usize];
        for dim in shape.iter_mut().take(n_dims as usize) {
            *dim = self.u64(&what)?;
        }
        let raw = self.u32(&what)?;
        let offset = self.u64(&what)?;

        let ty = Type::from_raw(raw).ok_or_else(|| {
            let problem =
                format!("has type {raw}, which ggml does not know or no longer reads: convert the model again");
            bad_tensor(path, &name, &problem)
        })?;
        let n_bytes = tensor_bytes(ty, &shape).ok_or_else(|| {
            let problem = format!("has shape {shape:?}, which type {ty} cannot have: the file is damaged");
            bad_tensor(path, &name, &problem)
        })?;
        let tensor = TensorInfo { name, ty, shape, n_dims: n_dims as usize, file, offset: 0, n_bytes };
        Ok((tensor, offset))
    }
}

/// Bytes of a tensor; `None` for an empty one, rows that do not fill their blocks, or a number of elements or
/// bytes that a signed 64-bit number cannot hold.
fn tensor_bytes(ty: Type, shape: &[u64; 4]) -> Option<usize> {
    let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
    let block = ty.block_size() as u64;
    if elements == 0 || i64::try_from(elements).is_err() || !shape[0].is_multiple_of(block) {
        return None;
    }
    let bytes = (elements / block).checked_mul(ty.block_bytes() as u64)?;
    i64::try_from(bytes).ok()?;
    usize::try_from(bytes).ok()
}

#[cfg(test)]
mod tests {
    use simlayer_testkit::gguf::{GgufFile, Meta};

    use super::*;

    fn refused(bytes: &[u8], says: &str) {
        let message = header(Path::new("x.gguf"), bytes, 0).unwrap_err().to_string();
        assert!(message.contains(says) && message.contains("x.gguf"), "{message}, not {says}");
    }

    fn with_key(key: &str, value: Meta) -> Vec<u8> {
        GgufFile::new().set(key, value).to_bytes()
    }

    fn with_tensor(ty: u32, dims: &[u64], data: usize) -> Vec<u8> {
        GgufFile::new().add_tensor("t", ty, dims, vec![0; data]).to_bytes()
    }

    #[test]
    fn counts_that_the_file_cannot_hold() {
        let mut file = GgufFile::new();
        for count in [1, u64::from(u32::MAX), 1 << 63, u64::MAX] {
            file.n_tensors = Some(count);
            refused(&file.to_bytes(), &format!("claims {count} tensors"));
        }
        file.n_tensors = None;
        file.n_keys = Some(1 << 40);
        refused(&file.to_bytes(), "claims 1099511627776 keys, more than its 24 bytes can hold");
    }

    #[test]
    fn lengths_that_run_past_the_end() {
        for len in [3u64, 1 << 32, u64::MAX] {
            let raw = |prefix: &[u8]| [prefix, &len.to_le_bytes(), &[0, 0]].concat();
            refused(&with_key("k", Meta::Raw(8, raw(&[]))), &format!("ends inside key 'k' ({len} bytes long)"));
            let array = raw(&4u32.to_le_bytes());
            refused(&with_key("k", Meta::Raw(9, array)), &format!("inside key 'k', an array of {len} u32"));
            let array = raw(&8u32.to_le_bytes());
            refused(&with_key("k", Meta::Raw(9, array)), &format!("inside key 'k', an array of {len} str"));
        }
    }

    #[test]
    fn keys_that_are_no_keys() {
        refused(&with_key("", Meta::U32(1)), "has no proper name");
        refused(&with_key("k", Meta::Raw(13, vec![0; 8])), "key 'k' has the unknown type 13");
        let nested = Meta::Array(9, vec![Meta::array([1u32])]);
        refused(&with_key("k", nested), "key 'k' is an array of arrays");
        let mut twice = GgufFile::new();
        twice.keys = vec![(b"k".to_vec(), Meta::U32(1)); 2];
        refused(&twice.to_bytes(), "key 'k' appears twice");
        for alignment in [0u32, 1, 4, 24, u32::MAX] {
            refused(&with_key("general.alignment", alignment.into()), "'general.alignment' is");
        }
        refused(&with_key("general.alignment", Meta::U64(32)), "is the u64 32, but a u32");
    }

    #[test]
    fn tensors_that_are_no_tensors() {
        refused(&with_tensor(4, &[32], 18), "tensor 't' has type 4, which ggml does not know");
        refused(&with_tensor(43, &[32], 18), "has type 43");
        refused(&with_tensor(2, &[33], 18), "has shape [33, 1, 1, 1], which type q4_0 cannot have");
        refused(&with_tensor(0, &[0], 0), "has shape [0,");
        refused(&with_tensor(0, &[1 << 32, 1 << 32], 16), "has shape");
        refused(&with_tensor(0, &[1 << 62], 16), "has shape");
        refused(&with_tensor(0, &[1, 1, 1, 1, 1], 4), "has 5 dimensions");
        refused(&with_tensor(0, &[1 << 40], 16), "needs bytes 64 to 4398046511168, but the file has 80");
        let mut file = GgufFile::new();
        file.add_tensor(&"n".repeat(64), 0, &[1], vec![0; 4]);
        refused(&file.to_bytes(), "has no proper name");
        file.tensors[0].name = b"a\0b".to_vec();
        refused(&file.to_bytes(), "has no proper name");
    }

    #[test]
    fn tensors_out_of_place() {
        let mut file = GgufFile::new();
        file.add_tensor("a", 0, &[1], vec![0; 4]).add_tensor("b", 0, &[1], vec![0; 4]);
        for (offset, says) in [
            (33, "offset 33 is not a multiple of 32"),
            (0, "tensor 'b' is misplaced: offset 0, where 32 is expected"),
            (64, "but the file has"),
            (1 << 60, "but the file has"),
            (u64::MAX - 31, "far outside"),
        ] {
            file.tensor_mut("b").offset = Some(offset);
            refused(&file.to_bytes(), says);
        }
    }

    #[test]
    fn every_beginning_of_a_file_is_refused() {
        let mut file = GgufFile::new();
        file.set("text", "abc").set("list", Meta::array(["x", "yz"])).set("number", 1u16);
        file.add_tensor("a", 0, &[2, 3], vec![0; 24]).add_tensor("b", 8, &[32], vec![0; 34]);
        let bytes = file.to_bytes();
        assert!(header(Path::new("x"), &bytes, 0).is_ok());
        for end in 0..bytes.len() {
            assert!(header(Path::new("x"), &bytes[..end], 0).is_err(), "the first {end} bytes");
        }
    }
}
