//! From logits to the next token: llama.cpp's samplers, in the order and with the defaults of its `llama-cli`.

mod constraint;
mod error;

use constraint::Constraint;
pub use constraint::{GrammarTrigger, ThinkingTags};
pub use error::SamplingError;

use crate::{
    ggml::{Candidates, RawSampler, SamplerKind},
    vocab::{Token, Vocab},
};

/// How tokens are chosen; [`Default`] gives llama-cli's settings.
///
/// With `temperature` at or below zero the most probable token is always taken. Otherwise the samplers run in this
/// order: logit biases, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature, and a draw from
/// what is left.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerParams {
    /// Seed of the draws; `None` takes a random one.
    pub seed: Option<u32>,
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

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            seed: None,
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
            Mirostat::Off => links.extend([
                SamplerKind::Penalties {
                    last_n: self.repeat_last_n as i32,
                    repeat: self.repeat_penalty,
                    frequency: self.frequency_penalty,
                    presence: self.presence_penalty,
                },
                SamplerKind::Dry {
                    multiplier: self.dry_multiplier,
                    base: self.dry_base,
                    allowed_length: self.dry_allowed_length,
                    last_n: self.dry_penalty_last_n as i32,
                    breakers: self.dry_sequence_breakers.clone(),
                },
                SamplerKind::TopNSigma(self.top_n_sigma),
                SamplerKind::TopK(self.top_k),
                SamplerKind::Typical(self.typical_p),
                SamplerKind::TopP(self.top_p),
                SamplerKind::MinP(self.min_p),
                SamplerKind::Xtc { probability: self.xtc_probability, threshold: self.xtc_threshold, seed },
                SamplerKind::Temperature {
                    temperature: self.temperature,
                    range: self.dynatemp_range,
                    exponent: self.dynatemp_exponent,
                },
                SamplerKind::Dist { seed },
            ]),
        }
        links
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

#[cfg(test)]
mod tests {
    use simlayer_testkit::{Rng, smollm2_path};

    use super::*;

    fn vocab() -> Vocab {
        Vocab::load(&smollm2_path()).unwrap()
    }

    fn logits(vocab: &Vocab, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..vocab.n_tokens()).map(|_| 3.0 * rng.normal()).collect()
    }

    fn best(logits: &[f32]) -> Token {
        (0..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
    }

    fn draw(vocab: &Vocab, params: &SamplerParams, n: u64) -> Vec<Token> {
        let mut sampler = Sampler::new(vocab, params).unwrap();
        (0..n).map(|step| sampler.sample(&logits(vocab, step)).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_best() {
        let vocab = vocab();
        let expected: Vec<_> = (0..8).map(|step| best(&logits(&vocab, step))).collect();
        for temperature in [0.0, -1.0] {
            let params = SamplerParams { temperature, ..SamplerParams::default() };
            assert_eq!(draw(&vocab, &params, 8), expected);
        }
        assert_eq!(draw(&vocab, &SamplerParams { top_k: 1, ..SamplerParams::default() }, 8), expected);
    }

    #[test]
    fn the_seed_decides() {
        let vocab = vocab();
        let with = |seed| SamplerParams { seed: Some(seed), ..SamplerParams::default() };
        assert_eq!(draw(&vocab, &with(7), 16), draw(&vocab, &with(7), 16));
        assert_ne!(draw(&vocab, &with(7), 16), draw(&vocab, &with(8), 16));

        let mut sampler = Sampler::new(&vocab, &with(7)).unwrap();
        assert_eq!(sampler.seed(), 7);
        let first: Vec<_> = (0..8).map(|step| sampler.sample(&logits(&vocab, step)).unwrap()).collect();
        let mut copy = sampler.try_clone().unwrap();
        for step in 8..16 {
            assert_eq!(sampler.sample(&logits(&vocab, step)), copy.sample(&logits(&vocab, step)));
        }
        sampler.reset().unwrap();
        let again: Vec<_> = (0..8).map(|step| sampler.sample(&logits(&vocab, step)).unwrap()).collect();
        assert_eq!(again, first);
        assert_ne!(Sampler::new(&vocab, &with(LLAMA_RANDOM_SEED)).unwrap().seed(), LLAMA_RANDOM_SEED);
    }

    #[test]
    fn draws_stay_among_the_best() {
        let vocab = vocab();
        let params = SamplerParams {
            top_k: 3,
            seed: Some(1),
            temperature: 5.0,
            min_p: 0.0,
            top_p: 1.0,
            ..SamplerParams::default()
        };
        let mut sampler = Sampler::new(&vocab, &params).unwrap();
        let logits = logits(&vocab, 0);
        let mut order: Vec<Token> = (0..).take(logits.len()).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..64 {
            seen.insert(sampler.sample(&logits).unwrap());
        }
        assert_eq!(seen, order[..3].iter().copied().collect());
    }

    #[test]
    fn biases_and_end_of_generation() {
        let vocab = vocab();
        let eos = vocab.eos().unwrap();
        let mut logits = logits(&vocab, 0);
        logits[eos as usize] = 100.0;
        let sample = |params: SamplerParams| Sampler::new(&vocab, &params).unwrap().sample(&logits).unwrap();
        assert_eq!(sample(SamplerParams::greedy()), eos);
        let ignoring = sample(SamplerParams { ignore_eos: true, ..SamplerParams::greedy() });
        assert!(!vocab.is_eog(ignoring), "{ignoring}");
        assert_eq!(sample(SamplerParams { logit_bias: vec![(5, 1000.0)], ..SamplerParams::greedy() }), 5);
    }

    #[test]
    fn penalties_count_the_prompt() {
        let vocab = vocab();
        let mut logits = vec![0.0; vocab.n_tokens()];
        (logits[100], logits[101]) = (2.0, 1.5);
        let params = SamplerParams { repeat_penalty: 2.0, repeat_last_n: 2, ..SamplerParams::greedy() };
        let mut sampler = Sampler::new(&vocab, &params).unwrap();
        assert_eq!(sampler.try_clone().unwrap().sample(&logits), Ok(100));
        sampler.accept(100).unwrap();
        assert_eq!(sampler.sample(&logits), Ok(101));
        // Two tokens later the prompt is out of sight.
        sampler.accept(7).unwrap();
        assert_eq!(sampler.sample(&logits), Ok(100));
    }

    #[test]
    fn a_grammar_is_followed_to_its_end() {
        let vocab = vocab();
        let grammar = Some("# numbers\nroot ::= \"[\" item (\", \" item){2} \"]\"\nitem ::= [0-9]{2,3}\n".to_owned());
        for seed in 0..4 {
            let params = SamplerParams { grammar: grammar.clone(), seed: Some(seed), ..SamplerParams::default() };
            let mut sampler = Sampler::new(&vocab, &params).unwrap();
            let mut tokens = Vec::new();
            for step in 0.. {
                let token = sampler.sample(&logits(&vocab, 100 * u64::from(seed) + step)).unwrap();
                if vocab.is_eog(token) {
                    break;
                }
                tokens.push(token);
            }
            let text = vocab.detokenize(&tokens, false).unwrap();
            let items: Vec<_> =
                text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap().split(", ").collect();
            let good = |item: &&str| (2..=3).contains(&item.len()) && item.bytes().all(|byte| byte.is_ascii_digit());
            assert!(items.len() == 3 && items.iter().all(good), "{text}");
        }
    }

    #[test]
    fn bad_grammars_say_what_is_wrong() {
        let vocab = vocab();
        let cases = [
            ("root = \"a\"", "expecting ::="),
            ("root ::= \"a", "unexpected end of input"),
            ("root ::= other", "no rule named 'other'"),
            ("start ::= \"a\"", "no rule named 'root'"),
            ("root ::= root \"a\"", "left recursion"),
            ("root ::= \"a\"{99999999}", "repetitions"),
            ("root ::= \"a\"{8,3}", "second number is below its first"),
            ("root ::= ([0-9]", "expecting ')'"),
            ("root ::= \"a\0\"", "NUL"),
            ("", "no rule named 'root'"),
        ];
        for (grammar, reason) in cases {
            let params = SamplerParams { grammar: Some(grammar.to_owned()), ..SamplerParams::default() };
            let error = Sampler::new(&vocab, &params).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains('\n'), "{grammar}: {error}");
        }
    }

    fn with_grammar(vocab: &Vocab, grammar: String) -> Result<Sampler, String> {
        let params = SamplerParams { grammar: Some(grammar), ..SamplerParams::greedy() };
        Sampler::new(vocab, &params).map_err(|error| error.to_string())
    }

    /// What recurses in llama.cpp: groups in groups, rules that begin with rules.
    fn nested(n: usize) -> String {
        format!("root ::= {}\"a\"{}", "(".repeat(n), " \"b\")".repeat(n))
    }

    fn chain(n: usize) -> String {
        let rules: String = (1..n).map(|rule| format!("r{rule} ::= r{}\n", rule + 1)).collect();
        format!("root ::= r1\n{rules}r{n} ::= \"a\"\n")
    }

    #[test]
    fn deep_grammars_run_or_are_refused() {
        let vocab = vocab();
        let small_stack = |grammar: String| {
            let vocab = vocab.clone();
            let run = move || {
                with_grammar(&vocab, grammar).and_then(|mut sampler| {
                    let token = sampler.sample(&logits(&vocab, 0)).map_err(|error| error.to_string())?;
                    sampler.reset().map_err(|error| error.to_string())?;
                    Ok(vocab.piece(token, false))
                })
            };
            std::thread::Builder::new().stack_size(256 << 10).spawn(run).unwrap().join().unwrap()
        };
        assert!(small_stack(nested(500)).unwrap().starts_with(b"a"));
        assert_eq!(small_stack(chain(100_000)), Ok(b"a".to_vec()));
        for depth in [20_000, 1_000_000] {
            let error = small_stack(nested(depth)).unwrap_err();
            assert!(error.contains("nested more than 10000 deep"), "{error}");
        }
        // Only what is nested: brackets in a literal, a set or a comment are none.
        let flat = format!("root ::= \"{0}\" | [{0}] | \"a\" # {0}", "(".repeat(20_000));
        assert!(small_stack(flat).is_ok());
    }

    #[test]
    fn grammars_that_explode_are_refused() {
        let vocab = vocab();
        let refused = |grammar: String, reason: &str| {
            let error = with_grammar(&vocab, grammar).unwrap_err();
            assert!(error.contains(reason), "{error}");
        };
        refused(format!("root ::= \"{}\"{{2000}}", "a".repeat(100_000)), "too large");
        refused(format!("root ::= {}", "\"a\"{ # many\n 0, 2000 } ".repeat(1000)), "too large");
        refused(nested(9_999), "too many ways to go on");
        // Each rule may be empty, or be the next one twice.
        let doubling: String = (1..40).map(|rule| format!("r{rule} ::= | r{0} r{0}\n", rule + 1)).collect();
        refused(format!("root ::= r1\n{doubling}r40 ::= \"a\""), "too many ways to begin");
        // Repetitions of repetitions: read at once, and refused where the ways on become too many.
        let mut sampler = with_grammar(&vocab, format!("root ::= ..{}", "+".repeat(120))).unwrap();
        let steps = (0..8).map_while(|step| sampler.sample(&logits(&vocab, step)).ok()).count();
        assert!(steps < 8, "{steps}");
        // As large, and no harm.
        assert!(with_grammar(&vocab, format!("root ::= ({})", "[a-z]{0,100} ".repeat(100))).is_ok());
    }

    /// llama.cpp ends the process when a grammar has no way on; here it is an error.
    #[test]
    fn a_grammar_without_a_way_on_is_an_error() {
        let vocab = vocab();
        let params = SamplerParams {
            grammar: Some("root ::= \"yes\"".to_owned()),
            logit_bias: (0..)
                .take(vocab.n_tokens())
                .filter(|&token| !vocab.is_eog(token))
                .map(|token| (token, f32::NEG_INFINITY))
                .collect(),
            ..SamplerParams::greedy()
        };
        let mut sampler = Sampler::new(&vocab, &params).unwrap();
        let result = sampler.sample(&logits(&vocab, 0));
        assert!(matches!(result, Err(SamplingError::Sample(_))), "{result:?}");
    }

    #[test]
    fn other_samplers_run() {
        let vocab = vocab();
        let default = SamplerParams { seed: Some(3), ..SamplerParams::default() };
        let params = [
            SamplerParams { mirostat: Mirostat::V1 { tau: 5.0, eta: 0.1 }, ..default.clone() },
            SamplerParams { mirostat: Mirostat::V2 { tau: 5.0, eta: 0.1 }, ..default.clone() },
            SamplerParams { dry_multiplier: 0.8, ..default.clone() },
            SamplerParams { xtc_probability: 0.5, top_n_sigma: 2.0, typical_p: 0.9, ..default.clone() },
            SamplerParams { dynatemp_range: 0.5, frequency_penalty: 0.5, presence_penalty: 0.5, ..default },
        ];
        for params in params {
            let tokens = draw(&vocab, &params, 8);
            assert_eq!(tokens, draw(&vocab, &params, 8), "{params:?}");
        }
    }

    #[test]
    fn wrong_input_is_refused() {
        let vocab = vocab();
        for params in [
            SamplerParams { repeat_penalty: 0.0, ..SamplerParams::default() },
            SamplerParams { repeat_penalty: f32::NAN, ..SamplerParams::default() },
            SamplerParams { presence_penalty: f32::INFINITY, ..SamplerParams::default() },
            SamplerParams { temperature: f32::NAN, ..SamplerParams::default() },
            SamplerParams { repeat_last_n: u32::MAX, ..SamplerParams::default() },
        ] {
            assert!(matches!(Sampler::new(&vocab, &params), Err(SamplingError::Parameter { .. })), "{params:?}");
        }
        let mut sampler = Sampler::new(&vocab, &SamplerParams::default()).unwrap();
        assert!(sampler.sample(&[0.0; 3]).is_err());
        assert!(sampler.sample(&[]).is_err());
        assert!(sampler.accept(-1).is_err() && sampler.accept(i32::MAX).is_err());
        // Logits of a broken model still give a token or an error.
        let nan = vec![f32::NAN; vocab.n_tokens()];
        let _ = sampler.sample(&nan);
        let minus = vec![f32::NEG_INFINITY; vocab.n_tokens()];
        let _ = sampler.sample(&minus);
    }
}
