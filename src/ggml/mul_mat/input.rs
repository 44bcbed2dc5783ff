//! What is multiplied, quantised to eight bits in blocks of 32.
//!
//! Vectors are cut into slices, and all vectors' first slices come before all second ones: a kernel works through many
//! vectors' slices of some elements, which are to lie together in the second-level cache. A slice of a vector is its
//! numbers, then scales, then sums and starts.

/// Elements with a scale in common.
pub(super) const BLOCK: usize = 32;

/// Elements of a slice at most: a panel of them is to stay in a core's first-level cache.
pub(super) const SLICE_LEN: usize = 1024;

/// Where data is best begun: the first vector's loads then are of one line of the processor's caches each.
pub(super) const ALIGNMENT: usize = 64;

/// What kernels want to know of the input beside its numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::ggml) struct Scheme {
    /// Bytes of a block and what belongs to it.
    pub block_bytes: usize,
    /// Groups of the weights' elements in a block: 1 or 2; 0 where numbers are floats and stand alone.
    pub groups: usize,
    /// What the weights' numbers are larger by than what they stand for.
    pub offset: i32,
}

/// Quantises a slice.
///
/// Its arguments are the slice's elements and their number, and where it goes, good for [`Scheme::slice_bytes`] and aligned
/// as floats. The processor must have the features that the function is for.
pub(super) type Quantize = unsafe fn(Scheme, *const f32, usize, *mut u8);

/// Some elements of each vector.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    /// The first element.
    pub from: usize,
    /// How many they are.
    pub len: usize,
}

/// The slices of vectors of `k` elements.
pub(super) fn slices(k: usize) -> impl Iterator<Item = Slice> {
    (0..k).step_by(SLICE_LEN).map(move |from| Slice { from, len: SLICE_LEN.min(k - from) })
}

impl Scheme {
    /// Eight-bit numbers with a scale for each block, and a sum and a start for each group.
    pub const fn quantized(groups: usize, offset: i32) -> Scheme {
        Scheme { block_bytes: BLOCK + 4 + 8 * groups, groups, offset }
    }

    /// Bytes of a slice of `len` elements, and of a vector of as many.
    pub fn slice_bytes(self, len: usize) -> usize {
        len / BLOCK * self.block_bytes
    }

    /// Where the slice of vector `vector` of `n_vectors` is.
    fn slice_at(self, slice: Slice, vector: usize, n_vectors: usize) -> usize {
        self.slice_bytes(slice.from) * n_vectors + self.slice_bytes(slice.len) * vector
    }
}

/// Quantised vectors.
#[derive(Clone, Copy)]
pub(super) struct Input {
    pub scheme: Scheme,
    pub n_vectors: usize,
    pub data: *mut u8,
}

/// A slice of one vector of an [`Input`].
#[derive(Clone, Copy)]
pub(super) struct Vector {
    /// Between −127 and 127, or floats.
    pub numbers: *const i8,
    /// By block.
    pub scales: *const f32,
    /// Each group's sum of numbers, times its scale.
    pub sums: *const f32,
    /// Each group's sum of numbers, times minus the offset of the weights: what a sum of products begins with.
    #[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "numbers have their sign there"))]
    pub starts: *const i32,
}

impl Input {
    /// In memory that has [`ALIGNMENT`] more bytes than the vectors.
    pub fn within(memory: *mut u8, scheme: Scheme, n_vectors: usize) -> Input {
        Input { scheme, n_vectors, data: memory.wrapping_add(memory.align_offset(ALIGNMENT)) }
    }

    /// Quantises a slice of the vector number `vector`, whose elements lie at `from`.
    ///
    /// # Safety
    /// The data is good for all slices; `from` for the whole vector; the processor has the features of `quantize`.
    pub unsafe fn write(&self, quantize: Quantize, vector: usize, slice: Slice, from: *const f32) {
        let at = self.scheme.slice_at(slice, vector, self.n_vectors);
        // SAFETY: as the caller says.
        unsafe { quantize(self.scheme, from.add(slice.from), slice.len, self.data.add(at)) }
    }

    /// # Safety
    /// The vector was written.
    #[inline]
    pub unsafe fn vector(&self, vector: usize, slice: Slice) -> Vector {
        let blocks = slice.len / BLOCK;
        // SAFETY: as the caller says, and slices are as they were written.
        unsafe {
            let numbers = self.data.add(self.scheme.slice_at(slice, vector, self.n_vectors));
            let scales = numbers.add(slice.len).cast::<f32>();
            let sums = scales.add(blocks);
            Vector { numbers: numbers.cast(), scales, sums, starts: sums.add(blocks * self.scheme.groups).cast() }
        }
    }
}
