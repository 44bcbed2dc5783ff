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
                let segment = KvSegment { k: &k, v: &v, mask: Some(&mask) };
                graph.fused_attention(&queries, &[segment], &FusedAttention { scale, soft_cap: None, sinks: None })
            } else {
                graph.flash_attn(&queries, &k, &v, &mask, scale)
            };
            graph.expand(&node);
        }
        let threads: usize = std::env::var("T").ok().and_then(|t| t.parse().ok()).unwrap_or(2);
        let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 16 * LAYERS).expect("a scheduler");
        scheduler.alloc(&graph).expect("memory");
        let bytes = stores.iter().map(|(k, v)| k.n_bytes() + v.n_bytes()).sum();
        Layers { graph, scheduler, bytes, _stores: stores }
    }

    fn run(&mut self) {
        self.scheduler.compute(&self.graph).expect("computed");
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    for arg in &args[1..] {
        let f: Vec<&str> = arg.split(':').collect();
        let ty = |n: &str| Type::cache_type_from_name(n).unwrap();
        let (k, v, n, rows, runs): (Type, Type, usize, usize, usize) =
            (ty(f[0]), ty(f[1]), f[2].parse().unwrap(), f[3].parse().unwrap(), f[4].parse().unwrap());
        let fused = f.get(5).is_none();
        let mut l = Layers::new(n, rows, (k, v), fused);
        let mut t: Vec<f64> = (0..runs)
            .map(|_| {
                let s = std::time::Instant::now();
                l.run();
                s.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        t.sort_by(f64::total_cmp);
        println!(
            "{arg}: min {:.2} ms, median {:.2} ms; {:.1} GB/s at min, {:.1} GFLOP/s",
            t[0],
            t[runs / 2],
            l.bytes as f64 / t[0] / 1e6,
            (4 * LAYERS * HEADS * SIZE * n * rows) as f64 / t[0] / 1e6
        );
    }
}
