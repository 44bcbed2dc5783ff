//! Embeddings that each layer has of its own: what a token is, told once more to every layer.

use super::{Builder, Error, Linear, Norm};
use crate::ggml::{Graph, Tensor};

/// For each layer a short row of every token: looked up, and projected from its embedding. Both stay with the processor,
/// where each layer's part is taken out of them: what is sent to a layer does not grow with the number of layers.
pub(in crate::model) struct LayerEmbeddings {
    /// `[width × layers, tokens of the vocabulary]`
    table: Tensor,
    /// `[n_embd, width × layers]`
    projection: Tensor,
    norm: Norm,
    n_embd: usize,
}

impl LayerEmbeddings {
    /// `per_layer_token_embd`, `per_layer_model_proj` and `per_layer_proj_norm`, rows of `width` for each layer.
    pub fn load(b: &mut Builder<'_>, width: usize, key: &str) -> Result<LayerEmbeddings, Error> {
        let (n_embd, n_vocab, all) = (b.hparams.n_embd, b.hparams.n_vocab, width * b.hparams.n_layer);
        let table = b.loader.table("per_layer_token_embd.weight", [all, n_vocab])?;
        let block = table.ty().block_size();
        if !width.is_multiple_of(block) {
            let why = format!("{width}, which the {block} elements of a block of type {} do not divide", table.ty());
            return Err(b.keys.error(key, why));
        }
        let projection = b.loader.stored("per_layer_model_proj.weight", &[n_embd, all])?;
        let norm = Norm::rms(b, "per_layer_proj_norm", width)?;
        Ok(LayerEmbeddings { table, projection, norm, n_embd })
    }

    /// Token ids `[n]` (i32) and their embeddings `[n_embd, n]` → `[width, n]`.
    pub fn of_layer(&self, graph: &Graph, layer: usize, ids: &Tensor, embedded: &Tensor) -> Tensor {
        let width = self.norm.width();
        let ([_, n_vocab, ..], [_, row_bytes, ..]) = (self.table.shape(), self.table.strides());
        let first = layer * self.table.ty().row_bytes(width);
        let table = graph.view(&self.table, [width, n_vocab, 1], [row_bytes, n_vocab * row_bytes], first);
        let looked_up = graph.scale(&graph.get_rows(&table, ids), (width as f32).sqrt());
        let projection = graph.rows(&self.projection, layer * width, width);
        let projected = graph.scale(&graph.mul_mat(&projection, embedded), 1.0 / (self.n_embd as f32).sqrt());
        graph.scale(&graph.add(&self.norm.apply(graph, &projected), &looked_up), 1.0 / 2f32.sqrt())
    }
}

/// What a layer makes of its own input: the hidden states gate it.
pub(in crate::model) struct OwnInput {
    gate: Linear,
    projection: Linear,
    norm: Norm,
}

impl OwnInput {
    /// `inp_gate`, `proj` and `post_norm` of a layer, of an input of `width`.
    pub fn load(b: &mut Builder<'_>, layer: usize, width: usize) -> Result<OwnInput, Error> {
        let n_embd = b.hparams.n_embd;
        let name = |part: &str| format!("blk.{layer}.{part}");
        Ok(OwnInput {
            gate: Linear::load(b, &name("inp_gate"), [n_embd, width])?,
            projection: Linear::load(b, &name("proj"), [width, n_embd])?,
            norm: Norm::of_layer(b, layer, "post_norm")?,
        })
    }

    /// `hidden` `[n_embd, n]`, `own` `[width, n]` → what is to be added, `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, hidden: &Tensor, own: &Tensor) -> Tensor {
        let gate = graph.gelu(&self.gate.apply(graph, hidden));
        self.norm.apply(graph, &self.projection.apply(graph, &graph.mul(&gate, own)))
    }
}
