//! What computes: devices, the graph that is kept between decode steps, and the rows of results.

use std::{mem, time::Duration};

use super::{
    batch::{Fed, Part},
    groups::{Company, Group, groups, rows_read},
    inputs::Inputs,
    layer::LayerCache,
    score::{self, SCORE_NAME, Scored},
    setup::{LayerSetup, Setup},
    step::{Output, Step, Stretch},
};
use crate::{
    cache::{Chain, HeadLists},
    ggml::{self, Error, Graph, Scheduler},
};

/// What a session computes with, and what came of it.
pub(super) struct Executor {
    pub scheduler: Scheduler,
    /// The last decode step.
    kept: Option<Kept>,
    /// Rows of `n_vocab` logits, in the order of the last call's tokens.
    pub logits: Vec<f32>,
    /// Rows of `n_embd` for the same tokens: hidden states after the final norm. Empty unless they are wanted.
    pub embeddings: Vec<f32>,
    pub wants_embeddings: bool,
    /// Which sequences decode together.
    pub company: Company,
    /// Time that scores took, where it is measured.
    pub score_time: Option<Duration>,
}

/// What a step of computation is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepReport {
    /// Operations that compute something: on a card about as many kernels are launched, but for those that ggml joins.
    pub operations: usize,
    /// Parts of the graph, each of which one device computes.
    pub splits: usize,
    /// Bytes of inputs that are filled by the processor before each run.
    pub input_bytes: usize,
    /// Bytes of the rows of keys and values that attention reads.
    pub cache_bytes: usize,
}

/// Rows of results, put aside.
pub(super) struct Results {
    logits: Vec<f32>,
    embeddings: Vec<f32>,
}

/// A step that can run again as long as its key stays the same.
pub(super) struct Kept {
    key: Key,
    /// Bytes of the caches' rows that it reads.
    cache_bytes: usize,
    pub step: Step,
}

/// What a graph's shape depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    parts: Vec<Part>,
    has_embeddings: bool,
    n_outputs: usize,
    /// For each part and layer.
    stores: Vec<Stores>,
}

/// What a graph refers to of a layer in a sequence: chains and their pieces that the first token is written to, lists, the
/// state's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stores {
    main: Option<Written>,
    /// Rows of it that attention reads.
    n_rows: usize,
    exact: Option<Written>,
    lists: Option<u64>,
    state: Option<u64>,
}

/// A chain of rows, and which of its pieces is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Written {
    chain: u64,
    piece: usize,
}

impl Executor {
    /// Starts the devices of a session.
    pub fn new(setup: &Setup) -> Result<Executor, Error> {
        let (params, max_nodes) = (&setup.params, Setup::max_nodes(setup.layers.len()));
        let abort = params.abort.clone().unwrap_or_default();
        let (devices, n_threads) = (setup.model.devices(), params.n_threads);
        Ok(Executor {
            scheduler: Scheduler::with_abort_flag(&devices, n_threads, max_nodes, params.op_offload, abort)?,
            kept: None,
            logits: Vec::new(),
            embeddings: Vec::new(),
            wants_embeddings: false,
            company: Company::default(),
            score_time: None,
        })
    }

    /// Nothing refers to memory of before from now on: the kept step goes, intermediate results are given up, and what was
    /// freed goes back to the system. To be called where stores go, before and afterwards.
    pub fn forget(&mut self) {
        self.kept = None;
        self.scheduler.release();
        ggml::release_free_memory();
    }

    /// A step through all layers to the output, whose tensors have memory: the kept one where it serves again.
    pub fn step(&mut self, setup: &Setup, stretch: &Stretch<'_>) -> Result<Kept, Error> {
        let key = Key::new(stretch);
        if let Some(kept) = self.kept.take()
            && kept.key == key
            && self.scheduler.can_rerun(&kept.step.graph)
        {
            return Ok(kept);
        }
        let mut step = setup.step(stretch, Inputs::default());
        if stretch.n_wanted > 0 {
            step.add_output(setup, self.wants_embeddings);
        }
        self.scheduler.alloc(&step.graph)?;
        Ok(Kept { key, cache_bytes: cache_bytes(setup, stretch), step })
    }

    /// What the kept step is made of.
    pub fn report(&self) -> Option<StepReport> {
        let kept = self.kept.as_ref().filter(|kept| self.scheduler.is_allocated(&kept.step.graph))?;
        Some(StepReport {
            operations: kept.step.graph.n_operations(),
            splits: self.scheduler.n_splits(),
            input_bytes: kept.step.inputs.bytes(),
            cache_bytes: kept.cache_bytes,
        })
    }

    /// Keeps a step for the next call.
    pub fn keep(&mut self, kept: Kept) {
        self.kept = Some(kept);
    }

    /// Fills a step's inputs, computes it, and adds its rows to the results. The layers' scores, in order.
    pub fn run(&mut self, step: &mut Step, parts: &[Part], fed: Fed<'_>, rows: &[i32]) -> Result<Vec<Scored>, Error> {
        step.fill(parts, fed, rows);
        match &mut self.score_time {
            Some(total) if !step.scores.is_empty() => {
                *total += self.scheduler.compute_timed(&step.graph, SCORE_NAME)?
            }
            _ => self.scheduler.compute(&step.graph)?,
        }
        if let Some(output) = &step.output {
            self.read(output);
        }
        Ok(score::joined(&step.scores))
    }

    /// As [`Executor::run`], but where nothing is read of the step devices may still be at it when this returns.
    pub fn start(&mut self, step: &mut Step, parts: &[Part], fed: Fed<'_>, rows: &[i32]) -> Result<Vec<Scored>, Error> {
        if !step.scores.is_empty() || step.output.is_some() {
            return self.run(step, parts, fed, rows);
        }
        step.fill(parts, fed, rows);
        self.scheduler.start(&step.graph)?;
        Ok(Vec::new())
    }

    /// Computes rows of results alone, and adds them.
    pub fn run_output(&mut self, graph: &Graph, output: &Output) -> Result<(), Error> {
        self.scheduler.alloc(graph)?;
        self.scheduler.compute(graph)?;
        self.read(output);
        Ok(())
    }

    /// Takes the rows of results away, for a run whose rows are another's: [`Executor::put_results`] gives that one's, and
    /// puts these back.
    pub fn take_results(&mut self) -> Results {
        Results { logits: mem::take(&mut self.logits), embeddings: mem::take(&mut self.embeddings) }
    }

    /// The logits of what was run since [`Executor::take_results`].
    pub fn put_results(&mut self, results: Results) -> Vec<f32> {
        self.embeddings = results.embeddings;
        mem::replace(&mut self.logits, results.logits)
    }

    fn read(&mut self, Output { logits, embeddings }: &Output) {
        let start = self.logits.len();
        self.logits.resize(start + logits.shape().iter().product::<usize>(), 0.0);
        logits.read(0, &mut self.logits[start..]);
        if let Some(embeddings) = embeddings {
            self.embeddings.extend(embeddings.to_f32());
        }
    }
}

/// Bytes of the rows that attention reads, in all layers and sequences.
fn cache_bytes(setup: &Setup, stretch: &Stretch<'_>) -> usize {
    let of_layer = |(index, layer): (usize, &LayerSetup)| {
        let caches: Vec<&LayerCache> = stretch.caches.iter().map(|layers| &layers[index]).collect();
        let bytes = |store: &Chain, n_rows: usize| n_rows * layer.plan.rows.row_bytes(store.format());
        let of_group = |group: Group<'_>| {
            let caches = &caches[group.parts.clone()];
            let n_rows = rows_read(&stretch.parts[group.parts], caches);
            let of_cache = |cache: &&LayerCache| {
                let main = cache.store.as_ref().map_or(0, |store| bytes(store, n_rows));
                let lists = cache.lists().map_or(0, HeadLists::row_bytes);
                main + lists + cache.exact.as_ref().map_or(0, |exact| bytes(&exact.store, exact.span.n_rows()))
            };
            caches.iter().map(of_cache).sum::<usize>()
        };
        groups(&layer.plan, stretch.parts, &caches).into_iter().map(of_group).sum::<usize>()
    };
    setup.layers.iter().enumerate().map(of_layer).sum()
}

impl Key {
    fn new(stretch: &Stretch<'_>) -> Key {
        let store = |part: &Part, layer: &LayerCache| {
            let state = layer.state.as_ref().map(|state| state.id());
            let written = |store: &Chain, row: usize| Written { chain: store.id(), piece: store.piece_of(row) };
            let main = layer.store.as_ref().map(|store| written(store, layer.row(part.n_past)));
            let exact = layer.exact.as_ref().map(|exact| written(&exact.store, exact.span.row(part.n_past)));
            let lists = layer.lists().map(HeadLists::id);
            Stores { main, n_rows: layer.rows_read(part.n_past + part.n), exact, lists, state }
        };
        let caches = stretch.parts.iter().zip(stretch.caches);
        let stores = caches.flat_map(|(part, layers)| layers.iter().map(move |layer| store(part, layer))).collect();
        // A step differs from the one before by its positions only, which are inputs.
        let alike = |part: &Part| Part { n_past: 0, exact_from: 0, state_row: 0, shift: 0, ..*part };
        let parts = stretch.parts.iter().map(alike).collect();
        Key { parts, has_embeddings: stretch.has_embeddings, n_outputs: stretch.n_wanted, stores }
    }
}
