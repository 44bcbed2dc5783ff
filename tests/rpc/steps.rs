//! What a decode step is made of, for one and for many conversations.

use simlayer::{BatchEntry, Outputs, SeqId, SessionParams, StepReport, ggml::Type};
use simlayer_testkit::{RandomModel, Rng, metrics::kl};

use super::{MAX_KL, Proxy, check_company, connect, count, load_on, plain, servers, session};

/// A step of `n` conversations at a depth.
struct Counted {
    report: StepReport,
    /// Over the wire, both ways.
    bytes: u64,
    /// Of all conversations.
    logits: Vec<f32>,
    /// Bytes that the stores have.
    stores: usize,
}

/// Conversations about the same text, of which three quarters of the layers are lazy, with a sink of 4 and the default slack.
fn count_step(n: u32, depth: usize) -> Counted {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 4, n_embd: 128, n_ff: 128, n_ctx_train: 8192, ..RandomModel::default() };
    random.write(&path);
    let (servers, _) = servers(1);
    let proxy = Proxy::before(&servers[0]);
    let model = load_on(&path, &connect(&proxy.address), None);
    let mut params = plain();
    params.lazy.policy = "layers:1,2,3".parse().expect("a policy");
    params.lazy.n_window = 256;
    let mut session = session(&model, params);
    let tokens = Rng::new(2).tokens(depth + 40, random.n_vocab());
    let sequences = 0..n as SeqId;
    session.prefill(&tokens[..depth]).expect("prefill");
    // Copies have rows of their own once each has written.
    for seq in 1..n as SeqId {
        assert!(session.seq_copy(0, seq, depth).expect("copied"));
    }
    let mut decode = |at: usize| {
        let entry = |seq| BatchEntry { seq, tokens: &tokens[at..=at], outputs: Outputs::Last, prompt_end: false };
        session.run(&sequences.clone().map(entry).collect::<Vec<_>>()).expect("decode");
    };
    // Their stores come together.
    (0..=20).for_each(|i| decode(depth + i));
    let before = count(&[&proxy]);
    (21..=30).for_each(|i| decode(depth + i));
    let bytes = (count(&[&proxy]) - before) / 10;
    let report = session.step_report().expect("a step was kept");
    Counted { report, bytes, logits: session.logits().to_vec(), stores: session.kv().allocated_bytes }
}

#[test]
fn what_a_step_is_made_of() {
    let mut found: Vec<Counted> = Vec::new();
    for n in [1, 4, 16] {
        let [shallow, deep] = [600, 2_270].map(|depth| count_step(n, depth));
        println!("{n:>2} conversations: {:?}, {} bytes sent, stores of {}", deep.report, deep.bytes, deep.stores);
        println!("   at depth 600: {:?}, {} bytes sent, stores of {}", shallow.report, shallow.bytes, shallow.stores);
        // Neither operations nor what is sent grow with the context.
        assert_eq!(deep.report.operations, shallow.report.operations);
        assert_eq!(deep.report.input_bytes, shallow.report.input_bytes);
        assert!(deep.bytes <= shallow.bytes + 16 * u64::from(n), "{} bytes, {}", deep.bytes, shallow.bytes);
        // What is read is what there is: 2,304 rows of 2,301 tokens, and rings of two blocks.
        let read = deep.report.cache_bytes;
        assert!(read <= deep.stores && read * 10 >= deep.stores * 9, "{read} bytes of {} are read", deep.stores);
        found.push(deep);
    }
    // A conversation's logits are the same in company, for the bits that caches of four bits leave.
    let alone = &found[0].logits;
    for together in &found[1..] {
        let worst = together.logits.chunks_exact(alone.len()).map(|row| kl(alone, row)).fold(0.0, f64::max);
        println!("worst KL to a conversation alone: {worst:.3e}");
        assert!(worst < MAX_KL, "{worst}");
    }
    // Each conversation's stores lie beside the others': one operation writes to all of them, and one reads them.
    let [alone, few, many] = [0, 1, 2].map(|i| found[i].report.operations);
    assert!(few <= alone + 8 && many == few, "{alone}, {few}, {many} operations");
}

#[test]
fn conversations_together_say_what_they_say_alone() {
    let (_servers, devices) = servers(1);
    let of_types = |k, v, lazy_k, lazy_v, flash_attn| {
        let mut params = SessionParams { type_k: k, type_v: v, flash_attn, ..plain() };
        (params.lazy.type_k, params.lazy.type_v) = (Some(lazy_k), Some(lazy_v));
        params
    };
    // A sum that is rounded otherwise is another number now and then in a row of fewer bits.
    for (params, most) in [
        (of_types(Type::F32, Type::F32, Type::F32, Type::F32, false), 1e-9),
        (of_types(Type::F16, Type::F16, Type::F16, Type::F16, true), 1e-6),
        (of_types(Type::Q8_0, Type::Q4_0, Type::Q4_0, Type::Q4_0, true), MAX_KL),
        (of_types(Type::Q8_0, Type::F16, Type::Q4_0, Type::F16, false), MAX_KL),
    ] {
        for lengths in [&[500, 500, 500, 500][..], &[300, 350, 420, 1900, 2000, 30]] {
            check_company(|path| load_on(path, &devices, None), &params, lengths, most);
        }
    }
}
