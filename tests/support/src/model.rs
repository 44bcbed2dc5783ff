//! Small models with random weights, for comparing logits with llama.cpp.

use std::path::Path;

use crate::{
    Rng, Vocabulary, WeightType,
    gguf::{GgufFile, Meta},
    weights::Weights,
};

/// How a model stretches RoPE.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    Linear { factor: f32 },
    Yarn { factor: f32, n_ctx_orig: u32 },
}

/// A model of architecture `llama` to be written with random weights. Change what the test is about:
///
/// ```
/// use simlayer_testkit::{RandomModel, WeightType};
///
/// let model = RandomModel { n_head_kv: 4, weight_type: WeightType::Q8_0, ..RandomModel::default() };
/// let file = model.gguf();
/// assert!(file.tensors.iter().any(|tensor| tensor.name == b"blk.1.attn_k.weight"));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RandomModel {
    pub seed: u64,
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    /// Size of keys, values and RoPE. Written as keys only when it is not n_embd / n_head.
    pub head_size: usize,
    pub n_ff: usize,
    /// How much wider than that each layer's feed-forward is than the one's before. Written as a list when it is not 0.
    pub n_ff_step: usize,
    pub n_ctx_train: u32,
    pub vocabulary: Vocabulary,
    pub rope_freq_base: f32,
    pub rope_scaling: Option<RopeScaling>,
    /// Adds a `rope_freqs` tensor, as LLaMA-3.1 has it.
    pub rope_freqs: bool,
    /// Leaves `output.weight` out: the embedding serves for it.
    pub tied: bool,
    /// Biases on Q, K and V.
    pub qkv_bias: bool,
    /// A bias on the attention's output.
    pub attn_out_bias: bool,
    /// Biases on the feed-forward's gate, up and down.
    pub ffn_bias: bool,
    /// Sets `attention.sliding_window`. llama.cpp ignores it in this architecture.
    pub sliding_window: Option<u32>,
    /// The type of all matrices; norms, biases and `rope_freqs` are F32.
    pub weight_type: WeightType,
}

impl Default for RandomModel {
    /// Two layers, grouped-query attention, and rows that every weight type can hold.
    fn default() -> RandomModel {
        RandomModel {
            seed: 1,
            n_layer: 2,
            n_embd: 256,
            n_head: 8,
            n_head_kv: 2,
            head_size: 32,
            n_ff: 512,
            n_ff_step: 0,
            n_ctx_train: 4096,
            vocabulary: Vocabulary::Spm,
            rope_freq_base: 10000.0,
            rope_scaling: None,
            rope_freqs: false,
            tied: false,
            qkv_bias: false,
            attn_out_bias: false,
            ffn_bias: false,
            sliding_window: None,
            weight_type: WeightType::F32,
        }
    }
}

impl RandomModel {
    /// A model of some 60 KiB that every part of the library can run: for tests that write thousands of files.
    pub fn tiny() -> RandomModel {
        RandomModel {
            n_layer: 1,
            n_embd: 32,
            n_head: 2,
            n_head_kv: 1,
            n_ff: 32,
            n_ctx_train: 256,
            weight_type: WeightType::Q8_0,
            ..RandomModel::default()
        }
    }

    /// One model for each variation of the architecture, with a name.
    pub fn variations() -> Vec<(&'static str, RandomModel)> {
        let base = RandomModel::default;
        vec![
            ("grouped-query attention", base()),
            ("multi-head attention", RandomModel { n_head_kv: 8, ..base() }),
            ("multi-query attention", RandomModel { n_head_kv: 1, ..base() }),
            ("tied output", RandomModel { tied: true, ..base() }),
            ("byte-pair vocabulary", RandomModel { vocabulary: Vocabulary::Bpe, ..base() }),
            ("larger head", RandomModel { head_size: 64, ..base() }),
            ("smaller head", RandomModel { head_size: 16, n_head: 16, n_head_kv: 4, n_embd: 512, ..base() }),
            ("biases", RandomModel { qkv_bias: true, attn_out_bias: true, ffn_bias: true, ..base() }),
            ("QKV biases only", RandomModel { qkv_bias: true, ..base() }),
            ("RoPE base", RandomModel { rope_freq_base: 500_000.0, ..base() }),
            ("linear RoPE", RandomModel { rope_scaling: Some(RopeScaling::Linear { factor: 4.0 }), ..base() }),
            ("YaRN", RandomModel { rope_scaling: Some(RopeScaling::Yarn { factor: 4.0, n_ctx_orig: 1024 }), ..base() }),
            ("RoPE frequency factors", RandomModel { rope_freqs: true, ..base() }),
        ]
    }

    /// The model as a file, not yet written.
    pub fn gguf(&self) -> GgufFile {
        let mut file = GgufFile::new();
        let n_vocab = self.add_metadata(&mut file);
        let weights =
            Weights { weight_type: self.weight_type, larger: None, rng: Rng::new(self.seed), file: &mut file };
        self.add_weights(weights, n_vocab);
        file
    }

    /// Writes the model.
    pub fn write(&self, path: impl AsRef<Path>) {
        self.gguf().write(path);
    }

    /// The number of tokens of its vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.vocabulary.add_to(&mut GgufFile::new())
    }

    fn add_metadata(&self, file: &mut GgufFile) -> usize {
        file.set("general.architecture", "llama");
        file.set("general.name", "random");
        file.set("llama.block_count", self.n_layer as u32);
        file.set("llama.context_length", self.n_ctx_train);
        file.set("llama.embedding_length", self.n_embd as u32);
        let widths = (0..self.n_layer).map(|layer| self.width(layer) as u32);
        file.set(
            "llama.feed_forward_length",
            if self.n_ff_step > 0 { Meta::array(widths) } else { Meta::U32(self.n_ff as u32) },
        );
        file.set("llama.attention.head_count", self.n_head as u32);
        file.set("llama.attention.head_count_kv", self.n_head_kv as u32);
        file.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
        file.set("llama.rope.dimension_count", self.head_size as u32);
        file.set("llama.rope.freq_base", self.rope_freq_base);
        if self.head_size * self.n_head != self.n_embd {
            file.set("llama.attention.key_length", self.head_size as u32);
            file.set("llama.attention.value_length", self.head_size as u32);
        }
        match self.rope_scaling {
            Some(RopeScaling::Linear { factor }) => {
                file.set("llama.rope.scaling.type", "linear");
                file.set("llama.rope.scaling.factor", factor);
            }
            Some(RopeScaling::Yarn { factor, n_ctx_orig }) => {
                file.set("llama.rope.scaling.type", "yarn");
                file.set("llama.rope.scaling.factor", factor);
                file.set("llama.rope.scaling.original_context_length", n_ctx_orig);
            }
            None => {}
        }
        if let Some(window) = self.sliding_window {
            file.set("llama.attention.sliding_window", window);
        }
        let n_vocab = self.vocabulary.add_to(file);
        file.set("llama.vocab_size", n_vocab as u32);
        n_vocab
    }
}

impl RandomModel {
    /// Of a layer's feed-forward.
    fn width(&self, layer: usize) -> usize {
        self.n_ff + layer * self.n_ff_step
    }

    /// Adds tensors whose sizes keep the network alive: activations of about 1 behind every norm, attention that is
    /// neither uniform nor one-hot, logits that vary by about 2.5.
    fn add_weights(&self, mut weights: Weights<'_>, n_vocab: usize) {
        let RandomModel { n_layer, n_embd, n_head, n_head_kv, head_size, .. } = *self;
        let (n_q, n_kv) = (n_head * head_size, n_head_kv * head_size);
        // The embedding's rows give logits of deviation 2.5 where they serve as output. What the layers add to the
        // residual stream is of the embedding's size, or larger when it is the output too: the token that was read
        // would always be the likeliest otherwise.
        let residual = if self.tied { 15.0 } else { 2.5 } / (n_embd as f32).sqrt();
        weights.matrix("token_embd", n_embd, n_vocab, 2.5);
        for layer in 0..n_layer {
            let name = |part: &str| format!("blk.{layer}.{part}");
            let n_ff = self.width(layer);
            weights.norm(&name("attn_norm"), n_embd);
            // Scores have deviation 1.6² ≈ 2.6 before the softmax.
            weights.matrix(&name("attn_q"), n_embd, n_q, 1.6);
            weights.matrix(&name("attn_k"), n_embd, n_kv, 1.6);
            weights.matrix(&name("attn_v"), n_embd, n_kv, 1.0);
            weights.matrix(&name("attn_output"), n_q, n_embd, 2.0 * residual);
            weights.norm(&name("ffn_norm"), n_embd);
            weights.matrix(&name("ffn_gate"), n_embd, n_ff, 1.0);
            weights.matrix(&name("ffn_up"), n_embd, n_ff, 1.0);
            weights.matrix(&name("ffn_down"), n_ff, n_embd, 2.0 * residual);
            if self.qkv_bias {
                weights.bias(&name("attn_q"), n_q, 0.5);
                weights.bias(&name("attn_k"), n_kv, 0.5);
                weights.bias(&name("attn_v"), n_kv, 0.5);
            }
            if self.attn_out_bias {
                weights.bias(&name("attn_output"), n_embd, 0.5 * residual);
            }
            if self.ffn_bias {
                weights.bias(&name("ffn_gate"), n_ff, 0.5);
                weights.bias(&name("ffn_up"), n_ff, 0.5);
                weights.bias(&name("ffn_down"), n_embd, 0.5 * residual);
            }
        }
        weights.norm("output_norm", n_embd);
        if !self.tied {
            weights.matrix("output", n_embd, n_vocab, 2.5);
        }
        if self.rope_freqs {
            // From 1 for the fastest pairs to 8 for the slowest.
            let n = head_size / 2;
            let factors: Vec<f32> = (0..n).map(|i| 1.0 + 7.0 * i as f32 / (n - 1).max(1) as f32).collect();
            weights.floats("rope_freqs.weight", &factors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_files() {
        let model = RandomModel::tiny();
        assert_eq!(model.gguf(), model.gguf());
        assert_ne!(model.gguf(), RandomModel { seed: 2, ..model }.gguf());
    }

    #[test]
    fn every_weight_type_can_be_written() {
        for weight_type in WeightType::ALL {
            let file = RandomModel { n_layer: 1, weight_type, ..RandomModel::default() }.gguf();
            let embedding = &file.tensors[0];
            assert_eq!(embedding.ty, weight_type.0);
            assert_eq!(embedding.data.len(), weight_type.bytes(256 * embedding.dims[1] as usize), "{weight_type:?}");
        }
    }

    #[test]
    fn head_size_is_written_when_it_is_unusual() {
        let file = RandomModel { head_size: 64, ..RandomModel::default() }.gguf();
        assert_eq!(file.get("llama.attention.key_length"), Some(&Meta::U32(64)));
        assert_eq!(RandomModel::default().gguf().get("llama.attention.key_length"), None);
    }
}
