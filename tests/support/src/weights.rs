//! Random weights of sensible size for the matrices, norms and biases of a model.

use crate::{Rng, WeightType, gguf::GgufFile, quantize};

/// Adds random tensors to a file.
pub(crate) struct Weights<'a> {
    /// The type of all matrices; norms, biases and other single rows are F32.
    pub weight_type: WeightType,
    pub rng: Rng,
    pub file: &'a mut GgufFile,
}

impl Weights<'_> {
    /// A matrix from `n_in` to `n_out` that gives results of deviation `gain` for inputs of deviation 1.
    pub fn matrix(&mut self, name: &str, n_in: usize, n_out: usize, gain: f32) {
        let deviation = gain / (n_in as f32).sqrt();
        let values: Vec<f32> = (0..n_in * n_out).map(|_| deviation * self.rng.normal()).collect();
        let ty = self.weight_type;
        let data = quantize(ty, &values, n_in);
        self.file.add_tensor(&format!("{name}.weight"), ty.0, &[n_in as u64, n_out as u64], data);
    }

    /// As [`Weights::matrix`], one for each expert, in a type of their own.
    pub fn experts(&mut self, name: &str, shape: [usize; 3], gain: f32, ty: WeightType) {
        let [n_in, n_out, n_expert] = shape;
        let deviation = gain / (n_in as f32).sqrt();
        let values: Vec<f32> = (0..n_in * n_out * n_expert).map(|_| deviation * self.rng.normal()).collect();
        let data = quantize(ty, &values, n_in);
        self.file.add_tensor(&format!("{name}.weight"), ty.0, &shape.map(|n| n as u64), data);
    }

    pub fn norm(&mut self, name: &str, n: usize) {
        self.norm_around(name, n, 1.0);
    }

    /// A norm whose rows have deviation `gain`.
    pub fn norm_around(&mut self, name: &str, n: usize, gain: f32) {
        let values: Vec<f32> = (0..n).map(|_| gain * (1.0 + 0.1 * self.rng.normal())).collect();
        self.floats(&format!("{name}.weight"), &values);
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
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.file.add_tensor(name, WeightType::F32.0, &[values.len() as u64], data);
    }
}
