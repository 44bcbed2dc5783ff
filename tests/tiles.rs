//! Caches in tiles (`kvarn4` and fewer bits), on the real model: what is lost, what they take, and that going back, copying, saving
//! and shrinking leave what there was.

mod common;

use common::{lazy_f16, logits, plain, session, smollm2, story};
use simlayer::{
    BatchEntry, Error, Model, Outputs, SeqId, Session, SessionParams, Token, ggml::Type, lazy::PrefillMode,
};
use simlayer_testkit::metrics::kl;

/// Prompt and answer: both end within a tile, and the answer finishes some.
const N_PROMPT: usize = 500;
const N_ANSWER: usize = 150;

fn tiles(k: Type, v: Type) -> SessionParams {
    let mut params = plain();
    (params.type_k, params.type_v) = (k, v);
    params.n_ctx = 2_048;
    params
}

fn run(session: &mut Session, seq: SeqId, tokens: &[Token]) -> Vec<f32> {
    let entry = BatchEntry { seq, tokens, outputs: Outputs::Last, prompt_end: false };
    session.run(&[entry]).unwrap_or_else(|error| panic!("{error}"));
    session.logits().to_vec()
}

fn one_by_one(session: &mut Session, seq: SeqId, tokens: &[Token]) -> Vec<Vec<f32>> {
    tokens.iter().map(|token| run(session, seq, &[*token])).collect()
}

fn mean_kl(base: &[Vec<f32>], other: &[Vec<f32>]) -> f64 {
    assert_eq!(base.len(), other.len());
    base.iter().zip(other).map(|(base, other)| kl(base, other)).sum::<f64>() / base.len() as f64
}

fn text(model: &Model) -> (Vec<Token>, Vec<Token>) {
    let mut prompt = story(model, N_PROMPT + N_ANSWER);
    let answer = prompt.split_off(N_PROMPT);
    (prompt, answer)
}

#[test]
fn four_bits_in_tiles_lose_less_than_q4_0() {
    let model = smollm2();
    let (prompt, answer) = text(&model);
    let base = logits(&model, &plain(), &prompt, &answer);
    let loss = |k, v| mean_kl(&base, &logits(&model, &tiles(k, v), &prompt, &answer));
    let q4 = loss(Type::Q4_0, Type::Q4_0);
    let [kvarn4, with_3, with_2] = [Type::KVARN4, Type::KVARN3, Type::KVARN2].map(|v| loss(Type::KVARN4, v));
    println!("q4_0 {q4:.5}; kvarn4 with values in kvarn4 {kvarn4:.5}, kvarn3 {with_3:.5}, kvarn2 {with_2:.5}");
    assert!(kvarn4 < q4, "{kvarn4}, q4_0 {q4}");
    assert!(kvarn4 < with_3 && with_3 < with_2 && with_2 < 0.5, "{kvarn4}, {with_3}, {with_2}");
}

/// Piece by piece the same tiles come about as layer by layer, but for what four bits change in the keys that follow.
#[test]
fn pieces_of_a_prompt_fill_tiles() {
    let model = smollm2();
    let (prompt, answer) = text(&model);
    let whole = logits(&model, &tiles(Type::KVARN4, Type::KVARN4), &prompt, &answer);
    let mut session = session(&model, tiles(Type::KVARN4, Type::KVARN4));
    let (first, rest) = prompt.split_at(1);
    run(&mut session, 0, first);
    let mut rows = Vec::new();
    for piece in rest.chunks(97) {
        rows = vec![run(&mut session, 0, piece)];
    }
    rows.extend(one_by_one(&mut session, 0, &answer));
    let loss = mean_kl(&whole, &rows);
    assert!(loss < 0.01, "{loss}");
    // Two tiles of keys and values as f16 are left of each layer: the sink, the newest, and what was not finished.
    let kv = session.kv();
    assert!(kv.compression > 2.2, "{kv:?}");
}

#[test]
fn tokens_are_taken_back_within_tiles() {
    let model = smollm2();
    let (prompt, answer) = text(&model);
    let params = tiles(Type::KVARN4, Type::KVARN3);
    let expected = logits(&model, &params, &prompt, &answer);
    let mut session = session(&model, params);
    session.prefill(&prompt).expect("prefill");
    let first = one_by_one(&mut session, 0, &answer);
    assert_eq!(mean_kl(&expected[1..], &first), 0.0);
    // Within the tile that is not finished, in one that is, and long before.
    for n in [N_PROMPT + N_ANSWER - 3, N_PROMPT + 70, N_PROMPT + 5] {
        assert!(session.truncate(n), "{n}");
        let again = one_by_one(&mut session, 0, &answer[n - N_PROMPT..]);
        let loss = mean_kl(&expected[1 + n - N_PROMPT..], &again);
        println!("from {n} again: {loss:.6}");
        assert!(loss < 0.01, "from {n}: {loss}");
    }
}

#[test]
fn states_and_copies_go_on_as_they_would_have() {
    let model = smollm2();
    let (prompt, answer) = text(&model);
    let params = tiles(Type::KVARN4, Type::Q8_0);
    let expected = logits(&model, &params, &prompt, &answer);
    let (before, after) = answer.split_at(70);

    let mut one = session(&model, params.clone());
    one.prefill(&prompt).expect("prefill");
    one_by_one(&mut one, 0, before);
    let mut state = Vec::new();
    one.save_seq(0, &mut state).expect("saved");
    one.sequence(0).copy_to(1).expect("a copy");
    // Another text in the first meanwhile, which finishes tiles of its own.
    one_by_one(&mut one, 0, &prompt[..80]);
    assert_eq!(one_by_one(&mut one, 1, after), expected[1 + 70..]);

    let mut other = session(&model, params);
    other.load_seq(0, &state).expect("loaded");
    assert_eq!(one_by_one(&mut other, 0, after), expected[1 + 70..]);
    let wrong = session(&model, tiles(Type::KVARN3, Type::Q8_0)).load_seq(0, &state).expect_err("other types");
    assert!(wrong.to_string().contains("kvarn4/q8_0"), "{wrong}");
}

/// In lazy layers, from f16 and from tiles, layer by layer and windowed from the first token on; the ring goes round.
#[test]
fn rings_of_tiles_keep_the_window() {
    let model = smollm2();
    let (prompt, answer) = text(&model);
    let ways = [(Type::F16, PrefillMode::Full), (Type::KVARN4, PrefillMode::Full), (Type::F16, PrefillMode::Window)];
    for (active, prefill) in ways {
        let mut params = lazy_f16("layers:3-20", 192);
        params.lazy.prefill = Some(prefill);
        let base = logits(&model, &params, &prompt, &answer);
        (params.lazy.type_k, params.lazy.type_v) = (Some(Type::KVARN4), Some(Type::KVARN4));
        (params.type_k, params.type_v) = (active, active);
        for layer_major in [true, false] {
            params.layer_major = layer_major;
            let loss = mean_kl(&base, &logits(&model, &params, &prompt, &answer));
            println!("active {active}, {prefill:?}, layer by layer {layer_major}: {loss:.5}");
            assert!(loss < 0.05, "active {active}, {prefill:?}, layer by layer {layer_major}: {loss}");
        }
    }
}

#[test]
fn tiles_are_refused_where_they_cannot_be_read() {
    let model = smollm2();
    let mut params = tiles(Type::KVARN4, Type::KVARN4);
    params.fused_attention = false;
    match Session::new(&model, params) {
        Err(Error::Params(why)) => assert!(why.contains("kvarn4") && why.contains("--ggml-kernels"), "{why}"),
        other => panic!("{other:?}"),
    }
}
