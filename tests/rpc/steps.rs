//! What a decode step is made of, for one and for many conversations.

use simlayer::{BatchEntry, Outputs, StepReport};
use simlayer_testkit::{RandomModel, Rng};

use super::{Proxy, connect, count, load_on, plain, servers};

/// Operations, inputs and bytes of a step of `n` conversations at a depth.
fn step(n: u32, depth: usize) -> (StepReport, u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("random.gguf");
    let random = RandomModel { n_layer: 4, n_embd: 128, n_ff: 128, n_ctx_train: 8192, ..RandomModel::default() };
    random.write(&path);
    let (servers, _) = servers(1);
    let proxy = Proxy::before(&servers[0]);
    let model = load_on(&path, &connect(&proxy.address), None);
    let mut params = plain();
    params.lazy.policy = "layers:1,2,3".parse().expect("a policy");
    (params.lazy.n_window, params.lazy.n_slack) = (64, 128);
    let mut session = super::session(&model, params);
    let tokens = Rng::new(2).tokens(depth + 40, random.n_vocab());
    for seq in 0..n as _ {
        let entry = BatchEntry { seq, tokens: &tokens[..depth], outputs: Outputs::Last, prompt_end: true };
        session.run(&[entry]).expect("prefill");
    }
    let mut decode = |at: usize| {
        let entries: Vec<BatchEntry<'_>> = (0..n as _)
            .map(|seq| BatchEntry { seq, tokens: &tokens[at..=at], outputs: Outputs::Last, prompt_end: false })
            .collect();
        session.run(&entries).expect("decode");
    };
    decode(depth);
    let before = count(&[&proxy]);
    (1..=20).for_each(|i| decode(depth + i));
    let bytes = (count(&[&proxy]) - before) / 20;
    (session.step_report().expect("a step was kept"), bytes)
}

#[test]
fn what_a_step_is_made_of() {
    let mut found = Vec::new();
    for n in [1, 4, 16] {
        let [(shallow, shallow_bytes), (deep, deep_bytes)] = [300, 2_000].map(|depth| step(n, depth));
        println!("{n:>2} conversations: {deep:?}, {deep_bytes} bytes; at depth 300 {shallow:?}, {shallow_bytes} bytes");
        // Neither operations nor what is sent grow with the context.
        assert_eq!((deep.operations, deep.input_bytes), (shallow.operations, shallow.input_bytes));
        assert!(deep_bytes <= shallow_bytes + 16 * u64::from(n), "{deep_bytes} bytes, {shallow_bytes}");
        found.push((n, deep));
    }
    let per_conversation = (found[2].1.operations - found[0].1.operations) / 15;
    println!("{per_conversation} operations more for each conversation of 4 layers");
}
