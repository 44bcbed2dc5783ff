//! Architectures whose feed-forward every token goes through as a whole.

use simlayer_testkit::{RandomDecoder, Shape, gguf::Meta};

use crate::check::check;

/// Sections of a head of 16 elements: four pairs turn by time, two by height, one by width, and one is left.
const SECTIONS: [u32; 4] = [4, 2, 1, 1];

pub(crate) fn random_qwen2vl(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("qwen2vl", shape);
    m.key("rope.dimension_sections", Meta::array(if shape.tied { [3, 3, 2, 0] } else { SECTIONS }));
    // llama.cpp of this revision does not read it here.
    m.key("attention.layer_norm_rms_epsilon", 0f32);
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.gated(i);
        if !shape.tied {
            m.qkv_biases(i);
        }
    }
    m
}

#[test]
fn qwen2vl() {
    check([Shape::default(), Shape::other()].map(random_qwen2vl));
}

pub(crate) fn random_qwen3vl(shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new("qwen3vl", shape);
    // As in the real models some pairs of the second and third section are left over.
    m.key("rope.dimension_sections", Meta::array(if shape.tied { [4, 2, 2, 0] } else { [6, 5, 5, 0] }));
    m.key("n_deepstack_layers", if shape.tied { 3u32 } else { 0 });
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.head_norms(i);
        m.gated(i);
    }
    m
}

#[test]
fn qwen3vl() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other()].map(random_qwen3vl));
}

#[test]
fn glm4_with_several_positions() {
    check([Shape::default(), Shape::other()].map(|shape| {
        let mut m = RandomDecoder::new("glm4", shape);
        m.key("rope.dimension_count", shape.head_size as u32 / 2);
        m.key("rope.dimension_sections", Meta::array(if shape.tied { [0, 2, 1, 0] } else { [2, 1, 0, 1] }));
        for i in m.layers() {
            m.pre_norms(i);
            m.post_norms(i);
            m.attention(i);
            m.fused_gated(i);
        }
        m
    }));
}

/// LLaMA's layer under another name.
fn plain_layers(architecture: &'static str, shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new(architecture, shape);
    for i in m.layers() {
        m.pre_norms(i);
        m.attention(i);
        m.gated(i);
        if shape.seed == 2 {
            m.qkv_biases(i);
        }
    }
    m
}

#[test]
fn ernie4_5() {
    let shapes = [Shape { head_size: 32, ..Shape::default() }, Shape::other()];
    check(shapes.map(|shape| plain_layers("ernie4_5", shape)));
}

#[test]
fn internlm2() {
    let shapes = [Shape::default(), Shape { tied: false, ..Shape::other() }];
    check(shapes.map(|shape| plain_layers("internlm2", shape)));
}

#[test]
fn minicpm() {
    // Of 256 elements, so that what llama.cpp divides by where the file does not say is 1.
    let small = Shape { n_embd: 256, n_head: 8, n_head_kv: 2, head_size: 32, ..Shape::default() };
    let mut without_keys = plain_layers("minicpm", small);
    without_keys.rope_factors("rope_freqs.weight", small.head_size, 8.0);
    let mut with_keys = plain_layers("minicpm", Shape::other());
    with_keys.key("embedding_scale", 3f32);
    with_keys.key("residual_scale", 0.6f32);
    with_keys.key("logit_scale", 1.5f32);
    check([without_keys, with_keys]);
}

#[test]
fn hunyuan_dense() {
    check([Shape { head_size: 32, ..Shape::default() }, Shape::other()].map(|shape| {
        let mut m = RandomDecoder::new("hunyuan-dense", shape);
        if shape.tied {
            m.key("rope.scaling.alpha", 50f32);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            m.gated(i);
        }
        m
    }));
}

#[test]
fn arcee() {
    check([Shape::default(), Shape { head_size: 32, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("arcee", shape);
        if shape.tied {
            m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.plain(i);
        }
        m
    }));
}

#[test]
fn apertus() {
    check([Shape::default(), Shape { head_size: 32, tied: false, ..Shape::other() }].map(|shape| {
        let mut m = RandomDecoder::new("apertus", shape);
        let of_layers = |first: f32| Meta::array(m.layers().map(|i| first + 0.1 * i as f32));
        let (alpha_n, alpha_p) = (of_layers(0.4), of_layers(0.7));
        m.plain_key("xielu.beta", 0.5f32);
        m.plain_key("xielu.eps", -1e-6f32);
        if shape.seed == 1 {
            m.plain_key("xielu.alpha_n", alpha_n);
            m.plain_key("xielu.alpha_p", alpha_p);
        } else {
            m.plain_key("xielu.alpha_n", 0.3f32);
            m.plain_key("xielu.alpha_p", 0.9f32);
            m.rope_factors("rope_freqs.weight", shape.head_size, 8.0);
        }
        for i in m.layers() {
            m.pre_norms(i);
            m.attention(i);
            m.head_norms(i);
            m.plain(i);
            if shape.seed == 2 {
                m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
            }
        }
        m
    }));
}

/// Models of 64 layers and more have norms of each head.
#[test]
fn command_r() {
    let deep = Shape { n_layer: 64, n_embd: 32, n_head: 2, n_head_kv: 1, n_ff: 48, ..Shape::other() };
    check([Shape { tied: true, ..Shape::default() }, deep].map(|shape| {
        let mut m = RandomDecoder::new("command-r", shape);
        m.centred_norms();
        if shape.n_layer == 64 {
            m.key("logit_scale", 0.6f32);
        }
        for i in m.layers() {
            m.norm(i, "attn_norm");
            m.attention(i);
            m.gated(i);
            if shape.n_layer == 64 {
                m.norms_of_each_head(i);
            }
        }
        m
    }));
}

/// LayerNorms with biases, and a feed-forward without a gate.
fn centred_layers(architecture: &'static str, shape: Shape) -> RandomDecoder {
    let mut m = RandomDecoder::new(architecture, shape);
    m.centred_norms();
    m.bias("output_norm", shape.n_embd);
    for i in m.layers() {
        m.pre_norms(i);
        m.norm_bias(i, "attn_norm");
        m.norm_bias(i, "ffn_norm");
        m.attention(i);
    }
    m
}

#[test]
fn starcoder2() {
    check([Shape::default(), Shape::other()].map(|shape| {
        let mut m = centred_layers("starcoder2", shape);
        for i in m.layers() {
            m.plain(i);
            m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
            m.bias(&format!("blk.{i}.ffn_up"), shape.n_ff);
            m.bias(&format!("blk.{i}.ffn_down"), shape.n_embd);
            if !shape.tied {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

#[test]
fn nemotron() {
    check([Shape::default(), Shape { tied: false, ..Shape::other() }].map(|shape| {
        let mut m = centred_layers("nemotron", shape);
        m.key("rope.dimension_count", shape.head_size as u32 / 2);
        for i in m.layers() {
            m.plain(i);
            if shape.seed == 2 {
                m.bias(&format!("blk.{i}.attn_output"), shape.n_embd);
                m.bias(&format!("blk.{i}.ffn_up"), shape.n_ff);
                m.bias(&format!("blk.{i}.ffn_down"), shape.n_embd);
            }
        }
        m
    }));
}

#[test]
fn stablelm() {
    check([Shape::default(), Shape { tied: false, ..Shape::other() }].map(|shape| {
        let is_parallel = shape.seed == 2;
        let mut m = centred_layers("stablelm", shape);
        m.key("rope.dimension_count", shape.head_size as u32 / 4);
        for i in m.layers() {
            m.gated(i);
            if is_parallel {
                m.remove_tensor(&format!("blk.{i}.ffn_norm.weight"));
                m.remove_tensor(&format!("blk.{i}.ffn_norm.bias"));
                m.norms_of_each_head(i);
            } else {
                m.qkv_biases(i);
            }
        }
        m
    }));
}

#[test]
fn olmo() {
    check([Shape::default(), Shape::other()].map(|shape| {
        let mut m = RandomDecoder::new("olmo", shape);
        m.centred_norms();
        m.remove_tensor("output_norm.weight");
        if shape.tied {
            m.key("attention.clamp_kqv", 1.5f32);
        }
        for i in m.layers() {
            m.attention(i);
            m.gated(i);
        }
        m
    }));
}
