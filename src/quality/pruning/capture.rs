//! Texts through a model's layers, one layer after the other, without caches; and what is seen of attention meanwhile.

use super::repeated::{Repeated, SINK};
use crate::{
    cache::Span,
    engine::{Error, SessionParams},
    ggml::{Context, Device, FusedAttention, Graph, KvSegment, Scheduler, Tensor, Type},
    gguf::Gguf,
    model::{Architecture, Attention, AttentionOptions, LayerStep, Mixed, Model, State},
};

/// Less attention is as good as none; its logarithm would be.
const LEAST: f32 = 1e-8;

const MAX_NODES: usize = 4096;

/// Minus infinity in f16.
const HIDDEN: u16 = 0xfc00;

/// What was seen of a text in a layer.
pub(super) struct Seen {
    /// The layer's normed input, of one row after the other.
    pub inputs: Vec<f32>,
    /// How much each row was asked for, for each KV head: a logarithm.
    pub asked: Vec<f32>,
}

/// Texts between two layers.
pub(super) struct Reading<'a> {
    model: &'a Model,
    file: Gguf,
    n_ctx: usize,
    texts: &'a [Repeated],
    /// Of each text `[width, tokens]`; none before the first layer.
    hidden: Vec<Option<Tensor>>,
    scheduler: Scheduler,
}

impl<'a> Reading<'a> {
    pub fn new(model: &'a Model, params: &SessionParams, texts: &'a [Repeated]) -> Result<Reading<'a>, Error> {
        let abort = params.abort.clone().unwrap_or_default();
        let n_threads = if params.n_threads_batch == 0 { params.n_threads } else { params.n_threads_batch };
        Ok(Reading {
            model,
            file: Gguf::open(model.path()).map_err(crate::model::Error::from)?,
            n_ctx: model.hparams().n_ctx_train,
            texts,
            hidden: texts.iter().map(|_| None).collect(),
            scheduler: Scheduler::with_abort_flag(&[Device::cpu()], n_threads, MAX_NODES, false, abort)?,
        })
    }

    /// A text through the layer that follows the one of before; what was seen there, where it is asked for.
    pub fn read(&mut self, layer: usize, text: usize, sees: bool) -> Result<Option<Seen>, Error> {
        let hparams = self.model.hparams();
        let Repeated { tokens, n_text, repeat } = &self.texts[text];
        let n = tokens.len();
        let mut graph = Graph::new(MAX_NODES);
        graph.use_own_kernels(true);
        let per_token = hparams.rope.kind.positions_per_token();
        let ids = graph.input(Type::I32, &[n]);
        let positions = graph.input(Type::I32, &[n * per_token]);
        let mask = graph.input(Type::F16, &[n, n]);
        let architecture = self.model.architecture();
        let entering = match &self.hidden[text] {
            Some(hidden) => hidden.clone(),
            None => architecture.embed(&graph, &ids),
        };
        let output = if sees { Some(self.output_matrix(layer)?) } else { None };
        let mut capture =
            Capture { mask: &mask, n_text: *n_text, repeat: *repeat, output: output.as_ref(), seen: None };
        let leaving = leaving(architecture, &graph, layer, (&entering, &ids, &positions), self.n_ctx, &mut capture);
        let seen = capture.seen;

        let context = Context::new(1);
        let hidden = context.tensor(Type::F32, &[architecture.width(), n]);
        context.alloc(Device::cpu().buffer_type(), "a text's hidden states")?;
        graph.expand(&graph.copy(&leaving, &hidden));
        self.scheduler.alloc(&graph)?;
        if ids.is_allocated() {
            ids.write(0, tokens);
        }
        if positions.is_allocated() {
            // All dimensions but the last, which text does not have.
            let mut all: Vec<i32> = (0..n as i32).collect::<Vec<_>>().repeat(per_token.min(3));
            all.resize(n * per_token, 0);
            positions.write(0, &all);
        }
        let span = hparams.windows[layer].map(|n_window| Span {
            n_sink: 0,
            n_window,
            n_slack: 0,
            chunked: hparams.chunked,
            n_rescued: 0,
        });
        let is_seen = |query: usize, key: usize| key <= query && span.is_none_or(|span| span.sees(query, key));
        let cells = (0..n * n).map(|cell| if is_seen(cell / n, cell % n) { 0 } else { HIDDEN });
        if mask.is_allocated() {
            mask.write(0, &cells.collect::<Vec<u16>>());
        }
        self.scheduler.compute(&graph)?;
        let seen = seen.map(|seen| seen.read(hparams.n_heads_kv[layer]));
        drop(graph);
        self.scheduler.release();
        self.hidden[text] = Some(hidden);
        Ok(seen)
    }

    /// The layer's output matrix `[value size × heads, n_embd]`, as the file has it.
    fn output_matrix(&self, layer: usize) -> Result<Tensor, Error> {
        let name = format!("blk.{layer}.attn_output.weight");
        let info = self.file.require_tensor(&name).map_err(crate::model::Error::from)?;
        let context = Context::new(1);
        let matrix = context.tensor(info.ty, &[info.shape[0] as usize, info.shape[1] as usize]);
        context.alloc(Device::cpu().buffer_type(), "an output matrix")?;
        matrix.write(0, self.file.data(info));
        Ok(matrix)
    }
}

fn leaving(
    architecture: &dyn Architecture,
    graph: &Graph,
    index: usize,
    (hidden, tokens, positions): (&Tensor, &Tensor, &Tensor),
    n_ctx: usize,
    attention: &mut dyn Attention,
) -> Tensor {
    let step = LayerStep { index, hidden, tokens, embeddings: None, own_input: None, positions, keep: None, n_ctx };
    architecture.layer(graph, &step, attention)
}

/// Attention of all tokens over all, of which the weights are kept where an output matrix is given.
struct Capture<'a> {
    mask: &'a Tensor,
    n_text: usize,
    repeat: usize,
    output: Option<&'a Tensor>,
    seen: Option<SeenTensors>,
}

/// What a graph gives of a layer.
struct SeenTensors {
    /// `[n_embd, rows]`
    inputs: Tensor,
    /// `[tokens, queries, heads]`
    weights: Tensor,
    /// Of each query head `[1, rows]`: the values' squared length behind the output matrix.
    squares: Vec<Tensor>,
}

impl Attention for Capture<'_> {
    fn attend(
        &mut self,
        graph: &Graph,
        _: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions<'_>,
    ) -> Tensor {
        let [q, k, v] = [q, k, v].map(|heads| graph.permute(heads, [0, 2, 1, 3]));
        if let (Some(output), Some(input)) = (self.output, options.input) {
            let seen = self.see(graph, [&q, &k, &v], output, input, options);
            graph.expand(&seen.inputs);
            graph.expand(&seen.weights);
            seen.squares.iter().for_each(|squares| graph.expand(squares));
            self.seen = Some(seen);
        }
        let AttentionOptions { scale, softcap, sinks, .. } = *options;
        let segment = KvSegment { k: &[k], v: &[v], mask: Some(self.mask) };
        let params = FusedAttention { scale, soft_cap: softcap, sinks, of_heads: &[] };
        let attended = graph.fused_attention(&q, &[segment], &params);
        let [size, heads, n, _] = attended.shape();
        graph.reshape(&attended, &[size * heads, n])
    }

    fn attend_shared(&mut self, _: &Graph, _: usize, _: &Tensor, _: &AttentionOptions<'_>) -> Tensor {
        unreachable!("models with such layers are refused before")
    }

    fn recur(&mut self, _: &Graph, _: usize, _: &[&Tensor], _: &dyn Fn(&[Tensor], &State) -> Mixed) -> Tensor {
        unreachable!("models with such layers are refused before")
    }
}

impl Capture<'_> {
    /// Of queries, keys and values `[size, tokens, heads]`.
    fn see(
        &self,
        graph: &Graph,
        [q, k, v]: [&Tensor; 3],
        output: &Tensor,
        input: &Tensor,
        options: &AttentionOptions<'_>,
    ) -> SeenTensors {
        let [_, n, heads, _] = q.shape();
        let (n_queries, n_rows) = (n - self.repeat, self.n_text - SINK);
        let of_tokens = |rows: &Tensor, first: usize, n: usize| {
            let ([size, _, heads, _], [_, token_bytes, head_bytes, _]) = (rows.shape(), rows.strides());
            graph.view(rows, [size, n, heads], [token_bytes, head_bytes], first * token_bytes)
        };
        let AttentionOptions { scale, softcap, sinks, .. } = *options;
        let products = graph.mul_mat_f32(&graph.contiguous(k), &of_tokens(q, self.repeat, n_queries));
        let mask = graph.rows(self.mask, self.repeat, n_queries);
        let weights = match softcap {
            Some(cap) => graph.soft_max(&graph.tanh(&graph.scale(&products, scale / cap)), &mask, cap, sinks),
            None => graph.soft_max(&products, &mask, scale, sinks),
        };
        let [value_size, _, kv_heads, _] = v.shape();
        let values = graph.contiguous(&of_tokens(v, SINK, n_rows));
        let output = if output.ty() == Type::F32 { output.clone() } else { graph.cast(output, Type::F32) };
        let n_embd = output.shape()[1];
        let squares = |head: usize| {
            let [element_bytes, row_bytes, ..] = output.strides();
            let columns = [value_size, n_embd, 1];
            let first = head * value_size * element_bytes;
            let matrix = graph.contiguous(&graph.view(&output, columns, [row_bytes, n_embd * row_bytes], first));
            let [_, row_bytes, head_bytes, _] = values.strides();
            let first = head / (heads / kv_heads) * head_bytes;
            let values = graph.view(&values, [value_size, n_rows, 1], [row_bytes, head_bytes], first);
            graph.sum_rows(&graph.square(&graph.mul_mat_f32(&matrix, &values))).as_output()
        };
        SeenTensors {
            inputs: graph.contiguous(&graph.rows(input, SINK, n_rows)).as_output(),
            weights: weights.as_output(),
            squares: (0..heads).map(squares).collect(),
        }
    }
}

impl SeenTensors {
    fn read(&self, kv_heads: usize) -> Seen {
        let [n, n_queries, heads, _] = self.weights.shape();
        let [_, n_rows, ..] = self.inputs.shape();
        let group = heads / kv_heads;
        let weights = self.weights.to_f32();
        let lengths: Vec<Vec<f32>> =
            self.squares.iter().map(|squares| squares.to_f32().iter().map(|square| square.sqrt()).collect()).collect();
        let mut asked = vec![0.0; n_rows * kv_heads];
        for head in 0..heads {
            for query in weights[head * n_queries * n..][..n_queries * n].chunks_exact(n) {
                for (row, &weight) in query[SINK..SINK + n_rows].iter().enumerate() {
                    let most = &mut asked[row * kv_heads + head / group];
                    *most = f32::max(*most, weight);
                }
            }
        }
        for (row, asked) in asked.chunks_exact_mut(kv_heads).enumerate() {
            for (kv_head, asked) in asked.iter_mut().enumerate() {
                let lengths = &lengths[kv_head * group..][..group];
                let length = lengths.iter().map(|lengths| lengths[row]).sum::<f32>() / group as f32;
                *asked = (asked.max(LEAST) * length.max(LEAST)).ln();
            }
        }
        Seen { inputs: self.inputs.to_f32(), asked }
    }
}
