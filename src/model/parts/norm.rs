//! RMS norm and LayerNorm.

use super::{Builder, Error};
use crate::ggml::{Graph, Tensor};

/// A norm over each row, with weights and a bias where it has them.
pub(in crate::model) struct Norm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    /// Elements of a row.
    width: usize,
    eps: f32,
    /// Whether the row's mean is taken off first (LayerNorm); RMS norm leaves it.
    centred: bool,
}

impl Norm {
    /// An RMS norm with `{name}.weight` of `n` elements, and `{name}.bias` where the file has it.
    pub fn rms(b: &mut Builder<'_>, name: &str, n: usize) -> Result<Norm, Error> {
        let bias = b.loader.optional_vector(&format!("{name}.bias"), n)?;
        Ok(Norm { bias, ..Norm::of_tensor(b, &format!("{name}.weight"), n)? })
    }

    /// An RMS norm with a tensor of any name.
    pub fn of_tensor(b: &mut Builder<'_>, tensor: &str, n: usize) -> Result<Norm, Error> {
        let weight = Some(b.loader.vector(tensor, n)?);
        Ok(Norm { weight, ..Norm::without_weights(b, n) })
    }

    /// A LayerNorm with `{name}.weight` of `n` elements, and `{name}.bias` where the file has it.
    pub fn centred(b: &mut Builder<'_>, name: &str, n: usize) -> Result<Norm, Error> {
        Ok(Norm::rms(b, name, n)?.with_mean_taken_off())
    }

    /// A LayerNorm of each head with weights of its own: `{name}.weight` of `[head size, heads]`.
    pub fn centred_heads(b: &mut Builder<'_>, name: &str, shape: [usize; 2]) -> Result<Norm, Error> {
        let weight = Some(b.loader.rows(&format!("{name}.weight"), shape)?);
        Ok(Norm { weight, ..Norm::without_weights(b, shape[0]) }.with_mean_taken_off())
    }

    /// An RMS norm of `n` elements that has no weights.
    pub fn without_weights(b: &Builder<'_>, n: usize) -> Norm {
        Norm { weight: None, bias: None, width: n, eps: b.hparams.norm_eps, centred: false }
    }

    /// As a LayerNorm.
    pub fn with_mean_taken_off(self) -> Norm {
        Norm { centred: true, ..self }
    }

    /// An RMS norm of each of several groups, with weights of its own: `{name}.weight` `[n, groups]`.
    pub fn of_groups(b: &mut Builder<'_>, name: &str, shape: [usize; 2]) -> Result<Norm, Error> {
        let weight = Some(b.loader.rows(&format!("{name}.weight"), shape)?);
        Ok(Norm { weight, ..Norm::without_weights(b, shape[0]) })
    }

    /// An RMS norm of a layer's hidden states.
    pub fn of_layer(b: &mut Builder<'_>, layer: usize, part: &str) -> Result<Norm, Error> {
        let n_embd = b.hparams.n_embd;
        Norm::rms(b, &format!("blk.{layer}.{part}"), n_embd)
    }

    /// A LayerNorm of a layer's hidden states.
    pub fn centred_of_layer(b: &mut Builder<'_>, layer: usize, part: &str) -> Result<Norm, Error> {
        Ok(Norm::of_layer(b, layer, part)?.with_mean_taken_off())
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let normed = if self.centred { graph.norm(input, self.eps) } else { graph.rms_norm(input, self.eps) };
        let scaled = self.weight.iter().fold(normed, |normed, weight| graph.mul(&normed, weight));
        self.bias.iter().fold(scaled, |scaled, bias| graph.add(&scaled, bias))
    }
}
