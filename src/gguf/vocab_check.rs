//! What llama.cpp's vocabulary code takes for granted.
//!
//! `llama_vocab::load` throws exceptions for most of what can be wrong with a vocabulary; those our shim catches.
//! It aborts the process for the rest, at load or when text is tokenised. That rest is checked here, with the
//! types of all keys on the way, since an error that names the file and the key is clearer than an exception's.

use std::{borrow::Cow, collections::HashSet};

use super::{Array, Error, Gguf, Value, ValueType, shown};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SUPPRESSED: &str = "tokenizer.ggml.suppress_tokens";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";

/// Keys that llama.cpp reads with exactly these types, when they are there.
const IDS: [&str; 16] = [
    BOS,
    EOS,
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.token_type_count",
    "general.file_type",
];
const BOOLS: [&str; 7] = [
    ADD_BOS,
    ADD_EOS,
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.normalizer.lowercase",
    "tokenizer.ggml.normalizer.strip_accents",
];

/// The kinds of vocabulary that the decoder models of this library have.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// SentencePiece with scores.
    Spm,
    /// Byte pairs with merges.
    Bpe,
}

/// Checks every key that llama.cpp's vocabulary code reads, so that it cannot abort on this file, neither while
/// loading nor while tokenising.
///
/// Errors: a key that is missing, of the wrong type or length, or that contradicts another. The name of the
/// pre-tokenizer is left to llama.cpp, which knows the list.
pub fn check_vocab(gguf: &Gguf) -> Result<(), Error> {
    gguf.architecture()?;
    let name = gguf.text("general.name")?.unwrap_or_default().to_lowercase();
    let model = gguf.require_str(MODEL)?;
    let pre = gguf.text(PRE)?.unwrap_or_default();
    let pre = &*pre;
    let kind = match model {
        "llama" => Kind::Spm,
        "gpt2" | "gemma4" => Kind::Bpe,
        "none" | "no_vocab" => {
            return Err(gguf.bad_key(MODEL, "says that the file has no vocabulary: text needs a file with one"));
        }
        _ => {
            let known = "llama, gpt2 and gemma4";
            return Err(
                gguf.bad_key(MODEL, format!("is '{}', but the known kinds of tokenizer are {known}", shown(model)))
            );
        }
    };
    // Its words keep their spaces, on which llama.cpp's merge look-up aborts.
    if pre == "whitespace" {
        return Err(gguf.bad_key(PRE, "is 'whitespace', which works for embedding models only"));
    }

    for key in IDS {
        exactly(gguf, key, "a u32", |value| matches!(value, Value::U32(_)))?;
    }
    for key in BOOLS {
        exactly(gguf, key, "a bool", |value| matches!(value, Value::Bool(_)))?;
    }
    let tokens = check_tokens(gguf)?;
    let n_tokens = tokens.len();
    check_scores(gguf, n_tokens)?;
    if let Some(types) = array(gguf, TOKEN_TYPES, "an array of i32", &[ValueType::I32])? {
        check_length(gguf, TOKEN_TYPES, types, n_tokens)?;
    }
    array(gguf, SUPPRESSED, "an array of i32", &[ValueType::I32])?;
    if kind == Kind::Bpe {
        let merges = array(gguf, MERGES, "an array of strings", &[ValueType::String])?;
        if pre != "kimi-k2" {
            gguf.require(MERGES, merges)?;
        }
    }
    check_special(gguf, kind, model, pre, n_tokens)?;

    // Attributes that llama.cpp gives to tokens of Phi-3, by their text.
    if ["phi-3", "phi3"].iter().any(|phi| name.contains(phi)) {
        for token in ["</s>", "<unk>", "<s>", "<|endoftext|>"] {
            if !tokens.contains(token.as_bytes()) {
                let problem =
                    format!("has no '{token}', which llama.cpp needs in a model named '{}': rename it", shown(&name));
                return Err(gguf.bad_key(TOKENS, problem));
            }
        }
    }
    Ok(())
}

/// The texts of the tokens as llama.cpp reads them, which must all differ.
fn check_tokens(gguf: &Gguf) -> Result<HashSet<Cow<'_, [u8]>>, Error> {
    let list = gguf.require_strings(TOKENS)?;
    if list.is_empty() || i32::try_from(list.len()).is_err() {
        return Err(gguf.bad_key(TOKENS, format!("has {} tokens: the file is damaged, fetch it again", list.len())));
    }
    let mut seen = HashSet::with_capacity(list.len());
    for (id, text) in list.into_iter().enumerate() {
        // llama.cpp reads C strings, and gives a name to tokens that are empty.
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        let text = if text.is_empty() { Cow::Owned(format!("[EMPTY_{id}]").into_bytes()) } else { Cow::Borrowed(text) };
        if let Some(text) = seen.replace(text) {
            let text = shown(text);
            return Err(
                gguf.bad_key(TOKENS, format!("has '{text}' twice, again as token {id}: convert the model again"))
            );
        }
    }
    Ok(seen)
}

fn check_scores(gguf: &Gguf, n_tokens: usize) -> Result<(), Error> {
    let Some(scores) = array(gguf, SCORES, "an array of f32 or i32", &[ValueType::F32, ValueType::I32])? else {
        return Ok(());
    };
    check_length(gguf, SCORES, scores, n_tokens)?;
    // They order a priority queue.
    if scores.iter().any(|score| matches!(score, Value::F32(score) if score.is_nan())) {
        return Err(gguf.bad_key(SCORES, "has a score that is not a number: the file is damaged, fetch it again"));
    }
    Ok(())
}

/// A tokenizer that adds a token needs to have it: llama.cpp aborts on the first text otherwise.
fn check_special(gguf: &Gguf, kind: Kind, model: &str, pre: &str, n_tokens: usize) -> Result<(), Error> {
    let gemma4 = model == "gemma4" || matches!(pre, "gemma4" | "granite-embed-multi-311m");
    let adds_by_itself = match kind {
        Kind::Spm => true,
        Kind::Bpe => {
            model != "gemma4"
                && matches!(
                    pre,
                    "llama3"
                        | "llama-v3"
                        | "llama-bpe"
                        | "falcon3"
                        | "falcon-h1"
                        | "pixtral"
                        | "midm-2.0"
                        | "lfm2"
                        | "jina-v5-nano"
                        | "tekken"
                        | "chameleon"
                )
        }
    };
    let add_bos = gguf.bool(ADD_BOS)?.unwrap_or(adds_by_itself) || (gemma4 && kind == Kind::Bpe);
    let add_eos = gguf.bool(ADD_EOS)?.unwrap_or(false);
    // The ids that llama.cpp assumes where the file gives none, or one that is no token.
    let (bos, eos) = match (kind, model, pre) {
        (Kind::Spm, ..) => (Some(1), Some(2)),
        (Kind::Bpe, "gemma4", _) => (None, None),
        (Kind::Bpe, _, "chatglm-bpe" | "glm4" | "glm5") => (None, Some(11)),
        (Kind::Bpe, ..) => (Some(11), Some(11)),
    };
    for (key, add, by_itself, default) in [(BOS, add_bos, ADD_BOS, bos), (EOS, add_eos, ADD_EOS, eos)] {
        let known = [gguf.u32(key)?, default].into_iter().flatten().any(|id| (id as usize) < n_tokens);
        if add && !known {
            let problem = format!(
                "names none of the {n_tokens} tokens, and the tokenizer adds that token to texts ({by_itself}): \
                 convert the model again"
            );
            return Err(gguf.bad_key(key, problem));
        }
    }
    Ok(())
}

fn exactly(gguf: &Gguf, key: &str, expected: &'static str, fits: impl Fn(&Value<'_>) -> bool) -> Result<(), Error> {
    match gguf.get(key) {
        Some(value) if !fits(&value) => Err(gguf.wrong_type(key, expected, value)),
        _ => Ok(()),
    }
}

fn array<'a>(
    gguf: &'a Gguf,
    key: &str,
    expected: &'static str,
    types: &[ValueType],
) -> Result<Option<Array<'a>>, Error> {
    gguf.typed(key, expected, |value| match value {
        Value::Array(array) if types.contains(&array.element_type()) => Some(array),
        _ => None,
    })
}

fn check_length(gguf: &Gguf, key: &str, array: Array<'_>, n_tokens: usize) -> Result<(), Error> {
    if array.len() < n_tokens {
        let problem = format!("has {} entries for {n_tokens} tokens: convert the model again", array.len());
        return Err(gguf.bad_key(key, problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use simlayer_testkit::{RandomModel, Vocabulary, gguf::GgufFile, gguf::Meta};

    use super::*;

    fn vocabulary(kind: Vocabulary) -> GgufFile {
        let mut file = GgufFile::new();
        file.set("general.architecture", "llama");
        kind.add_to(&mut file);
        file
    }

    fn check(file: &GgufFile) -> Result<(), Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        file.write(&path);
        check_vocab(&Gguf::open(&path)?)
    }

    fn refused(kind: Vocabulary, change: impl Fn(&mut GgufFile) -> &mut GgufFile, says: &str) {
        let mut file = vocabulary(kind);
        assert!(check(&file).is_ok());
        change(&mut file);
        let message = check(&file).unwrap_err().to_string();
        assert!(message.contains(says) && message.contains("x.gguf"), "{message}, not {says}");
    }

    #[test]
    fn whole_models_pass() {
        for vocabulary in [Vocabulary::Spm, Vocabulary::Bpe] {
            check(&RandomModel { vocabulary, ..RandomModel::tiny() }.gguf()).unwrap();
        }
    }

    #[test]
    fn missing_and_ill_typed_keys() {
        use Vocabulary::{Bpe, Spm};
        refused(Spm, |f| f.remove("general.architecture"), "no key 'general.architecture'");
        refused(Spm, |f| f.remove(MODEL), "no key 'tokenizer.ggml.model'");
        refused(Spm, |f| f.set(MODEL, "wordle"), "is 'wordle', but the known kinds");
        refused(Spm, |f| f.set(MODEL, "no_vocab"), "has no vocabulary");
        refused(Spm, |f| f.remove(TOKENS), "no key 'tokenizer.ggml.tokens'");
        refused(Spm, |f| f.set(TOKENS, Meta::array([1u32])), "an array of 1 u32, but an array of strings");
        refused(Spm, |f| f.set(TOKENS, Meta::Array(8, vec![])), "has 0 tokens");
        refused(Spm, |f| f.set(SCORES, Meta::array([1.0f64])), "an array of 1 f64, but an array of f32 or i32");
        refused(Spm, |f| f.set(TOKEN_TYPES, Meta::array([1u32])), "an array of 1 u32, but an array of i32");
        refused(Spm, |f| f.set(SUPPRESSED, 1u32), "the u32 1, but an array of i32");
        refused(Spm, |f| f.set(BOS, 1i32), "'tokenizer.ggml.bos_token_id' is the i32 1, but a u32");
        refused(Spm, |f| f.set(ADD_EOS, 1u32), "'tokenizer.ggml.add_eos_token' is the u32 1, but a bool");
        refused(Bpe, |f| f.remove(MERGES), "no key 'tokenizer.ggml.merges'");
        refused(Bpe, |f| f.set(MERGES, "a b"), "a string, but an array of strings");
        refused(Bpe, |f| f.set(PRE, "whitespace"), "embedding models only");
    }

    #[test]
    fn contradictions() {
        use Vocabulary::{Bpe, Spm};
        refused(Spm, |f| f.set(SCORES, Meta::array([1f32; 3])), "has 3 entries for");
        refused(Spm, |f| f.set(TOKEN_TYPES, Meta::array([1i32; 3])), "has 3 entries for");
        refused(Spm, |f| f.set(SCORES, Meta::array([f32::NAN; 1000])), "has a score that is not a number");
        refused(Spm, |f| f.set("general.name", "My Phi-3"), "has no '<|endoftext|>', which llama.cpp needs");

        fn tokens(texts: &[&str]) -> impl Fn(&mut GgufFile) -> &mut GgufFile {
            move |file| file.set(TOKENS, Meta::array(texts.iter().copied()))
        }
        refused(Spm, tokens(&["a", "b", "a"]), "has 'a' twice, again as token 2");
        // llama.cpp reads C strings and renames empty tokens.
        refused(Spm, tokens(&["a\0b", "a\0c"]), "has 'a' twice");
        refused(Spm, tokens(&["[EMPTY_1]", "\0"]), "has '[EMPTY_1]' twice");
        // One token: the default BOS (1) is none, and texts begin with it.
        refused(Spm, tokens(&["a"]), "'tokenizer.ggml.bos_token_id' names none of the 1 tokens");
        refused(Bpe, |f| f.set(BOS, 9999u32).set(PRE, "glm4").set(ADD_BOS, true), "bos_token_id' names none");
        refused(Bpe, |f| f.remove(BOS).set(PRE, "gemma4").set(MODEL, "gemma4"), "bos_token_id' names none");
        refused(
            Bpe,
            |f| f.remove(EOS).set(ADD_EOS, true).set(BOS, 1u32).set(PRE, "gemma4").set(MODEL, "gemma4"),
            "'tokenizer.ggml.eos_token_id' names none",
        );
    }

    #[test]
    fn what_llama_cpp_tolerates_passes() {
        // An id that is no token is ignored, when nothing is added to texts.
        let mut file = vocabulary(Vocabulary::Bpe);
        check(file.set(BOS, u32::MAX).set("tokenizer.ggml.padding_token_id", u32::MAX)).unwrap();
        // Two empty tokens get different names.
        let mut file = vocabulary(Vocabulary::Spm);
        check(file.set(TOKENS, Meta::array(["", "\0", "a"]))).unwrap();
        // Keys that it reads for other files only.
        check(file.set("llama.vocab_size", 7u32).set(MERGES, 1u32).set(PRE, vec![0xe8u8])).unwrap();
        check(file.set("llama.vocab_size", "many").set("general.name", b"Mod\xe8le".to_vec())).unwrap();
    }
}
