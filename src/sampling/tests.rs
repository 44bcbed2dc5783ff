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
    let params =
        SamplerParams { top_k: 3, seed: Some(1), temperature: 5.0, min_p: 0.0, top_p: 1.0, ..SamplerParams::default() };
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
fn the_order_is_as_asked_for() {
    let vocab = vocab();
    // As hot as this, the draw is far from the best; one of three if top-k comes, whatever stands before or after it.
    let hot = |samplers: &str| SamplerParams {
        samplers: SamplerStep::list(samplers).unwrap(),
        temperature: 100.0,
        top_k: 3,
        seed: Some(1),
        ..SamplerParams::default()
    };
    let logits = logits(&vocab, 0);
    let mut order: Vec<Token> = (0..).take(logits.len()).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    let seen = |samplers: &str| {
        let mut sampler = Sampler::new(&vocab, &hot(samplers)).unwrap();
        (0..32).map(|_| sampler.sample(&logits).unwrap()).collect::<std::collections::BTreeSet<_>>()
    };
    let best: std::collections::BTreeSet<_> = order[..3].iter().copied().collect();
    assert_eq!(seen("top_k;temperature"), best);
    assert_eq!(seen("temperature;top_k"), best);
    assert!(!seen("temperature").is_subset(&best));
    // min-p of 0.05 leaves few while it is cold, and nearly all once it is hot.
    assert!(seen("min_p;temperature").len() < seen("temperature;min_p").len());
}

/// Adaptive-p alone, after what cuts the tail: it moves the choice towards tokens of the target's probability.
#[test]
fn adaptive_p_chooses_near_its_target() {
    let vocab = vocab();
    let mut logits = vec![f32::NEG_INFINITY; vocab.n_tokens()];
    // Probabilities of 0.64, 0.24, 0.09 and 0.03.
    for (token, logit) in [(10, 3.0), (11, 2.0), (12, 1.0), (13, 0.0)] {
        logits[token] = logit;
    }
    let share = |target: f32| {
        let params = SamplerParams {
            samplers: vec![SamplerStep::AdaptiveP],
            adaptive_target: target,
            seed: Some(5),
            ..SamplerParams::default()
        };
        let mut sampler = Sampler::new(&vocab, &params).unwrap();
        (0..200).filter(|_| sampler.sample(&logits).unwrap() == 10).count()
    };
    let (off, rare) = (share(-1.0), share(0.1));
    assert!(off > 100 && rare < off - 30, "{off} {rare}");
}

#[test]
fn other_samplers_run() {
    let vocab = vocab();
    let default = SamplerParams { seed: Some(3), ..SamplerParams::default() };
    let params = [
        SamplerParams { mirostat: Mirostat::V1 { tau: 5.0, eta: 0.1 }, ..default.clone() },
        SamplerParams { mirostat: Mirostat::V2 { tau: 5.0, eta: 0.1 }, ..default.clone() },
        SamplerParams { dry_multiplier: 0.8, ..default.clone() },
        SamplerParams { samplers: SamplerStep::sequence("kpi").unwrap(), ..default.clone() },
        SamplerParams { samplers: Vec::new(), ..default.clone() },
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
        SamplerParams { adaptive_decay: 1.0, ..SamplerParams::default() },
        SamplerParams { adaptive_target: f32::NAN, ..SamplerParams::default() },
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
