//! Matrix products with weights, of a layer or of its experts.

use super::{Builder, Error};
use crate::ggml::{Graph, Tensor};

/// A matrix product with an optional bias.
pub(in crate::model) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    /// Whether sums need f32 where a device would use less.
    f32_sums: bool,
}

impl Linear {
    /// `{name}.weight` of `[input width, output width]`, and `{name}.bias` where the file has it.
    pub fn load(b: &mut Builder<'_>, name: &str, shape: [usize; 2]) -> Result<Linear, Error> {
        Ok(Linear {
            weight: b.loader.matrix(&format!("{name}.weight"), shape)?,
            bias: b.loader.optional_vector(&format!("{name}.bias"), shape[1])?,
            f32_sums: false,
        })
    }

    /// The output matrix: `output`, or the embedding table where it serves for both.
    pub fn load_output(b: &mut Builder<'_>) -> Result<Linear, Error> {
        let shape = [b.hparams.n_embd, b.hparams.n_vocab];
        if b.loader.has("output.weight") {
            return Linear::load(b, "output", shape);
        }
        let weight = b.loader.matrix("token_embd.weight", shape)?;
        Ok(Linear { weight, bias: b.loader.optional_vector("output.bias", shape[1])?, f32_sums: false })
    }

    pub fn with_f32_sums(mut self) -> Linear {
        self.f32_sums = true;
        self
    }

    pub fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        let product = match self.f32_sums {
            true => graph.mul_mat_f32(&self.weight, input),
            false => graph.mul_mat(&self.weight, input),
        };
        match &self.bias {
            Some(bias) => graph.add(&product, bias),
            None => product,
        }
    }
}

/// A matrix, an optional factor and an optional bias of each expert.
pub(super) struct ExpertLinear {
    weight: Tensor,
    scale: Option<Tensor>,
    bias: Option<Tensor>,
}

impl ExpertLinear {
    /// `{name}.weight` of `[input width, output width, experts]`, and `{name}.scale` and `{name}.bias` where the file has
    /// them.
    pub fn load(b: &mut Builder<'_>, name: &str, shape: [usize; 3]) -> Result<ExpertLinear, Error> {
        Ok(ExpertLinear {
            weight: b.loader.experts(&format!("{name}.weight"), shape)?,
            scale: b.loader.optional_vector(&format!("{name}.scale"), shape[2])?,
            bias: b.loader.optional_expert_biases(&format!("{name}.bias"), [shape[1], shape[2]])?,
        })
    }

    /// `input` `[input width, 1 or experts used, n]`, `ids` `[experts used, n]` → `[output width, experts used, n]`.
    pub fn apply(&self, graph: &Graph, input: &Tensor, ids: &Tensor) -> Tensor {
        let product = graph.mul_mat_id(&self.weight, input, ids);
        let product = match &self.scale {
            Some(scale) => {
                let (n_expert, n) = (scale.shape()[0], ids.shape()[1]);
                let of_tokens = graph.repeat(&graph.reshape(scale, &[1, n_expert, 1]), [1, n_expert, n]);
                graph.mul(&product, &graph.get_rows(&of_tokens, ids))
            }
            None => product,
        };
        match &self.bias {
            Some(bias) => graph.add_id(&product, bias, ids),
            None => product,
        }
    }
}
