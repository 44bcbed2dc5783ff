//! `gemma3n`: four hidden states for each token, of which layers compute with one (AltUp), a narrow product beside the
//! attention (LAuReL), embeddings for each layer, gates of which few open, windows in four of five layers; the layers
//! after the twentieth read an earlier one's keys and values.

use super::{
    Attention, Error, LayerStep,
    parts::{AltUp, Builder, Decoder, Layer, LayerEmbeddings, Linear, Norm, OwnInput, Predictor, SelfAttention},
};
use crate::ggml::{Graph, Rope, RopeKind, Tensor};

// No key says any of these.

/// Layers with keys and values of their own.
const OWN_STORES: usize = 20;
/// Elements of a layer's own embedding.
const OWN_WIDTH: usize = 256;
const LAUREL_RANK: usize = 64;
/// Layers whose gates open for 5 % of the elements, and by how many deviations such an element is above the mean.
const SPARSE_LAYERS: usize = 10;
const SPARSE_DEVIATIONS: f32 = 1.644_853_6;
const LOGIT_SOFTCAP: f32 = 30.0;

pub(super) fn build(b: &mut Builder<'_>) -> Result<Decoder, Error> {
    b.hparams.rope.kind = RopeKind::Neox;
    let n_layer = b.hparams.n_layer;
    let window = b.keys.count("attention.sliding_window")?;
    b.hparams.windows = b.keys.windows(n_layer, window, 5)?;
    b.share_stores(OWN_STORES, "block_count")?;
    let freq_base = b.keys.optional_f32("rope.freq_base_swa")?.unwrap_or(10_000.0);

    let layers = b.layers(|b, i| {
        let attention = SelfAttention::load(b, i)?.with_head_norms(b, i)?;
        let v_norm = Some(Norm::without_weights(b, attention.value_size));
        let mut attention = SelfAttention { scale: 1.0, v_norm, ..attention };
        if b.hparams.windows[i].is_some() {
            // The scaling of longer contexts is the global layers' alone.
            attention.rope = Some(Rope { freq_base, freq_scale: 1.0, ..b.hparams.rope.clone() });
        }
        let (n_embd, n_ff) = (b.hparams.n_embd, b.n_ff(i)?);
        let name = |part: &str| format!("blk.{i}.{part}");
        Ok(Gemma3nLayer {
            predictor: Predictor::load(b, i)?,
            attn_norm: Norm::of_layer(b, i, "attn_norm")?,
            attention,
            attn_post_norm: Norm::of_layer(b, i, "post_attention_norm")?,
            laurel: [
                Linear::load(b, &name("laurel_l"), [n_embd, LAUREL_RANK])?,
                Linear::load(b, &name("laurel_r"), [LAUREL_RANK, n_embd])?,
            ],
            laurel_norm: Norm::of_layer(b, i, "laurel_post_norm")?,
            ffn_norm: Norm::of_layer(b, i, "ffn_norm")?,
            gate: Linear::load(b, &name("ffn_gate"), [n_embd, n_ff])?,
            up: Linear::load(b, &name("ffn_up"), [n_embd, n_ff])?,
            down: Linear::load(b, &name("ffn_down"), [n_ff, n_embd])?,
            is_sparse: i < SPARSE_LAYERS,
            ffn_post_norm: Norm::of_layer(b, i, "post_ffw_norm")?,
            own_scale: b.loader.vector(&name("altup_correct_scale.weight"), n_embd)?,
            own: OwnInput::load(b, i, OWN_WIDTH)?,
        })
    })?;
    let embedding_scale = Some((b.hparams.n_embd as f32).sqrt());
    let layer_embeddings = Some(LayerEmbeddings::load(b, OWN_WIDTH, "block_count")?);
    let (logit_softcap, altup) = (Some(LOGIT_SOFTCAP), Some(AltUp::load(b)?));
    Ok(Decoder {
        embedding_scale,
        scales_tokens_alone: true,
        logit_softcap,
        layer_embeddings,
        altup,
        ..Decoder::load(b, layers)?
    })
}

struct Gemma3nLayer {
    predictor: Predictor,
    attn_norm: Norm,
    attention: SelfAttention,
    attn_post_norm: Norm,
    laurel: [Linear; 2],
    laurel_norm: Norm,
    ffn_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    is_sparse: bool,
    ffn_post_norm: Norm,
    own_scale: Tensor,
    own: OwnInput,
}

impl Layer for Gemma3nLayer {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let (predicted, active) = self.predictor.predict(graph, step.hidden);
        let input = self.attn_norm.apply(graph, &active);
        let laurel = self.laurel.iter().fold(input.clone(), |narrow, linear| linear.apply(graph, &narrow));
        let laurel = graph.add(&self.laurel_norm.apply(graph, &laurel), &input);
        let attended = self.attention.apply(graph, step, &input, attention);
        let [predicted, active, laurel, attended] =
            [&predicted, &active, &laurel, &attended].map(|rows| step.kept(graph, rows));

        let attended = graph.add(&self.attn_post_norm.apply(graph, &attended), &active);
        let attended = graph.scale(&graph.add(&attended, &laurel), 1.0 / 2f32.sqrt());
        let output = self.feed(graph, &self.ffn_norm.apply(graph, &attended));
        let computed = graph.add(&self.ffn_post_norm.apply(graph, &output), &attended);
        let (corrected, first) = self.predictor.correct(graph, &predicted, &active, &computed);
        match step.own_input {
            Some(own) => {
                let own = step.kept(graph, own);
                let more = self.own.apply(graph, &graph.mul(&first, &self.own_scale), &own);
                self.predictor.add_to_others(graph, &corrected, &more)
            }
            None => corrected,
        }
    }
}

impl Gemma3nLayer {
    fn feed(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let (up, gate) = (self.up.apply(graph, input), self.gate.apply(graph, input));
        let gate = if self.is_sparse { highest(graph, &gate) } else { gate };
        self.down.apply(graph, &graph.mul(&up, &graph.gelu(&gate)))
    }
}

/// By how much each element is above most of its row; 0 where it is not.
fn highest(graph: &Graph, rows: &Tensor) -> Tensor {
    let mean = graph.mean_rows(rows);
    let squares = graph.sum_rows(&graph.square(&graph.sub(rows, &mean)));
    let deviation = graph.sqrt(&graph.scale(&squares, 1.0 / (rows.shape()[0] as f32 - 1.0)));
    let least = graph.add(&mean, &graph.scale(&deviation, SPARSE_DEVIATIONS));
    graph.relu(&graph.sub(rows, &least))
}
