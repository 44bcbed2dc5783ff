//! AltUp: several hidden states for each token, of which a layer computes with one and foretells the others
//! (arXiv 2301.13310). Between layers they lie one after the other, `[n_embd × streams, n]`.

use super::{Builder, Error, Linear, Norm};
use crate::ggml::{Graph, Tensor};

/// The way from embeddings to several hidden states for each token, and back.
pub(in crate::model) struct AltUp {
    /// `[n_embd, n_embd, streams - 1]` each.
    spread: Tensor,
    merge: Tensor,
}

impl AltUp {
    /// Hidden states of a token; no key says so. The first is the one that layers compute with.
    pub const STREAMS: usize = 4;

    /// `altup_proj` and `altup_unembd_proj`.
    pub fn load(b: &mut Builder<'_>) -> Result<AltUp, Error> {
        let shape = [b.hparams.n_embd, b.hparams.n_embd, AltUp::STREAMS - 1];
        let spread = b.loader.stored("altup_proj.weight", &shape)?;
        Ok(AltUp { spread, merge: b.loader.stored("altup_unembd_proj.weight", &shape)? })
    }

    /// `[n_embd, n]` → `[n_embd × streams, n]`.
    pub fn spread(&self, graph: &Graph, embedded: &Tensor) -> Tensor {
        let length = lengths(graph, embedded);
        let others = (1..AltUp::STREAMS).map(|i| as_long(graph, &product(graph, &self.spread, i, embedded), &length));
        others.fold(embedded.clone(), |all, other| graph.concat(&all, &other, 0))
    }

    /// `[n_embd × streams, n]` → their mean, `[n_embd, n]`.
    pub fn merged(&self, graph: &Graph, streams: &Tensor) -> Tensor {
        let first = stream(graph, streams, 0);
        let length = lengths(graph, &first);
        let others = (1..AltUp::STREAMS).map(|i| {
            let other = product(graph, &self.merge, i, &stream(graph, streams, i));
            as_long(graph, &other, &length)
        });
        let sum = others.fold(first, |sum, other| graph.add(&sum, &other));
        graph.scale(&sum, 1.0 / AltUp::STREAMS as f32)
    }
}

/// The matrix of stream `i`, which is not the first, times `input` `[n_embd, n]`.
fn product(graph: &Graph, matrices: &Tensor, i: usize, input: &Tensor) -> Tensor {
    let ([n_in, n_out, ..], [_, row_bytes, matrix_bytes, _]) = (matrices.shape(), matrices.strides());
    let matrix = graph.view(matrices, [n_in, n_out, 1], [row_bytes, matrix_bytes], (i - 1) * matrix_bytes);
    graph.mul_mat(&matrix, input)
}

/// The Euclidean length of each row.
fn lengths(graph: &Graph, rows: &Tensor) -> Tensor {
    graph.sqrt(&graph.sum_rows(&graph.square(rows)))
}

fn as_long(graph: &Graph, rows: &Tensor, length: &Tensor) -> Tensor {
    graph.div(&graph.mul(rows, length), &lengths(graph, rows))
}

/// One of a token's hidden states, `[n_embd, n]`.
fn stream(graph: &Graph, streams: &Tensor, index: usize) -> Tensor {
    let ([width, n, ..], [element_bytes, row_bytes, ..]) = (streams.shape(), streams.strides());
    let n_embd = width / AltUp::STREAMS;
    let view = graph.view(streams, [n_embd, n, 1], [row_bytes, n * row_bytes], index * n_embd * element_bytes);
    graph.contiguous(&view)
}

/// What a layer foretells of its hidden states, and how that is corrected by what it has computed.
pub(in crate::model) struct Predictor {
    router: Linear,
    router_norm: Norm,
    predict: Linear,
    correct: Linear,
    n_embd: usize,
}

impl Predictor {
    /// `altup_router`, `altup_router_norm`, `altup_predict_coef` and `altup_correct_coef` of a layer.
    pub fn load(b: &mut Builder<'_>, layer: usize) -> Result<Predictor, Error> {
        let (n_embd, n) = (b.hparams.n_embd, AltUp::STREAMS);
        let name = |part: &str| format!("blk.{layer}.altup_{part}");
        Ok(Predictor {
            router: Linear::load(b, &name("router"), [n_embd, n])?,
            router_norm: Norm::rms(b, &name("router_norm"), n_embd)?,
            predict: Linear::load(b, &name("predict_coef"), [n, n * n])?,
            correct: Linear::load(b, &name("correct_coef"), [n, n])?,
            n_embd,
        })
    }

    /// `[n_embd, n]` → `[streams, n]`, within ± 1.
    fn modalities(&self, graph: &Graph, hidden: &Tensor) -> Tensor {
        let input = graph.scale(&self.router_norm.apply(graph, hidden), 1.0 / self.n_embd as f32);
        graph.tanh(&self.router.apply(graph, &input))
    }

    /// `[n_embd × streams, n]` → what is foretold of each, and of the first alone, `[n_embd, n]`.
    pub fn predict(&self, graph: &Graph, streams: &Tensor) -> (Tensor, Tensor) {
        let [width, n, ..] = streams.shape();
        let modalities = self.modalities(graph, &stream(graph, streams, 0));
        let coefficients = self.predict.apply(graph, &modalities);
        let coefficients = graph.reshape(&coefficients, &[AltUp::STREAMS, AltUp::STREAMS, n]);
        let apart = graph.reshape(streams, &[self.n_embd, AltUp::STREAMS, n]);
        let by_element = graph.contiguous(&graph.permute(&apart, [1, 0, 2, 3]));
        let predicted = graph.add(&graph.mul_mat(&by_element, &coefficients), &apart);
        let predicted = graph.reshape(&predicted, &[width, n]);
        let first = stream(graph, &predicted, 0);
        (predicted, first)
    }

    /// `predicted` `[n_embd × streams, n]` and its first stream, of which `computed` `[n_embd, n]` came → as `predicted`,
    /// and of it the first.
    pub fn correct(&self, graph: &Graph, predicted: &Tensor, first: &Tensor, computed: &Tensor) -> (Tensor, Tensor) {
        let [width, n, ..] = predicted.shape();
        let coefficients = self.correct.apply(graph, &self.modalities(graph, computed));
        let coefficients = graph.reshape(&graph.scale_bias(&coefficients, 1.0, 1.0), &[1, AltUp::STREAMS, n]);
        let innovation = graph.reshape(&graph.sub(computed, first), &[self.n_embd, 1, n]);
        let innovation = graph.repeat(&innovation, [self.n_embd, AltUp::STREAMS, n]);
        let change = graph.reshape(&graph.mul(&innovation, &coefficients), &[width, n]);
        let corrected = graph.add(&change, predicted);
        let first = stream(graph, &corrected, 0);
        (corrected, first)
    }

    /// Adds `more` `[n_embd, n]` to all streams but the first.
    pub fn add_to_others(&self, graph: &Graph, streams: &Tensor, more: &Tensor) -> Tensor {
        let ([_, n, ..], [element_bytes, row_bytes, ..]) = (streams.shape(), streams.strides());
        let n_others = AltUp::STREAMS - 1;
        let shape = [self.n_embd, n_others, n];
        let others = graph.view(streams, shape, [self.n_embd * element_bytes, row_bytes], self.n_embd * element_bytes);
        let others = graph.add(&graph.contiguous(&others), &graph.reshape(more, &[self.n_embd, 1, n]));
        let others = graph.reshape(&others, &[self.n_embd * n_others, n]);
        graph.concat(&stream(graph, streams, 0), &others, 0)
    }
}
