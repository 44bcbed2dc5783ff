//! From elements to tiles and back. Plain loops over arrays of lanes, which the compiler makes vectors of.

use super::layout::{BLOCK, CHANNEL, Layout, MEAN_UNIT, STEPS, TILE};
use crate::ggml::attention::f16_to_f32;

/// How often tokens and channels are divided by their deviation: more changes nothing that would be seen.
const PASSES: usize = 8;

/// Of a token's largest element, what its outermost codes stand for: the best of these is taken.
const RANGES: [f32; 5] = [1.0, 0.94, 0.88, 0.8, 0.7];

const LANES: usize = 8;

fn sum(elements: impl Iterator<Item = [f32; LANES]>) -> f32 {
    let mut sums = [0.0; LANES];
    for lanes in elements {
        for (sum, lane) in sums.iter_mut().zip(lanes) {
            *sum += lane;
        }
    }
    sums.iter().sum()
}

/// Eight elements at a time; a row is a whole number of them.
fn eights(row: &[f32]) -> impl Iterator<Item = &[f32; LANES]> {
    row.as_chunks::<LANES>().0.iter()
}

/// Makes a tile of `TILE` rows of elements. Rows of nothing but zeros have no token yet; neither these nor the rows before
/// `counted` have a say in the channels' scales.
pub(in crate::ggml) fn pack(rows: &mut [f32], layout: Layout, counted: usize, tile: &mut [u8]) {
    let Layout { size, .. } = layout;
    assert!(rows.len() == TILE * size && tile.len() == layout.bytes(), "a tile");
    let is_token = |row: &[f32]| row.iter().any(|&x| x != 0.0);
    let counts = |first: usize| -> Vec<bool> {
        rows.chunks_exact(size).enumerate().map(|(r, row)| r >= first && is_token(row)).collect()
    };
    let counts = Some(counts(counted)).filter(|counts| counts.contains(&true)).unwrap_or_else(|| counts(0));
    let (scales, means) = normalise(rows, &counts, size);
    let (codes, rest) = tile.split_at_mut(layout.tokens());
    let (tokens, rest) = rest.split_at_mut(TILE * size_of::<u16>());
    let (channel_bytes, mean_bytes) = rest.split_at_mut(size);
    channel_bytes.copy_from_slice(&scales);
    mean_bytes.fill(0);
    for (to, mean) in mean_bytes.as_chunks_mut().0.iter_mut().zip(&means) {
        *to = mean.to_le_bytes();
    }
    let factors: Vec<f32> = scales.iter().map(|&scale| 1.0 / CHANNEL[usize::from(scale)]).collect();
    let offsets: Vec<f32> = means.iter().map(|&mean| f32::from(mean) * MEAN_UNIT).collect();
    for (r, row) in rows.chunks_exact_mut(size).enumerate() {
        let is_there = is_token(row);
        for ((x, factor), offset) in row.iter_mut().zip(&factors).zip(&offsets) {
            *x = *x * factor - offset;
        }
        let scale = if is_there { step(row, layout) } else { 0 };
        tokens[2 * r..2 * r + 2].copy_from_slice(&scale.to_le_bytes());
        let code_bytes = layout.code_bytes();
        encode(row, f16_to_f32(scale), layout, &mut codes[r * code_bytes..(r + 1) * code_bytes]);
    }
}

/// The channels' scales and means, as they are stored.
fn normalise(rows: &[f32], counts: &[bool], size: usize) -> (Vec<u8>, Vec<i16>) {
    let counted = || rows.chunks_exact(size).zip(counts).filter(|(_, counts)| **counts).map(|(row, _)| row);
    let n = counted().count().max(1) as f32;
    let mut means = vec![0.0_f32; size];
    for row in counted() {
        for (mean, x) in means.iter_mut().zip(row) {
            *mean += x / n;
        }
    }
    let squares: Vec<f32> =
        counted().flat_map(|row| row.iter().zip(&means).map(|(x, mean)| (x - mean) * (x - mean))).collect();
    // Inverses of the squares of the channels' deviations, relative to the tokens' ones.
    let mut inverse = vec![1.0_f32; size];
    let mut variances = vec![0.0_f32; size];
    // The tokens' variances' logarithms.
    let mut logs = 0.0;
    for _ in 0..PASSES {
        variances.fill(0.0);
        logs = 0.0;
        for row in squares.chunks_exact(size) {
            let products = eights(row).zip(eights(&inverse));
            let token = sum(products.map(|(x, y)| std::array::from_fn(|i| x[i] * y[i]))) / size as f32;
            logs += token.max(f32::MIN_POSITIVE).ln() / n;
            let factor = if token > f32::MIN_POSITIVE { 1.0 / token / n } else { 0.0 };
            for (variance, square) in variances.iter_mut().zip(row) {
                *variance += square * factor;
            }
        }
        for (inverse, variance) in inverse.iter_mut().zip(&variances) {
            *inverse = 1.0 / variance.max(f32::MIN_POSITIVE);
        }
    }
    // So that tokens' scales are about 1, and channels' are what elements differ by.
    let of_tokens = (logs / 2.0).exp();
    // A mean has to fit its two bytes, too.
    let smallest = |mean: f32| mean.abs() / (MEAN_UNIT * 32_000.0);
    let scale = |(variance, mean): (&f32, &f32)| {
        let scale = (variance.sqrt() * of_tokens).max(smallest(*mean)).max(1e-6);
        ((scale.log2() * STEPS as f32).round() as i32 + 128).clamp(0, 255) as u8
    };
    let scales: Vec<u8> = variances.iter().zip(&means).map(scale).collect();
    let mean = |(mean, scale): (&f32, &u8)| {
        (mean / (CHANNEL[usize::from(*scale)] * MEAN_UNIT)).round().clamp(-32_767.0, 32_767.0) as i16
    };
    let means = means.iter().zip(&scales).map(mean).collect();
    (scales, means)
}

/// The step between a token's codes, as a half, for the least error of all.
fn step(row: &[f32], layout: Layout) -> u16 {
    let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let (middle, most) = (layout.middle(), 2.0 * layout.middle());
    let mut best = (f32::INFINITY, 0);
    for range in RANGES {
        let half = f32_to_f16(largest * range / middle);
        let scale = f16_to_f32(half);
        if scale == 0.0 {
            break;
        }
        let inverse = 1.0 / scale;
        let error = sum(eights(row).map(|x| {
            std::array::from_fn(|i| {
                let code = nearest((x[i] * inverse + middle).clamp(0.0, most));
                let error = x[i] - (code - middle) * scale;
                error * error
            })
        }));
        if error < best.0 {
            best = (error, half);
        }
    }
    best.1
}

/// The nearest whole number of one that is not negative, and small.
fn nearest(x: f32) -> f32 {
    (x + 0.5) as i32 as f32
}

fn encode(row: &[f32], scale: f32, layout: Layout, to: &mut [u8]) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (middle, most) = (layout.middle(), 2.0 * layout.middle());
    let block_bytes = BLOCK / 8 * layout.bits;
    for (block, to) in row.chunks_exact(BLOCK).zip(to.chunks_exact_mut(block_bytes)) {
        let mut codes = [0_u8; BLOCK];
        for (code, x) in codes.iter_mut().zip(block) {
            *code = (x * inverse + middle).clamp(0.0, most).round_ties_even() as u8;
        }
        let twos = |j: usize| (0..4).fold(0, |byte, k| byte | (codes[j + 8 * k] & 3) << (2 * k));
        match layout.bits {
            4 => (0..16).for_each(|j| to[j] = codes[j] | codes[j + 16] << 4),
            bits => {
                (0..8).for_each(|j| to[j] = twos(j));
                if bits == 3 {
                    let high = codes.iter().enumerate().fold(0_u32, |all, (i, code)| all | u32::from(code >> 2) << i);
                    to[8..].copy_from_slice(&high.to_le_bytes());
                }
            }
        }
    }
}

/// The channels' scales and means.
pub(in crate::ggml) fn channels(layout: Layout, tile: &[u8], scales: &mut [f32], means: &mut [f32]) {
    let (channels, rest) = tile[layout.channels()..].split_at(layout.size);
    for (((scale, mean), &byte), &number) in scales.iter_mut().zip(means).zip(channels).zip(rest.as_chunks().0) {
        *scale = CHANNEL[usize::from(byte)];
        *mean = f32::from(i16::from_le_bytes(number)) * MEAN_UNIT * *scale;
    }
}

/// The elements of some of a tile's rows, `stride` apart.
pub(in crate::ggml) fn unpack(
    layout: Layout,
    tile: &[u8],
    rows: std::ops::Range<usize>,
    to: &mut [f32],
    stride: usize,
) {
    let Layout { bits, size } = layout;
    let (mut scales, mut means) = (vec![0.0; size], vec![0.0; size]);
    channels(layout, tile, &mut scales, &mut means);
    for (r, to) in rows.zip(to.chunks_mut(stride)) {
        let at = layout.tokens() + 2 * r;
        let token = f16_to_f32(u16::from_le_bytes([tile[at], tile[at + 1]]));
        let codes = &tile[r * layout.code_bytes()..(r + 1) * layout.code_bytes()];
        for (block, codes) in codes.chunks_exact(BLOCK / 8 * bits).enumerate() {
            for i in 0..BLOCK {
                let code = match bits {
                    4 => codes[i % 16] >> (i / 16 * 4) & 15,
                    bits => {
                        let low = codes[i % 8] >> (i / 8 * 2) & 3;
                        if bits == 3 { low | (codes[8 + i / 8] >> (i % 8) & 1) << 2 } else { low }
                    }
                };
                let j = block * BLOCK + i;
                to[j] = means[j] + scales[j] * token * (f32::from(code) - layout.middle());
            }
        }
    }
}

/// The nearest half of a number that is not negative.
fn f32_to_f16(x: f32) -> u16 {
    let x = x.min(65504.0);
    if x < 6.103_515_6e-5 {
        return (x * 16_777_216.0).round_ties_even() as u16;
    }
    let bits = x.to_bits();
    let rounded = bits + 0xfff + (bits >> 13 & 1);
    ((rounded >> 13) - ((127 - 15) << 10)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are about normal, in −3..3.
    fn noise(seed: &mut u64) -> f32 {
        let mut next = || {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..6).map(|_| next() - 0.5).sum::<f32>()
    }

    fn keys(size: usize) -> Vec<f32> {
        keys_with(8.0, size)
    }

    /// Keys as they are: channels and tokens of any size, and channels that are nearly the same in all tokens.
    fn keys_with(means: f32, size: usize) -> Vec<f32> {
        let mut seed = 7;
        let channels: Vec<(f32, f32)> =
            (0..size).map(|_| (noise(&mut seed).exp2(), means * noise(&mut seed))).collect();
        let mut rows = Vec::new();
        for _ in 0..TILE {
            let token = noise(&mut seed).exp2();
            rows.extend(channels.iter().map(|(scale, mean)| mean + scale * token * noise(&mut seed)));
        }
        rows
    }

    /// The error's square over that of what is left without the channels' means, in f64.
    fn loss(rows: &[f32], got: &[f32], size: usize) -> f64 {
        let mean = |j: usize| rows.iter().skip(j).step_by(size).map(|&x| f64::from(x)).sum::<f64>() / TILE as f64;
        let means: Vec<f64> = (0..size).map(mean).collect();
        let error: f64 = rows.iter().zip(got).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let whole: f64 = rows.iter().enumerate().map(|(i, x)| (f64::from(*x) - means[i % size]).powi(2)).sum();
        error / whole
    }

    #[test]
    fn tiles_hold_what_their_bits_can() {
        // The second as of keys that have a bias.
        for (size, means) in [32, 64, 96, 128].into_iter().flat_map(|size| [(size, 8.0), (size, 40.0)]) {
            let rows = keys_with(means, size);
            for (bits, most) in [(4, 0.013), (3, 0.05), (2, 0.2)] {
                let layout = Layout { bits, size };
                let mut tile = vec![0; layout.bytes()];
                pack(&mut rows.clone(), layout, 0, &mut tile);
                let mut got = vec![0.0; rows.len()];
                unpack(layout, &tile, 0..TILE, &mut got, size);
                let loss = loss(&rows, &got, size);
                assert!(loss < most, "{bits} bits, {size}, means {means}: {loss}");
            }
        }
    }

    /// What is stored is what the definition says, element by element in f64; and a code more or less would be worse.
    #[test]
    fn codes_are_the_nearest() {
        let (size, rows) = (64, keys(64));
        for bits in 2..=4 {
            let layout = Layout { bits, size };
            let mut tile = vec![0; layout.bytes()];
            pack(&mut rows.clone(), layout, 0, &mut tile);
            let mut got = vec![0.0; rows.len()];
            unpack(layout, &tile, 0..TILE, &mut got, size);
            let most = 2 * layout.middle() as i32;
            for (i, (x, got)) in rows.iter().zip(&got).enumerate() {
                let (r, j) = (i / size, i % size);
                let scale = 2f64.powf((f64::from(tile[layout.channels() + j]) - 128.0) / 8.0);
                let at = layout.means() + 2 * j;
                let mean = scale * f64::from(i16::from_le_bytes([tile[at], tile[at + 1]])) / 64.0;
                let at = layout.tokens() + 2 * r;
                let token = f64::from(f16_to_f32(u16::from_le_bytes([tile[at], tile[at + 1]])));
                let y = (f64::from(*x) - mean) / scale / token + f64::from(layout.middle());
                let code = (y.round() as i32).clamp(0, most);
                let of = |code: i32| mean + scale * token * (f64::from(code) - f64::from(layout.middle()));
                let error = (f64::from(*got) - f64::from(*x)).abs();
                let best = (of(code) - f64::from(*x)).abs();
                assert!(
                    error <= best * (1.0 + 1e-4) + 1e-5 * (mean.abs() + scale),
                    "{bits} bits, row {r}, {j}: {error}, not {best}"
                );
            }
        }
    }

    #[test]
    fn absent_tokens_are_zero_codes_and_have_no_say() {
        let (size, layout) = (64, Layout { bits: 4, size: 64 });
        let mut rows = keys(size);
        rows[40 * size..].fill(0.0);
        let mut wild = rows.clone();
        wild[..4 * size].iter_mut().for_each(|x| *x *= 1000.0);
        let mut tiles = [vec![0; layout.bytes()], vec![0; layout.bytes()]];
        pack(&mut rows.clone(), layout, 4, &mut tiles[0]);
        pack(&mut wild, layout, 4, &mut tiles[1]);
        let (first, after) = (4 * layout.code_bytes(), layout.tokens() + 4 * 2);
        assert_eq!(tiles[0][first..layout.tokens()], tiles[1][first..layout.tokens()]);
        assert_eq!(tiles[0][after..], tiles[1][after..]);
        assert!(tiles[0][layout.tokens() + 80..layout.channels()].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn halves_are_the_nearest() {
        for half in 0..0x7bff_u16 {
            let (x, next) = (f16_to_f32(half), f16_to_f32(half + 1));
            assert_eq!((f32_to_f16(x), f32_to_f16(x + 0.49 * (next - x))), (half, half));
            assert_eq!(f32_to_f16(x + 0.51 * (next - x)), half + 1);
        }
        assert_eq!(f32_to_f16(1e9), 0x7bff);
    }
}
