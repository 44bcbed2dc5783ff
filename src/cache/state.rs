//! What a recurrent layer carries from token to token: as much after a thousand tokens as after one.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Lease, Meter};
use crate::ggml::{BufferType, Context, Error, Tensor, Type};

/// Rows of a state: the one that is read, and the one that is written meanwhile, so that a run that fails leaves the state
/// as it was.
const ROWS: usize = 2;

/// The state of one layer in memory of its own: a convolution's last columns and state matrices, f32.
#[derive(Debug)]
pub(crate) struct StateStore {
    /// `[elements, 2]`: which row is the sequence's is the sequence's to say.
    pub columns: Tensor,
    /// `[elements, 2]`; none of a convolution alone.
    pub matrices: Option<Tensor>,
    id: u64,
    memory: BufferType,
    lease: Lease,
}

impl StateStore {
    /// A zeroed state of so many elements of columns and of matrices.
    pub fn new(n_columns: usize, n_matrices: usize, memory: BufferType, meter: &Meter) -> Result<StateStore, Error> {
        StateStore::of_sizes(n_columns, n_matrices, memory, |bytes| meter.lease(bytes))
    }

    fn of_sizes(
        n_columns: usize,
        n_matrices: usize,
        memory: BufferType,
        lease: impl FnOnce(usize) -> Lease,
    ) -> Result<StateStore, Error> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let context = Context::new(2);
        let columns = context.tensor(Type::F32, &[n_columns, ROWS]).named("state_columns");
        let matrices = (n_matrices > 0).then(|| context.tensor(Type::F32, &[n_matrices, ROWS]).named("state_matrices"));
        let bytes = context.alloc(memory, "a recurrent layer's state")?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(StateStore { columns, matrices, id, memory, lease: lease(bytes) })
    }

    /// Bytes that a state of so many elements takes.
    pub fn bytes_of(n_columns: usize, n_matrices: usize) -> usize {
        ROWS * (n_columns + n_matrices) * size_of::<f32>()
    }

    /// Bytes of the buffers.
    pub fn bytes(&self) -> usize {
        self.lease.bytes()
    }

    /// A number that no other state's store ever has.
    pub fn id(&self) -> u64 {
        self.id
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [Some(&self.columns), self.matrices.as_ref()].into_iter().flatten()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.strides()[1]).sum()
    }

    /// Appends the bytes of a row.
    pub fn read_row(&self, row: usize, to: &mut Vec<u8>) {
        for tensor in self.tensors() {
            let (start, bytes) = (to.len(), tensor.strides()[1]);
            to.resize(start + bytes, 0);
            tensor.read(row * bytes, &mut to[start..]);
        }
    }

    /// Writes what [`StateStore::read_row`] read.
    pub fn write_row(&self, row: usize, from: &[u8]) {
        let mut from = from;
        for tensor in self.tensors() {
            let bytes = tensor.strides()[1];
            let (own, rest) = from.split_at(bytes);
            tensor.write(row * bytes, own);
            from = rest;
        }
    }

    /// A state of its own that is as this one.
    pub fn copied(&self) -> Result<StateStore, Error> {
        let n_matrices = self.matrices.as_ref().map_or(0, |matrices| matrices.shape()[0]);
        let lease = |bytes| self.lease.another(bytes);
        let copy = StateStore::of_sizes(self.columns.shape()[0], n_matrices, self.memory, lease)?;
        let mut bytes = Vec::new();
        for row in 0..ROWS {
            bytes.clear();
            self.read_row(row, &mut bytes);
            copy.write_row(row, &bytes);
        }
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::Device;

    #[test]
    fn a_row_comes_back_and_a_copy_has_both() {
        let meter = Meter::default();
        let memory = Device::cpu().buffer_type();
        for n_matrices in [0, 5] {
            let state = StateStore::new(3, n_matrices, memory, &meter).unwrap();
            let rows: [Vec<u8>; 2] = [1, 2].map(|row| (0..state.row_bytes() as u8).map(|byte| byte * row).collect());
            (0..).zip(&rows).for_each(|(row, bytes)| state.write_row(row, bytes));
            let copy = state.copied().unwrap();
            for (row, bytes) in rows.iter().enumerate() {
                let mut found = Vec::new();
                copy.read_row(row, &mut found);
                assert_eq!((&found, found.len()), (bytes, 4 * (3 + n_matrices)));
            }
            assert!(meter.now() >= state.bytes() + copy.bytes());
        }
        assert_eq!(meter.now(), 0);
    }
}
