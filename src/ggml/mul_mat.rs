//! Products of a quantised matrix and vectors: an operation of our own.
//!
//! As in ggml, activations are quantised to eight bits in blocks of 32 and products are summed as integers. Two blocks
//! fill a register, scales stay in f32, each thread quantises the input for itself, so that no thread waits for
//! another before the product, and weights are unpacked once for four vectors. Many vectors are taken in tiles that
//! stay in the second-level cache. For AVX-512 with VNNI; where that is missing ggml's operation is used.

use ggml_sys as sys;

use super::{Tensor, Type};

/// Whether [`add`] can multiply these.
pub(super) fn applies(weight: &Tensor, input: &Tensor) -> bool {
    let ([k, n_rows, w2, w3], [_, n, i2, i3]) = (weight.shape(), input.shape());
    let is_plain = [w2, w3, i2, i3] == [1; 4] && input.ty() == Type::F32 && input.strides()[0] == size_of::<f32>();
    is_plain
        && n > 0
        && n_rows > 0
        && k.is_multiple_of(64)
        && [Type::Q4_0, Type::Q4_1, Type::Q8_0].contains(&weight.ty())
        && weight.is_host()
        && is_supported()
}

#[cfg(not(target_arch = "x86_64"))]
fn is_supported() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn is_supported() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("avx512vnni") && has!("f16c")
}

/// Adds the node of `weight [k, rows] × input [k, n]` → `[rows, n]` to the context `raw`.
///
/// # Safety
/// [`applies`] said yes; the context is alive, and the tensors live as long as it.
pub(super) unsafe fn add(raw: *mut sys::ggml_context, weight: &Tensor, input: &Tensor) -> *mut sys::ggml_tensor {
    let mut sources = [weight.raw(), input.raw()];
    // SAFETY: as the caller says; the callback has the type that ggml wants and no state.
    unsafe {
        sys::ggml_custom_4d(
            raw,
            sys::GGML_TYPE_F32,
            weight.shape()[1] as i64,
            input.shape()[1] as i64,
            1,
            1,
            sources.as_mut_ptr(),
            sources.len() as i32,
            Some(callback),
            sys::GGML_N_TASKS_MAX,
            std::ptr::null_mut(),
        )
    }
}

unsafe extern "C" fn callback(node: *mut sys::ggml_tensor, thread: i32, n_threads: i32, _: *mut std::ffi::c_void) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: ggml runs nodes that `add` made, while their tensors have memory; `applies` asked for the features.
    unsafe {
        let (weight, input) = ((*node).src[0], (*node).src[1]);
        let (k, n_rows, n) = ((*weight).ne[0] as usize, (*weight).ne[1] as usize, (*input).ne[1] as usize);
        let (thread, n_threads) = (thread as usize, n_threads as usize);
        let rows = thread * n_rows / n_threads..(thread + 1) * n_rows / n_threads;
        if rows.is_empty() {
            return;
        }
        let product = vnni::Product {
            weights: (*weight).data.cast(),
            row_bytes: (*weight).nb[1],
            k,
            input: (*input).data.cast(),
            input_bytes: (*input).nb[1],
            n,
            rows,
            out: (*node).data.cast(),
            out_bytes: (*node).nb[1],
        };
        match (*weight).type_ {
            sys::GGML_TYPE_Q4_0 => product.run::<vnni::Q4_0>(),
            sys::GGML_TYPE_Q4_1 => product.run::<vnni::Q4_1>(),
            _ => product.run::<vnni::Q8_0>(),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("`applies` says no: {node:?} {thread} {n_threads}");
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::{arch::x86_64::*, cell::RefCell, ops::Range};

    /// Two blocks of a quantised input, laid out as the weights of two blocks lie in a register.
    #[derive(Clone, Copy)]
    #[repr(C, align(64))]
    struct Pair {
        numbers: [i8; 64],
        /// The scale of the block that each lane's four numbers are of.
        scales: [f32; 16],
        /// What the sum of products starts from: it takes back that weights are stored with an offset.
        start: [i32; 16],
        /// Sums of the two blocks' elements in lanes 1 and 3, for weights that have a minimum.
        sums: [f32; 4],
    }

    /// How weights are stored in blocks of 32.
    pub trait Block {
        const BYTES: usize;
        /// What is added to weights before they are stored, so that they are not negative.
        const OFFSET: i32;
        /// Whether blocks have a minimum beside the scale.
        const HAS_MIN: bool;
        /// Whether the second half of a block lies in the upper halves of the first half's bytes.
        const HALVES: bool;
        /// # Safety
        /// The block and the one behind it exist; so do the features.
        unsafe fn unpack(block: *const u8) -> __m512i;
    }

    pub struct Q4_0;
    pub struct Q4_1;
    pub struct Q8_0;

    /// Two times 16 bytes → 64 numbers: the first halves of both blocks, then the second halves.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn unpack_halves(first: *const u8, second: *const u8) -> __m512i {
        // SAFETY: both are good for 16 bytes.
        unsafe {
            let bytes = _mm256_inserti128_si256::<1>(
                _mm256_castsi128_si256(_mm_loadu_si128(first.cast())),
                _mm_loadu_si128(second.cast()),
            );
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), _mm256_srli_epi16::<4>(bytes));
            _mm512_and_si512(both, _mm512_set1_epi8(15))
        }
    }

    impl Block for Q4_0 {
        const BYTES: usize = 18;
        const OFFSET: i32 = 8;
        const HAS_MIN: bool = false;
        const HALVES: bool = true;
        #[inline(always)]
        unsafe fn unpack(block: *const u8) -> __m512i {
            // SAFETY: a block is its scale and 16 bytes.
            unsafe { unpack_halves(block.add(2), block.add(20)) }
        }
    }

    impl Block for Q4_1 {
        const BYTES: usize = 20;
        const OFFSET: i32 = 0;
        const HAS_MIN: bool = true;
        const HALVES: bool = true;
        #[inline(always)]
        unsafe fn unpack(block: *const u8) -> __m512i {
            // SAFETY: a block is its scale, its minimum and 16 bytes.
            unsafe { unpack_halves(block.add(4), block.add(24)) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn unpack_bytes(first: *const u8, second: *const u8) -> __m512i {
        // SAFETY: both are good for 32 bytes.
        unsafe {
            let bytes = _mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(_mm256_loadu_si256(first.cast())),
                _mm256_loadu_si256(second.cast()),
            );
            // Adds 128, as the product wants numbers without a sign.
            _mm512_xor_si512(bytes, _mm512_set1_epi8(i8::MIN))
        }
    }

    impl Block for Q8_0 {
        const BYTES: usize = 34;
        const OFFSET: i32 = 128;
        const HAS_MIN: bool = false;
        const HALVES: bool = false;
        #[inline(always)]
        unsafe fn unpack(block: *const u8) -> __m512i {
            // SAFETY: a block is its scale and 32 bytes.
            unsafe { unpack_bytes(block.add(2), block.add(36)) }
        }
    }

    /// Quantised input that is worked on at once: it is to stay in a core's own cache.
    const TILE_BYTES: usize = 384 << 10;

    /// One thread's share of a product.
    pub struct Product {
        pub weights: *const u8,
        pub row_bytes: usize,
        pub k: usize,
        pub input: *const u8,
        pub input_bytes: usize,
        pub n: usize,
        pub rows: Range<usize>,
        pub out: *mut u8,
        pub out_bytes: usize,
    }

    thread_local! {
        /// The quantised input. It grows to the longest and stays.
        static INPUT: RefCell<Vec<Pair>> = const { RefCell::new(Vec::new()) };
    }

    impl Product {
        /// # Safety
        /// The pointers are good for what the fields say; the processor has the features.
        pub unsafe fn run<B: Block>(&self) {
            INPUT.with_borrow_mut(|pairs| {
                let per_vector = self.k / 64;
                let tile = (TILE_BYTES / (per_vector * size_of::<Pair>())).next_multiple_of(4).min(self.n);
                let empty = Pair { numbers: [0; 64], scales: [0.0; 16], start: [0; 16], sums: [0.0; 4] };
                if pairs.len() < tile * per_vector {
                    pairs.resize(tile * per_vector, empty);
                }
                // SAFETY: as the caller says.
                unsafe {
                    for first in (0..self.n).step_by(tile) {
                        let n = tile.min(self.n - first);
                        for (i, pairs) in pairs[..n * per_vector].chunks_exact_mut(per_vector).enumerate() {
                            quantize::<B>(self.input.add((first + i) * self.input_bytes).cast(), pairs);
                        }
                        self.multiply_tile::<B>(&pairs[..n * per_vector], first, n);
                    }
                }
            });
        }

        /// Multiplies with the `n` vectors from number `first` on.
        ///
        /// # Safety
        /// As [`Product::run`].
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
        unsafe fn multiply_tile<B: Block>(&self, pairs: &[Pair], first: usize, n: usize) {
            let per_vector = self.k / 64;
            for row in self.rows.clone() {
                let mut done = 0;
                while done < n {
                    let (pairs, first) = (&pairs[done * per_vector..], first + done);
                    // SAFETY: as the caller says.
                    done += unsafe {
                        match n - done {
                            1 => self.multiply::<B, 1>(row, pairs, first),
                            2 => self.multiply::<B, 2>(row, pairs, first),
                            3 => self.multiply::<B, 3>(row, pairs, first),
                            _ => self.multiply::<B, 4>(row, pairs, first),
                        }
                    };
                }
            }
        }

        /// Multiplies a row with `N` vectors, of which the first has number `first`. Returns `N`.
        ///
        /// # Safety
        /// As [`Product::run`].
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
        unsafe fn multiply<B: Block, const N: usize>(&self, row: usize, pairs: &[Pair], first: usize) -> usize {
            let per_vector = self.k / 64;
            let pairs = pairs.as_ptr();
            // The lanes of the scales of two blocks, in `[scale, minimum, scale, minimum]` or `[scale, scale]`.
            let (a, b) = if B::HAS_MIN { (0, 2) } else { (0, 1) };
            let lanes = if B::HALVES {
                _mm512_set_epi32(b, b, b, b, a, a, a, a, b, b, b, b, a, a, a, a)
            } else {
                _mm512_set_epi32(b, b, b, b, b, b, b, b, a, a, a, a, a, a, a, a)
            };
            let mut sums = [_mm512_setzero_ps(); N];
            let mut minima = [_mm_setzero_ps(); N];
            // SAFETY: rows are `k` elements, that is `per_vector` pairs of blocks; so are the vectors.
            unsafe {
                let weights = self.weights.add(row * self.row_bytes);
                for p in 0..per_vector {
                    let block = weights.add(p * 2 * B::BYTES);
                    // Rows follow each other: what comes in some rows is asked for now.
                    _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(2048).cast());
                    let numbers = B::unpack(block);
                    let next = block.add(B::BYTES);
                    let halves = if B::HAS_MIN {
                        let first = _mm_cvtsi32_si128(block.cast::<i32>().read_unaligned());
                        _mm_insert_epi32::<1>(first, next.cast::<i32>().read_unaligned())
                    } else {
                        let first = _mm_cvtsi32_si128(i32::from(block.cast::<u16>().read_unaligned()));
                        _mm_insert_epi16::<1>(first, i32::from(next.cast::<u16>().read_unaligned()))
                    };
                    let halves = _mm_cvtph_ps(halves);
                    let scales = _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(halves));
                    for i in 0..N {
                        let input = &*pairs.add(i * per_vector + p);
                        let start = match B::OFFSET {
                            0 => _mm512_setzero_si512(),
                            _ => _mm512_load_si512(input.start.as_ptr().cast()),
                        };
                        let product =
                            _mm512_dpbusd_epi32(start, numbers, _mm512_load_si512(input.numbers.as_ptr().cast()));
                        let factor = _mm512_mul_ps(scales, _mm512_load_ps(input.scales.as_ptr()));
                        sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sums[i]);
                        if B::HAS_MIN {
                            minima[i] = _mm_fmadd_ps(halves, _mm_load_ps(input.sums.as_ptr()), minima[i]);
                        }
                    }
                }
                for i in 0..N {
                    let sum = _mm512_add_ps(sums[i], _mm512_zextps128_ps512(minima[i]));
                    let out = self.out.add((first + i) * self.out_bytes).cast::<f32>();
                    *out.add(row) = _mm512_reduce_add_ps(sum);
                }
            }
            N
        }
    }

    /// Quantises a vector to eight bits in blocks of 32.
    ///
    /// # Safety
    /// `from` has 64 elements for each pair; the processor has the features.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn quantize<B: Block>(from: *const f32, pairs: &mut [Pair]) {
        for (p, pair) in pairs.iter_mut().enumerate() {
            let mut quarters = [_mm_setzero_si128(); 4];
            let mut scales = [0.0; 2];
            for (block, scale) in scales.iter_mut().enumerate() {
                // SAFETY: as the caller says.
                let [low, high] = unsafe {
                    let from = from.add(p * 64 + block * 32);
                    [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))]
                };
                let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
                *scale = largest / 127.0;
                let factor = _mm512_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
                let low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, factor)));
                let high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, factor)));
                let (first, second) = if B::HALVES { (block, block + 2) } else { (2 * block, 2 * block + 1) };
                quarters[first] = low;
                quarters[second] = high;
            }
            let numbers = _mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(_mm256_set_m128i(quarters[1], quarters[0])),
                _mm256_set_m128i(quarters[3], quarters[2]),
            );
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), numbers);
            let start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-B::OFFSET));
            // SAFETY: the fields are 64 bytes each.
            unsafe {
                _mm512_storeu_si512(pair.numbers.as_mut_ptr().cast(), numbers);
                _mm512_storeu_si512(pair.start.as_mut_ptr().cast(), start);
            }
            // Which block the four numbers of a lane are of: by halves 0 1 0 1 in fours, else 0 1 in eights.
            let second: __mmask16 = if B::HALVES { 0xf0f0 } else { 0xff00 };
            let lanes = _mm512_mask_blend_ps(second, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
            // SAFETY: 16 elements.
            unsafe { _mm512_storeu_ps(pair.scales.as_mut_ptr(), lanes) };
            let first_sum = _mm512_mask_reduce_add_epi32(!second, sums) as f32 * scales[0];
            let second_sum = _mm512_mask_reduce_add_epi32(second, sums) as f32 * scales[1];
            pair.sums = [0.0, first_sum, 0.0, second_sum];
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ggml::{Context, Device, Graph, Scheduler, Tensor, Type};

    fn floats(seed: u64, n: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn compute(scheduler: &mut Scheduler, graph: &Graph, result: &Tensor) -> Vec<f32> {
        graph.expand(result);
        scheduler.alloc(graph).unwrap();
        scheduler.compute(graph).unwrap();
        result.to_f32()
    }

    /// Against the product of the weights as they are stored and the input as it is, in f64: the error is that of
    /// eight-bit inputs, and not above ggml's.
    #[test]
    fn products_are_those_of_the_stored_weights() {
        if !super::is_supported() {
            eprintln!("skipped: this processor has no AVX-512 VNNI");
            return;
        }
        for threads in [1, 3] {
            let mut scheduler = Scheduler::new(&[Device::cpu()], threads, 64).unwrap();
            for (ty, k, rows) in
                [(Type::Q4_1, 576, 77), (Type::Q4_0, 64, 5), (Type::Q8_0, 1536, 33), (Type::Q8_0, 128, 1)]
            {
                for n in [1, 2, 3, 4, 7, 300] {
                    let context = Context::new(4);
                    let source = context.tensor(Type::F32, &[k, rows]);
                    let weight = context.tensor(ty, &[k, rows]);
                    let input = context.tensor(Type::F32, &[k, n]);
                    context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
                    // With a mean, so that minima matter.
                    source.write(0, &floats(1, k * rows).iter().map(|x| x + 0.3).collect::<Vec<_>>());
                    let vectors = floats(2, k * n);
                    input.write(0, &vectors);
                    let graph = Graph::new(8);
                    let copied = graph.copy(&source, &weight);
                    graph.expand(&copied);
                    scheduler.alloc(&graph).unwrap();
                    scheduler.compute(&graph).unwrap();
                    let graph = Graph::new(8);
                    let stored = compute(&mut scheduler, &graph, &graph.cast(&weight, Type::F32).as_output());

                    let mut graph = Graph::new(8);
                    graph.use_own_kernels(true);
                    assert!(super::applies(&weight, &input));
                    let ours = compute(&mut scheduler, &graph, &graph.mul_mat(&weight, &input).as_output());
                    let graph = Graph::new(8);
                    let theirs = compute(&mut scheduler, &graph, &graph.mul_mat(&weight, &input).as_output());
                    let (mut our_error, mut their_error) = (0.0, 0.0);
                    for i in 0..n {
                        for row in 0..rows {
                            let exact: f64 =
                                (0..k).map(|j| f64::from(stored[row * k + j]) * f64::from(vectors[i * k + j])).sum();
                            our_error += (f64::from(ours[i * rows + row]) - exact).powi(2);
                            their_error += (f64::from(theirs[i * rows + row]) - exact).powi(2);
                        }
                    }
                    let scale = (k * n * rows) as f64;
                    let (our_error, their_error) = ((our_error / scale).sqrt(), (their_error / scale).sqrt());
                    assert!(our_error < 3e-3, "{ty}, {k}, {n}: {our_error:e}");
                    assert!(our_error < 1.05 * their_error + 1e-6, "{ty}, {k}, {n}: {our_error:e}, {their_error:e}");
                }
            }
        }
    }

    #[test]
    fn an_input_of_zeros_gives_zeros() {
        let mut scheduler = Scheduler::new(&[Device::cpu()], 1, 64).unwrap();
        let context = Context::new(2);
        let weight = context.tensor(Type::Q8_0, &[64, 3]);
        let input = context.tensor(Type::F32, &[64, 1]);
        context.alloc(Device::cpu().buffer_type(), "a test").unwrap();
        let mut graph = Graph::new(8);
        graph.use_own_kernels(true);
        assert_eq!(compute(&mut scheduler, &graph, &graph.mul_mat(&weight, &input).as_output()), [0.0; 3]);
    }
}
