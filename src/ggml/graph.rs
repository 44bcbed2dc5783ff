//! Graphs of operations, built node by node.

use std::{
    cell::{Cell, Ref, RefCell},
    collections::HashMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    ptr::NonNull,
    sync::Arc,
};

use ggml_sys as sys;

use super::{
    Adapted, Context, Device, LowRank, Tensor, Type,
    attention::{FusedAttention, KvSegment, Op, Partials},
    context::check_view,
    mul_mat::{Kernel, Scheme},
    processor::Features,
    tiles::{PackOp, Packing, UnpackOp},
};

/// A graph being built: a function for each operation adds a node and returns its result's tensor.
///
/// Nothing is computed until [`super::Scheduler::compute`]. Shapes follow ggml: the first dimension is a row's length.
pub struct Graph {
    context: Context,
    raw: NonNull<sys::ggml_cgraph>,
    max_nodes: usize,
    /// Intermediate results of fused attention.
    partials: Arc<Partials>,
    own_kernels: bool,
    /// Devices that may compute products of weights that the processor has.
    offload: Vec<Device>,
    adapted: Arc<Adapted>,
    /// Inputs of several products, as our kernels take them.
    quantized: RefCell<HashMap<(*mut sys::ggml_tensor, Scheme), Tensor>>,
    /// Nodes that must be computed on a certain device.
    placed: RefCell<Vec<(Tensor, Device)>>,
    /// Where the layer that is being added is computed.
    device: Cell<Option<Device>>,
}

// SAFETY: the graph is plain memory inside its context; see `context::Inner`.
unsafe impl Send for Graph {}

/// Which pairs of elements RoPE rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeKind {
    /// Neighbours: (0, 1), (2, 3), …
    Norm,
    /// Halves: (0, n/2), (1, n/2 + 1), …
    Neox,
    /// Halves by several positions a token (M-RoPE): as many pairs as each section says by its position.
    Multi([usize; RopeKind::N_POSITIONS]),
    /// As [`RopeKind::Multi`], the pairs of the first three sections in turn (interleaved M-RoPE).
    Interleaved([usize; RopeKind::N_POSITIONS]),
}

impl RopeKind {
    /// Positions of a token where it has several: time, height, width, and one more.
    pub const N_POSITIONS: usize = 4;

    /// Positions that a token has.
    pub fn positions_per_token(self) -> usize {
        match self {
            RopeKind::Norm | RopeKind::Neox => 1,
            RopeKind::Multi(_) | RopeKind::Interleaved(_) => RopeKind::N_POSITIONS,
        }
    }
}

/// RoPE's parameters, as `ggml_rope_ext` takes them.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub kind: RopeKind,
    /// Elements of a head that are rotated.
    pub n_rot: usize,
    /// Context the model was trained with before YaRN extended it.
    pub n_ctx_orig: usize,
    pub freq_base: f32,
    /// Positions are multiplied by this (1 / scaling factor).
    pub freq_scale: f32,
    /// YaRN's mix of extrapolation, 0 for none.
    pub ext_factor: f32,
    pub attn_factor: f32,
    pub beta_fast: f32,
    pub beta_slow: f32,
}

/// Adds one node to the graph: notes the tensors it reads, calls ggml, wraps the result.
macro_rules! node {
    ($graph:ident, [$($source:expr),*], $function:ident($($argument:expr),*)) => {{
        $($graph.context.uses($source);)*
        // SAFETY: the graph's context and the sources' are alive, and stay so with the graph (`uses`). ggml checks the
        // shapes itself and aborts on a mismatch.
        let raw = unsafe { sys::$function($graph.context.raw(), $($argument),*) };
        $graph.context.wrap(raw)
    }};
}

impl Graph {
    /// An empty graph with room for `max_nodes` operations (views and reshapes count).
    pub fn new(max_nodes: usize) -> Graph {
        // SAFETY: computations without side effects.
        let bytes =
            unsafe { sys::ggml_graph_overhead_custom(max_nodes, false) + 2 * max_nodes * sys::ggml_tensor_overhead() };
        let context = Context::with_bytes(bytes);
        // SAFETY: the arena was made large enough for it.
        let raw = unsafe { sys::ggml_new_graph_custom(context.raw(), max_nodes, false) };
        let raw = NonNull::new(raw).expect("ggml aborts rather than return null for a graph");
        Graph {
            context,
            raw,
            max_nodes,
            partials: Arc::default(),
            own_kernels: false,
            offload: Vec::new(),
            adapted: Arc::default(),
            quantized: RefCell::default(),
            placed: RefCell::default(),
            device: Cell::default(),
        }
    }

    pub(super) fn raw(&self) -> *mut sys::ggml_cgraph {
        self.raw.as_ptr()
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn max_nodes(&self) -> usize {
        self.max_nodes
    }

    /// Whether [`Graph::mul_mat`] may take this crate's kernels where they are faster than ggml's. They round elsewhere.
    /// Off at first.
    pub fn use_own_kernels(&mut self, on: bool) {
        self.own_kernels = on;
    }

    /// Lets the first of these devices that wants to compute products of weights which the processor has, in the file's layout:
    /// for many tokens, for which it is worth while to send it the weights. None at first.
    pub fn use_offload(&mut self, devices: Vec<Device>) {
        self.offload = devices;
    }

    /// Has products of these weights come with what is added to them. Nothing at first.
    pub fn use_adapted(&mut self, adapted: Arc<Adapted>) {
        self.adapted = adapted;
    }

    /// Has a node computed on this device, wherever the scheduler would have put it.
    pub fn place(&self, node: &Tensor, device: Device) {
        self.placed.borrow_mut().push((node.clone(), device));
    }

    /// Where the nodes to come are best computed: a layer's device, `None` to leave it to the scheduler. It would leave a
    /// layer's first norm with the layer before, so that two tensors go from device to device in place of one.
    pub fn set_device(&self, device: Option<Device>) {
        self.device.set(device);
    }

    /// What is built meanwhile is left to the scheduler, whatever [`Graph::set_device`] says: it has the processor's weights.
    pub fn off_device<T>(&self, build: impl FnOnce() -> T) -> T {
        let device = self.device.take();
        let built = build();
        self.device.set(device);
        built
    }

    fn at_layer(&self, node: Tensor) -> Tensor {
        if let Some(device) = self.device.get() {
            self.place(&node, device);
        }
        node
    }

    pub(super) fn placed(&self) -> Ref<'_, Vec<(Tensor, Device)>> {
        self.placed.borrow()
    }

    /// Nodes in the graph now.
    pub fn n_nodes(&self) -> usize {
        // SAFETY: a query on a live graph.
        usize::try_from(unsafe { sys::ggml_graph_n_nodes(self.raw()) }).unwrap_or(0)
    }

    /// Nodes that compute something: no views of others, and none without elements.
    pub fn n_operations(&self) -> usize {
        const VIEWS: [sys::ggml_op; 5] =
            [sys::GGML_OP_NONE, sys::GGML_OP_RESHAPE, sys::GGML_OP_VIEW, sys::GGML_OP_PERMUTE, sys::GGML_OP_TRANSPOSE];
        // SAFETY: the graph keeps its nodes alive.
        self.nodes().filter(|&node| unsafe { !VIEWS.contains(&(*node).op) && !(*node).ne.contains(&0) }).count()
    }

    /// The nodes in their order.
    pub(super) fn nodes(&self) -> impl Iterator<Item = *const sys::ggml_tensor> {
        // SAFETY: the graph is alive and the index below its number of nodes.
        (0..self.n_nodes()).map(|index| unsafe { sys::ggml_graph_node(self.raw(), index as i32) }.cast_const())
    }

    /// A number for what the nodes read that is no node: which of them reads which, and of each whether it has memory and how much it
    /// takes.
    pub(super) fn leaves(&self) -> u64 {
        let (mut order, mut hasher) = (HashMap::new(), DefaultHasher::new());
        for node in self.nodes() {
            // SAFETY: the graph keeps its nodes and what they read alive.
            for leaf in unsafe { (*node).src }.into_iter().filter(|&src| !src.is_null()) {
                // SAFETY: as above.
                let (op, has_memory, bytes) = unsafe { ((*leaf).op, !(*leaf).data.is_null(), sys::ggml_nbytes(leaf)) };
                if op == sys::GGML_OP_NONE {
                    let next = order.len();
                    (*order.entry(leaf).or_insert(next), has_memory, bytes).hash(&mut hasher);
                }
            }
            0xffu8.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// A tensor that the caller fills before each run.
    pub fn input(&self, ty: Type, shape: &[usize]) -> Tensor {
        let tensor = self.context.tensor(ty, shape);
        // SAFETY: sets a flag in the header.
        unsafe { sys::ggml_set_input(tensor.raw()) };
        tensor
    }

    /// Names the nodes that were added since there were `first` of them, for [`super::Scheduler::compute_timed`].
    pub fn name_nodes_from(&self, first: usize, name: &std::ffi::CStr) {
        for index in first..self.n_nodes() {
            // SAFETY: the graph is alive and the index below its number of nodes; ggml copies the name, cut to its
            // limit.
            unsafe { sys::ggml_set_name(sys::ggml_graph_node(self.raw(), index as i32), name.as_ptr()) };
        }
    }

    /// Makes the graph compute `tensor` and all it depends on, after what was added before.
    pub fn expand(&self, tensor: &Tensor) {
        self.context.uses(tensor);
        // SAFETY: graph and tensor are alive; `max_nodes` bounds the graph and ggml aborts beyond it.
        unsafe { sys::ggml_build_forward_expand(self.raw(), tensor.raw()) }
    }

    // Arithmetic, with ggml's broadcasting of the second operand.

    pub fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        node!(self, [a, b], ggml_add(a.raw(), b.raw()))
    }

    pub fn sub(&self, a: &Tensor, b: &Tensor) -> Tensor {
        node!(self, [a, b], ggml_sub(a.raw(), b.raw()))
    }

    pub fn mul(&self, a: &Tensor, b: &Tensor) -> Tensor {
        node!(self, [a, b], ggml_mul(a.raw(), b.raw()))
    }

    pub fn scale(&self, a: &Tensor, factor: f32) -> Tensor {
        node!(self, [a], ggml_scale(a.raw(), factor))
    }

    pub fn div(&self, a: &Tensor, b: &Tensor) -> Tensor {
        node!(self, [a, b], ggml_div(a.raw(), b.raw()))
    }

    /// `factor × a + bias`.
    pub fn scale_bias(&self, a: &Tensor, factor: f32, bias: f32) -> Tensor {
        node!(self, [a], ggml_scale_bias(a.raw(), factor, bias))
    }

    /// No element below `min`. `a` itself is changed.
    pub fn at_least(&self, a: &Tensor, min: f32) -> Tensor {
        node!(self, [a], ggml_clamp(a.raw(), min, f32::INFINITY))
    }

    /// No element above `max`. `a` itself is changed.
    pub fn at_most(&self, a: &Tensor, max: f32) -> Tensor {
        node!(self, [a], ggml_clamp(a.raw(), f32::NEG_INFINITY, max))
    }

    /// No element outside of ± `limit`. `a` itself is changed.
    pub fn within(&self, a: &Tensor, limit: f32) -> Tensor {
        node!(self, [a], ggml_clamp(a.raw(), -limit, limit))
    }

    pub fn square(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_sqr(a.raw()))
    }

    pub fn sqrt(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_sqrt(a.raw()))
    }

    /// Each row's mean.
    pub fn mean_rows(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_mean(a.raw()))
    }

    pub fn relu(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_relu(a.raw()))
    }

    pub fn silu(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_silu(a.raw()))
    }

    pub fn gelu(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_gelu(a.raw()))
    }

    /// For `x` above 0 `a_p·x² + beta·x`, else `(eᵐ - 1)·a_n - x·a_n + beta·x`, where `m` is `x`, at most `eps`, `a_p` is
    /// `softplus(alpha_p)`, and `a_n` is `beta + softplus(alpha_n)`.
    pub fn xielu(&self, a: &Tensor, alpha_n: f32, alpha_p: f32, beta: f32, eps: f32) -> Tensor {
        node!(self, [a], ggml_xielu(a.raw(), alpha_n, alpha_p, beta, eps))
    }

    pub fn tanh(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_tanh(a.raw()))
    }

    pub fn sigmoid(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_sigmoid(a.raw()))
    }

    pub fn floor(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_floor(a.raw()))
    }

    /// 1 where an element is above 0, else 0.
    pub fn step(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_step(a.raw()))
    }

    /// The numbers from 0 to `n - 1`, f32 `[n]`.
    pub fn arange(&self, n: usize) -> Tensor {
        node!(self, [], ggml_arange(0.0, n as f32, 1.0))
    }

    /// `n` times the row `a` `[width]` → `[width, n]`.
    pub fn repeat_row(&self, a: &Tensor, n: usize) -> Tensor {
        node!(self, [a], ggml_repeat_4d(a.raw(), a.shape()[0] as i64, n as i64, 1, 1))
    }

    /// `a` as often as it takes to fill the shape, whose dimensions are multiples of its own.
    pub fn repeat(&self, a: &Tensor, shape: [usize; 3]) -> Tensor {
        let [n0, n1, n2] = shape.map(|n| n as i64);
        node!(self, [a], ggml_repeat_4d(a.raw(), n0, n1, n2, 1))
    }

    /// A tensor like `a` with this number in each element.
    pub fn filled_like(&self, a: &Tensor, value: f32) -> Tensor {
        node!(self, [a], ggml_fill(a.raw(), value))
    }

    /// The natural logarithm.
    pub fn log(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_log(a.raw()))
    }

    /// Sums each row: `[n, rows, …]` → `[1, rows, …]`.
    pub fn sum_rows(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_sum_rows(a.raw()))
    }

    pub fn rms_norm(&self, a: &Tensor, eps: f32) -> Tensor {
        self.at_layer(node!(self, [a], ggml_rms_norm(a.raw(), eps)))
    }

    /// Each row less its mean, over its deviation.
    pub fn norm(&self, a: &Tensor, eps: f32) -> Tensor {
        self.at_layer(node!(self, [a], ggml_norm(a.raw(), eps)))
    }

    /// As [`Graph::swiglu`] for rows that hold the gate in their first half and `up` in the second: `[2n, …]` → `[n, …]`.
    pub fn swiglu_halves(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_swiglu(a.raw()))
    }

    /// `gelu(gate) × up`.
    pub fn geglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        node!(self, [gate, up], ggml_geglu_split(gate.raw(), up.raw()))
    }

    /// `relu(gate) × up`.
    pub fn reglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        node!(self, [gate, up], ggml_reglu_split(gate.raw(), up.raw()))
    }

    /// gpt-oss's activation: `g·sigmoid(alpha·g) × (1 + u)`, the gate `g` at most `limit`, `u` within ± `limit`.
    pub fn swiglu_clamped(&self, gate: &Tensor, up: &Tensor, alpha: f32, limit: f32) -> Tensor {
        node!(self, [gate, up], ggml_swiglu_oai(gate.raw(), up.raw(), alpha, limit))
    }

    /// `silu(gate) × up`, the gated activation of LLaMA's feed-forward.
    pub fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        node!(self, [gate, up], ggml_swiglu_split(gate.raw(), up.raw()))
    }

    /// `ln(1 + e^a)`.
    pub fn softplus(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_softplus(a.raw()))
    }

    /// `weight [k, n] × input [k, m]` → `[n, m]`.
    pub fn mul_mat(&self, weight: &Tensor, input: &Tensor) -> Tensor {
        self.adapted_product(weight, input, self.plain_mul_mat(weight, input))
    }

    /// What a weight gives, with what is added to it: `added` makes it of the two matrices.
    fn with_low_rank(&self, weight: &Tensor, given: Tensor, added: impl Fn(&LowRank) -> Tensor) -> Tensor {
        self.adapted
            .of(weight)
            .iter()
            .fold(given, |sum, low_rank| self.add(&sum, &self.scale(&added(low_rank), low_rank.scale)))
    }

    /// As [`Graph::with_low_rank`], of a product with `input`.
    fn adapted_product(&self, weight: &Tensor, input: &Tensor, product: Tensor) -> Tensor {
        self.with_low_rank(weight, product, |LowRank { a, b, .. }| self.plain_mul_mat(b, &self.plain_mul_mat(a, input)))
    }

    /// ggml's product with a weight of the processor's, where a device takes it over.
    fn offloaded(&self, weight: &Tensor, product: impl FnOnce() -> Tensor) -> Option<Tensor> {
        if self.offload.is_empty() || !weight.is_host() {
            return None;
        }
        let product = product();
        let device = self.offload.iter().copied().find(|device| device.takes_over(&product))?;
        self.place(&product, device);
        Some(product)
    }

    fn plain_mul_mat(&self, weight: &Tensor, input: &Tensor) -> Tensor {
        if let Some(product) = self.offloaded(weight, || self.ggml_mul_mat(weight, input)) {
            return product;
        }
        match self.own_kernels.then(|| Kernel::of_matrix(weight, input, Features::detect())).flatten() {
            Some(kernel) => self.mul_mat_with(weight, input, kernel),
            None => self.ggml_mul_mat(weight, input),
        }
    }

    /// As [`Graph::mul_mat`], with this kernel, which must be one for these tensors.
    pub(super) fn mul_mat_with(&self, weight: &Tensor, input: &Tensor, kernel: &'static Kernel) -> Tensor {
        let quantized = self.quantized(input, kernel);
        self.context.uses(weight);
        self.context.uses(input);
        // SAFETY: it is for them, and features are only ever detected; the context is alive and keeps the tensors.
        let raw = unsafe { kernel.add_product(self.context.raw(), weight, input, quantized.as_ref()) };
        self.at_processor(self.context.wrap(raw))
    }

    /// The input as this kernel takes it, where it is quantised once for several products.
    fn quantized(&self, input: &Tensor, kernel: &'static Kernel) -> Option<Tensor> {
        let [_, n1, n2, _] = input.shape();
        kernel.shares_input(n1 * n2).then(|| {
            let mut all = self.quantized.borrow_mut();
            let quantized = all.entry((input.raw(), kernel.scheme)).or_insert_with(|| {
                self.context.uses(input);
                // SAFETY: as in `mul_mat_with`.
                self.at_processor(self.context.wrap(unsafe { kernel.add_input(self.context.raw(), input) }))
            });
            quantized.clone()
        })
    }

    /// A node of our own. Remote devices claim to know every operation.
    fn at_processor(&self, node: Tensor) -> Tensor {
        self.place(&node, Device::cpu());
        node
    }

    fn ggml_mul_mat(&self, weight: &Tensor, input: &Tensor) -> Tensor {
        node!(self, [weight, input], ggml_mul_mat(weight.raw(), input.raw()))
    }

    /// As [`Graph::mul_mat`], with sums in f32 where the device would use less.
    pub fn mul_mat_f32(&self, weight: &Tensor, input: &Tensor) -> Tensor {
        let product = self.ggml_mul_mat(weight, input);
        // SAFETY: sets a parameter of the node just made.
        unsafe { sys::ggml_prec_set_acc(product.raw(), sys::GGML_PREC_F32) };
        self.adapted_product(weight, input, product)
    }

    /// As [`Graph::mul_mat`] with a Walsh-Hadamard matrix, which a device may turn into a fast transform.
    pub fn mul_mat_hadamard(&self, matrix: &Tensor, input: &Tensor) -> Tensor {
        let product = self.ggml_mul_mat(matrix, input);
        // SAFETY: sets a parameter of the node just made.
        unsafe { sys::ggml_mul_mat_set_hint(product.raw(), sys::GGML_HINT_SRC0_IS_HADAMARD) };
        product
    }

    // Experts.

    /// `experts [k, n, n_expert]`, of which `ids` (i32) `[n_used, tokens]` names some for each token; `input`
    /// `[k, 1 or n_used, tokens]` → `[n, n_used, tokens]`.
    pub fn mul_mat_id(&self, experts: &Tensor, input: &Tensor, ids: &Tensor) -> Tensor {
        let product = self.plain_mul_mat_id(experts, input, ids);
        self.with_low_rank(experts, product, |LowRank { a, b, .. }| {
            self.plain_mul_mat_id(b, &self.plain_mul_mat_id(a, input, ids), ids)
        })
    }

    fn plain_mul_mat_id(&self, experts: &Tensor, input: &Tensor, ids: &Tensor) -> Tensor {
        let ggmls = || node!(self, [experts, input, ids], ggml_mul_mat_id(experts.raw(), input.raw(), ids.raw()));
        if let Some(product) = self.offloaded(experts, ggmls) {
            return product;
        }
        match self.own_kernels.then(|| Kernel::of_experts(experts, input, ids, Features::detect())).flatten() {
            Some(kernel) => self.mul_mat_id_with(experts, input, ids, kernel),
            None => ggmls(),
        }
    }

    /// As [`Graph::mul_mat_id`], with this kernel, which must be one for these tensors.
    pub(super) fn mul_mat_id_with(
        &self,
        experts: &Tensor,
        input: &Tensor,
        ids: &Tensor,
        kernel: &'static Kernel,
    ) -> Tensor {
        let quantized = self.quantized(input, kernel);
        [experts, input, ids].into_iter().for_each(|tensor| self.context.uses(tensor));
        // SAFETY: as in `mul_mat_with`.
        let raw = unsafe { kernel.add_experts(self.context.raw(), experts, input, ids, quantized.as_ref()) };
        self.at_processor(self.context.wrap(raw))
    }

    /// Adds to `a` `[n, n_used, tokens]` the rows of `biases` `[n, n_expert]` that `ids` (i32) `[n_used, tokens]` names.
    pub fn add_id(&self, a: &Tensor, biases: &Tensor, ids: &Tensor) -> Tensor {
        node!(self, [a, biases, ids], ggml_add_id(a.raw(), biases.raw(), ids.raw()))
    }

    /// The indices (i32) of each row's `n` largest elements, largest first.
    pub fn top_n(&self, a: &Tensor, n: usize) -> Tensor {
        node!(self, [a], ggml_argsort_top_k(a.raw(), n as i32))
    }

    /// Softmax over each row.
    pub fn soft_max_rows(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_soft_max(a.raw()))
    }

    // Attention.

    /// Rotates `a` `[head size, heads, tokens]` by the positions (i32) `[tokens]`, or, where a token has several
    /// ([`RopeKind::positions_per_token`]), `[tokens × 4]`: all first ones, then all second ones. `factors` are frequency
    /// factors.
    pub fn rope(&self, a: &Tensor, positions: &Tensor, factors: Option<&Tensor>, rope: &Rope) -> Tensor {
        let mode = match rope.kind {
            RopeKind::Norm => sys::GGML_ROPE_TYPE_NORMAL as i32,
            RopeKind::Neox => sys::GGML_ROPE_TYPE_NEOX as i32,
            RopeKind::Multi(sections) | RopeKind::Interleaved(sections) => {
                return self.rope_multi(a, positions, factors, rope, sections);
            }
        };
        if let Some(factors) = factors {
            self.context.uses(factors);
        }
        node!(
            self,
            [a, positions],
            ggml_rope_ext(
                a.raw(),
                positions.raw(),
                factors.map_or(std::ptr::null_mut(), Tensor::raw),
                rope.n_rot as i32,
                mode,
                rope.n_ctx_orig as i32,
                rope.freq_base,
                rope.freq_scale,
                rope.ext_factor,
                rope.attn_factor,
                rope.beta_fast,
                rope.beta_slow
            )
        )
    }

    fn rope_multi(
        &self,
        a: &Tensor,
        positions: &Tensor,
        factors: Option<&Tensor>,
        rope: &Rope,
        sections: [usize; RopeKind::N_POSITIONS],
    ) -> Tensor {
        let mode = match rope.kind {
            RopeKind::Interleaved(_) => sys::GGML_ROPE_TYPE_IMROPE as i32,
            _ => sys::GGML_ROPE_TYPE_MROPE as i32,
        };
        let mut sections = sections.map(|n| n as i32);
        if let Some(factors) = factors {
            self.context.uses(factors);
        }
        node!(
            self,
            [a, positions],
            ggml_rope_multi(
                a.raw(),
                positions.raw(),
                factors.map_or(std::ptr::null_mut(), Tensor::raw),
                rope.n_rot as i32,
                sections.as_mut_ptr(),
                mode,
                rope.n_ctx_orig as i32,
                rope.freq_base,
                rope.freq_scale,
                rope.ext_factor,
                rope.attn_factor,
                rope.beta_fast,
                rope.beta_slow
            )
        )
    }

    /// Attention in one operation.
    ///
    /// `q` `[head size, tokens, heads]`, `k` and `v` `[head size, rows, KV heads]`, `mask` f16 `[rows, tokens]` (0 or
    /// minus infinity) → `[head size, heads, tokens]`, f32. A `softcap` other than 0 bends the scaled products `x` to
    /// `softcap·tanh(x/softcap)`; `sinks` as in [`Graph::soft_max`].
    #[expect(clippy::too_many_arguments, reason = "the operation's own")]
    pub fn flash_attn(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: &Tensor,
        scale: f32,
        softcap: f32,
        sinks: Option<&Tensor>,
    ) -> Tensor {
        let result = node!(
            self,
            [q, k, v, mask],
            ggml_flash_attn_ext(q.raw(), k.raw(), v.raw(), mask.raw(), scale, 0.0, softcap)
        );
        // SAFETY: sets a parameter of the node just made.
        unsafe { sys::ggml_prec_set_acc(result.raw(), sys::GGML_PREC_F32) };
        if let Some(sinks) = sinks {
            self.context.uses(sinks);
            // SAFETY: sets an operand of the node just made, which `uses` keeps alive; ggml checks its shape.
            unsafe { sys::ggml_flash_attn_ext_add_sinks(result.raw(), sinks.raw()) };
        }
        result
    }

    /// Attention in one operation of our own, for tensors that the processor can read: over one to three segments, each of
    /// any two cache types and in one or more pieces.
    ///
    /// `q` `[head size, n, heads]` f32, rows any distance apart → `[value size, heads, n]`, f32.
    ///
    /// # Panics
    /// When shapes or types do not fit each other.
    pub fn fused_attention(&self, q: &Tensor, segments: &[KvSegment<'_>], params: &FusedAttention<'_>) -> Tensor {
        self.fused_attention_with(q, segments, params, Features::detect())
    }

    /// As [`Graph::fused_attention`], with the kernels for these processor features.
    pub(super) fn fused_attention_with(
        &self,
        q: &Tensor,
        segments: &[KvSegment<'_>],
        params: &FusedAttention<'_>,
        features: Features,
    ) -> Tensor {
        self.context.uses(q);
        for segment in segments {
            segment.k.iter().chain(segment.v).chain(segment.mask).for_each(|tensor| self.context.uses(tensor));
        }
        if let Some(sinks) = params.sinks {
            self.context.uses(sinks);
        }
        for head in params.of_heads {
            head.k.iter().chain(&head.v).for_each(|tensor| self.context.uses(tensor));
        }
        // SAFETY: the context is alive, it keeps the tensors, and it keeps the operation's state below.
        let (raw, op) = unsafe { Op::add(self.context.raw(), q, segments, params, &self.partials, features) };
        self.context.keep(op);
        self.at_processor(self.context.wrap(raw))
    }

    /// Makes tiles of rows, as a list says that is an input of the graph. What reads the tiles comes after it.
    pub(crate) fn pack_tiles(&self, packing: &Packing<'_>) -> Tensor {
        let Packing { own, exact, tiles, due, .. } = *packing;
        exact.iter().chain(tiles).chain([own, due]).for_each(|tensor| self.context.uses(tensor));
        // SAFETY: the context is alive, it keeps the tensors, and it keeps the operation's state below.
        let (raw, op) = unsafe { PackOp::add(self.context.raw(), packing) };
        self.context.keep(op);
        self.at_processor(self.context.wrap(raw))
    }

    /// Rows `first..first + n` of a store of tiles, as f32 `[size × heads, n]`.
    ///
    /// # Panics
    /// When it has no such rows.
    pub(crate) fn unpack_tiles(&self, tiles: &Tensor, heads: usize, first: usize, n: usize) -> Tensor {
        self.context.uses(tiles);
        // SAFETY: as above.
        let (raw, op) = unsafe { UnpackOp::add(self.context.raw(), tiles, heads, first, n) };
        self.context.keep(op);
        self.at_processor(self.context.wrap(raw))
    }

    /// Softmax of `scale × a + mask` over each row of `a` `[rows, tokens, heads]`. `sinks` `[heads]` (f32) are logits
    /// that count in a row's sum and in nothing else.
    pub fn soft_max(&self, a: &Tensor, mask: &Tensor, scale: f32, sinks: Option<&Tensor>) -> Tensor {
        let result = node!(self, [a, mask], ggml_soft_max_ext(a.raw(), mask.raw(), scale, 0.0));
        if let Some(sinks) = sinks {
            self.context.uses(sinks);
            // SAFETY: sets an operand of the node just made, which `uses` keeps alive; ggml checks its shape.
            unsafe { sys::ggml_soft_max_add_sinks(result.raw(), sinks.raw()) };
        }
        result
    }

    // Recurrent layers, for the tokens of one sequence.

    /// A convolution of each channel with its own kernel: `columns` `[width - 1 + n, channels]`, `kernel`
    /// `[width, channels]` → `[channels, n]`.
    pub fn ssm_conv(&self, columns: &Tensor, kernel: &Tensor) -> Tensor {
        node!(self, [columns, kernel], ggml_ssm_conv(columns.raw(), kernel.raw()))
    }

    /// A gated delta net's tokens, one after the other: `q` and `k` `[size, key heads, n]`, `v` `[size, heads, n]`, the
    /// logarithm of the decay `gate` and `beta` `[1, heads, n]`, `state` `[size, size, heads]`. Head `i` has the keys of
    /// head `i` modulo their number. → `[size × heads, n + size]`: the outputs, then the state in as many elements.
    pub fn gated_delta_net(&self, [q, k, v]: [&Tensor; 3], gate: &Tensor, beta: &Tensor, state: &Tensor) -> Tensor {
        node!(
            self,
            [q, k, v, gate, beta, state],
            ggml_gated_delta_net(q.raw(), k.raw(), v.raw(), gate.raw(), beta.raw(), state.raw(), 1)
        )
    }

    /// A selective state-space scan (Mamba-2): `states` `[state size, head size, heads, rows]`, of which `row` (i32 `[1]`)
    /// is meant, `x` `[head size, heads, n]`, `dt` `[heads, n]`, the decay `a` `[1, heads]`, `b` and `c`
    /// `[state size, groups, n]` → the outputs, then the state, in one row.
    pub fn ssm_scan(
        &self,
        states: &Tensor,
        row: &Tensor,
        [x, dt]: [&Tensor; 2],
        a: &Tensor,
        [b, c]: [&Tensor; 2],
    ) -> Tensor {
        node!(
            self,
            [states, row, x, dt, a, b, c],
            ggml_ssm_scan(states.raw(), x.raw(), dt.raw(), a.raw(), b.raw(), c.raw(), row.raw(), 1)
        )
    }

    // Rows and copies.

    /// The rows of `a` that `ids` (i32) names, as f32.
    pub fn get_rows(&self, a: &Tensor, ids: &Tensor) -> Tensor {
        node!(self, [a, ids], ggml_get_rows(a.raw(), ids.raw()))
    }

    /// As [`Graph::get_rows`] of a table of weights, with what is added to its rows.
    pub fn embed(&self, table: &Tensor, ids: &Tensor) -> Tensor {
        self.with_low_rank(table, self.get_rows(table, ids), |LowRank { a, b, .. }| {
            self.plain_mul_mat(b, &self.get_rows(a, ids))
        })
    }

    /// Writes `rows` into `target` at the row numbers `ids` (i64), in the target's type. The result is the target.
    pub fn set_rows(&self, target: &Tensor, rows: &Tensor, ids: &Tensor) -> Tensor {
        node!(self, [target, rows, ids], ggml_set_rows(target.raw(), rows.raw(), ids.raw()))
    }

    /// Copies `from` into `to`, which has as many elements, in the type of `to`.
    pub fn copy(&self, from: &Tensor, to: &Tensor) -> Tensor {
        node!(self, [from, to], ggml_cpy(from.raw(), to.raw()))
    }

    /// A copy in another type.
    pub fn cast(&self, a: &Tensor, ty: Type) -> Tensor {
        node!(self, [a], ggml_cast(a.raw(), ty.raw()))
    }

    /// A contiguous copy.
    pub fn contiguous(&self, a: &Tensor) -> Tensor {
        node!(self, [a], ggml_cont(a.raw()))
    }

    /// `a` itself where its elements lie one after the other, else a copy of which that is true.
    pub fn contiguous_if_needed(&self, a: &Tensor) -> Tensor {
        // SAFETY: a query on a live header.
        if unsafe { sys::ggml_is_contiguous(a.raw()) } { a.clone() } else { self.contiguous(a) }
    }

    /// `a` followed by `b` along a dimension.
    pub fn concat(&self, a: &Tensor, b: &Tensor, dim: usize) -> Tensor {
        node!(self, [a, b], ggml_concat(a.raw(), b.raw(), dim as i32))
    }

    // Views: no data moves.

    pub fn reshape(&self, a: &Tensor, shape: &[usize]) -> Tensor {
        let ne = [0, 1, 2, 3].map(|i| shape.get(i).map_or(1, |&n| n as i64));
        match shape.len() {
            1 => node!(self, [a], ggml_reshape_1d(a.raw(), ne[0])),
            2 => node!(self, [a], ggml_reshape_2d(a.raw(), ne[0], ne[1])),
            3 => node!(self, [a], ggml_reshape_3d(a.raw(), ne[0], ne[1], ne[2])),
            _ => node!(self, [a], ggml_reshape_4d(a.raw(), ne[0], ne[1], ne[2], ne[3])),
        }
    }

    /// A view with `strides` in bytes for the second and third dimension, from the byte `offset` on.
    ///
    /// # Panics
    /// When some of it would lie outside of `a`.
    pub fn view(&self, a: &Tensor, shape: [usize; 3], strides: [usize; 2], offset: usize) -> Tensor {
        let ([n0, n1, n2], [nb1, nb2]) = (shape, strides);
        check_view(a, [n0, n1, n2, 1], [nb1, nb2, 0], offset);
        let ne = shape.map(|n| n as i64);
        node!(self, [a], ggml_view_3d(a.raw(), ne[0], ne[1], ne[2], nb1, nb2, offset)).with_type(a.ty())
    }

    /// As [`Graph::view`], with a stride for the fourth dimension as well.
    ///
    /// # Panics
    /// Likewise.
    pub fn view_4d(&self, a: &Tensor, shape: [usize; 4], strides: [usize; 3], offset: usize) -> Tensor {
        check_view(a, shape, strides, offset);
        let (ne, nb) = (shape.map(|n| n as i64), strides);
        node!(self, [a], ggml_view_4d(a.raw(), ne[0], ne[1], ne[2], ne[3], nb[0], nb[1], nb[2], offset))
            .with_type(a.ty())
    }

    /// Rows `first..first + n` of a two-dimensional tensor.
    ///
    /// # Panics
    /// When it has no such rows.
    pub fn rows(&self, a: &Tensor, first: usize, n: usize) -> Tensor {
        let (width, stride) = (a.shape()[0], a.strides()[1]);
        let offset = first.saturating_mul(stride);
        check_view(a, [width, n, 1, 1], [stride, 0, 0], offset);
        node!(self, [a], ggml_view_2d(a.raw(), width as i64, n as i64, stride, offset)).with_type(a.ty())
    }

    /// Dimension `i` of `a` becomes dimension `order[i]`.
    pub fn permute(&self, a: &Tensor, order: [usize; 4]) -> Tensor {
        let o = order.map(|i| i as i32);
        node!(self, [a], ggml_permute(a.raw(), o[0], o[1], o[2], o[3]))
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("nodes", &self.n_nodes()).field("max_nodes", &self.max_nodes).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn views_stay_within_their_tensors() {
        let graph = Graph::new(32);
        let a = graph.input(Type::F32, &[4, 3]);
        let q = graph.input(Type::Q8_0, &[64, 2]);
        for (source, shape, strides, offset) in [
            (&a, [4, 3, 1], [16, 48], 0),
            (&a, [1, 3, 1], [16, 48], 12),
            (&a, [2, 2, 3], [8, 16], 0),
            (&a, [4, 0, 1], [16, 48], 48),
            (&q, [32, 2, 1], [68, 136], 34),
        ] {
            let view = graph.view(source, shape, strides, offset);
            assert_eq!(view.shape()[..3], shape);
        }
        // All of these have no more bytes than the tensor: ggml makes them.
        for (source, shape, strides, offset) in [
            (&a, [4, 2, 1], [48, 48], 0),
            (&a, [1, 3, 1], [16, 48], 20),
            (&a, [1, 1, 3], [4, 24], 0),
            (&a, [2, 2, 2], [usize::MAX / 2, 0], 0),
            (&a, [1, 2, 2], [usize::MAX, 2], 0),
            (&q, [32, 2, 1], [68, 136], 68),
        ] {
            let view = catch_unwind(AssertUnwindSafe(|| graph.view(source, shape, strides, offset)));
            let panic = view.expect_err("outside of the tensor");
            assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("leaves")), "{shape:?}");
        }
        assert_eq!(graph.rows(&a, 1, 2).shape(), [4, 2, 1, 1]);
        for (first, n) in [(2, 2), (usize::MAX, 0), (usize::MAX / 16 + 2, 1)] {
            assert!(catch_unwind(AssertUnwindSafe(|| graph.rows(&a, first, n))).is_err(), "{first}, {n}");
        }
    }
}
