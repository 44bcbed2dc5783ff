//! Copies of a sequence: one prompt is read once and continued in several ways.

use std::collections::BTreeSet;

use super::{
    Error,
    session::{SeqId, Session, check},
};
use crate::{
    cache::Format,
    ggml::{self, Type},
};

impl Session {
    /// Copies a sequence to another, which is emptied before. In the copy the layers `lazy` are lazy as if the policy
    /// had chosen them when the prompt ended. Layers that are lazy already stay so.
    ///
    /// # Errors
    /// When memory runs out; the sequence `to` is then empty.
    pub fn fork(&mut self, from: SeqId, to: SeqId, lazy: &BTreeSet<usize>) -> Result<(), Error> {
        self.fork_with(from, to, lazy, None)
    }

    /// As [`Session::fork`]; the active layers of the copy have these types of keys and values, where they are given.
    ///
    /// # Errors
    /// As [`Session::fork`], and when the types are no cache types of this model.
    pub fn fork_with(
        &mut self,
        from: SeqId,
        to: SeqId,
        lazy: &BTreeSet<usize>,
        types: Option<(Type, Type)>,
    ) -> Result<(), Error> {
        self.seq_clear(to);
        let active = match types {
            Some((type_k, type_v)) => {
                let mut params = self.params.clone();
                (params.type_k, params.type_v) = (type_k, type_v);
                check(&params, self.model.hparams())?;
                Some(Format::new(type_k, type_v, params.kv_rotate))
            }
            None => None,
        };
        let Some(source) = self.sequences.get(&from) else { return Ok(()) };
        let n_past = source.n_past;
        let mut layers = Vec::with_capacity(source.layers.len());
        for (index, layer) in source.layers.iter().enumerate() {
            let becomes_lazy = lazy.contains(&index) && layer.is_active();
            let format = match active {
                _ if becomes_lazy => Some(self.lazy_format),
                active => active.filter(|_| !layer.lazy),
            };
            let span = becomes_lazy.then_some(self.spans[index]);
            layers.push(layer.copy(n_past, span, format, &self.makers[index], &mut self.scheduler)?);
        }
        let mut copy = source.with_layers(layers);
        if lazy.is_empty() && types.is_none() {
            copy.mark = source.mark_of_copy();
        }
        self.sequences.insert(to, copy);
        ggml::release_free_memory();
        Ok(())
    }
}
