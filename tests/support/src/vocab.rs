//! Small vocabularies that llama.cpp loads and tokenises any text with.

use crate::gguf::{GgufFile, Meta};

/// Words whose pieces get tokens of their own.
const WORDS: &str = "the of and to in is that it was for on are with as his they be at one have this from or had by \
    not but what all were when we there can an your which their said if do will each about how up out them then she \
    many some so these would other into has more her two like him see time could no make than first been its who now \
    people my made over did down only way find use may water long little very after words called just where most know";

/// Kinds of token, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The kind of vocabulary of a [`crate::RandomModel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vocabulary {
    /// SentencePiece as in LLaMA-2: pieces with scores, byte tokens. A multiple of 32 tokens.
    Spm,
    /// Byte pairs as in SmolLM2: merges over an alphabet of bytes. An odd number of tokens.
    Bpe,
    /// SentencePiece with 16 tokens: files stay small, but most texts cannot be tokenised.
    Few,
}

impl Vocabulary {
    /// Adds the vocabulary's keys to a file and returns the number of tokens.
    pub fn add_to(self, file: &mut GgufFile) -> usize {
        self.add_padded_to(file, 0)
    }

    /// As [`Vocabulary::add_to`]; a vocabulary of kind `Spm` gets unused tokens until it has `least`.
    pub fn add_padded_to(self, file: &mut GgufFile, least: usize) -> usize {
        let tokens = match self {
            Vocabulary::Spm => spm(file, least),
            Vocabulary::Bpe => bpe(file),
            Vocabulary::Few => few(file),
        };
        file.set("tokenizer.ggml.tokens", Meta::array(tokens.iter().map(|(text, _)| text.clone())));
        file.set("tokenizer.ggml.token_type", Meta::array(tokens.iter().map(|(_, kind)| *kind)));
        tokens.len()
    }
}

fn spm(file: &mut GgufFile, least: usize) -> Vec<(Vec<u8>, i32)> {
    let mut tokens = vec![(b"<unk>".to_vec(), UNKNOWN), (b"<s>".to_vec(), CONTROL), (b"</s>".to_vec(), CONTROL)];
    tokens.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>").into_bytes(), BYTE)));
    let first_piece = tokens.len();
    // A word is reached by joining one letter after the other, so every beginning of it is a piece.
    let letters = ('a'..='z').chain("▁ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'-0123456789é".chars());
    let mut pieces: Vec<String> = letters.map(String::from).collect();
    for word in WORDS.split_whitespace().map(|word| format!("▁{word}")) {
        for (end, letter) in word.char_indices().skip(1) {
            let piece = word[..end + letter.len_utf8()].to_owned();
            if !pieces.contains(&piece) {
                pieces.push(piece);
            }
        }
    }
    tokens.extend(pieces.into_iter().map(|piece| (piece.into_bytes(), NORMAL)));
    for index in 0.. {
        if tokens.len() >= least && tokens.len().is_multiple_of(32) {
            break;
        }
        tokens.push((format!("<unused{index}>").into_bytes(), UNUSED));
    }

    add_spm_keys(file, tokens.len(), first_piece);
    tokens
}

fn few(file: &mut GgufFile) -> Vec<(Vec<u8>, i32)> {
    let specials = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<0x0A>", BYTE)];
    let pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "▁abc", "bc", "▁c", "ca"];
    let tokens = specials.into_iter().chain(pieces.map(|piece| (piece, NORMAL)));
    let tokens: Vec<_> = tokens.map(|(text, kind)| (text.as_bytes().to_vec(), kind)).collect();
    add_spm_keys(file, tokens.len(), specials.len());
    tokens
}

/// Longer pieces come later in the list and score higher, so that letters join into words.
fn add_spm_keys(file: &mut GgufFile, n_tokens: usize, first_piece: usize) {
    let scores = (0..n_tokens).map(|id| if id < first_piece { 0.0 } else { id as f32 - n_tokens as f32 });
    file.set("tokenizer.ggml.model", "llama");
    file.set("tokenizer.ggml.scores", Meta::array(scores));
    file.set("tokenizer.ggml.bos_token_id", 1u32);
    file.set("tokenizer.ggml.eos_token_id", 2u32);
    file.set("tokenizer.ggml.unknown_token_id", 0u32);
}

fn bpe(file: &mut GgufFile) -> Vec<(Vec<u8>, i32)> {
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut tokens: Vec<(Vec<u8>, i32)> = specials.iter().map(|text| (text.as_bytes().to_vec(), CONTROL)).collect();
    let mut known: Vec<String> = (0..=255).map(|byte| byte_letter(byte).to_string()).collect();
    let mut merges = Vec::new();
    for word in WORDS.split_whitespace().map(|word| format!("{}{word}", byte_letter(b' '))) {
        for (end, letter) in word.char_indices().skip(1) {
            let (left, joined) = (&word[..end], &word[..end + letter.len_utf8()]);
            if !known.iter().any(|token| token == joined) {
                merges.push(format!("{left} {letter}"));
                known.push(joined.to_owned());
            }
        }
    }
    tokens.extend(known.into_iter().map(|text| (text.into_bytes(), NORMAL)));
    if tokens.len().is_multiple_of(2) {
        tokens.push((b"<|unused|>".to_vec(), UNUSED));
    }

    file.set("tokenizer.ggml.model", "gpt2");
    file.set("tokenizer.ggml.pre", "smollm");
    file.set("tokenizer.ggml.merges", Meta::array(merges));
    file.set("tokenizer.ggml.bos_token_id", 1u32);
    file.set("tokenizer.ggml.eos_token_id", 2u32);
    file.set("tokenizer.ggml.add_bos_token", false);
    tokens
}

/// The letter that stands for a byte in GPT-2's vocabularies: itself where it is printable, else one from 256 on.
fn byte_letter(byte: u8) -> char {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(&byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !printable(byte)).count();
    char::from_u32(256 + before as u32).expect("below the surrogates")
}
