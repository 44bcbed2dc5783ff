//! Rotation of keys, queries and values by a Walsh-Hadamard matrix, so that four bits lose less.
//!
//! The matrix is orthonormal and its own inverse: keys and queries rotated alike keep their products, and rotated
//! values are rotated back on the attention output (llama.cpp #21038).

use std::collections::BTreeMap;

use super::RowShape;
use crate::ggml::{BufferType, Context, Error, Graph, Tensor, Type};

/// The largest block that values are rotated in; larger ones lose more (llama.cpp #21038, measured there).
const MAX_VALUE_BLOCK: usize = 64;

/// The matrices that a session needs, on the cache's device.
#[derive(Debug)]
pub(crate) struct Rotations {
    matrices: BTreeMap<usize, Tensor>,
    key_block: usize,
    value_block: usize,
}

impl Rotations {
    /// Matrices for keys and values of these sizes: rotated in blocks of the largest power of two that divides them. Values
    /// that are in the keys have the keys' blocks, of which they are a whole number.
    pub fn new(shape: RowShape, memory: BufferType) -> Result<Rotations, Error> {
        let largest = |size: usize| 1 << size.trailing_zeros();
        let value_block = largest(shape.value_size).min(MAX_VALUE_BLOCK);
        let [key_block, value_block] = match shape.values_in_keys {
            true => [largest(shape.key_size).min(value_block); 2],
            false => [largest(shape.key_size), value_block],
        };
        let context = Context::new(2);
        let mut matrices = BTreeMap::new();
        for n in [key_block, value_block] {
            matrices.entry(n).or_insert_with(|| context.tensor(Type::F32, &[n, n]));
        }
        context.alloc(memory, "rotation matrices")?;
        for (&n, matrix) in &matrices {
            matrix.write(0, &hadamard(n));
        }
        Ok(Rotations { matrices, key_block, value_block })
    }

    /// Rotates keys or queries, `[head size, heads, n]` or rows of whole heads; also their inverse.
    pub fn rotate_key(&self, graph: &Graph, a: &Tensor) -> Tensor {
        self.rotate(graph, a, self.key_block)
    }

    /// Rotates values, or attention output back.
    pub fn rotate_value(&self, graph: &Graph, a: &Tensor) -> Tensor {
        self.rotate(graph, a, self.value_block)
    }

    fn rotate(&self, graph: &Graph, a: &Tensor, block: usize) -> Tensor {
        let shape = a.shape();
        let n: usize = shape.iter().product();
        let a = graph.contiguous_if_needed(a);
        let blocks = graph.reshape(&a, &[block, n / block]);
        let rotated = graph.mul_mat_hadamard(&self.matrices[&block], &blocks);
        graph.reshape(&rotated, &shape)
    }
}

/// Sylvester's matrix of a power of two, scaled to be orthonormal: entry (i, j) is ± 1/√n by the parity of i AND j.
fn hadamard(n: usize) -> Vec<f32> {
    let scale = 1.0 / (n as f32).sqrt();
    (0..n * n).map(|k| if ((k / n) & (k % n)).count_ones().is_multiple_of(2) { scale } else { -scale }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_matrix_is_its_own_inverse() {
        for n in [1, 2, 16, 64, 128] {
            let h = hadamard(n);
            for i in 0..n {
                for j in 0..n {
                    let product: f32 = (0..n).map(|k| h[i * n + k] * h[k * n + j]).sum();
                    assert!((product - f32::from(u8::from(i == j))).abs() < 1e-5, "{n}: {i}, {j}: {product}");
                }
            }
        }
    }
}
