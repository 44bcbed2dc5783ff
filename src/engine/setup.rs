//! What a session runs by: its parameters, checked, and what follows from them for each layer. It never changes in part:
//! other parameters are another setup, so that nothing of it can be out of date.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use super::{
    batch::{BatchEntry, MAX_PARTS},
    error::Error,
    profile::{self, Settled},
    pruning::{self, Pruning},
};
use crate::{
    cache::{Chain, Format, KvRotate, Meter, Moving, Rotations, RowScores, RowShape, Span, StateStore, Store},
    ggml::{self, ATTENTION_BLOCK, Adapted, Device, Graph, TILE, Type},
    lazy::{At, Identity, LazyParams, Policy, Prune, PruneMap, Selector, default_threshold},
    model::{Hparams, LoraAdapter, Model, StateSize},
};

/// Rows that attention reads are rounded up to this many, so that a decode graph serves as many steps (as in llama.cpp).
pub(super) const ROWS_STEP: usize = 256;

/// LoRA adapters that a session can have at once.
pub const MAX_ADAPTERS: usize = 8;

/// Tokens before a prompt's end, or before a checkpoint, from which one can go on as well: servers read the last few
/// anew.
pub(super) const BACK: usize = 8;

/// How a session runs. The defaults are llama.cpp's.
///
/// ```
/// use simlayer::{SessionParams, lazy::{LazyParams, Policy}};
///
/// let lazy = LazyParams { policy: Policy::Budget(0.5), ..LazyParams::default() };
/// let params = SessionParams { n_ctx: 4096, lazy, ..SessionParams::default() };
/// ```
#[derive(Debug, Clone)]
pub struct SessionParams {
    /// Tokens that a sequence can hold; 0 for as many as the model was trained for.
    pub n_ctx: usize,
    /// Tokens that are computed at once.
    pub n_ubatch: usize,
    /// Threads for decoding.
    pub n_threads: usize,
    /// Threads for reading prompts; 0 for as many as for decoding.
    pub n_threads_batch: usize,
    /// Types of the active layers' keys and values. Of a model whose values are in its keys the first counts for both, and so it
    /// is with lazy layers' types.
    pub type_k: Type,
    pub type_v: Type,
    /// Attention in one operation, without the matrix of all weights.
    pub flash_attn: bool,
    /// Compute attention, and products of quantised weights, with this crate's own kernels, which are
    /// faster. Off (or without flash attention): with ggml's, whose logits are llama.cpp's bit for bit.
    pub fused_attention: bool,
    /// Let devices compute products of many tokens with weights that the processor has: the weights are sent there for it. Which
    /// devices want to, and from how many tokens on (32), is ggml's to say; those behind RPC never do.
    pub op_offload: bool,
    /// When keys and values are rotated.
    pub kv_rotate: KvRotate,
    /// Newest tokens that are kept in f16 as well, with the sink, beside each quantised store: most of what four bits
    /// lose is lost there (KIVI, arXiv 2402.02750). 0 for none, which is llama.cpp's way. Needs this crate's own
    /// attention kernel, and is ignored without it.
    pub kv_exact: usize,
    /// Keep what is needed to take an answer back and to ask for it again exactly: each prompt's last logits, the newest
    /// tokens' rows in f16 as they were then, recurrent layers' states, and a long answer's first windows of lazy layers.
    pub keep_prompt_end: bool,
    /// Prompts may come in several calls of [`Session::run`](super::Session::run), of which the last is marked as the prompt's end. The ends
    /// of all are scored then, so that a short last piece does not decide alone.
    pub split_prompts: bool,
    /// Read a long prompt layer by layer, so that only one layer's cache is ever uncompressed. Off: ubatch by ubatch.
    pub layer_major: bool,
    /// Which layers become lazy.
    pub lazy: LazyParams,
    /// Which old rows the layers drop that are not lazy. It needs a map of the model ([`PruneMap`]), and this crate's own
    /// attention kernel on the processor.
    pub prune: Prune,
    /// Leave what is looked at before layers become lazy ([`Policy::Kl`], [`Policy::Auto`], [`LazyParams::narrow_keys`]) to
    /// [`Session::look_step`](super::Session::look_step), so that other sequences can go on meanwhile. Off: it is part of reading the prompt.
    pub look_in_steps: bool,
    /// LoRA adapters of the model, each with what it is multiplied by; [`MAX_ADAPTERS`] at most. Each adds to what the ones
    /// before it gave.
    pub adapters: Vec<(LoraAdapter, f32)>,
    /// A flag that ends the running call with [`Error::Interrupted`] once another thread sets it. It stays set until it is
    /// taken back. Several sessions can have the same one; `None` for one of the session's own
    /// ([`Session::abort_flag`](super::Session::abort_flag)).
    pub abort: Option<Arc<AtomicBool>>,
}

impl Default for SessionParams {
    fn default() -> Self {
        SessionParams {
            n_ctx: 0,
            n_ubatch: 512,
            n_threads: std::thread::available_parallelism().map_or(4, usize::from),
            n_threads_batch: 0,
            type_k: Type::F16,
            type_v: Type::F16,
            flash_attn: true,
            fused_attention: true,
            op_offload: true,
            kv_rotate: KvRotate::default(),
            kv_exact: 32,
            keep_prompt_end: true,
            split_prompts: false,
            layer_major: true,
            lazy: LazyParams::default(),
            prune: Prune::Off,
            look_in_steps: false,
            adapters: Vec::new(),
            abort: None,
        }
    }
}

/// Fills in what the model's profile says, where a policy goes by one. The order that looks go by, where a profile is named
/// for them.
pub(super) fn settle(
    params: &mut SessionParams,
    path: &Path,
    identity: &Identity,
) -> Result<Option<Vec<usize>>, Error> {
    let Settled { order, setting } = profile::settle(&mut params.lazy, path, identity)?;
    if let Some(setting) = setting {
        // What is not the default was asked for, and stays.
        if (params.type_k, params.type_v) == (Type::F16, Type::F16) {
            (params.type_k, params.type_v) = (setting.type_k, setting.type_v);
        }
        if setting.prune && params.prune == Prune::Off {
            params.prune = Prune::Auto;
        }
    }
    Ok(order)
}

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// Our own operation.
    Fused,
    /// ggml's operation.
    Flash,
    /// Products and a softmax, with the matrix of all weights between them.
    Separate,
}

/// What follows from the parameters for one layer on a device, without any memory of it.
#[derive(Debug, Clone)]
pub(super) struct LayerPlan {
    pub device: Device,
    /// The device, unless the processor can read its memory.
    pub apart: Option<Device>,
    pub kernel: Kernel,
    /// Whether the layer has keys and values of its own.
    pub attends: bool,
    /// The layer whose keys and values it reads, where it has none.
    pub shares: Option<usize>,
    /// What it carries from token to token, where it is recurrent.
    pub state: Option<StateSize>,
    /// What its rows of keys and values are made of.
    pub rows: RowShape,
    /// How the layer keeps its rows, and how it keeps them while it is lazy.
    pub active: Format,
    pub lazy: Format,
    /// How it keeps them once its keys are narrow, where they may become so.
    pub narrow: Option<Format>,
    /// What it keeps by the model's own design; `None` for everything.
    pub by_design: Option<Span>,
    /// What it keeps while it is lazy.
    pub lazy_span: Span,
    /// What its exact store keeps, where it has one: KIVI's residual (arXiv 2402.02750), and the sink.
    exact_span: Option<Span>,
    /// Rows are allocated in blocks of this many.
    pub block: usize,
    /// Rows that sequences share or not together: those of a block of our own kernel. `None` where a kernel wants all rows in
    /// one piece; whoever writes first has a copy then.
    pub grain: Option<usize>,
    /// The rows of a store with a span are a multiple of this.
    ring_block: usize,
}

impl LayerPlan {
    /// The plan of layer `index` on a device, where attention is computed by `kernel`: see [`kernel`].
    pub fn new(params: &SessionParams, hparams: &Hparams, index: usize, device: Device, kernel: Kernel) -> LayerPlan {
        let lazy = &params.lazy;
        let apart = (!device.buffer_type().is_host()).then_some(device);
        let active = rows(hparams, index).format(params.type_k, params.type_v, params.kv_rotate);
        let lazily = lazy_format(params, rows(hparams, index));
        let has_tiles = active.has_tiles() || lazily.has_tiles();
        let exact_span = Span {
            n_sink: lazy.n_sink,
            // One for all layers: where tokens are taken back a sequence notes once what is left of them. Tiles need as many.
            n_window: params.kv_exact.max(if has_tiles { TILE } else { 0 }),
            // So that one can go back to just before a prompt's end.
            n_slack: if params.keep_prompt_end { BACK } else { 0 },
            chunked: false,
            n_rescued: 0,
        };
        let (chunked, rows) = (hparams.chunked, rows(hparams, index));
        // ggml's flash attention for CUDA takes a slower way where rows are no multiple of 256.
        let ring_block = if kernel == Kernel::Flash && apart.is_some() { ROWS_STEP } else { 1 };
        let in_blocks = |span: Span| whole_blocks(span, ring_block);
        // Positions are in the same row of a tile then, wherever they are kept.
        let slack = |n_window: usize| match has_tiles {
            true => (n_window + lazy.n_slack).next_multiple_of(TILE) - n_window,
            false => lazy.n_slack,
        };
        let by_design =
            |n_window| in_blocks(Span { n_sink: 0, n_window, n_slack: slack(n_window), chunked, n_rescued: 0 });
        LayerPlan {
            device,
            apart,
            kernel,
            attends: hparams.has_store(index),
            shares: hparams.shares[index],
            state: hparams.states[index],
            rows,
            active,
            lazy: lazily,
            narrow: narrow_format(params, rows).filter(|_| hparams.can_be_lazy(index)),
            by_design: hparams.windows[index].filter(|_| hparams.has_store(index)).map(by_design),
            lazy_span: in_blocks(Span {
                n_window: lazy.window(index),
                n_sink: lazy.n_sink,
                n_slack: slack(lazy.window(index)),
                chunked: false,
                n_rescued: if hparams.can_be_lazy(index) { lazy.n_rescued } else { 0 },
            }),
            exact_span: (kernel == Kernel::Fused && exact_span.n_window > 0).then_some(exact_span),
            // ggml's kernels divide their work by the number of rows, and llama.cpp gives them a multiple of 256.
            block: if kernel == Kernel::Fused { ATTENTION_BLOCK } else { ROWS_STEP },
            grain: (kernel == Kernel::Fused).then_some(ATTENTION_BLOCK),
            ring_block,
        }
    }

    /// Rows that a store of this span has at most.
    pub fn most_rows(&self, span: Span, format: Format) -> usize {
        span.n_rows().next_multiple_of(if format.has_tiles() { TILE } else { self.ring_block })
    }

    /// What the exact store beside a store of this format keeps, where one is due.
    pub fn exact_span_for(&self, format: Format) -> Option<Span> {
        self.exact_span.filter(|_| format.k.is_quantized() || format.v.is_quantized())
    }
}

/// A span whose rows do not begin another block for the sake of a few of its slack, of which it gives up a tenth at most: all rows
/// of a block are read.
fn whole_blocks(span: Span, block: usize) -> Span {
    let over = span.n_rows() % block;
    if over <= span.n_slack / 10 { Span { n_slack: span.n_slack - over, ..span } } else { span }
}

/// A layer's plan, and what its stores are made with.
#[derive(Debug, Clone)]
pub(super) struct LayerSetup {
    pub plan: LayerPlan,
    /// Whether it is lazy from a sequence's first token on.
    pub starts_lazy: bool,
    pub rotations: Arc<Rotations>,
    /// By what its rows are pruned or rescued, where they may be.
    pub pruning: Option<Arc<Pruning>>,
    /// Whether its rows are pruned while it is not lazy.
    pub prunes: bool,
    /// Rows that a store never needs to exceed.
    pub n_ctx: usize,
    meter: Meter,
}

impl LayerSetup {
    /// Elements of keys and values of a token.
    pub fn row_elements(&self) -> usize {
        self.plan.rows.key_width() + self.plan.rows.value_width()
    }

    /// A store of at least `n_rows` rows on the layer's device.
    pub fn make(&self, n_rows: usize, span: Option<Span>, format: Format) -> Result<Store, ggml::Error> {
        self.make_rest(0, n_rows, span, format)
    }

    /// A store of the rows after the first `first`, so that there are at least `n_rows` with them.
    pub fn make_rest(
        &self,
        first: usize,
        n_rows: usize,
        span: Option<Span>,
        format: Format,
    ) -> Result<Store, ggml::Error> {
        let memory = self.plan.device.buffer_type();
        let most_rows = span.map(|span| self.plan.most_rows(span, format) - first);
        Store::new(self.plan.rows, n_rows - first, self.plan.block, most_rows, format, memory, &self.meter)
    }

    /// Room for the scores of so many rows.
    pub fn make_scores(&self, n_rows: usize) -> Result<RowScores, ggml::Error> {
        RowScores::new(self.plan.rows.heads, n_rows, self.plan.device.buffer_type(), &self.meter)
    }

    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// A store as the rows of a sequence, which copies of the sequence share.
    pub fn chain(&self, store: Store) -> Chain {
        Chain::new(store, self.plan.grain)
    }

    /// How rows come into the layer's stores.
    pub fn moving(&self) -> Moving<'_> {
        Moving {
            shape: self.plan.rows,
            rotations: &self.rotations,
            n_sink: self.plan.exact_span.map_or(0, |span| span.n_sink),
            memory: self.plan.device.buffer_type(),
        }
    }

    /// A state on the layer's device, where the layer has one.
    pub fn make_state(&self) -> Result<Option<StateStore>, ggml::Error> {
        let make = |StateSize { columns, matrices }: StateSize| {
            StateStore::new(columns, matrices, self.plan.device.buffer_type(), &self.meter)
        };
        self.plan.state.map(make).transpose()
    }

    /// What the layer keeps of a sequence from its first token on, and how.
    pub fn at_first(&self) -> (Option<Span>, Format) {
        match self.starts_lazy {
            true => (Some(self.plan.lazy_span), self.plan.lazy),
            false => (self.plan.by_design, self.plan.active),
        }
    }
}

/// What a session runs by.
#[derive(Debug)]
pub(super) struct Setup {
    pub model: Model,
    /// Without anything left to be filled in.
    pub params: SessionParams,
    pub layers: Vec<LayerSetup>,
    /// The layers in groups that a long prompt goes through together: neighbours on one device.
    pub groups: Vec<Range<usize>>,
    /// Layers in the order in which they are to be tried where the policy goes by looks; `None` for that of a probe.
    pub order: Option<Vec<usize>>,
    /// Counts the caches' bytes.
    pub meter: Meter,
    /// What the adapters add to products.
    adapted: Arc<Adapted>,
    threshold: f32,
}

impl Setup {
    /// Fills in what the parameters leave open, and works out what follows from them.
    pub fn new(model: &Model, mut params: SessionParams, meter: Meter) -> Result<Setup, Error> {
        let hparams = model.hparams();
        if params.n_ctx == 0 {
            params.n_ctx = hparams.n_ctx_train;
        }
        if params.n_threads_batch == 0 {
            params.n_threads_batch = params.n_threads;
        }
        let order = settle(&mut params, model.path(), model.identity())?;
        check(&params, hparams)?;
        let adapted = Arc::new(adapted(model, &params.adapters)?);
        let mut setup = Setup {
            threshold: default_threshold(&hparams.architecture, model.name(), hparams.rope.freq_base),
            model: model.clone(),
            layers: Vec::with_capacity(hparams.n_layer),
            groups: Vec::new(),
            order,
            meter,
            adapted,
            params,
        };
        let (prunes, rescues) = (setup.params.prune != Prune::Off, setup.rescues());
        let map = if prunes || rescues { Some(PruneMap::find(model.path(), model.identity())?) } else { None };
        for index in 0..hparams.n_layer {
            let mut layer = setup.layer(index)?;
            if let Some(map) = &map {
                setup.add_pruning(index, &mut layer, map)?;
            }
            setup.layers.push(layer);
        }
        // So that what a ubatch overwrites was there before it.
        let rings = setup.layers.iter().map(|layer| layer.plan.lazy_span).filter(|span| rescues && span.n_rescued > 0);
        setup.params.n_ubatch = rings.map(Span::ring).fold(setup.params.n_ubatch, usize::min);
        setup.groups = setup.groups();
        Ok(setup)
    }

    /// The setup of layer `index`, those of the layers before it being there.
    fn layer(&self, index: usize) -> Result<LayerSetup, Error> {
        let (hparams, params) = (self.model.hparams(), &self.params);
        let device = self.model.layer_device(index);
        let is_alike =
            |other: &usize| self.layers[*other].plan.device == device && hparams.heads(*other) == hparams.heads(index);
        let (kernel, rotations) = match (0..index).find(is_alike).map(|other| &self.layers[other]) {
            Some(layer) => (layer.plan.kernel, Arc::clone(&layer.rotations)),
            None => {
                let rotations = Rotations::new(rows(hparams, index), device.buffer_type())?;
                (kernel(params, hparams, index, device), Arc::new(rotations))
            }
        };
        let plan = LayerPlan::new(params, hparams, index, device, kernel);
        check_tiles(&plan, &[plan.active, plan.lazy], hparams)?;
        let is_known_lazy = params.lazy.windowed_prefill() && self.selector().is_known_lazy(index);
        Ok(LayerSetup {
            starts_lazy: is_known_lazy && hparams.can_be_lazy(index),
            plan,
            rotations,
            pruning: None,
            prunes: false,
            n_ctx: params.n_ctx,
            meter: self.meter.clone(),
        })
    }

    /// Whether older rows are kept beside lazy layers' windows.
    fn rescues(&self) -> bool {
        self.params.lazy.policy != Policy::Off && self.params.lazy.n_rescued > 0
    }

    /// By what a layer's rows are pruned or rescued, where they may be. A layer that the map does not have is not pruned.
    fn add_pruning(&self, index: usize, layer: &mut LayerSetup, map: &PruneMap) -> Result<(), Error> {
        let (params, plan) = (&self.params, &layer.plan);
        let is_known = matches!(params.lazy.policy, Policy::Layers(_) | Policy::Profile(_));
        let may_be_lazy = !is_known || self.selector().is_known_lazy(index);
        let rescues = self.rescues() && plan.lazy_span.n_rescued > 0 && may_be_lazy;
        let (option, wrong): (_, fn(String) -> Error) =
            if rescues { ("--lazy-rescue", Error::Rescue) } else { ("--prune", Error::Prune) };
        let prunes = params.prune != Prune::Off && map.layers.contains_key(&index);
        if !rescues && !prunes {
            return Ok(());
        }
        let Some(of_layer) = map.layers.get(&index) else {
            return Err(wrong(format!("the map does not have layer {index}: make another with calibrate --fit-prune")));
        };
        if let Some(why) = pruning::obstacle(self.model.hparams(), index, of_layer) {
            return Err(wrong(format!(
                "the map has layer {index}, but {why}: make another with calibrate --fit-prune"
            )));
        }
        if plan.kernel != Kernel::Fused {
            return Err(wrong(format!(
                "layer {index}: this crate's own attention kernel on the processor reads such caches alone: leave {option} out, or \
                 --ggml-kernels, flash attention off, and layers on other devices (-ngl 0)"
            )));
        }
        if [Some(plan.active), Some(plan.lazy), plan.narrow].into_iter().flatten().any(Format::has_tiles) {
            return Err(wrong(format!(
                "layer {index}: not in caches of tiles (kvarn4, kvarn3, kvarn2): give other types, or leave {option} out"
            )));
        }
        let bound = match params.prune {
            Prune::Below(bound) => bound,
            Prune::Off | Prune::Auto => map.bound,
        };
        layer.pruning = Some(Arc::new(Pruning::new(of_layer, bound, plan.device.buffer_type())?));
        layer.prunes = prunes;
        Ok(())
    }

    fn groups(&self) -> Vec<Range<usize>> {
        let n_layer = self.layers.len();
        let lazy = &self.params.lazy;
        let none_shrinks = lazy.policy == Policy::Off || lazy.windowed_prefill();
        let scratch_stays = none_shrinks && self.layers.iter().all(|layer| layer.at_first().1 == Format::F16);
        let mut groups: Vec<Range<usize>> = Vec::new();
        let hparams = self.model.hparams();
        // Who reads a layer's keys and values goes with it: they are there while it is read.
        let is_read = |group: &Range<usize>, by: usize| group.clone().any(|layer| hparams.last_reader(layer) >= by);
        for (index, layer) in self.layers.iter().enumerate() {
            let at_most = match layer.plan.apart {
                None => 1,
                Some(_) if scratch_stays => n_layer,
                Some(_) => n_layer / 8,
            };
            match groups.last_mut() {
                Some(group)
                    if is_read(group, index)
                        || (group.len() < at_most && self.layers[group.start].plan.device == layer.plan.device) =>
                {
                    group.end = index + 1;
                }
                _ => groups.push(index..index + 1),
            }
        }
        groups
    }

    /// The formats of each layer while it is active and while it is lazy, with these types of keys and values.
    pub fn formats(&self, type_k: Type, type_v: Type) -> Result<Vec<[Format; 2]>, Error> {
        let params = SessionParams { type_k, type_v, ..self.params.clone() };
        let hparams = self.model.hparams();
        check(&params, hparams)?;
        let format = |layer: &LayerSetup| {
            let active = layer.plan.rows.format(type_k, type_v, params.kv_rotate);
            check_tiles(&layer.plan, &[active], hparams)?;
            if active.has_tiles() && layer.plan.exact_span.is_none_or(|span| span.n_window < TILE) {
                let why = format!("other layers keep as many exact tokens as those in tiles: give --kv-exact {TILE}");
                return Err(Error::Params(why));
            }
            Ok([active, lazy_format(&params, layer.plan.rows)])
        };
        self.layers.iter().map(format).collect()
    }

    /// The rule for the next prompt of a sequence.
    pub fn selector(&self) -> Selector {
        Selector::new(&self.params.lazy.policy, self.threshold, self.model.hparams().n_scorable())
    }

    /// Last tokens of a prompt of `n` tokens whose attention is to be scored when it ends at `n_past`: none while
    /// everything is within sink and window, where every layer's score is 1 and says nothing.
    pub fn n_score(&self, n: usize, n_past: usize, at: At) -> usize {
        if !self.selector().needs_scores() || n_past <= self.params.lazy.n_kept() {
            return 0;
        }
        match at {
            At::Prefill => self.params.lazy.n_queries.min(n),
            At::Decode => 1,
        }
    }

    /// Whether an entry's last tokens are scored, when the policy wants scores of prompts.
    pub fn scores_end(&self, entry: &BatchEntry<'_>) -> bool {
        entry.prompt_end || (self.params.split_prompts && entry.tokens.len() > 1)
    }

    /// Nodes that a graph through so many layers has at most: a layer has some 30, a few more for each sequence in a
    /// batch, some 48 for an adapter; scores and rotations add theirs.
    pub fn max_nodes(n_layers: usize) -> usize {
        1024 + 64 * n_layers * (MAX_PARTS + MAX_ADAPTERS)
    }

    /// A graph for this session's kernels.
    pub fn graph(&self, max_nodes: usize) -> Graph {
        let mut graph = Graph::new(max_nodes);
        graph.use_own_kernels(self.params.flash_attn && self.params.fused_attention);
        graph.use_adapted(Arc::clone(&self.adapted));
        if self.params.op_offload {
            graph.use_offload(self.model.devices());
        }
        graph
    }
}

/// What adapters add to the products of this model.
fn adapted(model: &Model, adapters: &[(LoraAdapter, f32)]) -> Result<Adapted, Error> {
    if adapters.len() > MAX_ADAPTERS {
        return Err(Error::Params(format!("{} adapters at once: at most {MAX_ADAPTERS}", adapters.len())));
    }
    let mut adapted = Adapted::default();
    for (adapter, scale) in adapters {
        if !adapter.fits(model) {
            let path = adapter.path().display();
            return Err(Error::Params(format!(
                "{path}: the adapter was loaded for another model: load it for this one"
            )));
        }
        // As llama.cpp: nothing is added of one that counts nothing.
        if *scale != 0.0 {
            adapter.add_to(&mut adapted, *scale);
        }
    }
    Ok(adapted)
}

/// What rows of keys and values are made of.
pub(super) fn rows(hparams: &Hparams, layer: usize) -> RowShape {
    let [key_size, value_size, _, heads] = hparams.heads(layer);
    RowShape { heads, key_size, value_size, values_in_keys: hparams.values_in_keys }
}

/// How a layer keeps its rows while it is lazy. Where nothing else is asked for and the head sizes allow it, values are in four
/// bits, and keys in eight, or in the active layers' where those are fewer: four ruin some models' keys.
fn lazy_format(params: &SessionParams, rows: RowShape) -> Format {
    let block = Type::Q8_0.block_size();
    let is_narrower = |ty: Type| ty.is_tiles() || ty.row_bytes(block) < Type::Q8_0.row_bytes(block);
    let (k, v) = match rows.fits(Type::Q8_0, Type::Q4_0) {
        true if is_narrower(params.type_k) => (params.type_k, Type::Q4_0),
        true => (Type::Q8_0, Type::Q4_0),
        false => (Type::F16, Type::F16),
    };
    let (k, v) = (params.lazy.type_k.unwrap_or(k), params.lazy.type_v.unwrap_or(v));
    rows.format(k, v, params.kv_rotate)
}

/// How active layers keep their rows once their keys are narrow: in four bits, where they have more and the head size
/// allows it.
fn narrow_format(params: &SessionParams, rows: RowShape) -> Option<Format> {
    let block = Type::Q4_0.block_size();
    let is_narrower = !params.type_k.is_tiles() && params.type_k.row_bytes(block) > Type::Q4_0.row_bytes(block);
    let is_due = params.lazy.narrow_keys && is_narrower && rows.fits(Type::Q4_0, params.type_v);
    is_due.then(|| rows.format(Type::Q4_0, params.type_v, params.kv_rotate))
}

/// What computes a layer's attention on a device.
pub(super) fn kernel(params: &SessionParams, hparams: &Hparams, index: usize, device: Device) -> Kernel {
    let rows = rows(hparams, index);
    let active = rows.format(params.type_k, params.type_v, params.kv_rotate);
    let lazy = lazy_format(params, rows);
    let formats = [Format::F16, active, lazy, narrow_format(params, rows).unwrap_or(lazy)];
    let [.., n_head, _] = hparams.heads(index);
    let can_attend = |format: &Format| {
        let sizes = [rows.key_size, rows.value_size];
        device.can_attend(sizes, [n_head, rows.heads], format.k, format.v)
    };
    match params.flash_attn {
        false => Kernel::Separate,
        // Our kernel reads tensors by pointer.
        true if params.fused_attention && device.buffer_type().is_host() => Kernel::Fused,
        true if device == Device::cpu() => Kernel::Flash,
        // Where a device lacks a pair of types, the scheduler would move whole caches to the processor and back.
        true if formats.iter().all(can_attend) => Kernel::Flash,
        true => Kernel::Separate,
    }
}

/// Refuses tiles where they cannot be made or read.
fn check_tiles(plan: &LayerPlan, formats: &[Format], hparams: &Hparams) -> Result<(), Error> {
    let mut types = formats.iter().filter(|_| plan.attends).flat_map(|format| [format.k, format.v]);
    let Some(ty) = types.find(|ty| ty.is_tiles()) else { return Ok(()) };
    let why = if plan.kernel != Kernel::Fused {
        "it needs this program's own attention on the processor: keep the layers there (-ngl 0) without --ggml-kernels"
    } else if plan.rows.values_in_keys {
        "this model keeps keys and values as one (MLA)"
    } else if hparams.shares.iter().any(Option::is_some) {
        "layers of this model share keys and values"
    } else {
        return Ok(());
    };
    Err(Error::Params(format!("cache type {ty}: {why}; or give another type, such as q4_0")))
}

/// Refuses what does not fit together, or does not fit the model.
fn check(params: &SessionParams, hparams: &Hparams) -> Result<(), Error> {
    let n_layer = hparams.n_layer;
    let wrong = |why: &str| Err(Error::Params(why.to_owned()));
    if params.n_ubatch == 0 {
        return wrong("a ubatch of 0 tokens: give at least 1");
    }
    if params.n_threads == 0 {
        return wrong("0 threads: give at least 1");
    }
    if params.n_ctx > i32::MAX as usize {
        return wrong("the context size does not fit 31 bits");
    }
    if params.lazy.n_slack > i32::MAX as usize {
        return wrong("a slack that does not fit 31 bits");
    }
    if params.lazy.policy != Policy::Off {
        if params.lazy.n_window == 0 {
            return wrong("a lazy window of 0 tokens: it holds the query's own, so give at least 1");
        }
        if params.lazy.n_queries == 0 {
            return wrong("0 lazy queries: the score needs at least 1");
        }
    }
    if let Some((layer, _)) = params.lazy.windows.iter().find(|&(layer, n)| layer >= n_layer || n == 0) {
        let why = format!("the model has layers 0 to {}, and a window at least 1 token", n_layer - 1);
        return Err(Error::Window { layer, why });
    }
    if let Policy::Layers(layers) = &params.lazy.policy {
        for &layer in layers {
            let why = match hparams.windows.get(layer) {
                Some(_) if hparams.owner(layer) != layer => {
                    let owner = hparams.owner(layer);
                    format!("it reads the keys and values of layer {owner} and becomes lazy with it; name that one")
                }
                Some(_) if !hparams.attends[layer] => {
                    "it keeps nothing that grows with the text (recurrent, or a feed-forward alone); leave it out"
                        .to_owned()
                }
                Some(None) => continue,
                Some(Some(window)) => format!("it is sliding-window by design (window {window}); leave it out"),
                None => format!("the model has layers 0 to {}", n_layer - 1),
            };
            return Err(Error::LazyLayer { layer, why });
        }
    }
    // Values that are in the keys have the keys' types.
    let (keys, values) = (&hparams.head_sizes, &hparams.value_sizes);
    let (sizes_k, sizes_v) = match hparams.values_in_keys {
        true => ([&keys[..], values].concat(), Vec::new()),
        false => (keys.clone(), values.clone()),
    };
    let (k, v) = ([Some(params.type_k), params.lazy.type_k], [Some(params.type_v), params.lazy.type_v]);
    for (types, sizes) in [(k, sizes_k), (v, sizes_v)] {
        for ty in types.into_iter().flatten() {
            if !Type::CACHE.contains(&ty) {
                return Err(Error::Params(format!("{ty} is no cache type")));
            }
            if let Some(&head_size) = sizes.iter().find(|size| !size.is_multiple_of(ty.block_size())) {
                return Err(Error::CacheType { ty, block: ty.block_size(), head_size });
            }
        }
    }
    let type_v = if hparams.values_in_keys { params.type_k } else { params.type_v };
    if !params.flash_attn && type_v.is_quantized() {
        return Err(Error::FlashAttention);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_whole_blocks_where_little_is_lost() {
        let slack = |n_sink, n_window, n_slack, block| {
            whole_blocks(Span { n_sink, n_window, n_slack, chunked: false, n_rescued: 0 }, block).n_slack
        };
        assert_eq!((slack(4, 1024, 256, 256), slack(4, 1020, 256, 256), slack(0, 1024, 256, 256)), (252, 256, 256));
        // Too much would be lost, there is nothing to lose, or rows are not in blocks.
        assert_eq!((slack(4, 64, 128, 256), slack(4, 1024, 0, 256), slack(4, 1024, 256, 1)), (128, 0, 256));
        assert_eq!((slack(30, 1024, 256, 256), slack(25, 1024, 256, 256)), (256, 231));
    }
}
