//! Against attention in f64, whatever the types, shapes, masks, features and threads.

use std::{cell::Cell, slice::from_ref};

#[cfg(target_arch = "x86_64")]
use super::op::MIN_PREFILL;
use super::{FusedAttention, HeadRows, KvSegment, block::BLOCK, chunks::Chunks, views::MAX_SEGMENTS};
use crate::ggml::{
    Context, Device, Due, Graph, Packing, Scheduler, Source, TILE, Tensor, Type,
    processor::{Features, shorter},
};

/// All features of this processor that have attention kernels of their own.
fn features() -> impl Iterator<Item = Features> {
    #[cfg(target_arch = "x86_64")]
    let is_own = |features: &Features| !matches!(features, Features::AvxVnni | Features::Avx512Vnni);
    #[cfg(target_arch = "aarch64")]
    let is_own = |features: &Features| *features <= Features::Neon;
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let is_own = |_: &Features| true;
    Features::all().into_iter().filter(is_own)
}

/// Uniform numbers in −1..1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| size * self.next()).collect()
    }
}

#[derive(Debug, Clone)]
struct Case {
    size: usize,
    n: usize,
    kv_heads: usize,
    group: usize,
    /// Rows and types of each segment.
    segments: Vec<(usize, Type, Type)>,
    mask: MaskKind,
    soft_cap: Option<f32>,
    sinks: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum MaskKind {
    None,
    /// The last query sees everything, the one before it one row less.
    Causal,
    /// A row is seen or not by chance, with long runs of either.
    Ring,
    /// Any finite numbers, in f32.
    Bias,
}

/// A case's tensors: a graph's memory, and what is in it.
struct Data {
    q: Tensor,
    k: Vec<Tensor>,
    v: Vec<Tensor>,
    masks: Vec<Tensor>,
    sinks: Tensor,
    /// Elements as f64, `[kv head][row][element]` of all segments together; masks `[query][row]`.
    plain: Plain,
}

struct Plain {
    q: Vec<f32>,
    k: Vec<Vec<Vec<f64>>>,
    v: Vec<Vec<Vec<f64>>>,
    mask: Vec<Vec<f64>>,
    sinks: Vec<f32>,
}

fn to_half(x: f32) -> u16 {
    match x {
        0.0 => 0,
        f32::NEG_INFINITY => 0xfc00,
        _ => unreachable!("masks are 0 or minus infinity"),
    }
}

fn mask_of(case: &Case, rows: usize, random: &mut Random) -> Vec<f32> {
    let mut mask = vec![0.0; rows * case.n];
    let mut seen = true;
    for query in 0..case.n {
        for row in 0..rows {
            let cell = &mut mask[query * rows + row];
            match case.mask {
                MaskKind::None => {}
                MaskKind::Causal => {
                    if row + case.n > rows + query {
                        *cell = f32::NEG_INFINITY;
                    }
                }
                MaskKind::Ring => {
                    if random.next() > 0.99 {
                        seen = !seen;
                    }
                    if !seen {
                        *cell = f32::NEG_INFINITY;
                    }
                }
                MaskKind::Bias => *cell = 3.0 * random.next(),
            }
        }
    }
    mask
}

impl Data {
    fn new(case: &Case, scheduler: &mut Scheduler, seed: u64) -> Data {
        let mut random = Random(seed);
        let heads = case.kv_heads * case.group;
        let context = Context::new(16);
        let q = context.tensor(Type::F32, &[case.size, heads, case.n]);
        let sinks = context.tensor(Type::F32, &[heads]);
        let width = case.size * case.kv_heads;
        let store = |ty: Type, rows: usize| match ty.is_tiles() {
            true => context.tensor(ty, &[case.kv_heads * ty.row_bytes(case.size), rows.next_multiple_of(TILE)]),
            false => context.tensor(ty, &[width, rows]),
        };
        let k: Vec<Tensor> = case.segments.iter().map(|&(rows, k, _)| store(k, rows)).collect();
        let v: Vec<Tensor> = case.segments.iter().map(|&(rows, _, v)| store(v, rows)).collect();
        let ty = if case.mask == MaskKind::Bias { Type::F32 } else { Type::F16 };
        let masks: Vec<Tensor> = case.segments.iter().map(|&(rows, ..)| context.tensor(ty, &[rows, case.n])).collect();
        context.alloc(Device::cpu().buffer_type(), "a test").unwrap();

        let mut plain = Plain {
            q: random.floats(case.size * heads * case.n, 1.0),
            k: vec![Vec::new(); case.kv_heads],
            v: vec![Vec::new(); case.kv_heads],
            mask: vec![Vec::new(); case.n],
            sinks: random.floats(heads, 4.0),
        };
        if case.segments.iter().any(|&(_, k, _)| k == Type::Q4_0) {
            for block in plain.q.chunks_mut(32) {
                whole(block);
            }
        }
        q.write(0, &plain.q);
        sinks.write(0, &plain.sinks);
        for (i, &(rows, ..)) in case.segments.iter().enumerate() {
            let mask = mask_of(case, rows, &mut random);
            for (query, row) in mask.chunks_exact(rows).enumerate() {
                plain.mask[query].extend(row.iter().map(|&x| f64::from(x)));
            }
            match ty {
                Type::F16 => masks[i].write(0, &mask.iter().map(|&x| to_half(x)).collect::<Vec<_>>()),
                _ => masks[i].write(0, &mask),
            }
            // ggml converts into the store's type and back, so that the reference has exactly what is stored.
            for (target, plain, size) in [(&k[i], &mut plain.k, 3.0), (&v[i], &mut plain.v, 1.0)] {
                let floats = random.floats(width * rows, size);
                let graph = Graph::new(8);
                let source = graph.input(Type::F32, &[width, rows]);
                let due = target.ty().is_tiles().then(|| tiles_of(&graph, target, &source, case));
                if due.is_none() {
                    graph.expand(&graph.copy(&source, target));
                }
                scheduler.alloc(&graph).unwrap();
                source.write(0, &floats);
                if let Some((due, list)) = due {
                    due.write(0, &list);
                }
                scheduler.compute(&graph).unwrap();
                let graph = Graph::new(8);
                let result = match target.ty() {
                    Type::F32 => graph.contiguous(target),
                    ty if ty.is_tiles() => graph.unpack_tiles(target, case.kv_heads, 0, rows),
                    _ => graph.cast(target, Type::F32),
                }
                .as_output();
                graph.expand(&result);
                scheduler.alloc(&graph).unwrap();
                scheduler.compute(&graph).unwrap();
                for row in result.to_f32().chunks_exact(width) {
                    for (head, elements) in row.chunks_exact(case.size).enumerate() {
                        plain[head].push(elements.iter().map(|&x| f64::from(x)).collect());
                    }
                }
            }
        }
        Data { q, k, v, masks, sinks, plain }
    }

    /// The same with other queries.
    fn with_queries(self, q: Vec<f32>) -> Data {
        self.q.write(0, &q);
        Data { plain: Plain { q, ..self.plain }, ..self }
    }

    fn params(&self, case: &Case) -> FusedAttention<'_> {
        FusedAttention {
            scale: 1.0 / (case.size as f32).sqrt(),
            soft_cap: case.soft_cap,
            sinks: case.sinks.then_some(&self.sinks),
            of_heads: &[],
        }
    }

    fn node(&self, case: &Case, graph: &Graph, features: Features) -> Tensor {
        let q = graph.permute(&self.q, [0, 2, 1, 3]);
        let heads = |(t, &(rows, ..)): (&Tensor, &(usize, Type, Type))| heads(graph, t, case, rows);
        let k: Vec<Tensor> = self.k.iter().zip(&case.segments).map(heads).collect();
        let v: Vec<Tensor> = self.v.iter().zip(&case.segments).map(heads).collect();
        let segments: Vec<KvSegment<'_>> = (0..k.len())
            .map(|i| KvSegment {
                k: &k[i..=i],
                v: &v[i..=i],
                mask: (case.mask != MaskKind::None).then_some(&self.masks[i]),
            })
            .collect();
        graph.fused_attention_with(&q, &segments, &self.params(case), features).as_output()
    }

    /// As [`Data::node`], with keys and values copied into pieces: the keys' end after so many blocks each, the values' elsewhere.
    fn node_in_pieces(&self, case: &Case, graph: &Graph, features: Features, at: usize) -> Tensor {
        let q = graph.permute(&self.q, [0, 2, 1, 3]);
        let pieces = |stores: &[Tensor], at: usize| -> Vec<Vec<Tensor>> {
            let cut = |store: &Tensor| {
                let (rows, row_bytes) = (store.shape()[1], store.strides()[1]);
                let piece = |first: usize| {
                    let n = (at * BLOCK).min(rows - first);
                    // With rows before that are not read.
                    let context = Context::new(1);
                    let piece = context.tensor(store.ty(), &[store.shape()[0], n + first % 3]);
                    context.alloc(Device::cpu().buffer_type(), "a piece").unwrap();
                    let mut bytes = vec![0u8; n * row_bytes];
                    store.read(first * row_bytes, &mut bytes);
                    piece.write(first % 3 * row_bytes, &bytes);
                    heads(graph, &graph.rows(&piece, first % 3, n), case, n)
                };
                (0..rows).step_by(at * BLOCK).map(piece).collect()
            };
            stores.iter().map(cut).collect()
        };
        let (k, v) = (pieces(&self.k, at), pieces(&self.v, at + 1));
        let mask = |i| (case.mask != MaskKind::None).then_some(&self.masks[i]);
        let segments: Vec<KvSegment<'_>> =
            (0..k.len()).map(|i| KvSegment { k: &k[i], v: &v[i], mask: mask(i) }).collect();
        graph.fused_attention_with(&q, &segments, &self.params(case), features).as_output()
    }

    fn run(&self, case: &Case, scheduler: &mut Scheduler, features: Features) -> Vec<f32> {
        let graph = Graph::new(64);
        let node = self.node(case, &graph, features);
        graph.expand(&node);
        scheduler.alloc(&graph).unwrap();
        scheduler.compute(&graph).unwrap();
        let first = node.to_f32();
        // A graph runs many times, and gives the same each time.
        scheduler.compute(&graph).unwrap();
        assert_eq!(bits(&first), bits(&node.to_f32()), "the second run");
        first
    }

    /// The same in f64, one head and query after the other.
    fn reference(&self, case: &Case) -> Vec<f64> {
        let heads = case.kv_heads * case.group;
        let params = self.params(case);
        let mut out = Vec::new();
        for query in 0..case.n {
            for head in 0..heads {
                let q = &self.plain.q[(query * heads + head) * case.size..][..case.size];
                let (k, v) = (&self.plain.k[head / case.group], &self.plain.v[head / case.group]);
                let mut scores: Vec<f64> = k
                    .iter()
                    .zip(&self.plain.mask[query])
                    .map(|(k, mask)| {
                        let product: f64 = q.iter().zip(k).map(|(&q, k)| f64::from(q) * k).sum();
                        let score = product * f64::from(params.scale);
                        let score = case.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                        score + mask
                    })
                    .collect();
                if case.sinks {
                    scores.push(f64::from(self.plain.sinks[head]));
                }
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..case.size {
                    let value: f64 = v.iter().zip(&weights).map(|(v, weight)| v[i] * weight).sum();
                    out.push(if max == f64::NEG_INFINITY { 0.0 } else { value / sum });
                }
            }
        }
        out
    }
}

/// The first rows of a store, by head.
fn heads(graph: &Graph, store: &Tensor, case: &Case, rows: usize) -> Tensor {
    let [_, row_bytes, ..] = store.strides();
    let head_bytes = store.ty().row_bytes(case.size);
    let size = if store.ty().is_tiles() { head_bytes } else { case.size };
    graph.view(store, [size, rows, case.kv_heads], [row_bytes, head_bytes], 0)
}

/// Adds tiles of all rows to the graph: an input, and what it is to be filled with.
fn tiles_of(graph: &Graph, store: &Tensor, rows: &Tensor, case: &Case) -> (Tensor, Vec<i32>) {
    let n = rows.shape()[1];
    let n_tiles = n.div_ceil(TILE);
    let list = graph.input(Type::I32, &[Due::LEN, n_tiles]);
    let packing = Packing { own: rows, exact: &[], tiles: from_ref(store), due: &list, heads: case.kv_heads };
    graph.expand(&graph.pack_tiles(&packing));
    let row = |row: usize| if row < n { Source::Own(row) } else { Source::Absent };
    let due = |tile| Due { tile, counted: 0, rows: std::array::from_fn(|r| row(tile * TILE + r)) };
    (list, Due::list(&(0..n_tiles).map(due).collect::<Vec<_>>(), n_tiles))
}

fn bits(floats: &[f32]) -> Vec<u32> {
    floats.iter().map(|x| x.to_bits()).collect()
}

fn scheduler(threads: usize) -> Scheduler {
    Scheduler::new(&[Device::cpu()], threads, 64).unwrap()
}

fn worst(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        .map(|(&a, b)| (f64::from(a) - b).abs())
        .fold(0.0, |worst, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) })
}

/// Values are below 1, so that this is a few roundings of f32.
const BOUND: f64 = 2e-6;

/// A query's block that 8 bits hold exactly: multiples of a 127th of the largest element.
fn whole(block: &mut [f32]) {
    for x in block.iter_mut() {
        *x = (*x * 127.0).round() / 127.0;
    }
    block[0] = 1.0;
}

/// Where weights become 8-bit numbers (`q4`): a third of what four bits themselves are off by, at most 1/16. Queries that meet
/// four-bit keys are such that 8 bits hold them.
#[cfg(target_arch = "x86_64")]
const BOUND_OF_8_BITS: f64 = 1.0 / 48.0;

/// Where only keys have four bits.
#[cfg(target_arch = "x86_64")]
const BOUND_OF_KEYS: f64 = 5e-5;

/// The bound for these kernels.
fn bound(case: &Case, features: Features) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if features == Features::Avx2 && case.n < MIN_PREFILL {
        if case.segments.iter().any(|&(.., v)| v == Type::Q4_0) {
            return BOUND_OF_8_BITS;
        }
        if case.segments.iter().any(|&(_, k, _)| k == Type::Q4_0) {
            return BOUND_OF_KEYS;
        }
    }
    let _ = (case, features);
    BOUND
}

thread_local! {
    /// Cases that this thread's test has had.
    static CASES: Cell<usize> = const { Cell::new(0) };
}

fn check_case(case: &Case, scheduler: &mut Scheduler) {
    if !CASES.replace(CASES.get() + 1).is_multiple_of(shorter()) {
        return;
    }
    let data = Data::new(case, scheduler, 1);
    let expected = data.reference(case);
    for features in features() {
        let got = data.run(case, scheduler, features);
        let error = worst(&got, &expected);
        assert!(error < bound(case, features), "{features:?}, {case:?}: {error:e}");
    }
}

fn case(size: usize, n: usize, kv_heads: usize, group: usize, segments: &[(usize, Type, Type)]) -> Case {
    let mask = MaskKind::Causal;
    Case { size, n, kv_heads, group, segments: segments.to_vec(), mask, soft_cap: None, sinks: false }
}

proptest::proptest! {
    /// Chunks are whole blocks (but for a segment's end), of which no two of a segment but the last differ by more than one.
    #[test]
    fn chunks_are_all_rows_once(rows in proptest::array::uniform4(0usize..20_000)) {
        let chunks = Chunks::new(rows);
        let mut next = [0; MAX_SEGMENTS];
        let mut sizes = [const { Vec::new() }; MAX_SEGMENTS];
        for i in 0..chunks.total() {
            let (segment, range) = chunks.get(i);
            proptest::prop_assert_eq!(range.start, next[segment]);
            proptest::prop_assert!(range.end > range.start && range.start % BLOCK == 0);
            next[segment] = range.end;
            sizes[segment].push(range.len().div_ceil(BLOCK));
        }
        proptest::prop_assert_eq!(next, rows);
        for sizes in sizes {
            let sizes = &sizes[..sizes.len().saturating_sub(1)];
            proptest::prop_assert!(sizes.iter().max().unwrap_or(&0) - sizes.iter().min().unwrap_or(&0) <= 1);
        }
    }
}

/// Room for more rows, which nothing sees, changes no bit of a result.
#[test]
fn chunks_of_few_rows_stay_where_they_are() {
    let chunks = |rows| Chunks::new([rows, 36, 0, 0]);
    for i in 0..11 {
        assert_eq!(chunks(1_408).get(i), chunks(2_048).get(i));
    }
    assert_eq!(chunks(2_048).get(0), (0, 0..128));
}

#[test]
fn all_types_and_query_counts() {
    let mut scheduler = scheduler(1);
    for k in Type::CACHE {
        for v in [Type::F32, Type::F16, Type::Q4_0, Type::Q5_1, k] {
            for n in [1, 7, 40] {
                check_case(&case(64, n, 2, 3, &[(333, k, v)]), &mut scheduler);
            }
        }
    }
}

/// Queries become 8-bit numbers for such keys, as llama.cpp makes them: off by up to 1/254 of the largest of 32, with keys up
/// to 3 in size. The worst of these cases was off by 7.4e-4.
#[test]
fn any_queries_meet_four_bit_keys() {
    let mut scheduler = scheduler(1);
    for n in [1, 3, 7, 40] {
        let case = case(64, n, 2, 3, &[(333, Type::Q4_0, Type::F32)]);
        let queries = Random(5).floats(64 * 6 * n, 1.0);
        let data = Data::new(&case, &mut scheduler, 1).with_queries(queries);
        let expected = data.reference(&case);
        for features in features() {
            let error = worst(&data.run(&case, &mut scheduler, features), &expected);
            println!("{features:?}, {n}: {error:e}");
            assert!(error < 2e-3, "{features:?}, {n}: {error:e}");
        }
    }
}

#[test]
fn all_head_sizes_and_groups() {
    let mut scheduler = scheduler(1);
    for size in [32, 64, 80, 96, 100, 128, 256] {
        for group in [1, 3, 8] {
            for n in [1, 2, 7, 40] {
                check_case(&case(size, n, 2, group, &[(200, Type::F16, Type::F16)]), &mut scheduler);
                if size % 32 == 0 {
                    check_case(&case(size, n, 1, group, &[(200, Type::Q4_0, Type::Q8_0)]), &mut scheduler);
                    let tiles = [(200, Type::KVARN4, Type::KVARN3), (70, Type::F16, Type::F16)];
                    check_case(&case(size, n, 2, group, &tiles), &mut scheduler);
                }
            }
        }
    }
}

#[test]
fn segments_share_a_softmax() {
    let mut scheduler = scheduler(1);
    for segments in [
        &[(300, Type::Q4_0, Type::Q4_0), (40, Type::F32, Type::F32)][..],
        &[(1, Type::F16, Type::F16), (700, Type::Q8_0, Type::F16), (65, Type::BF16, Type::F32)],
    ] {
        for n in [1, 7, 40, 300 / shorter()] {
            for mask in [MaskKind::None, MaskKind::Ring, MaskKind::Bias] {
                check_case(&Case { mask, ..case(64, n, 2, 3, segments) }, &mut scheduler);
            }
        }
    }
}

/// Values that all KV heads share give what a copy for each of them gives.
#[test]
fn heads_may_share_values() {
    let mut scheduler = scheduler(1);
    for n in [1, 7, 40] {
        let case = case(64, n, 3, 2, &[(300, Type::F16, Type::F32)]);
        let data = Data::new(&case, &mut scheduler, 13);
        let run = |shared: bool, scheduler: &mut Scheduler| {
            let graph = Graph::new(64);
            let q = graph.permute(&data.q, [0, 2, 1, 3]);
            let heads = |t: &Tensor, size, n_heads| {
                let [_, row_bytes, ..] = t.strides();
                graph.view(t, [size, 300, n_heads], [row_bytes, t.ty().row_bytes(size)], 0)
            };
            let (k, v) = (heads(&data.k[0], 64, 3), heads(&data.v[0], 20, 1));
            let copies = graph.concat(&graph.concat(&v, &v, 2), &v, 2);
            let segment = KvSegment {
                k: from_ref(&k),
                v: from_ref(if shared { &v } else { &copies }),
                mask: Some(&data.masks[0]),
            };
            let node = graph.fused_attention(&q, &[segment], &data.params(&case)).as_output();
            graph.expand(&node);
            scheduler.alloc(&graph).unwrap();
            scheduler.compute(&graph).unwrap();
            node.to_f32()
        };
        assert_eq!(bits(&run(true, &mut scheduler)), bits(&run(false, &mut scheduler)), "{n} queries");
    }
}

#[test]
fn soft_caps_and_sinks() {
    let mut scheduler = scheduler(1);
    for (soft_cap, sinks) in [(Some(2.0), false), (None, true), (Some(5.0), true)] {
        for n in [1, 3, 40] {
            for mask in [MaskKind::Causal, MaskKind::Ring] {
                let case = Case { mask, soft_cap, sinks, ..case(64, n, 2, 4, &[(150, Type::F16, Type::Q4_0)]) };
                check_case(&case, &mut scheduler);
            }
        }
    }
}

#[test]
fn a_query_that_sees_nothing_gets_zeros() {
    let mut scheduler = scheduler(1);
    for n in [2, 40] {
        // Fewer rows than queries: the first queries see none.
        let case = case(64, n, 1, 2, &[(n - 1, Type::F16, Type::F16)]);
        let data = Data::new(&case, &mut scheduler, 3);
        for features in features() {
            let got = data.run(&case, &mut scheduler, features);
            assert!(got[..2 * 64].iter().all(|&x| x == 0.0), "{features:?}");
            assert!(worst(&got, &data.reference(&case)) < BOUND);
        }
    }
}

/// What is hidden from all is not looked at: not even numbers that are none come through.
#[test]
fn hidden_blocks_are_not_read() {
    let mut scheduler = scheduler(1);
    for n in [1, 40] {
        let case = case(64, n, 1, 2, &[(64 * 8, Type::F32, Type::F32)]);
        let data = Data::new(&case, &mut scheduler, 5);
        // Rows 128..256 are hidden from all queries.
        for query in 0..n {
            data.masks[0].write(2 * (query * 512 + 128), &[0xfc00u16; 128]);
        }
        let clean = data.run(&case, &mut scheduler, Features::detect());
        for tensor in [&data.k[0], &data.v[0]] {
            tensor.write(4 * 64 * 128, &[f32::NAN; 64 * 128]);
        }
        let got = data.run(&case, &mut scheduler, Features::detect());
        assert_eq!(bits(&clean), bits(&got), "{n} queries");
    }
}

/// A store with room for more rows gives the last bits that a smaller one gives, whatever segments follow.
#[test]
fn room_after_the_rows_does_not_change_the_result() {
    let mut scheduler = scheduler(2);
    let case = case(64, 1, 2, 3, &[(1100, Type::F16, Type::F16), (300, Type::F32, Type::F32)]);
    let data = Data::new(&case, &mut scheduler, 13);
    data.masks[0].write(2 * 500, &[0xfc00u16; 600]);
    for features in features() {
        let all = data.run(&case, &mut scheduler, features);
        for rows in [500, 600, 800] {
            let graph = Graph::new(64);
            let q = graph.permute(&data.q, [0, 2, 1, 3]);
            let heads = |t: &Tensor, rows| heads(&graph, t, &case, rows);
            let (k, v) = (heads(&data.k[0], rows), heads(&data.v[0], rows));
            let mask = graph.view(&data.masks[0], [rows, 1, 1], [2 * rows, 2 * rows], 0);
            let (next_k, next_v) = (heads(&data.k[1], 300), heads(&data.v[1], 300));
            let segments = [
                KvSegment { k: from_ref(&k), v: from_ref(&v), mask: Some(&mask) },
                KvSegment { k: from_ref(&next_k), v: from_ref(&next_v), mask: Some(&data.masks[1]) },
            ];
            let node = graph.fused_attention_with(&q, &segments, &data.params(&case), features).as_output();
            graph.expand(&node);
            scheduler.alloc(&graph).unwrap();
            scheduler.compute(&graph).unwrap();
            assert_eq!(bits(&all), bits(&node.to_f32()), "{features:?}, {rows} rows");
        }
    }
}

#[test]
fn threads_do_not_change_the_result() {
    for n in [1, 2, 40, 300 / shorter()] {
        for segments in
            [&[(2000, Type::F16, Type::F16)][..], &[(1500, Type::Q4_0, Type::Q4_0), (300, Type::F32, Type::F32)]]
        {
            let case = case(64, n, 3, 3, segments);
            let data = Data::new(&case, &mut scheduler(1), 7);
            let one = data.run(&case, &mut scheduler(1), Features::detect());
            for threads in [2, 4] {
                let mut scheduler = scheduler(threads);
                for _ in 0..5_usize.div_ceil(shorter()) {
                    let more = data.run(&case, &mut scheduler, Features::detect());
                    assert_eq!(bits(&one), bits(&more), "{threads} threads, {case:?}");
                }
            }
        }
    }
}

/// Nearer to the exact result than ggml's own (or within the bound of 8-bit weights), and near to ggml's.
#[test]
fn agrees_with_ggmls_flash_attention() {
    let mut scheduler = scheduler(1);
    for ty in [Type::F16, Type::Q4_0, Type::Q8_0] {
        for n in [1, 7, 40, 300 / shorter()] {
            let case = case(64, n, 3, 3, &[(512, ty, ty)]);
            let data = Data::new(&case, &mut scheduler, 11);
            let ours = data.run(&case, &mut scheduler, Features::detect());
            let graph = Graph::new(64);
            let q = graph.permute(&data.q, [0, 2, 1, 3]);
            let heads = |t: &Tensor| heads(&graph, t, &case, 512);
            let (k, v) = (heads(&data.k[0]), heads(&data.v[0]));
            let node = graph.flash_attn(&q, &k, &v, &data.masks[0], data.params(&case).scale, 0.0, None).as_output();
            graph.expand(&node);
            scheduler.alloc(&graph).unwrap();
            scheduler.compute(&graph).unwrap();
            let theirs = node.to_f32();
            let expected = data.reference(&case);
            let (our_error, their_error) = (worst(&ours, &expected), worst(&theirs, &expected));
            let bound = match bound(&case, Features::detect()) {
                BOUND => their_error.max(1e-6),
                of_8_bits => of_8_bits,
            };
            assert!(our_error <= bound, "{ty}, {n}: {our_error:e}, ggml {their_error:e}");
            // ggml rounds queries to the keys' own kind of type.
            let ours: Vec<f64> = ours.iter().map(|&x| f64::from(x)).collect();
            assert!(worst(&theirs, &ours) < 2e-2, "{ty}, {n}: {:e}", worst(&theirs, &ours));
        }
    }
}

/// Bit for bit, wherever the pieces end, and whatever kernels run.
#[test]
fn pieces_are_as_one() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 256).unwrap();
    for (ty_k, ty_v) in [(Type::F16, Type::F16), (Type::Q8_0, Type::Q4_0), (Type::Q4_0, Type::F32)] {
        for n in [1, 3, 40] {
            for mask in [MaskKind::Causal, MaskKind::Ring] {
                let segments = [(64 * 5 + 17, ty_k, ty_v), (100, Type::F16, Type::F16), (64, ty_k, ty_v)];
                let case = Case { mask, ..case(64, n, 2, 2, &segments) };
                let data = Data::new(&case, &mut scheduler, 11);
                for features in features() {
                    let whole = data.run(&case, &mut scheduler, features);
                    for at in [1, 2, 4] {
                        let graph = Graph::new(256);
                        let node = data.node_in_pieces(&case, &graph, features, at);
                        graph.expand(&node);
                        scheduler.alloc(&graph).unwrap();
                        scheduler.compute(&graph).unwrap();
                        assert_eq!(bits(&node.to_f32()), bits(&whole), "{case:?}, {features:?}, {at} blocks");
                    }
                }
            }
        }
    }
}

/// The first so many rows of a head of a store, in memory of their own, the last ones in a piece of their own.
fn rows_of_head(store: &Tensor, case: &Case, head: usize, n: usize) -> Vec<Tensor> {
    let (ty, row_bytes) = (store.ty(), store.strides()[1]);
    let head_bytes = ty.row_bytes(case.size);
    let piece = |rows: std::ops::Range<usize>| {
        let context = Context::new(1);
        let piece = context.tensor(ty, &[case.size, rows.len(), 1]);
        context.alloc(Device::cpu().buffer_type(), "a piece").unwrap();
        for (to, row) in rows.enumerate() {
            let mut bytes = vec![0u8; head_bytes];
            store.read(row * row_bytes + head * head_bytes, &mut bytes);
            piece.write(to * head_bytes, &bytes);
        }
        piece
    };
    let cut = n / 2 / BLOCK * BLOCK;
    [0..cut, cut..n].into_iter().filter(|rows| !rows.is_empty()).map(piece).collect()
}

/// Heads that have other numbers of rows, none among them, beside a segment that all have.
#[test]
fn heads_may_have_rows_of_their_own() {
    let mut scheduler = Scheduler::new(&[Device::cpu()], 2, 256).unwrap();
    for (ty_k, ty_v) in
        [(Type::F16, Type::F16), (Type::Q8_0, Type::Q4_0), (Type::Q4_0, Type::Q4_0), (Type::F32, Type::F16)]
    {
        for n in [1, 3, 40] {
            for counts in [[0, 1, 700], [130, 64, 0], [63, 320, 65]] {
                let segments = [(200, ty_k, ty_v), (700, ty_k, ty_v)];
                let case = Case { soft_cap: (n == 3).then_some(20.0), sinks: n == 3, ..case(64, n, 3, 2, &segments) };
                let mut data = Data::new(&case, &mut scheduler, 5);
                for (head, &count) in counts.iter().enumerate() {
                    data.plain.k[head].truncate(200 + count);
                    data.plain.v[head].truncate(200 + count);
                }
                data.plain.mask.iter_mut().for_each(|mask| mask[200..].fill(0.0));
                let expected = data.reference(&case);
                let of_heads: Vec<HeadRows> = (counts.iter().enumerate())
                    .map(|(head, &count)| HeadRows {
                        k: rows_of_head(&data.k[1], &case, head, count),
                        v: rows_of_head(&data.v[1], &case, head, count),
                    })
                    .collect();
                for features in features() {
                    let graph = Graph::new(64);
                    let q = graph.permute(&data.q, [0, 2, 1, 3]);
                    let k = heads(&graph, &data.k[0], &case, 200);
                    let v = heads(&graph, &data.v[0], &case, 200);
                    let segment = KvSegment { k: from_ref(&k), v: from_ref(&v), mask: Some(&data.masks[0]) };
                    let params = FusedAttention { of_heads: &of_heads, ..data.params(&case) };
                    let node = graph.fused_attention_with(&q, &[segment], &params, features).as_output();
                    graph.expand(&node);
                    scheduler.alloc(&graph).unwrap();
                    scheduler.compute(&graph).unwrap();
                    let first = node.to_f32();
                    let error = worst(&first, &expected);
                    assert!(error < bound(&case, features), "{features:?}, {case:?}, {counts:?}: {error:e}");
                    scheduler.compute(&graph).unwrap();
                    assert_eq!(bits(&first), bits(&node.to_f32()), "the second run");
                }
            }
        }
    }
}
