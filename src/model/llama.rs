//! `llama`: LLaMA 1 to 3, Mistral 7B, SmolLM2 and the many models that share their layer.

use super::{Architecture, Attention, AttentionOptions, Error, Hparams, LayerStep, weights::Loader};
use crate::ggml::{Graph, Rope, Tensor};

struct Llama {
    table: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: Tensor,
    rope: Rope,
    /// LLaMA 3.1's frequency factors.
    rope_factors: Option<Tensor>,
    rms_eps: f32,
    head_size: usize,
}

struct Layer {
    attn_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    ffn_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// A matrix product with an optional bias.
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn load(loader: &mut Loader<'_>, name: &str, shape: [usize; 2]) -> Result<Linear, Error> {
        Ok(Linear {
            weight: loader.matrix(&format!("{name}.weight"), shape)?,
            bias: loader.optional_vector(&format!("{name}.bias"), shape[1])?,
        })
    }

    fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let product = graph.mul_mat(&self.weight, input);
        match &self.bias {
            Some(bias) => graph.add(&product, bias),
            None => product,
        }
    }
}

pub(super) fn build(hparams: &Hparams, loader: &mut Loader<'_>) -> Result<Box<dyn Architecture>, Error> {
    let Hparams { n_embd, n_ff, n_vocab, head_size, .. } = *hparams;
    let (q_width, kv_width) = (head_size * hparams.n_head, head_size * hparams.n_head_kv);

    let table = loader.table("token_embd.weight", [n_embd, n_vocab])?;
    let output_norm = loader.vector("output_norm.weight", n_embd)?;
    let output = match loader.optional_matrix("output.weight", [n_embd, n_vocab])? {
        Some(output) => output,
        // Tied: the embedding table is the output matrix as well.
        None => loader.matrix("token_embd.weight", [n_embd, n_vocab])?,
    };
    let mut layers = Vec::new();
    for i in 0..hparams.n_layer {
        let name = |part: &str| format!("blk.{i}.{part}");
        layers.push(Layer {
            attn_norm: loader.vector(&name("attn_norm.weight"), n_embd)?,
            q: Linear::load(loader, &name("attn_q"), [n_embd, q_width])?,
            k: Linear::load(loader, &name("attn_k"), [n_embd, kv_width])?,
            v: Linear::load(loader, &name("attn_v"), [n_embd, kv_width])?,
            o: Linear::load(loader, &name("attn_output"), [q_width, n_embd])?,
            ffn_norm: loader.vector(&name("ffn_norm.weight"), n_embd)?,
            gate: Linear::load(loader, &name("ffn_gate"), [n_embd, n_ff])?,
            up: Linear::load(loader, &name("ffn_up"), [n_embd, n_ff])?,
            down: Linear::load(loader, &name("ffn_down"), [n_ff, n_embd])?,
        });
    }
    let rope_factors = loader.optional_vector("rope_freqs.weight", hparams.rope.n_rot / 2)?;
    Ok(Box::new(Llama {
        table,
        layers,
        output_norm,
        output,
        rope: hparams.rope.clone(),
        rope_factors,
        rms_eps: hparams.rms_eps,
        head_size,
    }))
}

impl Llama {
    fn norm(&self, graph: &Graph, input: &Tensor, weight: &Tensor) -> Tensor {
        graph.mul(&graph.rms_norm(input, self.rms_eps), weight)
    }

    /// `[head size × heads, n]` → `[head size, heads, n]`.
    fn heads(&self, graph: &Graph, rows: &Tensor) -> Tensor {
        let [width, n, ..] = rows.shape();
        graph.reshape(rows, &[self.head_size, width / self.head_size, n])
    }
}

impl Architecture for Llama {
    fn embed(&self, graph: &Graph, ids: &Tensor) -> Tensor {
        graph.get_rows(&self.table, ids)
    }

    fn layer(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let layer = &self.layers[step.index];
        let input = self.norm(graph, step.hidden, &layer.attn_norm);
        let rope = |rows: &Tensor| {
            graph.rope(&self.heads(graph, rows), step.positions, self.rope_factors.as_ref(), &self.rope)
        };
        let q = rope(&layer.q.apply(graph, &input));
        let k = rope(&layer.k.apply(graph, &input));
        let v = self.heads(graph, &layer.v.apply(graph, &input));
        let attended = attention.attend(graph, step.index, &q, &k, &v, &AttentionOptions::plain(self.head_size));
        let attended = layer.o.apply(graph, &attended);

        let (attended, hidden) = match step.keep {
            Some(keep) => (graph.get_rows(&attended, keep), graph.get_rows(step.hidden, keep)),
            None => (attended, step.hidden.clone()),
        };
        let hidden = graph.add(&attended, &hidden);
        let input = self.norm(graph, &hidden, &layer.ffn_norm);
        // Up before gate: the order in which llama.cpp computes them.
        let up = layer.up.apply(graph, &input);
        let gated = graph.swiglu(&layer.gate.apply(graph, &input), &up);
        graph.add(&layer.down.apply(graph, &gated), &hidden)
    }

    fn output(&self, graph: &Graph, hidden: &Tensor) -> Tensor {
        graph.mul_mat(&self.output, &self.norm(graph, hidden, &self.output_norm))
    }
}
