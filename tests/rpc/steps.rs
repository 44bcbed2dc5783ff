//! What a decode step is made of, for one and for many conversations.

use simlayer::{BatchEntry, Outputs, SeqId, StepReport};
use simlayer_testkit::{RandomModel, Rng, metrics::kl};

use super::{MAX_KL, Proxy, connect, count, load_on, plain, servers};

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
    let mut session = super::session(&model, params);
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
    decode(depth);
    let before = count(&[&proxy]);
    (1..=20).for_each(|i| decode(depth + i));
    let bytes = (count(&[&proxy]) - before) / 20;
    let report = session.step_report().expect("a step was kept");
    Counted { report, bytes, logits: session.logits().to_vec(), stores: session.kv().allocated_bytes }
}

#[test]
fn what_a_step_is_made_of() {
    let mut found: Vec<Counted> = Vec::new();
    for n in [1, 4, 16] {
        let [shallow, deep] = [600, 2_280].map(|depth| count_step(n, depth));
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
    // Each conversation has its own stores: what writes them and reads them is an operation of its own. All else is of all.
    let of_each = (found[2].report.operations - found[0].report.operations).div_ceil(15);
    println!("{of_each} operations more for each conversation, of 4 layers");
    assert!(of_each <= 36, "{of_each} operations more for each conversation");
}
