//! Our GGUF reader beside the crate gguf-rs: both say the same of well-formed files, and ours refuses what that one takes
//! although it is wrong (`src/gguf/mod.rs` says why the reader is ours).

use std::{collections::BTreeSet, panic, path::Path};

use serde_json::Value as Json;
use simlayer::gguf::{Gguf, Value};
use simlayer_testkit::{
    RandomModel, Vocabulary, WeightType,
    gguf::{GgufFile, Meta},
    smollm2_path,
};

fn theirs(path: &Path) -> Result<gguf_rs::GGUFModel, String> {
    let decode = || gguf_rs::get_gguf_container_array_size(path.to_str()?, u64::MAX).ok()?.decode().ok();
    decode().ok_or_else(|| "refused".to_owned())
}

fn json(value: Value<'_>) -> Json {
    match value {
        Value::U8(v) => v.into(),
        Value::I8(v) => v.into(),
        Value::U16(v) => v.into(),
        Value::I16(v) => v.into(),
        Value::U32(v) => v.into(),
        Value::I32(v) => v.into(),
        Value::F32(v) => v.into(),
        Value::Bool(v) => v.into(),
        Value::String(v) => String::from_utf8_lossy(v).into(),
        Value::Array(v) => v.iter().map(json).collect::<Vec<_>>().into(),
        Value::U64(v) => v.into(),
        Value::I64(v) => v.into(),
        Value::F64(v) => v.into(),
    }
}

/// Compares every key, and every tensor's name, type, shape and place. Returns the types whose sizes differ.
fn assert_same(path: &Path) -> BTreeSet<&'static str> {
    let ours = Gguf::open(path).unwrap();
    let theirs = theirs(path).unwrap();
    let shown = path.display();
    assert!(ours.keys().eq(theirs.metadata().keys()), "{shown}: other keys");
    for key in ours.keys() {
        assert_eq!(json(ours.get(key).unwrap()), theirs.metadata()[key], "{shown}: {key}");
    }
    assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{shown}");
    let mut other_sizes = BTreeSet::new();
    for (ours, theirs) in ours.tensors().iter().zip(theirs_tensors(&theirs)) {
        let (name, kind, shape, offset, size) = theirs;
        assert_eq!((ours.name.as_str(), ours.ty.raw()), (name, kind), "{shown}");
        assert_eq!(&ours.shape[..ours.n_dims], shape, "{shown}: {name}");
        assert_eq!(ours.offset as u64, offset, "{shown}: {name}");
        if ours.n_bytes as u64 != size {
            other_sizes.insert(ours.ty.name());
        }
    }
    other_sizes
}

/// Name, type, shape, place in the file, size.
fn theirs_tensors(model: &gguf_rs::GGUFModel) -> impl Iterator<Item = (&str, u32, &[u64], u64, u64)> {
    let start = model.data_offset();
    model.tensors().iter().map(move |t| (t.name.as_str(), t.kind, &*t.shape, start + t.offset, t.size))
}

#[test]
fn both_read_a_real_model_alike() {
    assert_eq!(assert_same(&smollm2_path()), BTreeSet::new());
}

#[test]
fn both_read_random_models_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("random.gguf");
    let vocabularies = [Vocabulary::Bpe, Vocabulary::Spm];
    let models = RandomModel::variations().into_iter().map(|(_, model)| model);
    for model in models.chain(vocabularies.map(|vocabulary| RandomModel { vocabulary, ..RandomModel::tiny() })) {
        model.write(&path);
        assert_eq!(assert_same(&path), BTreeSet::new());
    }
}

#[test]
fn both_read_values_of_every_type_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("values.gguf");
    for alignment in [8u32, 32, 128] {
        let mut file = GgufFile::new();
        file.set("u8", u8::MAX).set("i8", i8::MIN).set("u16", u16::MAX).set("i16", i16::MIN).set("u32", u32::MAX);
        file.set("i32", i32::MIN).set("f32", 0.1f32).set("yes", true).set("no", false).set("text", "Tromsø 🦙");
        file.set("u64", u64::MAX).set("i64", i64::MIN).set("f64", 0.1f64).set("empty", "").set("ключ", "key");
        file.set("bools", Meta::array([true, false])).set("none", Meta::Array(8, vec![]));
        file.set("texts", Meta::array(["", "two", "три"])).set("numbers", Meta::array([-1i64, i64::MAX]));
        file.set("floats", Meta::array([f32::MIN_POSITIVE, -0.0, 1e30])).set("general.alignment", alignment);
        // Sizes that leave gaps before the next tensor.
        file.add_tensor("one", 0, &[3], vec![1; 12]).add_tensor("two", 8, &[32, 1, 3], vec![2; 102]);
        file.add_tensor("three", 1, &[1, 1, 1, 5], vec![3; 10]);
        file.write(&path);
        assert_eq!(assert_same(&path), BTreeSet::new());
    }
}

/// All agree but in the sizes of types that gguf-rs thinks to have blocks of 256.
#[test]
fn both_read_every_weight_type_alike_but_for_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("types.gguf");
    let mut file = GgufFile::new();
    for ty in WeightType::ALL {
        file.add_tensor(ty.name(), ty.0, &[256, 2], vec![0; ty.bytes(512)]);
    }
    file.add_tensor("mxfp4", WeightType::MXFP4.0, &[256, 2], vec![0; WeightType::MXFP4.bytes(512)]);
    file.write(&path);
    assert_eq!(assert_same(&path), BTreeSet::from(["bf16", "iq4_nl", "mxfp4"]));
}

fn sample() -> GgufFile {
    let mut file = GgufFile::new();
    file.set("general.architecture", "llama").set("text", "x");
    file.add_tensor("a", 2, &[32, 2], vec![1; 36]).add_tensor("b", 0, &[8], vec![2; 32]);
    file
}

/// gguf-rs takes these files, and we say what is wrong with each.
#[test]
fn ours_refuses_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.gguf");
    type Change = fn(&mut GgufFile);
    let cases: [(Change, &str); 10] = [
        (|file| file.tensor_mut("b").offset = Some(1 << 40), "tensor 'b' needs bytes"),
        (|file| file.tensor_mut("b").offset = Some(u64::MAX - 31), "tensor 'b' is misplaced"),
        (|file| file.tensor_mut("b").offset = Some(0), "tensor 'b' is misplaced"),
        (|file| file.tensor_mut("b").offset = Some(65), "not a multiple of 32"),
        (|file| file.tensor_mut("b").data.truncate(31), "tensor 'b' needs bytes"),
        (|file| file.tensor_mut("a").dims = vec![33, 2], "tensor 'a'"),
        (|file| file.keys.push((b"general.alignment".to_vec(), 24u32.into())), "general.alignment"),
        (|file| file.keys.push((Vec::new(), "y".into())), "key '' has no proper name"),
        (|file| file.keys.push((b"text".to_vec(), "y".into())), "key 'text' appears twice"),
        (|file| file.tensor_mut("b").name = b"a".to_vec(), "tensor 'a' appears twice"),
    ];
    for (change, what) in cases {
        let mut file = sample();
        change(&mut file);
        file.write(&path);
        assert!(theirs(&path).is_ok(), "{what}: gguf-rs refuses it, too");
        let error = Gguf::open(&path).unwrap_err().to_string();
        assert!(error.contains(what), "{error}, not {what}");
    }
    // The first version, whose lengths have four bytes, ended with the first models.
    let mut bytes = b"GGUF".to_vec();
    bytes.extend([1u32, 0, 0].iter().flat_map(|number| number.to_le_bytes()));
    std::fs::write(&path, bytes).unwrap();
    assert!(theirs(&path).is_ok());
    assert!(Gguf::open(&path).unwrap_err().to_string().contains("version 1"));
}

/// Files that are right, and that gguf-rs does not read as they are.
#[test]
fn ours_reads_what_theirs_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("good.gguf");
    // A token of a vocabulary that is no whole character.
    let mut file = sample();
    file.set("tokens", Meta::array([vec![0xe9u8], vec![0xffu8]]));
    file.write(&path);
    let ours = Gguf::open(&path).unwrap();
    assert_eq!(ours.require_strings("tokens").unwrap(), [&[0xe9][..], &[0xff]]);
    assert_eq!(theirs(&path).unwrap().metadata()["tokens"], serde_json::json!(["\u{fffd}", "\u{fffd}"]));
    // A type that ggml has got since.
    let nvfp4 = 40;
    let mut file = sample();
    file.add_tensor("new", nvfp4, &[64], vec![0; 36]);
    file.write(&path);
    assert_eq!(Gguf::open(&path).unwrap().require_tensor("new").unwrap().ty.name(), "nvfp4");
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let theirs = panic::catch_unwind(|| theirs(&path).is_ok());
    panic::set_hook(hook);
    assert!(theirs.is_err(), "gguf-rs knows it now");
}
