//! Few queries, as in decode: threads divide the rows (split-K), and a key row is read once for several query vectors.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    block::{BLOCK, Prefetch, RowPtr},
    call::{Call, MAX_RANGES},
    chunks::Chunks,
    kernels::{Isa, OnlineSoftmax},
    products::{Bf16, F16, F32, Q4, Q8},
    scratch::{Scratch, padded, partial_stride},
    tiled::{Codes2, Codes3, Codes4, TilePtr},
    views::{Kind, MAX_SEGMENTS, Rows, Segment, Sight},
};

/// A thread's scratch memory for decode.
struct Buffers {
    /// Vectors of all heads, those of a head one after the other.
    queries: *mut f32,
    /// The same as the kernel for four-bit keys wants them; `packed_len` elements each, 0 where there is none.
    packed: *mut f32,
    packed_len: usize,
    /// `[queries][BLOCK]`
    mask: *mut f32,
    scores: *mut f32,
    /// A block of rows as f32.
    converted: *mut f32,
    /// What the kernels for tiles need.
    of_tiles: *mut f32,
}

/// A few query vectors of one KV head.
struct Group {
    queries: *const f32,
    /// The same as the kernel for four-bit keys wants them, where there is one.
    packed: Option<*const f32>,
    /// Each vector's mask of the block's rows, or null.
    masks: [*const f32; 4],
    out: *mut f32,
    scores: *mut f32,
    converted: *mut f32,
    of_tiles: *mut f32,
}

/// # Safety
/// `from` has `size` elements, `to` room for `stride`.
unsafe fn copy_scaled(from: *const f32, size: usize, factor: f32, to: *mut f32, stride: usize) {
    // SAFETY: as the caller says.
    unsafe {
        let from = std::slice::from_raw_parts(from, size);
        let (to, padding) = std::slice::from_raw_parts_mut(to, stride).split_at_mut(size);
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
        padding.fill(0.0);
    }
}

impl Call<'_> {
    /// Attends for few queries.
    ///
    /// # Safety
    /// The tensors have memory, this is one of the threads of the node's run, and the processor has the features.
    pub(super) unsafe fn decode<I: Isa>(&self, scratch: &mut Scratch) {
        let chunks = Chunks::new(self.segments.map(|segment| segment.map_or(0, |segment| segment.n)));
        let n_chunks = chunks.total();
        // All KV heads go together where there is enough to do, so that whole rows are read in order.
        let n_groups = (4 * self.n_threads).div_ceil(n_chunks.max(1)).clamp(1, self.kv_heads);
        let group_size = self.kv_heads.div_ceil(n_groups);
        let n_groups = self.kv_heads.div_ceil(group_size);
        // SAFETY: as the caller says.
        let buffers = unsafe { self.prepare::<I>(scratch) };
        // The last chunk's segment, and where its rows end.
        let mut last = (MAX_SEGMENTS, 0);
        self.share(n_groups * n_chunks, self.n_threads.min(MAX_RANGES), |item| {
            let (chunk, group) = (item / n_groups, item % n_groups);
            let kv_heads = group * group_size..((group + 1) * group_size).min(self.kv_heads);
            let (segment, rows) = chunks.get(chunk);
            let is_cold = last != (segment, rows.start);
            last = (segment, rows.end);
            // SAFETY: as the caller says. Each chunk and head is one thread's.
            unsafe {
                self.attend_chunk::<I>(&buffers, chunk, self.segment(segment), rows, kv_heads.clone(), is_cold);
                self.merge::<I>(chunk, &chunks, group, kv_heads);
            }
        });
    }

    /// Scales (and packs) the queries of all heads, which each thread does once for itself.
    ///
    /// # Safety
    /// As [`Call::decode`].
    unsafe fn prepare<I: Isa>(&self, scratch: &mut Scratch) -> Buffers {
        let (key_size, value_size) = (padded(self.key_size), padded(self.value_size));
        let n_vectors = self.heads * self.n;
        // Four-bit keys may have a kernel that wants queries in a form of its own.
        let has_q4 = self.segments.iter().flatten().any(|segment| matches!(segment.k.kind, Kind::Q4));
        let packed_len = if has_q4 { I::packed_q4(self.key_size) } else { 0 };
        let of_tiles = TilePtr::room(key_size.max(value_size), I::MAX_GROUP);
        let of_block = (I::MAX_GROUP + key_size.max(value_size)) * BLOCK;
        let mut room = scratch.room(n_vectors * (key_size + packed_len) + self.n * BLOCK + of_block + of_tiles);
        let buffers = Buffers {
            queries: room.take(n_vectors * key_size),
            packed: room.take(n_vectors * packed_len),
            packed_len,
            mask: room.take(self.n * BLOCK),
            scores: room.take(I::MAX_GROUP * BLOCK),
            converted: room.take(key_size.max(value_size) * BLOCK),
            of_tiles: room.take(of_tiles),
        };
        for head in 0..self.heads {
            for query in 0..self.n {
                let vector = head * self.n + query;
                // SAFETY: the query is there, and room for so many vectors.
                unsafe {
                    let to = buffers.queries.add(vector * key_size);
                    copy_scaled(self.query(query, head), self.key_size, self.factor, to, key_size);
                    if packed_len > 0 {
                        I::pack_q4(to, self.key_size, buffers.packed.add(vector * packed_len));
                    }
                }
            }
        }
        buffers
    }

    /// The split-K partial of a chunk for a query of a head.
    fn partial(&self, chunk: usize, head: usize, query: usize) -> *mut f32 {
        let index = (chunk * self.heads + head) * self.n + query;
        // SAFETY: `Op::add` made room for all of them.
        unsafe { self.partials.data().add(index * partial_stride(padded(self.value_size))) }
    }

    /// # Safety
    /// As [`Call::decode`]; the chunk and the heads are this thread's.
    unsafe fn attend_chunk<I: Isa>(
        &self,
        buffers: &Buffers,
        chunk: usize,
        segment: &Segment,
        rows: Range<usize>,
        kv_heads: Range<usize>,
        // Nobody has prefetched the chunk's first rows yet.
        is_cold: bool,
    ) {
        let (key_size, value_size) = (padded(self.key_size), padded(self.value_size));
        let heads = kv_heads.start * self.group..kv_heads.end * self.group;
        // Vectors of a KV head: all queries of all its heads.
        let per_kv_head = self.group * self.n;
        let packed_len = if matches!(segment.k.kind, Kind::Q4) { buffers.packed_len } else { 0 };
        // SAFETY: all pointers are into memory of the sizes that `prepare` asked for, or of the tensors whose sizes were
        // checked when the operation was made.
        unsafe {
            // Values are cleared once a row is seen: many of a ring's chunks may be hidden.
            let mut is_empty = true;
            for head in heads.clone() {
                for query in 0..self.n {
                    let partial = self.partial(chunk, head, query);
                    partial.add(value_size).cast::<OnlineSoftmax>().write_unaligned(OnlineSoftmax::EMPTY);
                }
            }
            // Rows that no query sees are not prefetched: a ring has a run of them.
            let sight = |first: usize| match segment.mask {
                Some(mask) if first < rows.end => mask.sight(0..self.n, first, BLOCK.min(rows.end - first)),
                _ => Sight::Everything,
            };
            let mut next = sight(rows.start);
            if is_cold && next != Sight::Nothing {
                for kv_head in kv_heads.clone() {
                    for rows_of in [segment.k, segment.v] {
                        let prefetch = rows_of.prefetch(kv_head, &kv_heads, self.kv_heads, rows.start);
                        for r in (0..BLOCK.min(rows.len())).step_by(8) {
                            prefetch.issue::<8>(r);
                        }
                    }
                }
            }
            for first in rows.clone().step_by(BLOCK) {
                let n = BLOCK.min(rows.end - first);
                let seen = std::mem::replace(&mut next, sight(first + BLOCK));
                if seen == Sight::Nothing {
                    continue;
                }
                if std::mem::take(&mut is_empty) {
                    for head in heads.clone() {
                        for query in 0..self.n {
                            std::slice::from_raw_parts_mut(self.partial(chunk, head, query), value_size).fill(0.0);
                        }
                    }
                }
                let masked = seen == Sight::Some || n < BLOCK;
                if masked {
                    for query in 0..self.n {
                        let to = buffers.mask.add(query * BLOCK);
                        match segment.mask {
                            Some(mask) => mask.convert::<I>(query, first, n, to),
                            None => std::slice::from_raw_parts_mut(to, n).fill(0.0),
                        }
                        std::slice::from_raw_parts_mut(to.add(n), BLOCK - n).fill(f32::NEG_INFINITY);
                    }
                }
                let prefetch = |rows: &Rows, head| rows.prefetch(head, &kv_heads, self.kv_heads, first + BLOCK);
                for kv_head in kv_heads.clone() {
                    // A head with rows of its own may have fewer than others.
                    let n = n.min(segment.n_of(kv_head).saturating_sub(first));
                    if n == 0 {
                        continue;
                    }
                    let masked = masked || n < BLOCK;
                    if masked && !segment.n_of_heads.is_null() {
                        for query in 0..self.n {
                            let (seen, after) =
                                std::slice::from_raw_parts_mut(buffers.mask.add(query * BLOCK), BLOCK).split_at_mut(n);
                            seen.fill(0.0);
                            after.fill(f32::NEG_INFINITY);
                        }
                    }
                    let mut k = segment.k.at(kv_head, first, n);
                    let mut v = segment.v.at(kv_head, first, n);
                    (k.prefetch, v.prefetch) = match next {
                        Sight::Nothing => (Prefetch::NOTHING, Prefetch::NOTHING),
                        _ => (prefetch(&segment.k, kv_head), prefetch(&segment.v, kv_head)),
                    };
                    let vectors = kv_head * per_kv_head;
                    let mut done = 0;
                    while done < per_kv_head {
                        let left = per_kv_head - done;
                        // Groups of about equal size.
                        let size = left.div_ceil(left.div_ceil(I::MAX_GROUP));
                        let group = Group {
                            queries: buffers.queries.add((vectors + done) * key_size),
                            packed: (packed_len > 0)
                                .then(|| buffers.packed.add((vectors + done) * packed_len).cast_const()),
                            masks: std::array::from_fn(|g| match masked {
                                true => buffers.mask.add((done + g) % self.n * BLOCK).cast_const(),
                                false => std::ptr::null(),
                            }),
                            out: self.partial(chunk, 0, vectors + done),
                            scores: buffers.scores,
                            converted: buffers.converted,
                            of_tiles: buffers.of_tiles,
                        };
                        match size {
                            1 => self.attend_block::<I, 1>(segment, k, v, &group),
                            2 => self.attend_block::<I, 2>(segment, k, v, &group),
                            3 => self.attend_block::<I, 3>(segment, k, v, &group),
                            _ => self.attend_block::<I, 4>(segment, k, v, &group),
                        }
                        (k.prefetch, v.prefetch) = (Prefetch::NOTHING, Prefetch::NOTHING);
                        done += size;
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Call::decode`]; the group's memory is this thread's.
    unsafe fn attend_block<I: Isa, const G: usize>(&self, segment: &Segment, k: RowPtr, v: RowPtr, group: &Group) {
        let (key_size, value_size) = (padded(self.key_size), padded(self.value_size));
        let (queries, scores) = (group.queries, group.scores);
        let stride = partial_stride(value_size);
        // SAFETY: as the caller says.
        unsafe {
            if segment.k.is_direct::<I>(self.key_size) {
                let size = self.key_size;
                match segment.k.kind {
                    Kind::F16 => I::scores_of::<F16, G>(queries, key_size, k, size, scores),
                    Kind::Bf16 => I::scores_of::<Bf16, G>(queries, key_size, k, size, scores),
                    Kind::Q8 => I::scores_of::<Q8, G>(queries, key_size, k, size, scores),
                    Kind::Q4 => match group.packed {
                        Some(packed) => I::scores_of_q4::<G>(packed, k, size, scores),
                        None => I::scores_of::<Q4, G>(queries, key_size, k, size, scores),
                    },
                    Kind::Tiles(layout) => {
                        let tile = TilePtr { codes: k, layout, room: group.of_tiles };
                        match layout.bits {
                            4 => I::scores_of_tile::<Codes4, G>(queries, key_size, tile, scores),
                            3 => I::scores_of_tile::<Codes3, G>(queries, key_size, tile, scores),
                            _ => I::scores_of_tile::<Codes2, G>(queries, key_size, tile, scores),
                        }
                    }
                    Kind::F32 | Kind::Other(_) => I::scores_of::<F32, G>(queries, key_size, k, size, scores),
                }
            } else {
                let k = self.converted::<I>(&segment.k, k, self.key_size, group);
                I::scores_of::<F32, G>(queries, key_size, k, key_size, scores);
            }
            let states = std::array::from_fn(|g| group.out.add(g * stride + value_size).cast::<OnlineSoftmax>());
            let factors = I::weights_of(scores, k.n, &group.masks, self.shape, states);
            if segment.v.is_direct::<I>(self.value_size) {
                let size = self.value_size;
                match segment.v.kind {
                    Kind::F16 => I::add_values::<F16, G>(scores, v, size, &factors, group.out, stride),
                    Kind::Bf16 => I::add_values::<Bf16, G>(scores, v, size, &factors, group.out, stride),
                    Kind::Q8 => I::add_values::<Q8, G>(scores, v, size, &factors, group.out, stride),
                    Kind::Q4 => I::add_values_q4::<G>(scores, v, size, &factors, group.out, stride),
                    Kind::Tiles(layout) => {
                        let tile = TilePtr { codes: v, layout, room: group.of_tiles };
                        match layout.bits {
                            4 => I::add_values_of_tile::<Codes4, G>(scores, tile, &factors, group.out, stride),
                            3 => I::add_values_of_tile::<Codes3, G>(scores, tile, &factors, group.out, stride),
                            _ => I::add_values_of_tile::<Codes2, G>(scores, tile, &factors, group.out, stride),
                        }
                    }
                    Kind::F32 | Kind::Other(_) => I::add_values::<F32, G>(scores, v, size, &factors, group.out, stride),
                }
            } else {
                let v = self.converted::<I>(&segment.v, v, self.value_size, group);
                I::add_values::<F32, G>(scores, v, value_size, &factors, group.out, stride);
            }
        }
    }

    /// The rows as f32 in the group's memory, padded with zeros.
    ///
    /// # Safety
    /// As [`Call::decode`].
    unsafe fn converted<I: Isa>(&self, rows: &Rows, block: RowPtr, size: usize, group: &Group) -> RowPtr {
        let (to, stride) = (group.converted, padded(size));
        // SAFETY: there is room for a block of padded rows.
        unsafe {
            rows.convert::<I>(block, size, (to, stride), group.of_tiles);
            for r in 0..block.n {
                std::slice::from_raw_parts_mut(to.add(r * stride + size), stride - size).fill(0.0);
            }
        }
        RowPtr {
            data: to.cast_const().cast(),
            bytes: stride * size_of::<f32>(),
            n: block.n,
            prefetch: Prefetch::NOTHING,
        }
    }

    /// Adds a finished chunk's partial to those of its segment, for some KV heads: the first chunk's to the second's, the third's
    /// to the fourth's, then these pairs to each other, and so on; then segment to segment. So the result depends neither on
    /// who finishes when nor on empty chunks at a segment's end. Who finishes the second of two adds them: mostly that is who
    /// finished the first, and still has it in its caches.
    ///
    /// # Safety
    /// As [`Call::decode`]; the chunk and the heads are this thread's.
    unsafe fn merge<I: Isa>(&self, chunk: usize, chunks: &Chunks, group: usize, kv_heads: Range<usize>) {
        let done = |at: usize| &self.counters.halves_done[group * chunks.total() + at];
        let segment = chunks.segment(chunk);
        let mut left = chunk - segment.start;
        let mut width = 1;
        while width < segment.len() {
            left -= left % (2 * width);
            let right = left + width;
            if right < segment.len() {
                let done = done(segment.start + right);
                if done.fetch_add(1, Ordering::AcqRel) == 0 {
                    return;
                }
                done.store(0, Ordering::Relaxed);
                // SAFETY: both halves are done; what others wrote is seen by the counter's ordering.
                unsafe { self.merge_two::<I>(segment.start + left, segment.start + right, kv_heads.clone()) };
            }
            width *= 2;
        }
        // No halves meet at the first chunk: there the segments are counted.
        let segments = || chunks.n.iter().filter(|&&n| n > 0);
        if done(0).fetch_add(1, Ordering::AcqRel) + 1 < segments().count() {
            return;
        }
        done(0).store(0, Ordering::Relaxed);
        let mut next = 0;
        for n in segments() {
            if next > 0 {
                // SAFETY: all segments are done; as above.
                unsafe { self.merge_two::<I>(0, next, kv_heads.clone()) };
            }
            next += n;
        }
        for head in kv_heads.start * self.group..kv_heads.end * self.group {
            for query in 0..self.n {
                // SAFETY: the output has `value_size` elements for each head and query, and so has the partial.
                unsafe {
                    let values = self.partial(0, head, query);
                    let softmax = values.add(padded(self.value_size)).cast::<OnlineSoftmax>().read();
                    let out = self.out.add((query * self.heads + head) * self.value_size);
                    let out = std::slice::from_raw_parts_mut(out, self.value_size);
                    if softmax.max == f32::NEG_INFINITY {
                        // It sees nothing: no chunk has cleared the values.
                        out.fill(0.0);
                        continue;
                    }
                    let factor = self.finish(head, softmax);
                    let values = std::slice::from_raw_parts(values, self.value_size);
                    for (out, value) in out.iter_mut().zip(values) {
                        *out = value * factor;
                    }
                }
            }
        }
    }

    /// Adds the partial of chunk `right` to that of chunk `left`, for some KV heads.
    ///
    /// # Safety
    /// Both are this thread's; the processor has the features.
    unsafe fn merge_two<I: Isa>(&self, left: usize, right: usize, kv_heads: Range<usize>) {
        let value_size = padded(self.value_size);
        for head in kv_heads.start * self.group..kv_heads.end * self.group {
            for query in 0..self.n {
                let [to, from] = [left, right].map(|chunk| self.partial(chunk, head, query));
                // SAFETY: each partial is `value_size` elements and its softmax state; they lie apart.
                unsafe { I::add_partial(to, from, value_size) };
            }
        }
    }
}
