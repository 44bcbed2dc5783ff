//! Files that are no proper models: each kind gives one clear error, and whatever a file holds, loading it never
//! panics, never aborts inside ggml or llama.cpp, and allocates no more than the file justifies.

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use proptest::{collection::vec, prelude::*, sample::Index, test_runner::TestRunner};
use simlayer::{AddBos, Model, ModelParams, Session, SessionParams, Special, gguf::Gguf};
use simlayer_testkit::{
    PeakAlloc, RandomModel, Vocabulary,
    gguf::{Field, GgufFile, Meta},
};
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Allocations are counted for the whole process, so the tests here run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place for one file after another.
struct Place {
    path: PathBuf,
    _folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        Place { path: folder.path().join("bad.gguf"), _folder: folder }
    }

    fn load(&self, bytes: &[u8]) -> Result<Model, String> {
        fs::write(&self.path, bytes).unwrap();
        load(&self.path)
    }
}

fn load(path: &Path) -> Result<Model, String> {
    Model::load(path, &ModelParams::default()).map_err(|error| error.to_string())
}

fn model() -> GgufFile {
    RandomModel::tiny().gguf()
}

/// Changes the small model, loads it, and expects an error of one line that names the file and says `what`.
#[track_caller]
fn refused(change: impl FnOnce(&mut GgufFile) -> &mut GgufFile, what: &[&str]) {
    let mut file = model();
    change(&mut file);
    refused_bytes(&file.to_bytes(), what);
}

#[track_caller]
fn refused_bytes(bytes: &[u8], what: &[&str]) {
    let message = Place::new().load(bytes).expect_err("the file is bad, but loads");
    check_message(&message);
    for what in what {
        assert!(message.contains(what), "the error does not say {what}: {message}");
    }
}

#[track_caller]
fn check_message(message: &str) {
    assert!(message.contains("bad.gguf"), "the error does not name the file: {message}");
    assert!(!message.contains('\n') && message.len() < 1000, "the error is not one line: {message}");
}

#[test]
fn the_unchanged_model_loads_and_runs() {
    let _alone = alone();
    for vocabulary in [Vocabulary::Spm, Vocabulary::Bpe] {
        let place = Place::new();
        let model = place.load(&RandomModel { vocabulary, ..RandomModel::tiny() }.gguf().to_bytes()).unwrap();
        run(&model).unwrap();
    }
}

#[test]
fn header() {
    let _alone = alone();
    refused_bytes(b"", &["ends inside the magic number"]);
    refused_bytes(b"GGUF", &["ends inside the version number"]);
    refused(|f| with(f, |f| f.magic = *b"ggjt"), &["is not a GGUF file (it begins with \"ggjt\")"]);
    refused(|f| with(f, |f| f.version = 1), &["is GGUF version 1, but only versions 2 and 3"]);
    refused(|f| with(f, |f| f.version = 4), &["is GGUF version 4"]);
    refused(|f| with(f, |f| f.version = 0), &["is GGUF version 0"]);
    refused(|f| with(f, |f| f.version = 3u32.swap_bytes()), &["big-endian"]);
    for count in [1 << 20, u64::from(u32::MAX), 1 << 63, u64::MAX] {
        refused(|f| with(f, |f| f.n_keys = Some(count)), &[&format!("claims {count} keys")]);
        refused(|f| with(f, |f| f.n_tensors = Some(count)), &[&format!("claims {count} tensors")]);
    }
}

#[test]
fn lengths_and_counts() {
    let _alone = alone();
    for len in [1 << 20, 1 << 31, 1 << 40, 1 << 63, u64::MAX] {
        let string = len.to_le_bytes().to_vec();
        refused(|f| f.set("x", Meta::Raw(8, string)), &["ends inside key 'x'", &len.to_string()]);
        for element in [0u32, 4, 8, 12] {
            let array = [&element.to_le_bytes()[..], &len.to_le_bytes()].concat();
            refused(|f| f.set("x", Meta::Raw(9, array)), &["ends inside key 'x'", &len.to_string()]);
        }
    }
}

#[test]
fn keys() {
    let _alone = alone();
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.context_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
    ] {
        refused(|f| f.remove(key), &[key]);
        refused(|f| f.set(key, Meta::array([true])), &[key, "array of 1 bool"]);
        refused(|f| f.set(key, Meta::Raw(77, Vec::new())), &[key, "type 77"]);
    }
    refused(|f| with(f, |f| f.keys.push((b"llama.block_count".to_vec(), Meta::U32(1)))), &["block_count", "twice"]);
    refused(|f| f.set("general.alignment", 24u32), &["general.alignment", "24"]);
    refused(|f| f.set("general.architecture", "mamba"), &["mamba", "llama"]);
}

#[test]
fn hyper_parameters() {
    let _alone = alone();
    for key in [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.context_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.rope.dimension_count",
    ] {
        refused(|f| f.set(key, 0u32), &[key]);
        refused(|f| f.set(key, -1i32), &[key, "-1"]);
        refused(|f| f.set(key, u64::MAX), &[key, "18446744073709551615"]);
    }
    for count in [3u32, 513, u32::MAX] {
        refused(|f| f.set("llama.block_count", count), &[]);
        refused(|f| f.set("llama.attention.head_count", count), &[]);
        refused(|f| f.set("llama.embedding_length", count), &[]);
    }
    refused(|f| f.set("llama.attention.layer_norm_rms_epsilon", f32::NAN), &["layer_norm_rms_epsilon", "NaN"]);
    refused(|f| f.set("llama.rope.freq_base", f32::INFINITY), &["rope.freq_base", "inf"]);
    refused(|f| f.set("llama.rope.scaling.type", "longrope2"), &["rope.scaling.type", "longrope2"]);
}

/// Layers may differ in their feed-forward, but not in their heads.
#[test]
fn lists_of_layers() {
    let _alone = alone();
    let two = |change: fn(&mut GgufFile) -> &mut GgufFile| {
        let mut file = RandomModel { n_layer: 2, ..RandomModel::tiny() }.gguf();
        change(&mut file);
        file.to_bytes()
    };
    for key in ["head_count", "head_count_kv"].map(|key| format!("llama.attention.{key}")) {
        let differ =
            RandomModel { n_layer: 2, ..RandomModel::tiny() }.gguf().set(&key, Meta::array([2u32, 1])).to_bytes();
        refused_bytes(&differ, &[&key, "2 in layer 0, but 1 in layer 1"]);
        let zero =
            RandomModel { n_layer: 2, ..RandomModel::tiny() }.gguf().set(&key, Meta::array([0u32, 0])).to_bytes();
        refused_bytes(&zero, &[&key, "is zero"]);
    }
    for list in [Meta::array([32u32]), Meta::array([32u32; 3]), Meta::Array(4, Vec::new())] {
        let mut file = RandomModel { n_layer: 2, ..RandomModel::tiny() }.gguf();
        refused_bytes(
            &file.set("llama.feed_forward_length", list).to_bytes(),
            &["feed_forward_length", "for 2 layers"],
        );
    }
    refused_bytes(&two(|f| f.set("llama.feed_forward_length", Meta::array([32u32, 64]))), &["blk.1.ffn", "shape"]);
    refused_bytes(&two(|f| f.set("llama.feed_forward_length", Meta::array([-1i32, 32]))), &["feed_forward_length"]);
}

/// Keys that say the same in another way, or that nobody needs, change nothing.
#[test]
fn what_llama_cpp_loads_loads() {
    let _alone = alone();
    let random = || RandomModel { n_layer: 3, ..RandomModel::tiny() };
    let place = Place::new();
    let logits = |file: &mut GgufFile| {
        let model = place.load(&file.to_bytes()).unwrap();
        let params = SessionParams { n_threads: 1, ..SessionParams::default() };
        Session::new(&model, params).unwrap().prefill(&[1, 5, 9, 40]).unwrap().to_vec()
    };
    let plain = logits(&mut random().gguf());
    let changes: [fn(&mut GgufFile) -> &mut GgufFile; 14] = [
        |f| f.set("llama.attention.head_count", Meta::array([2i32; 3])),
        |f| f.set("llama.attention.head_count_kv", Meta::array([1u32; 3])),
        |f| f.set("llama.feed_forward_length", Meta::array([32u32; 3])),
        |f| f.set("llama.feed_forward_length", Meta::array([32u64; 3])),
        |f| f.set("llama.feed_forward_length", 32u16),
        |f| f.set("llama.block_count", 3i64),
        |f| f.set("llama.vocab_size", 7u32),
        |f| f.set("llama.vocab_size", Meta::array([7u32])),
        |f| f.remove("llama.vocab_size"),
        |f| f.set("general.name", b"Mod\xe8le".to_vec()),
        |f| f.set("general.description", b"\xff".to_vec()),
        |f| f.set("llama.attention.layer_norm_epsilon", "small"),
        |f| f.set("tokenizer.ggml.merges", Meta::array([1u32])),
        |f| f.set("tokenizer.ggml.pre", b"\xe8".to_vec()),
    ];
    for (index, change) in changes.iter().enumerate() {
        assert_eq!(logits(change(&mut random().gguf())), plain, "change {index}");
    }
    let name = place.load(&model().set("general.name", b"Mod\xe8le".to_vec()).to_bytes()).unwrap();
    assert_eq!(name.name(), Some("Mod\u{fffd}le"));
}

/// A chat template that is none hurts nobody who does not use it.
#[test]
fn chat_templates_that_are_none() {
    let _alone = alone();
    let key = "tokenizer.chat_template";
    for (template, says) in [
        (Meta::Str(b"{{ messages }} \xe8".to_vec()), "UTF-8"),
        (Meta::array(["a", "b"]), "an array of 2 str"),
        (Meta::U32(1), "the u32 1"),
    ] {
        let place = Place::new();
        let model = place.load(&model().set(key, template).to_bytes()).unwrap();
        run(&model).unwrap();
        let message = model.chat_template().unwrap_err().to_string();
        check_message(&message);
        assert!(message.contains(key) && message.contains(says), "{message}");
    }
    let place = Place::new();
    let model = place.load(&model().set(key, "{{ bos_token }}").to_bytes()).unwrap();
    assert_eq!(model.chat_template().unwrap(), Some("{{ bos_token }}"));
}

#[test]
fn tensors() {
    let _alone = alone();
    let names: Vec<String> =
        model().tensors.iter().map(|tensor| String::from_utf8(tensor.name.clone()).unwrap()).collect();
    for name in &names {
        if name != "output.weight" {
            refused(|f| f.remove_tensor(name), &[name]);
        }
        refused(|f| with(f, |f| f.tensor_mut(name).ty = 4), &[name, "type 4"]);
        // In its place a proper tensor of another shape, and one of a type that holds no weights.
        refused(|f| replaced(f, name, 0, &[1], 4), &[name, "shape"]);
        let dims = model().tensor_mut(name).dims.clone();
        refused(|f| replaced(f, name, 26, &dims, 4 * dims.iter().product::<u64>() as usize), &[name, "i32"]);
    }
    refused(|f| with(f, |f| f.tensors.push(f.tensors[0].clone())), &["token_embd.weight", "twice"]);
    let embedding = "token_embd.weight";
    for (dims, says) in [
        (vec![0, 576], "shape [0, 576"),
        (vec![32, 1 << 60], "shape"),
        (vec![32, 1 << 40], "but the file has"),
        (vec![32, 576, 1, 1, 1], "5 dimensions"),
        (vec![33, 576], "shape [33, 576"),
    ] {
        refused(|f| with(f, |f| f.tensor_mut(embedding).dims = dims), &[embedding, says]);
    }
    for (offset, says) in
        [(1, "not a multiple"), (64, "misplaced"), (1 << 50, "but the file has"), (u64::MAX - 31, "far")]
    {
        refused(
            |f| with(f, |f| f.tensor_mut("output_norm.weight").offset = Some(offset)),
            &["output_norm.weight", says],
        );
    }
    refused(|f| with(f, |f| f.tensor_mut(embedding).name = vec![b'x'; 64]), &["xxxx", "63 bytes"]);
}

#[test]
fn vocabulary() {
    let _alone = alone();
    refused(|f| f.set("tokenizer.ggml.model", "rwkv"), &["tokenizer.ggml.model", "'rwkv'"]);
    refused(|f| f.set("tokenizer.ggml.tokens", Meta::array(["a"; 480])), &["tokenizer.ggml.tokens", "'a' twice"]);
    refused(|f| f.set("tokenizer.ggml.scores", Meta::array([1f32])), &["tokenizer.ggml.scores", "1 entries"]);
    let mut file = RandomModel { vocabulary: Vocabulary::Bpe, ..RandomModel::tiny() }.gguf();
    refused_bytes(&file.set("tokenizer.ggml.pre", "unheard-of").to_bytes(), &["unheard-of"]);
}

#[test]
fn every_beginning_of_a_model_is_refused() {
    let _alone = alone();
    let place = Place::new();
    let bytes = model().to_bytes();
    fs::write(&place.path, &bytes).unwrap();
    let file = fs::File::options().write(true).open(&place.path).unwrap();
    for end in (0..bytes.len()).rev() {
        file.set_len(end as u64).unwrap();
        // The loader begins with the reader; now and then the whole of it.
        let message = if end % 97 == 0 {
            load(&place.path).expect_err("the beginning of a file loads")
        } else {
            Gguf::open(&place.path).expect_err("the beginning of a file opens").to_string()
        };
        check_message(&message);
    }
}

#[cfg(feature = "cli")]
#[test]
fn the_tool_says_what_is_wrong_and_exits_with_1() {
    let _alone = alone();
    let place = Place::new();
    let bytes = model().to_bytes();
    for (bytes, says) in [(&b"GGML"[..], "is not a GGUF file"), (&bytes[..5000], "incomplete")] {
        fs::write(&place.path, bytes).unwrap();
        let tool = env!("CARGO_BIN_EXE_simlayer-run");
        let output = Command::new(tool).arg("-m").arg(&place.path).args(["-p", "a", "-n", "1"]).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert_eq!(output.stdout, b"");
        check_message(message.trim_end());
        assert!(message.contains(says), "{message}");
    }
}

fn replaced<'a>(file: &'a mut GgufFile, name: &str, ty: u32, dims: &[u64], n_bytes: usize) -> &'a mut GgufFile {
    let tensor = file.tensor_mut(name);
    (tensor.ty, tensor.dims, tensor.data) = (ty, dims.to_vec(), vec![0; n_bytes]);
    file
}

fn with(file: &mut GgufFile, change: impl FnOnce(&mut GgufFile)) -> &mut GgufFile {
    change(file);
    file
}

/// What a small model is asked for once it has loaded: what can abort later must have been refused before.
fn run(model: &Model) -> Result<(), String> {
    let failed = |error: &dyn std::error::Error| error.to_string();
    let tokens =
        model.vocab().tokenize("the word \n\u{e9}", AddBos::Yes, Special::Parse).map_err(|error| failed(&error))?;
    let params = SessionParams { n_threads: 1, ..SessionParams::default() };
    let mut session = Session::new(model, params).map_err(|error| failed(&error))?;
    session.prefill(&tokens).map_err(|error| failed(&error))?;
    session.decode(tokens[0]).map_err(|error| failed(&error))?;
    Ok(())
}

/// A change to a file's bytes.
#[derive(Debug, Clone)]
enum Mutation {
    /// One byte becomes another, anywhere.
    Byte(Index, u8),
    /// A length, count, type, dimension, offset or value becomes another number.
    Field(Index, Number),
    Truncate(Index),
    /// Bytes are copied over others.
    Splice {
        from: Index,
        to: Index,
        len: usize,
    },
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
}

#[derive(Debug, Clone)]
enum Number {
    Any(u64),
    /// A number near the old one.
    Near(i8),
    /// A power of two, and one less.
    Power(u32, bool),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let number = prop_oneof![
        any::<u64>().prop_map(Number::Any),
        any::<i8>().prop_map(Number::Near),
        (0u32..64, any::<bool>()).prop_map(|(power, less)| Number::Power(power, less)),
    ];
    prop_oneof![
        3 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Byte(at, byte)),
        8 => (any::<Index>(), number).prop_map(|(field, number)| Mutation::Field(field, number)),
        1 => any::<Index>().prop_map(Mutation::Truncate),
        1 => (any::<Index>(), any::<Index>(), 1usize..200).prop_map(|(from, to, len)| Mutation::Splice { from, to, len }),
        1 => (any::<Index>(), vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        1 => (any::<Index>(), 1usize..200).prop_map(|(at, len)| Mutation::Delete(at, len)),
    ]
}

fn apply(mutation: &Mutation, bytes: &mut Vec<u8>, fields: &[Field]) {
    if bytes.is_empty() {
        return;
    }
    match mutation {
        Mutation::Byte(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Mutation::Field(index, number) => {
            let range = fields[index.index(fields.len())].range.clone();
            // Earlier mutations may have moved or removed it.
            let Some(field) = bytes.get_mut(range) else { return };
            let width = field.len().min(8);
            let mut old = [0; 8];
            old[..width].copy_from_slice(&field[..width]);
            let new = match number {
                Number::Any(number) => *number,
                Number::Near(offset) => u64::from_le_bytes(old).wrapping_add_signed(i64::from(*offset)),
                Number::Power(power, less) => (1u64 << power) - u64::from(*less),
            };
            field[..width].copy_from_slice(&new.to_le_bytes()[..width]);
        }
        Mutation::Truncate(at) => bytes.truncate(at.index(bytes.len())),
        Mutation::Splice { from, to, len } => {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let len = *len.min(&(bytes.len() - from.max(to)));
            bytes.copy_within(from..from + len, to);
        }
        Mutation::Insert(at, inserted) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, inserted.iter().copied());
        }
        Mutation::Delete(at, len) => {
            let at = at.index(bytes.len());
            bytes.drain(at..bytes.len().min(at + len));
        }
    }
}

/// Loads a model; returns also the most bytes that were allocated at once meanwhile.
fn measured_load(path: &Path) -> (Result<Model, String>, usize) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = load(path);
    (result, ALLOCATOR.peak_usage().saturating_sub(before))
}

/// The process's largest resident size so far, in bytes: what C and C++ allocate and touch counts as well.
fn peak_resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() * 1024
}

#[test]
fn mutated_models() {
    let _alone = alone();
    let place = Place::new();
    let originals: Vec<_> = [Vocabulary::Spm, Vocabulary::Bpe]
        .into_iter()
        .map(|vocabulary| RandomModel { vocabulary, ..RandomModel::tiny() }.gguf().to_bytes_and_fields())
        .collect();
    // Threads, caches of ggml and the like are there from now on.
    for (bytes, _) in &originals {
        run(&place.load(bytes).unwrap()).unwrap();
    }
    let resident = peak_resident();
    let (loaded, refused, most) = (Cell::new(0), Cell::new(0), Cell::new(0f64));

    let config = ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() };
    let cases = (0..originals.len(), vec(mutation(), 1..4));
    let outcome = TestRunner::new(config).run(&cases, |(original, mutations)| {
        let (original, fields) = &originals[original];
        let mut bytes = original.clone();
        for mutation in &mutations {
            apply(mutation, &mut bytes, fields);
        }
        fs::write(&place.path, &bytes).unwrap();

        // The test harness may allocate at the same moment, so a large amount counts when it comes every time.
        let allowed = 64 * 1024 + 2 * bytes.len();
        let (mut result, mut allocated) = measured_load(&place.path);
        for _ in 0..3 {
            if allocated > allowed {
                (result, allocated) = measured_load(&place.path);
            }
        }
        prop_assert!(allocated <= allowed, "{allocated} bytes allocated for a file of {}", bytes.len());
        most.set(most.get().max(allocated as f64 / bytes.len().max(4096) as f64));
        match result {
            Ok(model) => {
                loaded.set(loaded.get() + 1);
                // Whether it runs is not the question: it must not abort.
                let _ = run(&model);
            }
            Err(message) => {
                refused.set(refused.get() + 1);
                let one_line = message.contains("bad.gguf") && !message.contains('\n') && message.len() < 1000;
                prop_assert!(one_line, "{message}");
            }
        }
        Ok(())
    });
    let (loaded, refused, most) = (loaded.get(), refused.get(), most.get());
    println!("{loaded} loaded, {refused} refused, at most {most:.1} bytes allocated per byte of the file");
    outcome.unwrap();
    // The mutations must be neither harmless nor all fatal.
    assert!(loaded > 500 && refused > 5_000, "{loaded} loaded, {refused} refused");
    let grown = peak_resident() - resident;
    assert!(grown < 32 << 20, "the process grew by {grown} bytes over files of {} bytes", originals[0].0.len());
}
