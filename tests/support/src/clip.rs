//! A random model that sees pictures, for another model to hear of: what llama.cpp's `--mmproj` takes.

use std::path::Path;

use crate::{
    Rng,
    gguf::{GgufFile, Meta},
};

/// ggml's number of the type f32.
const F32: u32 = 0;

/// A CLIP with LLaVA's projector (`mlp`): square pictures in square patches, each a row of embedding.
#[derive(Debug, Clone, Copy)]
pub struct RandomClip {
    /// Elements of a row: what the other model has for a token.
    pub n_embd_out: usize,
    pub n_embd: usize,
    pub n_head: usize,
    pub n_ff: usize,
    pub n_layer: usize,
    /// Picture elements of a side, of the picture and of a patch.
    pub image_size: usize,
    pub patch_size: usize,
    /// How large the elements of a row are.
    pub gain: f32,
    pub seed: u64,
}

impl RandomClip {
    /// The model as a file.
    pub fn gguf(&self) -> GgufFile {
        let RandomClip { n_embd_out, n_embd, n_head, n_ff, n_layer, image_size, patch_size, gain, seed } = *self;
        let mut file = GgufFile::new();
        file.set("general.architecture", "clip").set("clip.projector_type", "mlp");
        file.set("clip.has_vision_encoder", true).set("clip.use_gelu", true);
        for (name, value) in [
            ("embedding_length", n_embd),
            ("attention.head_count", n_head),
            ("feed_forward_length", n_ff),
            ("block_count", n_layer),
            ("projection_dim", n_embd_out),
            ("image_size", image_size),
            ("patch_size", patch_size),
        ] {
            file.set(&format!("clip.vision.{name}"), value as u32);
        }
        file.set("clip.vision.attention.layer_norm_epsilon", 1e-5f32);
        for name in ["image_mean", "image_std"] {
            file.set(&format!("clip.vision.{name}"), Meta::array([0.5f32; 3]));
        }
        let mut rng = Rng::new(seed);
        let mut add = |name: &str, dims: &[usize], around: f32, deviation: f32| {
            let n: usize = dims.iter().product();
            let data = (0..n).flat_map(|_| (around + rng.normal() * deviation).to_le_bytes()).collect();
            let dims: Vec<u64> = dims.iter().map(|&n| n as u64).collect();
            file.add_tensor(name, F32, &dims, data);
        };
        let root = |n: usize| 1.0 / (n as f32).sqrt();
        let n_patch = patch_size * patch_size * 3;
        add("v.patch_embd.weight", &[patch_size, patch_size, 3, n_embd], 0.0, root(n_patch));
        add("v.position_embd.weight", &[n_embd, (image_size / patch_size).pow(2)], 0.0, 1.0);
        for layer in 0..n_layer {
            let name = |part: &str| format!("v.blk.{layer}.{part}");
            for part in ["attn_q", "attn_k", "attn_v", "attn_out"] {
                add(&name(&format!("{part}.weight")), &[n_embd, n_embd], 0.0, root(n_embd));
            }
            add(&name("ffn_up.weight"), &[n_embd, n_ff], 0.0, root(n_embd));
            add(&name("ffn_down.weight"), &[n_ff, n_embd], 0.0, root(n_ff));
            for part in ["ln1", "ln2"] {
                add(&name(&format!("{part}.weight")), &[n_embd], 1.0, 0.1);
                add(&name(&format!("{part}.bias")), &[n_embd], 0.0, 0.1);
            }
        }
        add("mm.0.weight", &[n_embd, n_embd_out], 0.0, root(n_embd));
        add("mm.0.bias", &[n_embd_out], 0.0, 0.1);
        add("mm.2.weight", &[n_embd_out, n_embd_out], 0.0, gain * root(n_embd_out));
        add("mm.2.bias", &[n_embd_out], 0.0, gain * 0.1);
        file
    }

    /// Writes [`RandomClip::gguf`].
    pub fn write(&self, path: impl AsRef<Path>) {
        self.gguf().write(path);
    }
}
