//! Attention over a cache as deep as it gets, in SmolLM2's shape: 9 heads of 64, of which 3 share a KV head.
//!
//! Thirty stores are read one after the other, as by a model's layers, so that they come from memory and not from the
//! processor's caches. Throughput is in bytes of keys and values.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simlayer::ggml::{Context, Device, FusedAttention, Graph, KvSegment, Scheduler, Tensor, Type};

const SIZE: usize = 64;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const LAYERS: usize = 30;
const DEPTH: usize = 7168;

/// A graph of all layers' attention for `n` queries that see everything.
struct Layers {
    graph: Graph,
    scheduler: Scheduler,
    bytes: usize,
    _stores: Vec<(Tensor, Tensor)>,
}

impl Layers {
    fn new(n: usize, rows: usize, (k, v): (Type, Type), fused: bool) -> Layers {
        let context = Context::new(2 * LAYERS + 2);
        let store = |ty| context.tensor(ty, &[SIZE * KV_HEADS, rows]);
        let stores: Vec<_> = (0..LAYERS).map(|_| (store(k), store(v))).collect();
        let q = context.tensor(Type::F32, &[SIZE, HEADS, n]);
        let mask = context.tensor(Type::F16, &[rows, n]);
        context.alloc(Device::cpu().buffer_type(), "the benchmark").expect("memory");
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 16 * LAYERS).expect("a scheduler");
        fill(&mut scheduler, stores.iter().flat_map(|(k, v)| [k, v]));
        let graph = Graph::new(16 * LAYERS);
        let queries = graph.permute(&q, [0, 2, 1, 3]);
        for (k, v) in &stores {
            let heads = |t: &Tensor| {
                let [_, row_bytes, ..] = t.strides();
                graph.view(t, [SIZE, rows, KV_HEADS], [row_bytes, t.ty().row_bytes(SIZE)], 0)
            };
            let (k, v) = (heads(k), heads(v));
            let scale = 1.0 / (SIZE as f32).sqrt();
            let node = if fused {
                let segment = KvSegment { k: std::slice::from_ref(&k), v: std::slice::from_ref(&v), mask: Some(&mask) };
                graph.fused_attention(
                    &queries,
                    &[segment],
                    &FusedAttention { scale, soft_cap: None, sinks: None, of_heads: &[] },
                )
            } else {
                graph.flash_attn(&queries, &k, &v, &mask, scale, 0.0, None)
            };
            graph.expand(&node);
        }
        scheduler.alloc(&graph).expect("memory");
        let bytes = stores.iter().map(|(k, v)| k.n_bytes() + v.n_bytes()).sum();
        Layers { graph, scheduler, bytes, _stores: stores }
    }

    fn run(&mut self) {
        self.scheduler.compute(&self.graph).expect("computed");
    }
}

/// Rows of numbers from 0 to 1.
fn fill<'a>(scheduler: &mut Scheduler, stores: impl Iterator<Item = &'a Tensor>) {
    for store in stores {
        let [width, rows, ..] = store.shape();
        let graph = Graph::new(8);
        let row = graph.scale(&graph.arange(width), 1.0 / width as f32);
        graph.expand(&graph.copy(&graph.repeat_row(&row, rows), store));
        scheduler.alloc(&graph).expect("memory");
        scheduler.compute(&graph).expect("computed");
    }
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(20);
    let types = [
        (Type::F16, Type::F16),
        (Type::Q8_0, Type::Q8_0),
        (Type::Q4_0, Type::Q4_0),
        (Type::Q8_0, Type::Q4_0),
        (Type::F32, Type::F32),
        (Type::BF16, Type::BF16),
        (Type::Q5_0, Type::Q5_0),
    ];
    for (k, v) in types {
        let mut layers = Layers::new(1, DEPTH, (k, v), true);
        group.throughput(Throughput::Bytes(layers.bytes as u64));
        group.bench_function(format!("{k}/{v}"), |bencher| bencher.iter(|| layers.run()));
    }
    for ty in [Type::F16, Type::Q4_0] {
        let mut layers = Layers::new(1, DEPTH, (ty, ty), false);
        group.throughput(Throughput::Bytes(layers.bytes as u64));
        group.bench_function(format!("{ty}/{ty}, ggml"), |bencher| bencher.iter(|| layers.run()));
    }
    // A lazy layer's store: sink and window.
    let mut layers = Layers::new(1, 1280, (Type::Q4_0, Type::Q4_0), true);
    group.throughput(Throughput::Bytes(layers.bytes as u64));
    group.bench_function("lazy q4_0", |bencher| bencher.iter(|| layers.run()));
    group.finish();
}

fn prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prefill of 128");
    group.sample_size(10);
    for (ty, fused) in [(Type::F16, true), (Type::Q4_0, true), (Type::F16, false)] {
        let mut layers = Layers::new(128, DEPTH / 4, (ty, ty), fused);
        // Products of queries and keys, and of weights and values.
        let operations = 4 * LAYERS * HEADS * SIZE * 128 * DEPTH / 4;
        group.throughput(Throughput::Elements(operations as u64));
        let name = format!("{ty}{}", if fused { "" } else { ", ggml" });
        group.bench_function(name, |bencher| bencher.iter(|| layers.run()));
    }
    group.finish();
}

criterion_group!(benches, decode, prefill);
criterion_main!(benches);
