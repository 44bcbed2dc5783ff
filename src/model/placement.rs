//! Which layer is on which device.

use std::sync::Arc;

use super::ModelParams;
use crate::ggml::{Device, DeviceKind, Pattern};

/// The devices of a model's layers. As in llama.cpp the last layers go to devices first, one after the other, and the
/// output counts as one layer more, the first to go. The embedding stays with the processor.
///
/// Of single tensors the caller may have said otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    layers: Vec<Device>,
    output: Device,
    overrides: Arc<[(Pattern, Device)]>,
}

impl Placement {
    /// # Errors
    /// Which pattern of a tensor's name is wrong, and why.
    pub fn new(n_layer: usize, params: &ModelParams) -> Result<Placement, String> {
        let overrides = params.tensor_overrides.iter().map(|tensors| {
            let pattern = Pattern::new(&tensors.pattern)
                .map_err(|why| format!("{}: no pattern of tensors' names ({why})", tensors.pattern))?;
            Ok((pattern, tensors.device))
        });
        let overrides = overrides.collect::<Result<Arc<[_]>, String>>()?;
        let devices = params.devices.clone().unwrap_or_else(Device::all_but_processor);
        // The processor may be named beside others; it has what is left over.
        let devices: Vec<Device> = devices.into_iter().filter(|device| device.kind() != DeviceKind::Cpu).collect();
        let n_placed = params.gpu_layers.unwrap_or(usize::MAX);
        let mut shares: Vec<f64> =
            (0..devices.len()).map(|i| f64::from(params.tensor_split.get(i).copied().unwrap_or(0.0))).collect();
        if n_placed > 0 && shares.iter().all(|&share| share <= 0.0) {
            shares = devices.iter().map(|device| device.memory().0 as f64).collect();
        }
        let device = |assigned: Option<usize>| assigned.map_or_else(Device::cpu, |index| devices[index]);
        let mut layers: Vec<Device> = assign(n_layer, n_placed, &shares).into_iter().map(device).collect();
        let output = layers.pop().unwrap_or_else(Device::cpu);
        Ok(Placement { layers, output, overrides })
    }

    pub fn layer(&self, index: usize) -> Device {
        self.layers.get(index).copied().unwrap_or_else(Device::cpu)
    }

    pub fn output(&self) -> Device {
        self.output
    }

    /// The device that the caller wants a tensor on: the first word counts.
    pub fn overridden(&self, name: &str) -> Option<Device> {
        self.overrides.iter().find(|(pattern, _)| pattern.matches(name)).map(|&(_, device)| device)
    }

    /// The device of a tensor, unless the caller has named one: its layer's, or the output's. What all layers share stays with
    /// the processor.
    pub fn tensor(&self, name: &str) -> Device {
        if let Some(device) = self.overridden(name) {
            return device;
        }
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match layer {
            Some(layer) => self.layer(layer),
            None if name.starts_with("output") => self.output(),
            None => Device::cpu(),
        }
    }

    /// The devices other than the processor, in the order of the layers, and behind them those of single tensors.
    pub fn devices(&self) -> Vec<Device> {
        let mut devices = Vec::new();
        let of_tensors = self.overrides.iter().map(|(_, device)| device);
        for &device in self.layers.iter().chain([&self.output]).chain(of_tensors) {
            if device != Device::cpu() && !devices.contains(&device) {
                devices.push(device);
            }
        }
        devices
    }
}

/// For each layer, and for the output after them, the index of its device; `None` is the processor. Of `n_layer + 1`
/// the last `n_placed` are shared out in these proportions.
fn assign(n_layer: usize, n_placed: usize, shares: &[f64]) -> Vec<Option<usize>> {
    let n = n_layer + 1;
    let n_placed = if shares.is_empty() { 0 } else { n_placed.min(n) };
    let total: f64 = shares.iter().map(|share| share.max(0.0)).sum();
    let device = |placed: usize| {
        let position = placed as f64 / n_placed as f64;
        let mut end = 0.0;
        let found = shares.iter().position(|share| {
            // Without any proportions all are alike.
            end += if total > 0.0 { share.max(0.0) / total } else { 1.0 / shares.len() as f64 };
            end > position
        });
        // Rounding may leave the last end a little below 1.
        found.unwrap_or(shares.len() - 1)
    };
    (0..n).map(|layer| layer.checked_sub(n - n_placed).map(device)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn layers_are_shared_out_as_llama_cpp_does() {
        let (a, b) = (Some(0), Some(1));
        assert_eq!(assign(3, usize::MAX, &[]), [None; 4]);
        assert_eq!(assign(3, 0, &[1.0]), [None; 4]);
        assert_eq!(assign(3, 2, &[1.0]), [None, None, a, a]);
        assert_eq!(assign(3, 9, &[1.0, 1.0]), [a, a, b, b]);
        assert_eq!(assign(3, 4, &[3.0, 1.0]), [a, a, a, b]);
        assert_eq!(assign(3, 4, &[0.0, 1.0]), [b; 4]);
        // An odd number: the first gets one more.
        assert_eq!(assign(4, 5, &[1.0, 1.0]), [a, a, a, b, b]);
        assert_eq!(assign(3, 4, &[0.0, 0.0]), [a, a, b, b]);
    }

    proptest! {
        #[test]
        fn devices_follow_one_another(
            n_layer in 1usize..100,
            n_placed in 0usize..120,
            shares in prop::collection::vec(0.0f64..10.0, 0..6),
        ) {
            let assigned = assign(n_layer, n_placed, &shares);
            prop_assert_eq!(assigned.len(), n_layer + 1);
            prop_assert!(assigned.is_sorted());
            let placed = assigned.iter().flatten().count();
            prop_assert_eq!(placed, if shares.is_empty() { 0 } else { n_placed.min(n_layer + 1) });
            prop_assert!(assigned.iter().flatten().all(|&index| index < shares.len()));
        }
    }
}
