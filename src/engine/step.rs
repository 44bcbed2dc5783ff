//! A graph through layers: the one loop over them.
//!
//! Where the policy goes by outputs, a layer's last queries go through it once more, and see only what a lazy layer would
//! keep: the less their hidden states after the layer change by that, the lazier the layer is. Attention mass misses layers
//! that fetch little from far back, of which much depends.

use std::ops::Range;

use super::{
    attention::{CacheAttention, Look},
    batch::{Fed, Part},
    inputs::Inputs,
    layer::LayerCache,
    score::{SCORE_NAME, Score, Taken},
    setup::Setup,
};
use crate::{
    ggml::{Device, Graph, Tensor},
    lazy::Measure,
    model::LayerStep,
};

/// What goes through which layers.
#[derive(Clone)]
pub(super) struct Stretch<'a> {
    pub layers: Range<usize>,
    pub parts: &'a [Part],
    /// For each part the layers' caches of its sequence.
    pub caches: &'a [&'a [LayerCache]],
    /// The hidden states `[n_embd, tokens]` that enter; `None` for the tokens' embeddings.
    pub entering: Option<&'a Tensor>,
    /// Whether rows of embeddings are given in place of the tokens.
    pub has_embeddings: bool,
    /// Tokens that have outputs: after the model's last layer only they are carried on.
    pub n_wanted: usize,
}

impl Stretch<'_> {
    pub fn n_tokens(&self) -> usize {
        self.parts.iter().map(|part| part.n).sum()
    }
}

/// A graph through layers, with what it reads, and what is read of it when it has run.
pub(super) struct Step {
    pub graph: Graph,
    pub inputs: Inputs,
    /// The hidden states `[n_embd, tokens]` that leave the last of the layers.
    pub hidden: Tensor,
    pub scores: Vec<Score>,
    looks: Vec<SecondLook>,
    pub output: Option<Output>,
}

/// Rows of results.
pub(super) struct Output {
    /// `[n_vocab, tokens]`.
    pub logits: Tensor,
    /// What the output matrix is multiplied with, `[n_embd, tokens]`, where it was asked for.
    pub embeddings: Option<Tensor>,
}

impl Step {
    /// Fills the inputs: of these parts, which have these tokens and want these rows.
    pub fn fill(&mut self, parts: &[Part], fed: Fed<'_>, rows: &[i32]) {
        self.inputs.fill(parts, fed, rows);
        self.looks.iter_mut().for_each(|look| look.inputs.fill(&look.queries, [][..].into(), &[]));
    }

    /// Carries the hidden states on to rows of logits, and of embeddings, where they are wanted.
    pub fn add_output(&mut self, setup: &Setup, wants_embeddings: bool) {
        let device = setup.model.output_device();
        self.graph.set_device((device != Device::cpu()).then_some(device));
        self.output = Some(setup.output(&self.graph, &self.hidden, wants_embeddings));
    }
}

/// The scored queries of one part, and inputs for them alone.
struct SecondLook {
    part: usize,
    queries: [Part; 1],
    inputs: Inputs,
}

impl Setup {
    fn positions_per_token(&self) -> usize {
        self.model.hparams().rope.kind.positions_per_token()
    }

    /// The rows that are given in place of tokens' embeddings, and those that are added to the first layers' output, each
    /// `[n_embd, n]`.
    fn embeddings_of_layers(&self, graph: &Graph, given: &Tensor) -> Vec<Tensor> {
        let n_embd = self.model.hparams().n_embd;
        let ([width, n, ..], [element_bytes, row_bytes, ..]) = (given.shape(), given.strides());
        let part = |first: usize| {
            let part = graph.view(given, [n_embd, n, 1], [row_bytes, n * row_bytes], first * element_bytes);
            graph.contiguous_if_needed(&part)
        };
        (0..width).step_by(n_embd).map(part).collect()
    }

    /// The graph of a stretch. `inputs` are empty; their memory is used again.
    pub fn step(&self, stretch: &Stretch<'_>, mut inputs: Inputs) -> Step {
        let Stretch { layers, parts, caches, entering, has_embeddings, n_wanted } = stretch;
        let architecture = self.model.architecture();
        let n_layer = self.layers.len();
        let n_tokens = stretch.n_tokens();
        let graph = self.graph(Setup::max_nodes(layers.len()));
        let positions = inputs.positions(&graph, n_tokens, self.positions_per_token());
        let is_cut = layers.end == n_layer && *n_wanted < n_tokens;
        let keep = is_cut.then(|| inputs.outputs(&graph, (*n_wanted).max(1)));
        let tokens = inputs.tokens(&graph, n_tokens);
        let given = has_embeddings.then(|| inputs.embeddings(&graph, n_tokens, self.model.hparams().n_embd_input()));
        let given: Vec<Tensor> = given.iter().flat_map(|given| self.embeddings_of_layers(&graph, given)).collect();
        let (embeddings, of_layers) = (given.first(), given.get(1..).unwrap_or_default());
        let mut hidden = match (entering, embeddings) {
            (Some(states), _) => (*states).clone(),
            (None, Some(embeddings)) => architecture.enter(&graph, embeddings),
            (None, None) => architecture.embed(&graph, &tokens),
        };
        let look = Look::First { scored: self.params.lazy.policy.measure() == Measure::Mass };
        let mut attention = CacheAttention {
            inputs: &mut inputs,
            parts,
            caches,
            setup: self,
            look,
            scores: Vec::new(),
            shared: Vec::new(),
            recurred: None,
        };
        let (mut looks, mut looked) = (self.second_looks(parts), Vec::new());
        for index in layers.clone() {
            let keep = keep.as_ref().filter(|_| index + 1 == n_layer);
            let step = LayerStep {
                index,
                hidden: &hidden,
                tokens: &tokens,
                embeddings,
                own_input: None,
                positions: &positions,
                keep,
                n_ctx: self.params.n_ctx,
            };
            graph.set_device(self.layers[index].plan.apart);
            attention.recurred = None;
            let result = architecture.layer(&graph, &step, &mut attention);
            let whole = Some(&result).filter(|_| keep.is_none());
            for look in &mut looks {
                let recurred = attention.recurred.as_ref();
                looked.extend(self.look_again(&graph, look, caches, &step, (whole, recurred)));
            }
            hidden = match of_layers.get(index) {
                Some(rows) => graph.add(&result, &step.kept(&graph, rows)),
                None => result,
            };
        }
        let mut scores = attention.scores;
        scores.extend(looked);
        Step { graph, inputs, hidden, scores, looks, output: None }
    }

    /// Rows of logits and embeddings of hidden states `[n_embd, n]`, which the graph then computes.
    pub fn output(&self, graph: &Graph, hidden: &Tensor, wants_embeddings: bool) -> Output {
        let architecture = self.model.architecture();
        let normed = architecture.norm(graph, hidden);
        let logits = architecture.logits(graph, &normed).as_output();
        graph.expand(&logits);
        Output { logits, embeddings: wants_embeddings.then(|| normed.as_output()) }
    }

    /// What the policy needs of these parts' last queries: nothing, unless it goes by outputs.
    fn second_looks(&self, parts: &[Part]) -> Vec<SecondLook> {
        if self.params.lazy.policy.measure() != Measure::Output {
            return Vec::new();
        }
        let scored = parts.iter().enumerate().filter(|(_, part)| part.n_score > 0);
        scored
            .map(|(index, part)| SecondLook { part: index, queries: [part.scored()], inputs: Inputs::default() })
            .collect()
    }

    /// The queries' second pass through a layer whose graph is built: `of_all` is what all tokens of the ubatch entered it
    /// with, `result` what they left it with; `None` where not all of them did; `recurred` what the layer's state gave, where
    /// it has one. No score where the layer reads no candidate's keys and values.
    fn look_again(
        &self,
        graph: &Graph,
        look: &mut SecondLook,
        caches: &[&[LayerCache]],
        of_all: &LayerStep<'_>,
        (result, recurred): (Option<&Tensor>, Option<&Tensor>),
    ) -> Option<Score> {
        let SecondLook { part, queries, inputs } = look;
        let caches = [caches[*part]];
        let owner = self.model.hparams().owner(of_all.index);
        if !caches[0][owner].is_active() {
            return None;
        }
        let Part { first, n, .. } = queries[0];
        if let Some(result) = result {
            graph.expand(result);
        }
        let first_node = graph.n_nodes();
        let entering = graph.rows(of_all.hidden, first, n);
        let positions = inputs.positions(graph, n, self.positions_per_token());
        let [id_bytes, row_bytes, ..] = of_all.tokens.strides();
        let tokens = graph.view(of_all.tokens, [n, 1, 1], [row_bytes, row_bytes], first * id_bytes);
        let step = LayerStep { hidden: &entering, tokens: &tokens, positions: &positions, keep: None, ..*of_all };
        let mut pass = |span| {
            let look = Look::Again(span);
            let recurred = recurred.cloned();
            let (parts, scores, shared) = (&*queries, Vec::new(), Vec::new());
            let mut attention =
                CacheAttention { inputs, parts, caches: &caches, setup: self, look, scores, shared, recurred };
            self.model.architecture().layer(graph, &step, &mut attention)
        };
        let restricted = pass(Some(self.layers[owner].plan.lazy_span));
        let full = match result {
            Some(result) => graph.rows(result, first, n),
            None => pass(None),
        };
        let [full, restricted] = [full, restricted].map(|rows| graph.contiguous(&rows).as_output());
        graph.expand(&full);
        graph.expand(&restricted);
        graph.name_nodes_from(first_node, SCORE_NAME);
        Some(Score { part: *part, layer: owner, taken: Taken::Outputs { full, restricted, n } })
    }
}
