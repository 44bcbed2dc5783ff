//! A layer's attention but for the cache, which the engine brings: projections, norms and RoPE.

use super::{Builder, Error, Linear, Norm};
use crate::{
    ggml::{Graph, Rope, Tensor, Type},
    model::{Attention, AttentionOptions, LayerStep},
};

/// A layer's attention: projections, norms, RoPE, and the product over the cache. [`SelfAttention::load`] gives the
/// plain one; an architecture sets the members that its own has besides.
pub(in crate::model) struct SelfAttention {
    pub projections: Projections,
    /// Whether each head's queries are followed by as much that gates its output, by a sigmoid.
    pub gate_in_queries: bool,
    pub head_size: usize,
    /// Elements of a head's values.
    pub value_size: usize,
    /// Norms of queries and keys: of each head, or of all heads together when they are as wide.
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
    /// A norm of each head's values.
    pub v_norm: Option<Norm>,
    /// Whether RoPE comes before these norms.
    pub rope_before_norms: bool,
    /// Queries, keys and values lie within ± this.
    pub clamp: Option<f32>,
    /// `None` for a layer without positions.
    pub rope: Option<Rope>,
    pub rope_factors: RopeFactors,
    pub temperature: Option<Temperature>,
    /// Products of queries and keys are multiplied by this.
    pub scale: f32,
    /// Queries are multiplied by this before they are rounded for the product.
    pub query_scale: Option<f32>,
    pub softcap: Option<f32>,
    pub sinks: Option<Tensor>,
    /// The sigmoid of its product with the input weighs what attention gives: each element, or each head.
    pub gate: Option<Linear>,
    pub output: Linear,
    /// What comes out is multiplied by this.
    pub output_scale: Option<f32>,
}

pub(in crate::model) enum Projections {
    /// Without `v` the keys, as their product gives them, are the values too.
    Separate { q: Linear, k: Linear, v: Option<Linear> },
    /// Widths of queries, keys and values. `has_own` is unset where keys and values are another layer's all the same.
    Fused { qkv: Linear, widths: [usize; 3], has_own: bool },
    /// Keys and values are another layer's.
    Queries(Linear),
}

/// How an attention's tensors differ from the plain one's.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    gate_in_queries: bool,
    values_from_keys: bool,
}

impl SelfAttention {
    /// `attn_q`, `attn_k`, `attn_v` (or `attn_qkv` for all three) and `attn_output` of a layer, with the model's RoPE.
    pub fn load(b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        check_alike(b)?;
        SelfAttention::load_with(b, layer, Kind::default())
    }

    /// As [`SelfAttention::load`] where layers may differ in their heads.
    pub fn load_with_own_heads(b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        SelfAttention::load_with(b, layer, Kind::default())
    }

    /// As [`SelfAttention::load_with_own_heads`]; without `attn_v` the keys, as their product gives them, are the values too.
    pub fn load_with_values_from_keys(b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        SelfAttention::load_with(b, layer, Kind { values_from_keys: true, ..Kind::default() })
    }

    /// As [`SelfAttention::load`], with a gate of the output behind each head's queries.
    pub fn load_gated(b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        check_alike(b)?;
        SelfAttention::load_with(b, layer, Kind { gate_in_queries: true, ..Kind::default() })
    }

    fn load_with(b: &mut Builder<'_>, layer: usize, kind: Kind) -> Result<SelfAttention, Error> {
        if !b.hparams.attends[layer] {
            let why = format!("is zero for layer {layer}, which attends in this architecture");
            return Err(b.keys.error("attention.head_count_kv", why));
        }
        let (n_embd, head_size, value_size) =
            (b.hparams.n_embd, b.hparams.head_sizes[layer], b.hparams.value_sizes[layer]);
        if kind.gate_in_queries && value_size != head_size {
            let why = format!("{value_size}; gates of {head_size} elements are unsupported for it");
            return Err(b.keys.unsupported("attention.value_length", why));
        }
        let n_head = b.hparams.n_heads[layer];
        let (k_width, v_width) = (b.hparams.key_width(layer), b.hparams.value_width(layer));
        let q_width = head_size * n_head * if kind.gate_in_queries { 2 } else { 1 };
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        let has_own = b.hparams.has_store(layer);
        if !has_own {
            // Files may have them for all layers.
            ["k.", "k_norm.", "v."].iter().for_each(|part| b.loader.ignore(name(part)));
        }
        let projections = if b.loader.has(&format!("{}.weight", name("qkv"))) {
            let qkv = Linear::load(b, &name("qkv"), [n_embd, q_width + k_width + v_width])?;
            Projections::Fused { qkv, widths: [q_width, k_width, v_width], has_own }
        } else if !has_own {
            Projections::Queries(Linear::load(b, &name("q"), [n_embd, q_width])?)
        } else {
            let has_no_v = kind.values_from_keys && !b.loader.has(&format!("{}.weight", name("v")));
            if has_no_v && value_size != head_size {
                let why = format!("{value_size}, but the values are the keys, of {head_size} elements a head");
                return Err(b.keys.error("attention.value_length", why));
            }
            Projections::Separate {
                q: Linear::load(b, &name("q"), [n_embd, q_width])?,
                k: Linear::load(b, &name("k"), [n_embd, k_width])?,
                v: if has_no_v { None } else { Some(Linear::load(b, &name("v"), [n_embd, v_width])?) },
            }
        };
        Ok(SelfAttention {
            projections,
            gate_in_queries: kind.gate_in_queries,
            head_size,
            value_size,
            q_norm: None,
            k_norm: None,
            v_norm: None,
            rope_before_norms: false,
            clamp: None,
            rope: Some(b.hparams.rope.clone()),
            rope_factors: RopeFactors::default(),
            temperature: None,
            scale: 1.0 / (head_size as f32).sqrt(),
            query_scale: None,
            softcap: None,
            sinks: None,
            gate: None,
            output: Linear::load(b, &name("output"), [value_size * n_head, n_embd])?,
            output_scale: None,
        })
    }

    /// Adds the norms `attn_q_norm` and `attn_k_norm` over each head.
    pub fn with_head_norms(mut self, b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        self.q_norm = Some(Norm::rms(b, &format!("blk.{layer}.attn_q_norm"), self.head_size)?);
        if b.hparams.has_store(layer) {
            self.k_norm = Some(Norm::rms(b, &format!("blk.{layer}.attn_k_norm"), self.head_size)?);
        }
        Ok(self)
    }

    /// As [`SelfAttention::with_head_norms`], where the file has them.
    pub fn with_optional_head_norms(self, b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        match b.loader.has(&format!("blk.{layer}.attn_q_norm.weight")) {
            true => self.with_head_norms(b, layer),
            false => Ok(self),
        }
    }

    /// Adds LayerNorms `attn_q_norm` and `attn_k_norm` of each head, with weights of its own.
    pub fn with_centred_head_norms(mut self, b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        let (n_head, n_head_kv) = (b.hparams.n_heads[layer], b.hparams.n_heads_kv[layer]);
        let name = |part: &str| format!("blk.{layer}.attn_{part}_norm");
        self.q_norm = Some(Norm::centred_heads(b, &name("q"), [self.head_size, n_head])?);
        self.k_norm = Some(Norm::centred_heads(b, &name("k"), [self.head_size, n_head_kv])?);
        Ok(self)
    }

    /// Adds the gate `attn_gate` of each element.
    pub fn with_gate(self, b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        let n_weights = self.value_size * b.hparams.n_heads[layer];
        self.with_gate_of(b, layer, n_weights)
    }

    /// Adds the gate `attn_gate` of each head.
    pub fn with_head_gate(self, b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        let n_weights = b.hparams.n_heads[layer];
        self.with_gate_of(b, layer, n_weights)
    }

    fn with_gate_of(mut self, b: &mut Builder<'_>, layer: usize, n_weights: usize) -> Result<SelfAttention, Error> {
        let n_embd = b.hparams.n_embd;
        self.gate = Some(Linear::load(b, &format!("blk.{layer}.attn_gate"), [n_embd, n_weights])?);
        Ok(self)
    }

    /// Adds the norms `attn_q_norm` and `attn_k_norm` over all heads together.
    pub fn with_row_norms(mut self, b: &mut Builder<'_>, layer: usize) -> Result<SelfAttention, Error> {
        let (q_width, k_width) = (self.head_size * b.hparams.n_heads[layer], b.hparams.key_width(layer));
        self.q_norm = Some(Norm::rms(b, &format!("blk.{layer}.attn_q_norm"), q_width)?);
        self.k_norm = Some(Norm::rms(b, &format!("blk.{layer}.attn_k_norm"), k_width)?);
        Ok(self)
    }

    /// Multiplies the queries in place of the products, as llama.cpp does for some architectures: the result is the
    /// same but for rounding.
    pub fn with_scaled_queries(self, factor: f32) -> SelfAttention {
        SelfAttention { scale: 1.0, query_scale: Some(factor), ..self }
    }

    /// `input` `[n_embd, n]` → `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, step: &LayerStep<'_>, input: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let (q, own) = self.project(graph, input);
        let (q, gate) = self.split_gate(graph, q);
        let q = self.norm_and_rotate(graph, step, &q, self.q_norm.as_ref());
        let own = own.map(|[k, v]| (self.norm_and_rotate(graph, step, &k, self.k_norm.as_ref()), v));
        let q = match &self.temperature {
            Some(temperature) => graph.mul(&q, &temperature.of(graph, step.positions)),
            None => q,
        };
        let q = self.query_scale.map_or_else(|| q.clone(), |factor| graph.scale(&q, factor));
        let (scale, softcap, sinks) = (self.scale, self.softcap, self.sinks.as_ref());
        let options = AttentionOptions { scale, softcap, sinks, outputs: None, input: Some(input) };
        let q = graph.contiguous_if_needed(&q);
        let attended = match own {
            Some((k, v)) => {
                let v = self.norm_values(graph, &v);
                let [k, v] = [k, v].map(|heads| graph.contiguous_if_needed(&heads));
                attention.attend(graph, step.index, &q, &k, &v, &options)
            }
            None => attention.attend_shared(graph, step.index, &q, &options),
        };
        let attended = match gate {
            Some(gate) => graph.mul(&attended, &graph.sigmoid(&gate)),
            None => self.gated(graph, input, attended),
        };
        let output = self.output.apply(graph, &attended);
        self.output_scale.map_or_else(|| output.clone(), |factor| graph.scale(&output, factor))
    }

    /// Queries, and the gate of what they attend to `[head size × heads, n]`, where it lies between them.
    fn split_gate(&self, graph: &Graph, q: Tensor) -> (Tensor, Option<Tensor>) {
        if !self.gate_in_queries {
            return (q, None);
        }
        let [width, n, ..] = q.shape();
        let [element_bytes, row_bytes, ..] = q.strides();
        let shape = [self.head_size, width / (2 * self.head_size), n];
        let half_bytes = self.head_size * element_bytes;
        let [q, gate] = [0, half_bytes].map(|offset| {
            let half = graph.view(&q, shape, [2 * half_bytes, row_bytes], offset);
            graph.reshape(&graph.contiguous(&half), &[width / 2, n])
        });
        (q, Some(gate))
    }

    /// `attended` `[head size × heads, n]` weighed by the gate of `input`.
    fn gated(&self, graph: &Graph, input: &Tensor, attended: Tensor) -> Tensor {
        let Some(gate) = &self.gate else { return attended };
        let weights = graph.sigmoid(&gate.apply(graph, input));
        let ([width, n, ..], [n_weights, ..]) = (attended.shape(), weights.shape());
        let heads = graph.reshape(&attended, &[width / n_weights, n_weights, n]);
        let weighed = graph.mul(&heads, &graph.reshape(&weights, &[1, n_weights, n]));
        graph.reshape(&weighed, &[width, n])
    }

    /// Queries, and keys and values where they are the layer's own, as rows.
    fn project(&self, graph: &Graph, input: &Tensor) -> (Tensor, Option<[Tensor; 2]>) {
        let project = |linear: &Linear| self.clamped(graph, linear.apply(graph, input));
        match &self.projections {
            Projections::Separate { q, k, v } => {
                let (q, k) = (project(q), project(k));
                let v = v.as_ref().map_or_else(|| k.clone(), project);
                (q, Some([k, v]))
            }
            Projections::Queries(q) => (project(q), None),
            Projections::Fused { qkv, widths: [q, k, v], has_own } => {
                let all = self.clamped(graph, qkv.apply(graph, input));
                let [_, n, ..] = all.shape();
                let [element_bytes, row_bytes, ..] = all.strides();
                let part = |width: usize, first: usize| {
                    graph.view(&all, [width, n, 1], [row_bytes, n * row_bytes], first * element_bytes)
                };
                (part(*q, 0), has_own.then(|| [part(*k, *q), part(*v, q + k)]))
            }
        }
    }

    fn clamped(&self, graph: &Graph, rows: Tensor) -> Tensor {
        self.clamp.map_or_else(|| rows.clone(), |limit| graph.within(&rows, limit))
    }

    fn norm_and_rotate(&self, graph: &Graph, step: &LayerStep<'_>, rows: &Tensor, norm: Option<&Norm>) -> Tensor {
        if self.rope_before_norms {
            let rotated = self.rotate(graph, step, &self.heads(graph, rows));
            return norm.map_or_else(|| rotated.clone(), |norm| norm.apply(graph, &rotated));
        }
        self.rotate(graph, step, &self.norm_heads(graph, rows, norm))
    }

    fn norm_heads(&self, graph: &Graph, rows: &Tensor, norm: Option<&Norm>) -> Tensor {
        match norm {
            Some(norm) if norm.width() == self.head_size => norm.apply(graph, &self.heads(graph, rows)),
            Some(norm) => self.heads(graph, &norm.apply(graph, rows)),
            None => self.heads(graph, rows),
        }
    }

    fn norm_values(&self, graph: &Graph, rows: &Tensor) -> Tensor {
        let heads = heads(graph, rows, self.value_size);
        self.v_norm.as_ref().map_or_else(|| heads.clone(), |norm| norm.apply(graph, &heads))
    }

    fn rotate(&self, graph: &Graph, step: &LayerStep<'_>, heads: &Tensor) -> Tensor {
        match &self.rope {
            Some(rope) => graph.rope(heads, step.positions, self.rope_factors.get(rope, step.n_ctx), rope),
            None => heads.clone(),
        }
    }

    fn heads(&self, graph: &Graph, rows: &Tensor) -> Tensor {
        heads(graph, rows, self.head_size)
    }
}

/// `[size × heads, n]` → `[size, heads, n]`; rows need not lie one after the other.
fn heads(graph: &Graph, rows: &Tensor, size: usize) -> Tensor {
    let [width, n, ..] = rows.shape();
    let [element_bytes, row_bytes, ..] = rows.strides();
    graph.view(rows, [size, width / size, n], [size * element_bytes, row_bytes], 0)
}

/// That all layers that attend have as many heads.
fn check_alike(b: &Builder<'_>) -> Result<(), Error> {
    b.keys.all_equal("attention.head_count", &b.hparams.n_heads)?;
    b.keys.all_equal("attention.head_count_kv", &b.hparams.n_heads_kv)?;
    Ok(())
}

/// Divisors of RoPE's frequencies.
#[derive(Debug, Clone, Default)]
pub(in crate::model) struct RopeFactors {
    /// LLaMA 3.1's.
    always: Option<Tensor>,
    /// LongRoPE's, for contexts within the one that the model was first trained for and for longer ones.
    short: Option<Tensor>,
    long: Option<Tensor>,
}

impl RopeFactors {
    /// `rope_freqs`, or `rope_factors_short` and `rope_factors_long`, where the file has them.
    pub fn load(b: &mut Builder<'_>) -> Result<RopeFactors, Error> {
        let n = b.hparams.rope.n_rot / 2;
        RopeFactors::load_of(b, n)
    }

    /// As [`RopeFactors::load`], `n` factors each. A RoPE of fewer pairs takes the first ones.
    pub fn load_of(b: &mut Builder<'_>, n: usize) -> Result<RopeFactors, Error> {
        Ok(RopeFactors {
            always: b.loader.optional_vector("rope_freqs.weight", n)?,
            short: b.loader.optional_vector("rope_factors_short.weight", n)?,
            long: b.loader.optional_vector("rope_factors_long.weight", n)?,
        })
    }

    /// The factors for a sequence that may grow to `n_ctx` tokens.
    pub(super) fn get(&self, rope: &Rope, n_ctx: usize) -> Option<&Tensor> {
        let by_length = if n_ctx > rope.n_ctx_orig { &self.long } else { &self.short };
        self.always.as_ref().or(by_length.as_ref())
    }
}

/// Queries grow with their position `p`, so that attention does not flatten in long contexts:
/// `1 + scale·ln(1 + ⌊(p + offset) / step⌋)`.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Temperature {
    pub scale: f32,
    pub step: usize,
    pub offset: usize,
}

impl Temperature {
    /// Positions `[n]` (i32) → factors `[1, 1, n]`.
    pub(super) fn of(self, graph: &Graph, positions: &Tensor) -> Tensor {
        let positions = graph.cast(positions, Type::F32);
        let (step, offset) = (self.step as f32, self.offset as f32);
        // Half a position more, so that a quotient that should be whole is never rounded below it.
        let steps = graph.floor(&graph.scale_bias(&positions, 1.0 / step, (offset + 0.5) / step));
        let factors = graph.scale_bias(&graph.log(&graph.scale_bias(&steps, 1.0, 1.0)), self.scale, 1.0);
        let [n, ..] = factors.shape();
        graph.reshape(&factors, &[1, 1, n])
    }
}
