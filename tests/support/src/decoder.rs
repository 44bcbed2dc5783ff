//! Random models of any architecture, put together part by part.

use std::{ops::Range, path::Path};

use crate::{
    Rng, Vocabulary, WeightType,
    gguf::{GgufFile, Meta},
    weights::Weights,
};

/// The sizes of a random model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub seed: u64,
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    /// Written as keys only when it is not n_embd / n_head.
    pub head_size: usize,
    /// Elements of a head's values; 0 for as many as its keys have.
    pub value_size: usize,
    pub n_ff: usize,
    /// Leaves `output.weight` out: the embedding serves for it.
    pub tied: bool,
    /// Tokens of the vocabulary; as few as there can be where that is more.
    pub n_vocab: usize,
    /// The type of all matrices but the experts'.
    pub weight_type: WeightType,
    /// Of the matrices that llama.cpp's mixtures of medium size, as Q4_K_M, give more bits.
    pub larger_type: Option<WeightType>,
    pub expert_type: WeightType,
    pub n_expert: usize,
    pub n_expert_used: usize,
    /// The deviation of what attention and feed-forward add to the residual stream, where a norm follows them.
    pub post_norm: f32,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            seed: 1,
            n_layer: 4,
            n_embd: 64,
            n_head: 4,
            n_head_kv: 2,
            head_size: 16,
            value_size: 0,
            n_ff: 96,
            tied: false,
            n_vocab: 0,
            weight_type: WeightType::F32,
            larger_type: None,
            expert_type: WeightType::F32,
            n_expert: 6,
            n_expert_used: 2,
            post_norm: 1.0,
        }
    }
}

impl Shape {
    /// One that differs from the default in everything.
    pub fn other() -> Shape {
        Shape {
            seed: 2,
            n_layer: 5,
            n_embd: 96,
            n_head: 6,
            n_head_kv: 6,
            head_size: 16,
            n_ff: 160,
            tied: true,
            n_expert: 5,
            n_expert_used: 3,
            post_norm: 2.0,
            ..Shape::default()
        }
    }
}

/// The sizes of latent attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latent {
    /// Elements of the latent vector.
    pub rank: usize,
    /// Those of the queries' own; 0 for none.
    pub q_rank: usize,
    /// Elements of a head's key without RoPE, and with.
    pub plain: usize,
    pub n_rot: usize,
    /// Elements of a head's values.
    pub value: usize,
    /// Whether the heads' matrices are apart, so that the cache holds the latent vector.
    pub absorbed: bool,
}

/// The sizes of state-space layers and delta nets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ssm {
    /// Tokens that the convolution spans.
    pub width: usize,
    /// Elements of a head.
    pub head: usize,
    pub heads: usize,
    /// Elements of the state for each of a head's; of a delta net a head's own.
    pub state: usize,
    /// Groups of heads that share what is read and written; of a delta net heads of keys.
    pub groups: usize,
}

impl Ssm {
    /// Elements of all heads.
    pub fn inner(self) -> usize {
        self.head * self.heads
    }
}

/// One layer's heads, where layers differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub size: usize,
    /// Whether keys and values are the layer's own: `attn_k` and `attn_v`.
    pub keys: bool,
    /// Whether values are made by a matrix of their own.
    pub values: bool,
}

/// A model being put together: [`RandomDecoder::new`] writes what all have, the test adds its architecture's own keys
/// and, for each layer, its parts.
///
/// Sizes of weights keep the network alive: activations of about 1 behind every norm, attention that is neither
/// uniform nor one-hot, logits that vary by about 2.5.
#[derive(Debug)]
pub struct RandomDecoder {
    pub architecture: &'static str,
    pub shape: Shape,
    pub n_vocab: usize,
    /// Whether the file says that it has experts.
    pub has_experts: bool,
    /// Deviation of the biases.
    bias: f32,
    file: GgufFile,
    rng: Rng,
}

impl RandomDecoder {
    pub fn new(architecture: &'static str, shape: Shape) -> RandomDecoder {
        let mut file = GgufFile::new();
        file.set("general.architecture", architecture);
        file.set("general.name", "random");
        let n_vocab = Vocabulary::Spm.add_padded_to(&mut file, shape.n_vocab);
        let (rng, has_experts) = (Rng::new(shape.seed), false);
        let mut model = RandomDecoder { architecture, shape, n_vocab, has_experts, bias: 0.5, file, rng };
        model.key("block_count", shape.n_layer as u32);
        model.key("context_length", 4096u32);
        model.key("embedding_length", shape.n_embd as u32);
        model.key("feed_forward_length", shape.n_ff as u32);
        model.key("attention.head_count", shape.n_head as u32);
        model.key("attention.head_count_kv", shape.n_head_kv as u32);
        model.key("attention.layer_norm_rms_epsilon", 1e-5f32);
        model.key("rope.freq_base", 50_000f32);
        model.key("vocab_size", n_vocab as u32);
        if shape.head_size * shape.n_head != shape.n_embd || shape.value_size > 0 {
            model.key("attention.key_length", shape.head_size as u32);
            model.key("attention.value_length", model.value_size() as u32);
        }
        model.weights(|w| {
            w.matrix("token_embd", shape.n_embd, n_vocab, 2.5);
            w.norm(if architecture.starts_with("lfm2") { "token_embd_norm" } else { "output_norm" }, shape.n_embd);
            if !shape.tied {
                w.matrix("output", shape.n_embd, n_vocab, 2.5);
            }
        });
        model
    }

    /// Sets a key of the architecture.
    pub fn key(&mut self, name: &str, value: impl Into<Meta>) {
        self.file.set(&format!("{}.{name}", self.architecture), value);
    }

    /// Removes a key of the architecture.
    pub fn remove_key(&mut self, name: &str) {
        self.file.remove(&format!("{}.{name}", self.architecture));
    }

    pub fn layers(&self) -> Range<usize> {
        0..self.shape.n_layer
    }

    pub fn q_width(&self) -> usize {
        self.shape.n_head * self.shape.head_size
    }

    /// Elements of a head's values.
    pub fn value_size(&self) -> usize {
        if self.shape.value_size > 0 { self.shape.value_size } else { self.shape.head_size }
    }

    pub fn kv_width(&self) -> usize {
        self.shape.n_head_kv * self.shape.head_size
    }

    /// What the layers add to the residual stream is of the embedding's size, or larger when it is the output too: the
    /// token that was read would always be the likeliest otherwise.
    fn residual(&self) -> f32 {
        2.0 * if self.shape.tied { 15.0 } else { 2.5 } / (self.shape.n_embd as f32).sqrt()
    }

    fn weights(&mut self, add: impl FnOnce(&mut Weights<'_>)) {
        let Shape { weight_type, larger_type, n_layer, .. } = self.shape;
        let larger = larger_type.map(|ty| (ty, n_layer));
        let mut weights = Weights { weight_type, larger, rng: self.rng.clone(), file: &mut self.file };
        add(&mut weights);
        self.rng = weights.rng;
    }

    /// A norm of the layer's hidden states, in front of attention or feed-forward.
    pub fn norm(&mut self, layer: usize, part: &str) {
        let n = self.shape.n_embd;
        self.weights(|w| w.norm(&format!("blk.{layer}.{part}"), n));
    }

    /// Any other row of weights around 1, under a name that does not end as weights' do.
    pub fn bare_row(&mut self, name: &str, n: usize) {
        self.weights(|w| {
            let values: Vec<f32> = (0..n).map(|_| 1.0 + 0.1 * w.rng.normal()).collect();
            w.floats(name, &values);
        });
    }

    /// As [`RandomDecoder::bare_row`], around another value.
    pub fn bare_row_around(&mut self, name: &str, n: usize, around: f32) {
        self.weights(|w| {
            let values: Vec<f32> = (0..n).map(|_| around * (1.0 + 0.1 * w.rng.normal())).collect();
            w.floats(name, &values);
        });
    }

    /// A norm of what attention or feed-forward gives.
    pub fn post_norm(&mut self, layer: usize, part: &str) {
        let Shape { n_embd, post_norm, .. } = self.shape;
        self.weights(|w| w.norm_around(&format!("blk.{layer}.{part}"), n_embd, post_norm));
    }

    /// `attn_norm` and `ffn_norm`.
    pub fn pre_norms(&mut self, layer: usize) {
        self.norm(layer, "attn_norm");
        self.norm(layer, "ffn_norm");
    }

    /// `post_attention_norm` and `post_ffw_norm`.
    pub fn post_norms(&mut self, layer: usize) {
        self.post_norm(layer, "post_attention_norm");
        self.post_norm(layer, "post_ffw_norm");
    }

    /// `attn_q`, `attn_k`, `attn_v`, `attn_output`.
    pub fn attention(&mut self, layer: usize) {
        self.attention_of(layer, self.shape.n_head);
    }

    /// As [`RandomDecoder::attention`], of another number of query heads.
    pub fn attention_of(&mut self, layer: usize, n_head: usize) {
        let (n_embd, n_q) = (self.shape.n_embd, n_head * self.shape.head_size);
        let (n_kv, residual) = (self.kv_width(), self.residual());
        let (n_values, n_attended) = (self.value_size() * self.shape.n_head_kv, self.value_size() * n_head);
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        self.weights(|w| {
            // Scores have deviation 1.6² ≈ 2.6 before the softmax.
            w.matrix(&name("q"), n_embd, n_q, 1.6);
            w.matrix(&name("k"), n_embd, n_kv, 1.6);
            w.matrix(&name("v"), n_embd, n_values, 1.0);
            w.matrix(&name("output"), n_attended, n_embd, residual);
        });
    }

    /// The keys of latent attention: its cache has one head where it is `absorbed`, else all.
    pub fn latent_keys(&mut self, sizes: Latent) {
        let Latent { rank, q_rank, plain, n_rot, value, absorbed } = sizes;
        self.key("attention.kv_lora_rank", rank as u32);
        self.key("attention.q_lora_rank", q_rank as u32);
        self.key("rope.dimension_count", n_rot as u32);
        if absorbed {
            self.key("attention.head_count_kv", 1u32);
            self.key("attention.key_length", (rank + n_rot) as u32);
            self.key("attention.value_length", rank as u32);
            self.key("attention.key_length_mla", (plain + n_rot) as u32);
            self.key("attention.value_length_mla", value as u32);
        } else {
            self.key("attention.head_count_kv", self.shape.n_head as u32);
            self.key("attention.key_length", (plain + n_rot) as u32);
            self.key("attention.value_length", value as u32);
        }
    }

    /// `attn_q` (or `attn_q_a` and `attn_q_b`), `attn_kv_a_mqa`, `attn_k_b` and `attn_v_b` (or `attn_kv_b`), `attn_output`, and norms.
    pub fn latent_attention(&mut self, layer: usize, sizes: Latent) {
        let (Shape { n_embd, n_head, weight_type, .. }, residual) = (self.shape, self.residual());
        let Latent { rank, q_rank, plain, n_rot, value, absorbed } = sizes;
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        self.weights(|w| {
            if q_rank > 0 {
                w.matrix(&name("q_a"), n_embd, q_rank, 1.0);
                w.norm(&name("q_a_norm"), q_rank);
                w.matrix(&name("q_b"), q_rank, n_head * (plain + n_rot), 1.6);
            } else {
                w.matrix(&name("q"), n_embd, n_head * (plain + n_rot), 1.6);
            }
            w.matrix(&name("kv_a_mqa"), n_embd, rank + n_rot, 1.6);
            w.norm(&name("kv_a_norm"), rank);
            if absorbed {
                // So that keys would have deviation 1.6.
                w.experts(&name("k_b"), [plain, rank, n_head], 1.6 * (plain as f32 / rank as f32).sqrt(), weight_type);
                w.experts(&name("v_b"), [rank, value, n_head], 1.0, weight_type);
            } else {
                w.matrix(&name("kv_b"), rank, n_head * (plain + value), 1.6);
            }
            w.matrix(&name("output"), n_head * value, n_embd, residual);
        });
    }

    /// As [`RandomDecoder::attention`], each head's queries followed by a gate of its output, with norms on each head.
    pub fn gated_attention(&mut self, layer: usize) {
        let (n_embd, n_q, n_kv, residual) = (self.shape.n_embd, self.q_width(), self.kv_width(), self.residual());
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        self.weights(|w| {
            w.matrix(&name("q"), n_embd, 2 * n_q, 1.6);
            w.matrix(&name("k"), n_embd, n_kv, 1.6);
            w.matrix(&name("v"), n_embd, n_kv, 1.0);
            // The gate is a half on average.
            w.matrix(&name("output"), n_q, n_embd, 2.0 * residual);
        });
        self.head_norms(layer);
    }

    /// As [`RandomDecoder::attention`], of other heads, with norms on each of queries and keys, whose products are attention's
    /// as they are.
    pub fn unscaled_attention(&mut self, layer: usize, heads: Heads) {
        let Heads { n_head, n_head_kv, size, keys, values } = heads;
        let (n_embd, residual) = (self.shape.n_embd, self.residual());
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        // Scores have deviation 2.6, as elsewhere.
        let gain = (2.6 / (size as f32).sqrt()).sqrt();
        self.weights(|w| {
            w.matrix(&name("q"), n_embd, n_head * size, 1.0);
            w.norm_around(&name("q_norm"), size, gain);
            if keys {
                w.matrix(&name("k"), n_embd, n_head_kv * size, 1.0);
                w.norm_around(&name("k_norm"), size, gain);
            }
            if keys && values {
                w.matrix(&name("v"), n_embd, n_head_kv * size, 1.0);
            }
            w.matrix(&name("output"), n_head * size, n_embd, residual);
        });
    }

    /// Embeddings for each layer, rows of `width`: the table, the projection and its norm.
    pub fn layer_embeddings(&mut self, width: usize) {
        let (Shape { n_embd, n_layer, .. }, n_vocab) = (self.shape, self.n_vocab);
        self.weights(|w| {
            // Elements of about 1 once they are multiplied by the root of the width.
            w.matrix("per_layer_token_embd", width * n_layer, n_vocab, (n_layer as f32).sqrt());
            w.matrix("per_layer_model_proj", n_embd, width * n_layer, 1.0);
            w.norm("per_layer_proj_norm", width);
        });
    }

    /// What a layer makes of its own embedding: `inp_gate`, `proj`, `post_norm`.
    pub fn own_input(&mut self, layer: usize, width: usize) {
        let n_embd = self.shape.n_embd;
        self.weights(|w| {
            w.matrix(&format!("blk.{layer}.inp_gate"), n_embd, width, 1.0);
            w.matrix(&format!("blk.{layer}.proj"), width, n_embd, 1.0);
        });
        self.post_norm(layer, "post_norm");
    }

    /// What AltUp has besides layers: the ways to `streams` hidden states and back.
    pub fn altup(&mut self, streams: usize) {
        let n_embd = self.shape.n_embd;
        self.weights(|w| {
            for name in ["altup_proj", "altup_unembd_proj"] {
                w.experts(name, [n_embd, n_embd, streams - 1], 1.0, WeightType::F32);
            }
        });
    }

    /// AltUp of a layer: router, coefficients, and the scale of what goes to the layer's own input.
    pub fn altup_layer(&mut self, layer: usize, streams: usize) {
        let n_embd = self.shape.n_embd;
        let name = |part: &str| format!("blk.{layer}.altup_{part}");
        self.weights(|w| {
            // The router's input is divided by the width.
            w.matrix(&name("router"), n_embd, streams, n_embd as f32);
            w.norm(&name("router_norm"), n_embd);
            w.matrix(&name("predict_coef"), streams, streams * streams, 0.1);
            w.matrix(&name("correct_coef"), streams, streams, 0.3);
            w.norm(&name("correct_scale"), n_embd);
        });
    }

    /// A narrow product beside the attention: `laurel_l`, `laurel_r`, `laurel_post_norm`.
    pub fn laurel(&mut self, layer: usize, rank: usize) {
        let n_embd = self.shape.n_embd;
        self.weights(|w| {
            w.matrix(&format!("blk.{layer}.laurel_l"), n_embd, rank, 1.0);
            w.matrix(&format!("blk.{layer}.laurel_r"), rank, n_embd, 1.0);
        });
        self.norm(layer, "laurel_post_norm");
    }

    /// A short convolution over `width` tokens: `shortconv.in_proj`, `shortconv.conv`, `shortconv.out_proj`.
    pub fn short_conv(&mut self, layer: usize, width: usize) {
        let (n_embd, residual) = (self.shape.n_embd, self.residual());
        let name = |part: &str| format!("blk.{layer}.shortconv.{part}");
        self.weights(|w| {
            w.matrix(&name("in_proj"), n_embd, 3 * n_embd, 1.0);
            w.kernels(&name("conv"), width, n_embd);
            w.matrix(&name("out_proj"), n_embd, n_embd, residual);
        });
    }

    /// The keys of state-space layers and delta nets.
    pub fn ssm_keys(&mut self, sizes: Ssm) {
        self.key("ssm.conv_kernel", sizes.width as u32);
        self.key("ssm.inner_size", sizes.inner() as u32);
        self.key("ssm.state_size", sizes.state as u32);
        self.key("ssm.time_step_rank", sizes.heads as u32);
        self.key("ssm.group_count", sizes.groups as u32);
    }

    /// A gated delta net; `joint`: its projections in two matrices, as the first Qwen3-Next has them.
    pub fn delta_net(&mut self, layer: usize, sizes: Ssm, joint: bool) {
        let (n_embd, residual) = (self.shape.n_embd, self.residual());
        let Ssm { width, state, heads, groups, .. } = sizes;
        let (keys, values) = (state * groups, state * heads);
        let name = |part: &str| format!("blk.{layer}.{part}");
        self.weights(|w| {
            if joint {
                w.matrix(&name("ssm_in"), n_embd, 2 * keys + 2 * values, 1.0);
            } else {
                w.matrix(&name("attn_qkv"), n_embd, 2 * keys + values, 1.0);
                w.matrix(&name("attn_gate"), n_embd, values, 1.0);
            }
            w.kernels(&name("ssm_conv1d"), width, 2 * keys + values);
            w.bias(&name("ssm_dt"), heads, 1.0);
            // What is written fades after some ten tokens in one head, after some hundred in another.
            let decays: Vec<f32> = (0..heads).map(|head| -0.2 / (1.0 + 5.0 * head as f32)).collect();
            w.floats(&name("ssm_a"), &decays);
            w.norm(&name("ssm_norm"), state);
            w.matrix(&name("ssm_out"), values, n_embd, residual);
        });
    }

    /// The rates of a delta net: `ssm_beta` and `ssm_alpha`, or `ssm_ba` for both.
    pub fn delta_rates(&mut self, layer: usize, sizes: Ssm, joint: bool) {
        let n_embd = self.shape.n_embd;
        let name = |part: &str| format!("blk.{layer}.ssm_{part}");
        self.weights(|w| {
            if joint {
                w.matrix(&name("ba"), n_embd, 2 * sizes.heads, 1.0);
            } else {
                w.matrix(&name("beta"), n_embd, sizes.heads, 1.0);
                w.matrix(&name("alpha"), n_embd, sizes.heads, 1.0);
            }
        });
    }

    /// A Mamba-2 layer; its norm is optional.
    pub fn mamba2(&mut self, layer: usize, sizes: Ssm, has_norm: bool) {
        let (n_embd, residual) = (self.shape.n_embd, self.residual());
        let Ssm { width, state, heads, groups, .. } = sizes;
        let (inner, channels) = (sizes.inner(), sizes.inner() + 2 * groups * state);
        let name = |part: &str| format!("blk.{layer}.ssm_{part}");
        self.weights(|w| {
            w.matrix(&name("in"), n_embd, inner + channels + heads, 1.0);
            w.kernels(&name("conv1d"), width, channels);
            w.bias(&name("conv1d"), channels, 0.2);
            w.bias(&name("dt"), heads, 1.0);
            let decays: Vec<f32> = (0..heads).map(|head| -0.5 / (1.0 + 5.0 * head as f32)).collect();
            w.floats_of_shape(&name("a"), &[1, heads], &decays);
            let shares: Vec<f32> = (0..heads).map(|_| 1.0 + 0.3 * w.rng.normal()).collect();
            w.floats_of_shape(&name("d"), &[1, heads], &shares);
            if has_norm {
                let norms: Vec<f32> = (0..inner).map(|_| 1.0 + 0.1 * w.rng.normal()).collect();
                w.floats_of_shape(&format!("{}.weight", name("norm")), &[inner / groups, groups], &norms);
            }
            w.matrix(&name("out"), inner, n_embd, residual);
        });
    }

    /// `attn_qkv`, `attn_output`.
    pub fn fused_attention(&mut self, layer: usize) {
        let (n_embd, n_q, n_kv, residual) = (self.shape.n_embd, self.q_width(), self.kv_width(), self.residual());
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        self.weights(|w| {
            w.matrix(&name("qkv"), n_embd, n_q + 2 * n_kv, 1.6);
            w.matrix(&name("output"), n_q, n_embd, residual);
        });
    }

    /// Biases of `attn_q`, `attn_k` and `attn_v`.
    pub fn qkv_biases(&mut self, layer: usize) {
        let (n_q, n_kv, bias) = (self.q_width(), self.kv_width(), self.bias);
        self.weights(|w| {
            w.bias(&format!("blk.{layer}.attn_q"), n_q, bias);
            w.bias(&format!("blk.{layer}.attn_k"), n_kv, bias);
            w.bias(&format!("blk.{layer}.attn_v"), n_kv, bias);
        });
    }

    /// A bias of any product.
    pub fn bias(&mut self, name: &str, n: usize) {
        let bias = self.bias;
        self.weights(|w| w.bias(name, n, bias));
    }

    /// `attn_q_norm` and `attn_k_norm` over each head, or over rows of other widths.
    pub fn qk_norms(&mut self, layer: usize, widths: [usize; 2]) {
        self.weights(|w| {
            w.norm_around(&format!("blk.{layer}.attn_q_norm"), widths[0], 1.6);
            w.norm_around(&format!("blk.{layer}.attn_k_norm"), widths[1], 1.6);
        });
    }

    pub fn head_norms(&mut self, layer: usize) {
        self.qk_norms(layer, [self.shape.head_size; 2]);
    }

    /// `attn_q_norm` and `attn_k_norm` with weights of each head's own.
    pub fn norms_of_each_head(&mut self, layer: usize) {
        let Shape { head_size, n_head, n_head_kv, .. } = self.shape;
        self.weights(|w| {
            w.norm_rows(&format!("blk.{layer}.attn_q_norm"), [head_size, n_head], 1.6);
            w.norm_rows(&format!("blk.{layer}.attn_k_norm"), [head_size, n_head_kv], 1.6);
        });
    }

    /// `attn_gate`, whose sigmoid weighs what attention gives: each element, or each head.
    pub fn attention_gate(&mut self, layer: usize, n_weights: usize) {
        let n_embd = self.shape.n_embd;
        self.weights(|w| w.matrix(&format!("blk.{layer}.attn_gate"), n_embd, n_weights, 2.0));
    }

    /// A layer that predicts a further token, beyond those that are run: its norms of the two inputs and their product.
    /// The rest of it is the test's to add.
    pub fn next_token_layer(&mut self) -> usize {
        let Shape { n_layer, n_embd, .. } = self.shape;
        self.key("block_count", n_layer as u32 + 1);
        self.key("nextn_predict_layers", 1u32);
        self.matrix(&format!("blk.{n_layer}.nextn.eh_proj"), 2 * n_embd, n_embd);
        self.row(&format!("blk.{n_layer}.nextn.enorm"), n_embd);
        self.row(&format!("blk.{n_layer}.nextn.hnorm"), n_embd);
        n_layer
    }

    /// The key of norms that take the mean off first, in place of the other.
    pub fn centred_norms(&mut self) {
        self.remove_key("attention.layer_norm_rms_epsilon");
        self.key("attention.layer_norm_epsilon", 1e-5f32);
    }

    /// A bias of a layer's norm.
    pub fn norm_bias(&mut self, layer: usize, part: &str) {
        let n = self.shape.n_embd;
        self.bias(&format!("blk.{layer}.{part}"), n);
    }

    /// Takes a tensor out again.
    pub fn remove_tensor(&mut self, name: &str) {
        self.file.remove_tensor(name);
    }

    /// A key without the architecture's name in front.
    pub fn plain_key(&mut self, name: &str, value: impl Into<Meta>) {
        self.file.set(name, value);
    }

    /// A learned sink for each head.
    pub fn sinks(&mut self, layer: usize) {
        let n_head = self.shape.n_head;
        // As large as the largest products, so that they matter.
        self.weights(|w| {
            let logits: Vec<f32> = (0..n_head).map(|_| 5.0 + 2.0 * w.rng.normal()).collect();
            w.floats(&format!("blk.{layer}.attn_sinks.weight"), &logits);
        });
    }

    /// `ffn_gate`, `ffn_up`, `ffn_down`.
    pub fn gated(&mut self, layer: usize) {
        self.gated_of(layer, self.shape.n_ff);
    }

    /// As [`RandomDecoder::gated`], of another width.
    pub fn gated_of(&mut self, layer: usize, n_ff: usize) {
        self.gated_named(layer, "", n_ff);
    }

    fn gated_named(&mut self, layer: usize, suffix: &str, n_ff: usize) {
        let (n_embd, residual) = (self.shape.n_embd, self.residual());
        let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}");
        self.weights(|w| {
            w.matrix(&name("gate"), n_embd, n_ff, 1.0);
            w.matrix(&name("up"), n_embd, n_ff, 1.0);
            w.matrix(&name("down"), n_ff, n_embd, residual);
        });
    }

    /// `ffn_up` and `ffn_down` without a gate.
    pub fn plain(&mut self, layer: usize) {
        self.plain_named(layer, "", self.shape.n_ff);
    }

    /// As [`RandomDecoder::plain`] for names that end in `suffix`.
    pub fn plain_named(&mut self, layer: usize, suffix: &str, n_ff: usize) {
        let (n_embd, residual) = (self.shape.n_embd, self.residual());
        self.weights(|w| {
            w.matrix(&format!("blk.{layer}.ffn_up{suffix}"), n_embd, n_ff, 1.0);
            w.matrix(&format!("blk.{layer}.ffn_down{suffix}"), n_ff, n_embd, residual);
        });
    }

    /// A router and experts without gates, of inputs and outputs `n_in` wide.
    pub fn plain_experts(&mut self, layer: usize, n_in: usize, n_ff: usize) {
        let (Shape { n_embd, n_expert, expert_type, .. }, residual) = (self.shape, self.residual());
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        self.weights(|w| {
            w.experts(&name("up_exps"), [n_in, n_ff, n_expert], 1.0, expert_type);
            w.experts(&name("down_exps"), [n_ff, n_in, n_expert], residual, expert_type);
            (w.weight_type, w.larger) = (WeightType::F32, None);
            w.matrix(&name("gate_inp"), n_embd, n_expert, 1.0);
        });
    }

    /// `ffn_up` with the gate in its first half, `ffn_down`.
    pub fn fused_gated(&mut self, layer: usize) {
        let (Shape { n_embd, n_ff, .. }, residual) = (self.shape, self.residual());
        self.weights(|w| {
            w.matrix(&format!("blk.{layer}.ffn_up"), n_embd, 2 * n_ff, 1.0);
            w.matrix(&format!("blk.{layer}.ffn_down"), n_ff, n_embd, residual);
        });
    }

    /// The keys of a mixture of experts.
    pub fn expert_keys(&mut self) {
        self.has_experts = true;
        self.key("expert_count", self.shape.n_expert as u32);
        self.key("expert_used_count", self.shape.n_expert_used as u32);
    }

    /// `ffn_gate_inp` and the experts' `ffn_gate_exps`, `ffn_up_exps`, `ffn_down_exps` of width `n_ff`.
    pub fn experts(&mut self, layer: usize, n_ff: usize) {
        let (Shape { n_embd, n_expert, expert_type, .. }, residual) = (self.shape, self.residual());
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        self.weights(|w| {
            w.experts(&name("gate_exps"), [n_embd, n_ff, n_expert], 1.0, expert_type);
            w.experts(&name("up_exps"), [n_embd, n_ff, n_expert], 1.0, expert_type);
            w.experts(&name("down_exps"), [n_ff, n_embd, n_expert], residual, expert_type);
            // A router is never quantised.
            (w.weight_type, w.larger) = (WeightType::F32, None);
            w.matrix(&name("gate_inp"), n_embd, n_expert, 1.0);
        });
    }

    /// As [`RandomDecoder::experts`], the gates in the first half of `ffn_gate_up_exps`.
    pub fn fused_experts(&mut self, layer: usize, n_ff: usize) {
        let (Shape { n_embd, n_expert, expert_type, .. }, residual) = (self.shape, self.residual());
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        self.weights(|w| {
            w.experts(&name("gate_up_exps"), [n_embd, 2 * n_ff, n_expert], 1.0, expert_type);
            w.experts(&name("down_exps"), [n_ff, n_embd, n_expert], residual, expert_type);
            (w.weight_type, w.larger) = (WeightType::F32, None);
            w.matrix(&name("gate_inp"), n_embd, n_expert, 1.0);
        });
    }

    /// `exp_probs_b`: what is added to an expert's score for the choice alone, as large as scores differ.
    pub fn selection_bias(&mut self, layer: usize) {
        let n_expert = self.shape.n_expert;
        self.weights(|w| w.bias(&format!("blk.{layer}.exp_probs_b"), n_expert, 0.2));
    }

    /// Biases of the router and the experts.
    pub fn expert_biases(&mut self, layer: usize, n_ff: usize) {
        let (Shape { n_embd, n_expert, .. }, bias) = (self.shape, self.bias);
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        self.weights(|w| {
            w.bias(&name("gate_inp"), n_expert, bias);
            w.expert_biases(&name("gate_exps"), n_ff, n_expert, bias);
            w.expert_biases(&name("up_exps"), n_ff, n_expert, bias);
            w.expert_biases(&name("down_exps"), n_embd, n_expert, bias);
        });
    }

    /// A shared expert of width `n_ff`; with `gate` its gate `ffn_gate_inp_shexp`.
    pub fn shared_expert(&mut self, layer: usize, n_ff: usize, gate: bool) {
        self.gated_named(layer, "_shexp", n_ff);
        let n_embd = self.shape.n_embd;
        if gate {
            self.weights(|w| {
                let values: Vec<f32> = (0..n_embd).map(|_| w.rng.normal() / (n_embd as f32).sqrt()).collect();
                w.floats(&format!("blk.{layer}.ffn_gate_inp_shexp.weight"), &values);
            });
        }
    }

    /// Factors from 1 for the fastest pairs of RoPE to `last` for the slowest, under any name.
    pub fn rope_factors(&mut self, name: &str, n_rot: usize, last: f32) {
        let n = n_rot / 2;
        let factor = |i: usize| 1.0 + (last - 1.0) * i as f32 / (n - 1).max(1) as f32;
        let factors: Vec<f32> = (0..n).map(factor).collect();
        self.weights(|w| w.floats(name, &factors));
    }

    /// Any other matrix.
    pub fn matrix(&mut self, name: &str, n_in: usize, n_out: usize) {
        self.weights(|w| w.matrix(name, n_in, n_out, 1.0));
    }

    /// Any other row of weights around 1.
    pub fn row(&mut self, name: &str, n: usize) {
        self.weights(|w| w.norm(name, n));
    }

    pub fn gguf(&self) -> &GgufFile {
        &self.file
    }

    /// Writes the model.
    pub fn write(&self, path: impl AsRef<Path>) {
        self.file.write(path);
    }
}
