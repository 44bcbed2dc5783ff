//! RMS norm and LayerNorm.

use super::{Builder, Error};
use crate::ggml::{Graph, Tensor};

/// A norm over each row, with weights.
pub(in crate::model) struct Norm {
    weight: Tensor,
    eps: f32,
    /// Whether the row's mean is taken off first (LayerNorm); RMS norm leaves it.
    centred: bool,
}

impl Norm {
    /// An RMS norm with `{name}.weight` of `n` elements.
    pub fn rms(b: &mut Builder<'_>, name: &str, n: usize) -> Result<Norm, Error> {
        Norm::of_tensor(b, &format!("{name}.weight"), n)
    }

    /// An RMS norm with a tensor of any name.
    pub fn of_tensor(b: &mut Builder<'_>, tensor: &str, n: usize) -> Result<Norm, Error> {
        Ok(Norm { weight: b.loader.vector(tensor, n)?, eps: b.hparams.norm_eps, centred: false })
    }

    /// A LayerNorm with `{name}.weight` of `n` elements.
    pub fn centred(b: &mut Builder<'_>, name: &str, n: usize) -> Result<Norm, Error> {
        Ok(Norm { centred: true, ..Norm::rms(b, name, n)? })
    }

    /// An RMS norm of each of several groups, with weights of its own: `{name}.weight` `[n, groups]`.
    pub fn of_groups(b: &mut Builder<'_>, name: &str, shape: [usize; 2]) -> Result<Norm, Error> {
        Ok(Norm {
            weight: b.loader.floats(&format!("{name}.weight"), &shape)?,
            eps: b.hparams.norm_eps,
            centred: false,
        })
    }

    /// An RMS norm of a layer's hidden states.
    pub fn of_layer(b: &mut Builder<'_>, layer: usize, part: &str) -> Result<Norm, Error> {
        let n_embd = b.hparams.n_embd;
        Norm::rms(b, &format!("blk.{layer}.{part}"), n_embd)
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.weight.shape()[0]
    }

    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let normed = if self.centred { graph.norm(input, self.eps) } else { graph.rms_norm(input, self.eps) };
        graph.mul(&normed, &self.weight)
    }
}
