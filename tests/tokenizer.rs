//! Text to tokens and back on the real model, against unmodified llama.cpp.

use std::{
    collections::{BTreeSet, HashSet},
    path::PathBuf,
};

use simlayer::{
    chat::{ChatTemplate, Message},
    vocab::{AddBos, Special, SpecialToken, Token, Utf8Stream, Vocab, VocabError, VocabKind},
};
use simlayer_testkit::{
    RandomModel, Rng, UpstreamRef, Vocabulary,
    gguf::{GgufFile, Meta},
    smollm2_path,
};
use tempfile::TempDir;

const PICKED: &[&str] = &[
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t \t\r\n ",
    "Hello, world!",
    " leading and trailing ",
    "The quick brown fox jumps over the lazy dog.",
    "it's we'll they're I'd you've 'S 'LL don't",
    "3.14159 1,000,000 0x1F 1e-9 ½ ² ٣٤ 12345678901234567890",
    "naïve façade Ærøskøbing Škoda żółć",
    "Größe, Straße, Übermut",
    "Привет, мир! Съешь же ещё этих мягких французских булок",
    "Καλημέρα κόσμε",
    "你好，世界。今天天气不错。",
    "こんにちは世界、カタカナとひらがな",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🦙🔥 👨‍👩‍👧‍👦 🏳️‍🌈 ❤️ 👍🏽 🇩🇪",
    "e\u{301} vs \u{e9}, A\u{30a} vs \u{c5}",
    "\u{200b}\u{200d}\u{feff}\u{2028}\u{a0}\u{3000}x",
    "\u{0}\u{1}\u{7f}\u{85}",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀 \u{10ffff}",
    "fn main() {\n    println!(\"{}\", 1 + 2);\n}\n",
    "def f(x):\n\treturn x ** 2  # square\n\n\nclass A(object):\n    pass\n",
    "#include <stdio.h>\nint main(void) { return printf(\"%d\\n\", 42) < 0; }",
    "SELECT a.b, COUNT(*) FROM t AS a WHERE x <> 'y' GROUP BY 1;",
    "{\"key\": [1, 2.5, null, true, \"\\u00e9\"]}",
    "<div class=\"a\">&nbsp;</div><!-- c -->",
    "https://example.org/path?q=a+b&c=%20#frag",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "................................................................",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|><s></s>",
    "<|im_start",
    "CamelCaseWordsAndSCREAMING_SNAKE_CASE-kebab-case",
];

/// Hand-picked texts, and random mixtures of scripts, code, white space and emoji: 300 in all.
fn texts() -> Vec<String> {
    let fragments: Vec<&str> = PICKED.iter().flat_map(|text| text.split_inclusive(' ')).collect();
    let spaces = [" ", "  ", "\n", "\n\n", "\t", "", "", "\r\n", "\u{a0}"];
    let mut rng = Rng::new(2024);
    let mut texts: Vec<String> = PICKED.iter().map(|&text| text.to_owned()).collect();
    while texts.len() < 300 {
        let mut text = String::new();
        for _ in 0..1 + rng.below(24) {
            match rng.below(4) {
                0 => text.push_str(spaces[rng.below(spaces.len())]),
                1 => {
                    // Any character of any plane, surrogates excepted.
                    let range = [0x80, 0x800, 0x1_0000, 0x11_0000][rng.below(4)];
                    text.extend(u32::try_from(rng.below(range)).ok().and_then(char::from_u32));
                }
                _ => text.push_str(fragments[rng.below(fragments.len())]),
            }
        }
        texts.push(text);
    }
    texts
}

#[test]
fn tokens_are_those_of_llama_cpp() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let texts = texts();
    let bytes: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
    let reference = UpstreamRef::new();
    for (add_bos, special) in [(AddBos::Yes, Special::Parse), (AddBos::No, Special::Text)] {
        let (adds, parses) = (add_bos == AddBos::Yes, special == Special::Parse);
        let expected = reference.tokenize(&smollm2_path(), &bytes, adds, parses);
        let tokens: Vec<_> = texts.iter().map(|text| vocab.tokenize(text, add_bos, special).unwrap()).collect();
        for ((text, tokens), expected) in texts.iter().zip(&tokens).zip(&expected) {
            assert_eq!(tokens, expected, "{text:?}");
        }
        assert_eq!(expected.len(), 300);
        for special in [true, false] {
            let expected = reference.detokenize(&smollm2_path(), &tokens, special);
            for (tokens, expected) in tokens.iter().zip(&expected) {
                assert_eq!(&vocab.detokenize_bytes(tokens, special).unwrap(), expected);
            }
        }
    }
}

#[test]
fn bytes_that_are_no_text_tokenize_alike() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let mut rng = Rng::new(7);
    let texts: Vec<Vec<u8>> = (0..40).map(|_| (0..1 + rng.below(40)).map(|_| rng.below(256) as u8).collect()).collect();
    let bytes: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
    let expected = UpstreamRef::new().tokenize(&smollm2_path(), &bytes, true, true);
    for (text, expected) in texts.iter().zip(expected) {
        assert_eq!(vocab.tokenize_bytes(text, AddBos::Yes, Special::Parse).unwrap(), expected, "{text:?}");
    }
}

#[test]
fn tokens_give_the_text_back() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    // This vocabulary has no tokens for some bytes, which only rare characters need; they are lost.
    let pieces: HashSet<Vec<u8>> = (0..).take(vocab.n_tokens()).map(|token| vocab.piece(token, false)).collect();
    let whole = |text: &String| text.bytes().all(|byte| pieces.contains(&vec![byte]));
    let texts: Vec<_> = texts().into_iter().filter(whole).collect();
    assert!(texts.len() >= 200, "{}", texts.len());
    for text in texts {
        let tokens = vocab.tokenize(&text, AddBos::No, Special::Parse).unwrap();
        assert_eq!(vocab.detokenize(&tokens, true).unwrap(), text);
        // Token by token, as a stream shows it.
        let mut stream = Utf8Stream::default();
        let mut shown: String = tokens.iter().map(|&token| stream.push(&vocab.piece(token, true))).collect();
        shown.push_str(&stream.finish());
        assert_eq!(shown, text);
    }
}

#[test]
fn special_tokens() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let info = UpstreamRef::new().info(&smollm2_path());
    let id = |name: &str| info["special"][name].as_i64().filter(|&id| id >= 0).map(|id| id as i32);
    assert_eq!(vocab.kind(), VocabKind::Bpe);
    assert_eq!(Some(vocab.n_tokens() as u64), info["n_vocab"].as_u64());
    assert_eq!(Some(vocab.adds_bos()), info["add_bos"].as_bool());
    assert_eq!((vocab.bos(), vocab.eos(), vocab.eot()), (id("bos"), id("eos"), id("eot")));
    assert_eq!(vocab.special(SpecialToken::Pad), id("pad"));
    let eog: Vec<_> = info["eog"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap() as i32).collect();
    assert_eq!(vocab.eog_tokens(), eog);
    let end = vocab.eos().unwrap();
    assert_eq!((vocab.name(end).as_str(), vocab.piece(end, false)), ("<|im_end|>", Vec::new()));
    assert!(vocab.is_control(end) && !vocab.is_control(400));
}

#[test]
fn numbers_that_are_no_tokens() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    for token in [-1, i32::MIN, i32::MAX, vocab.n_tokens() as i32] {
        assert!(vocab.piece(token, true).is_empty() && !vocab.is_eog(token) && !vocab.is_control(token));
        assert!(vocab.detokenize(&[1, token], true).is_err());
    }
}

#[test]
fn a_model_without_a_chat_template_speaks_chatml() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Hi")];
    let expected = ChatTemplate::builtin("chatml").unwrap().render(&messages, true).unwrap();
    for none in [None, Some("")] {
        let template = ChatTemplate::new(none, &vocab);
        assert!(template.is_builtin());
        assert_eq!(template.render(&messages, true).unwrap(), expected);
    }
    assert!(!ChatTemplate::new(Some("{{ messages[0].content }}"), &vocab).is_builtin());
}

#[test]
fn the_models_own_chat_template() {
    let vocab = Vocab::load(&smollm2_path()).unwrap();
    let model = simlayer::gguf::Gguf::open(smollm2_path()).unwrap();
    let template = ChatTemplate::new(model.str("tokenizer.chat_template").unwrap(), &vocab);
    let user = Message::new("user", "Hi!");
    let prompt = template.render(std::slice::from_ref(&user), true).unwrap();
    // The model's template adds a system message where there is none.
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    );
    let turns =
        [Message::new("system", "Be brief."), user, Message::new("assistant", "Hello."), Message::new("user", "Bye.")];
    let prompt = template.render(&turns, true).unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n\
         <|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"
    );
    let tokens = template.tokenize(&vocab, &prompt).unwrap();
    assert_eq!(vocab.detokenize(&tokens, true).unwrap(), prompt);
    assert_eq!(tokens.iter().filter(|&&token| Some(token) == vocab.eos()).count(), 4);
}

/// Every name of a pre-tokenizer that llama.cpp's vocabulary code knows.
fn pre_tokenizers() -> BTreeSet<String> {
    simlayer_testkit::pre_tokenizers(ggml_sys::LLAMA_SOURCE)
}

/// A small model with this pre-tokenizer.
fn with_pre_tokenizer(name: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut file = RandomModel { vocabulary: Vocabulary::Bpe, ..RandomModel::tiny() }.gguf();
    file.set("tokenizer.ggml.pre", name).write(&path);
    (folder, path)
}

/// Texts of `n` characters of which none, for some pre-tokenizer, is where it splits.
fn runs(n: usize) -> [(&'static str, Vec<u8>); 10] {
    [
        ("letters", "a".repeat(n)),
        ("letters of both cases", "aB".repeat(n / 2)),
        ("blanks", " ".repeat(n) + "x"),
        ("line ends", "\n".repeat(n)),
        ("dashes", "-".repeat(n)),
        ("ideographs", "漢".repeat(n)),
        ("digits", "7".repeat(n)),
        ("slashes and line ends", "/\n".repeat(n / 2)),
        ("words", "the a ".repeat(n / 6)),
    ]
    .map(|(kind, text)| (kind, text.into_bytes()))
    .into_iter()
    .chain([("bytes that are no text", vec![0xff; n / 10])])
    .collect::<Vec<_>>()
    .try_into()
    .unwrap()
}

/// The tokens, from a thread with little stack.
fn tokenize_on_a_small_stack(vocab: &Vocab, text: Vec<u8>) -> Result<Vec<Token>, VocabError> {
    let vocab = vocab.clone();
    let thread = std::thread::Builder::new().stack_size(256 << 10);
    thread.spawn(move || vocab.tokenize_bytes(&text, AddBos::No, Special::Text)).unwrap().join().unwrap()
}

/// llama.cpp overflows its stack at some 26,000 characters; below that it must say the same.
#[test]
fn long_runs_are_split_as_llama_cpp_splits_them() {
    let reference = UpstreamRef::new();
    let mut texts: Vec<Vec<u8>> = texts().into_iter().map(String::into_bytes).collect();
    texts.push(texts.concat());
    texts.extend(runs(3000).map(|(_, text)| text));
    let bytes: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
    for name in pre_tokenizers() {
        let (_folder, path) = with_pre_tokenizer(&name);
        // Its words keep their spaces, on which llama.cpp's merge look-up aborts.
        if name == "whitespace" {
            assert!(Vocab::load(&path).is_err());
            continue;
        }
        let vocab = Vocab::load(&path).unwrap();
        let expected = reference.tokenize(&path, &bytes, false, false);
        assert_eq!(expected.len(), texts.len());
        for (text, expected) in texts.iter().zip(expected) {
            // Here short runs only stay on the caller's stack.
            let tokens = tokenize_on_a_small_stack(&vocab, text.clone()).unwrap();
            assert!(tokens == expected, "{name}: {:?}", String::from_utf8_lossy(text));
            assert!(vocab.tokenize_bytes(text, AddBos::No, Special::Text).unwrap() == expected, "{name}");
        }
    }
}

#[test]
fn runs_without_a_break_do_not_overflow_the_stack() {
    for name in pre_tokenizers().iter().filter(|&name| name != "whitespace") {
        let (_folder, path) = with_pre_tokenizer(name);
        let vocab = Vocab::load(&path).unwrap();
        for (kind, text) in runs(60_000) {
            if let Err(error) = tokenize_on_a_small_stack(&vocab, text) {
                // It asks at every digit how many follow.
                assert_eq!((name.as_str(), kind), ("superbpe", "digits"), "{error}");
                assert!(error.to_string().contains("takes a regular expression too many steps"), "{error}");
            }
        }
    }
}

#[test]
fn what_no_stack_holds_is_refused() {
    let refused = [("gpt-4o", 0), ("deepseek-llm", 2), ("llama4", 5)];
    for (name, run) in refused {
        let (_folder, path) = with_pre_tokenizer(name);
        let vocab = Vocab::load(&path).unwrap();
        let (kind, text) = &runs(10_000_000)[run];
        let error = tokenize_on_a_small_stack(&vocab, text.clone()).unwrap_err().to_string();
        assert!(
            error.contains("it has a run of characters without a break that is too long"),
            "{name}, {kind}: {error}"
        );
        // With breaks any length goes.
        let words = b"the and of it, ".repeat(200_000);
        assert!(tokenize_on_a_small_stack(&vocab, words).unwrap().len() > 800_000);
    }
    // What is split without regular expressions has no such bound.
    let (_folder, path) = with_pre_tokenizer("llama-bpe");
    let vocab = Vocab::load(&path).unwrap();
    assert_eq!(tokenize_on_a_small_stack(&vocab, vec![b'z'; 10_000_000]).unwrap().len(), 10_000_000);
}

/// A text with many special tokens is divided as llama.cpp divides it, without its quadratic time.
#[test]
fn many_special_tokens_are_split_as_llama_cpp_splits_them() {
    const SPECIAL: [&str; 5] = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<mask>"];
    let mut rng = Rng::new(19);
    let pieces = [" ", "\n", "a", " the of", "<|im_", "||>", "漢", "1234", "  \t"];
    let mut random = |n: usize| -> String {
        let mut piece = || if rng.below(2) == 0 { SPECIAL[rng.below(5)] } else { pieces[rng.below(pieces.len())] };
        (0..n).map(|_| piece()).collect()
    };
    let mut texts: Vec<String> = (0..60).map(&mut random).collect();
    texts.push(random(2000));
    texts.push(SPECIAL[0].repeat(1000));
    let bytes: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
    let reference = UpstreamRef::new();
    // The second splits with regular expressions. Tokens of Phi-3 take the blanks after them, and "<mask>" those before it.
    for (pre, name) in [("smollm", "random"), ("gpt-4o", "random"), ("smollm", "phi-3"), ("jina-v2-de", "random")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let mut file = RandomModel { vocabulary: Vocabulary::Bpe, ..RandomModel::tiny() }.gguf();
        let mut tokens = elements(&file, "tokenizer.ggml.tokens");
        let mut types = elements(&file, "tokenizer.ggml.token_type");
        for (back, special) in ["<unk>", "<s>", "</s>", "<mask>"].into_iter().enumerate() {
            let at = tokens.len() - 1 - back;
            // The first is a control token.
            (tokens[at], types[at]) = (Meta::from(special), types[0].clone());
        }
        file.set("tokenizer.ggml.tokens", Meta::array(tokens)).set("tokenizer.ggml.token_type", Meta::array(types));
        file.set("tokenizer.ggml.pre", pre).set("general.name", name).write(&path);
        let vocab = Vocab::load(&path).unwrap();
        for special in [Special::Parse, Special::Text] {
            let expected = reference.tokenize(&path, &bytes, false, special == Special::Parse);
            for (text, expected) in texts.iter().zip(expected) {
                assert!(vocab.tokenize(text, AddBos::No, special).unwrap() == expected, "{pre}, {name}: {text:?}");
            }
        }
        // Ten million characters.
        let start = cpu_seconds();
        let tokens = vocab.tokenize(&"a<|im_start|>".repeat(770_000), AddBos::No, Special::Parse).unwrap();
        let took = cpu_seconds() - start;
        assert_eq!(tokens.len(), 2 * 770_000);
        assert!(took < 60.0, "{pre}: {took:.1} s");
    }
}

fn elements(file: &GgufFile, key: &str) -> Vec<Meta> {
    match file.get(key) {
        Some(Meta::Array(_, elements)) => elements.clone(),
        other => panic!("{key}: {other:?}"),
    }
}

/// What ten million characters without a break may take: seconds of processor time, and MiB of memory at the peak of the
/// whole process.
const MOST_SECONDS: f64 = 120.0;
const MOST_MIB: u64 = 4096;

/// Processor time of this process, its threads that have ended included.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // In ticks of 10 ms, in user and in system mode.
    fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

/// The most memory that this process has had since `forget_peak_memory`, in MiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() / 1024
}

fn forget_peak_memory() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// Every kind of run, for one pre-tokenizer of those that split with the same expressions:
///
/// ```sh
/// cargo test --release --test tokenizer -- --ignored --nocapture
/// ```
#[test]
#[ignore = "takes half an hour"]
fn ten_million_characters_without_a_break_are_bounded() {
    let mut worst: Vec<(&str, f64, u64)> = Vec::new();
    for names in simlayer_testkit::pre_tokenizers_by_expressions(ggml_sys::LLAMA_SOURCE).into_values() {
        let Some(name) = names.iter().find(|&name| name != "whitespace") else { continue };
        println!("{names:?}");
        let (_folder, path) = with_pre_tokenizer(name);
        let vocab = Vocab::load(&path).unwrap();
        for (index, (kind, text)) in runs(10_000_000).into_iter().enumerate() {
            forget_peak_memory();
            let start = cpu_seconds();
            let answer = tokenize_on_a_small_stack(&vocab, text);
            let (seconds, mib) = (cpu_seconds() - start, peak_memory());
            let answer = match answer {
                Ok(tokens) => format!("{} tokens", tokens.len()),
                Err(error) => error.to_string(),
            };
            println!("{name}, {kind}: {seconds:.1} s, {mib} MiB: {answer}");
            assert!(seconds < MOST_SECONDS && mib < MOST_MIB, "{name}, {kind}: {seconds:.1} s, {mib} MiB");
            match worst.get_mut(index) {
                Some(worst) => *worst = (kind, worst.1.max(seconds), worst.2.max(mib)),
                None => worst.push((kind, seconds, mib)),
            }
        }
    }
    for (kind, seconds, mib) in worst {
        println!("at most, {kind}: {seconds:.1} s, {mib} MiB");
    }
}
