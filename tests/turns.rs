//! Conversations whose answers are taken back: what follows is what follows in a session that never did it.

mod common;

use std::collections::BTreeSet;

use common::{load, plain, session, smollm2, story, top, unquantized::smollm2_f32_path};
use simlayer::{BatchEntry, Checkpoint, Model, Outputs, SeqId, Session, SessionParams, Token, ggml::Type};
use simlayer_testkit::{RandomModel, Rng, metrics::kl};

fn params(policy: &str, ty: Type) -> SessionParams {
    let mut params = plain();
    params.lazy.policy = policy.parse().expect("a policy");
    (params.lazy.n_window, params.lazy.n_slack) = (128, 48);
    (params.type_k, params.type_v) = (ty, ty);
    params.n_ubatch = 256;
    // As llama-server gives prompts.
    params.split_prompts = true;
    params
}

fn run(session: &mut Session, seq: SeqId, tokens: &[Token], outputs: Outputs, prompt_end: bool) {
    session.run(&[BatchEntry { seq, tokens, outputs, prompt_end }]).unwrap_or_else(|error| panic!("{error}"));
}

/// `n` greedy tokens behind the last logits. The last of them is not read.
fn answer(session: &mut Session, seq: SeqId, n: usize) -> Vec<Token> {
    let mut tokens = vec![top(session.logits())];
    while tokens.len() < n {
        let token = tokens[tokens.len() - 1];
        run(session, seq, &[token], Outputs::Last, false);
        tokens.push(top(session.logits()));
    }
    tokens
}

/// Reads a prompt as llama-server does when it makes checkpoints: the last four tokens apart.
fn read(session: &mut Session, seq: SeqId, tokens: &[Token]) {
    let (first, last) = tokens.split_at(tokens.len().saturating_sub(4));
    if !first.is_empty() {
        run(session, seq, first, Outputs::None, false);
    }
    run(session, seq, last, Outputs::Last, true);
}

/// What is said in one conversation, and how long the answers are. Those of the first turn and of the third are longer than
/// the slack.
struct Script {
    prompts: Vec<Vec<Token>>,
    lengths: Vec<usize>,
}

impl Script {
    fn new(model: &Model, seed: u64) -> Script {
        let mut rng = Rng::new(seed);
        let text = story(model, 3_000);
        let mut piece = |least: usize, most: usize| {
            let (start, n) = (rng.below(text.len() - most), least + rng.below(most - least));
            text[start..start + n].to_vec()
        };
        let prompts = vec![piece(250, 500), piece(10, 40), piece(5, 30), piece(10, 60)];
        Script { prompts, lengths: vec![56, 10, 60, 10] }
    }

    /// One turn in a session: the prompt is read, answered, and the answer's last token read.
    fn turn(&self, session: &mut Session, seq: SeqId, turn: usize) -> Vec<Token> {
        read(session, seq, &self.prompts[turn]);
        self.answer(session, seq, turn)
    }

    fn answer(&self, session: &mut Session, seq: SeqId, turn: usize) -> Vec<Token> {
        let tokens = answer(session, seq, self.lengths[turn]);
        run(session, seq, &tokens[tokens.len() - 1..], Outputs::None, false);
        tokens
    }

    /// The answers of a session that goes straight through.
    fn straight(&self, model: &Model, params: &SessionParams) -> Vec<Vec<Token>> {
        let mut session = session(model, params.clone());
        (0..self.prompts.len()).map(|turn| self.turn(&mut session, 0, turn)).collect()
    }
}

/// Conversations under these rules and types in turn: each once, or as many as `SIMLAYER_TEST_CONVERSATIONS` says.
fn conversations(model: &Model, policies: &[&str]) -> impl Iterator<Item = (SessionParams, Script, String)> {
    let types = [Type::F16, Type::Q4_0];
    let asked = std::env::var("SIMLAYER_TEST_CONVERSATIONS").ok().map(|text| text.parse().expect("a number"));
    (0..asked.unwrap_or(policies.len() * types.len())).map(move |i| {
        let (policy, ty) = (policies[i % policies.len()], types[(i / policies.len()) % 2]);
        (params(policy, ty), Script::new(model, i as u64), format!("conversation {i}, {policy}, {ty}"))
    })
}

/// Each answer is taken back and asked for again: by cutting to the prompt's last token, and as llama-server does from a
/// checkpoint before the last four, one token further back.
#[test]
fn an_answer_taken_back_comes_again() {
    let model = smollm2();
    for (params, script, name) in conversations(&model, &["budget:0.5", "layers:2-25", "threshold:0.8", "kl:0.3"]) {
        let straight = script.straight(&model, &params);
        let mut session = session(&model, params);
        for (turn, prompt) in script.prompts.iter().enumerate() {
            let n = prompt.len();
            let end = session.n_past() + n;
            run(&mut session, 0, &prompt[..n - 4], Outputs::None, false);
            let checkpoint = session.checkpoint(0);
            run(&mut session, 0, &prompt[n - 4..], Outputs::Last, true);
            let logits = session.logits().to_vec();
            assert_eq!(script.answer(&mut session, 0, turn), straight[turn], "{name}, turn {turn}");

            assert!(session.truncate(end - 1), "{name}, turn {turn}");
            run(&mut session, 0, &prompt[n - 1..], Outputs::Last, false);
            assert!(session.logits() == logits, "{name}, turn {turn}: other logits");
            assert_eq!(script.answer(&mut session, 0, turn), straight[turn], "{name}, turn {turn}, again");

            let restored = session.restore(0, &checkpoint).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((restored.n_past, restored.n_read), (end - 4, 0), "{name}, turn {turn}");
            assert!(session.truncate(end - 5), "{name}, turn {turn}");
            // The tokens before the last four come apart, for the next checkpoint.
            run(&mut session, 0, &prompt[n - 5..n - 4], Outputs::None, false);
            run(&mut session, 0, &prompt[n - 4..], Outputs::Last, true);
            assert!(session.logits() == logits, "{name}, turn {turn}: other logits from the checkpoint");
            assert_eq!(
                script.answer(&mut session, 0, turn),
                straight[turn],
                "{name}, turn {turn}, from the checkpoint"
            );
        }
    }
}

/// The second turn is asked otherwise after all four were, from a checkpoint before it; and in a copy, while the original
/// goes on.
#[test]
fn an_edited_turn_and_a_copy_go_on_as_if_nothing_had_been() {
    let model = smollm2();
    for (params, script, name) in conversations(&model, &["budget:0.5", "layers:2-25"]) {
        let mut edited = Script::new(&model, 100);
        edited.prompts[0].clone_from(&script.prompts[0]);
        let [straight, otherwise] = [&script, &edited].map(|script| script.straight(&model, &params));

        let mut session = session(&model, params);
        assert_eq!(script.turn(&mut session, 0, 0), straight[0], "{name}");
        session.fork(0, 1, &BTreeSet::new()).expect("a copy");
        let (checkpoint, n) = (session.checkpoint(0), session.n_past());
        for (turn, expected) in straight.iter().enumerate().skip(1) {
            assert_eq!(script.turn(&mut session, 0, turn), *expected, "{name}, turn {turn}");
        }
        for (turn, expected) in otherwise.iter().enumerate().skip(1) {
            assert_eq!(edited.turn(&mut session, 1, turn), *expected, "{name}, turn {turn} of the copy");
        }
        let restored = session.restore(0, &checkpoint).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((restored.n_past, restored.n_read), (n, 0), "{name}");
        for (turn, expected) in otherwise.iter().enumerate().skip(1) {
            assert_eq!(edited.turn(&mut session, 0, turn), *expected, "{name}, edited turn {turn}");
        }
    }
}

/// A short last piece of a prompt does not decide alone: the queries before it count as well.
#[test]
fn a_prompt_in_pieces_is_decided_by_as_many_queries_as_a_whole_one() {
    // With quantised weights one query's score depends on how many tokens are multiplied at once.
    let model = load(&smollm2_f32_path());
    let tokens = story(&model, 600);
    for policy in ["budget:0.5", "output:0.5"] {
        let scores = |pieces: &[usize], split_prompts: bool| -> Vec<f32> {
            let mut params = params(policy, Type::F16);
            (params.layer_major, params.split_prompts) = (false, split_prompts);
            let mut session = session(&model, params);
            let mut rest = &tokens[..];
            for &n in pieces {
                let (piece, behind) = rest.split_at(n);
                run(&mut session, 0, piece, Outputs::Last, behind.is_empty());
                rest = behind;
            }
            assert_eq!(session.layers(0).iter().filter(|layer| layer.lazy).count(), 15);
            session.layers(0).iter().map(|layer| layer.score.expect("a score")).collect()
        };
        let whole = scores(&[600], true);
        let mean_difference = |pieces: &[usize], split_prompts: bool| {
            let found = scores(pieces, split_prompts);
            found.iter().zip(&whole).map(|(a, b)| (a - b).abs()).sum::<f32>() / whole.len() as f32
        };
        for pieces in [&[596, 4][..], &[300, 285, 11, 4], &[599, 1]] {
            let [together, alone] = [true, false].map(|split| mean_difference(pieces, split));
            assert!(together < 0.01 && together < alone / 3.0, "{policy}, {pieces:?}: {together}, {alone}");
        }
        assert_eq!(mean_difference(&[568, 32], true), 0.0, "{policy}: a piece of as many queries as are scored");
    }
}

/// What a checkpoint lacks because a layer has become lazy since is read anew.
#[test]
fn a_checkpoint_of_before_a_layer_was_lazy_is_read_anew() {
    let model = smollm2();
    let tokens = story(&model, 700);
    for policy in ["budget:0.5", "threshold:0.8"] {
        let mut session = session(&model, params(policy, Type::F16));
        run(&mut session, 0, &tokens[..400], Outputs::None, false);
        let checkpoint = session.checkpoint(0);
        run(&mut session, 0, &tokens[400..500], Outputs::Last, true);
        assert!(session.layers(0).iter().any(|layer| layer.lazy), "{policy}");
        run(&mut session, 0, &tokens[500..700], Outputs::Last, false);
        let restored = session.restore(0, &checkpoint).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((restored.n_past, restored.n_read), (400, 400), "{policy}");
        assert!(session.layers(0).iter().all(|layer| !layer.lazy), "{policy}");
        assert_eq!(session.n_past(), 400);
        // Also into a sequence of other tokens, or of none.
        run(&mut session, 3, &tokens[5..50], Outputs::None, false);
        for seq in [3, 4] {
            let restored = session.restore(seq, &checkpoint).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((restored.n_read, session.seq_n_past(seq)), (400, 400), "{policy}");
        }
        run(&mut session, 0, &tokens[400..450], Outputs::Last, false);
        let expected = session.logits().to_vec();
        run(&mut session, 3, &tokens[400..450], Outputs::Last, false);
        assert!(session.logits() == expected, "{policy}");
    }
}

/// From `seq_resumable` on every cut succeeds, and what follows it is near to a session that never went beyond it: a lazy
/// layer's last tokens are then four-bit ones, but none is missing.
#[test]
fn as_many_tokens_as_the_slack_can_be_taken_back() {
    let model = smollm2();
    let tokens = story(&model, 640);
    let mut params = params("layers:2-25", Type::F16);
    (params.keep_prompt_end, params.kv_exact) = (false, 0);
    let logits_at = |session: &mut Session, n: usize| {
        run(session, 0, &tokens[n..n + 1], Outputs::Last, false);
        session.logits().to_vec()
    };
    for taken_back in [1, 20, 48] {
        let mut session = session(&model, params.clone());
        run(&mut session, 0, &tokens[..600], Outputs::Last, true);
        let held = session.checkpoint(0);
        let n = 600 - taken_back;
        assert!(session.seq_resumable(0) <= n && session.seq_can_truncate(0, n));
        assert!(!session.seq_can_truncate(0, 600 - 50), "more than the slack");
        assert!(session.truncate(n));
        let found = logits_at(&mut session, n);
        let mut straight = common::session(&model, params.clone());
        run(&mut straight, 0, &tokens[..n], Outputs::Last, true);
        let expected = logits_at(&mut straight, n);
        let kl = kl(&expected, &found);
        assert!(kl < 1e-3, "{taken_back} taken back: {kl}");
        // The sequence is shorter than the checkpoint now, unless it has grown back to it.
        let expected = if taken_back == 1 { 0 } else { 600 };
        assert_eq!(session.restore(0, &held).expect("read anew").n_read, expected);
    }
}

/// SmolLM2, half of the layers lazy: what cannot be brought back by cutting is a few megabytes.
#[test]
fn a_checkpoint_is_small() {
    let model = smollm2();
    for ty in [Type::F16, Type::Q4_0] {
        let mut params = plain();
        params.lazy.policy = "budget:0.5".parse().expect("a policy");
        (params.type_k, params.type_v) = (ty, ty);
        let mut session = session(&model, params);
        session.prefill(&story(&model, 6_000)).expect("prefill");
        assert_eq!(session.layers(0).iter().filter(|layer| layer.lazy).count(), 15);
        let bytes = session.checkpoint(0).as_bytes().len();
        assert_eq!(bytes, session.seq_checkpoint_bytes(0));
        let whole = session.seq_state_bytes(0);
        let start = std::time::Instant::now();
        let checkpoint = session.checkpoint(0);
        let taken = start.elapsed();
        let start = std::time::Instant::now();
        assert_eq!(session.restore(0, &checkpoint).expect("restored").n_read, 0);
        eprintln!("{ty}: {bytes} bytes of {whole}, made in {taken:?}, restored in {:?}", start.elapsed());
        // Keys of lazy layers are in eight bits beside f16, and in four beside q4_0, where active layers have exact tokens, too.
        let bound = if ty == Type::F16 { 5_500_000 } else { 5_200_000 };
        assert!(bytes <= bound, "{ty}: {bytes} bytes");
    }
}

/// A file of the same shape with other weights.
#[test]
fn states_of_other_weights_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let [one, other] = [1, 2].map(|seed| {
        let path = folder.path().join(format!("{seed}.gguf"));
        RandomModel { seed, ..RandomModel::default() }.write(&path);
        load(&path)
    });
    let [mut first, mut second] = [&one, &other].map(|model| session(model, plain()));
    first.prefill(&[1, 2, 3, 4, 5]).expect("prefill");
    let mut whole = Vec::new();
    first.save_seq(0, &mut whole).expect("saved");
    let checkpoint = first.checkpoint(0);
    for error in [second.load_seq(0, &whole).map(drop), second.restore(0, &checkpoint).map(drop)] {
        let error = error.expect_err("another model's").to_string();
        assert!(error.contains("with other weights"), "{error}");
    }
    let mut again = session(&one, plain());
    again.load_seq(0, &whole).expect("its own");
    // One kind of state is not taken for the other.
    assert!(again.load_seq(0, checkpoint.as_bytes()).is_err());
    assert!(again.restore(0, &Checkpoint::from_bytes(whole)).is_err());
}
