//! What a layer's rows are pruned by: the map that foretells how much a row will be asked for, and what is kept whatever it says.

use crate::{
    ggml::{self, ATTENTION_BLOCK, BufferType, Context, Tensor, Type},
    lazy::LayerMap,
    model::Hparams,
};

/// Rows younger than this are never dropped.
pub(super) const WINDOW: usize = 128;

/// The first rows are never dropped, either: attention needs them whatever they are.
pub(super) const SINK: usize = 4;

/// Newest tokens that can be taken back after rows were dropped.
pub(super) const BACK: usize = 32;

/// Rows are dropped once there are so many more than are kept.
const STEP: usize = 96;

/// Rows of the store once rows were dropped: it need not grow while tokens come one by one.
pub(super) const STORE_ROWS: usize = WINDOW + BACK + STEP;
const _: () = assert!(STORE_ROWS.is_multiple_of(ATTENTION_BLOCK));

/// A layer's map, beside its rows.
#[derive(Debug)]
pub(super) struct Pruning {
    /// f32 `[n_embd, KV heads]`.
    pub map: Tensor,
    /// For each KV head the least product that keeps a row.
    pub least: Vec<f32>,
}

impl Pruning {
    pub fn new(map: &LayerMap, bound: f32, memory: BufferType) -> Result<Pruning, ggml::Error> {
        let heads = map.biases.len();
        let context = Context::new(1);
        let tensor = context.tensor(Type::F32, &[map.weights.len() / heads, heads]);
        context.alloc(memory, "a map to prune by")?;
        tensor.write(0, &map.weights);
        Ok(Pruning { map: tensor, least: map.biases.iter().map(|bias| bound - bias).collect() })
    }
}

/// Why a layer's rows cannot be pruned by such a map; `None` where they can.
pub(super) fn obstacle(hparams: &Hparams, index: usize, map: &LayerMap) -> Option<&'static str> {
    let [.., heads] = hparams.heads(index);
    match () {
        () if !hparams.has_store(index) => Some("it keeps no keys and values of its own"),
        () if hparams.windows[index].is_some() => Some("it is sliding-window by design"),
        () if hparams.values_in_keys => Some("it keeps latent vectors"),
        () if hparams.last_reader(index) != index => Some("other layers read its keys and values"),
        () if map.biases.len() != heads || map.weights.len() != heads * hparams.n_embd => {
            Some("its map is of other sizes")
        }
        () => None,
    }
}
