//! A grammar that the text follows: from the beginning, or from where a trigger comes.

use super::error::SamplingError;
use crate::{
    ggml::{Candidates, RawSampler},
    vocab::{AddBos, Special, Token, Vocab},
};

/// What makes a waiting grammar hold. Its text begins there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrammarTrigger {
    /// A text, wherever it comes.
    Word(String),
    /// A match of a regular expression (ECMAScript's); the grammar's text begins at its first group that took part, or
    /// where the match does.
    Pattern(String),
    /// As [`GrammarTrigger::Pattern`], for all of the text so far.
    PatternFull(String),
    /// A token.
    Token(Token),
}

/// What the model's thoughts are written between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkingTags {
    /// Begins them: `<think>`.
    pub start: String,
    /// Each ends them: `</think>`.
    pub ends: Vec<String>,
}

/// A grammar, and where in its text, or before it, the sequence is.
#[derive(Debug)]
pub(super) struct Constraint {
    grammar: RawSampler,
    /// What the grammar's text has before the first token that is sampled.
    prefix: Vec<Token>,
    thoughts: Option<Thoughts>,
    vocab: Vocab,
}

impl Constraint {
    /// As [`super::SamplerParams`] says of `grammar`, `grammar_triggers`, `grammar_prefix` and `thinking`.
    pub(super) fn new(
        vocab: &Vocab,
        grammar: &str,
        triggers: &[GrammarTrigger],
        prefix: &str,
        thinking: Option<&ThinkingTags>,
    ) -> Result<Constraint, SamplingError> {
        let mut constraint = if triggers.is_empty() {
            let grammar = RawSampler::grammar(vocab.raw(), grammar, "root").map_err(SamplingError::Grammar)?;
            let prefix = prefix_tokens(vocab, prefix)?;
            Constraint { grammar, prefix, thoughts: None, vocab: vocab.clone() }
        } else {
            let (patterns, tokens) = raw_triggers(vocab, triggers)?;
            let grammar = RawSampler::lazy_grammar(vocab.raw(), grammar, "root", &patterns, &tokens)
                .map_err(SamplingError::Grammar)?;
            let thoughts = thinking.map(|tags| Thoughts::new(tags.clone(), prefix));
            Constraint { grammar, prefix: Vec::new(), thoughts, vocab: vocab.clone() }
        };
        let refused = |_| SamplingError::Grammar(format!("it allows no text that begins with {prefix:?}"));
        constraint.accept_prefix().map_err(refused)?;
        Ok(constraint)
    }

    fn accept_prefix(&mut self) -> Result<(), String> {
        self.prefix.iter().try_for_each(|&token| self.grammar.accept(token))
    }

    /// Takes away the tokens that the grammar does not allow now.
    pub(super) fn apply(&mut self, candidates: &mut Candidates) -> Result<(), SamplingError> {
        match &self.thoughts {
            Some(thoughts) if thoughts.inside => Ok(()),
            _ => self.grammar.apply(candidates).map_err(SamplingError::Sample),
        }
    }

    /// Goes on by a token. One that ends the thoughts may begin the grammar's text too.
    pub(super) fn accept(&mut self, token: Token) -> Result<(), SamplingError> {
        if let Some(thoughts) = &mut self.thoughts {
            let was_inside = thoughts.inside;
            thoughts.read(&self.vocab.piece(token, true));
            if was_inside && thoughts.inside {
                return Ok(());
            }
        }
        self.grammar.accept(token).map_err(SamplingError::Sample)
    }

    pub(super) fn reset(&mut self) -> Result<(), SamplingError> {
        if let Some(thoughts) = &mut self.thoughts {
            thoughts.reset();
        }
        self.grammar.reset().and_then(|()| self.accept_prefix()).map_err(SamplingError::Sample)
    }

    pub(super) fn try_clone(&self) -> Result<Constraint, SamplingError> {
        Ok(Constraint {
            grammar: self.grammar.try_clone().map_err(SamplingError::Sample)?,
            prefix: self.prefix.clone(),
            thoughts: self.thoughts.clone(),
            vocab: self.vocab.clone(),
        })
    }
}

/// The prefix as tokens. Some tokenizers put a space before the first one, which is not the grammar's.
fn prefix_tokens(vocab: &Vocab, prefix: &str) -> Result<Vec<Token>, SamplingError> {
    let tokens = vocab.tokenize(prefix, AddBos::No, Special::Parse);
    let mut tokens = tokens.map_err(|error| SamplingError::Grammar(error.to_string()))?;
    let is_space = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_whitespace);
    if let Some(&first) = tokens.first()
        && is_space(vocab.piece(first, true).first())
        && !is_space(prefix.as_bytes().first())
    {
        tokens.remove(0);
    }
    Ok(tokens)
}

/// Triggers as llama.cpp takes them: regular expressions and tokens. A word that is one control token comes as that token
/// only.
fn raw_triggers(vocab: &Vocab, triggers: &[GrammarTrigger]) -> Result<(Vec<String>, Vec<Token>), SamplingError> {
    let (mut patterns, mut tokens) = (Vec::new(), Vec::new());
    for trigger in triggers {
        match trigger {
            GrammarTrigger::Word(word) => {
                let parts = vocab.tokenize(word, AddBos::No, Special::Parse);
                match parts.map_err(|error| SamplingError::Grammar(error.to_string()))?[..] {
                    [token] if vocab.is_control(token) => tokens.push(token),
                    _ => patterns.push(escaped(word)),
                }
            }
            GrammarTrigger::Pattern(pattern) => patterns.push(pattern.clone()),
            GrammarTrigger::PatternFull(pattern) => {
                let begin = if pattern.starts_with('^') { "" } else { "^" };
                let end = if pattern.ends_with('$') { "" } else { "$" };
                patterns.push(format!("{begin}{pattern}{end}"));
            }
            &GrammarTrigger::Token(token) => tokens.push(token),
        }
    }
    Ok((patterns, tokens))
}

/// A regular expression that matches this text.
fn escaped(text: &str) -> String {
    let mut pattern = String::new();
    for character in text.chars() {
        if r".^$|()*+?[]{}\".contains(character) {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

/// Whether the text is inside of the model's thoughts.
#[derive(Debug, Clone)]
struct Thoughts {
    tags: ThinkingTags,
    inside: bool,
    inside_at_begin: bool,
    /// The text's end, in which a tag may have begun.
    recent: Vec<u8>,
}

impl Thoughts {
    /// `prefix` is what the prompt ends with.
    fn new(tags: ThinkingTags, prefix: &str) -> Thoughts {
        let mut thoughts = Thoughts { tags, inside: false, inside_at_begin: false, recent: Vec::new() };
        thoughts.read(prefix.as_bytes());
        thoughts.recent.clear();
        thoughts.inside_at_begin = thoughts.inside;
        thoughts
    }

    fn reset(&mut self) {
        self.inside = self.inside_at_begin;
        self.recent.clear();
    }

    fn read(&mut self, piece: &[u8]) {
        self.recent.extend_from_slice(piece);
        loop {
            let start = std::slice::from_ref(&self.tags.start);
            let tags = if self.inside { &self.tags.ends } else { start };
            let found = tags.iter().filter_map(|tag| Some(find(&self.recent, tag.as_bytes())? + tag.len())).min();
            match found {
                Some(end) => {
                    self.recent.drain(..end);
                    self.inside = !self.inside;
                }
                None => {
                    let longest = tags.iter().map(String::len).max().unwrap_or(0);
                    let kept = self.recent.len().min(longest.saturating_sub(1));
                    self.recent.drain(..self.recent.len() - kept);
                    return;
                }
            }
        }
    }
}

/// Where `part` begins in `text`. An empty part is nowhere.
fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    (!part.is_empty()).then(|| text.windows(part.len()).position(|window| window == part))?
}
