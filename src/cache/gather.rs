//! Bringing stores of several sequences together into a slab, and taking them out.

use std::sync::Arc;

use super::{
    Chain,
    slab::{Slab, Slots},
};
use crate::ggml::{Error, Graph, Scheduler};

/// The slots of stores, where all are in one slab and equally far apart, in this order.
pub(crate) fn slots<'a>(chains: impl IntoIterator<Item = &'a Chain>) -> Option<(&'a Slab, Slots)> {
    let mut chains = chains.into_iter();
    let (slab, first) = chains.next()?.slot()?;
    let mut slots = Slots { first, step: 1, n: 1 };
    for chain in chains {
        let (other, slot) = chain.slot()?;
        let step = slot.checked_sub(slots.at(slots.n - 1)).filter(|&step| step > 0)?;
        if !Arc::ptr_eq(slab, other) || (slots.n > 1 && step != slots.step) {
            return None;
        }
        slots = Slots { step, n: slots.n + 1, ..slots };
    }
    Some((slab, slots))
}

/// Puts the stores of chains, each of which is in one and has one format with the others, into a slab in this order. Nothing is
/// changed where there is no memory for it.
pub(crate) fn together(scheduler: &mut Scheduler, chains: &mut [&mut Chain]) -> Result<(), Error> {
    let n_rows = chains.iter().map(|chain| chain.n_rows()).max().unwrap_or(0);
    let stores = match chains.first() {
        Some(first) => first.single().slots(n_rows, chains.len())?,
        None => return Ok(()),
    };
    let graph = Graph::new(16 * chains.len());
    chains.iter().zip(&stores).for_each(|(chain, store)| store.copy(&graph, chain.single()));
    scheduler.compute_once(&graph)?;
    chains.iter_mut().zip(stores).for_each(|(chain, store)| chain.replace_from(0, store));
    Ok(())
}

/// Takes the rows of a chain, which are in one store, out of the slab that it is in: the slab is freed when none is left.
pub(crate) fn apart(scheduler: &mut Scheduler, chain: &mut Chain) -> Result<(), Error> {
    let store = chain.single().like(chain.n_rows())?;
    let graph = Graph::new(16);
    store.copy(&graph, chain.single());
    scheduler.compute_once(&graph)?;
    chain.replace_from(0, store);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;
    use crate::{
        cache::{Format, Meter, RowShape, Store},
        ggml::{Device, Type},
    };

    const SHAPE: RowShape = RowShape { heads: 2, key_size: 32, value_size: 64, values_in_keys: false };

    fn chain(n: usize, value: u8, format: Format, meter: &Meter) -> Chain {
        let store = Store::new(SHAPE, n, 64, None, format, Device::cpu().buffer_type(), meter).unwrap();
        let chain = Chain::new(store, None);
        chain.write_rows(from_ref(&(0..n)), &vec![value; n * SHAPE.row_bytes(format)]);
        chain
    }

    fn ids(chains: &[Chain]) -> Vec<u64> {
        chains.iter().map(Chain::id).collect()
    }

    fn bytes(chain: &Chain, n: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        chain.read_rows(from_ref(&(0..n)), &mut bytes);
        bytes
    }

    #[test]
    fn stores_come_together_and_apart() {
        let mut scheduler = Scheduler::new(&[Device::cpu()], 1, 64).unwrap();
        for (k, v) in [(Type::F16, Type::F16), (Type::Q8_0, Type::Q4_0)] {
            let format = Format { k, v, rotate_k: false, rotate_v: false };
            let meter = Meter::default();
            let sizes = [64, 128, 128];
            let mut chains: Vec<Chain> =
                sizes.iter().zip(1..).map(|(&n, value)| chain(n, value, format, &meter)).collect();
            let (before, alone) = (ids(&chains), meter.now());
            together(&mut scheduler, &mut chains.iter_mut().collect::<Vec<_>>()).unwrap();
            assert!(ids(&chains).iter().all(|id| !before.contains(id)));
            for ((chain, n), value) in chains.iter().zip(sizes).zip(1u8..) {
                assert_eq!((chain.n_rows(), bytes(chain, n)), (128, vec![value; n * SHAPE.row_bytes(format)]));
            }
            // The first has as many rows as the longest, and nothing is left of what was before.
            let row_bytes = SHAPE.row_bytes(format);
            assert!(meter.now() >= 3 * 128 * row_bytes && meter.now() <= alone + 64 * row_bytes + 4096);
            assert_eq!(chains.iter().map(Chain::bytes).sum::<usize>(), meter.now() / 3 * 3);

            let (slab, all) = slots(&chains).unwrap();
            assert_eq!((all, all.at(2)), (Slots { first: 0, step: 1, n: 3 }, 2));
            let graph = Graph::new(8);
            assert_eq!(SHAPE.keys_together(&graph, slab, all, 100).shape(), [32, 100, 2, 3]);
            assert_eq!(SHAPE.values_together(&graph, slab, all, 100).shape(), [64, 100, 2, 3]);
            let some = slots([&chains[0], &chains[2]]).unwrap().1;
            assert_eq!(some, Slots { first: 0, step: 2, n: 2 });
            assert!(slots([&chains[2], &chains[0]]).is_none() && slots([&chains[1], &chains[1]]).is_none());
            // Whoever writes writes to its own rows.
            chains[1].write_rows(from_ref(&(5..7)), &vec![9; 2 * row_bytes]);
            assert_eq!(bytes(&chains[0], 128)[64 * row_bytes..].iter().filter(|&&byte| byte == 9).count(), 0);

            // One goes, and the others leave.
            assert!(!chains[0].is_left());
            let before = bytes(&chains[1], 128);
            drop(chains.pop());
            assert!(chains[0].is_left());
            chains.iter_mut().for_each(|chain| apart(&mut scheduler, chain).unwrap());
            assert!(chains.iter().all(|chain| chain.slot().is_none()) && bytes(&chains[1], 128) == before);
            assert!(meter.now() <= 2 * 128 * row_bytes + 4096, "{}", meter.now());
            drop(chains);
            assert_eq!(meter.now(), 0);
        }
    }
}
