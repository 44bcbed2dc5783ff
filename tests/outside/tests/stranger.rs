//! What a stranger's program can do, on a real model.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use simlayer::{AddBos, Error, GenerationEnd, LayerKind, Model, ModelParams, Session, SessionParams, Special, Token};
use simlayer_outside::{best, budget, continue_together, model_path, plain, report, stream};

fn model() -> Model {
    Model::load(model_path(), &ModelParams::default()).expect("SmolLM2 (cargo xtask demo fetches it)")
}

/// The beginning of the demo's story.
fn story(model: &Model, n: usize) -> Vec<Token> {
    let text = include_str!("../../../xtask/demo/story.txt");
    let tokens = model.vocab().tokenize(text, AddBos::Yes, Special::Text).unwrap();
    assert!(tokens.len() >= n);
    tokens[..n].to_vec()
}

#[test]
fn a_prompt_is_read_with_a_budget_and_reported() {
    let model = model();
    let mut session = Session::new(&model, budget(256, None)).unwrap();
    assert_eq!(session.n_ctx(), 4096);
    let mut shares = Vec::new();
    session.prefill_with(&story(&model, 1_500), &mut |share| shares.push(share)).unwrap();
    assert!(shares.len() > 2 && shares.is_sorted() && shares.last() == Some(&1.0), "{shares:?}");
    println!("{}", report(&mut session, 0));
    let layers = session.sequence(0).report();
    let of = |kind| layers.iter().filter(|layer| layer.kind == kind).count();
    assert_eq!((of(LayerKind::Lazy), of(LayerKind::Full)), (15, 15));
    let kv = session.kv();
    assert_eq!((kv.context_tokens, kv.lazy_layers, kv.active_layers), (1_500, 15, 15));
    assert!(kv.compression > 1.4, "{kv:?}");
}

#[test]
fn text_streams_up_to_a_stop_string() {
    let model = model();
    let said = |stop: &str, end| {
        let mut session = Session::new(&model, plain()).unwrap();
        let (mut text, mut pieces) = (String::new(), 0);
        let ended = stream(&mut session, "Once upon a time there was a lighthouse, and", stop, 40, |piece| {
            text += piece;
            pieces += 1;
        });
        assert_eq!(ended.unwrap(), Some(end), "stop at {stop:?}");
        assert!(pieces > 1, "nothing streamed");
        text
    };
    let whole = said("\0", GenerationEnd::Limit);
    let words: Vec<&str> = whole.split_whitespace().collect();
    assert!(words.len() > 10, "{whole}");
    // Over a boundary of tokens, too: from the middle of one word into the next.
    let (from, to) = (whole.find(words[5]).unwrap() + 1, whole.find(words[7]).unwrap() + 1);
    for stop in [&whole[from..to], words[6]] {
        assert_eq!(said(stop, GenerationEnd::StopString), whole[..whole.find(stop).unwrap()], "stop at {stop:?}");
    }
}

#[test]
fn sequences_go_on_together_as_they_would_alone() {
    let model = model();
    let prompts: Vec<Vec<Token>> = ["The sea is", "A good cook needs", "In the year 1900"]
        .map(|text| model.vocab().tokenize(text, AddBos::Yes, Special::Text).unwrap())
        .into();
    // Bit for bit, whatever else is in the batch.
    let params = SessionParams { fused_attention: false, ..plain() };
    let mut together = Session::new(&model, params.clone()).unwrap();
    let answers = continue_together(&mut together, &prompts, 12).unwrap();
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let mut alone = Session::new(&model, params.clone()).unwrap();
        assert_eq!(&continue_together(&mut alone, std::slice::from_ref(prompt), 12).unwrap()[0], answer);
    }
}

#[test]
fn a_fork_goes_another_way_and_leaves_the_original() {
    let model = model();
    let prompt = story(&model, 200);
    let mut session = Session::new(&model, plain()).unwrap();
    let expected = {
        let mut alone = Session::new(&model, plain()).unwrap();
        alone.prefill(&prompt).unwrap();
        alone.decode(prompt[7]).unwrap().to_vec()
    };
    session.prefill(&prompt).unwrap();
    session.sequence(0).copy_to(5).unwrap();
    session.sequence(5).decode(prompt[50]).unwrap();
    assert_eq!((session.sequence(0).len(), session.sequence(5).len()), (200, 201));
    assert_eq!(session.decode(prompt[7]).unwrap(), expected);
    session.sequence(5).clear();
    assert!(session.sequence(5).is_empty());
    assert_eq!(session.kv().context_tokens, 201);
}

#[test]
fn a_state_goes_on_in_another_session() {
    let model = model();
    let mut session = Session::new(&model, budget(128, None)).unwrap();
    let mut token = best(session.prefill(&story(&model, 700)).unwrap());
    let mut state = Vec::new();
    session.sequence(0).save(&mut state).unwrap();
    let mut other = Session::new(&model, budget(128, None)).unwrap();
    assert_eq!(other.sequence(0).load(&state).unwrap(), state.len());
    assert_eq!(other.sequence(0).report(), session.sequence(0).report());
    for _ in 0..8 {
        let expected = session.decode(token).unwrap().to_vec();
        assert_eq!(other.decode(token).unwrap(), expected);
        token = best(&expected);
    }
    state.truncate(state.len() / 2);
    assert!(other.sequence(0).load(&state).is_err());
}

#[test]
fn a_flag_interrupts() {
    let model = model();
    let prompt = story(&model, 2_000);
    let flag = Arc::new(AtomicBool::new(false));
    let mut session = Session::new(&model, budget(256, Some(flag.clone()))).unwrap();
    let mut seen = 0.0;
    let read = session.prefill_with(&prompt, &mut |share| {
        seen = share;
        flag.store(share > 0.2, Ordering::Relaxed);
    });
    assert!(matches!(read, Err(Error::Interrupted)), "{read:?}");
    assert!(seen > 0.2 && seen < 0.9, "interrupted at {seen}");
    // Nothing of it is left, and the session goes on.
    assert_eq!((session.sequence(0).len(), session.kv().allocated_bytes), (0, 0));
    flag.store(false, Ordering::Relaxed);
    let again = session.prefill(&prompt[..300]).unwrap().to_vec();
    let mut fresh = Session::new(&model, budget(256, None)).unwrap();
    assert_eq!(fresh.prefill(&prompt[..300]).unwrap(), again);
}
