//! From logits to the next token: llama.cpp's samplers, in the order and with the defaults of its `llama-cli`.

mod constraint;
mod error;
mod order;
mod recommended;
#[cfg(test)]
mod tests;

use constraint::Constraint;
pub use constraint::{GrammarTrigger, ThinkingTags};
pub use error::SamplingError;
pub use order::SamplerStep;

use crate::{
    ggml::{Candidates, RawSampler, SamplerKind},
    vocab::{Token, Vocab},
};

/// How tokens are chosen; [`Default`] gives llama-cli's settings.
///
/// With `temperature` at or below zero the most probable token is always taken. Otherwise logit biases come first, then
/// `samplers` in their order, and a draw from what is left.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerParams {
    /// Seed of the draws; `None` takes a random one.
    pub seed: Option<u32>,
    /// What runs, in this order. The numbers of others do not count.
    pub samplers: Vec<SamplerStep>,
    /// 1.0 leaves the probabilities as they are; at or below zero the most probable token is taken.
    pub temperature: f32,
    /// Half the width of a temperature range that follows the entropy; 0.0 is off.
    pub dynatemp_range: f32,
    /// How the entropy maps to the temperature range.
    pub dynatemp_exponent: f32,
    /// Keep the `top_k` most probable tokens; 0 or less keeps all.
    pub top_k: i32,
    /// Keep the most probable tokens that together have this probability; 1.0 is off.
    pub top_p: f32,
    /// Keep tokens with at least this share of the best one's probability; 0.0 is off.
    pub min_p: f32,
    /// Locally typical sampling; 1.0 is off.
    pub typical_p: f32,
    /// Keep tokens within this many standard deviations of the best logit; negative is off.
    pub top_n_sigma: f32,
    /// Chance that XTC takes the best tokens away; 0.0 is off.
    pub xtc_probability: f32,
    /// Probability above which XTC takes a token away; above 0.5 it is off.
    pub xtc_threshold: f32,
    /// How many last tokens, of the prompt too, the penalties look at; 0 is off.
    pub repeat_last_n: u32,
    /// Divides the logits of tokens seen; 1.0 is off.
    pub repeat_penalty: f32,
    /// Taken from the logits of tokens for each time they were seen; 0.0 is off.
    pub frequency_penalty: f32,
    /// Taken from the logits of tokens seen at all; 0.0 is off.
    pub presence_penalty: f32,
    /// Strength of DRY, which punishes the continuation of a repeated sequence; 0.0 is off.
    pub dry_multiplier: f32,
    /// Base of DRY's exponential growth.
    pub dry_base: f32,
    /// Length of a repetition that DRY allows.
    pub dry_allowed_length: i32,
    /// How many last tokens DRY looks at; 0 is off.
    pub dry_penalty_last_n: u32,
    /// Texts that break a repetition.
    pub dry_sequence_breakers: Vec<String>,
    /// Probability near which [`SamplerStep::AdaptiveP`] draws, 0.0 to 1.0; negative is off.
    pub adaptive_target: f32,
    /// How long its past counts, 0.0 to 0.99: about the last 1 / (1 - decay) tokens.
    pub adaptive_decay: f32,
    /// Mirostat instead of the filters above.
    pub mirostat: Mirostat,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(Token, f32)>,
    /// Never choose a token that ends the generation.
    pub ignore_eos: bool,
    /// A GBNF grammar, with a rule named `root`, that the generated text follows.
    pub grammar: Option<String>,
    /// What makes the grammar hold, from there on: until then any text goes. Without any it holds from the beginning.
    pub grammar_triggers: Vec<GrammarTrigger>,
    /// What of the grammar's text the prompt ends with already. A grammar with triggers does not begin there.
    pub grammar_prefix: String,
    /// What marks the model's thoughts, in which no trigger counts.
    pub thinking: Option<ThinkingTags>,
}

/// Sampling that steers towards a target surprise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mirostat {
    Off,
    /// Mirostat with its target entropy and learning rate.
    V1 {
        tau: f32,
        eta: f32,
    },
    /// Mirostat 2.0 with its target entropy and learning rate.
    V2 {
        tau: f32,
        eta: f32,
    },
}

impl Mirostat {
    /// llama.cpp's target entropy and learning rate.
    pub const TAU: f32 = 5.0;
    pub const ETA: f32 = 0.1;

    /// The version by its number, 1 or 2; any other is off.
    pub fn new(version: i64, tau: f32, eta: f32) -> Mirostat {
        match version {
            1 => Mirostat::V1 { tau, eta },
            2 => Mirostat::V2 { tau, eta },
            _ => Mirostat::Off,
        }
    }

    /// 0 where it is off.
    pub fn version(self) -> i64 {
        match self {
            Mirostat::Off => 0,
            Mirostat::V1 { .. } => 1,
            Mirostat::V2 { .. } => 2,
        }
    }

    /// Target entropy and learning rate: where it is off those that it would have if it were turned on.
    pub fn tau_and_eta(self) -> (f32, f32) {
        match self {
            Mirostat::Off => (Mirostat::TAU, Mirostat::ETA),
            Mirostat::V1 { tau, eta } | Mirostat::V2 { tau, eta } => (tau, eta),
        }
    }
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            seed: None,
            samplers: SamplerStep::DEFAULT.to_vec(),
            temperature: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 64,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).into(),
            adaptive_target: -1.0,
            adaptive_decay: 0.9,
            mirostat: Mirostat::Off,
            logit_bias: Vec::new(),
            ignore_eos: false,
            grammar: None,
            grammar_triggers: Vec::new(),
            grammar_prefix: String::new(),
            thinking: None,
        }
    }
}

impl SamplerParams {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        SamplerParams { temperature: 0.0, ..SamplerParams::default() }
    }

    /// Checks what would make a sampler fail, or take absurd amounts of memory, later on.
    fn check(&self) -> Result<(), SamplingError> {
        const MAX_LAST_N: u32 = 1 << 24;
        let positive = self.repeat_penalty > 0.0 && (1.0 / self.repeat_penalty).is_finite();
        let finite = |value: f32| value.is_finite();
        let checks = [
            ("repeat_penalty", self.repeat_penalty.into(), finite(self.repeat_penalty) && positive, "above 0"),
            ("frequency_penalty", self.frequency_penalty.into(), finite(self.frequency_penalty), "finite"),
            ("presence_penalty", self.presence_penalty.into(), finite(self.presence_penalty), "finite"),
            ("temperature", self.temperature.into(), !self.temperature.is_nan(), "a number"),
            ("adaptive_target", self.adaptive_target.into(), self.adaptive_target <= 1.0, "at most 1"),
            (
                "adaptive_decay",
                self.adaptive_decay.into(),
                (0.0..=0.99).contains(&self.adaptive_decay),
                "from 0 to 0.99",
            ),
            ("repeat_last_n", self.repeat_last_n.into(), self.repeat_last_n <= MAX_LAST_N, "at most 16777216"),
            (
                "dry_penalty_last_n",
                self.dry_penalty_last_n.into(),
                self.dry_penalty_last_n <= MAX_LAST_N,
                "at most 16777216",
            ),
        ];
        match checks.into_iter().find(|(_, _, good, _)| !good) {
            Some((name, value, _, must)) => Err(SamplingError::Parameter { name, value, must }),
            None => Ok(()),
        }
    }

    fn links(&self, vocab: &Vocab, seed: u32) -> Vec<SamplerKind> {
        let mut bias = self.logit_bias.clone();
        if self.ignore_eos {
            bias.extend(vocab.eog_tokens().into_iter().map(|token| (token, f32::NEG_INFINITY)));
        }
        bias.extend(vocab.raw().suppressed().into_iter().map(|token| (token, f32::NEG_INFINITY)));

        let mut links = Vec::new();
        if !bias.is_empty() {
            links.push(SamplerKind::LogitBias(bias));
        }
        let plain_temperature = SamplerKind::Temperature { temperature: self.temperature, range: 0.0, exponent: 1.0 };
        match self.mirostat {
            Mirostat::V1 { tau, eta } => {
                links.extend([plain_temperature, SamplerKind::Mirostat { seed, tau, eta }]);
            }
            Mirostat::V2 { tau, eta } => {
                links.extend([plain_temperature, SamplerKind::MirostatV2 { seed, tau, eta }]);
            }
            Mirostat::Off => {
                links.extend(self.samplers.iter().filter_map(|&step| self.link(step, seed)));
                links.push(match self.samplers.contains(&SamplerStep::AdaptiveP) {
                    true => SamplerKind::AdaptiveP { target: self.adaptive_target, decay: self.adaptive_decay, seed },
                    false => SamplerKind::Dist { seed },
                });
            }
        }
        links
    }

    /// A sampler with its numbers; nothing for the one that chooses, which comes last.
    fn link(&self, step: SamplerStep, seed: u32) -> Option<SamplerKind> {
        Some(match step {
            SamplerStep::Penalties => SamplerKind::Penalties {
                last_n: self.repeat_last_n as i32,
                repeat: self.repeat_penalty,
                frequency: self.frequency_penalty,
                presence: self.presence_penalty,
            },
            SamplerStep::Dry => SamplerKind::Dry {
                multiplier: self.dry_multiplier,
                base: self.dry_base,
                allowed_length: self.dry_allowed_length,
                last_n: self.dry_penalty_last_n as i32,
                breakers: self.dry_sequence_breakers.clone(),
            },
            SamplerStep::TopNSigma => SamplerKind::TopNSigma(self.top_n_sigma),
            SamplerStep::TopK => SamplerKind::TopK(self.top_k),
            SamplerStep::Typical => SamplerKind::Typical(self.typical_p),
            SamplerStep::TopP => SamplerKind::TopP(self.top_p),
            SamplerStep::MinP => SamplerKind::MinP(self.min_p),
            SamplerStep::Xtc => {
                SamplerKind::Xtc { probability: self.xtc_probability, threshold: self.xtc_threshold, seed }
            }
            SamplerStep::Temperature => SamplerKind::Temperature {
                temperature: self.temperature,
                range: self.dynatemp_range,
                exponent: self.dynatemp_exponent,
            },
            SamplerStep::Infill => SamplerKind::Infill,
            SamplerStep::AdaptiveP => return None,
        })
    }
}

/// The seed that means "take a random one" to llama.cpp: its `--seed -1`.
const LLAMA_RANDOM_SEED: u32 = u32::MAX;

/// Chooses tokens, one after another, for one sequence.
#[derive(Debug)]
pub struct Sampler {
    chain: RawSampler,
    grammar: Option<Constraint>,
    candidates: Candidates,
    n_vocab: usize,
    seed: u32,
}

impl Sampler {
    /// A sampler for logits of this vocabulary.
    ///
    /// # Errors
    /// [`SamplingError::Parameter`] when a parameter is out of range, [`SamplingError::Grammar`] when the grammar does
    /// not parse, a trigger is no regular expression, or the prefix is none of the grammar's texts.
    pub fn new(vocab: &Vocab, params: &SamplerParams) -> Result<Sampler, SamplingError> {
        params.check()?;
        let seed = params.seed.filter(|&seed| seed != LLAMA_RANDOM_SEED).unwrap_or_else(random_seed);
        let chain = RawSampler::chain(vocab.raw(), &params.links(vocab, seed)).map_err(SamplingError::Sample)?;
        let grammar = match &params.grammar {
            Some(text) => Some(Constraint::new(
                vocab,
                text,
                &params.grammar_triggers,
                &params.grammar_prefix,
                params.thinking.as_ref(),
            )?),
            None => None,
        };
        Ok(Sampler { chain, grammar, candidates: Candidates::default(), n_vocab: vocab.n_tokens(), seed })
    }

    /// The seed in use: the one asked for, or the random one taken.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// Chooses the token that follows, and remembers it.
    ///
    /// `logits` has one number for each token of the vocabulary.
    ///
    /// # Errors
    /// [`SamplingError::Sample`] when the length of `logits` is wrong, or the grammar allows no token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Token, SamplingError> {
        if logits.len() != self.n_vocab {
            let message = format!("{} logits for a vocabulary of {} tokens", logits.len(), self.n_vocab);
            return Err(SamplingError::Sample(message));
        }
        let mut token = self.choose(logits, false)?;
        // Checking every token against the grammar is slow. As llama.cpp does, sample freely first; the draw counts
        // when the grammar allows it, and is done again among the allowed tokens when not.
        if !self.allows(token)? {
            token = self.choose(logits, true)?;
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(token)?;
        }
        self.chain.accept(token).map_err(SamplingError::Sample)?;
        Ok(token)
    }

    /// Tells the sampler of a token that it did not choose, such as the prompt's. Penalties count it; the grammar, which
    /// is about the generated text, does not see it.
    ///
    /// # Errors
    /// [`SamplingError::Sample`] when the number is no token of the vocabulary.
    pub fn accept(&mut self, token: Token) -> Result<(), SamplingError> {
        self.chain.accept(token).map_err(SamplingError::Sample)
    }

    /// Forgets all tokens and starts the grammar and the random numbers anew.
    ///
    /// # Errors
    /// [`SamplingError::Sample`] when llama.cpp fails to do so.
    pub fn reset(&mut self) -> Result<(), SamplingError> {
        if let Some(grammar) = &mut self.grammar {
            grammar.reset()?;
        }
        self.chain.reset().map_err(SamplingError::Sample)
    }

    /// A sampler in the same state, for a sequence that branches off.
    ///
    /// # Errors
    /// [`SamplingError::Sample`] when llama.cpp fails to copy it.
    pub fn try_clone(&self) -> Result<Sampler, SamplingError> {
        let grammar = self.grammar.as_ref().map(Constraint::try_clone).transpose();
        Ok(Sampler {
            chain: self.chain.try_clone().map_err(SamplingError::Sample)?,
            grammar: grammar?,
            candidates: Candidates::default(),
            n_vocab: self.n_vocab,
            seed: self.seed,
        })
    }

    fn choose(&mut self, logits: &[f32], by_grammar: bool) -> Result<Token, SamplingError> {
        self.candidates.fill(logits);
        if by_grammar && let Some(grammar) = &mut self.grammar {
            grammar.apply(&mut self.candidates)?;
        }
        self.chain.apply(&mut self.candidates).map_err(SamplingError::Sample)?;
        self.candidates.selected().ok_or_else(|| SamplingError::Sample("every token was filtered out".to_owned()))
    }

    fn allows(&mut self, token: Token) -> Result<bool, SamplingError> {
        let Some(grammar) = &mut self.grammar else { return Ok(true) };
        self.candidates.fill_one(token);
        grammar.apply(&mut self.candidates)?;
        Ok(self.candidates.first_logit().is_some_and(|logit| logit > f32::NEG_INFINITY))
    }
}

/// A seed that differs from run to run.
fn random_seed() -> u32 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // The standard library seeds its hash maps from the system's random numbers.
    let random = RandomState::new().build_hasher().finish() as u32;
    if random == LLAMA_RANDOM_SEED { 0 } else { random }
}
