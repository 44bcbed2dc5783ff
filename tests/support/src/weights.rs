//! Random weights of sensible size for the matrices, norms and biases of a model.

use crate::{Rng, WeightType, gguf::GgufFile, quantize};

/// Elements of a matrix that are random; larger ones repeat their first rows, which is quickly written.
const RANDOM: usize = 1 << 20;

/// Adds random tensors to a file.
pub(crate) struct Weights<'a> {
    /// The type of all matrices; norms, biases and other single rows are F32.
    pub weight_type: WeightType,
    /// The type of those that [`has_more_bits`], and the number of layers.
    pub larger: Option<(WeightType, usize)>,
    pub rng: Rng,
    pub file: &'a mut GgufFile,
}

/// Whether a mixture like Q4_K_M gives this matrix more bits: the output, and, where it counts most, values and what the
/// feed-forward gives (`use_more_bits` in llama-quant.cpp). The embedding, which is the output where none is written, has
/// them in any case.
fn has_more_bits(name: &str, n_layer: usize) -> bool {
    let Some((layer, part)) = name.strip_prefix("blk.").and_then(|name| name.split_once('.')) else {
        return matches!(name, "output" | "token_embd");
    };
    let layer: usize = layer.parse().expect("a layer's number");
    let is_first_or_last = layer < n_layer / 8 || layer >= 7 * n_layer / 8;
    (part == "attn_v" || part.starts_with("ffn_down")) && (is_first_or_last || (layer - n_layer / 8) % 3 == 2)
}

impl Weights<'_> {
    /// A matrix from `n_in` to `n_out` that gives results of deviation `gain` for inputs of deviation 1.
    pub fn matrix(&mut self, name: &str, n_in: usize, n_out: usize, gain: f32) {
        self.tensor(name, &[n_in, n_out], gain, self.weight_type);
    }

    /// As [`Weights::matrix`], one for each expert, in a type of their own.
    pub fn experts(&mut self, name: &str, shape: [usize; 3], gain: f32, ty: WeightType) {
        self.tensor(name, &shape, gain, ty);
    }

    fn tensor(&mut self, name: &str, shape: &[usize], gain: f32, ty: WeightType) {
        let ty = self.larger.filter(|&(_, n_layer)| has_more_bits(name, n_layer)).map_or(ty, |(larger, _)| larger);
        let (n_in, n): (usize, usize) = (shape[0], shape.iter().product());
        let n_random = n.min(RANDOM.next_multiple_of(n_in));
        let deviation = gain / (n_in as f32).sqrt();
        let values: Vec<f32> = (0..n_random).map(|_| deviation * self.rng.normal()).collect();
        let mut data = quantize(ty, &values, n_in);
        data.reserve_exact(ty.bytes(n) - data.len());
        while data.len() < ty.bytes(n) {
            let more = data.len().min(ty.bytes(n) - data.len());
            data.extend_from_within(..more);
        }
        let dims: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        self.file.add_tensor(&format!("{name}.weight"), ty.0, &dims, data);
    }

    pub fn norm(&mut self, name: &str, n: usize) {
        self.norm_around(name, n, 1.0);
    }

    /// A norm whose rows have deviation `gain`.
    pub fn norm_around(&mut self, name: &str, n: usize, gain: f32) {
        let values: Vec<f32> = (0..n).map(|_| gain * (1.0 + 0.1 * self.rng.normal())).collect();
        self.floats(&format!("{name}.weight"), &values);
    }

    /// Several norms' weights in one tensor, a row for each.
    pub fn norm_rows(&mut self, name: &str, shape: [usize; 2], gain: f32) {
        let values = (0..shape[0] * shape[1]).map(|_| gain * (1.0 + 0.1 * self.rng.normal()));
        let data = values.flat_map(f32::to_le_bytes).collect();
        self.file.add_tensor(&format!("{name}.weight"), WeightType::F32.0, &shape.map(|n| n as u64), data);
    }

    pub fn bias(&mut self, name: &str, n: usize, deviation: f32) {
        let values: Vec<f32> = (0..n).map(|_| deviation * self.rng.normal()).collect();
        self.floats(&format!("{name}.bias"), &values);
    }

    /// A row of biases for each expert.
    pub fn expert_biases(&mut self, name: &str, n: usize, n_expert: usize, deviation: f32) {
        let values: Vec<f32> = (0..n * n_expert).map(|_| deviation * self.rng.normal()).collect();
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.file.add_tensor(&format!("{name}.bias"), WeightType::F32.0, &[n as u64, n_expert as u64], data);
    }

    pub fn floats(&mut self, name: &str, values: &[f32]) {
        self.floats_of_shape(name, &[values.len()], values);
    }

    /// Any tensor in f32.
    pub fn floats_of_shape(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let dims: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        self.file.add_tensor(name, WeightType::F32.0, &dims, data);
    }

    /// The kernels of a convolution over `width` tokens, one for each channel.
    pub fn kernels(&mut self, name: &str, width: usize, channels: usize) {
        let deviation = 1.5 / (width as f32).sqrt();
        let values: Vec<f32> = (0..width * channels).map(|_| deviation * self.rng.normal()).collect();
        self.floats_of_shape(&format!("{name}.weight"), &[width, channels], &values);
    }
}
