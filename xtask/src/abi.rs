//! What crosses llama.cpp's C ABI, read from its headers: structs with their fields, functions with their types, and the
//! values of enumerations. And in what two revisions differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::prepare::Env;
use crate::sh;

/// Everything with one of these beginnings.
const PREFIXES: [&str; 3] = ["llama_", "ggml_", "gguf_"];

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Abi {
    /// Fields in their order.
    pub structs: BTreeMap<String, Vec<String>>,
    /// Each with its whole declaration.
    pub functions: BTreeMap<String, String>,
    /// Numbers where they are written as such, otherwise the text.
    pub constants: BTreeMap<String, String>,
}

/// One difference of a later revision from an earlier.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    pub kind: Kind,
    pub name: String,
    /// In words.
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Another struct, function or value under the name.
    Changed,
    Gone,
    New,
}

impl Abi {
    /// Of llama.h, and of ggml's headers, in a llama.cpp's folder.
    pub fn of(env: &Env, source: &Path) -> Result<Abi> {
        let mut abi = Abi::default();
        for header in ["llama.h", "ggml-backend.h", "ggml-cpu.h", "ggml-rpc.h", "gguf.h"] {
            let include = [source.join("include"), source.join("ggml/include")];
            let file = include.iter().map(|dir| dir.join(header)).find(|file| file.is_file());
            let file = file.with_context(|| format!("{}: no {header}", source.display()))?;
            let mut preprocess = env.command("cc");
            preprocess.args(["-E", "-P", "-x", "c"]).arg(&file);
            for dir in &include {
                preprocess.arg("-I").arg(dir);
            }
            abi.read(&sh::output(&mut preprocess)?);
        }
        Ok(abi)
    }

    /// Adds what preprocessed C declares.
    fn read(&mut self, text: &str) {
        let tokens = tokens(text);
        let ours = |name: &str| PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        let mut begin = 0;
        let mut i = 0;
        while i < tokens.len() {
            let is = |at: usize, what: &str| tokens.get(at).is_some_and(|token| *token == what);
            match tokens[i] {
                ";" | "}" => begin = i + 1,
                "struct" | "union" if is(i + 2, "{") => {
                    let end = closing(&tokens, i + 2);
                    if ours(tokens[i + 1]) {
                        self.structs.insert(tokens[i + 1].to_owned(), split(&tokens[i + 3..end], ";"));
                    }
                    // What is inside may have enumerations of its own.
                }
                "enum" => {
                    let open = if is(i + 1, "{") { i + 1 } else { i + 2 };
                    if is(open, "{") {
                        let end = closing(&tokens, open);
                        self.enumeration(&tokens[open + 1..end]);
                        i = end;
                        continue;
                    }
                }
                name if ours(name) && is(i + 1, "(") => {
                    let end = closing(&tokens, i + 1);
                    // A body makes it no function of the library, an asterisk a type.
                    if is(end + 1, ";") && tokens[begin..i].first() != Some(&"typedef") && end > i {
                        let declaration = tokens[begin..=end].iter().filter(|token| **token != "extern");
                        self.functions.insert(name.to_owned(), declaration.copied().collect::<Vec<_>>().join(" "));
                    }
                    i = end;
                }
                "{" if begin < i && tokens[begin..i].contains(&")") => {
                    // An inline function's body.
                    i = closing(&tokens, i);
                    begin = i + 1;
                }
                "\"C\"" if is(i + 1, "{") => {
                    i += 1;
                    begin = i + 1;
                }
                _ => {}
            }
            i += 1;
        }
    }

    fn enumeration(&mut self, tokens: &[&str]) {
        let mut next = Some(0i64);
        for entry in split(tokens, ",") {
            let (name, value) = match entry.split_once(" = ") {
                Some((name, text)) => {
                    next = self.number(text);
                    (name.to_owned(), next.map_or(text.to_owned(), |number| number.to_string()))
                }
                None => (entry.clone(), next.map_or("?".to_owned(), |number| number.to_string())),
            };
            next = next.map(|number| number + 1);
            self.constants.insert(name, value);
        }
    }

    /// What a constant's text comes to, where it is a number, a shifted one, or another constant.
    fn number(&self, text: &str) -> Option<i64> {
        let plain = |text: &str| {
            let text: String = text.split_whitespace().collect();
            match text.strip_prefix("0x") {
                Some(digits) => i64::from_str_radix(digits, 16).ok(),
                None => text.trim_end_matches(['u', 'U', 'l', 'L']).parse().ok(),
            }
        };
        if let Some((number, by)) = text.split_once(" << ") {
            return plain(number)?.checked_shl(plain(by)?.try_into().ok()?);
        }
        plain(text).or_else(|| self.constants.get(text)?.parse().ok())
    }

    /// In what `later` differs from this.
    pub fn differences(&self, later: &Abi) -> Vec<Difference> {
        let mut all = Vec::new();
        compare(&self.structs, &later.structs, "struct", &mut all, |before, after| fields(before, after));
        compare(&self.functions, &later.functions, "function", &mut all, |before, after| {
            format!("`{before}` is `{after}`")
        });
        compare(&self.constants, &later.constants, "constant", &mut all, |before, after| {
            format!("{before} is {after}")
        });
        all.sort();
        all
    }
}

fn compare<T: PartialEq>(
    before: &BTreeMap<String, T>,
    after: &BTreeMap<String, T>,
    what: &str,
    all: &mut Vec<Difference>,
    change: impl Fn(&T, &T) -> String,
) {
    for (name, old) in before {
        let (kind, what) = match after.get(name) {
            Some(new) if new == old => continue,
            Some(new) => (Kind::Changed, format!("{what} {name}: {}", change(old, new))),
            None => (Kind::Gone, format!("{what} {name} is gone")),
        };
        all.push(Difference { kind, name: name.clone(), what });
    }
    for name in after.keys().filter(|name| !before.contains_key(*name)) {
        all.push(Difference { kind: Kind::New, name: name.clone(), what: format!("{what} {name} is new") });
    }
}

/// Which fields of a struct are others.
fn fields(before: &[String], after: &[String]) -> String {
    let without = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|field| !those.contains(field)).map(|field| format!("`{field}`")).collect()
    };
    let (gone, new) = (without(before, after), without(after, before));
    match (gone.is_empty(), new.is_empty()) {
        (true, true) => "its fields are in another order".to_owned(),
        (true, false) => format!("has {}", new.join(", ")),
        (false, true) => format!("lacks {}", gone.join(", ")),
        (false, false) => format!("has {} in place of {}", new.join(", "), gone.join(", ")),
    }
}

/// Words, numbers, texts and single signs, without attributes of the compiler's.
fn tokens(text: &str) -> Vec<&str> {
    let mut all = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = match first {
            c if c.is_whitespace() => {
                rest = rest.trim_start();
                continue;
            }
            '"' => rest[1..].find('"').map_or(rest.len(), |end| end + 2),
            '<' if rest.starts_with("<<") => 2,
            c if is_word(c) => rest.find(|c: char| !is_word(c)).unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        all.push(&rest[..length]);
        rest = &rest[length..];
    }
    let mut kept = Vec::with_capacity(all.len());
    let mut i = 0;
    while i < all.len() {
        match all[i] {
            "__attribute__" => i = closing(&all, i + 1),
            "__extension__" | "__inline" | "__restrict" => {}
            // The same type.
            "int32_t" => kept.push("int"),
            token => kept.push(token),
        }
        i += 1;
    }
    kept
}

/// Where the bracket that opens at `open` closes; the end where it does not.
fn closing(tokens: &[&str], open: usize) -> usize {
    let mut depth = 0usize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match *token {
            "(" | "{" | "[" => depth += 1,
            ")" | "}" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return i;
                }
            }
            _ => {}
        }
    }
    tokens.len().saturating_sub(1)
}

/// Parts between the separators that are in no brackets, each with single spaces.
fn split(tokens: &[&str], separator: &str) -> Vec<String> {
    let mut parts = vec![Vec::new()];
    let mut depth = 0usize;
    for &token in tokens {
        match token {
            "(" | "{" | "[" => depth += 1,
            ")" | "}" | "]" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if token == separator && depth == 0 {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(token);
        }
    }
    parts.into_iter().filter(|part| !part.is_empty()).map(|part| part.join(" ")).collect()
}

/// The versions of llama.cpp and ggml, as their build files say them; llama.cpp had none in earlier revisions.
pub fn revision(source: &Path) -> String {
    let version = |file: PathBuf, prefix: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let part = |name: &str| {
            let set = format!("set({prefix}_VERSION_{name} ");
            text.lines().find_map(|line| line.strip_prefix(&set)?.split(')').next()).map(str::to_owned)
        };
        Some([part("MAJOR")?, part("MINOR")?, part("PATCH")?].join("."))
    };
    let llama = version(source.join("CMakeLists.txt"), "LLAMA").map(|version| format!("llama.cpp {version}, "));
    let ggml = version(source.join("ggml/CMakeLists.txt"), "GGML").unwrap_or_else(|| "?".to_owned());
    format!("{}ggml {ggml}", llama.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"
        typedef int size_t; typedef _Bool (*llama_callback)(float share, void * data);
        enum llama_kind { LLAMA_KIND_NONE = -1, LLAMA_KIND_A, LLAMA_KIND_B = 1 << 3, LLAMA_KIND_LAST = LLAMA_KIND_B };
        struct llama_params { int n; const float * split; union { int a; float b; }; _Bool flag; };
        __attribute__((visibility("default"))) extern struct llama_params llama_default(void);
        extern int llama_old(struct llama_params params, int n);
        static inline int llama_inline(int n) { return n + 1; }
        extern void llama_same(const char * text);
    "#;

    fn abi(text: &str) -> Abi {
        let mut abi = Abi::default();
        abi.read(text);
        abi
    }

    #[test]
    fn headers_are_read() {
        let abi = abi(BEFORE);
        assert_eq!(
            abi.structs["llama_params"],
            ["int n", "const float * split", "union { int a ; float b ; }", "_Bool flag"]
        );
        assert_eq!(abi.functions.keys().collect::<Vec<_>>(), ["llama_default", "llama_old", "llama_same"]);
        assert_eq!(abi.functions["llama_old"], "int llama_old ( struct llama_params params , int n )");
        let values =
            ["LLAMA_KIND_NONE", "LLAMA_KIND_A", "LLAMA_KIND_B", "LLAMA_KIND_LAST"].map(|name| &abi.constants[name]);
        assert_eq!(values, ["-1", "0", "8", "8"]);
    }

    #[test]
    fn differences_are_named() {
        let before = abi(BEFORE);
        assert_eq!(before.differences(&abi(BEFORE)), []);
        let later = BEFORE
            .replace("int n; const", "int n; enum llama_kind kind; const")
            .replace("llama_old(struct llama_params params, int n)", "llama_new(int n)")
            .replace("LLAMA_KIND_A,", "LLAMA_KIND_ZERO, LLAMA_KIND_A,");
        let found: Vec<String> = before.differences(&abi(&later)).into_iter().map(|found| found.what).collect();
        assert_eq!(
            found,
            [
                "constant LLAMA_KIND_A: 0 is 1",
                "struct llama_params: has `enum llama_kind kind`",
                "function llama_old is gone",
                "constant LLAMA_KIND_ZERO is new",
                "function llama_new is new",
            ]
        );
    }
}
