//! Recurrent layers' states as they were at some token: what has gone into a state cannot be taken out of it, so whoever
//! wants to go back needs one of these.

use super::layer::LayerCache;
use crate::cache::{Lease, Meter};

/// The states of a sequence's recurrent layers after its first `n_past` tokens.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub n_past: usize,
    /// For each layer its state; none where it has none, or none was kept yet.
    layers: Vec<Option<(Vec<u8>, Lease)>>,
}

impl Snapshot {
    /// One whose layers' states are still to be kept.
    pub fn empty(n_past: usize, n_layer: usize) -> Snapshot {
        Snapshot { n_past, layers: (0..n_layer).map(|_| None).collect() }
    }

    /// The states as they are now: in row `row` of the layers' stores.
    pub fn of(n_past: usize, layers: &[LayerCache], row: usize, meter: &Meter) -> Snapshot {
        let mut snapshot = Snapshot::empty(n_past, layers.len());
        layers.iter().enumerate().for_each(|(index, layer)| snapshot.keep(index, layer, row, meter));
        snapshot
    }

    /// Keeps one layer's state.
    pub fn keep(&mut self, index: usize, layer: &LayerCache, row: usize, meter: &Meter) {
        let bytes = layer.state_row(row);
        self.layers[index] = (!bytes.is_empty()).then(|| {
            let lease = meter.lease(bytes.len());
            (bytes, lease)
        });
    }

    /// Puts the states into row `row` of the layers' stores.
    pub fn put_back(&self, layers: &[LayerCache], row: usize) {
        for (layer, state) in layers.iter().zip(&self.layers) {
            if let Some((bytes, _)) = state {
                layer.put_state_row(row, bytes);
            }
        }
    }
}
