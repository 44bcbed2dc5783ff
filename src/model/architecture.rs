//! What the engine runs: an architecture's graphs, layer by layer, and the attention that it brings to them.

use crate::ggml::{Graph, Tensor};

/// An architecture: how its layers' graphs are built. It knows nothing of sequences or caches.
pub(crate) trait Architecture: Send + Sync {
    /// Elements of a token's hidden states between layers: `n_embd`, or more where an architecture carries several of them
    /// along.
    fn width(&self) -> usize;

    /// Token ids `[n]` (i32) → hidden states `[width, n]`.
    fn embed(&self, graph: &Graph, ids: &Tensor) -> Tensor;

    /// Rows `[n_embd, n]` that are given in place of tokens' embeddings → hidden states `[width, n]`.
    fn enter(&self, graph: &Graph, embeddings: &Tensor) -> Tensor;

    /// Hidden states `[width, n]` through one layer. With `keep` (i32 row numbers) only those tokens are carried on
    /// after the attention: they are all that the output needs of the last layer.
    fn layer(&self, graph: &Graph, step: &LayerStep<'_>, attention: &mut dyn Attention) -> Tensor;

    /// Hidden states `[width, n]` that leave the last layer → `[n_embd, n]` after the final norm.
    fn norm(&self, graph: &Graph, hidden: &Tensor) -> Tensor;

    /// Hidden states `[n_embd, n]` after the final norm → logits `[n_vocab, n]`.
    fn logits(&self, graph: &Graph, normed: &Tensor) -> Tensor;
}

/// What a layer's graph is built from.
pub(crate) struct LayerStep<'a> {
    pub index: usize,
    pub hidden: &'a Tensor,
    /// Token ids `[n]` (i32).
    pub tokens: &'a Tensor,
    /// Rows `[n_embd, n]` that are given in place of the tokens' embeddings.
    pub embeddings: Option<&'a Tensor>,
    /// What the layer alone has of the tokens' embeddings, `[width of it, n]`: the architecture's to put in.
    pub own_input: Option<&'a Tensor>,
    /// Positions of the tokens (i32) `[n]`; `[n × 4]` where each has several, see
    /// [`RopeKind::positions_per_token`](super::RopeKind::positions_per_token).
    pub positions: &'a Tensor,
    pub keep: Option<&'a Tensor>,
    /// Tokens that the sequence may grow to.
    pub n_ctx: usize,
}

impl LayerStep<'_> {
    /// The tokens of `[width, n]` that are carried on after the attention.
    pub(crate) fn kept(&self, graph: &Graph, rows: &Tensor) -> Tensor {
        self.keep.map_or_else(|| rows.clone(), |keep| graph.get_rows(rows, keep))
    }
}

/// What a layer knows of the tokens before, given by the engine: attention over a cache, and a recurrent state.
pub(crate) trait Attention {
    /// `q` `[head size, heads, n]`, `k` `[head size, KV heads, n]` and `v` `[value size, KV heads, n]`, RoPE applied →
    /// `[value size × heads, n]`. Where a model's values are in its keys `v` is not looked at.
    fn attend(
        &mut self,
        graph: &Graph,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions<'_>,
    ) -> Tensor;

    /// As [`Attention::attend`] for a layer that reads the keys and values of another one
    /// ([`Hparams::shares`](super::Hparams::shares)), which these tokens went through before.
    fn attend_shared(&mut self, graph: &Graph, layer: usize, q: &Tensor, options: &AttentionOptions<'_>) -> Tensor;

    /// Tokens through the layer's recurrent state: `mix` is called for each sequence in turn, with the columns of all
    /// `inputs` `[width, n]` that are its tokens', and with its state before them. → their outputs `[width, n]`.
    fn recur(
        &mut self,
        graph: &Graph,
        layer: usize,
        inputs: &[&Tensor],
        mix: &dyn Fn(&[Tensor], &State) -> Mixed,
    ) -> Tensor;
}

/// A sequence's state in one layer before some tokens.
pub(crate) struct State {
    /// A convolution's last columns, `[elements]`.
    pub columns: Tensor,
    /// State matrices `[elements, rows]`, of which row `row` is the sequence's; none of a convolution alone.
    pub matrices: Option<Tensor>,
    /// i32 `[1]`.
    pub row: Tensor,
}

/// What tokens of one sequence leave a recurrent layer with.
pub(crate) struct Mixed {
    /// `[width, n]`
    pub output: Tensor,
    /// The state after them, each in as many elements as before.
    pub columns: Tensor,
    pub matrices: Option<Tensor>,
}

/// How a layer's attention weights come from its queries and keys. Which keys a query sees is the engine's to know
/// ([`Hparams::windows`](super::Hparams::windows)).
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionOptions<'a> {
    /// Products of queries and keys are multiplied by this.
    pub scale: f32,
    /// `c` bends the scaled products `x` to `c·tanh(x/c)`.
    pub softcap: Option<f32>,
    /// A learned logit of each head `[heads]`, f32: it counts in the softmax's sum and has no value.
    pub sinks: Option<&'a Tensor>,
    /// A matrix of each head `[value size, output size, heads]`, which what it attends to is multiplied with: outputs have that
    /// size then.
    pub outputs: Option<&'a Tensor>,
    /// What queries, keys and values were made of, `[n_embd, n]`, where they come from one.
    pub input: Option<&'a Tensor>,
}
