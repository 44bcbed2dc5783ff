//! What a stranger's program can do, on a real model.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use simlayer::{Error, Model, ModelParams, Session, SessionParams, Token, lazy::Policy};
use simlayer_outside::{best, budget, continue_together, greedy, model_path, report, stream};

fn model() -> Model {
    Model::load(model_path(), &ModelParams::default()).expect("SmolLM2 (cargo xtask demo fetches it)")
}

/// The beginning of the demo's story.
fn story(model: &Model, n: usize) -> Vec<Token> {
    let text = include_str!("../../../xtask/demo/story.txt");
    let tokens = model.vocab().tokenize(text, true, false).unwrap();
    assert!(tokens.len() >= n);
    tokens[..n].to_vec()
}

fn plain() -> SessionParams {
    let mut params = SessionParams::default();
    params.lazy.policy = Policy::Off;
    params.n_threads = 2;
    params
}

#[test]
fn a_prompt_is_read_with_a_budget_and_reported() {
    let model = model();
    let mut session = Session::new(&model, budget(256).unwrap()).unwrap();
    assert_eq!(session.n_ctx(), 4096);
    let mut shares = Vec::new();
    session.prefill_with(&story(&model, 1_500), &mut |share| shares.push(share)).unwrap();
    assert!(shares.len() > 2 && shares.is_sorted() && shares.last() == Some(&1.0), "{shares:?}");
    let table = report(&session, 0);
    println!("{table}");
    let lines = |kind: &str| table.lines().filter(|line| line.contains(kind)).count();
    assert_eq!((lines(" lazy   "), lines(" full   ")), (15, 15), "{table}");
    let kv = session.kv();
    assert_eq!((kv.context_tokens, kv.lazy_layers, kv.active_layers), (1_500, 15, 15));
    assert!(kv.compression > 1.4, "{kv:?}");
}

#[test]
fn text_streams_up_to_a_stop_string() {
    let model = model();
    let said = |stop: &str| {
        let mut session = Session::new(&model, plain()).unwrap();
        let (mut text, mut pieces) = (String::new(), 0);
        stream(&mut session, &mut greedy(&model).unwrap(), "The sea is", stop, 40, |piece| {
            text += piece;
            pieces += 1;
        })
        .unwrap();
        assert!(pieces > 1, "nothing streamed");
        text
    };
    let whole = said("\0");
    let words: Vec<&str> = whole.split_whitespace().collect();
    assert!(words.len() > 10, "{whole}");
    // Over a boundary of tokens, too: from the middle of one word into the next.
    let (from, to) = (whole.find(words[5]).unwrap() + 1, whole.find(words[7]).unwrap() + 1);
    for stop in [&whole[from..to], words[6]] {
        assert_eq!(said(stop), whole[..whole.find(stop).unwrap()], "stop at {stop:?}");
    }
}

#[test]
fn sequences_go_on_together_as_they_would_alone() {
    let model = model();
    let prompts: Vec<Vec<Token>> = ["The sea is", "A good cook needs", "In the year 1900"]
        .map(|text| model.vocab().tokenize(text, true, false).unwrap())
        .into();
    let mut params = plain();
    // Bit for bit, whatever else is in the batch.
    params.fused_attention = false;
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
    session.fork(0, 5, &BTreeSet::new()).unwrap();
    let entry = |tokens| simlayer::BatchEntry { seq: 5, tokens, outputs: simlayer::Outputs::Last, prompt_end: false };
    session.run(&[entry(&prompt[50..60])]).unwrap();
    assert_eq!((session.seq_n_past(0), session.seq_n_past(5)), (200, 210));
    assert_eq!(session.decode(prompt[7]).unwrap(), expected);
    session.seq_clear(5);
    assert_eq!(session.kv().context_tokens, 201);
}

#[test]
fn a_state_goes_on_in_another_session() {
    let model = model();
    let mut session = Session::new(&model, budget(128).unwrap()).unwrap();
    let mut token = best(session.prefill(&story(&model, 700)).unwrap());
    let mut state = Vec::new();
    session.save_seq(0, &mut state).unwrap();
    let mut other = Session::new(&model, budget(128).unwrap()).unwrap();
    assert_eq!(other.load_seq(0, &state).unwrap(), state.len());
    // But for the sum, which has what the first session keeps to take an answer back.
    let layers = |session: &Session| report(session, 0).lines().take(30).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(layers(&other), layers(&session));
    for _ in 0..8 {
        let expected = session.decode(token).unwrap().to_vec();
        assert_eq!(other.decode(token).unwrap(), expected);
        token = best(&expected);
    }
    state.truncate(state.len() / 2);
    assert!(other.load_seq(0, &state).is_err());
}

#[test]
fn a_flag_interrupts() {
    let model = model();
    let prompt = story(&model, 2_000);
    let mut session = Session::new(&model, budget(256).unwrap()).unwrap();
    let flag = session.abort_flag();
    let mut seen = 0.0;
    let read = session.prefill_with(&prompt, &mut |share| {
        seen = share;
        flag.store(share > 0.2, Ordering::Relaxed);
    });
    assert!(matches!(read, Err(Error::Interrupted)), "{read:?}");
    assert!(seen > 0.2 && seen < 0.9, "interrupted at {seen}");
    // Nothing of it is left, and the session goes on.
    assert_eq!((session.n_past(), session.kv().allocated_bytes), (0, 0));
    flag.store(false, Ordering::Relaxed);
    let again = session.prefill(&prompt[..300]).unwrap().to_vec();
    let mut fresh = Session::new(&model, budget(256).unwrap()).unwrap();
    assert_eq!(fresh.prefill(&prompt[..300]).unwrap(), again);
}
