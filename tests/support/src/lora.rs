//! LoRA adapters with random weights.

use std::path::Path;

use crate::{Rng, gguf::GgufFile};

/// ggml's number of the type f32.
const F32: u32 = 0;

/// A random adapter, to be written as llama.cpp's converter writes one.
#[derive(Debug)]
pub struct RandomLora<'a> {
    pub architecture: &'a str,
    pub rank: usize,
    pub alpha: f32,
    pub seed: u64,
    /// How large what is added to a product is beside its input.
    pub gain: f32,
}

impl RandomLora<'_> {
    /// The adapter of these weights, each with its dimensions `[input width, output width, …]`.
    pub fn gguf(&self, weights: &[(String, Vec<usize>)]) -> GgufFile {
        let mut file = GgufFile::new();
        file.set("general.architecture", self.architecture).set("general.type", "adapter");
        file.set("adapter.type", "lora").set("adapter.lora.alpha", self.alpha);
        let mut rng = Rng::new(self.seed);
        let mut add = |name: String, dims: &[usize], deviation: f32| {
            let n: usize = dims.iter().product();
            let data = (0..n).flat_map(|_| (rng.normal() * deviation).to_le_bytes()).collect();
            let dims: Vec<u64> = dims.iter().map(|&n| n as u64).collect();
            file.add_tensor(&name, F32, &dims, data);
        };
        for (name, dims) in weights {
            let (n_in, n_out, experts) = (dims[0], dims[1], &dims[2..]);
            let (a, b) = (format!("{name}.lora_a"), format!("{name}.lora_b"));
            let deviation = |n: usize| self.gain.sqrt() / (n as f32).sqrt();
            // The first matrix of the table of embeddings is looked up in, as the table is.
            if name == "token_embd.weight" {
                add(a, &[self.rank, n_out], self.gain.sqrt());
                add(b, &[self.rank, n_in], deviation(self.rank));
            } else {
                add(a, &[&[n_in, self.rank], experts].concat(), deviation(n_in));
                add(b, &[&[self.rank, n_out], experts].concat(), deviation(self.rank));
            }
        }
        file
    }

    /// Writes [`RandomLora::gguf`].
    pub fn write(&self, weights: &[(String, Vec<usize>)], path: impl AsRef<Path>) {
        self.gguf(weights).write(path);
    }
}
