//! Patterns of names of tensors, with the meaning that llama.cpp gives them: `std::regex_search`.

use std::{ffi::CString, fmt, ptr::NonNull};

use ggml_sys as sys;

use super::llama::with_message;

/// A regular expression of C++'s library (ECMAScript, the search unanchored), as llama.cpp's `--override-tensor` has it.
pub(crate) struct Pattern {
    text: String,
    raw: NonNull<sys::simlayer_pattern>,
}

// SAFETY: the compiled expression is read only once it is made; the C++ library lets several threads search with one.
unsafe impl Send for Pattern {}
// SAFETY: as above.
unsafe impl Sync for Pattern {}

impl Pattern {
    /// # Errors
    /// What is wrong with the expression, as the C++ library says it.
    pub fn new(text: &str) -> Result<Pattern, String> {
        let c_text = CString::new(text).map_err(|_| "it contains a NUL character".to_owned())?;
        // SAFETY: a C string; the buffer has the size that is given with it.
        let (raw, message) =
            with_message(|error, size| unsafe { sys::simlayer_pattern_new(c_text.as_ptr(), error, size) });
        NonNull::new(raw).map(|raw| Pattern { text: text.to_owned(), raw }).ok_or(message)
    }

    /// Whether any part of the name matches.
    pub fn matches(&self, name: &str) -> bool {
        let Ok(name) = CString::new(name) else { return false };
        // SAFETY: a live expression and a C string.
        unsafe { sys::simlayer_pattern_matches(self.raw.as_ptr(), name.as_ptr()) }
    }
}

impl Drop for Pattern {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's alone.
        unsafe { sys::simlayer_pattern_free(self.raw.as_ptr()) }
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pattern").field(&self.text).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_name_may_match() {
        let found = |pattern: &str, name: &str| Pattern::new(pattern).unwrap().matches(name);
        assert!(found("exps", "blk.3.ffn_up_exps.weight"));
        assert!(found(r"blk\.(1[0-9]|2)\.ffn_.*", "blk.12.ffn_up.weight"));
        assert!(!found(r"blk\.(1[0-9]|2)\.ffn_.*", "blk.3.ffn_up.weight"));
        // What C++ has and other libraries of regular expressions lack.
        assert!(found(r"blk\.(?!0\.).*_exps", "blk.1.ffn_up_exps.weight"));
        assert!(!found(r"^blk\.(?!0\.).*_exps", "blk.0.ffn_up_exps.weight"));
    }

    #[test]
    fn wrong_patterns_are_errors() {
        assert!(Pattern::new("blk.(").is_err());
        assert!(Pattern::new(&"(".repeat(100_000)).unwrap_err().contains("1024"));
        assert!(!Pattern::new("a").unwrap().matches("b\0a"));
    }
}
