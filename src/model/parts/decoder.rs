//! How a layer's parts go together (norms, residuals, scales), and the layers to a model.

use super::{AltUp, Builder, Error, FeedForward, Layer, LayerEmbeddings, Linear, Mixer, Norm};
use crate::{
    ggml::{Graph, Tensor},
    model::{Architecture, Attention, LayerStep},
};

/// A whole model: embedding, layers, output.
pub(in crate::model) struct Decoder {
    pub table: Tensor,
    pub layers: Vec<Box<dyn Layer>>,
    pub output_norm: Norm,
    pub output: Linear,
    /// Embeddings are multiplied by this.
    pub embedding_scale: Option<f32>,
    /// Rows that are given in place of tokens' embeddings are not.
    pub scales_tokens_alone: bool,
    /// Logits are multiplied by this.
    pub logit_scale: Option<f32>,
    /// `c` bends logits `x` to `c·tanh(x/c)`.
    pub logit_softcap: Option<f32>,
    /// Embeddings for each layer.
    pub layer_embeddings: Option<LayerEmbeddings>,
    /// Several hidden states for each token.
    pub altup: Option<AltUp>,
}

impl Decoder {
    /// Adds `token_embd`, `output_norm` and `output` to the layers. Without `output` the embedding serves for it.
    pub fn load(b: &mut Builder<'_>, layers: Vec<Box<dyn Layer>>) -> Result<Decoder, Error> {
        let n_embd = b.hparams.n_embd;
        let output_norm = Norm::rms(b, "output_norm", n_embd)?;
        Decoder::load_with_norm(b, layers, output_norm)
    }

    /// As [`Decoder::load`], with a norm of another kind in front of the output.
    pub fn load_with_norm(
        b: &mut Builder<'_>,
        layers: Vec<Box<dyn Layer>>,
        output_norm: Norm,
    ) -> Result<Decoder, Error> {
        let shape = [b.hparams.n_embd, b.hparams.n_vocab];
        Ok(Decoder {
            table: b.loader.table("token_embd.weight", shape)?,
            layers,
            output_norm,
            output: Linear::load_output(b)?,
            embedding_scale: None,
            scales_tokens_alone: false,
            logit_scale: None,
            logit_softcap: None,
            layer_embeddings: None,
            altup: None,
        })
    }

    /// Token ids `[n]` (i32) → `[n_embd, n]`.
    fn embedded(&self, graph: &Graph, ids: &Tensor) -> Tensor {
        scaled(graph, graph.embed(&self.table, ids), self.embedding_scale)
    }
}

impl Architecture for Decoder {
    fn width(&self) -> usize {
        self.output_norm.width() * self.altup.as_ref().map_or(1, |_| AltUp::STREAMS)
    }

    fn embed(&self, graph: &Graph, ids: &Tensor) -> Tensor {
        let embedded = self.embedded(graph, ids);
        self.altup.as_ref().map_or_else(|| embedded.clone(), |altup| altup.spread(graph, &embedded))
    }

    fn enter(&self, graph: &Graph, embeddings: &Tensor) -> Tensor {
        let scale = self.embedding_scale.filter(|_| !self.scales_tokens_alone);
        let embedded = scaled(graph, embeddings.clone(), scale);
        self.altup.as_ref().map_or_else(|| embedded.clone(), |altup| altup.spread(graph, &embedded))
    }

    fn layer(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let own_input = self.layer_embeddings.as_ref().map(|own| {
            graph.off_device(|| {
                let embedded = step.embeddings.cloned().unwrap_or_else(|| self.embedded(graph, step.tokens));
                own.of_layer(graph, step.index, step.tokens, &embedded)
            })
        });
        let step = LayerStep { own_input: own_input.as_ref(), ..*step };
        self.layers[step.index].apply(graph, &step, attention)
    }

    fn norm(&self, graph: &Graph, hidden: &Tensor) -> Tensor {
        let hidden = self.altup.as_ref().map_or_else(|| hidden.clone(), |altup| altup.merged(graph, hidden));
        self.output_norm.apply(graph, &hidden)
    }

    fn logits(&self, graph: &Graph, normed: &Tensor) -> Tensor {
        let logits = self.output.apply(graph, normed);
        let logits = scaled(graph, logits, self.logit_scale);
        match self.logit_softcap {
            Some(cap) => graph.scale(&graph.tanh(&graph.scale(&logits, 1.0 / cap)), cap),
            None => logits,
        }
    }
}

/// The usual layer: attention (or what stands for it), then feed-forward, each with a residual and with norms before it, after it, or both.
pub(in crate::model) struct Block {
    pub attn_norm: Option<Norm>,
    pub mixer: Mixer,
    pub attn_post_norm: Option<Norm>,
    pub ffn_norm: Option<Norm>,
    pub feed_forward: FeedForward,
    pub ffn_post_norm: Option<Norm>,
    /// What attention and feed-forward add to the residual stream is multiplied by this.
    pub residual_scale: Option<f32>,
}

impl Block {
    /// A layer with the norms `attn_norm` and `ffn_norm` before attention and feed-forward.
    pub fn pre_norm(
        b: &mut Builder<'_>,
        layer: usize,
        mixer: impl Into<Mixer>,
        feed_forward: impl Into<FeedForward>,
    ) -> Result<Block, Error> {
        Block::pre_norm_named(b, layer, mixer, feed_forward, "ffn_norm")
    }

    /// As [`Block::pre_norm`] where the feed-forward's norm has another name.
    pub fn pre_norm_named(
        b: &mut Builder<'_>,
        layer: usize,
        mixer: impl Into<Mixer>,
        feed_forward: impl Into<FeedForward>,
        ffn_norm: &str,
    ) -> Result<Block, Error> {
        Ok(Block {
            attn_norm: Some(Norm::of_layer(b, layer, "attn_norm")?),
            ffn_norm: Some(Norm::of_layer(b, layer, ffn_norm)?),
            ..Block::without_norms(mixer, feed_forward)
        })
    }

    /// As [`Block::pre_norm`] with LayerNorms.
    pub fn pre_norm_centred(
        b: &mut Builder<'_>,
        layer: usize,
        mixer: impl Into<Mixer>,
        feed_forward: impl Into<FeedForward>,
    ) -> Result<Block, Error> {
        Ok(Block {
            attn_norm: Some(Norm::centred_of_layer(b, layer, "attn_norm")?),
            ffn_norm: Some(Norm::centred_of_layer(b, layer, "ffn_norm")?),
            ..Block::without_norms(mixer, feed_forward)
        })
    }

    /// A layer with the norms `post_attention_norm` and `post_ffw_norm` after attention and feed-forward.
    pub fn post_norm(
        b: &mut Builder<'_>,
        layer: usize,
        mixer: impl Into<Mixer>,
        feed_forward: impl Into<FeedForward>,
    ) -> Result<Block, Error> {
        Ok(Block {
            attn_post_norm: Some(Norm::of_layer(b, layer, "post_attention_norm")?),
            ffn_post_norm: Some(Norm::of_layer(b, layer, "post_ffw_norm")?),
            ..Block::without_norms(mixer, feed_forward)
        })
    }

    /// A layer with norms before attention and feed-forward and after them.
    pub fn sandwich(
        b: &mut Builder<'_>,
        layer: usize,
        mixer: impl Into<Mixer>,
        feed_forward: impl Into<FeedForward>,
    ) -> Result<Block, Error> {
        Ok(Block {
            attn_norm: Some(Norm::of_layer(b, layer, "attn_norm")?),
            ffn_norm: Some(Norm::of_layer(b, layer, "ffn_norm")?),
            ..Block::post_norm(b, layer, mixer, feed_forward)?
        })
    }

    pub fn without_norms(mixer: impl Into<Mixer>, feed_forward: impl Into<FeedForward>) -> Block {
        Block {
            attn_norm: None,
            mixer: mixer.into(),
            attn_post_norm: None,
            ffn_norm: None,
            feed_forward: feed_forward.into(),
            ffn_post_norm: None,
            residual_scale: None,
        }
    }
}

impl Block {
    /// The first half: the hidden states with what attention adds to them.
    pub fn attend(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let input = normed(graph, step.hidden, self.attn_norm.as_ref());
        let attended = self.mixer.apply(graph, step, &input, attention);
        let (attended, hidden) = (step.kept(graph, &attended), step.kept(graph, step.hidden));
        let attended = normed(graph, &attended, self.attn_post_norm.as_ref());
        graph.add(&scaled(graph, attended, self.residual_scale), &hidden)
    }

    /// The feed-forward of the hidden states, its norm before it included.
    pub fn feed(&self, graph: &Graph, hidden: &Tensor) -> Tensor {
        self.feed_forward.apply(graph, &normed(graph, hidden, self.ffn_norm.as_ref()))
    }

    /// The hidden states with what the feed-forward, normed, adds to them.
    pub fn add_fed(&self, graph: &Graph, hidden: &Tensor, output: &Tensor) -> Tensor {
        let output = normed(graph, output, self.ffn_post_norm.as_ref());
        graph.add(&scaled(graph, output, self.residual_scale), hidden)
    }
}

impl Layer for Block {
    fn apply(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor {
        let hidden = self.attend(graph, step, attention);
        self.add_fed(graph, &hidden, &self.feed(graph, &hidden))
    }
}

fn normed(graph: &Graph, input: &Tensor, norm: Option<&Norm>) -> Tensor {
    norm.map_or_else(|| input.clone(), |norm| norm.apply(graph, input))
}

fn scaled(graph: &Graph, input: Tensor, factor: Option<f32>) -> Tensor {
    match factor {
        Some(factor) => graph.scale(&input, factor),
        None => input,
    }
}
