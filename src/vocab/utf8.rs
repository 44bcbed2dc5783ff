//! Text from tokens whose bytes may end inside a character.

/// Puts text together from the bytes of tokens, which may end inside a character.
///
/// [`Utf8Stream::push`] gives out what is whole and holds back at most three bytes of a character that may still be
/// completed. Bytes that can be no part of a character become U+FFFD, one for each maximal invalid piece, just as
/// [`String::from_utf8_lossy`] does with the whole text.
///
/// ```
/// let mut stream = simlayer::vocab::Utf8Stream::default();
/// assert_eq!(stream.push(&[b'a', 0xe2, 0x82]), "a");
/// assert_eq!(stream.push(&[0xac]), "€");
/// assert_eq!(stream.finish(), "");
/// ```
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes and returns the characters that are whole now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut kept = Vec::new();
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && may_be_completed(invalid) {
                kept = invalid.to_vec();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending = kept;
        text
    }

    /// Ends the text: U+FFFD stands for a character that was never completed. The stream is empty afterwards.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether the bytes are the beginning of a character: then the decoder misses bytes and has found none wrong.
fn may_be_completed(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(pieces: &[Vec<u8>]) -> (Vec<String>, String) {
        let mut stream = Utf8Stream::default();
        let texts = pieces.iter().map(|piece| stream.push(piece)).collect();
        (texts, stream.finish())
    }

    #[test]
    fn an_emoji_is_held_back_until_it_is_whole() {
        let bytes = "🦙".as_bytes();
        let pieces: Vec<_> = bytes.iter().map(|&byte| vec![byte]).collect();
        let (texts, rest) = stream(&pieces);
        assert_eq!(texts, ["", "", "", "🦙"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn wrong_bytes_are_not_held_back() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(&[0xff]), "\u{fffd}");
        assert_eq!(stream.push(&[0xe2, 0x28]), "\u{fffd}(");
        assert_eq!(stream.push(&[0xf0, 0x9f]), "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }

    proptest! {
        /// However a text is cut, the pieces add up to it, and no piece waits for more than three bytes.
        #[test]
        fn any_cut_of_a_text_gives_the_text(text in any::<String>(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
            let bytes = text.as_bytes();
            let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            at.sort_unstable();
            let mut stream = Utf8Stream::default();
            let mut out = String::new();
            let mut from = 0;
            for to in at {
                out.push_str(&stream.push(&bytes[from..to]));
                prop_assert!(to - out.len() <= 3);
                from = to;
            }
            out.push_str(&stream.push(&bytes[from..]));
            prop_assert_eq!(stream.finish(), "");
            prop_assert_eq!(out, text);
        }

        /// Any bytes, cut anywhere, give what decoding them at once would.
        #[test]
        fn any_bytes_give_what_lossy_decoding_gives(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 0..12)) {
            let whole = String::from_utf8_lossy(&pieces.concat()).into_owned();
            let (texts, rest) = stream(&pieces);
            prop_assert_eq!(texts.concat() + &rest, whole);
        }
    }
}
