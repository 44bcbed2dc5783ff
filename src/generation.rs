//! Text as it is generated: a prompt is read, tokens are sampled and decoded, and their text comes piece by piece, until
//! the model ends it or a stop string comes.
//!
//! ```no_run
//! use simlayer::{AddBos, Model, ModelParams, Sampler, SamplerParams, Session, SessionParams, Special};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::load("model.gguf", &ModelParams::default())?;
//! let mut session = Session::new(&model, SessionParams::default())?;
//! let mut sampler = Sampler::new(model.vocab(), &SamplerParams::default())?;
//! let prompt = model.vocab().tokenize("The sea is", AddBos::Yes, Special::Parse)?;
//!
//! let mut text = session.generate(&mut sampler, &prompt)?.limit(64).stop_at(["\n\n"]);
//! for piece in &mut text {
//!     print!("{}", piece?);
//! }
//! println!("\n{} tokens, {:?}", text.tokens().len(), text.end());
//! # Ok(())
//! # }
//! ```

use crate::{
    engine::{Error, SeqId, Session},
    sampling::{Sampler, SamplingError},
    vocab::{Token, Utf8Stream},
};

/// Why a generation has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationEnd {
    /// The model ended its text.
    Eog,
    /// A stop string came. It is not part of the text.
    StopString,
    /// As many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
    /// The session's abort flag was set.
    Interrupted,
    /// An error, which was given out.
    Failed,
}

/// What can go wrong while text is generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationError {
    #[error(transparent)]
    Engine(#[from] Error),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// An iterator of generated text, in pieces of whole characters: [`Session::generate`].
#[derive(Debug)]
pub struct Generation<'a> {
    session: &'a mut Session,
    sampler: &'a mut Sampler,
    seq: SeqId,
    /// Of the next token; of the last one that was read.
    logits: Vec<f32>,
    tokens: Vec<Token>,
    /// Whether the last of the tokens is to be read yet: it is not unless another one follows.
    is_unread: bool,
    limit: Option<usize>,
    text: StopText,
    end: Option<GenerationEnd>,
}

impl Session {
    /// Reads a prompt into sequence 0 and generates what follows it, as the iterator is asked. The sampler's penalties count
    /// the prompt as well.
    ///
    /// # Errors
    /// As [`Session::prefill`], and when the sampler's grammar does not take a token.
    pub fn generate<'a>(
        &'a mut self,
        sampler: &'a mut Sampler,
        prompt: &[Token],
    ) -> Result<Generation<'a>, GenerationError> {
        self.generate_in(0, sampler, prompt)
    }

    /// As [`Session::generate`], in another sequence.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn generate_in<'a>(
        &'a mut self,
        seq: SeqId,
        sampler: &'a mut Sampler,
        prompt: &[Token],
    ) -> Result<Generation<'a>, GenerationError> {
        for &token in prompt {
            sampler.accept(token)?;
        }
        let logits = self.sequence(seq).prefill(prompt)?.to_vec();
        Ok(Generation {
            session: self,
            sampler,
            seq,
            logits,
            tokens: Vec::new(),
            is_unread: false,
            limit: None,
            text: StopText::default(),
            end: None,
        })
    }
}

impl Generation<'_> {
    /// Ends after this many tokens.
    #[must_use]
    pub fn limit(mut self, n: usize) -> Self {
        self.limit = Some(n);
        self
    }

    /// Ends before the one of these strings that is complete first.
    #[must_use]
    pub fn stop_at<S: Into<String>>(mut self, stops: impl IntoIterator<Item = S>) -> Self {
        self.text = StopText::new(stops);
        self
    }

    /// The tokens that were generated until now. All but the last are in the sequence.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// Why it has ended; `None` while it has not.
    pub fn end(&self) -> Option<GenerationEnd> {
        self.end
    }

    /// One more token, and the text that is certain then.
    fn step(&mut self) -> Result<String, GenerationError> {
        if self.limit.is_some_and(|limit| self.tokens.len() >= limit) {
            return Ok(self.finish(GenerationEnd::Limit));
        }
        if self.is_unread {
            let mut sequence = self.session.sequence(self.seq);
            let last = self.tokens[self.tokens.len() - 1];
            self.logits.clear();
            match sequence.decode(last) {
                Ok(logits) => self.logits.extend_from_slice(logits),
                Err(Error::Interrupted) => return Ok(self.finish(GenerationEnd::Interrupted)),
                Err(Error::ContextFull { .. }) => return Ok(self.finish(GenerationEnd::Context)),
                Err(error) => return Err(error.into()),
            }
            self.is_unread = false;
        }
        let token = self.sampler.sample(&self.logits)?;
        let vocab = self.session.model().vocab();
        if vocab.is_eog(token) {
            return Ok(self.finish(GenerationEnd::Eog));
        }
        let piece = vocab.piece(token, false);
        self.tokens.push(token);
        self.is_unread = true;
        let (text, stops) = self.text.push(&piece);
        if stops {
            self.end = Some(GenerationEnd::StopString);
        }
        Ok(text)
    }

    fn finish(&mut self, end: GenerationEnd) -> String {
        self.end = Some(end);
        self.text.finish()
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<String, GenerationError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.end.is_none() {
            match self.step() {
                Ok(text) if text.is_empty() => {}
                Ok(text) => return Some(Ok(text)),
                Err(error) => {
                    self.end = Some(GenerationEnd::Failed);
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

/// Text of tokens' bytes, up to the first stop string.
#[doc(hidden)]
#[derive(Debug, Default)]
pub struct StopText {
    stops: Vec<String>,
    stream: Utf8Stream,
    /// What may be the beginning of a stop string.
    held: String,
}

impl StopText {
    /// Empty strings stop nothing.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> StopText {
        let stops = stops.into_iter().map(Into::into).filter(|stop: &String| !stop.is_empty()).collect();
        StopText { stops, ..StopText::default() }
    }

    /// Adds bytes. The text that is certain now, and whether a stop string has come.
    pub fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        let more = self.stream.push(bytes);
        self.take(&more)
    }

    /// Ends the text.
    pub fn finish(&mut self) -> String {
        let more = self.stream.finish();
        let (mut text, stops) = self.take(&more);
        if !stops {
            text.push_str(&std::mem::take(&mut self.held));
        }
        text
    }

    fn take(&mut self, more: &str) -> (String, bool) {
        self.held.push_str(more);
        // The one that is complete first, however the text came in pieces.
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = ends.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end of the text with which a stop string begins.
        let begins = |&at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let certain = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let held = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, held), false)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simlayer_testkit::RandomModel;

    use super::*;
    use crate::{Model, ModelParams, SamplerParams, SessionParams};

    fn tiny() -> Model {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        RandomModel { n_layer: 2, ..RandomModel::tiny() }.write(&path);
        Model::load(&path, &ModelParams::default()).unwrap()
    }

    /// Greedy text, what a loop of one's own gives, with the tokens behind it.
    fn by_hand(model: &Model, params: &SessionParams, prompt: &[Token], n: usize) -> (Vec<Token>, String) {
        let mut session = Session::new(model, params.clone()).unwrap();
        let mut sampler = Sampler::new(model.vocab(), &SamplerParams::greedy()).unwrap();
        let (mut tokens, mut bytes) = (Vec::new(), Vec::new());
        let mut token = sampler.sample(session.prefill(prompt).unwrap()).unwrap();
        while tokens.len() < n && !model.vocab().is_eog(token) {
            tokens.push(token);
            bytes.extend(model.vocab().piece(token, false));
            token = sampler.sample(session.decode(token).unwrap()).unwrap();
        }
        (tokens, String::from_utf8_lossy(&bytes).into_owned())
    }

    #[test]
    fn it_is_what_a_loop_gives_and_ends_as_it_should() {
        let model = tiny();
        let params = SessionParams { n_ctx: 64, n_threads: 1, ..SessionParams::default() };
        let (tokens, text) = by_hand(&model, &params, &[1, 9, 40], 20);
        assert!(text.chars().count() > 8, "the test's model says too little: {text:?}");
        let mut session = Session::new(&model, params.clone()).unwrap();
        let sampler = || Sampler::new(model.vocab(), &SamplerParams::greedy()).unwrap();

        let (mut own, mut generated) = (sampler(), String::new());
        let mut pieces = session.generate(&mut own, &[1, 9, 40]).unwrap().limit(20);
        pieces.by_ref().for_each(|piece| generated.push_str(&piece.unwrap()));
        assert_eq!((pieces.tokens(), &generated), (&tokens[..], &text));
        let by_itself = tokens.len() < 20;
        assert_eq!(pieces.end(), Some(if by_itself { GenerationEnd::Eog } else { GenerationEnd::Limit }));

        // Up to a string from the middle of it, in another sequence.
        let stop: String = text.chars().skip(5).take(2).collect();
        let mut own = sampler();
        let mut pieces = session.generate_in(3, &mut own, &[1, 9, 40]).unwrap().stop_at([stop.clone()]);
        let stopped: String = pieces.by_ref().map(|piece| piece.unwrap()).collect();
        assert_eq!(stopped, text[..text.find(&stop).unwrap()]);
        assert_eq!(pieces.end(), Some(GenerationEnd::StopString));

        // Nobody stops it: the context does.
        let mut own =
            Sampler::new(model.vocab(), &SamplerParams { ignore_eos: true, ..SamplerParams::greedy() }).unwrap();
        let mut pieces = session.generate_in(4, &mut own, &[1, 9, 40]).unwrap();
        assert!(pieces.by_ref().all(|piece| piece.is_ok()));
        assert_eq!((pieces.end(), pieces.tokens().len()), (Some(GenerationEnd::Context), 64 - 3 + 1));
    }

    #[test]
    fn a_flag_ends_it() {
        let model = tiny();
        let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let params = SessionParams { n_threads: 1, abort: Some(flag.clone()), ..SessionParams::default() };
        let mut session = Session::new(&model, params).unwrap();
        let params = SamplerParams { ignore_eos: true, ..SamplerParams::greedy() };
        let mut sampler = Sampler::new(model.vocab(), &params).unwrap();
        let mut pieces = session.generate(&mut sampler, &[1, 9, 40]).unwrap();
        assert!(pieces.next().is_some_and(|piece| piece.is_ok()));
        flag.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(pieces.by_ref().map(|piece| piece.unwrap()).collect::<String>(), "");
        assert_eq!(pieces.end(), Some(GenerationEnd::Interrupted));
    }

    proptest! {
        /// However the text comes in pieces: what is before the first stop string comes out, and what is held back might
        /// have been one.
        #[test]
        fn text_ends_before_the_first_stop_string(
            text in "[ab€]{0,30}",
            stops in prop::collection::vec("[ab€]{1,4}", 0..3),
            cuts in prop::collection::vec(1usize..5, 0..40),
        ) {
            let mut stream = StopText { stops: stops.clone(), ..StopText::default() };
            let (mut out, mut stopped, mut rest) = (String::new(), false, text.as_bytes());
            for cut in cuts.into_iter().chain([usize::MAX]) {
                if stopped {
                    break;
                }
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                let (certain, stops) = stream.push(piece);
                out.push_str(&certain);
                (stopped, rest) = (stops, more);
            }
            if !stopped {
                out.push_str(&stream.finish());
            }
            let ends = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)));
            let first = ends.min().map(|(_, at)| at);
            prop_assert_eq!(stopped, first.is_some());
            prop_assert_eq!(&out, &text[..first.unwrap_or(text.len())]);
        }
    }
}
