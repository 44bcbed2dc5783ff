//! Multi-head latent attention (DeepSeek V2, arXiv 2405.04434): a token's keys and values of all heads come from one short
//! vector, and from a few elements that RoPE turns and all heads share.

use super::{
    Builder, Error, Linear, Norm, RopeFactors, Temperature,
    short_conv::{columns, heads},
};
use crate::{
    ggml::{Graph, Rope, Tensor},
    model::{Attention, AttentionOptions, LayerStep},
};

/// A layer's latent attention: projections, norms, RoPE, and the product over the cache.
///
/// Where the file has the heads' matrices apart, queries go into the latent vector's space: one KV head is left, whose key is
/// the latent vector with the turned elements behind it, and whose value is the latent vector, the beginning of the key.
pub(in crate::model) struct LatentAttention {
    queries: Queries,
    /// To the latent vector, and the turned elements behind it.
    down: Linear,
    norm: Norm,
    heads: Heads,
    sizes: Sizes,
    rope: Rope,
    pub rope_factors: RopeFactors,
    output: Linear,
    pub temperature: Option<Temperature>,
    /// Products of queries and keys are multiplied by this.
    pub scale: f32,
}

enum Queries {
    Direct(Linear),
    LowRank { down: Linear, norm: Norm, up: Linear },
}

/// Between the latent vector and the heads.
enum Heads {
    /// A matrix of each head: of its queries `[plain, rank, heads]`, and of its values `[rank, value, heads]`.
    Absorbed { k: Tensor, v: Tensor },
    /// Keys and values of all heads at once, as older files have it: `plain + value` elements of each.
    Expanded(Linear),
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: usize,
    /// Elements of the latent vector.
    rank: usize,
    /// Elements of a key that RoPE turns, which come last.
    n_rot: usize,
    /// Those before them.
    plain: usize,
    /// Elements of a head's values.
    value: usize,
    /// Whether the heads' matrices are apart.
    absorbed: bool,
}

impl Sizes {
    /// As the keys say, which must agree with what the cache is to hold.
    fn of(b: &Builder<'_>) -> Result<Sizes, Error> {
        let hparams = &b.hparams;
        let heads = b.keys.all_equal("attention.head_count", &hparams.n_heads)?;
        let (rank, n_rot) = (b.keys.count("attention.kv_lora_rank")?, hparams.rope.n_rot);
        let key = b.keys.optional_count_or_zero("attention.key_length_mla")?;
        let value = b.keys.optional_count_or_zero("attention.value_length_mla")?;
        let absorbed = key > 0 && value > 0;
        let (key, value) = if absorbed { (key, value) } else { (hparams.head_size, hparams.value_size) };
        let expected = if absorbed {
            [("head_count_kv", hparams.n_head_kv, 1), ("key_length", hparams.head_size, rank + n_rot)]
        } else {
            [("head_count_kv", hparams.n_head_kv, heads), ("key_length", hparams.head_size, key)]
        };
        let of_value = ("value_length", hparams.value_size, if absorbed { rank } else { value });
        for (name, found, expected) in expected.into_iter().chain([of_value]) {
            if found != expected {
                return Err(b.keys.error(&format!("attention.{name}"), format!("{found}, expected {expected}")));
            }
        }
        let Some(plain) = key.checked_sub(n_rot).filter(|&plain| plain > 0) else {
            let why = format!("{n_rot} of a head's {key} elements; some must be left");
            return Err(b.keys.error("rope.dimension_count", why));
        };
        Ok(Sizes { heads, rank, n_rot, plain, value, absorbed })
    }

    /// Elements of a head's queries.
    fn key(self) -> usize {
        self.plain + self.n_rot
    }
}

impl LatentAttention {
    /// `attn_q` or `attn_q_a`, `attn_q_a_norm` and `attn_q_b`; `attn_kv_a_mqa`, `attn_kv_a_norm`; `attn_k_b` and `attn_v_b`, or
    /// `attn_kv_b`; `attn_output`.
    pub fn load(b: &mut Builder<'_>, layer: usize) -> Result<LatentAttention, Error> {
        let sizes = Sizes::of(b)?;
        let Sizes { heads, rank, n_rot, plain, value, absorbed } = sizes;
        b.hparams.values_in_keys = absorbed;
        let n_embd = b.hparams.n_embd;
        let name = |part: &str| format!("blk.{layer}.attn_{part}");
        let queries = match b.keys.optional_count_or_zero("attention.q_lora_rank")? {
            q_rank if q_rank > 0 && b.loader.has(&format!("{}.weight", name("q_a"))) => Queries::LowRank {
                down: Linear::load(b, &name("q_a"), [n_embd, q_rank])?,
                norm: Norm::rms(b, &name("q_a_norm"), q_rank)?,
                up: Linear::load(b, &name("q_b"), [q_rank, heads * sizes.key()])?,
            },
            _ => Queries::Direct(Linear::load(b, &name("q"), [n_embd, heads * sizes.key()])?),
        };
        Ok(LatentAttention {
            queries,
            down: Linear::load(b, &name("kv_a_mqa"), [n_embd, rank + n_rot])?,
            norm: Norm::rms(b, &name("kv_a_norm"), rank)?,
            heads: if absorbed {
                Heads::Absorbed {
                    k: b.loader.matrices(&format!("{}.weight", name("k_b")), [plain, rank, heads])?,
                    v: b.loader.matrices(&format!("{}.weight", name("v_b")), [rank, value, heads])?,
                }
            } else {
                Heads::Expanded(Linear::load(b, &name("kv_b"), [rank, heads * (plain + value)])?)
            },
            sizes,
            rope: b.hparams.rope.clone(),
            rope_factors: RopeFactors::default(),
            output: Linear::load(b, &name("output"), [heads * value, n_embd])?,
            temperature: None,
            scale: 1.0 / (sizes.key() as f32).sqrt(),
        })
    }

    /// `input` `[n_embd, n]` → `[n_embd, n]`.
    pub fn apply(&self, graph: &Graph, step: &LayerStep<'_>, input: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let Sizes { heads: n_head, rank, n_rot, plain, value, .. } = self.sizes;
        let factors = self.rope_factors.get(&self.rope, step.n_ctx);
        let rotate = |part: &Tensor| graph.rope(part, step.positions, factors, &self.rope);
        let q = self.queries.apply(graph, input);
        let [_, n, ..] = q.shape();
        // Of each head's elements some: `[size, heads, n]`.
        let part = |rows: &Tensor, size: usize, first: usize| {
            let [element_bytes, row_bytes, ..] = rows.strides();
            let head_bytes = rows.shape()[0] / n_head * element_bytes;
            graph.view(rows, [size, n_head, n], [head_bytes, row_bytes], first * element_bytes)
        };
        let (q_plain, q_turned) = (part(&q, plain, 0), rotate(&part(&q, n_rot, plain)));

        let down = self.down.apply(graph, input);
        let latent = self.norm.apply(graph, &columns(graph, &down, 0, rank));
        let k_turned = rotate(&heads(graph, &down, rank, n_rot, 1));

        let (q_plain, k, v, outputs) = match &self.heads {
            Heads::Absorbed { k: of_queries, v: of_values } => {
                // Products of heads' own matrices take tokens before heads.
                let swapped = |heads: &Tensor| graph.permute(heads, [0, 2, 1, 3]);
                let absorbed = swapped(&graph.mul_mat(of_queries, &swapped(&q_plain)));
                let latent = graph.reshape(&latent, &[rank, 1, n]);
                (absorbed, graph.concat(&latent, &k_turned, 0), latent, Some(of_values))
            }
            Heads::Expanded(up) => {
                let both = up.apply(graph, &latent);
                let k = graph.concat(&part(&both, plain, 0), &graph.repeat(&k_turned, [n_rot, n_head, n]), 0);
                (q_plain, k, graph.contiguous(&part(&both, value, plain)), None)
            }
        };
        let q = graph.concat(&q_plain, &q_turned, 0);
        let q = match &self.temperature {
            Some(temperature) => graph.mul(&q, &temperature.of(graph, step.positions)),
            None => q,
        };
        let options = AttentionOptions { scale: self.scale, softcap: None, sinks: None, outputs, input: None };
        let attended = attention.attend(graph, step.index, &q, &k, &v, &options);
        self.output.apply(graph, &attended)
    }
}

impl Queries {
    /// `[n_embd, n]` → `[key × heads, n]`.
    fn apply(&self, graph: &Graph, input: &Tensor) -> Tensor {
        match self {
            Queries::Direct(linear) => linear.apply(graph, input),
            Queries::LowRank { down, norm, up } => up.apply(graph, &norm.apply(graph, &down.apply(graph, input))),
        }
    }
}
