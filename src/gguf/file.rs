//! An open model: its files in the memory map, and what their headers say, by key and by tensor.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;

use super::{Error, TensorInfo, Value, parse, split};
use crate::ggml::{Override, map_file};

/// One model: the metadata of its first file, and the tensors of all its files.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    maps: Vec<Arc<Mmap>>,
    entries: BTreeMap<String, parse::Entry>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    overrides: HashMap<String, Override>,
}

impl Gguf {
    /// Maps a model and checks its header. Given the first part of a split model
    /// (`…-00001-of-0000N.gguf`), opens the others beside it as well.
    ///
    /// Errors: anything that makes the file unreadable. What a key or tensor means to the model is not looked at.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf, Error> {
        let path = path.as_ref();
        let map = map(path)?;
        let parse::Header { entries, tensors } = parse::header(path, &map, 0)?;
        let mut gguf = Gguf {
            path: path.to_path_buf(),
            maps: vec![Arc::new(map)],
            entries,
            tensors,
            by_name: HashMap::new(),
            overrides: HashMap::new(),
        };
        gguf.open_parts()?;
        for (index, tensor) in gguf.tensors.iter().enumerate() {
            if gguf.by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(gguf.bad_tensor(&tensor.name, "appears twice: the file is damaged, fetch it again"));
            }
        }
        Ok(gguf)
    }

    /// Opens the other parts of a split model.
    fn open_parts(&mut self) -> Result<(), Error> {
        let count = self.int::<u16>("split.count", "an integer up to 65535")?.unwrap_or(0);
        if count <= 1 {
            return Ok(());
        }
        let index = self.require("split.no", self.int::<u16>("split.no", "an integer up to 65535")?)?;
        if index != 0 {
            let first = split::first(&self.path, index, count);
            let first = first.unwrap_or_else(|| "the first part".to_owned());
            return Err(self.bad_split(format!("is not the first of {count} parts: open {first}")));
        }
        for index in 1..count {
            let Some(path) = split::part(&self.path, index, count) else {
                let name = format!("…-00001-of-{count:05}.gguf");
                return Err(
                    self.bad_split(format!("is the first of {count} parts, but is not named {name}: rename it"))
                );
            };
            let map = map(&path)?;
            let parse::Header { entries, tensors } = parse::header(&path, &map, usize::from(index))?;
            for (key, expected) in [("split.no", index), ("split.count", count)] {
                let found = entries.get(key).and_then(|entry| entry.value(&map)).and_then(Value::to_int::<u16>);
                if found != Some(expected) {
                    let problem = format!("is not {expected}: this is not part {} of {count}", u32::from(index) + 1);
                    return Err(Error::BadKey { path, key: key.to_owned(), problem });
                }
            }
            self.maps.push(Arc::new(map));
            self.tensors.extend(tensors);
        }
        let key = "split.tensors.count";
        let expected: usize = self.require(key, self.int(key, "a count")?)?;
        if expected != self.tensors.len() {
            let found = self.tensors.len();
            return Err(self.bad_split(format!("announces {expected} tensors, but its {count} parts have {found}")));
        }
        Ok(())
    }

    /// The first file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's architecture, such as "llama": the prefix of its own keys.
    pub fn architecture(&self) -> Result<&str, Error> {
        self.require_str("general.architecture")
    }

    /// The value of a key; `None` when the file does not have it.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        match self.overrides.get(key) {
            Some(&Override::Int(value)) => Some(Value::I64(value)),
            Some(&Override::Float(value)) => Some(Value::F64(value)),
            Some(&Override::Bool(value)) => Some(Value::Bool(value)),
            Some(Override::Str(value)) => Some(Value::String(value.as_bytes())),
            None => self.entries.get(key)?.value(self.maps.first()?),
        }
    }

    /// Lets `value` take the place of a key's value, also where the file does not have the key.
    pub fn set_override(&mut self, key: &str, value: Override) {
        self.overrides.insert(key.to_owned(), value);
    }

    /// All keys, in alphabetical order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// An integer that fits, of whatever integer type. `Ok(None)` when the key is absent, as with all getters here.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.int(key, "an integer from 0 to 4294967295")
    }

    /// A finite number of a floating-point type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.typed(key, "a finite floating-point number", Value::to_f32)
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// A string of UTF-8.
    pub fn str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a UTF-8 string", |value| match value {
            Value::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        })
    }

    /// A string, of which what is not UTF-8 becomes U+FFFD.
    pub fn text(&self, key: &str) -> Result<Option<Cow<'_, str>>, Error> {
        self.typed(key, "a string", |value| match value {
            Value::String(bytes) => Some(String::from_utf8_lossy(bytes)),
            _ => None,
        })
    }

    /// An array of integers, each of which fits.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        self.elements(key, "an array of integers from 0 to 4294967295", Value::to_int)
    }

    /// An array of integers, each of which fits.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, Error> {
        self.elements(key, "an array of 32-bit integers", Value::to_int)
    }

    /// An array of finite floating-point numbers.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.elements(key, "an array of finite floating-point numbers", Value::to_f32)
    }

    /// An array of strings, which need not be UTF-8: views into the map, 16 bytes each.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&[u8]>>, Error> {
        self.elements(key, "an array of strings", |value| match value {
            Value::String(bytes) => Some(bytes),
            _ => None,
        })
    }

    /// As [`Gguf::u32`]; a missing key is an error, as with all `require_…`.
    pub fn require_u32(&self, key: &str) -> Result<u32, Error> {
        self.require(key, self.u32(key)?)
    }

    /// As [`Gguf::f32`].
    pub fn require_f32(&self, key: &str) -> Result<f32, Error> {
        self.require(key, self.f32(key)?)
    }

    /// As [`Gguf::bool`].
    pub fn require_bool(&self, key: &str) -> Result<bool, Error> {
        self.require(key, self.bool(key)?)
    }

    /// As [`Gguf::str`].
    pub fn require_str(&self, key: &str) -> Result<&str, Error> {
        self.require(key, self.str(key)?)
    }

    /// As [`Gguf::strings`].
    pub fn require_strings(&self, key: &str) -> Result<Vec<&[u8]>, Error> {
        self.require(key, self.strings(key)?)
    }

    /// The value, or the error that its key is missing.
    pub fn require<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| Error::MissingKey { path: self.path.clone(), key: key.to_owned() })
    }

    fn int<T: TryFrom<i128>>(&self, key: &str, expected: &'static str) -> Result<Option<T>, Error> {
        self.typed(key, expected, Value::to_int)
    }

    pub(super) fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let converted = convert(value).ok_or_else(|| self.wrong_type(key, expected, value))?;
        Ok(Some(converted))
    }

    fn elements<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        self.typed(key, expected, |value| match value {
            Value::Array(array) => array.iter().map(&convert).collect(),
            _ => None,
        })
    }

    /// The tensors, in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(*self.by_name.get(name)?)
    }

    /// As [`Gguf::tensor`]; a missing tensor is an error.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo, Error> {
        self.tensor(name).ok_or_else(|| Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() })
    }

    /// The data of one of this model's tensors, in the map.
    ///
    /// # Panics
    /// When `tensor` comes from another model and does not lie inside this one's files.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        &self.maps[tensor.file][tensor.offset..tensor.offset + tensor.n_bytes]
    }

    /// The memory maps of the model's files, which weights can use in place.
    pub fn maps(&self) -> &[Arc<Mmap>] {
        &self.maps
    }

    /// The error that a key's value makes no sense; `problem` continues "key 'x' …" and says what to do.
    pub fn bad_key(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::BadKey { path: self.path.clone(), key: key.to_owned(), problem: problem.into() }
    }

    /// The error that a tensor makes no sense; `problem` continues "tensor 'x' …" and says what to do.
    pub fn bad_tensor(&self, tensor: &str, problem: impl Into<String>) -> Error {
        Error::BadTensor { path: self.path.clone(), tensor: tensor.to_owned(), problem: problem.into() }
    }

    fn bad_split(&self, problem: String) -> Error {
        Error::BadSplit { path: self.path.clone(), problem }
    }

    pub(super) fn wrong_type(&self, key: &str, expected: &'static str, found: Value<'_>) -> Error {
        Error::WrongType { path: self.path.clone(), key: key.to_owned(), expected, found: found.describe() }
    }
}

fn map(path: &Path) -> Result<Mmap, Error> {
    let failed = |source| Error::Io { path: path.to_path_buf(), source };
    // Asked before opening: opening a pipe would wait for its other end.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
    }
    File::open(path).and_then(|file| map_file(&file)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use simlayer_testkit::gguf::{GgufFile, Meta};

    use super::*;

    fn sample() -> GgufFile {
        let mut file = GgufFile::new();
        file.set("general.architecture", "llama").set("u8", 200u8).set("i64", -5i64).set("u64", u64::MAX);
        file.set("f32", 0.5f32).set("f64", 0.25f64).set("nan", f32::NAN).set("yes", true).set("latin1", vec![0xe9u8]);
        file.set("i8s", Meta::array([-1i8, 2])).set("f32s", Meta::array([1.5f32])).set("none", Meta::Array(8, vec![]));
        file.set("texts", Meta::array([vec![0xffu8, 0], b"b".to_vec(), Vec::new()]));
        file.add_tensor("a", 0, &[3], (0..12).collect());
        file.add_tensor("b", 8, &[32, 2], vec![7; 68]);
        file
    }

    fn open(file: &GgufFile) -> Result<Gguf, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        file.write(&path);
        Gguf::open(&path)
    }

    #[test]
    fn reads_what_was_written() {
        let gguf = open(&sample()).unwrap();
        assert_eq!(gguf.architecture().unwrap(), "llama");
        assert_eq!((gguf.u32("u8").unwrap(), gguf.u32("absent").unwrap()), (Some(200), None));
        assert_eq!((gguf.f32("f32").unwrap(), gguf.f32("f64").unwrap()), (Some(0.5), Some(0.25)));
        assert!(gguf.require_bool("yes").unwrap());
        assert_eq!(gguf.text("latin1").unwrap().as_deref(), Some("\u{fffd}"));
        assert_eq!(gguf.i32s("i8s").unwrap(), Some(vec![-1, 2]));
        assert_eq!(gguf.f32s("f32s").unwrap(), Some(vec![1.5]));
        assert_eq!(gguf.require_strings("texts").unwrap(), [&[0xff, 0][..], b"b", b""]);
        assert_eq!(gguf.strings("none").unwrap(), Some(Vec::new()));
        assert_eq!(gguf.keys().len(), sample().keys.len());

        let b = gguf.require_tensor("b").unwrap();
        assert_eq!((b.ty.name(), b.shape, b.n_dims, b.n_bytes), ("q8_0", [32, 2, 1, 1], 2, 68));
        assert_eq!(gguf.data(b), [7; 68]);
        assert_eq!(gguf.data(&gguf.tensors()[0]), (0..12).collect::<Vec<u8>>());
        assert_eq!(gguf.maps().len(), 1);
    }

    #[test]
    fn getters_name_the_key_and_what_it_is() {
        let gguf = open(&sample()).unwrap();
        let message = |error: Error| error.to_string();
        for (error, says) in [
            (gguf.u32("i64").unwrap_err(), "key 'i64' is the i64 -5, but an integer from 0 to 4294967295"),
            (gguf.u32("u64").unwrap_err(), "the u64 18446744073709551615"),
            (gguf.u32("f32").unwrap_err(), "the f32 0.5"),
            (gguf.u32s("i8s").unwrap_err(), "an array of 2 i8"),
            (gguf.f32("nan").unwrap_err(), "the f32 NaN, but a finite"),
            (gguf.f32("u8").unwrap_err(), "the u8 200"),
            (gguf.str("latin1").unwrap_err(), "a string, but a UTF-8 string"),
            (gguf.str("yes").unwrap_err(), "the bool true"),
            (gguf.bool("u8").unwrap_err(), "a bool is needed"),
            (gguf.strings("f32s").unwrap_err(), "an array of 1 f32, but an array of strings"),
            (gguf.require_u32("absent").unwrap_err(), "no key 'absent'"),
            (gguf.require_tensor("absent").unwrap_err(), "no tensor 'absent'"),
        ] {
            let message = message(error);
            assert!(message.contains(says) && message.contains("x.gguf"), "{message}");
        }
    }

    #[test]
    fn version_2_and_other_alignments() {
        let mut file = sample();
        file.version = 2;
        for alignment in [8u32, 64, 4096] {
            let gguf = open(file.set("general.alignment", alignment)).unwrap();
            let b = gguf.require_tensor("b").unwrap();
            assert_eq!((b.offset % alignment as usize, gguf.data(b)), (0, &[7; 68][..]));
        }
    }

    #[test]
    fn split_models() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = sample();
        file.add_tensor("c", 0, &[2], vec![9; 8]);
        let paths = file.write_split(folder.path(), "m", 3);
        let gguf = Gguf::open(&paths[0]).unwrap();
        assert_eq!(gguf.tensors().iter().map(|tensor| tensor.file).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(gguf.data(gguf.require_tensor("b").unwrap()), [7; 68]);
        assert_eq!(gguf.data(gguf.require_tensor("c").unwrap()), [9; 8]);
        assert_eq!(gguf.architecture().unwrap(), "llama");

        let refused = |path: &Path, says: &str| {
            let message = Gguf::open(path).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        };
        refused(&paths[1], "m-00002-of-00003.gguf: is not the first of 3 parts: open m-00001-of-00003.gguf");
        let renamed = folder.path().join("renamed.gguf");
        fs::copy(&paths[0], &renamed).unwrap();
        refused(&renamed, "is not named …-00001-of-00003.gguf");

        let mut parts = file.split(3);
        parts[2].set("split.no", 1u16).write(&paths[2]);
        refused(&paths[0], "m-00003-of-00003.gguf: key 'split.no' is not 2: this is not part 3 of 3");
        parts[2].set("split.no", 2u16).set("split.count", 4u16).write(&paths[2]);
        refused(&paths[0], "key 'split.count' is not 3");
        parts[2].set("split.count", 3u16).tensors[0].name = b"a".to_vec();
        parts[2].write(&paths[2]);
        refused(&paths[0], "tensor 'a' appears twice");
        parts[2].tensors.clear();
        parts[2].write(&paths[2]);
        refused(&paths[0], "announces 3 tensors, but its 3 parts have 2");
        fs::remove_file(&paths[2]).unwrap();
        refused(&paths[0], "cannot read");
        parts[0].remove("split.no").write(&paths[0]);
        refused(&paths[0], "no key 'split.no'");
    }
}
