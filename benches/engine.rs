//! A prompt of 2,048 tokens, and decode steps of several sequences, through a random model in SmolLM2's proportions;
//! and the parts that laziness adds.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use simlayer::{
    BatchEntry, Model, ModelParams, Outputs, Session, SessionParams, Token,
    ggml::{Context, Device, Graph, Scheduler, Type},
    lazy::Policy,
};
use simlayer_testkit::{RandomModel, Rng, WeightType};

const TOKENS: usize = 2048;

fn model(folder: &std::path::Path) -> Model {
    let path = folder.join("random.gguf");
    RandomModel {
        n_layer: 8,
        n_embd: 576,
        n_head: 9,
        n_head_kv: 3,
        head_size: 64,
        n_ff: 1536,
        weight_type: WeightType::Q4_1,
        ..RandomModel::default()
    }
    .write(&path);
    Model::load(&path, &ModelParams::default()).expect("a model")
}

fn params(policy: &str, layer_major: bool) -> SessionParams {
    let mut params = SessionParams::default();
    params.lazy.policy = policy.parse::<Policy>().expect("a policy");
    params.lazy.n_window = 512;
    params.layer_major = layer_major;
    params
}

fn prompts(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(folder.path());
    let n_vocab = model.hparams().n_vocab;
    let tokens: Vec<Token> = Rng::new(1).tokens(TOKENS, n_vocab);
    let mut group = criterion.benchmark_group("prompt of 2048");
    group.sample_size(10);
    for (name, policy, layer_major) in [
        ("layer by layer", "off", true),
        ("ubatch by ubatch", "off", false),
        ("layer by layer, half of the layers become lazy", "budget:0.5", true),
        ("layer by layer, six of eight windowed", "layers:0-5", true),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || Session::new(&model, params(policy, layer_major)).expect("a session"),
                |mut session| {
                    session.prefill(&tokens).expect("logits");
                    session
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// A decode step of several sequences in one batch; throughput is in tokens.
fn sequences(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(folder.path());
    let mut group = criterion.benchmark_group("decode");
    for n in [1u32, 2, 4, 8] {
        let mut session = Session::new(&model, params("off", true)).expect("a session");
        let batch: Vec<BatchEntry<'_>> =
            (0..n).map(|seq| BatchEntry { seq, tokens: &[1], outputs: Outputs::Last, prompt_end: false }).collect();
        group.throughput(Throughput::Elements(u64::from(n)));
        group.bench_function(format!("{n} sequences"), |bencher| {
            bencher.iter(|| {
                if session.n_past() + 1 > session.n_ctx() {
                    session.clear();
                }
                session.run(&batch).expect("logits");
            });
        });
    }
    group.finish();
}

/// One layer's score: the attention mass of 32 queries on sink and window, from all weights.
fn score(criterion: &mut Criterion) {
    const ROWS: usize = 7168;
    let context = Context::new(8);
    let k = context.tensor(Type::F16, &[64, ROWS, 3]);
    let q = context.tensor(Type::F32, &[64, 32, 9]);
    let mask = context.tensor(Type::F16, &[ROWS, 32]);
    let kept = context.tensor(Type::F32, &[ROWS, 32]);
    context.alloc(Device::cpu().buffer_type(), "the benchmark").expect("memory");
    let graph = Graph::new(16);
    let weights = graph.soft_max(&graph.mul_mat_f32(&k, &q), &mask, 0.125, None);
    graph.expand(&graph.sum_rows(&graph.mul(&weights, &kept)));
    run(criterion, "score of a layer at 7168", graph);
}

/// One layer's shrinking: sink and window, f16 to q4_0, keys and values.
fn shrink(criterion: &mut Criterion) {
    let context = Context::new(8);
    let stores = |ty, rows| [(); 2].map(|()| context.tensor(ty, &[192, rows]));
    let (from, to) = (stores(Type::F16, 7168), stores(Type::Q4_0, 1028));
    context.alloc(Device::cpu().buffer_type(), "the benchmark").expect("memory");
    let graph = Graph::new(64);
    for (from, to) in from.iter().zip(&to) {
        for (first, row, n) in [(0, 0, 4), (6144, 4, 1024)] {
            let rows = graph.cast(&graph.rows(from, first, n), Type::F32);
            graph.expand(&graph.copy(&rows, &graph.rows(to, row, n)));
        }
    }
    run(criterion, "shrinking of a layer at 7168", graph);
}

fn run(criterion: &mut Criterion, name: &str, graph: Graph) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 64).expect("a scheduler");
    scheduler.alloc(&graph).expect("memory");
    criterion.bench_function(name, |bencher| bencher.iter(|| scheduler.compute(&graph).expect("computed")));
}

criterion_group!(benches, prompts, sequences, score, shrink);
criterion_main!(benches);
