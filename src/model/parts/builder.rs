//! What an architecture's file is given to build from.

use super::{Error, Layer};
use crate::model::{Hparams, RopeKind, hparams::Keys, weights::Loader};

/// What an architecture is built from: the file's keys and tensors. It may correct the hyper-parameters.
pub(in crate::model) struct Builder<'a> {
    pub keys: Keys<'a>,
    pub hparams: Hparams,
    pub loader: Loader<'a>,
}

impl Builder<'_> {
    /// Passes over the layers that predict further tokens: they follow the others and are not run.
    pub fn ignore_next_token_layers(&mut self) -> Result<(), Error> {
        let n_next = self.keys.optional_u32("nextn_predict_layers")?.unwrap_or(0) as usize;
        let n_layer = self.hparams.n_layer;
        (n_layer..n_layer + n_next).for_each(|layer| self.loader.ignore(format!("blk.{layer}.")));
        Ok(())
    }

    /// RoPE by several positions where the file has sections of it, as models have that see images.
    pub fn use_rope_sections(&mut self) -> Result<(), Error> {
        if let Some(sections) = self.keys.rope_sections(self.hparams.rope.n_rot)?
            && sections[0] > 0
            && sections[1] > 0
        {
            self.hparams.rope.kind = RopeKind::Multi(sections);
        }
        Ok(())
    }

    /// Has the layers after the first `n_own` read the keys and values of the last of these that is of their kind: the one
    /// before the last where they have windows, else the last. `key` says how many there are.
    pub fn share_stores(&mut self, n_own: usize, key: &str) -> Result<(), Error> {
        let hparams = &mut self.hparams;
        for layer in n_own..hparams.n_layer {
            let owner = n_own.checked_sub(if hparams.windows[layer].is_some() { 2 } else { 1 });
            let of = |layer: usize| (hparams.windows[layer], hparams.head_sizes[layer], hparams.n_heads_kv[layer]);
            let Some(owner) = owner.filter(|&owner| of(owner) == of(layer)) else {
                let why =
                    format!("layer {layer} reads keys and values of the first {n_own}, which do not end in its kind");
                return Err(self.keys.error(key, why));
            };
            hparams.shares[layer] = Some(owner);
        }
        Ok(())
    }

    /// A layer's `feed_forward_length`, which not all layers need to have.
    pub fn n_ff(&self, layer: usize) -> Result<usize, Error> {
        self.keys.of_layer("feed_forward_length", &self.hparams.n_ff, layer)
    }

    /// Tokens that a convolution spans, of which it keeps all but one.
    pub fn kernel_width(&self, key: &str) -> Result<usize, Error> {
        match self.keys.count(key)? {
            width @ 2.. => Ok(width),
            width => Err(self.keys.error(key, format!("{width}: a convolution spans at least 2 tokens"))),
        }
    }

    /// One layer after the other.
    pub fn layers<L: Layer + 'static>(
        &mut self,
        mut layer: impl FnMut(&mut Self, usize) -> Result<L, Error>,
    ) -> Result<Vec<Box<dyn Layer>>, Error> {
        (0..self.hparams.n_layer).map(|i| layer(self, i).map(|layer| Box::new(layer) as Box<dyn Layer>)).collect()
    }
}
